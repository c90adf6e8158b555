"""The laws of the fixed-point layer (exactness, cost, memory, honesty) at small sizes."""

import copy
import gc
import math
import pickle
import sys
import threading
import warnings
import weakref
from collections import Counter
from contextlib import nullcontext
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import AttentionBlock, make_block, relative_error
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from revdeq_hf import DriftError, ReversibleFixedPoint
from revdeq_hf.certificate_revdeq import _Glances
from revdeq_hf.training import LiveBytes

BETAS = [0.3, 0.5, 0.7, 0.75, 0.8, 0.9, 1.2, 1.5]
STEPS = [1, 4, 13, 40]  # 40 is past the bits of one segment for every beta
PRECISIONS = ["float32", "bfloat16 autocast", "bfloat16", "float16", "float64"]


def run(
    kind,
    gradient,
    beta=0.8,
    steps=4,
    precision="float32",
    dropout=0.0,
    start=False,
    loss_scale=1.0,
    training=True,
    device="cpu",
    **layer_kwargs,
):
    """One training step; returns the solution, the layer, and the gradients of parameters, x and z0."""
    block, x = make_block(kind, **({"dropout": dropout} if dropout else {}))
    parts = x if isinstance(x, tuple) else (x,)
    autocast = precision.endswith("autocast")
    dtype = torch.float32 if autocast else getattr(torch, precision)
    block.to(device, dtype)
    parts = tuple(part.detach().to(device, dtype).requires_grad_() for part in parts)
    z0 = tuple(torch.randn_like(part).requires_grad_() for part in parts) if start else None
    block.train(training)
    calls: list[int] = []
    block.register_forward_pre_hook(lambda *_: calls.append(1))  # checkpoint stops a recomputation early, before forward hooks
    layer = ReversibleFixedPoint(block, beta=beta, max_steps=steps, gradient=gradient, **layer_kwargs)
    torch.manual_seed(1)
    single = not isinstance(x, tuple)
    with torch.autocast(device, dtype=getattr(torch, precision.split()[0]) if autocast else None, enabled=autocast):
        solution = layer(parts[0] if single else parts, z0=None if z0 is None else (z0[0] if single else z0))
    forward_calls = len(calls)
    z = (solution.z,) if single else solution.z
    loss = sum((part.float() * torch.linspace(-1, 1, part.shape[-1], device=device)).sum() for part in z) * loss_scale
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in block.named_parameters()}
    gradients.update({f"x{i}": part.grad for i, part in enumerate(parts)})
    gradients.update({f"z0{i}": part.grad for i, part in enumerate(z0 or ())})
    return solution, layer, gradients, (forward_calls, len(calls) - forward_calls)


def assert_same(a, b):
    """Outputs and all gradients equal in every bit."""
    za, zb = (s.z if isinstance(s.z, tuple) else (s.z,) for s in (a[0], b[0]))
    assert all(torch.equal(p, q) for p, q in zip(za, zb, strict=True)), "the modes computed other outputs"
    assert torch.equal(a[0].steps, b[0].steps)
    for name, gradient in a[2].items():
        assert gradient is not None, f"no gradient for {name}"
        assert gradient.abs().sum() > 0 or name.startswith("z0"), f"zero gradient for {name}"
        assert torch.equal(gradient, b[2][name]), name


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["attention", "convolution", "tuple"])
def test_law_1_and_2_modes_agree_and_drift_is_zero(kind, precision):
    """All betas and depths of a kind and precision; gradients add up in autograd's own order, so they are equal bit for bit."""
    for beta in BETAS:
        for steps in STEPS:
            exact = run(kind, "reversible", beta, steps, precision, loss_scale=0.1)
            stored = run(kind, "backprop", beta, steps, precision, loss_scale=0.1)
            assert exact[1].drift.item() == 0.0, (beta, steps)
            assert_same(exact, stored)
            if steps == 4:
                assert_same(run(kind, "checkpoint", beta, steps, precision, loss_scale=0.1), stored)


@pytest.mark.parametrize("gradient", ["reversible", "checkpoint"])
@pytest.mark.parametrize(
    "settings",
    [
        dict(dropout=0.3),
        dict(dropout=0.3, precision="bfloat16 autocast"),
        dict(training=False, dropout=0.3),
        dict(start=True),
        dict(tol=0.02, start=True, steps=30),
        dict(tol=0.02, steps=70, beta=0.9),
        dict(tol=1e-9, steps=30, precision="float64"),
        dict(keep_evaluations=0),
        dict(keep_evaluations=5),
        dict(keep_evaluations=99),
    ],
    ids=str,
)
def test_law_1_and_2_under_every_setting(settings, gradient):
    exact, stored = run("attention", gradient, **settings), run("attention", "backprop", **settings)
    assert exact[1].drift.item() == 0.0
    assert_same(exact, stored)


def test_rows_that_stop_early_stop_at_different_steps():
    """Otherwise the settings with tol above would prove little."""
    solution, _, _, _ = run("attention", "reversible", tol=0.02, start=True, steps=30)
    assert solution.steps.max() < 30
    torch.manual_seed(0)
    block = AttentionBlock()
    x = torch.randn(4, 7, 16) * torch.tensor([0.01, 1.0, 3.0, 10.0])[:, None, None]
    together = ReversibleFixedPoint(block, max_steps=50, tol=1e-3)(x)
    assert len(set(together.steps.tolist())) > 1
    assert (together.residual <= 1e-3).all()
    for row in range(4):
        alone = ReversibleFixedPoint(block, max_steps=50, tol=1e-3)(x[row : row + 1])
        assert alone.steps.item() == together.steps[row].item()
        torch.testing.assert_close(alone.z[0], together.z[row], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "settings", [dict(gradient="reversible"), dict(gradient="implicit", solver="anderson")], ids=lambda value: value["gradient"]
)
def test_tol_of_a_call_is_that_of_a_layer(settings):
    found = []
    for own, asked in ((0.02, {}), (1e-9, {"tol": 0.02}), (None, {"tol": 0.02})):
        block, x = make_block("attention")
        layer = ReversibleFixedPoint(block, max_steps=30, tol=own, **settings)
        solution = layer(x, **asked)
        solution.z.square().sum().backward()
        assert solution.steps.max() < 30
        assert layer.drift == 0
        found.append([solution.z, solution.steps, x.grad, *(parameter.grad for parameter in block.parameters())])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    with pytest.raises(ValueError, match="tol must be None"):
        layer(x, tol=-1)


def test_gradients_equal_finite_differences():
    torch.manual_seed(0)
    block = AttentionBlock(width=4, heads=1).double()
    x, z0 = (torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for gradient in ("reversible", "checkpoint", "backprop"):
        layer = ReversibleFixedPoint(block, beta=0.8, max_steps=6, gradient=gradient)
        assert torch.autograd.gradcheck(lambda a, b, layer=layer: layer(a, z0=b).z, (x, z0), eps=1e-5, atol=1e-5, rtol=1e-3, fast_mode=True)


def test_second_derivatives_where_everything_is_stored():
    block = AttentionBlock(width=4, heads=1).double()
    x = torch.randn(1, 2, 4, dtype=torch.float64, requires_grad=True)
    layer = ReversibleFixedPoint(block, beta=0.8, max_steps=3, gradient="backprop")
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the fused kernels have no second derivative
        assert torch.autograd.gradgradcheck(lambda a: layer(a).z, (x,), eps=1e-5, atol=1e-4, rtol=1e-3)


def test_the_iteration_is_the_papers():
    """Written out in floating point."""
    block, x = make_block("attention")
    x = x.detach().double()
    block = block.double()
    beta = 0.7
    y = z = torch.zeros_like(x)
    for _ in range(5):
        y = (1 - beta) * y + beta * block(z, x)
        z = (1 - beta) * z + beta * block(y, x)
    torch.testing.assert_close(ReversibleFixedPoint(block, beta=beta, max_steps=5)(x).z, z, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("gradient", "keep", "backward"),
    [("reversible", 0, 16), ("reversible", 1, 15), ("reversible", 6, 10), ("checkpoint", 1, 15), ("backprop", 1, 0)],
)
def test_law_4_evaluations(gradient, keep, backward):
    solution, _, _, calls = run("attention", gradient, steps=8, keep_evaluations=keep)
    assert calls == (16, backward)
    assert solution.evaluations == 16


def live_bytes(gradient: str, steps: int, beta: float = 0.5, **settings) -> tuple[int, int]:
    """Bytes held between the passes, and the peak of a whole training step."""
    block, x = make_block("attention")
    layer = ReversibleFixedPoint(block, beta=beta, max_steps=steps, gradient=gradient, **settings)
    with LiveBytes() as memory:
        loss = layer(x).z.sum()
        held = memory.alive
        loss.backward()
    return held, memory.peak


def test_law_3_memory_does_not_grow_with_the_steps():
    state = 3 * 7 * 16 * 4  # bytes of one float32 state
    held, peak = live_bytes("reversible", 4)
    assert live_bytes("reversible", 27) == (held, peak), "27 steps at beta = 0.5 fit into 64 bits"
    longer_held, longer_peak = live_bytes("reversible", 108)
    words = 2 * state * 2 * -(-81 // 63)  # beyond it one bit per element and step, in words of 8 bytes, for y and z
    assert longer_held - held == words
    assert longer_peak - peak <= 2 * words
    for other in ("checkpoint", "backprop"):
        few, many = live_bytes(other, 4), live_bytes(other, 27)
        assert many[0] - few[0] >= 2 * 23 * state, other
        assert many[1] > peak, other


@pytest.mark.parametrize("width", [1, 2, 8, 64])
def test_narrow_states_need_no_more_memory_with_more_steps(width):
    """What is noted of the rows until it is counted is little beside the state, however narrow."""
    x, peaks = torch.randn(512, width), []
    for steps in (2, 26):  # within one segment
        with torch.no_grad(), LiveBytes() as memory:
            ReversibleFixedPoint(Injection(), beta=0.5)(x, max_steps=steps)
        peaks.append(memory.peak)
    assert peaks[1] <= peaks[0] + x.numel() * x.element_size()


@pytest.mark.parametrize("beta", [0.5, 0.8, 0.6, 1.4])
def test_without_gradients_nothing_grows_with_the_steps(beta):
    """Not even the bits that a contraction discards: a solve of 250 steps needs what one of a hundred needs (0.6 and 1.4 take digits back)."""
    block, x = make_block("attention")
    layer = ReversibleFixedPoint(block, beta=beta)
    peaks, states = {}, {}
    for steps in (100, 250):
        with torch.no_grad(), LiveBytes() as memory:
            states[steps] = layer(x, max_steps=steps).z
        peaks[steps] = memory.peak
    assert abs(peaks[100] - peaks[250]) <= x.numel() * x.element_size() // 8  # as much may be noted of the rows' values
    exact = layer(x, max_steps=100, gradient="reversible").z
    assert exact.requires_grad
    assert torch.equal(exact, states[100]), "forgetting changes nothing"


@pytest.mark.parametrize(
    ("gradient", "steps", "told"),
    [*(("reversible", *pair) for pair in ((4, 32), (16, 48), (64, 80), (256, 192), (1000, 624))), ("backprop", 64, 1568)],
)
def test_law_3_what_is_kept_between_the_passes_is_what_the_pages_say(gradient, steps, told):
    """docs/layer.md, README.md: bytes for each number of the state of its block at beta 0.8, parameters left out."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.inner = nn.LayerNorm(32), nn.Linear(32, 32)

        def forward(self, z, x):
            return torch.tanh(self.inner(self.norm(z + x)))

    layer, storages = ReversibleFixedPoint(Block(), beta=0.8, max_steps=steps, gradient=gradient), {}
    own = {parameter.data_ptr() for parameter in layer.parameters()}

    def see(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        solution = layer(torch.randn(64, 32, requires_grad=True))
    assert round(sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in own) / solution.z.numel()) == told


@pytest.mark.parametrize("gradient", ["reversible", "checkpoint", "backprop", "implicit"])
@pytest.mark.parametrize("tol", [None, 0.02])
def test_trajectory(gradient, tol):
    block, x = make_block("attention")
    layer = ReversibleFixedPoint(block, max_steps=6, gradient=gradient, tol=tol)
    solution = layer(x, output_trajectory=True)
    taken = int(solution.steps.max())
    assert len(solution.trajectory) == taken
    assert torch.equal(solution.trajectory[-1], solution.z)
    for count, state in enumerate(solution.trajectory[:2], 1):
        assert torch.equal(state, layer(x, max_steps=count).z), "a shorter solve is the beginning of a longer one"
    assert solution.step_residuals.shape == (taken + (taken < 6), 3)
    assert torch.equal(solution.step_residuals[-1], solution.residual)
    assert layer(x).trajectory is None
    differentiable = gradient != "implicit"
    assert solution.trajectory[0].requires_grad == differentiable
    if differentiable:
        got = torch.autograd.grad(solution.trajectory[1].sum(), block.up.weight)[0]
        assert torch.equal(got, torch.autograd.grad(layer(x, max_steps=2).z.sum(), block.up.weight)[0])


@pytest.mark.parametrize("kind", ["attention", "pair"])
@pytest.mark.parametrize(("tol", "with_z"), [(None, False), (0.02, True)])
def test_law_1_states_on_the_way_have_gradients(kind, tol, with_z):
    """A loss over all steps, or some and the last state: the same gradients from all three exact modes, past the bits of a segment, too."""

    def gradients(gradient):
        block, x = make_block(kind)
        leaves = x if isinstance(x, tuple) else (x,)
        layer = ReversibleFixedPoint(block, beta=0.8, max_steps=14, tol=tol, gradient=gradient)
        solution = layer(x, output_trajectory=True)
        states = solution.trajectory[::2] if with_z else solution.trajectory
        parts = [
            (0.9**i * part).square().mean() for i, state in enumerate(states) for part in (state if isinstance(state, tuple) else (state,))
        ]
        z = solution.z if isinstance(solution.z, tuple) else (solution.z,)
        loss = sum(parts) + with_z * sum(part.sum() for part in z)
        found = torch.autograd.grad(loss, [*leaves, *block.parameters()])
        assert layer.drift == 0.0
        return found

    exact = gradients("reversible")
    for other in ("checkpoint", "backprop"):
        for one, two in zip(exact, gradients(other), strict=True):
            assert torch.equal(one, two)


def test_states_on_the_way_are_freed_without_the_garbage_collector():
    block, x = make_block("attention")
    gc.disable()
    try:
        solution = ReversibleFixedPoint(block, max_steps=3)(x, output_trajectory=True)
        state = weakref.ref(solution.trajectory[0])
        del solution
        assert state() is None
    finally:
        gc.enable()


def test_law_5_training_and_inference_compute_the_same():
    block, x = make_block("attention")
    layer = ReversibleFixedPoint(block, max_steps=5)
    trained = layer(x).z
    with torch.no_grad():
        assert torch.equal(layer(x).z, trained)
    assert torch.equal(layer.eval()(x).z, trained)
    longer = layer(x, max_steps=9)
    assert longer.steps.tolist() == [9, 9, 9]
    assert len(longer.z) == 3


def test_dropout_leaves_the_users_generator_alone_and_uses_one_mask_per_solve():
    block, x = make_block("attention", dropout=0.4)
    layer = ReversibleFixedPoint(block, max_steps=4)
    torch.manual_seed(5)
    block(x, x)
    after_one_evaluation = torch.get_rng_state()
    torch.manual_seed(5)
    z = layer(x).z
    assert torch.equal(torch.get_rng_state(), after_one_evaluation)
    z.sum().backward()
    assert torch.equal(torch.get_rng_state(), after_one_evaluation)
    assert layer.drift == 0
    assert not torch.equal(layer(x).z, z)
    long = ReversibleFixedPoint(block, max_steps=60)(x)
    assert long.residual.max() < 1e-4, "with a mask per evaluation there would be no fixed point"


class Noisy(nn.Module):
    """Draws from a generator that nobody replays."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, z, x):
        return torch.tanh(self.linear(z) + x) + 1e-3 * torch.randn(z.shape, generator=self.generator)


def test_the_certificate_catches_a_block_that_is_not_repeatable():
    x = torch.randn(2, 4)
    layer = ReversibleFixedPoint(Noisy(), max_steps=4)
    with pytest.warns(UserWarning, match="did not reconstruct its start state"):
        layer(x).z.sum().backward()
    assert layer.drift > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x).z.sum().backward()  # warns once
    with pytest.raises(DriftError, match="nondeterministic kernel"):
        ReversibleFixedPoint(Noisy(), max_steps=4, drift_policy="raise")(x).z.sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ReversibleFixedPoint(Noisy(), max_steps=4, drift_policy="ignore")(x).z.sum().backward()


def test_drift_of_one_layer_called_twice_is_the_greater_one():
    """A later exact pass must not cover an earlier one that was not."""

    class SometimesNoisy(Noisy):
        def forward(self, z, x, noisy=False):
            return super().forward(z, x) if noisy else torch.tanh(self.linear(z) + x)

    layer = ReversibleFixedPoint(SometimesNoisy(), max_steps=3, drift_policy="ignore")
    first = layer(torch.randn(2, 4)).z
    layer(first, noisy=True).z.sum().backward()  # the noisy call goes back first
    assert layer.drift > 0
    layer(torch.randn(2, 4)).z.sum().backward()
    assert layer.drift == 0


class Poisoned(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.linear, self.value = nn.Linear(4, 4), value

    def forward(self, z, x):
        out = torch.tanh(self.linear(z) + x)
        return torch.where((x == 7).any(-1, keepdim=True), self.value, out)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("gradient", ["reversible", "checkpoint", "backprop", None])
def test_law_10_non_finite_values_come_out(value, gradient):
    x = torch.randn(3, 4)
    x[1, 2] = 7
    layer = ReversibleFixedPoint(Poisoned(value), max_steps=3, gradient=gradient or "reversible")
    with torch.set_grad_enabled(gradient is not None):
        solution = layer(x)
    assert solution.z[1].isnan().all()
    assert solution.z[[0, 2]].isfinite().all()
    assert solution.nonfinite.tolist() == [0, 6, 0]
    assert "nonfinite=6" in repr(solution)
    if gradient:
        solution.z.sum().backward()
        assert layer.drift == 0


@pytest.mark.parametrize("gradient", ["reversible", "checkpoint", "backprop"])
def test_law_10_a_gradient_scaler_sees_what_overflowed(gradient):
    """The weights get NaN or inf from the example that overflowed inside the block, though the loss's own gradient is finite."""

    class Overflow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, z, x):
            return torch.tanh(self.weight * (z + x) * 1e30 * 1e30 * 1e-30 * 1e-30) + (self.weight * x * 1e30).square() * 1e-30

    layer = ReversibleFixedPoint(Overflow(), max_steps=2, gradient=gradient)
    solution = layer(torch.tensor([[1.0], [0.0]]))
    assert solution.z.isnan().tolist() == [[True], [False]]
    solution.z.sum().backward()
    assert not layer.block.weight.grad.isfinite().any()


@pytest.mark.parametrize("gradient", ["reversible", "checkpoint", "backprop"])
def test_rows_that_all_stop_at_the_start_have_zero_gradients(gradient):
    class Relu(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, z, x):
            return torch.relu(0.1 * self.linear(z) + x)

    layer = ReversibleFixedPoint(Relu(), max_steps=4, tol=1e-3, gradient=gradient)
    x = torch.full((2, 3), -1.0, requires_grad=True)
    solution = layer(x)
    assert solution.steps.tolist() == [0, 0]
    solution.z.sum().backward()
    assert x.grad is None or x.grad.abs().sum() == 0


def test_values_beyond_the_range_are_clamped_counted_and_told():
    block = Poisoned(1e5)
    x = torch.randn(3, 4)
    x[1, 2] = 7
    layer = ReversibleFixedPoint(block, max_steps=3)
    with pytest.warns(UserWarning, match="were clamped"):
        solution = layer(x)
    assert solution.clamped.tolist() == [0, 6, 0]
    assert solution.z[1].max() <= 2048
    solution.z.sum().backward()
    assert layer.drift == 0


def test_gradients_reach_context_and_keyword_tensors_and_only_those_that_need_them():
    results = []
    for gradient in ("reversible", "backprop"):
        torch.manual_seed(0)
        block, x = AttentionBlock(), torch.randn(3, 7, 16)
        block.qkv.requires_grad_(False)
        context, shift = torch.randn(3, 7, 16, requires_grad=True), torch.randn(16, requires_grad=True)
        layer = ReversibleFixedPoint(block, max_steps=3, gradient=gradient)
        layer(x, context, shift=shift).z.square().sum().backward()
        assert block.qkv.weight.grad is None
        assert x.grad is None
        results.append([context.grad, shift.grad, block.up.weight.grad])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_autograd_grad_retain_graph_accumulation_and_composition():
    block, x = make_block("attention")
    layer = ReversibleFixedPoint(block, max_steps=3)
    loss = layer(x).z.square().sum()
    parameters = list(block.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    assert all(p.grad is None for p in parameters), "backward has a side effect on .grad"
    second = torch.autograd.grad(loss, parameters)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    loss = layer(x).z.square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(block.up.weight.grad, 2 * first[[n for n, _ in block.named_parameters()].index("up.weight")])

    def twice(layer, x):
        return layer(layer(x).z).z.square().sum()

    reference = ReversibleFixedPoint(block, max_steps=3, gradient="backprop")
    got = torch.autograd.grad(twice(layer, x), [x, *parameters])
    expected = torch.autograd.grad(twice(reference, x), [x, *parameters])
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(got, expected, strict=True))
    wrapped = torch.utils.checkpoint.checkpoint(lambda t: layer(t).z.square().sum(), x, use_reentrant=False)
    for a, b in zip(
        torch.autograd.grad(wrapped, [x, *parameters]), torch.autograd.grad(layer(x).z.square().sum(), [x, *parameters]), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("gradient", ["reversible", "checkpoint", "backprop", "implicit", "phantom"])
def test_a_weight_cast_without_a_graph_is_not_left_in_the_autocast_cache(gradient):
    """The same block used directly after a solve, within one autocast region, must still get gradients."""
    block, x = make_block("attention")
    layer = ReversibleFixedPoint(block, max_steps=2, gradient=gradient)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x.detach())
        direct = block(x.detach(), x.detach()).float().square().sum()
    direct.backward()
    assert block.up.weight.grad is not None


def test_deep_copy_and_state_dict():
    layer = ReversibleFixedPoint(make_block("attention")[0], max_steps=2)
    layer(torch.randn(1, 7, 16)).z.sum().backward()
    other = copy.deepcopy(layer)
    assert other.beta == layer.beta
    assert set(layer.state_dict()) == {f"block.{name}" for name, _ in layer.block.named_parameters()}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(beta=1), "must not be 1"),
        (dict(beta=0), r"\(0, 2\)"),
        (dict(beta=2.5), "got 2.5"),
        (dict(max_steps=0), "from 1 to"),
        (dict(max_steps=-3), "got -3"),
        (dict(max_steps=2.5), "whole number"),
        (dict(tol=-1.0), "tol"),
        (dict(tol=float("nan")), "tol"),
        (dict(gradient="exact"), "'reversible', 'checkpoint', 'backprop'"),
        (dict(solver="newton"), "solver must be one of"),
        (dict(drift_policy="shout"), "drift_policy must be one of"),
        (dict(keep_evaluations=-1), "keep_evaluations"),
    ],
    ids=str,
)
def test_unusable_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ReversibleFixedPoint(nn.Linear(2, 2), **settings)


def test_a_beta_that_is_no_small_fraction_is_told():
    with pytest.warns(UserWarning, match="is used"):
        layer = ReversibleFixedPoint(nn.Linear(2, 2), beta=0.7654321)
    assert layer.beta != 0.7654321
    assert abs(layer.beta - 0.7654321) < 1e-3


class Returns(nn.Module):
    def __init__(self, change) -> None:
        super().__init__()
        self.linear, self.change = nn.Linear(4, 4), change

    def forward(self, z, x):
        return self.change(torch.tanh(self.linear(z) + x))


def _raise(value):
    raise KeyError("from inside the block")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda f: f[:, :3], ValueError, r"got \[\(2, 3\)\], expected \[\(2, 4\)\]"),
        (lambda f: f.double(), TypeError, "dtype of its state"),
        (lambda f: f.int(), TypeError, "dtype of its state"),
        (lambda f: (f, f), TypeError, "one tensor"),
        (lambda f: None, TypeError, "one tensor"),
        (_raise, KeyError, "from inside the block"),
    ],
)
def test_a_block_that_does_not_fit_is_told_and_nothing_is_changed(change, error, message):
    x = torch.randn(2, 4, requires_grad=True)
    block = Returns(change)
    layer = ReversibleFixedPoint(block, max_steps=2)
    before = torch.get_rng_state()
    with pytest.raises(error, match=message):
        layer(x)
    assert torch.equal(torch.get_rng_state(), before)
    assert x.grad is None
    assert block.linear.weight.grad is None


def test_bad_calls_are_told():
    layer = ReversibleFixedPoint(Returns(lambda f: f), max_steps=2)
    with pytest.raises(ValueError, match="whole number"):
        layer(torch.randn(2, 4), max_steps=0)
    with pytest.raises(ValueError, match="floating"):
        layer(torch.ones(2, 4, dtype=torch.long))
    with pytest.raises(TypeError, match="tensor or a tuple"):
        layer("x")
    with pytest.raises(ValueError, match="first dimension"):
        layer(torch.randn(2, 4), z0=torch.randn(3, 4))
    with pytest.raises(ValueError, match="gradient must be one of"):
        layer(torch.randn(2, 4), gradient="none")
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        ReversibleFixedPoint(lambda z, x: x)


def test_batch_norm_inside_the_block_is_refused_in_training_only():
    class WithBatchNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, z, x):
            return self.norm(z + x) * 0.3

    layer = ReversibleFixedPoint(WithBatchNorm(), max_steps=2)
    with pytest.raises(ValueError, match="GroupNorm"):
        layer(torch.randn(3, 4))
    layer.eval()(torch.randn(3, 4)).z.sum().backward()
    assert layer.drift == 0


def test_double_backward_hidden_inputs_swapped_parameters_and_changed_inputs_are_told():
    block, x = make_block("attention")
    layer = ReversibleFixedPoint(block, max_steps=2)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(layer(x).z.sum(), x, create_graph=True)

    outside = torch.randn(4, requires_grad=True)
    hidden = ReversibleFixedPoint(Returns(lambda f: f * outside), max_steps=2)
    with pytest.raises(RuntimeError, match="neither one of its parameters nor one of its arguments"):
        hidden(torch.randn(2, 4)).z.sum().backward()

    z = layer(x).z
    block.qkv.requires_grad_(False)
    with pytest.raises(RuntimeError, match="other tensors in the backward pass"):
        z.sum().backward()
    block.qkv.requires_grad_(True)

    z = layer(x).z
    with torch.no_grad():
        block.up.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_an_empty_batch_passes_through():
    layer = ReversibleFixedPoint(Returns(lambda f: f), max_steps=3)
    solution = layer(torch.zeros(0, 4, requires_grad=True))
    solution.z.sum().backward()
    assert solution.z.shape == (0, 4)
    assert repr(solution) == "FixedPointSolution(batch=0)"


@pytest.mark.parametrize("gradient", ["reversible", "checkpoint", "backprop", "implicit", "phantom"])
def test_a_channels_last_state_may_be_normalised_first(gradient):
    """torch's GroupNorm crashes the process where such an input needs no gradient, as the start state does not by itself."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, z, x):
            return 0.1 * self.conv(self.norm(z)) + x

    torch.manual_seed(0)
    block = Block()
    x = torch.randn(3, 8, 5, 7)
    gradients = []
    for layout in (torch.contiguous_format, torch.channels_last):
        block.zero_grad()
        part = x.clone(memory_format=layout).requires_grad_()
        layer = ReversibleFixedPoint(block.to(memory_format=layout), max_steps=3, gradient=gradient)
        layer(part).z.square().sum().backward()
        gradients.append([part.grad, *(parameter.grad for parameter in block.parameters())])
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gradient", ["reversible", "backprop"])
def test_what_does_not_fit_into_memory_comes_with_advice(gradient):
    """A state of 16 TB, which costs nothing as long as it is only a view; the beginning of torch's message, by which batch sizes are found, stays."""

    class Block(nn.Module):
        def forward(self, z, x):
            return 0.1 * z + x

    x = torch.zeros(1, 1, requires_grad=True).expand(2**21, 2**21)
    with pytest.raises(
        RuntimeError, match=r"DefaultCPUAllocator: can't allocate memory[^\n]*\n.* 2097152 examples, each .* 8,388,608 bytes.*smaller batch"
    ):
        ReversibleFixedPoint(Block(), gradient=gradient)(x)


def test_states_are_copied_for_the_backward_pass_only_where_the_graph_is_kept():
    block, x = make_block("convolution")
    layer = ReversibleFixedPoint(block, beta=0.8, max_steps=30, drift_policy="raise")
    peaks, gradients = [], []
    for keep in (True, False):
        with LiveBytes() as memory:
            z = layer(x).z
            gradients.append(torch.autograd.grad(z.square().sum(), x, retain_graph=keep)[0])
        peaks.append(memory.peak)
        if keep:
            (again,) = torch.autograd.grad(z.square().sum(), x)
            assert torch.equal(again, gradients[0])
        assert layer.drift == 0
    assert torch.equal(*gradients)
    assert peaks[0] - peaks[1] >= 2 * 8 * x.numel()


@pytest.mark.parametrize("steps", [4, 40])
def test_what_is_kept_can_lie_elsewhere_until_the_backward_pass(steps):
    """`torch.autograd.graph.save_on_cpu` and its like work through these hooks."""
    block, x = make_block("attention")
    layer = ReversibleFixedPoint(block, beta=0.8, max_steps=steps, drift_policy="raise")
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor):
        kept.append(tensor)
        return tensor.dtype, tensor.tolist()

    def gradients(place) -> tuple[torch.Tensor, ...]:
        with place:
            z = layer(x).z
        found = torch.autograd.grad(z.square().sum(), (x, *block.parameters()))
        assert layer.drift == 0
        return found

    plain = gradients(nullcontext())
    elsewhere = gradients(torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: torch.tensor(packed[1], dtype=packed[0])))
    assert sum(tensor.dtype == torch.int64 and tensor.shape == x.shape for tensor in kept) >= 2  # the pair of states, and digits
    for a, b in zip(plain, elsewhere, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("keep", [0, 1, 4])
def test_hooks_meet_what_is_kept_and_nothing_else(keep):
    """Graphs of evaluations that are dropped were packed as well, and stayed for ever where an operation saves its own result, as tanh does."""

    class Packed:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

    class Saturating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, z, x):
            return torch.tanh(self.inner(z) + x)

    x = torch.randn(3, 6, requires_grad=True)
    counts = []
    for steps in (3, 9):
        packed: list[weakref.ref] = []

        def pack(tensor: torch.Tensor, packed: list[weakref.ref] = packed) -> Packed:
            held = Packed(tensor.detach())
            packed.append(weakref.ref(held))
            return held

        layer = ReversibleFixedPoint(Saturating(), beta=0.5, max_steps=steps, keep_evaluations=keep, drift_policy="raise")
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
            solution = layer(x)
        counts.append(len(packed))
        solution.z.sum().backward()
        assert layer.drift == 0
        del solution, layer
        gc.collect()
        assert not any(reference() is not None for reference in packed)
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("kind", ["attention", "convolution", "tuple"])
def test_without_gradients_a_compiled_caller_takes_in_the_whole_solve(kind):
    torch._dynamo.reset()
    block, x = make_block(kind)
    layer = ReversibleFixedPoint(block, beta=0.999, max_steps=3, damping=0.1).eval()  # segments of two steps: digits are spilled
    parts = x if isinstance(x, tuple) else (x,)
    with torch.no_grad():
        parts[0][1].fill_(torch.nan)
        expected = layer(x)
        layer.statistics = None
        found = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    for a, b in zip(*(s.z if isinstance(s.z, tuple) else (s.z,) for s in (expected, found)), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
        assert b[1].isnan().all()
    for name in ("steps", "residual", "evaluations", "clamped", "nonfinite"):
        assert str(getattr(found, name)) == str(getattr(expected, name)) == str(getattr(layer.statistics, name))
    assert not layer._compiled_block


@pytest.mark.parametrize("kind", ["attention", "convolution", "tuple"])
@pytest.mark.parametrize("settings", [dict(max_steps=20), dict(max_steps=20, tol=0.3)], ids=str)
def test_arithmetic_in_blocks_of_rows_gives_the_same_bits(kind, settings, monkeypatch):
    found = []
    for elements in (2**18, 50):
        monkeypatch.setattr("revdeq_hf.solver_revdeq.BLOCKS", {"cpu": elements})
        block, x = make_block(kind)
        layer = ReversibleFixedPoint(block, beta=0.8, drift_policy="raise", **settings)
        z = layer(x).z
        parts = z if isinstance(z, tuple) else (z,)
        sum(part.square().sum() for part in parts).backward()
        assert layer.drift == 0
        found.append([*parts, *(parameter.grad for parameter in block.parameters())])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_a_solution_has_the_figures_of_its_own_solve():
    """Of calls from several threads at once, not those of whichever ended last."""
    block, x = make_block("attention")
    layer = ReversibleFixedPoint(block, max_steps=2).eval()
    wrong = []

    def call(rows: int, steps: int) -> None:
        with torch.no_grad():
            for _ in range(150):
                solution = layer(x[:rows], max_steps=steps)
                if solution.steps.tolist() != [steps] * rows or solution.evaluations != 2 * steps:
                    wrong.append(solution)

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=call, args=arguments) for arguments in ((1, 2), (2, 3))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(switch)
    assert not wrong


class Later(_Glances):
    """As on an accelerator, where numbers arrive later."""

    def at(self, number, act, wait=False):
        self._waiting.append((number, SimpleNamespace(query=lambda: True), act))


def test_what_arrives_later_is_told_by_the_next_solve_and_does_not_travel():
    for gradient in ("checkpoint", "implicit"):
        layer = ReversibleFixedPoint(Returns(lambda f: f * 1e5), max_steps=2, gradient=gradient)
        layer._certificate._glances = Later()
        layer(torch.ones(2, 4))
        assert layer._certificate._glances._waiting
        assert pickle.dumps(layer._certificate)
        assert not copy.deepcopy(layer)._certificate._glances._waiting
        with pytest.warns(UserWarning, match="were clamped"):
            layer(torch.ones(2, 4))


def test_the_meta_device():
    """Shapes of a solve without its numbers."""
    with torch.device("meta"):
        block, x = make_block("attention")
        layer = ReversibleFixedPoint(block, max_steps=3)
        assert layer(x).z.shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("damping", [0.5, 0.9])
def test_the_residual_is_that_of_the_block_whatever_the_damping(damping, dtype):
    block, x = make_block("attention")
    block, x = block.to(dtype), x.to(dtype)
    layer = ReversibleFixedPoint(block, max_steps=6, damping=damping)
    with torch.no_grad():
        solution = layer(x, output_trajectory=True)
        states = [torch.zeros_like(x), *solution.trajectory[:-1]]
        for z, residual in zip(states, solution.step_residuals, strict=True):
            f = block(z, x)
            away, size = ((part.double().flatten(1)).norm(dim=1) for part in (f - z, f))
            torch.testing.assert_close(residual.double(), away / size, rtol=1e-4 if dtype == torch.float64 else 0.1, atol=0)
    torch.testing.assert_close(solution.step_residuals[0], torch.ones(3), rtol=0, atol=0.02)


@pytest.mark.parametrize("gradient", ["reversible", "checkpoint", "backprop", "none"])
@pytest.mark.parametrize(("kind", "row_dims"), [("attention", 1), ("pair", 1), ("positions", 2)])
def test_rows_stop_by_a_rule_of_ones_own(kind, row_dims, gradient):
    """As `tol` does: the state is that of so many steps, the gradient that of the steps that were taken."""
    block, x = (Injection(), torch.randn(3, 7, 16, requires_grad=True)) if kind == "positions" else make_block(kind)
    rows = (3, 7)[:row_dims]
    halts = torch.arange(1, 1 + math.prod(rows)).reshape(rows) % 4  # after how many steps
    seen = []

    def rule(z, f):
        seen.append((z, f))
        return halts <= len(seen) - 1

    layer = ReversibleFixedPoint(block, max_steps=6, row_dims=row_dims, gradient="reversible" if gradient == "none" else gradient)
    with torch.set_grad_enabled(gradient != "none"):
        solution = layer(x, tol=rule)
    assert torch.equal(solution.steps, halts)
    for z, f in seen:  # all rows, and what they are made of
        for one, other in zip(*((part if isinstance(part, tuple) else (part,)) for part in (f, block(z, x))), strict=True):
            torch.testing.assert_close(one, other)
    part = (lambda state: state[0]) if isinstance(x, tuple) else (lambda state: state)
    for steps in range(4):
        shorter = layer(x, max_steps=steps).z if steps else layer(x, max_steps=1, tol=lambda z, f: torch.ones(rows, dtype=torch.bool)).z
        assert torch.equal(part(solution.z)[halts == steps], part(shorter)[halts == steps])
    if gradient in ("reversible", "checkpoint"):
        exact = torch.autograd.grad(part(solution.z).sum(), x)
        assert layer.drift == 0.0
        seen.clear()
        for one, other in zip(exact, torch.autograd.grad(part(layer(x, tol=rule, gradient="backprop").z).sum(), x), strict=True):
            assert torch.equal(one, other)


def test_a_rule_that_cannot_be_is_refused():
    layer, x = ReversibleFixedPoint(Injection(), max_steps=3), torch.randn(3, 5)
    for answer, got in (
        (True, "True"),
        (torch.ones(3), r"torch.float32 of \(3,\)"),
        (torch.ones(3, 5, dtype=torch.bool), r"torch.bool of \(3, 5\)"),
    ):
        with pytest.raises(ValueError, match=rf"must return a bool tensor of shape \(3,\), True where a row is done, got {got}"):
            layer(x, tol=lambda z, f, answer=answer: answer)
    layer = ReversibleFixedPoint(Injection(), max_steps=3, solver="picard", gradient="implicit")
    with pytest.raises(ValueError, match="a function given as tol needs solver='reversible', got 'picard'"):
        layer(x, tol=lambda z, f: torch.ones(3, dtype=torch.bool))


class Grows(nn.Module):
    """Out of the range in rows of positive x, which do not settle; the others do at once."""

    def forward(self, z, x):
        return torch.where(x > 0, 0.9 * z + 3000 * x, 0 * z + 0.1)


@pytest.mark.parametrize("way", ["rows leave", "all stay", "with gradients", "recorded"])
def test_what_is_clamped_is_counted_for_the_rows_that_still_run(way):
    x = torch.tensor([1.0, -1.0, -1.0, -1.0])[:, None].expand(4, 64).clone().requires_grad_(way == "with gradients")
    layer = ReversibleFixedPoint(Grows(), max_steps=40, tol=1e-3 if way != "all stay" else 0.0, beta=0.5)
    start = torch.full((4, 64), 0.05)
    start[3] = 5000.0  # beyond the limit of states, 2048
    with torch.set_grad_enabled(way == "with gradients"), pytest.warns(UserWarning, match="were clamped in 81 evaluations"):
        solution = layer(x, z0=start, output_trajectory=way == "recorded")
    assert solution.clamped.tolist() == [80, 0, 0, 1]
    assert solution.steps[0] == 40
    assert way == "all stay" or solution.steps[1:].max() < 40


@pytest.mark.parametrize("number", [np.float32(0.1), np.float64(0.1), Fraction(1, 10)])
def test_settings_may_be_numbers_of_other_kinds(number):
    names, x = ("beta", "tol", "damping", "initial_scale", "path_noise"), torch.randn(3, 5, requires_grad=True)
    found = []
    for value in (number, 0.1):
        layer = ReversibleFixedPoint(Injection(), max_steps=50, **dict.fromkeys(names, value))
        torch.manual_seed(0)
        found.append(layer(x).z)
        assert layer.beta == 0.1
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)


class Operations(TorchDispatchMode):
    """Counts the operations that reach a device, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("gradient", ["reversible", "checkpoint", "backprop", "implicit", "phantom"])
def test_the_host_does_not_wait_for_each_step(gradient):
    """It asks as often for a number of a tensor at 4 as at 32 steps; once a step more with `tol` only, whose docstring says so."""
    counts = []
    for steps, tol in ((4, None), (32, None), (4, 0.0), (32, 0.0)):
        block, x = make_block("attention")
        layer = ReversibleFixedPoint(block, max_steps=steps, tol=tol, gradient=gradient, adjoint_tol=0.0, adjoint_max_steps=2)
        with Operations() as operations:
            layer(x).z.sum().backward()
        counts.append(sum(operations.counts[name] for name in ("_local_scalar_dense", "equal", "nonzero")))
    assert counts[0] == counts[1]
    assert counts[3] - counts[2] == 28


@pytest.mark.parametrize(("dtype", "each"), [(torch.float32, 9), (torch.bfloat16, 11)])
def test_a_half_step_without_gradients_is_few_operations(dtype, each):
    """For one token each costs as much as any. The state as floats: 1; the reach of f: 2; clamp, NaN, scale, round, convert and add: 6; for bfloat16 2 more."""
    totals = {}
    x = torch.randn(3, 500, dtype=dtype)  # of narrower states the reach is counted at every half step
    layer = ReversibleFixedPoint(Injection(), beta=0.5)
    for steps in (4, 12):
        with torch.no_grad(), Operations() as operations:
            layer(x, max_steps=steps)
        totals[steps] = operations.counts.total()
    assert (totals[12] - totals[4]) / 16 == each + 1  # and the block's own


class Injection(nn.Module):
    """A block of one operation."""

    def forward(self, z, x):
        return torch.add(x, z, alpha=0.25)
