"""The language model's block and the authors' reversible training step in JAX, to be timed beside this package's; a module, no command.

The block computes what `RevDEQTransformerBlock` computes, from the same weights. The solve is that of the authors' JAX code (McCallum, Arora and Foster,
arXiv 2509.12917; github.com/sammccallum/reversible-deq), written anew: states in float64, the block in float32, and a backward pass that reconstructs the
states by dividing by `1 - beta`, where this package keeps integers that it reverses exactly. What theirs does beyond that is left out and does not count
against it: the residual and the stopping rule, and one more evaluation before the first step.

    params, x, rotary = jax_twin.from_torch(block, x, rotary)
    training_step = jax_twin.make_step(block.layers[0].self_attn.config, beta=0.5, steps=8)
    z, grads, grad_x = jax.block_until_ready(training_step(params, x, rotary, weight))

JAX is no dependency of the package: `pip install jax`. Importing this module turns JAX's 64-bit types on in the whole process.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from revdeq_hf import RevDEQConfig
from revdeq_hf.block_revdeq import RevDEQTransformerBlock

try:
    import jax
    import jax.numpy as jnp
except ImportError as error:
    raise ImportError("benchmarks/jax_twin.py runs JAX beside torch, and JAX cannot be imported here; `pip install jax`") from error

jax.config.update("jax_enable_x64", True)  # without it JAX makes float32 of float64 and only warns

Array = Any  # jax.Array, where jax is installed
Params = dict[str, Array]  # the names of the block's parameters in torch, their arrays in torch's shapes
Rotary = tuple[Array, Array] | None  # cosines and sines (batch or 1, length, head_dim), or None, as for the paper's block
ACTIVATIONS: Any = {"silu": jax.nn.silu, "gelu": partial(jax.nn.gelu, approximate=False), "gelu_pytorch_tanh": jax.nn.gelu}


def from_torch(block: RevDEQTransformerBlock, x: torch.Tensor, rotary: Rotary) -> tuple[Params, Array, Rotary]:
    """Copies of torch's tensors, in their dtypes: the block's parameters, x (batch, length, hidden_size), and the rotary cosines and sines or None."""

    def copied(tensor: torch.Tensor) -> Array:
        return jnp.array(tensor.detach().cpu().numpy(), copy=True)  # else JAX may share torch's memory

    # matrices stay (outputs, inputs): a step with (inputs, outputs) took 4 to 16 % longer
    params = {name: copied(parameter) for name, parameter in block.named_parameters()}
    return params, copied(x), None if rotary is None else (copied(rotary[0]), copied(rotary[1]))


def evaluate(config: RevDEQConfig, params: Params, z: Array, x: Array, rotary: Rotary) -> Array:
    """The block's value `f(z, x)`, of the shape and the dtype of z.

    Args:
        config: the block's, of either type; causal, without dropout.
        params, z, x, rotary: as `from_torch` gives them, z like x; all of one dtype, in which everything is computed but the statistics of norms and
            softmax, which are float32 at least.
    """
    paper, act = config.block_type == "paper", ACTIVATIONS[config.hidden_act]

    def linear(name: str, h: Array) -> Array:
        h = h @ params[f"{name}.weight"].T
        return h + params[f"{name}.bias"] if f"{name}.bias" in params else h

    def norm(name: str, h: Array) -> Array:
        """RMSNorm, LayerNorm where there is a bias, nothing where there is no such norm."""
        if f"{name}.weight" not in params:
            return h
        bias, wide = params.get(f"{name}.bias"), h.astype(jnp.promote_types(h.dtype, jnp.float32))
        if bias is not None:
            wide = wide - wide.mean(-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + config.norm_eps)
        scaled = wide.astype(h.dtype) * params[f"{name}.weight"]
        return scaled if bias is None else scaled + bias

    hidden = norm("state_norm", z) + x
    for index in range(config.num_block_layers):
        attention, mlp = f"layers.{index}.self_attn", f"layers.{index}.mlp"
        skip = z if paper and index == 0 else hidden
        u = norm(f"layers.{index}.input_layernorm", hidden)
        query, key, value = (linear(f"{attention}.{letter}_proj", u).reshape(*u.shape[:2], -1, config.head_dim) for letter in "qkv")
        hidden = skip + linear(f"{attention}.o_proj", attend(query, key, value, rotary).reshape(u.shape))
        u = norm(f"layers.{index}.post_attention_layernorm", hidden)
        up = linear(f"{mlp}.up_proj", u)
        inner = act(linear(f"{mlp}.mid_proj", act(up))) if paper else act(linear(f"{mlp}.gate_proj", u)) * up
        hidden = hidden + linear(f"{mlp}.down_proj", inner)
    return norm("norm", hidden)


def attend(query: Array, key: Array, value: Array, rotary: Rotary) -> Array:
    """Causal attention; query (batch, length, heads, dim), key and value with as many heads or a part of them; returns the shape of query.

    Written out, heads before positions, because that is the fastest way on a core of a CPU. A step with N = 2 at (4, 256, 512) and 4 heads took 1.75 s so,
    1.81 s with einsums that leave positions before heads, 1.84 s with `jax.nn.dot_product_attention` (CPU time, medians of 13, in turn).
    """
    groups = query.shape[2] // key.shape[2]
    if groups > 1:
        key, value = jnp.repeat(key, groups, axis=2), jnp.repeat(value, groups, axis=2)
    query, key, value = (part.swapaxes(1, 2) for part in (query * query.shape[3] ** -0.5, key, value))  # (batch, heads, length, dim)
    if rotary is not None:
        query, key = rotate(query, *rotary), rotate(key, *rotary)
    scores = jnp.einsum("bhtd,bhsd->bhts", query, key)
    scores = jnp.where(jnp.tri(query.shape[2], dtype=bool), scores, -jnp.inf)
    weights = jax.nn.softmax(scores.astype(jnp.promote_types(scores.dtype, jnp.float32))).astype(value.dtype)
    return jnp.einsum("bhts,bhsd->bhtd", weights, value).swapaxes(1, 2)


def rotate(states: Array, cos: Array, sin: Array) -> Array:
    """Rotary positions. States (batch, heads, length, dim); cos and sin (batch or 1, length, dim), their two halves equal."""
    first, second = jnp.split(states, 2, axis=-1)
    return states * cos[:, None] + jnp.concatenate((-second, first), axis=-1) * sin[:, None]


def make_step(
    config: RevDEQConfig, beta: float, steps: int, state_dtype: str = "float64", compute_dtype: str = "float32", **compiler_options: Any
) -> Callable[[Params, Array, Rotary, Array], tuple[Array, Params, Array]]:
    """A training step of the loss `sum(z * weight)`, compiled as a whole by its first call, which takes seconds.

    Args:
        config: the block's, `block.layers[0].self_attn.config`; of either type; causal, without dropout.
        beta: relaxation, not 1.
        steps: N >= 1; a step is two evaluations of the block.
        state_dtype: of y and z and their adjoints, "float64" as in the authors' code, or "float32".
        compute_dtype: of the block, "float32", "bfloat16" or "float64". Parameters are cast once a pass; their gradients are summed in their own dtype.
        compiler_options: XLA's. At odd, small sizes XLA may compile the block otherwise in the backward pass than in the forward pass; the difference in
            the last bits of float32 then grows with every state that is reconstructed, in float64 as well: at (3, 7, 32), beta = 0.8 and N = 4,
            gradients are off by some percent. There `xla_disable_hlo_passes="fusion"` helps. (4, 256, 512) and (2, 64, 128) need nothing.

    Returns:
        `training_step(params, x, rotary, weight) -> (z, gradients of params, gradient of x)`. z and weight are (batch, length, hidden_size); z has
        `state_dtype`, gradients the dtypes of params and x. No argument is donated, for the next call needs them again.

    Cost: 8N evaluations of the block (a vector-Jacobian product counts 2): 2N forward; 2N with their products backward, whose values also reconstruct the
    states. Between the passes two states are kept beside the arguments. (This package keeps the graph of the last evaluation: 8N - 1.)

    Raises:
        ValueError: the twin has no such setting.
    """
    if beta == 1 or steps < 1:
        raise ValueError(f"beta must not be 1 and steps must be at least 1, got beta={beta} and steps={steps}")
    if not config.is_causal or config.attention_dropout or config.hidden_dropout or config.hidden_act not in ACTIVATIONS:
        raise ValueError(
            f"the block must be causal, without dropout, of an activation among {', '.join(ACTIVATIONS)}; got is_causal={config.is_causal}, "
            f"attention_dropout={config.attention_dropout}, hidden_dropout={config.hidden_dropout}, hidden_act={config.hidden_act!r}"
        )
    wide, narrow = jnp.dtype(state_dtype), jnp.dtype(compute_dtype)

    def narrowed(tree: Any) -> Any:
        return jax.tree.map(lambda array: array.astype(narrow), tree)

    def iterate(params: Params, x: Array, rotary: Rotary) -> tuple[Array, Array]:
        """y and z after all steps. Unrolled, 8 steps take the same time, twice the time to compile, and 340 MiB for temporary arrays instead of 130."""
        params, *inputs = narrowed((params, x, rotary))

        def moved(state: Array, other: Array) -> Array:
            return (1 - beta) * state + beta * evaluate(config, params, other.astype(narrow), *inputs).astype(wide)

        def step(_: Array, pair: tuple[Array, Array]) -> tuple[Array, Array]:
            y = moved(pair[0], pair[1])
            return y, moved(pair[1], y)

        zero = jnp.zeros(x.shape, wide)
        return jax.lax.fori_loop(0, steps, step, (zero, zero))

    @jax.custom_vjp
    def solve(params: Params, x: Array, rotary: Rotary) -> Array:
        return iterate(params, x, rotary)[1]

    def solve_forward(params: Params, x: Array, rotary: Rotary) -> tuple[Array, Any]:
        y, z = iterate(params, x, rotary)
        return z, (y, z, params, x, rotary)

    def solve_backward(kept: Any, grad_z: Array) -> tuple[Params, Array, None]:
        y, z, *inputs = kept
        params, x, rotary = narrowed(inputs)
        sums = jax.tree.map(jnp.zeros_like, tuple(inputs[:2]))

        def undone(state: Array, other: Array, grad: Array, sums: Any) -> tuple[Array, Array, Any]:
            """`state` before it moved by beta towards f(other); what its adjoint `grad` adds to that of `other`; and to the sums of params and x."""
            value, pull = jax.vjp(lambda p, s, x: evaluate(config, p, s, x, rotary), params, other.astype(narrow), x)
            grad_params, grad_other, grad_x = pull((beta * grad).astype(narrow))
            sums = jax.tree.map(lambda total, part: total + part.astype(total.dtype), sums, (grad_params, grad_x))
            return (state - beta * value.astype(wide)) / (1 - beta), grad_other.astype(wide), sums

        def step(_: Array, carry: Any) -> Any:
            y, z, grad_y, grad_z, sums = carry
            z, more, sums = undone(z, y, grad_z, sums)
            grad_y = grad_y + more
            y, more, sums = undone(y, z, grad_y, sums)
            return y, z, (1 - beta) * grad_y, (1 - beta) * grad_z + more, sums

        *_, sums = jax.lax.fori_loop(0, steps, step, (y, z, jnp.zeros_like(grad_z), grad_z, sums))
        return *sums, None

    solve.defvjp(solve_forward, solve_backward)

    @partial(jax.jit, compiler_options=compiler_options or None)
    def training_step(params: Params, x: Array, rotary: Rotary, weight: Array) -> tuple[Array, Params, Array]:
        z, pull = jax.vjp(lambda params, x: solve(params, x, rotary), params, x)
        return z, *pull(weight.astype(wide))  # the gradient of sum(z * weight) with respect to z is the weight

    return training_step
