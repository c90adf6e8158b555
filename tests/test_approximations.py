"""Solvers that are not reversible, and gradients that look at the fixed point only."""

import pytest
import torch
from conftest import make_block, relative_error
from torch import nn

from revdeq_hf import ReversibleFixedPoint

SOLVERS = ["reversible", "picard", "relaxed", "anderson", "broyden"]


class Linear(nn.Module):
    """f(z, x) = A z + x with spectral radius `radius`; the fixed point is (I - A)^-1 x."""

    def __init__(self, size: int = 12, radius: float = 0.5, symmetric: bool = False) -> None:
        super().__init__()
        matrix = torch.randn(size, size, dtype=torch.float64)
        if symmetric:
            matrix = torch.linalg.qr(matrix)[0]
            matrix = matrix @ torch.diag(torch.linspace(-radius / 10, radius, size, dtype=torch.float64)) @ matrix.T
        else:
            matrix = matrix * radius / torch.linalg.matrix_norm(matrix, 2)
        self.matrix = nn.Parameter(matrix)

    def forward(self, z, x):
        return z @ self.matrix.T + x

    def solution(self, x):
        return torch.linalg.solve(torch.eye(len(self.matrix), dtype=x.dtype) - self.matrix, x.T).T


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", ["attention", "convolution", "tuple"])
def test_solvers_find_the_same_fixed_point(solver, kind):
    block, x = make_block(kind)
    for parameter in block.parameters():
        parameter.data.mul_(0.5)
    reference = ReversibleFixedPoint(block, max_steps=100)(x)
    found = ReversibleFixedPoint(block, max_steps=60, tol=1e-5, solver=solver, gradient="implicit")(x)
    assert (found.residual <= 1e-5).all()
    assert (found.steps < 60).all()
    for a, b in zip(*(s.z if isinstance(s.z, tuple) else (s.z,) for s in (found, reference)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_anderson_and_broyden_need_fewer_evaluations_on_a_stiff_problem():
    block = Linear(radius=0.97, symmetric=True)
    x = torch.randn(3, 12, dtype=torch.float64)
    evaluations = {}
    for solver in ("picard", "anderson", "broyden"):
        layer = ReversibleFixedPoint(block, max_steps=2000, tol=1e-8, solver=solver, gradient="implicit", solver_memory=8)
        solution = layer(x)
        torch.testing.assert_close(solution.z, block.solution(x), rtol=0, atol=1e-5)
        evaluations[solver] = solution.evaluations
    assert evaluations["anderson"] < evaluations["picard"] / 5
    assert evaluations["broyden"] < evaluations["picard"] / 5


@pytest.mark.parametrize("solver", SOLVERS)
def test_implicit_gradient_equals_the_closed_form_on_a_linear_problem(solver):
    block = Linear()
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 12, dtype=torch.float64)
    layer = ReversibleFixedPoint(block, max_steps=100, solver=solver, gradient="implicit", adjoint_tol=1e-12, adjoint_max_steps=200)
    got = torch.autograd.grad((layer(x).z * weight).sum(), [x, block.matrix])
    expected = torch.autograd.grad((block.solution(x) * weight).sum(), [x, block.matrix])
    for a, b in zip(got, expected, strict=True):
        assert relative_error(a, b) < 1e-6
    assert layer.adjoint_residual <= 1e-12


def test_implicit_and_phantom_approach_the_exact_gradient():
    block, x = make_block("attention")
    for parameter in block.parameters():
        parameter.data.mul_(0.7)

    def gradient(mode, **settings):
        layer = ReversibleFixedPoint(block, max_steps=40, gradient=mode, **settings)
        solution = layer(x)
        return solution.z, torch.cat([g.flatten() for g in torch.autograd.grad(solution.z.square().sum(), [x, *block.parameters()])])

    z, exact = gradient("reversible")
    errors = []
    for steps in (1, 2, 4, 8, 16):
        other, phantom = gradient("phantom", phantom_steps=steps)
        assert torch.equal(other, z), "all modes run the same forward map"
        errors.append(relative_error(phantom, exact))
    assert all(later < 0.7 * earlier for earlier, later in zip(errors, errors[1:], strict=False))
    errors = []
    for steps in (1, 2, 4, 30):
        other, implicit = gradient("implicit", adjoint_max_steps=steps)
        assert torch.equal(other, z)
        errors.append(relative_error(implicit, exact))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4


@pytest.mark.parametrize("solver", ["picard", "relaxed"])
def test_exact_gradients_of_the_plain_solvers(solver):
    """checkpoint equals backprop, and both equal autograd through the loop written out."""
    block, x = make_block("attention", dropout=0.2)
    results = {}
    for gradient in ("checkpoint", "backprop"):
        layer = ReversibleFixedPoint(block, beta=0.7, max_steps=3, solver=solver, gradient=gradient)
        torch.manual_seed(1)
        loss = layer(x).z.square().sum()
        results[gradient] = torch.autograd.grad(loss, [x, *block.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results.values(), strict=True))
    block.eval()
    z = torch.zeros_like(x)
    for _ in range(6):
        z = block(z, x) if solver == "picard" else 0.3 * z + 0.7 * block(z, x)
    layer = ReversibleFixedPoint(block, beta=0.7, max_steps=3, solver=solver, gradient="backprop")
    torch.testing.assert_close(layer(x).z, z, rtol=1e-5, atol=1e-5)
    got = torch.autograd.grad(layer(x).z.square().sum(), [x, *block.parameters()])
    expected = torch.autograd.grad(z.square().sum(), [x, *block.parameters()])
    assert all(relative_error(a, b) < 1e-4 for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("mode", ["implicit", "phantom"])
@pytest.mark.parametrize("autocast", [False, True])
def test_approximate_modes_give_every_input_a_gradient(mode, autocast):
    block, x = make_block("attention", dropout=0.2)
    context = torch.ones(3, 7, 16, requires_grad=True)
    block.qkv.requires_grad_(False)
    layer = ReversibleFixedPoint(block, max_steps=6, gradient=mode)
    state = torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        z = layer(x, context).z
    after = torch.get_rng_state()
    assert not torch.equal(state, after)
    z.sum().backward()
    assert torch.equal(torch.get_rng_state(), after), "backward disturbed the user's generator"
    assert x.grad.abs().sum() > 0
    assert context.grad.abs().sum() > 0
    assert block.qkv.weight.grad is None
    assert all(p.grad is not None for p in block.parameters() if p.requires_grad)


@pytest.mark.parametrize("solver", ["picard", "relaxed", "anderson", "broyden"])
def test_examples_do_not_touch_one_another(solver):
    """A NaN in one example leaves the others as they are, and each stops by itself."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, z, x):
            return torch.where((x == 7).any(1, keepdim=True), torch.nan, torch.tanh(0.4 * self.linear(z) + x))

    block, x = Block(), torch.randn(4, 6)
    layer = ReversibleFixedPoint(block, max_steps=30, tol=1e-5, solver=solver, gradient="implicit")
    clean = layer(x)
    poisoned = x.clone()
    poisoned[2, 1] = 7
    solution = layer(poisoned)
    others = [0, 1, 3]
    assert solution.z[2].isnan().all()
    assert solution.nonfinite[2] > 0
    assert solution.nonfinite[others].sum() == 0
    torch.testing.assert_close(solution.z[others], clean.z[others], rtol=0, atol=1e-6)
    assert torch.equal(solution.steps[others], clean.steps[others])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(solver="picard"), "cannot go with solver='picard'"),
        (dict(solver="anderson", gradient="backprop"), "use gradient='implicit' or 'phantom'"),
        (dict(solver="broyden", gradient="checkpoint"), "use gradient='implicit' or 'phantom'"),
        (dict(solver_memory=0), "solver_memory"),
        (dict(phantom_steps=-1), "phantom_steps"),
        (dict(adjoint_tol=-1.0), "adjoint_tol"),
        (dict(adjoint_max_steps=0), "adjoint_max_steps"),
    ],
    ids=str,
)
def test_inadmissible_combinations_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ReversibleFixedPoint(nn.Linear(2, 2), **settings)


def test_the_per_call_gradient_must_suit_the_solver():
    layer = ReversibleFixedPoint(Linear(), solver="anderson", gradient="implicit")
    with pytest.raises(ValueError, match="cannot go with"):
        layer(torch.randn(2, 12, dtype=torch.float64), gradient="backprop")


@pytest.mark.parametrize("solver", ["picard", "relaxed", "anderson", "broyden"])
@pytest.mark.parametrize("tol", [None, 1e-2])
def test_positions_that_are_rows_do_not_see_those_after_them(solver, tol):
    """Not through the weights of Anderson's or Broyden's method either, which every row has for itself, nor through a shared stop."""
    block, x = make_block("attention")
    for parameter in block.parameters():
        parameter.data.mul_(0.8)
    layer = ReversibleFixedPoint(block, max_steps=6, tol=tol, row_dims=2, solver=solver, gradient="implicit")
    with torch.no_grad():
        whole = layer(x, output_trajectory=True)
        assert whole.steps.shape == whole.residual.shape == whole.nonfinite.shape == whole.step_residuals.shape[1:] == (3, 7)
        for end in (1, 4):
            part = layer(x[:, :end])
            torch.testing.assert_close(part.z, whole.z[:, :end], rtol=1e-4, atol=1e-5)
            assert torch.equal(part.steps, whole.steps[:, :end])
    reference = ReversibleFixedPoint(block, max_steps=100)(x)
    found = ReversibleFixedPoint(block, max_steps=60, tol=1e-5, row_dims=2, solver=solver, gradient="implicit")(x)
    torch.testing.assert_close(found.z, reference.z, rtol=1e-3, atol=1e-4)
    expected = torch.autograd.grad(reference.z.square().sum(), [x, *block.parameters()])
    got = torch.autograd.grad(found.z.square().sum(), [x, *block.parameters()])
    assert all(relative_error(a, b) < 1e-2 for a, b in zip(got, expected, strict=True))
