# Copyright 2026 The revdeq_hf authors. Licensed under the Apache License, Version 2.0.
"""Configurations of the language model and of the image classifier: fields, their checks, and the paper's presets."""

import math
from typing import cast

from huggingface_hub.dataclasses import strict
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils.type_validators import interval

from .checks_revdeq import check_choice, check_settings
from .hub_revdeq import BundledConfig

BLOCK_TYPES = ("modern", "paper")
VISION_BLOCK_TYPES = (*BLOCK_TYPES, "recall")
KV_CACHES = ("per_evaluation", "shared")
STEMS = ("batch_norm", "group_norm", "plain")
DOWNSAMPLES = ("residual", "max_pool")
MOST_LAYERS = 1000


def _tensor_parallel(config: "RevDEQConfig") -> dict[str, str]:
    """Which matrices of the layers transformers shards by columns or rows, where a model is loaded with a `DistributedConfig`; names of what is not there would
    be warned of."""
    paper = config.block_type == "paper"
    mlp = {"up_proj": "colwise", "mid_proj": "rowwise"} if paper else {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
    styles = {f"mlp.{name}": style for name, style in mlp.items()}
    styles |= {**{f"self_attn.{name}_proj": "colwise" for name in "qkv"}, "self_attn.o_proj": "rowwise"}
    places = {"prelude": config.num_prelude_layers, "solve.block.layers": config.num_block_layers, "coda": config.num_coda_layers}
    return {f"{place}.*.{name}": style for place, layers in places.items() if layers for name, style in styles.items()}


@strict
class RevDEQConfig(BundledConfig, PreTrainedConfig):
    r"""Configuration of the language model, `RevDEQModel` and its heads.

    Args:
        vocab_size: number of token ids.
        hidden_size: width of the state.
        intermediate_size: width of the MLP's hidden layer (two hidden layers in the paper's block).
        num_attention_heads: must divide `hidden_size`.
        num_key_value_heads: must divide `num_attention_heads`; None: as many.
        num_block_layers: transformer layers inside one evaluation of the block.
        num_prelude_layers, num_coda_layers: ordinary layers before and after the fixed point.
        max_position_embeddings: longest sequence; a bound with the paper's learned positions, a hint with rotary ones.
        hidden_act: activation of the MLP, a name of `transformers.activations.ACT2FN`.
        block_type: "modern" (RMSNorm, rotary positions, gated MLP; identity path from the injected input, none from the state) or
            "paper" (section 5 of arXiv 2509.12917: LayerNorm, learned positions, MLP with two hidden layers; identity path from the state).
        beta: relaxation of the iteration, in (0, 2), not 1.
        max_steps: steps of a solve, two evaluations of the block each.
        tol: relative residual at which a position stops, with `is_causal=False` an example; None: always `max_steps`.
        solver, gradient, keep_evaluations, drift_policy: as in `revdeq_hf.ReversibleFixedPoint`.
        steps_sampling: None, or a dict such as {"distribution": "uniform", "min_steps": 2, "max_steps": 8}: each training batch draws its number of
            steps, see `steps_revdeq.py`; evaluation and generation take `max_steps`.
        damping, path_noise: as in `revdeq_hf.ReversibleFixedPoint`.
        initial_scale, num_restarts: as in `revdeq_hf.ReversibleFixedPoint`; with `is_causal=False` only.
        kv_cache: "per_evaluation", one cache slot for every evaluation and layer, which equals the full forward pass; or "shared", one for every layer,
            which holds the keys and values of the last evaluation: `2 * max_steps` times smaller, any `max_steps` per call on one cache, the
            same at the fixed point and an approximation before it (see docs/language_model.md).
        skip_logits: whether training returns no logits, so that its memory does not grow with tokens times `vocab_size`; False where a trainer's own loss
            reads them.
        attention_dropout, hidden_dropout: dropout probabilities inside the block; one mask per solve.
        initializer_range: standard deviation of the embeddings and the head. (The modern block's matrices start with `1/sqrt(inputs)`, those at
            the end of its attention and MLP with a tenth of that. The paper's block: 1 for embeddings, uniform in `+-1/sqrt(inputs)` for linear
            layers, whatever this field says.)
        norm_eps: added to variances.
        rope_parameters: rotary positions, as in other transformers models; the paper's block has none.
        tie_word_embeddings: whether the head shares the embedding's weights.
        use_cache: whether `generate` and calls without gradients return a cache.
        is_causal: whether a token sees itself and what is before it only. False: attention in both directions, for token classification and
            question answering; there is no cache then, and `generate` is refused.
        pad_token_id, bos_token_id, eos_token_id: special tokens.

    Example:
        >>> from revdeq_hf import RevDEQConfig, RevDEQForCausalLM
        >>> config = RevDEQConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_attention_heads=4, max_steps=3)
        >>> RevDEQForCausalLM(config).num_parameters()
        14528
    """

    model_type = "revdeq"
    keys_to_ignore_at_inference = ["past_key_values", "cache", "solver_steps", "solver_residual"]
    base_model_fsdp_plan = {
        "embed_tokens": "free_full_weight",
        "solve": "free_full_weight",
        "norm": "keep_full_weight",
    }

    vocab_size: int = 50304
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    num_block_layers: int = 1
    num_prelude_layers: int = 0
    num_coda_layers: int = 0
    max_position_embeddings: int = 1024
    hidden_act: str = "silu"
    block_type: str = "modern"
    beta: int | float = 0.5
    max_steps: int = 4
    tol: int | float | None = None
    solver: str = "reversible"
    gradient: str = "reversible"
    keep_evaluations: int = 1
    drift_policy: str = "warn"
    steps_sampling: dict | None = None
    damping: int | float = 0.0
    initial_scale: int | float = 0.0
    path_noise: int | float = 0.0
    num_restarts: int = 1
    kv_cache: str = "per_evaluation"
    skip_logits: bool = True
    attention_dropout: int | float = 0.0
    hidden_dropout: int | float = 0.0
    initializer_range: float = interval(min=0.0, max=1.0)(default=0.02)
    norm_eps: float = 1e-5
    rope_parameters: dict | None = None
    tie_word_embeddings: bool = False
    use_cache: bool = True
    is_causal: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        slots, head_dim = kwargs.pop("num_hidden_layers", None), kwargs.pop("head_dim", None)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self.base_model_tp_plan = _tensor_parallel(self)
        super().__post_init__(**kwargs)
        if head_dim is not None and head_dim != self.head_dim:
            raise ValueError(
                f"head_dim of a RevDEQ is hidden_size / num_attention_heads = {self.head_dim}, got {head_dim}; choose num_attention_heads by it"
            )
        if slots is not None and slots != self.num_hidden_layers:
            raise ValueError(
                f"num_hidden_layers of a RevDEQ is not a setting: max_steps, num_block_layers, num_prelude_layers, num_coda_layers and kv_cache make it "
                f"{self.num_hidden_layers}, got {slots}; set max_steps or num_block_layers instead"
            )

    @property
    def num_hidden_layers(self) -> int:
        """Cache slots: one for each layer of each evaluation (of the last one, with a shared cache), and one for each layer outside the fixed point."""
        evaluations = 1 if self.kv_cache == "shared" else 2 * self.max_steps
        return evaluations * self.num_block_layers + self.num_prelude_layers + self.num_coda_layers

    @num_hidden_layers.setter
    def num_hidden_layers(self, slots: int) -> None:
        if slots == self.num_hidden_layers:
            return
        inside = slots - self.num_prelude_layers - self.num_coda_layers
        if self.kv_cache == "shared" or inside <= 0 or inside % (2 * self.num_block_layers):
            raise ValueError(
                f"num_hidden_layers counts the slots of the cache: with kv_cache={self.kv_cache!r} "
                f"{'' if self.kv_cache == 'shared' else '2 * max_steps * '}{self.num_block_layers} for the fixed point and "
                f"{self.num_prelude_layers + self.num_coda_layers} outside it, got {slots}; set max_steps or num_block_layers instead"
            )
        self.max_steps = inside // (2 * self.num_block_layers)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def paper_wikitext103(cls, **kwargs) -> "RevDEQConfig":
        """The paper's language model for WikiText-103: 94M parameters, 448 tokens, 4 steps at beta 0.5, `tol` 1e-3."""
        settings = dict(
            vocab_size=50304,
            hidden_size=768,
            intermediate_size=3072,
            num_attention_heads=12,
            max_position_embeddings=448,
            hidden_act="gelu_pytorch_tanh",
            block_type="paper",
            beta=0.5,
            max_steps=4,
            tol=1e-3,
        )
        return cls(**{**settings, **kwargs})

    def validate_architecture(self):
        positive = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_block_layers")
        _check_at_least(self, 1, *positive, "max_position_embeddings")
        _check_at_least(self, 0, "num_prelude_layers", "num_coda_layers")
        for name in ("num_block_layers", "num_prelude_layers", "num_coda_layers"):
            if getattr(self, name) > MOST_LAYERS:  # a config.json from elsewhere might keep a machine busy without end
                raise ValueError(f"{name} must be at most {MOST_LAYERS}, got {getattr(self, name)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"num_attention_heads must divide hidden_size, got {self.num_attention_heads} and {self.hidden_size}")
        if self.num_attention_heads % (self.num_key_value_heads or self.num_attention_heads):
            raise ValueError(
                f"num_key_value_heads must divide num_attention_heads, got {self.num_key_value_heads} and {self.num_attention_heads}"
            )
        check_choice("block_type", self.block_type, BLOCK_TYPES)
        check_choice("kv_cache", self.kv_cache, KV_CACHES)
        rope = self.rope_parameters or {}
        if (kind := rope.get("rope_type", "default")) not in ("default", *ROPE_INIT_FUNCTIONS):
            raise ValueError(
                f"rope_type of rope_parameters must be one of 'default', {', '.join(map(repr, ROPE_INIT_FUNCTIONS))}, got {kind!r}"
            )
        if (share := rope.get("partial_rotary_factor", 1.0)) != 1:
            raise ValueError(f"rotary positions turn all of a head here: partial_rotary_factor of rope_parameters must be 1, got {share}")
        if self.block_type == "modern" and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head size, got hidden_size / num_attention_heads = {self.head_dim}")
        if not self.norm_eps > 0:
            raise ValueError(f"norm_eps must be positive, got {self.norm_eps}")
        for name in ("attention_dropout", "hidden_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")

    def validate_solver(self):
        check_settings(self, self.max_steps)
        if self.is_causal and self.initial_scale:
            raise ValueError(
                f"initial_scale={self.initial_scale} needs is_causal=False: a causal model meets its tokens in parts, where they have other start states"
            )


@strict
class RevDEQVisionConfig(BundledConfig, BackboneConfigMixin, PreTrainedConfig):
    r"""Configuration of the image model: `RevDEQVisionModel`, `RevDEQForImageClassification`, `RevDEQForSemanticSegmentation` and `RevDEQVisionBackbone`.

    Args:
        image_size: height and width of the images the processor makes; the model itself takes any size.
        num_channels: channels of the images.
        hidden_sizes: channels of each stage; between two stages the resolution is halved (rounded up).
        expansion_ratios: hidden channels of a stage's block, as a multiple of its channels. (With as many parameters as the paper's block of expansion 1
            the modern block has an expansion of about 9.)
        block_type: the block of the stages: "paper", two 3x3 convolutions; "modern", a depthwise and two pointwise convolutions in the manner of
            ConvNeXt; "recall", two convolutions without an identity path from the state, normalised at each position by itself, so that nothing depends
            on the size of the grid (`block_revdeq.py` has the formulas, docs/image_model.md compares the first two, docs/think_longer.md has the third).
        kernel_size: side of the modern block's depthwise and the recall block's convolutions, an odd number or two, height and width; the paper's
            block has 3 whatever it says.
        hidden_act: activation of the modern block; the others have ReLU.
        max_steps: steps of each stage's solve, a number for all or one per stage.
        beta: relaxation of the iteration, in (0, 2), not 1.
        tol: relative residual at which an example stops; None: always `max_steps`.
        solver, gradient, keep_evaluations, drift_policy: as in `revdeq_hf.ReversibleFixedPoint`.
        steps_sampling: None, or a dict such as {"distribution": "uniform", "min_steps": 2, "max_steps": 8}: each training batch draws its number of
            steps, see `steps_revdeq.py`; evaluation takes `max_steps`.
        damping, initial_scale, path_noise, num_restarts: as in `revdeq_hf.ReversibleFixedPoint`.
        group_width: channels of a group of GroupNorm; must divide all channel counts (of the recall block there are no groups).
        pool_size: side of the grid that features are averaged to before the classifier.
        stem: what stands before the first stage: "batch_norm", 3x3 convolution, BatchNorm, ReLU; "group_norm", 3x3 convolution with a bias and
            GroupNorm, so that a network of one stage holds no statistics of batches; "plain", a convolution of `kernel_size` with a bias.
        stem_stride: the stem divides the resolution by so much (rounded up); its convolution is `2 * stem_stride - 1` wide, 3 at least (or its max
            pool, see `downsample`). 1 suits small images such as CIFAR-10's; 2 or 4 make large ones affordable.
        downsample: how the resolution falls, in a stem of a `stem_stride` above 1 and between stages: "residual", by convolutions of stride 2 in a
            pre-activation residual block (in the stem by the stem's convolution), as the authors; "max_pool", by a 3x3 convolution of stride 1,
            BatchNorm and an overlapping max pool, behind the stem by a pool alone, with fewer parameters; it learns faster (docs/image_model.md).
        residual_stages: whether a stage gives `x + z*(x)`, its input and the fixed point, or the fixed point alone.
        norm_eps: added to variances.
        initializer_range: standard deviation of the classifier's weights, whose biases start at 0; None: weights and biases uniform in
            `+-1/sqrt(inputs)`, as the authors' start. (Convolutions start so whatever this field says.)
        semantic_loss_ignore_index: label of the pixels that count for nothing in the loss of `RevDEQForSemanticSegmentation`.
        out_features, out_indices: for `RevDEQVisionBackbone`, the names out of `stage_names` or their indices, in order, of the maps that it returns; set
            one of them. Default: the last stage.

    Example:
        >>> from revdeq_hf import RevDEQVisionConfig
        >>> RevDEQVisionConfig.paper_cifar10_multiscale().hidden_sizes
        [128, 256, 256, 128]
        >>> RevDEQVisionConfig(hidden_sizes=[16, 32], expansion_ratios=[1, 1], out_indices=[1, 2]).out_features
        ['stage1', 'stage2']
    """

    model_type = "revdeq_vision"
    keys_to_ignore_at_inference = ["solver_steps", "solver_residual", "trajectory", "step_residuals"]

    image_size: int = 32
    num_channels: int = 3
    hidden_sizes: list[int] | tuple[int, ...] = (128, 256, 256, 128)
    expansion_ratios: list[int] | tuple[int, ...] = (1, 3, 3, 1)
    block_type: str = "paper"
    kernel_size: int | list[int] | tuple[int, ...] = 5
    hidden_act: str = "gelu"
    max_steps: int | list[int] | tuple[int, ...] = 4
    beta: int | float = 0.8
    tol: int | float | None = None
    solver: str = "reversible"
    gradient: str = "reversible"
    keep_evaluations: int = 1
    drift_policy: str = "warn"
    steps_sampling: dict | None = None
    damping: int | float = 0.0
    initial_scale: int | float = 0.0
    path_noise: int | float = 0.0
    num_restarts: int = 1
    group_width: int = 16
    pool_size: int = 1
    stem: str = "batch_norm"
    stem_stride: int = 1
    downsample: str = "residual"
    residual_stages: bool = True
    norm_eps: float = 1e-5
    initializer_range: int | float | None = 0.02
    semantic_loss_ignore_index: int = 255

    def __post_init__(self, **kwargs):
        self.hidden_sizes, self.expansion_ratios = list(self.hidden_sizes), list(self.expansion_ratios)
        if not isinstance(self.max_steps, int):
            self.max_steps = list(self.max_steps)
        if not isinstance(self.kernel_size, int):
            self.kernel_size = list(self.kernel_size)
        kwargs.pop("stage_names", None)  # they follow from hidden_sizes
        layers = kwargs.pop("num_hidden_layers", self.num_hidden_layers)
        if layers != self.num_hidden_layers:
            raise ValueError(f"num_hidden_layers is the number of stages, {self.num_hidden_layers}, got {layers}; set hidden_sizes instead")
        self.set_output_features_output_indices(out_features=kwargs.pop("out_features", None), out_indices=kwargs.pop("out_indices", None))
        super().__post_init__(**kwargs)

    @property
    def stage_names(self) -> list[str]:
        """Names of the maps: "stem", then "stage1", "stage2" and so on."""
        return ["stem", *(f"stage{index}" for index in range(1, len(self.hidden_sizes) + 1))]

    @property
    def num_hidden_layers(self) -> int:
        """Stages; with `output_hidden_states` the models return one map more, the stem's."""
        return len(self.hidden_sizes)

    @property
    def steps_per_stage(self) -> list[int]:
        """`max_steps`, one entry per stage."""
        return [self.max_steps] * len(self.hidden_sizes) if isinstance(self.max_steps, int) else list(self.max_steps)

    @classmethod
    def paper_cifar10_multiscale(cls, **kwargs) -> "RevDEQVisionConfig":
        """The paper's multi-scale network for CIFAR-10: four stages, 10.3M parameters, 4 steps at beta 0.8.

        Their `tol` of 1e-6 is left out: 4 steps do not reach it, and looking for it has its price.
        """
        settings = dict(hidden_sizes=[128, 256, 256, 128], expansion_ratios=[1, 3, 3, 1], initializer_range=None)
        return cls(**{**settings, **_ten_labels(kwargs), **kwargs})

    @classmethod
    def paper_cifar10_singlescale(cls, **kwargs) -> "RevDEQVisionConfig":
        """The authors' single-scale network for CIFAR-10: one stage and a 4x4 pool, GroupNorm everywhere, 2 steps at beta 0.8.

        As in `experiments/vision/deq.py` of their repository (github.com/sammccallum/reversible-deq, class `SingleDEQ`), with that script's 32 channels
        of expansion 1: 24,714 parameters. `hidden_sizes=[n], expansion_ratios=[m]` make it wider. Their `tol` of 1e-6 is left out, see
        `paper_cifar10_multiscale`.
        """
        settings = dict(
            hidden_sizes=[32],
            expansion_ratios=[1],
            max_steps=2,
            pool_size=4,
            stem="group_norm",
            residual_stages=False,
            initializer_range=None,
        )
        return cls(**{**settings, **_ten_labels(kwargs), **kwargs})

    @classmethod
    def dense_prediction(cls, **kwargs) -> "RevDEQVisionConfig":
        """A network of one stage for `RevDEQForSemanticSegmentation` that solves grids larger than those it was trained on, by more steps.

        The recall block of 64 channels and nothing that depends on the grid's size. Give `num_channels` and `num_labels` of the problem, and
        `kernel_size=[1, 3]` for sequences, as grids of height 1. Steps are drawn from 6 to 24 in training (`steps_sampling`).
        """
        settings = dict(
            hidden_sizes=[64],
            expansion_ratios=[1],
            block_type="recall",
            kernel_size=3,
            max_steps=24,
            steps_sampling={"distribution": "uniform", "min_steps": 6, "max_steps": 24},
            stem="plain",
            residual_stages=False,
        )
        return cls(**{**settings, **kwargs})

    @property
    def kernel_sides(self) -> tuple[int, int]:
        """`kernel_size` as height and width."""
        size = self.kernel_size
        return (size, size) if isinstance(size, int) else cast(tuple[int, int], tuple(size))

    def validate_architecture(self):
        _check_at_least(self, 1, "image_size", "num_channels", "group_width", "pool_size", "stem_stride")
        sizes, ratios = self.hidden_sizes, self.expansion_ratios
        if not sizes or any(not isinstance(n, int) or n < 1 for n in (*sizes, *ratios)):
            raise ValueError(f"hidden_sizes and expansion_ratios must be non-empty lists of whole numbers >= 1, got {sizes} and {ratios}")
        if len(ratios) != len(sizes):
            raise ValueError(f"expansion_ratios must have one entry per stage, got {len(ratios)} for {len(sizes)} hidden_sizes")
        for size in sizes:
            if size % self.group_width and (self.block_type != "recall" or self.stem == "group_norm"):
                raise ValueError(f"group_width must divide the channels of every stage, got {self.group_width} and {size}")
        if len(self.steps_per_stage) != len(sizes):
            raise ValueError(f"max_steps must be a number or have one entry per stage, got {self.max_steps} for {len(sizes)} stages")
        check_choice("stem", self.stem, STEMS)
        check_choice("downsample", self.downsample, DOWNSAMPLES)
        check_choice("block_type", self.block_type, VISION_BLOCK_TYPES)
        if len(self.kernel_sides) != 2 or any(side < 1 or side % 2 == 0 for side in self.kernel_sides):
            raise ValueError(f"kernel_size must be odd, a number or two, so that the state keeps its size, got {self.kernel_size}")
        if not self.norm_eps > 0:
            raise ValueError(f"norm_eps must be positive, got {self.norm_eps}")
        if self.initializer_range is not None and not 0 <= self.initializer_range <= 1:
            raise ValueError(f"initializer_range must be None or lie in [0, 1], got {self.initializer_range}")

    def validate_solver(self):
        for steps in self.steps_per_stage:
            check_settings(self, steps)


def _check_at_least(config: PreTrainedConfig, least: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is None or not math.isfinite(value) or value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def _ten_labels(settings: dict) -> dict:
    """Those of CIFAR-10, where a preset is not given others."""
    return {} if "id2label" in settings else {"num_labels": 10}


__all__ = ["RevDEQConfig", "RevDEQVisionConfig"]
