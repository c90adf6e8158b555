# Copyright 2026 The revdeq_hf authors. Licensed under the Apache License, Version 2.0.
"""The weight-tied maps `f(z, x)`: transformer blocks for the language model, convolutional blocks for the image model.

They know nothing of solvers. Nothing in them changes between two calls, so a call can be repeated bit for bit.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_revdeq import RevDEQConfig, RevDEQVisionConfig


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions. States (batch, heads, seq, dim); cos and sin (batch, seq, dim), their two halves equal."""
    first, second = states.chunk(2, dim=-1)
    return states * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out, the reference for the fused kernels. Query (batch, heads, seq, dim), key and value with key-value heads.

    Returns the output (batch, seq, heads, dim) and the weights (batch, heads, seq, keys).
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None and attention_mask.is_floating_point():
        scores = scores + attention_mask
    elif attention_mask is not None:
        raise ValueError(
            f"a mask of queries and keys must be bool (True where a token may look) or floating (added to the scores), got {attention_mask.dtype}"
        )
    # in float32 the least number of float64 is an infinity, and a token that sees nobody would be NaN, for those after it, too
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    weights = nn.functional.softmax(scores, dim=-1, dtype=dtype).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def _linear(inputs: int, outputs: int, bias: bool = False, ends_branch: bool = False) -> nn.Linear:
    """A matrix that starts with `1/sqrt(inputs)`, a tenth of that where it ends a branch (`RevDEQPreTrainedModel._init_weights`; not in the paper's block)."""
    linear = nn.Linear(inputs, outputs, bias=bias)
    linear.initial_std = (0.1 if ends_branch else 1.0) * inputs**-0.5
    return linear


class RevDEQAttention(nn.Module):
    """Attention, causal or in both directions, with grouped keys and values, rotary positions where they are given, and an optional cache."""

    def __init__(self, config: RevDEQConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        key_value_heads = config.num_key_value_heads or config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = config.is_causal
        bias = config.block_type == "paper"
        width = key_value_heads * self.head_dim
        self.q_proj = _linear(config.hidden_size, config.hidden_size, bias)
        self.k_proj = _linear(config.hidden_size, width, bias)
        self.v_proj = _linear(config.hidden_size, width, bias)
        self.o_proj = _linear(config.hidden_size, config.hidden_size, ends_branch=True)

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs):
        """hidden_states (batch, seq, hidden_size); returns the same shape and the attention weights or None."""
        shape = hidden_states.shape[:-1]
        projected = [projection(hidden_states) for projection in (self.q_proj, self.k_proj, self.v_proj)]
        if projected[1].shape[-1] % self.head_dim:
            raise ValueError(
                f"tensor parallelism gives each rank whole heads, got num_key_value_heads={self.config.num_key_value_heads}, of which a rank has "
                f"{projected[1].shape[-1] / self.head_dim:g}; choose a tp_size that divides num_key_value_heads"
            )
        query, key, value = (part.view(*shape, -1, self.head_dim).transpose(1, 2) for part in projected)  # (batch, heads, seq, dim)
        if position_embeddings is not None:
            query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(output.reshape(*shape, -1).contiguous()), weights


class RevDEQGatedMLP(nn.Module):
    """`down(act(gate(x)) * up(x))`, without biases."""

    def __init__(self, config: RevDEQConfig) -> None:
        super().__init__()
        self.gate_proj = _linear(config.hidden_size, config.intermediate_size)
        self.up_proj = _linear(config.hidden_size, config.intermediate_size)
        self.down_proj = _linear(config.intermediate_size, config.hidden_size, ends_branch=True)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class RevDEQDeepMLP(nn.Module):
    """The paper's MLP: two hidden layers, with biases."""

    def __init__(self, config: RevDEQConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.mid_proj = nn.Linear(config.intermediate_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.mid_proj(self.act_fn(self.up_proj(hidden_states)))))


class RevDEQLayer(GradientCheckpointingLayer):
    """A pre-norm transformer layer, `h = skip + Attn(norm(u)); h + MLP(norm(h))`; its identity path may come from elsewhere than its input."""

    _can_checkpoint_with_cache = True  # the base class would drop the cache; the model decides, see `RevDEQPreTrainedModel`

    def __init__(self, config: RevDEQConfig, layer_idx: int) -> None:
        super().__init__()
        paper = config.block_type == "paper"
        norm = nn.LayerNorm if paper else nn.RMSNorm
        self.input_layernorm = norm(config.hidden_size, eps=config.norm_eps)
        self.self_attn = RevDEQAttention(config, layer_idx)
        self.post_attention_layernorm = norm(config.hidden_size, eps=config.norm_eps)
        self.mlp = RevDEQDeepMLP(config) if paper else RevDEQGatedMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states: torch.Tensor, skip: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        """hidden_states `u` and `skip` (default: u) of shape (batch, seq, hidden_size); keyword arguments go to the attention."""
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = (hidden_states if skip is None else skip) + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))


class RevDEQTransformerBlock(nn.Module):
    """`f(z, x)` of the language model.

    The modern block is one or more ordinary pre-norm layers between two norms: `u = norm(z) + x; h = u + Attn(norm(u)); f = norm(h + MLP(norm(h)))`. The
    norms keep the state in range at any learning rate and let the map contract, so that more steps than in training do no harm. Chosen by measurement
    among other injections, norms, identity paths and beginnings, see docs/block_study.md.

    The paper's has an identity path from the bare state, `h = z + Attn(LN(z + x)); f = h + MLP(LN(h))`; of several layers, the later ones are ordinary.
    """

    def __init__(self, config: RevDEQConfig) -> None:
        super().__init__()
        self.paper = config.block_type == "paper"
        self.state_norm = nn.Identity() if self.paper else nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.layers = nn.ModuleList([RevDEQLayer(config, index) for index in range(config.num_block_layers)])
        self.norm = nn.Identity() if self.paper else nn.RMSNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, z: torch.Tensor, x: torch.Tensor, past_key_values=None, **kwargs) -> torch.Tensor:
        """z and x (batch, seq, hidden_size); `past_key_values` are `EvaluationSlots` or None; the rest goes to the attention."""
        if past_key_values is not None:
            past_key_values.next_evaluation()
        hidden_states = self.state_norm(z) + x
        for index, layer in enumerate(self.layers):
            skip = z if self.paper and index == 0 else hidden_states
            hidden_states = layer(hidden_states, skip, past_key_values=past_key_values, **kwargs)
        return self.norm(hidden_states)


class RevDEQConvBlock(nn.Module):
    """The paper's `f(z, x) = GN(ReLU(z + GN(x + conv(ReLU(GN(conv(z)))))))` of the image model; 3x3 convolutions without biases.

    Args:
        channels: channels of the state, a multiple of `group_width`.
        expansion: hidden channels as a multiple of `channels`.
        group_width: channels of a group.
        eps: added to variances.
    """

    def __init__(self, channels: int, expansion: int, group_width: int, eps: float) -> None:
        super().__init__()
        hidden = channels * expansion
        self.conv1 = nn.Conv2d(channels, hidden, 3, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(hidden // group_width, hidden, eps=eps)
        self.conv2 = nn.Conv2d(hidden, channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(channels // group_width, channels, eps=eps)
        self.norm3 = nn.GroupNorm(channels // group_width, channels, eps=eps)

    def forward(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """z and x (batch, channels, height, width)."""
        inner = self.norm2(x + self.conv2(torch.relu(self.norm1(self.conv1(z)))))
        return self.norm3(torch.relu(z + inner))


def _half(kernel: tuple[int, int]) -> tuple[int, int]:
    """The padding with which a convolution keeps the size of its grid."""
    return kernel[0] // 2, kernel[1] // 2


class RevDEQPositionNorm(nn.LayerNorm):
    """LayerNorm over the channels at each position of (batch, channels, height, width)."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states.movedim(1, -1)).movedim(-1, 1)


class RevDEQRecallBlock(nn.Module):
    """`f(z, x) = LN(conv(ReLU(LN(conv(z) + x))) + x)`, LN over the channels at each position.

    There is no identity path from z, so that a position forgets what it was before and the map can contract, and nothing depends on the size of the
    grid, whose far ends hear from one another by iteration alone. The input is recalled twice in every evaluation, as in Deep Thinking networks (arXiv
    2202.05826).

    Args:
        config: `kernel_size` of the convolutions and `norm_eps` are read.
        channels: channels of the state.
        expansion: channels between the convolutions as a multiple of `channels`; x is added to the first ones of them.
    """

    channels_last_on_cpu = True  # it has no GroupNorm, see memory_format; a norm at each position then copies nothing

    def __init__(self, config: RevDEQVisionConfig, channels: int, expansion: int) -> None:
        super().__init__()
        hidden, kernel = channels * expansion, config.kernel_sides
        self.conv1 = nn.Conv2d(channels, hidden, kernel, padding=_half(kernel))
        self.norm1 = RevDEQPositionNorm(hidden, eps=config.norm_eps)
        self.conv2 = nn.Conv2d(hidden, channels, kernel, padding=_half(kernel))
        self.norm2 = RevDEQPositionNorm(channels, eps=config.norm_eps)

    def forward(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """z and x (batch, channels, height, width)."""
        inner = self.conv1(z)
        wide = x if inner.shape == x.shape else nn.functional.pad(x, (0, 0, 0, 0, 0, inner.shape[1] - x.shape[1]))
        return self.norm2(self.conv2(torch.relu(self.norm1(inner + wide))) + x)


class RevDEQConvNextBlock(nn.Module):
    """The modern `f(z, x)` of the image model, in the manner of ConvNeXt: `u = GN(z) + x; f = GN(u + pointwise(act(pointwise(GN(depthwise(u))))))`.

    The norms keep the state in range and let the map contract, as in the language model's block. Chosen by measurement, see docs/image_model.md. At the
    parameters of the paper's block of expansion 1 its expansion is about 9.

    Args:
        config: `kernel_size` of the depthwise convolution, `hidden_act`, `group_width` and `norm_eps` are read.
        channels: channels of the state, a multiple of `group_width`.
        expansion: hidden channels between the pointwise convolutions as a multiple of `channels`.
    """

    def __init__(self, config: RevDEQVisionConfig, channels: int, expansion: int) -> None:
        super().__init__()
        groups, kernel = channels // config.group_width, config.kernel_sides
        self.state_norm = nn.GroupNorm(groups, channels, eps=config.norm_eps)
        self.depthwise = nn.Conv2d(channels, channels, kernel, padding=_half(kernel), groups=channels, bias=False)
        self.norm = nn.GroupNorm(groups, channels, eps=config.norm_eps)
        self.up_proj = nn.Conv2d(channels, channels * expansion, 1)
        self.down_proj = nn.Conv2d(channels * expansion, channels, 1)
        self.act_fn = ACT2FN[config.hidden_act]
        self.output_norm = nn.GroupNorm(groups, channels, eps=config.norm_eps)

    def forward(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """z and x (batch, channels, height, width)."""
        u = self.state_norm(z) + x
        return self.output_norm(u + self.down_proj(self.act_fn(self.up_proj(self.norm(self.depthwise(u))))))
