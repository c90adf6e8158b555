# Copyright 2026 The revdeq_hf authors. Licensed under the Apache License, Version 2.0.
"""The image model: stages that each add the fixed point of a convolutional block; a classifier of images, one of pixels, and a backbone that returns maps."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification, AutoModelForSemanticSegmentation
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
    SemanticSegmenterOutput,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple, logging

from .block_revdeq import RevDEQConvBlock, RevDEQConvNextBlock, RevDEQRecallBlock
from .configuration_revdeq import RevDEQVisionConfig
from .hub_revdeq import BundledModel, may_look, refuse_settings
from .layer_revdeq import FixedPointSolution, ReversibleFixedPoint
from .loss_revdeq import share_of_batch
from .steps_revdeq import check_steps

logger = logging.get_logger(__name__)

IGNORED_LABEL = -100  # of cross-entropy: such an image counts for nothing


@dataclass
class _SolverFigures:
    """Fields of every output; before the class of transformers among the bases, so that they come after its own."""

    solver_steps: torch.Tensor | None = None
    solver_residual: torch.Tensor | None = None


@dataclass
class _Trajectories(_SolverFigures):
    trajectory: tuple[tuple[torch.Tensor, ...], ...] | None = None
    step_residuals: tuple[torch.Tensor, ...] | None = None


@dataclass
class RevDEQVisionModelOutput(_Trajectories, BaseModelOutputWithPoolingAndNoAttention):
    """`BaseModelOutputWithPoolingAndNoAttention` and the figures of the solves.

    Args:
        solver_steps (`torch.LongTensor` of shape `(batch, stages)`): Steps each image took.
        solver_residual (`torch.FloatTensor` of shape `(batch, stages)`): Relative residuals, see `FixedPointSolution`.
        trajectory (`tuple(tuple(torch.FloatTensor))`): With `output_trajectory=True`, for each stage its states after each step, of the shape of its map.
        step_residuals (`tuple(torch.FloatTensor)`): With `output_trajectory=True`, for each stage the relative residuals at the start of each step, of
            shape `(steps begun, batch)`.
    """


@dataclass
class RevDEQImageClassifierOutput(_Trajectories, ImageClassifierOutputWithNoAttention):
    """`ImageClassifierOutputWithNoAttention` and the figures of the solves, where they were asked for.

    Args:
        solver_steps (`torch.LongTensor` of shape `(batch, stages)`): With `output_solver_stats=True`, steps each image took.
        solver_residual (`torch.FloatTensor` of shape `(batch, stages)`): With `output_solver_stats=True`, relative residuals, see `FixedPointSolution`.
        trajectory (`tuple(tuple(torch.FloatTensor))`): With `output_trajectory=True`, as in `RevDEQVisionModelOutput`.
        step_residuals (`tuple(torch.FloatTensor)`): With `output_trajectory=True`, as in `RevDEQVisionModelOutput`.
    """


@dataclass
class RevDEQSemanticSegmenterOutput(_Trajectories, SemanticSegmenterOutput):
    """`SemanticSegmenterOutput` and the figures of the solve, by which an answer can be trusted or not.

    Args:
        solver_steps (`torch.LongTensor` of shape `(batch, 1)`): Steps each grid took.
        solver_residual (`torch.FloatTensor` of shape `(batch, 1)`): Relative residuals, see `FixedPointSolution`.
        trajectory (`tuple(tuple(torch.FloatTensor))`): With `output_trajectory=True`, as in `RevDEQVisionModelOutput`.
        step_residuals (`tuple(torch.FloatTensor)`): With `output_trajectory=True`, as in `RevDEQVisionModelOutput`.
    """


@dataclass
class RevDEQBackboneOutput(_SolverFigures, BackboneOutput):
    """`BackboneOutput` and the figures of the solves.

    Args:
        solver_steps (`torch.LongTensor` of shape `(batch, stages)`): Steps each image took.
        solver_residual (`torch.FloatTensor` of shape `(batch, stages)`): Relative residuals, see `FixedPointSolution`.
    """


class RevDEQVisionDownsample(nn.Module):
    """Pre-activation residual block of stride 2 between two stages: (batch, in, h, w) to (batch, out, ceil(h/2), ceil(w/2)).

    As the authors' `DownsampleLayerPreAct`: the shortcut starts from the bare input, not from its activation.
    """

    def __init__(self, channels: int, out_channels: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels, eps=eps)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride=2, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(channels, out_channels, 1, stride=2, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        inner = self.conv1(torch.relu(self.norm1(hidden_states)))
        return self.shortcut(hidden_states) + self.conv2(torch.relu(self.norm2(inner)))


class RevDEQVisionMaxPool(nn.Module):
    """Between two stages of a network with `downsample="max_pool"`: (batch, in, h, w) to (batch, out, ceil(h/2), ceil(w/2)).

    `pool(BN(conv(x)))`: a 3x3 convolution at the resolution of its input, of which a 3x3 max pool keeps the strongest responses. A stage learns most
    from an input with few zeros: with BatchNorm and ReLU behind the pool three to six points of accuracy are lost on CIFAR-10 (docs/image_model.md).
    """

    def __init__(self, channels: int, out_channels: int, eps: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels, eps=eps)
        self.pool = _max_pool(2)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.pool(self.norm(self.conv(hidden_states)))


def _max_pool(stride: int) -> nn.MaxPool2d:
    """Height and width divided by `stride`, rounded up; neighbouring windows overlap."""
    return nn.MaxPool2d(2 * stride - 1, stride, padding=stride - 1)


@auto_docstring
class RevDEQVisionPreTrainedModel(BundledModel, PreTrainedModel):
    config: RevDEQVisionConfig
    model_file = __file__
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["ReversibleFixedPoint"]
    _input_embed_layer = "stem"  # FSDP asks for it
    supports_gradient_checkpointing = True

    def _set_gradient_checkpointing(self, *args, **kwargs) -> None:
        """Activation checkpointing: gradient="backprop" becomes "checkpoint" in training; in the other modes the memory of the solves is constant already."""
        super()._set_gradient_checkpointing(*args, **kwargs)
        for network in self.modules():
            if isinstance(network, RevDEQVisionNetwork) and network.gradient_checkpointing and network.stages[0].gradient != "backprop":
                logger.warning_once(
                    f"activation checkpointing changes nothing: with gradient={network.stages[0].gradient!r} the memory of a solve does not grow with the "
                    "number of steps already"
                )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        as_the_authors = isinstance(module, nn.Linear) and self.config.initializer_range is None
        if isinstance(module, nn.Conv2d) or as_the_authors:
            bound = 1 / math.sqrt(module.weight[0].numel())  # type: ignore[index]
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        else:
            super()._init_weights(module)


class RevDEQVisionNetwork(RevDEQVisionPreTrainedModel):
    """What the body and the backbone share: the stem, the stages, and what halves the resolution between them."""

    def __init__(self, config: RevDEQVisionConfig) -> None:
        super().__init__(config)
        config.validate()
        self.gradient_checkpointing = False
        sizes = config.hidden_sizes
        pooled = config.downsample == "max_pool"
        stride = 1 if pooled else config.stem_stride
        sides = config.kernel_sides if config.stem == "plain" else (3, 3)
        height, width = (max(side, 2 * stride - 1) for side in sides)
        padding = (height // 2, width // 2)
        convolution = nn.Conv2d(config.num_channels, sizes[0], (height, width), stride, padding, bias=config.stem != "batch_norm")
        stem: list[nn.Module] = [convolution]
        if config.stem == "batch_norm":
            stem += [nn.BatchNorm2d(sizes[0], eps=config.norm_eps), nn.ReLU()]
        elif config.stem == "group_norm":
            stem.append(nn.GroupNorm(sizes[0] // config.group_width, sizes[0], eps=config.norm_eps))
        if pooled and config.stem_stride > 1:
            stem.append(_max_pool(config.stem_stride))
        self.stem = nn.Sequential(*stem)
        self.stages = nn.ModuleList(
            ReversibleFixedPoint(_make_block(config, size, ratio), max_steps=steps, **self._solver_settings())
            for size, ratio, steps in zip(sizes, config.expansion_ratios, config.steps_per_stage, strict=True)
        )
        self._remember_configuration(self.stages)
        downsample = RevDEQVisionMaxPool if pooled else RevDEQVisionDownsample
        self.downsamples = nn.ModuleList(downsample(a, b, config.norm_eps) for a, b in zip(sizes, sizes[1:], strict=False))
        if len(sizes) > 1:  # FSDP refuses names of classes that the model does not hold
            self._no_split_modules = [*self._no_split_modules, downsample.__name__]

    def compute_maps(
        self,
        pixel_values: torch.Tensor | None,
        max_steps: "int | list[int] | None" = None,
        tol: float | None = None,
        output_trajectory: bool = False,
        num_restarts: int | None = None,
    ) -> tuple[list[torch.Tensor], list[FixedPointSolution]]:
        """The maps of the stem and of each stage, and the stages' solutions.

        Args:
            pixel_values: (batch, channels, height, width), floating.
            max_steps, tol, output_trajectory, num_restarts: as in `RevDEQVisionModel.forward`.

        Returns:
            `1 + stages` maps: the stem's (batch, hidden_sizes[0], height, width), then the stages', stage i (from 0) of
            (batch, hidden_sizes[i], ceil(height / 2**i), ceil(width / 2**i)), and a `FixedPointSolution` per stage.

        Raises:
            ValueError: the images or `max_steps` do not fit.
        """
        self._check_images(pixel_values)
        assert pixel_values is not None
        self._follow_configuration(self.stages)
        steps = self._steps_of(max_steps)
        dtype = self.dtype
        # x sets the dtype of the state: autocast's half precision is for the block's insides only
        hidden_states = self.stem(pixel_values.to(dtype)).to(dtype)
        # saves a tenth to two fifths of an evaluation's time; not measured on accelerators
        if hidden_states.device.type == "cpu" and getattr(self.stages[0].block, "channels_last_on_cpu", False):
            hidden_states = hidden_states.contiguous(memory_format=torch.channels_last)
        maps, solutions = [hidden_states], []
        for index, stage in enumerate(self.stages):
            if index:
                hidden_states = self.downsamples[index - 1](hidden_states).to(dtype)
            drawn = max_steps is None and stage.draws_steps
            checkpointed = self.gradient_checkpointing and self.training and stage.gradient == "backprop"
            solution = stage(
                hidden_states,
                max_steps=None if drawn else steps[index],
                tol=tol,
                gradient="checkpoint" if checkpointed else None,
                output_trajectory=output_trajectory,
                num_restarts=num_restarts,
            )
            # a device map may part x and z
            hidden_states = hidden_states.to(solution.z.device) + solution.z if self.config.residual_stages else solution.z
            maps.append(hidden_states)
            solutions.append(solution)
        return maps, solutions

    def _steps_of(self, max_steps: "int | list[int] | None") -> list[int]:
        count = len(self.stages)
        given = self.config.steps_per_stage if max_steps is None else max_steps
        steps = list(given) if isinstance(given, (list, tuple)) else [given] * count
        if len(steps) != count:
            raise ValueError(f"max_steps must be a number or one per stage ({count}), got {max_steps}")
        return [check_steps(number) for number in steps]

    def _check_images(self, pixel_values: torch.Tensor | None) -> None:
        """Raises ValueError unless the images fit the network."""
        channels = self.config.num_channels
        if not isinstance(pixel_values, torch.Tensor):
            raise ValueError(
                f"pixel_values must be a tensor of shape (batch, {channels} channels, height, width), got "
                f"{'None' if pixel_values is None else type(pixel_values).__name__}; an image processor makes it: processor(images, return_tensors='pt')"
            )
        if pixel_values.dim() != 4 or pixel_values.shape[1] != channels:
            raise ValueError(
                f"pixel_values must be (batch, {channels} channels, height, width), got {tuple(pixel_values.shape)}; see config.num_channels, and "
                "image.convert('RGB') or 'L' for images of another number of channels"
            )
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values must be floating, rescaled and normalised, got {pixel_values.dtype}; an image processor makes them from whole numbers"
            )
        batch, _, height, width = pixel_values.shape
        if batch == 0 or height == 0 or width == 0:
            raise ValueError(f"there must be an image of at least 1 x 1 pixels, got pixel_values of shape {tuple(pixel_values.shape)}")
        if not self.training:
            return
        divisor = self.config.stem_stride * 2 ** len(self.downsamples)
        values = batch * -(-height // divisor) * -(-width // divisor)
        if values == 1 and any(isinstance(module, nn.BatchNorm2d) and module.training for module in self.modules()):
            raise ValueError(
                f"one image of {height} x {width} pixels, divided by {divisor}, leaves BatchNorm a single value per channel, of which it cannot take "
                "statistics; train on more images at a time, on larger ones, or with fewer stages (config.hidden_sizes) or a smaller config.stem_stride"
            )


def _make_block(config: RevDEQVisionConfig, channels: int, expansion: int) -> nn.Module:
    if config.block_type == "modern":
        return RevDEQConvNextBlock(config, channels, expansion)
    if config.block_type == "recall":
        return RevDEQRecallBlock(config, channels, expansion)
    return RevDEQConvBlock(channels, expansion, config.group_width, config.norm_eps)


def _figures(solutions: list[FixedPointSolution], device: torch.device) -> dict[str, torch.Tensor]:
    """`solver_steps` and `solver_residual`, (batch, stages), on one device."""
    return {
        "solver_steps": torch.stack([solution.steps.to(device) for solution in solutions], dim=1),
        "solver_residual": torch.stack([solution.residual.to(device) for solution in solutions], dim=1),  # type: ignore[union-attr]
    }


@auto_docstring(
    custom_intro="""
    The image model without a head: a stem, stages of one fixed point each, and pooled features.
    """
)
class RevDEQVisionModel(RevDEQVisionNetwork):
    def __init__(self, config: RevDEQVisionConfig) -> None:
        super().__init__(config)
        self.pooler = nn.AdaptiveAvgPool2d(config.pool_size)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        max_steps: "int | list[int] | None" = None,
        tol: float | None = None,
        output_hidden_states: bool | None = None,
        output_trajectory: bool = False,
        num_restarts: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> RevDEQVisionModelOutput:
        r"""
        max_steps (`int` or `list[int]`, *optional*):
            Steps of the solves, for all stages or one per stage, instead of `config.max_steps`.
        tol (`float`, *optional*):
            Relative residual at which an image stops in each stage, instead of `config.tol`.
        output_hidden_states (`bool`, *optional*):
            Whether to return `hidden_states`, the maps of the stem and of each stage: `len(config.hidden_sizes)` + 1 in all, the first and the second of
            the images' height and width, each further one of half of that, rounded up. The last one is `last_hidden_state`.
        output_trajectory (`bool`, *optional*, defaults to `False`):
            Whether to return `trajectory` and `step_residuals`, at the price of a state for every step of every stage. A stage's state after step n is
            what it would add to its input (`config.residual_stages`) had its solve ended there; images that met `config.tol` keep theirs.
        num_restarts (`int`, *optional*):
            Start states of each stage's solve, of which each image takes the solution of the smallest residual, instead of `config.num_restarts`.
        """
        refuse_settings(kwargs)
        maps, solutions = self.compute_maps(pixel_values, max_steps, tol, output_trajectory, num_restarts)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return RevDEQVisionModelOutput(
            last_hidden_state=maps[-1],
            pooler_output=self.pooler(maps[-1]),
            hidden_states=tuple(maps) if output_hidden_states else None,
            **_figures(solutions, maps[-1].device),
            trajectory=tuple(tuple(solution.trajectory) for solution in solutions) if output_trajectory else None,  # type: ignore[arg-type]
            step_residuals=tuple(solution.step_residuals for solution in solutions) if output_trajectory else None,  # type: ignore[misc]
        )


@auto_docstring(
    custom_intro="""
    The image model with a linear layer on its pooled features: classes, several labels at once, or a regression.
    """
)
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
        tol: float | None = None,
        output_hidden_states: bool | None = None,
        output_solver_stats: bool = False,
        output_trajectory: bool = False,
        num_restarts: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> RevDEQImageClassifierOutput:
        r"""
        labels (`torch.LongTensor` of shape `(batch,)`, *optional*):
            Classes, from 0 to `config.num_labels` - 1, or -100 for an image that counts for nothing. Floating labels of shape `(batch, num_labels)` stand
            for several labels at once (binary cross-entropy), floating ones of shape `(batch,)` where `num_labels` is 1 for a regression (mean squared
            error). `config.problem_type`, if None, is set by the first labels seen, as in transformers' own models.
        max_steps (`int` or `list[int]`, *optional*):
            Steps of the solves, for all stages or one per stage, instead of `config.max_steps`.
        tol (`float`, *optional*):
            Relative residual at which an image stops in each stage, instead of `config.tol`.
        output_hidden_states (`bool`, *optional*):
            Whether to return `hidden_states`, the maps of the stem and of each stage, see `RevDEQVisionModel.forward`.
        output_solver_stats (`bool`, *optional*, defaults to `False`):
            Whether to return `solver_steps` and `solver_residual`, each of shape (batch, stages).
        output_trajectory (`bool`, *optional*, defaults to `False`):
            Whether to return `trajectory` and `step_residuals`, at the price of a state for every step of every stage, see `RevDEQVisionModel.forward`.
        num_restarts (`int`, *optional*):
            Start states of each stage's solve, of which each image takes the solution of the smallest residual, instead of `config.num_restarts`.

        Example:

        ```python
        >>> import torch
        >>> from revdeq_hf import RevDEQForImageClassification, RevDEQVisionConfig

        >>> config = RevDEQVisionConfig(hidden_sizes=[16, 32], expansion_ratios=[1, 1], num_labels=5)
        >>> model = RevDEQForImageClassification(config).eval()
        >>> model(torch.randn(2, 3, 32, 32)).logits.shape
        torch.Size([2, 5])

        ```"""
        refuse_settings(kwargs)
        if labels is not None and pixel_values is not None:
            self._check_labels(labels, len(pixel_values))
        outputs: RevDEQVisionModelOutput = self.model(
            pixel_values,
            max_steps=max_steps,
            tol=tol,
            output_hidden_states=output_hidden_states,
            output_trajectory=output_trajectory,
            num_restarts=num_restarts,
            return_dict=True,
        )
        logits = self.classifier(outputs.pooler_output.flatten(1))
        loss = None
        if labels is not None:
            num_items = kwargs.pop("num_items_in_batch", None)
            loss = share_of_batch(self.loss_function(labels, logits, self.config, **kwargs), labels, num_items)
        return RevDEQImageClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            solver_steps=outputs.solver_steps if output_solver_stats else None,
            solver_residual=outputs.solver_residual if output_solver_stats else None,
            trajectory=outputs.trajectory,
            step_residuals=outputs.step_residuals,
        )

    def _check_labels(self, labels: torch.Tensor, batch: int) -> None:
        """Raises ValueError unless the labels fit `config.problem_type` (None: what the loss will take it for)."""
        count = self.config.num_labels
        if not isinstance(labels, torch.Tensor):
            raise ValueError(f"labels must be a tensor, got {type(labels).__name__}")
        got = f"got {tuple(labels.shape)} of {labels.dtype}"
        kind = self.config.problem_type
        if kind is None:
            whole = "single_label_classification" if not labels.is_floating_point() else "multi_label_classification"
            kind = "regression" if count == 1 else whole
        if kind == "single_label_classification":
            if labels.dtype != torch.int64 or labels.shape not in ((batch,), (batch, 1)):
                raise ValueError(
                    f"labels of classes must be ({batch},) of torch.int64, {got}; several labels at once are floating, ({batch}, {count}), with "
                    "config.problem_type='multi_label_classification'; a number to predict needs num_labels=1 and problem_type='regression'"
                )
            _check_range(labels, count, IGNORED_LABEL, str(IGNORED_LABEL))
            return
        shapes = ((batch,), (batch, 1)) if kind == "regression" and count == 1 else ((batch, count),)
        if not labels.is_floating_point() or labels.shape not in shapes:
            raise ValueError(
                f"labels of problem_type={kind!r} with num_labels={count} must be floating, {' or '.join(map(str, shapes))}, {got}"
            )


@auto_docstring(
    custom_intro="""
    The image model of one stage with a linear layer at every pixel: one label per pixel at full resolution. Trained on small grids it solves larger
    ones by more steps, see docs/think_longer.md.
    """
)
class RevDEQForSemanticSegmentation(RevDEQVisionPreTrainedModel):
    def __init__(self, config: RevDEQVisionConfig) -> None:
        super().__init__(config)
        if len(config.hidden_sizes) != 1 or config.stem_stride != 1:
            raise ValueError(
                f"a label for every pixel needs one stage at full resolution, got hidden_sizes={config.hidden_sizes} and stem_stride="
                f"{config.stem_stride}; RevDEQVisionConfig.dense_prediction() is such a network, and RevDEQVisionBackbone serves segmenters that decode"
            )
        self.num_labels = config.num_labels
        self.model = RevDEQVisionModel(config)
        self.classifier = nn.Conv2d(config.hidden_sizes[0], config.num_labels, 1)
        self.post_init()

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether Trainer may tell how many labels count in an update of several micro-batches: it counts those other than -100."""
        return self.config.semantic_loss_ignore_index == IGNORED_LABEL

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        max_steps: "int | list[int] | None" = None,
        tol: float | None = None,
        output_hidden_states: bool | None = None,
        output_trajectory: bool = False,
        num_restarts: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> RevDEQSemanticSegmenterOutput:
        r"""
        labels (`torch.LongTensor` of shape `(batch, height, width)`, *optional*):
            Classes, from 0 to `config.num_labels` - 1, or `config.semantic_loss_ignore_index` for a pixel that counts for nothing. The loss is the mean
            cross-entropy of the others. Where the pixels that count are unevenly spread and micro-batches are accumulated, set that index to -100, by which
            Trainer counts; else the mean of their means is taken.
        max_steps (`int` or `list[int]`, *optional*):
            Steps of the solve instead of `config.max_steps`: a larger grid needs more.
        tol (`float`, *optional*):
            Relative residual at which a grid stops, instead of `config.tol`.
        output_hidden_states (`bool`, *optional*):
            Whether to return `hidden_states`, the maps of the stem and of the stage.
        output_trajectory (`bool`, *optional*, defaults to `False`):
            Whether to return `trajectory` and `step_residuals`, at the price of a state for every step, see `RevDEQVisionModel.forward`.
        num_restarts (`int`, *optional*):
            Start states, of which each grid takes the solution of the smallest residual, instead of `config.num_restarts`.

        Example:

        ```python
        >>> import torch
        >>> from revdeq_hf import RevDEQForSemanticSegmentation, RevDEQVisionConfig

        >>> config = RevDEQVisionConfig.dense_prediction(num_channels=3, num_labels=2)
        >>> model = RevDEQForSemanticSegmentation(config).eval()
        >>> model(torch.randn(1, 3, 9, 9)).logits.shape, model(torch.randn(1, 3, 21, 33), max_steps=60).logits.shape
        (torch.Size([1, 2, 9, 9]), torch.Size([1, 2, 21, 33]))

        ```"""
        refuse_settings(kwargs)
        if labels is not None and isinstance(pixel_values, torch.Tensor):
            self._check_labels(labels, pixel_values)
        outputs: RevDEQVisionModelOutput = self.model(
            pixel_values,
            max_steps=max_steps,
            tol=tol,
            output_hidden_states=output_hidden_states,
            output_trajectory=output_trajectory,
            num_restarts=num_restarts,
            return_dict=True,
        )
        logits = self.classifier(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            ignored = self.config.semantic_loss_ignore_index
            loss = nn.functional.cross_entropy(logits.float(), labels.to(logits.device), ignore_index=ignored)
            loss = share_of_batch(loss, labels, kwargs.get("num_items_in_batch") if self.accepts_loss_kwargs else None)
        return RevDEQSemanticSegmenterOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            solver_steps=outputs.solver_steps,
            solver_residual=outputs.solver_residual,
            trajectory=outputs.trajectory,
            step_residuals=outputs.step_residuals,
        )

    def _check_labels(self, labels: torch.Tensor, pixel_values: torch.Tensor) -> None:
        """Raises ValueError unless there is a label of the model's for each pixel."""
        count, ignored = self.config.num_labels, self.config.semantic_loss_ignore_index
        expected = (pixel_values.shape[0], *pixel_values.shape[2:])
        if not isinstance(labels, torch.Tensor) or labels.dtype != torch.int64 or tuple(labels.shape) != expected:
            got = f"{tuple(labels.shape)} of {labels.dtype}" if isinstance(labels, torch.Tensor) else type(labels).__name__
            raise ValueError(f"labels must be (batch, height, width) = {expected} of torch.int64, one class per pixel, got {got}")
        _check_range(labels, count, ignored, f"config.semantic_loss_ignore_index = {ignored}")


@auto_docstring(
    custom_intro="""
    The image model as a backbone for detectors and segmenters: the maps of the stages that `config.out_features` names.
    """
)
class RevDEQVisionBackbone(BackboneMixin, RevDEQVisionNetwork):
    has_attentions = False

    def __init__(self, config: RevDEQVisionConfig) -> None:
        super().__init__(config)
        self.num_features = [config.hidden_sizes[0], *config.hidden_sizes]
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        max_steps: "int | list[int] | None" = None,
        tol: float | None = None,
        output_hidden_states: bool | None = None,
        num_restarts: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> RevDEQBackboneOutput:
        r"""
        max_steps (`int` or `list[int]`, *optional*):
            Steps of the solves, for all stages or one per stage, instead of `config.max_steps`.
        tol (`float`, *optional*):
            Relative residual at which an image stops in each stage, instead of `config.tol`.
        output_hidden_states (`bool`, *optional*):
            Whether to return `hidden_states`, the maps of the stem and of each stage, whatever `config.out_features` names.
        num_restarts (`int`, *optional*):
            Start states of each stage's solve, of which each image takes the solution of the smallest residual, instead of `config.num_restarts`.

        Example:

        ```python
        >>> import torch
        >>> from transformers import AutoBackbone
        >>> from revdeq_hf import RevDEQVisionConfig

        >>> config = RevDEQVisionConfig(hidden_sizes=[16, 32], expansion_ratios=[1, 1], out_features=["stage1", "stage2"])
        >>> backbone = AutoBackbone.from_config(config).eval()
        >>> [tuple(feature_map.shape) for feature_map in backbone(torch.randn(1, 3, 32, 32)).feature_maps]
        [(1, 16, 32, 32), (1, 32, 16, 16)]

        ```"""
        refuse_settings(kwargs)
        maps, solutions = self.compute_maps(pixel_values, max_steps, tol, num_restarts=num_restarts)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return RevDEQBackboneOutput(
            feature_maps=tuple(features for name, features in zip(self.stage_names, maps, strict=True) if name in self.out_features),
            hidden_states=tuple(maps) if output_hidden_states else None,
            **_figures(solutions, maps[-1].device),
        )


def _check_range(labels: torch.Tensor, count: int, ignored: int, ignored_name: str) -> None:
    """Raises ValueError unless the labels are classes or the one that is ignored; where the look would cost something, it is left out."""
    if not may_look(labels):
        return
    wrong = labels[((labels < 0) | (labels >= count)) & (labels != ignored)]
    if wrong.numel():
        raise ValueError(
            f"labels must lie in [0, num_labels) = [0, {count}), or be {ignored_name} to be ignored, got {sorted(set(wrong.tolist()))[:5]}; "
            "make the model with num_labels (or id2label) of the data"
        )


# see modeling_revdeq.py
if not __name__.startswith("transformers_modules."):
    AutoConfig.register("revdeq_vision", RevDEQVisionConfig, exist_ok=True)
for auto_class, names, model_class in (
    (AutoModel, modeling_auto.MODEL_MAPPING_NAMES, RevDEQVisionModel),
    (AutoModelForImageClassification, modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, RevDEQForImageClassification),
    (AutoModelForSemanticSegmentation, modeling_auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES, RevDEQForSemanticSegmentation),
    (AutoBackbone, modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES, RevDEQVisionBackbone),
):
    auto_class.register(RevDEQVisionConfig, model_class, exist_ok=True)
    names.setdefault("revdeq_vision", model_class.__name__)

__all__ = [
    "RevDEQForImageClassification",
    "RevDEQForSemanticSegmentation",
    "RevDEQVisionBackbone",
    "RevDEQVisionModel",
    "RevDEQVisionPreTrainedModel",
]
