"""What surrounds a solve and must neither be lost nor pass unnoticed: hooks of parameters, closures, changes in place, settings set later."""

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, StaticCache

import revdeq_hf
from revdeq_hf import RevDEQConfig, ReversibleFixedPoint, diagnose

MODES = ["reversible", "checkpoint", "backprop", "implicit", "phantom"]
RECOMPUTING = ["reversible", "checkpoint", "implicit"]


class Block(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(width, width)

    def forward(self, z, x):
        return torch.tanh(0.5 * self.linear(z) + x)


def start() -> torch.Tensor:
    return torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("gradient", MODES)
def test_a_parameters_hook_sees_the_whole_gradient_once(gradient):
    layer = ReversibleFixedPoint(Block(), max_steps=5, gradient=gradient)
    weight, seen = layer.block.linear.weight, []
    layer(start()).z.sum().backward()
    plain, weight.grad = weight.grad, None
    handle = weight.register_hook(lambda gradient: (seen.append(gradient.clone()), gradient + 1)[1])
    layer(start()).z.sum().backward()
    assert len(seen) == 1
    assert torch.equal(seen[0], plain)
    assert torch.equal(weight.grad, plain + 1)
    handle.remove()
    weight.grad = None
    layer(start()).z.sum().backward()
    assert torch.equal(weight.grad, plain)


@pytest.mark.parametrize("gradient", MODES)
def test_hooks_on_several_gradients_fire_once(gradient):
    layer = ReversibleFixedPoint(Block(), max_steps=5, gradient=gradient)
    seen = []
    handle = torch.autograd.graph.register_multi_grad_hook(list(layer.parameters()), seen.append)
    layer(start()).z.sum().backward()
    handle.remove()
    assert len(seen) == 1
    assert all(torch.equal(a, p.grad) for a, p in zip(seen[0], layer.parameters(), strict=True))


class Prompted(Block):
    """A frozen block, and a tensor that it reaches as an attribute in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.hidden = [torch.zeros(6, requires_grad=True)]

    def forward(self, z, x):
        return super().forward(z, x + self.hidden[0])


@pytest.mark.parametrize("gradient", MODES)
def test_a_closure_of_a_frozen_block_gets_its_gradient_or_an_error(gradient):
    block = Prompted()
    layer = ReversibleFixedPoint(block, max_steps=6, gradient=gradient)
    if gradient in ("reversible", "implicit"):
        with pytest.raises(RuntimeError, match="neither one of its parameters nor one of its arguments"):
            layer(start())
        with torch.no_grad():
            assert layer(start()).z.isfinite().all()
        return
    layer(start()).z.sum().backward()
    context = ReversibleFixedPoint(Block().requires_grad_(False), max_steps=6, gradient=gradient)
    prompt = torch.zeros(6, requires_grad=True)
    context(start() + prompt).z.sum().backward()
    torch.testing.assert_close(block.hidden[0].grad, prompt.grad)


def test_a_frozen_block_keeps_no_graph():
    layer = ReversibleFixedPoint(Block().requires_grad_(False), max_steps=4)
    assert not layer(start()).z.requires_grad
    assert torch.equal(layer(start()).z, ReversibleFixedPoint(Block(), max_steps=4)(start()).z)


@pytest.mark.parametrize("keep_evaluations", [0, 1])
@pytest.mark.parametrize("changed", ["x", "weight", "bias", "frozen"])
@pytest.mark.parametrize("gradient", RECOMPUTING)
def test_what_is_changed_in_place_between_the_passes_is_told(gradient, changed, keep_evaluations):
    block = Block()
    block.linear.weight.requires_grad_(changed != "frozen")
    layer = ReversibleFixedPoint(block, max_steps=4, gradient=gradient, keep_evaluations=keep_evaluations, drift_policy="raise")
    x = start().requires_grad_() * 1.0
    z = layer(x).z
    with torch.no_grad():
        {"x": x, "bias": block.linear.bias}.get(changed, block.linear.weight).mul_(2)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|did not reconstruct its start state"):
        z.sum().backward()


@pytest.mark.parametrize("gradient", MODES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_the_layer_changes_nothing(gradient, reentrant):
    layer, x = ReversibleFixedPoint(Block(), max_steps=5, gradient=gradient), start().requires_grad_()
    expected = torch.autograd.grad(layer(x).z.square().sum(), [x, *layer.parameters()])
    checkpoint(lambda part: layer(part).z, x, use_reentrant=reentrant).square().sum().backward()
    for one, parameter in zip(expected, (x, *layer.parameters()), strict=True):
        torch.testing.assert_close(parameter.grad, one)


@pytest.mark.parametrize("gradient", ["reversible", "checkpoint", "backprop"])
def test_a_row_that_was_not_finite_is_nan_in_the_trajectory_too(gradient):
    class Logarithm(Block):
        def forward(self, z, x):
            return super().forward(z, torch.log(x))

    x = start().abs()
    x[1] = -1.0
    solution = ReversibleFixedPoint(Logarithm(), max_steps=3, gradient=gradient)(x, output_trajectory=True)
    assert all(state[1].isnan().all() and state[[0, 2]].isfinite().all() for state in solution.trajectory)


@pytest.mark.parametrize("solver", ["picard", "relaxed", "anderson", "broyden"])
def test_a_solver_and_its_settings_may_be_set_later(solver):
    settings = dict(solver=solver, beta=0.3, max_steps=2, solver_memory=2, adjoint_max_steps=3, adjoint_tol=1e-3, phantom_steps=2)
    for gradient in ("implicit", "phantom"):
        made = ReversibleFixedPoint(Block(), gradient=gradient, **settings)
        later = ReversibleFixedPoint(Block(), gradient=gradient)
        for name, value in settings.items():
            setattr(later, name, value)
        for layer in (made, later):
            layer(start()).z.sum().backward()
        assert torch.equal(made(start()).z, later(start()).z)
        assert torch.equal(made.block.linear.weight.grad, later.block.linear.weight.grad)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("gradient", "bptt", "gradient must be one of"),
        ("solver", "anderson", "cannot go with"),
        ("max_steps", 0, "max_steps"),
        ("damping", 1.5, "damping must lie in"),
        ("tol", -1.0, "tol must be None"),
        ("num_restarts", 2, "set initial_scale > 0"),
        ("row_dims", 3, "row_dims must be 1"),
        ("phantom_steps", 0, "phantom_steps must be a whole number"),
        ("adjoint_tol", -1.0, "adjoint_tol must be a finite number"),
        ("steps_sampling", {"distribution": "normal"}, "steps_sampling must be"),
    ],
)
def test_a_setting_that_is_wrong_later_is_refused_by_the_next_solve(name, value, message):
    layer = ReversibleFixedPoint(Block())
    setattr(layer, name, value)
    with pytest.raises(ValueError, match=message):
        layer(start())


def test_beta_and_the_policy_are_checked_where_they_are_set():
    layer = ReversibleFixedPoint(Block())
    with pytest.raises(ValueError, match="beta must lie in"):
        layer.beta = 3.0
    with pytest.warns(UserWarning, match="not a fraction"):
        layer.beta = 0.1234567
    assert layer.beta == 10 / 81
    with pytest.raises(ValueError, match="drift_policy must be one of"):
        layer.drift_policy = "panic"
    layer.drift_policy = "raise"
    assert layer.drift_policy == copy.deepcopy(layer).drift_policy == "raise"


@pytest.mark.parametrize("gradient", MODES)
def test_forward_mode_derivatives_are_refused_where_they_would_be_lost(gradient):
    layer = ReversibleFixedPoint(Block().requires_grad_(False), max_steps=3, gradient=gradient)
    with forward_ad.dual_level():
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            layer(forward_ad.make_dual(start(), torch.ones(3, 6)))
        assert layer(start()).z.isfinite().all()


def test_a_lazy_block_is_told_to_see_an_input_first():
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.LazyLinear(6)

        def forward(self, z, x):
            return torch.tanh(0.5 * self.linear(z) + x)

    layer = ReversibleFixedPoint(Lazy(), max_steps=2)
    with pytest.raises(RuntimeError, match=r"layer\.block"):
        layer(start())
    with torch.no_grad():
        layer.block(start(), start())
    layer(start()).z.sum().backward()
    assert layer.drift == 0


def test_a_layer_made_on_the_meta_device_has_a_drift():
    with torch.device("meta"):
        layer = ReversibleFixedPoint(Block(), gradient="checkpoint")
    assert float(layer.to_empty(device="cpu").drift) == 0.0


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal])
def test_hooks_reach_what_parametrised_weights_are_made_of(wrap):
    found = {}
    for gradient in ("reversible", "backprop"):
        block = Block()
        wrap(block.linear)
        layer, seen = ReversibleFixedPoint(block, max_steps=5, gradient=gradient), []
        for parameter in block.parameters():
            parameter.register_hook(seen.append)
        layer(start()).z.square().sum().backward()
        assert len(seen) == len(list(block.parameters()))
        found[gradient] = [parameter.grad for parameter in block.parameters()]
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("gradient", MODES)
def test_a_solution_may_be_changed_in_place(gradient):
    found = []
    for inplace in (False, True):
        layer, x = ReversibleFixedPoint(Block(), max_steps=5, gradient=gradient), start().requires_grad_()
        nn.functional.relu(layer(x).z, inplace=inplace).square().sum().backward()
        found.append([x.grad, layer.block.linear.weight.grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert found[0][0].abs().sum() > 0


class Graph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 6)

    def forward(self, z, x, neighbours):
        return torch.tanh(torch.sparse.mm(neighbours, self.linear(z)) + x)


@pytest.mark.parametrize("gradient", RECOMPUTING)
def test_a_sparse_context_gets_its_gradient(gradient):
    found = []
    for mode in ("backprop", gradient):
        weights = torch.tensor([0.3, 0.2, 0.4], requires_grad=True)
        neighbours = torch.sparse_coo_tensor([[0, 1, 2], [1, 2, 0]], weights, (3, 3))
        layer = ReversibleFixedPoint(Graph(), max_steps=40, gradient=mode)
        layer(start(), neighbours).z.square().sum().backward()
        found.append([weights.grad, layer.block.linear.weight.grad])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4 if gradient == "implicit" else 0, atol=1e-5 if gradient == "implicit" else 0)


def test_operations_can_be_counted_in_a_backward_pass_that_recomputes():
    counted = {}
    for gradient in ("checkpoint", "reversible"):
        layer, x = ReversibleFixedPoint(Block(), max_steps=5, gradient=gradient), start().requires_grad_()
        with FlopCounterMode(display=False) as counter:
            layer(x).z.sum().backward()
        assert layer.drift == 0
        counted[gradient] = counter.get_total_flops()
    for_a_start_of_zero = 2 * 3 * 6 * 6  # one product, which stored graphs leave out
    assert counted["reversible"] == counted["checkpoint"] + for_a_start_of_zero


def test_fixed_point_layers_are_found_by_a_public_name():
    model = nn.Sequential(nn.Linear(6, 6), ReversibleFixedPoint(Block()))
    assert revdeq_hf.fixed_point_layers(model) == [("1", model[1])]


def test_arguments_that_never_reach_the_block_are_told():
    class Named(nn.Module):
        def forward(self, z, x, tol=0.1, *, max_steps=3, gain=1.0):
            return torch.tanh(0.1 * z + gain * x)

    with pytest.warns(UserWarning, match=r"Named.forward has max_steps, tol among its arguments"):
        ReversibleFixedPoint(Named())

    class Positional(nn.Module):
        def forward(self, z, x, gradient):
            return torch.tanh(0.1 * z + x + gradient)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ReversibleFixedPoint(Block())
        assert ReversibleFixedPoint(Positional())(start(), start()).z.shape == (3, 6)


def test_what_is_asked_of_a_solution_and_of_a_layer_is_answered():
    layer = ReversibleFixedPoint(Block(), max_steps=2, damping=0.5)
    solution = layer(start())
    with pytest.raises(AttributeError, match="no attribute 'mean'; the fixed point itself is its `z`"):
        solution.mean()
    assert copy.copy(solution).steps.tolist() == [2, 2, 2]
    assert "damping=0.5" in repr(layer)
    assert "restarts" not in repr(layer)
    assert "steps=2," in repr(diagnose(layer, start()))
    for x in ({"inputs": start()}, torch.zeros(3, 6, dtype=torch.long)):
        with pytest.raises((TypeError, ValueError), match="with z0= the state has that of z0, and x may be anything"):
            layer(x)


class Keeps(Block):
    """Makes something of x, or of its weight, once and keeps it."""

    def __init__(self, of: str) -> None:
        super().__init__()
        self.of, self.kept = of, None

    def forward(self, z, x):
        if self.kept is None:
            self.kept = x.roll(1, 1) if self.of == "x" else self.linear.bias * 2
        return super().forward(z, x + self.kept)


@pytest.mark.parametrize("of", ["x", "weights"])
@pytest.mark.parametrize(("keep_evaluations", "tol"), [(1, None), (3, None), (0, None), (1, 1e-9)])
def test_what_an_earlier_evaluation_made_is_refused(of, keep_evaluations, tol):
    """Its gradient would be that of a part of the evaluations, at a drift of 0: of x the stem below it had none."""
    torch.manual_seed(0)
    block, x = Keeps(of), start().requires_grad_()
    layer = ReversibleFixedPoint(block, max_steps=3, keep_evaluations=keep_evaluations, tol=tol)
    solution = layer(x)
    with pytest.raises(RuntimeError, match=r"computed outside of the evaluation|made of one of them by another evaluation, and kept"):
        solution.z.sum().backward()
    block.kept = None
    assert torch.autograd.grad(layer(x, gradient="backprop").z.sum(), x)[0].isfinite().all()


def test_what_was_computed_before_the_solve_is_context():
    torch.manual_seed(0)
    block, x = Keeps("weights"), start()
    block.kept = block.linear.weight.norm() * torch.ones(6)
    layer = ReversibleFixedPoint(block, max_steps=40)
    with pytest.raises(RuntimeError, match=r"computed outside of the evaluation \(MulBackward0\).*context argument"):
        layer(x).z.sum().backward()
    found = []
    for gradient in ("implicit", "backprop"):  # of one evaluation, or of all
        block.kept = block.linear.weight.norm() * torch.ones(6)
        found.append(torch.autograd.grad(layer(x, gradient=gradient).z.sum(), block.linear.weight)[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


class Threaded(Block):
    """Half of its graph is made in another thread, and an energy's gradient is part of it: where what is computed by an accelerator is differentiated, too."""

    def forward(self, z, x):
        def branch() -> torch.Tensor:
            with torch.enable_grad():
                energy = torch.tanh(self.linear(z) + x).square().sum()
                return torch.autograd.grad(energy, z if z.requires_grad else self.linear.bias, create_graph=True)[0]

        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(branch).result()
        return super().forward(z, x) + 0.1 * other


def test_a_graph_that_another_thread_made_is_the_evaluation_s_own():
    found = []
    for gradient in ("reversible", "backprop"):
        block, x = Threaded(), start().requires_grad_()
        layer = ReversibleFixedPoint(block, max_steps=4, gradient=gradient)
        found.append(torch.autograd.grad(layer(x, z0=torch.zeros(3, 6, requires_grad=True)).z.sum(), [x, *block.parameters()]))
        assert layer.drift == 0.0
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


class Stores(Block):
    """As a mixture of experts does with the loss of its router."""

    def forward(self, z, x):
        self.stored = (self.linear.weight @ x.T).square().mean() + z.square().mean()
        self.of_state = (self.linear.weight @ z.T).square().mean()
        return super().forward(z, x)


@pytest.mark.parametrize(("keep_evaluations", "tol"), [(1, None), (0, None), (1, 1e-6)])
@pytest.mark.parametrize("first", ["state", "stored"])
def test_what_a_block_stores_is_not_differentiated_in_part(keep_evaluations, tol, first):
    torch.manual_seed(0)
    block, x = Stores(), start().requires_grad_()
    layer = ReversibleFixedPoint(block, max_steps=8, keep_evaluations=keep_evaluations, tol=tol)
    solution = layer(x)
    losses = [solution.z.sum(), block.stored]
    with pytest.raises(RuntimeError, match=r"the block stored in one of its evaluations|backward through the graph a second time"):
        sum(losses if first == "state" else reversed(losses)).backward()
    if keep_evaluations == 0 or tol:  # nothing else would have told
        solution = layer(x)
        for stored in (block.stored, block.of_state):
            with pytest.raises(RuntimeError, match="the block stored in one of its evaluations"):
                stored.backward(retain_graph=True)


def test_a_stored_loss_of_one_more_call_is_exact():
    torch.manual_seed(0)
    block, x = Stores(), start().requires_grad_()
    found = []
    for gradient in ("reversible", "backprop"):
        solution = ReversibleFixedPoint(block, max_steps=8, gradient=gradient)(x)
        block(solution.z, x)
        found.append(torch.autograd.grad(solution.z.sum() + block.stored, [x, *block.parameters()]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("gradient", ["reversible", "checkpoint", "backprop"])
def test_a_start_that_is_the_solution_already_passes_its_gradient_on(gradient):
    """With tol met by all examples at once, the solution is the start."""
    torch.manual_seed(0)
    layer = ReversibleFixedPoint(Block(), max_steps=50, tol=1e-3, gradient=gradient)
    x = start().requires_grad_()
    settled = layer(x, tol=1e-6).z.detach().requires_grad_()
    solution = layer(x, z0=settled)
    assert solution.steps.tolist() == [0, 0, 0]
    of_start, of_x = torch.autograd.grad(solution.z.sum(), [settled, x], materialize_grads=True, allow_unused=True)
    assert torch.equal(of_start, torch.ones(3, 6))
    assert not of_x.any()


def test_a_cache_without_slots_for_evaluations_is_refused():
    """Every evaluation would write to it: 40 entries after a prompt of 5 tokens."""

    class Attends(Block):
        def forward(self, z, x, past_key_values):
            keys = (z + x)[:, None]
            keys, _ = past_key_values.update(keys, keys, 0)
            return super().forward(z, x) + keys.mean((1, 2))[:, None]

    class Ignores(Block):
        def forward(self, z, x, past_key_values):
            return super().forward(z, x)

    layer, x = ReversibleFixedPoint(Attends(), max_steps=2), torch.randn(1, 5, 6)
    for cache in (DynamicCache(), StaticCache(RevDEQConfig(), max_cache_len=4), SimpleNamespace(layers="abc", get_seq_length=None)):
        ReversibleFixedPoint(Ignores(), max_steps=2)(x, past_key_values=cache)
    with torch.no_grad(), pytest.raises(ValueError, match=r"wrote to a DynamicCache.*EvaluationSlots\(cache, 0, layers\)"):
        layer(x, past_key_values=DynamicCache())
