"""Reversible Deep Equilibrium Models for Hugging Face transformers: exact gradients in constant memory.

Importing the package registers its models with transformers' Auto classes.
"""

from ._version import __version__
from .configuration_revdeq import RevDEQConfig, RevDEQVisionConfig
from .layer_revdeq import DriftError, FixedPointSolution, ReversibleFixedPoint, SolveStatistics
from .modeling_revdeq import RevDEQForCausalLM, RevDEQModel, RevDEQPreTrainedModel
from .modeling_revdeq_vision import RevDEQForImageClassification, RevDEQVisionModel, RevDEQVisionPreTrainedModel

__all__ = [
    "DriftError",
    "FixedPointSolution",
    "RevDEQConfig",
    "RevDEQForCausalLM",
    "RevDEQForImageClassification",
    "RevDEQModel",
    "RevDEQPreTrainedModel",
    "RevDEQVisionConfig",
    "RevDEQVisionModel",
    "RevDEQVisionPreTrainedModel",
    "ReversibleFixedPoint",
    "SolveStatistics",
    "__version__",
]
