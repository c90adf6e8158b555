"""Reversible Deep Equilibrium Models for Hugging Face transformers: exact gradients in constant memory.

Importing the package registers its models with transformers' Auto classes.
"""

from .cache_revdeq import EvaluationSlots
from .certificate_revdeq import DriftError
from .configuration_revdeq import RevDEQConfig, RevDEQVisionConfig
from .convergence import ResidualLoss
from .diagnostics import Diagnosis, LogitLens, diagnose, logit_lens
from .hub_revdeq import __version__
from .layer_revdeq import FixedPointSolution, ReversibleFixedPoint, SolveStatistics, fixed_point_layers
from .modeling_revdeq import (
    RevDEQForCausalLM,
    RevDEQForQuestionAnswering,
    RevDEQForSequenceClassification,
    RevDEQForTokenClassification,
    RevDEQModel,
    RevDEQPreTrainedModel,
)
from .modeling_revdeq_vision import (
    RevDEQForImageClassification,
    RevDEQForSemanticSegmentation,
    RevDEQVisionBackbone,
    RevDEQVisionModel,
    RevDEQVisionPreTrainedModel,
)

__all__ = [
    "Diagnosis",
    "DriftError",
    "EvaluationSlots",
    "FixedPointSolution",
    "LogitLens",
    "ResidualLoss",
    "RevDEQConfig",
    "RevDEQForCausalLM",
    "RevDEQForImageClassification",
    "RevDEQForQuestionAnswering",
    "RevDEQForSemanticSegmentation",
    "RevDEQForSequenceClassification",
    "RevDEQForTokenClassification",
    "RevDEQModel",
    "RevDEQPreTrainedModel",
    "RevDEQVisionBackbone",
    "RevDEQVisionConfig",
    "RevDEQVisionModel",
    "RevDEQVisionPreTrainedModel",
    "ReversibleFixedPoint",
    "SolveStatistics",
    "__version__",
    "diagnose",
    "fixed_point_layers",
    "logit_lens",
]
