# Copyright 2026 The revdeq_hf authors. Licensed under the Apache License, Version 2.0.
"""The language model: token embeddings, the fixed point of a transformer block, and a head."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForQuestionAnswering, GenericForSequenceClassification, GenericForTokenClassification
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    ModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .block_revdeq import RevDEQAttention, RevDEQLayer, RevDEQTransformerBlock
from .cache_revdeq import CACHE_NAME, EvaluationSlots, SharedSlots, check_slots, one_cache
from .configuration_revdeq import RevDEQConfig
from .generation_revdeq import RevDEQGenerationMixin, with_steps
from .hub_revdeq import BundledModel, may_look, refuse_settings
from .layer_revdeq import ReversibleFixedPoint
from .loss_revdeq import at_least_one, linear_cross_entropy, share_of_batch
from .steps_revdeq import check_steps

logger = logging.get_logger(__name__)


@dataclass
class _SolverFigures:
    """Fields of every output; before the class of transformers among the bases, so that they come after its own."""

    solver_steps: torch.Tensor | None = None
    solver_residual: torch.Tensor | None = None


@dataclass
class RevDEQModelOutput(_SolverFigures, BaseModelOutputWithPast):
    """`BaseModelOutputWithPast` and the figures of the solve.

    Args:
        solver_steps (`torch.LongTensor` of shape `(batch, seq)`): Steps each position took.
        solver_residual (`torch.FloatTensor` of shape `(batch, seq)`): Relative residual of each position, see `FixedPointSolution`.
        trajectory (`tuple(torch.FloatTensor)`): With `output_trajectory=True`, what `last_hidden_state` would be had the solve ended after each step.
        step_residuals (`torch.FloatTensor` of shape `(steps begun, batch, seq)`): With `output_trajectory=True`, residuals at the start of each step.
    """

    trajectory: tuple[torch.Tensor, ...] | None = None
    step_residuals: torch.Tensor | None = None


@dataclass
class RevDEQCausalLMOutput(_SolverFigures, CausalLMOutputWithPast):
    """`CausalLMOutputWithPast` and the figures of the solve, where `output_solver_stats=True` asked for them.

    Args:
        solver_steps (`torch.LongTensor` of shape `(batch, seq)`): Steps each position took.
        solver_residual (`torch.FloatTensor` of shape `(batch, seq)`): Relative residual of each position, see `FixedPointSolution`.
    """


@dataclass
class RevDEQSequenceClassifierOutput(_SolverFigures, SequenceClassifierOutputWithPast):
    """`SequenceClassifierOutputWithPast` and the figures of the solve, see `RevDEQCausalLMOutput`."""


@dataclass
class RevDEQTokenClassifierOutput(_SolverFigures, TokenClassifierOutput):
    """`TokenClassifierOutput` and the figures of the solve, see `RevDEQCausalLMOutput`."""


@dataclass
class RevDEQQuestionAnsweringOutput(_SolverFigures, QuestionAnsweringModelOutput):
    """`QuestionAnsweringModelOutput` and the figures of the solve, see `RevDEQCausalLMOutput`."""


class RevDEQRotaryEmbedding(nn.Module):
    """Cosines and sines of rotary positions, computed in float32."""

    inv_freq: torch.Tensor
    original_inv_freq: torch.Tensor

    def __init__(self, config: RevDEQConfig, device: torch.device | None = None) -> None:
        super().__init__()
        self.config = config
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        assert config.rope_parameters is not None  # filled by the base class
        self.rope_type = config.rope_parameters["rope_type"]
        compute = self.compute_default_rope_parameters if self.rope_type == "default" else ROPE_INIT_FUNCTIONS[self.rope_type]
        self.attention_scaling: float
        inv_freq, self.attention_scaling = compute(config, device)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(
        config: RevDEQConfig, device: torch.device | None = None, *args, **kwargs
    ) -> tuple[torch.Tensor, float]:
        """Inverse frequencies (head_dim / 2,) and the scale of the result, 1."""
        assert config.rope_parameters is not None
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
        return config.rope_parameters["rope_theta"] ** -exponents, 1.0

    def _apply(self, fn, recurse=True):
        """`model.bfloat16()` and the like leave the frequencies in float32: rounded, they would turn late positions by other angles."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """position_ids (batch or 1, seq); returns cos and sin (batch or 1, seq, head_dim) in the dtype of x."""
        angles = position_ids[..., None].to(torch.float32) * self.inv_freq.to(x.device, torch.float32)
        angles = torch.cat((angles, angles), dim=-1)
        return tuple((wave * self.attention_scaling).to(x.dtype) for wave in (angles.cos(), angles.sin()))  # type: ignore[return-value]


@auto_docstring
class RevDEQPreTrainedModel(BundledModel, PreTrainedModel):
    config: RevDEQConfig
    model_file = __file__
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ReversibleFixedPoint"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True  # without gradients and `tol`
    _can_record_outputs = {"hidden_states": RevDEQLayer, "attentions": RevDEQAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if self.config.block_type == "paper" and isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)  # as the authors' layers start
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif self.config.block_type == "paper" and isinstance(module, nn.Embedding):
            init.normal_(module.weight)
        elif isinstance(module, nn.Linear) and hasattr(module, "initial_std"):
            init.normal_(module.weight, std=module.initial_std)
        else:
            super()._init_weights(module)

    def _set_gradient_checkpointing(self, *args, **kwargs) -> None:
        """Activation checkpointing, whichever call turns it on or off.

        The solve: gradient="backprop" becomes "checkpoint" in training (`RevDEQModel._gradient_mode`); in the other modes its memory is constant
        already. The layers inside one evaluation are recomputed one by one where there are several. Layers before and after the solve: as in
        other models.
        """
        super()._set_gradient_checkpointing(*args, **kwargs)
        on, gradient = False, self.config.gradient
        for module in self.modules():
            if isinstance(module, ReversibleFixedPoint):
                gradient = module.gradient
                for layer in module.modules():
                    if isinstance(layer, RevDEQLayer):
                        on = on or layer.gradient_checkpointing
                        several = self.config.num_block_layers > 1
                        layer._gradient_checkpointing_func = partial(_checkpoint_layer, _recompute if several else None)
            elif isinstance(module, RevDEQModel):
                for layer in (*module.prelude, *module.coda):
                    layer._gradient_checkpointing_func = partial(_checkpoint_layer, layer._gradient_checkpointing_func)
        if on and gradient != "backprop" and self.config.num_block_layers == 1:
            logger.warning_once(
                f"activation checkpointing changes nothing for the fixed point: with gradient={gradient!r} its memory does not grow with "
                "the number of steps already"
            )


def _checkpoint_layer(checkpoint_function: Callable | None, forward: partial, *args: torch.Tensor):
    """A layer under activation checkpointing. Without gradients, or with a cache, which a recomputation would write again, it just runs."""
    cached = isinstance(forward.keywords.get("past_key_values"), Cache | EvaluationSlots | SharedSlots)
    if checkpoint_function is None or not torch.is_grad_enabled() or cached:
        return forward(*args)
    return checkpoint_function(forward, *args)


MOVERS = ("torch.distributed.", "deepspeed.", "accelerate.", "transformers.")  # not "transformers_modules.", which are users'


def _has_hooks(module: nn.Module) -> bool:
    """Whether it has hooks that may do something with what it returns: other than those of `MOVERS`, or with an attribute `only_looks`."""
    hooks = (*module._forward_hooks.values(), *module._backward_hooks.values(), *module._backward_pre_hooks.values())
    own = [hook for hook in hooks if not f"{getattr(hook, '__module__', '')}.".startswith(MOVERS)]
    return not all(getattr(hook, "only_looks", False) for hook in own)


def _in_parts(head: nn.Module) -> bool:
    """Whether ranks share a head's weight for good (tensor parallelism), unlike FSDP2, which gathers it for each call."""
    if not hasattr(getattr(head, "weight", None), "placements"):  # of DTensor, which costs too much to import where nothing is shared
        return False
    from torch.distributed.fsdp import FSDPModule

    return not isinstance(head, FSDPModule)


# gradients of a solve are taken with autograd.grad, which the reentrant kind refuses
_recompute = partial(checkpoint, use_reentrant=False)


@auto_docstring(
    custom_intro="""
    The language model without a head: token embeddings, the fixed point of a transformer block, and a last norm.
    """
)
class RevDEQModel(RevDEQPreTrainedModel):
    def __init__(self, config: RevDEQConfig) -> None:
        super().__init__(config)
        config.validate()
        self.vocab_size = config.vocab_size
        # without a row for padding that learns nothing: nobody sees padding, and the same token may end a text, whose row is to learn
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.block_type == "paper":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
            self.input_norm: nn.Module = nn.Identity()
            self.norm: nn.Module = nn.Identity()
        else:
            self.rotary_emb = RevDEQRotaryEmbedding(config)
            self.input_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)  # of the fixed point's x
            self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.prelude = nn.ModuleList(RevDEQLayer(config, index) for index in range(config.num_prelude_layers))
        self.solve = ReversibleFixedPoint(
            RevDEQTransformerBlock(config),
            max_steps=config.max_steps,
            row_dims=2 if config.is_causal else 1,  # a token that sees all others has not settled before they have
            **self._solver_settings(),
        )
        self.solve.start_dims = 2  # neither padding nor a cache may move what a token starts from
        self._remember_configuration([self.solve])
        self.coda = nn.ModuleList(RevDEQLayer(config, index) for index in range(config.num_coda_layers))
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        max_steps: int | None = None,
        tol: float | None = None,
        output_trajectory: bool = False,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> RevDEQModelOutput:
        r"""
        past_key_values (`Cache`, *optional*):
            Keys and values of the tokens before these.
        cache (`Cache`, *optional*):
            The same by its name from transformers 5.24 on; both names can be used with any version.
        max_steps (`int`, *optional*):
            Steps of the solve, instead of `config.max_steps`. A cache of `kv_cache="per_evaluation"` serves one number of steps only.
        tol (`float`, *optional*):
            Relative residual at which a token (with `config.is_causal=False` an example) stops, instead of `config.tol`; or a rule, see `ReversibleFixedPoint`.
        output_trajectory (`bool`, *optional*, defaults to `False`):
            Whether to return `trajectory` and `step_residuals`; without a cache, at the price of a state per step.
        output_hidden_states (`bool`, *optional*):
            Whether to return `hidden_states`, the tape of the loop: the input of the first layer, then the output of every layer in the order in which
            they ran (prelude, the block's layers once per evaluation, coda), the last one after the final norm; `config.num_hidden_layers` + 1 in all
            where no `max_steps` is given (fewer where `tol` ended the solve before). `attentions` are those of the same layers. With gradients, the solve
            keeps all its graphs then; but for gradient="implicit" and "phantom", whose hidden states have no gradient (and phantom's, of its damped steps,
            are among them).
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        refuse_settings(kwargs)
        past_key_values = one_cache(cache, past_key_values, kwargs)
        self._follow_configuration([self.solve])
        steps = self.config.max_steps if max_steps is None else check_steps(max_steps)
        embeds = self._embed(input_ids) if inputs_embeds is None else inputs_embeds
        if embeds.dim() != 3 or embeds.shape[-1] != self.config.hidden_size:
            raise ValueError(f"inputs_embeds must be (batch, seq, {self.config.hidden_size}), got {tuple(embeds.shape)}")
        _check_shapes(embeds.shape, attention_mask, position_ids, past_key_values)
        if not self.config.is_causal:
            _refuse_packing(position_ids, attention_mask)
            use_cache = False
            if past_key_values is not None:
                raise ValueError(
                    "with config.is_causal=False tokens see those after them, so no cache can be kept; pass past_key_values=None"
                )
        if output_trajectory:
            use_cache = False
            if past_key_values is not None:
                raise ValueError(
                    "output_trajectory=True runs the layers after the fixed point once per step and needs past_key_values=None"
                )
        measure_mask = None
        if isinstance(attention_mask, torch.Tensor) and attention_mask.shape == embeds.shape[:2]:
            measure_mask = attention_mask.to(
                embeds.device, torch.bool
            )  # padding must not hold an example back, nor count in what is told of the solve
        # one cache, three views: prelude layers find their slots by index, the solve by evaluation (`slots`), coda layers behind these (`after`)
        given = past_key_values
        past_key_values = self._usable_cache(past_key_values, use_cache, steps)
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        new_positions = torch.arange(embeds.shape[1], device=embeds.device) + seen  # a static cache counts on the device
        positions = new_positions.unsqueeze(0) if position_ids is None else position_ids
        # not with a new cache: packed sequences would not be told apart, as they are in training; and only given positions can be of packed sequences,
        # for which the host would wait
        attention_mask = create_causal_mask(self.config, embeds, attention_mask, given, position_ids)
        if self.config.block_type == "paper":
            hidden_states = embeds + self._embed_positions(positions)
            rotary = None
        else:
            hidden_states = embeds
            rotary = self.rotary_emb(embeds, positions)
        attention = dict(attention_mask=attention_mask, position_embeddings=rotary, position_ids=positions, **kwargs)
        for layer in self.prelude:
            hidden_states = layer(hidden_states, past_key_values=past_key_values, **attention)
        hidden_states = self.input_norm(hidden_states)
        slots: EvaluationSlots | SharedSlots | None = None
        drawn = max_steps is None and past_key_values is None and self.solve.draws_steps
        if past_key_values is not None:
            slots = self._solver_slots(past_key_values)
        solution = self.solve(
            hidden_states,
            past_key_values=slots,
            max_steps=None if drawn else steps,
            tol=tol,
            gradient=self._gradient_mode(past_key_values, kwargs),
            output_trajectory=output_trajectory,
            measure_mask=measure_mask,
            **attention,
        )
        after = None
        if past_key_values is not None and slots is not None:
            slots.finish(2 * steps)
            first = with_steps(self.config, steps).num_hidden_layers - self.config.num_coda_layers
            after = EvaluationSlots(past_key_values, first, 0)
        return RevDEQModelOutput(
            last_hidden_state=self._read_out(solution.z, after, attention),
            **{CACHE_NAME: past_key_values},
            solver_steps=solution.steps,
            solver_residual=solution.residual,
            trajectory=tuple(self._read_out(z, None, attention) for z in solution.trajectory) if output_trajectory else None,
            step_residuals=solution.step_residuals,
        )

    def _read_out(self, hidden_states: torch.Tensor, cache: EvaluationSlots | None, attention: dict) -> torch.Tensor:
        """What follows the fixed point: the coda and the last norm."""
        for layer in self.coda:
            hidden_states = layer(hidden_states, past_key_values=cache, **attention)
        return self.norm(hidden_states)

    def _embed(self, input_ids: torch.Tensor | None) -> torch.Tensor:
        assert input_ids is not None
        if input_ids.dim() != 2 or input_ids.is_floating_point():
            raise ValueError(f"input_ids must be (batch, seq) of whole numbers, got {tuple(input_ids.shape)} of {input_ids.dtype}")
        if may_look(input_ids):
            low, high = int(input_ids.min()), int(input_ids.max())
            known = getattr(
                self.embed_tokens, "num_embeddings", self.config.vocab_size
            )  # of a table that took the place of the model's own
            if low < 0 or high >= known:
                raise ValueError(
                    f"input_ids must lie in [0, vocab_size) = [0, {known}), got {low} to {high}; "
                    "does the tokenizer belong to this model? resize_token_embeddings makes room for added tokens"
                )
        return self.embed_tokens(input_ids)

    def _embed_positions(self, position_ids: torch.Tensor) -> torch.Tensor:
        longest = self.config.max_position_embeddings
        if may_look(position_ids) and int(position_ids.min()) < 0:
            raise ValueError(f"position_ids must not be negative for learned positions, got {int(position_ids.min())}")
        if may_look(position_ids) and int(position_ids.max()) >= longest:
            raise ValueError(
                f"this model has learned positions for {longest} tokens (max_position_embeddings), got position {int(position_ids.max())}; "
                "shorten the input, or use block_type='modern', whose rotary positions have no such limit"
            )
        return self.embed_positions(position_ids)

    def _solver_slots(self, cache: Cache) -> EvaluationSlots | SharedSlots:
        first = self.config.num_prelude_layers
        if self.config.kv_cache == "shared":
            return SharedSlots(cache, first)
        return EvaluationSlots(cache, first, self.config.num_block_layers, alternating=self.config.solver == "reversible")

    def _usable_cache(self, cache: Cache | None, use_cache: bool | None, steps: int) -> Cache | None:
        config = self.config
        # training would fill the cache with every evaluation's graph
        if cache is None and use_cache and not torch.is_grad_enabled():
            cache = DynamicCache(config=with_steps(config, steps))
        elif cache is None and use_cache and not self.training:
            logger.warning_once(
                "past_key_values will be None: with gradients enabled no cache is made, since it would keep every evaluation's graph. Decode inside "
                "torch.no_grad(), or pass past_key_values=DynamicCache() where gradients are wanted through the cache, or use_cache=False"
            )
        if cache is not None:
            check_slots(cache, with_steps(config, steps).num_hidden_layers, steps, config.kv_cache)
        return cache

    def _gradient_mode(self, cache: Cache | None, kwargs: dict) -> str:
        """The configured mode, but the stored path where evaluations leave something behind that a recomputation would not."""
        configured = self.solve.gradient
        if not torch.is_grad_enabled():
            return configured
        if configured in ("implicit", "phantom"):
            if cache is not None:
                raise ValueError(f"gradient={configured!r} evaluates the block again, which would write to the cache; pass use_cache=False")
            return configured
        recording = any(kwargs.get(name) or getattr(self.config, name, False) for name in ("output_hidden_states", "output_attentions"))
        if cache is not None or recording:
            return "backprop"
        if self.gradient_checkpointing and self.training and configured == "backprop":
            return "checkpoint"
        return configured


class RevDEQHead(nn.Linear):
    """The output layer: logits of hidden states, or with labels their loss without logits (a call, so that wrappers see it in either case)."""

    def forward(self, input: torch.Tensor, labels: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        if labels is None:
            return super().forward(input)
        return linear_cross_entropy(input, self.weight, labels, **kwargs)


@auto_docstring(
    custom_intro="""
    The causal language model whose layers are one block, iterated towards its fixed point.
    """
)
class RevDEQForCausalLM(RevDEQPreTrainedModel, RevDEQGenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: RevDEQConfig) -> None:
        super().__init__(config)
        self.model = RevDEQModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = RevDEQHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        super().set_output_embeddings(new_embeddings)
        if type(new_embeddings) is nn.Linear and new_embeddings.bias is None:  # resize_token_embeddings makes a new one
            new_embeddings.__class__ = RevDEQHead

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        max_steps: int | None = None,
        tol: float | None = None,
        output_solver_stats: bool = False,
        skip_logits: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> RevDEQCausalLMOutput:
        r"""
        past_key_values (`Cache`, *optional*):
            Keys and values of the tokens before these.
        cache (`Cache`, *optional*):
            The same by its name from transformers 5.24 on; both names can be used with any version.
        max_steps (`int`, *optional*):
            Steps of the solve, instead of `config.max_steps`. A cache of `kv_cache="per_evaluation"` serves one number of steps only.
        tol (`float`, *optional*):
            Relative residual at which a token (with `config.is_causal=False` an example) stops, instead of `config.tol`; or a rule, see `ReversibleFixedPoint`.
        output_solver_stats (`bool`, *optional*, defaults to `False`):
            Whether to return `solver_steps` and `solver_residual`, each of shape (batch, seq).
        skip_logits (`bool`, *optional*):
            Whether to compute the loss without the logits, which are None then: a chunk of tokens at a time, so that memory does not grow with
            tokens x vocab_size. By default so in training: with labels, gradients and `model.train()`. `False` returns them there, too; as
            `config.skip_logits` for every call, where a trainer's own loss needs them.

        Example:

        ```python
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer
        >>> import revdeq_hf

        >>> model = AutoModelForCausalLM.from_pretrained("runs/language")  # doctest: +SKIP
        >>> tokenizer = AutoTokenizer.from_pretrained("runs/language")  # doctest: +SKIP
        >>> ids = model.generate(**tokenizer("def main(", return_tensors="pt"), max_new_tokens=40)  # doctest: +SKIP
        ```"""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            max_steps=max_steps,
            tol=tol,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep  # 0 keeps all
        hidden_states = outputs.last_hidden_state[:, kept, :]
        if skip_logits is None:
            skip_logits = self.config.skip_logits and labels is not None and self.training and torch.is_grad_enabled()
        elif skip_logits and labels is None:
            raise ValueError("skip_logits=True leaves nothing to return without labels; pass labels, or skip_logits=None")
        logits = loss = None
        if skip_logits and self._loss_needs_no_logits():
            loss = self._loss_without_logits(hidden_states, labels, **kwargs)
        else:
            logits = self.lm_head(hidden_states)
            if labels is not None:
                if kwargs.get("num_items_in_batch") is not None:
                    kwargs["num_items_in_batch"] = at_least_one(kwargs["num_items_in_batch"], logits.device)
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return RevDEQCausalLMOutput(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            solver_steps=outputs.solver_steps if output_solver_stats else None,
            solver_residual=outputs.solver_residual if output_solver_stats else None,
        )

    def _loss_needs_no_logits(self) -> bool:
        """Whether the loss is the usual one, and the head the usual one: not replaced by a user, wrapped by an adapter, nor with hooks, which want logits."""
        if _in_parts(self.lm_head):
            return False
        usual = isinstance(self.lm_head, RevDEQHead) and self.loss_function is LOSS_MAPPING["ForCausalLM"] and not _has_hooks(self.lm_head)
        if not usual:
            logger.warning_once("the loss function or the output layer has been replaced or has hooks, so training computes all logits")
        return usual

    def _loss_without_logits(
        self,
        hidden_states: torch.Tensor,
        labels: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """As transformers' `ForCausalLMLoss`, which takes the logits."""
        if shift_labels is None:
            assert labels is not None
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        return self.lm_head(hidden_states, labels=shift_labels, num_items=num_items_in_batch, ignore_index=ignore_index)


# The generic heads make their body with AutoModel.from_config, which a copy of this file on the Hub cannot use in a fresh process, so
# only their `forward` is inherited. Further keyword arguments, such as `output_hidden_states`, go to the body.


class _LabelledHead:
    """What the heads with a label, or one for each token, add to transformers' generic `forward`."""

    output_class: type[ModelOutput]

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        max_steps: int | None = None,
        tol: float | None = None,
        output_solver_stats: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ModelOutput:
        """As transformers' generic head, and

        Args:
            max_steps, tol: instead of the config's.
            output_solver_stats: whether to return `solver_steps` and `solver_residual`, (batch, seq), or (batch,) with `config.is_causal=False`.
            num_items_in_batch: labels other than -100 in all micro-batches of an update, as Trainer counts them, see `share_of_batch`.
        """
        inputs: dict[str, Any] = dict(attention_mask=attention_mask, position_ids=position_ids)
        inputs[CACHE_NAME] = one_cache(cache, past_key_values)
        inputs |= dict(inputs_embeds=inputs_embeds, labels=labels, use_cache=use_cache, max_steps=max_steps, tol=tol, return_dict=True)
        outputs = super().forward(input_ids, **inputs, **kwargs)  # type: ignore[misc]
        if labels is not None:
            outputs.loss = share_of_batch(outputs.loss, labels, num_items_in_batch)
        return self.output_class(**outputs, **_solver_figures(self, output_solver_stats))


def _solver_figures(head, wanted: bool) -> dict[str, torch.Tensor]:
    """Of the solve that has just been run, which the generic forward does not hand on; so not for one model called by several threads at once."""
    statistics = head.model.solve.statistics
    return {"solver_steps": statistics.steps, "solver_residual": statistics.residual} if wanted else {}


class RevDEQForSequenceClassification(_LabelledHead, GenericForSequenceClassification, RevDEQPreTrainedModel):
    """A linear layer on the last token that is not padding: `config.num_labels` classes, or a regression where that is 1.

    `config.pad_token_id` must be set for batches of more than one. `forward` takes what `RevDEQForCausalLM.forward` takes (also `max_steps`, `tol` and
    `output_solver_stats`), and `labels` (batch,): whole numbers from 0 to num_labels - 1, or floats for a regression, or (batch, num_labels) for several
    labels at once. Returns `RevDEQSequenceClassifierOutput` with `loss` and `logits` (batch, num_labels).
    """

    output_class = RevDEQSequenceClassifierOutput

    def __init__(self, config: RevDEQConfig) -> None:
        RevDEQPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = RevDEQModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class RevDEQForTokenClassification(_LabelledHead, GenericForTokenClassification, RevDEQPreTrainedModel):
    """A linear layer on every token; set `config.is_causal=False` for a model that sees what follows a token, too.

    `forward` takes what `RevDEQForCausalLM.forward` takes (also `max_steps`, `tol` and `output_solver_stats`), and `labels` (batch, seq), -100 where a token
    has none. Returns `RevDEQTokenClassifierOutput` with `loss` and `logits` (batch, seq, num_labels).
    """

    output_class = RevDEQTokenClassifierOutput

    def __init__(self, config: RevDEQConfig) -> None:
        RevDEQPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = RevDEQModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class RevDEQForQuestionAnswering(GenericForQuestionAnswering, RevDEQPreTrainedModel):
    """Start and end of the answer in the text, by a linear layer on every token; `config.is_causal=False` lets the start know the end.

    `forward` takes what `RevDEQForCausalLM.forward` takes (also `max_steps`, `tol` and `output_solver_stats`), `start_positions` and `end_positions` (batch,).
    Returns `RevDEQQuestionAnsweringOutput` with `loss`, `start_logits` and `end_logits` (batch, seq).
    """

    def __init__(self, config: RevDEQConfig) -> None:
        RevDEQPreTrainedModel.__init__(self, config)
        self.model = RevDEQModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        max_steps: int | None = None,
        tol: float | None = None,
        output_solver_stats: bool = False,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> RevDEQQuestionAnsweringOutput:
        """As transformers' generic head, and `max_steps`, `tol` and `output_solver_stats` as in the other heads."""
        inputs: dict[str, Any] = dict(attention_mask=attention_mask, position_ids=position_ids)
        inputs[CACHE_NAME] = one_cache(cache, past_key_values)
        inputs |= dict(
            inputs_embeds=inputs_embeds,
            start_positions=start_positions,
            end_positions=end_positions,
            max_steps=max_steps,
            tol=tol,
            return_dict=True,
        )
        outputs = super().forward(input_ids, **inputs, **kwargs)
        return RevDEQQuestionAnsweringOutput(**outputs, **_solver_figures(self, output_solver_stats))


def _check_shapes(shape: torch.Size, attention_mask, position_ids: torch.Tensor | None, cache: Cache | None) -> None:
    """Raises ValueError for an empty prompt, and for masks and positions that do not fit it; with a cache, masks count what it holds, too."""
    batch, seq = shape[:2]
    if batch == 0 or seq == 0:
        raise ValueError(
            f"an empty prompt has no next token, got inputs of (batch, seq) = ({batch}, {seq}); begin with a token such as bos_token_id"
        )
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2 and cache is None and attention_mask.shape != shape[:2]:
        raise ValueError(f"attention_mask must be (batch, seq) = ({batch}, {seq}), got {tuple(attention_mask.shape)}")
    if position_ids is not None and (position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != seq):
        raise ValueError(f"position_ids must be (batch or 1, seq) = ({batch}, {seq}), got {tuple(position_ids.shape)}")


def _refuse_packing(position_ids: torch.Tensor | None, attention_mask: torch.Tensor | None) -> None:
    """Raises ValueError for positions that begin anew, as those of packed sequences do, without a mask that keeps them apart."""
    if position_ids is None or attention_mask is not None or not may_look(position_ids):
        return
    before, after = position_ids[..., :-1], position_ids[..., 1:]
    if bool(((after == 0) & (before > 0)).any()) and bool(((after == 0) | (after == before + 1)).all()):
        raise ValueError(
            "position_ids begin anew, as those of packed sequences do: with config.is_causal=False their tokens would see one another; pass an attention_mask "
            "(batch, 1, seq, seq) that keeps the sequences apart, or a sequence in each row, padded"
        )


# Remote code runs no __init__.py, so classes are registered where they are defined. The tables of names are used by Trainer
# (label smoothing shifts labels for the causal models named there) and by pipelines. As remote code the model type stays unknown: each
# folder brings code of its own, and the first one's would serve all others.
if not __name__.startswith("transformers_modules."):
    AutoConfig.register("revdeq", RevDEQConfig, exist_ok=True)
for auto_class, names, model_class in (
    (AutoModel, modeling_auto.MODEL_MAPPING_NAMES, RevDEQModel),
    (AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, RevDEQForCausalLM),
    (AutoModelForSequenceClassification, modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, RevDEQForSequenceClassification),
    (AutoModelForTokenClassification, modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, RevDEQForTokenClassification),
    (AutoModelForQuestionAnswering, modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES, RevDEQForQuestionAnswering),
):
    auto_class.register(RevDEQConfig, model_class, exist_ok=True)
    names.setdefault("revdeq", model_class.__name__)
# Trainer shifts smoothed labels where this table has the name of the class, which is another one under FSDP2: unshifted, a model would learn to copy
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault("revdeq_fsdp2", f"FSDP{RevDEQForCausalLM.__name__}")

__all__ = [
    "RevDEQForCausalLM",
    "RevDEQForQuestionAnswering",
    "RevDEQForSequenceClassification",
    "RevDEQForTokenClassification",
    "RevDEQModel",
    "RevDEQPreTrainedModel",
]
