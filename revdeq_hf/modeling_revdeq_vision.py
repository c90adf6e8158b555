# Copyright 2026 The revdeq_hf authors. Licensed under the Apache License, Version 2.0.
"""The image model: stages that each add the fixed point of a convolutional block, and a classifier."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndNoAttention, ImageClassifierOutputWithNoAttention
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple

from .block_revdeq import RevDEQConvBlock
from .configuration_revdeq import RevDEQVisionConfig
from .layer_revdeq import ReversibleFixedPoint
from .steps_revdeq import check_steps


@dataclass
class RevDEQVisionModelOutput(BaseModelOutputWithPoolingAndNoAttention):
    """`BaseModelOutputWithPoolingAndNoAttention` and the figures of the solves.

    Args:
        solver_steps (`torch.LongTensor` of shape `(batch, stages)`): Steps each example took.
        solver_residual (`torch.FloatTensor` of shape `(batch, stages)`): Relative residuals, see `FixedPointSolution`.
    """

    solver_steps: torch.Tensor | None = None
    solver_residual: torch.Tensor | None = None


@dataclass
class RevDEQImageClassifierOutput(ImageClassifierOutputWithNoAttention):
    """`ImageClassifierOutputWithNoAttention` and the figures of the solves, where `output_solver_stats=True` asked for them.

    Args:
        solver_steps (`torch.LongTensor` of shape `(batch, stages)`): Steps each example took.
        solver_residual (`torch.FloatTensor` of shape `(batch, stages)`): Relative residuals, see `FixedPointSolution`.
    """

    solver_steps: torch.Tensor | None = None
    solver_residual: torch.Tensor | None = None


class RevDEQVisionDownsample(nn.Module):
    """Pre-activation residual block of stride 2 between two stages: (batch, in, h, w) to (batch, out, ceil(h/2), ceil(w/2))."""

    def __init__(self, channels: int, out_channels: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels, eps=eps)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride=2, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(channels, out_channels, 1, stride=2, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        active = torch.relu(self.norm1(hidden_states))
        return self.shortcut(active) + self.conv2(torch.relu(self.norm2(self.conv1(active))))


@auto_docstring
class RevDEQVisionPreTrainedModel(PreTrainedModel):
    config: RevDEQVisionConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["ReversibleFixedPoint"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            fan_in = module.in_channels * module.kernel_size[0] * module.kernel_size[1]
            init.uniform_(module.weight, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
        else:
            super()._init_weights(module)


@auto_docstring
class RevDEQVisionModel(RevDEQVisionPreTrainedModel):
    def __init__(self, config: RevDEQVisionConfig) -> None:
        super().__init__(config)
        config.validate()
        sizes = config.hidden_sizes
        self.stem = nn.Sequential(
            nn.Conv2d(config.num_channels, sizes[0], 3, padding=1, bias=False), nn.BatchNorm2d(sizes[0], eps=config.norm_eps), nn.ReLU()
        )
        self.stages = nn.ModuleList(
            ReversibleFixedPoint(
                RevDEQConvBlock(size, ratio, config.group_width, config.norm_eps),
                beta=config.beta,
                max_steps=steps,
                tol=config.tol,
                gradient=config.gradient,
                solver=config.solver,
                keep_evaluations=config.keep_evaluations,
                drift_policy=config.drift_policy,
                steps_sampling=config.steps_sampling,
            )
            for size, ratio, steps in zip(sizes, config.expansion_ratios, config.steps_per_stage, strict=True)
        )
        self.downsamples = nn.ModuleList(RevDEQVisionDownsample(a, b, config.norm_eps) for a, b in zip(sizes, sizes[1:], strict=False))
        self.pooler = nn.AdaptiveAvgPool2d(config.pool_size)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        max_steps: "int | list[int] | None" = None,
        output_hidden_states: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> RevDEQVisionModelOutput:
        r"""
        max_steps (`int` or `list[int]`, *optional*):
            Steps of the solves, for all stages or one per stage, instead of `config.max_steps`.
        """
        config = self.config
        if pixel_values is None or pixel_values.dim() != 4 or pixel_values.shape[1] != config.num_channels:
            got = None if pixel_values is None else tuple(pixel_values.shape)
            raise ValueError(
                f"pixel_values must be (batch, {config.num_channels} channels, height, width), got {got}; see config.num_channels"
            )
        steps = config.steps_per_stage if max_steps is None else max_steps
        steps = [steps] * len(self.stages) if isinstance(steps, int) else list(steps)
        if len(steps) != len(self.stages):
            raise ValueError(f"max_steps must be a number or one per stage ({len(self.stages)}), got {steps}")
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        dtype = self.dtype
        hidden_states = self.stem(pixel_values.to(dtype))
        maps, taken, residuals = [], [], []
        for index, stage in enumerate(self.stages):
            if index:
                hidden_states = self.downsamples[index - 1](hidden_states)
            # x sets the dtype of the state: autocast's half precision is for the block's insides only
            hidden_states = hidden_states.to(dtype)
            drawn = max_steps is None and stage.draws_steps
            solution = stage(hidden_states, max_steps=None if drawn else check_steps(steps[index]))
            hidden_states = hidden_states + solution.z
            maps.append(hidden_states)
            taken.append(solution.steps)
            residuals.append(solution.residual)
        return RevDEQVisionModelOutput(
            last_hidden_state=hidden_states,
            pooler_output=self.pooler(hidden_states),
            hidden_states=tuple(maps) if output_hidden_states else None,
            solver_steps=torch.stack(taken, dim=1),
            solver_residual=torch.stack(residuals, dim=1),
        )


@auto_docstring
class RevDEQForImageClassification(RevDEQVisionPreTrainedModel):
    def __init__(self, config: RevDEQVisionConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = RevDEQVisionModel(config)
        self.classifier = nn.Linear(config.hidden_sizes[-1] * config.pool_size**2, config.num_labels)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        max_steps: "int | list[int] | None" = None,
        output_hidden_states: bool | None = None,
        output_solver_stats: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> RevDEQImageClassifierOutput:
        r"""
        max_steps (`int` or `list[int]`, *optional*):
            Steps of the solves, for all stages or one per stage, instead of `config.max_steps`.
        output_solver_stats (`bool`, *optional*, defaults to `False`):
            Whether to return `solver_steps` and `solver_residual`, each of shape (batch, stages).
        """
        outputs = self.model(pixel_values, max_steps=max_steps, output_hidden_states=output_hidden_states, return_dict=True)
        logits = self.classifier(outputs.pooler_output.flatten(1))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels, logits, self.config, **kwargs)
        return RevDEQImageClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            solver_steps=outputs.solver_steps if output_solver_stats else None,
            solver_residual=outputs.solver_residual if output_solver_stats else None,
        )


# see modeling_revdeq.py
AutoConfig.register("revdeq_vision", RevDEQVisionConfig, exist_ok=True)
AutoModel.register(RevDEQVisionConfig, RevDEQVisionModel, exist_ok=True)
AutoModelForImageClassification.register(RevDEQVisionConfig, RevDEQForImageClassification, exist_ok=True)
modeling_auto.MODEL_MAPPING_NAMES.setdefault("revdeq_vision", "RevDEQVisionModel")
modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.setdefault("revdeq_vision", "RevDEQForImageClassification")

__all__ = ["RevDEQForImageClassification", "RevDEQVisionModel", "RevDEQVisionPreTrainedModel"]
