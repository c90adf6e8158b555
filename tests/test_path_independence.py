"""Start states that are drawn, noise on the path, restarts, and rows that leave the batch: still one map, still reversed to the last bit."""

import pytest
import torch
from conftest import awake, make_block, relative_error
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from revdeq_hf import (
    FixedPointSolution,
    RevDEQConfig,
    RevDEQForTokenClassification,
    RevDEQVisionConfig,
    RevDEQVisionModel,
    ReversibleFixedPoint,
    diagnose,
)
from revdeq_hf.layer_revdeq import better_of

GRADIENTS = ("reversible", "checkpoint", "backprop")
KINDS = pytest.mark.parametrize("kind", ["attention", "convolution", "tuple"])


def parts(state) -> tuple[torch.Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


def train_once(kind: str, gradient: str, dtype=torch.float32, **settings):
    """z, gradients and the layer after one pass; the random numbers are the same for every gradient mode."""
    block, x = make_block(kind)
    layer = ReversibleFixedPoint(block, gradient=gradient, drift_policy="raise", **settings).train()
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        solution = layer(x)
    sum(part.square().sum() for part in parts(solution.z)).backward()
    gradients = [part.grad for part in parts(x)] + [parameter.grad for parameter in block.parameters()]
    return parts(solution.z), gradients, layer


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "settings",
    [dict(max_steps=5), dict(max_steps=40, beta=0.5), dict(max_steps=30, tol=0.3, beta=1.2), dict(max_steps=20, damping=0.3)],
    ids=str,
)
def test_laws_1_and_2_hold_with_drawn_starts_noise_and_damping(kind, dtype, settings):
    settings = dict(initial_scale=0.7, path_noise=0.05) | settings
    states, expected, _ = train_once(kind, "backprop", dtype, **settings)
    for gradient in ("reversible", "checkpoint"):
        z, found, layer = train_once(kind, gradient, dtype, **settings)
        assert layer.drift == 0
        assert all(torch.equal(a, b) for a, b in zip(z, states, strict=True))
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b) or relative_error(a, b) < 1e-6


class TurnsOver(torch.nn.Module):
    """`f(z, x) = x - tanh(1.5 z)`: eigenvalue -1.5 at its fixed point, and a pair y = f(z), z = f(y) beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(1.5))

    def forward(self, z, x):
        return x - torch.tanh(self.weight * z)


def test_damping_finds_the_fixed_point_where_the_bare_iteration_rests_in_a_pair():
    x = torch.full((1, 1), 0.1, dtype=torch.float64)
    settings = dict(beta=0.5, max_steps=200)
    with torch.no_grad():
        bare, damped = (ReversibleFixedPoint(TurnsOver().double(), **settings, damping=d)(x) for d in (0.0, 0.5))
        f = TurnsOver().double()
        other = f(bare.z, x)
        assert bare.residual > 0.5
        assert torch.allclose(f(other, x), bare.z)  # it rests, in a pair
        assert damped.residual < 1e-6
        assert torch.allclose(f(damped.z, x), damped.z)


def test_a_diagnosis_is_that_of_the_map_iterated():
    x = torch.zeros(1, 1, dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"spectral radius k = 1\.5 .*damping=0\.5"):
        diagnose(ReversibleFixedPoint(TurnsOver().double(), beta=0.5), x)
    assert diagnose(ReversibleFixedPoint(TurnsOver().double(), beta=0.5, damping=0.5), x).spectral_radius.item() == pytest.approx(0.25)


@pytest.mark.parametrize("gradient", ["implicit", "phantom"])
def test_approximate_gradients_of_a_damped_solve_are_the_block_s(gradient):
    gradients = []
    for settings in (dict(damping=0.5), dict(solver="relaxed")):
        layer = ReversibleFixedPoint(TurnsOver().double(), beta=0.4, max_steps=300, gradient=gradient, phantom_steps=60, **settings)
        layer(torch.full((1, 1), 0.1, dtype=torch.float64)).z.sum().backward()
        gradients.append(layer.block.weight.grad)
    assert torch.allclose(*gradients, rtol=1e-4)


def test_noise_is_another_one_at_each_evaluation_of_its_size_and_of_training_only():
    class Constant(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def forward(self, z, x):
            seen.append(z.detach().clone())
            return 0 * z + x + self.weight

    seen: list[torch.Tensor] = []
    layer = ReversibleFixedPoint(Constant(), beta=0.5, max_steps=8, path_noise=0.1, gradient="backprop").train()
    x = torch.zeros(4, 4000)
    noisy = layer(x)
    # y' = y / 2 + (0 + noise) / 2: what was added can be read off the states that the block saw
    added = [2 * (new - old / 2) for old, new in zip(seen[1::2], seen[3::2], strict=False)]
    assert all(abs(noise.std() - 0.1) < 0.005 and abs(noise.mean()) < 0.005 for noise in added)
    assert all(abs((a * b).mean()) < 1e-3 for a, b in zip(added, added[1:], strict=False))
    assert noisy.residual.max() > 0.9  # of the bare block, whose value is 0, while the state is noise
    with torch.no_grad():
        assert layer(x).z.abs().max() == 0
    layer.eval()
    assert layer(x).z.abs().max() == 0


def test_draws_follow_the_seed_and_leave_the_certificate_alone():
    block, x = make_block("attention")
    layer = ReversibleFixedPoint(block, max_steps=3, initial_scale=1.0, path_noise=0.1).train()

    def z(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return layer(x).z.detach()

    assert torch.equal(z(1), z(1))
    assert not torch.equal(z(1), z(2))
    assert layer(x, z0=torch.zeros_like(x)).z.shape == x.shape


@KINDS
def test_evaluation_starts_from_fixed_draws_whatever_the_batch(kind):
    block, x = make_block(kind)
    layer = ReversibleFixedPoint(block, max_steps=2, initial_scale=1.0, num_restarts=3).eval()
    with torch.no_grad():
        whole = layer(x)
        part = layer(tuple(t[1:2] for t in x) if isinstance(x, tuple) else x[1:2])
        again = layer(x)
    for a, b, c in zip(parts(whole.z), parts(part.z), parts(again.z), strict=True):
        assert torch.equal(a, c)
        assert torch.allclose(a[1:2], b, atol=1e-5)
    assert whole.evaluations == 3 * 4


def test_of_several_restarts_each_example_takes_the_one_of_the_smallest_residual():
    block, x = make_block("convolution")
    layer = ReversibleFixedPoint(block, max_steps=2, initial_scale=2.0).eval()
    with torch.no_grad():
        single = [layer(x, z0=layer._start(x, number)) for number in range(4)]
        best = layer(x, num_restarts=4)
    residuals = torch.stack([solution.residual for solution in single])
    chosen = residuals.argmin(0)
    assert len(set(chosen.tolist())) > 1  # else this would say little
    assert torch.equal(best.residual, residuals.min(0).values)
    for row, number in enumerate(chosen.tolist()):
        assert torch.equal(best.z[row], single[number].z[row])
    assert torch.equal(layer.statistics.residual, best.residual)
    assert layer.statistics.evaluations == 16


def test_a_failed_restart_is_not_chosen():
    def solution(residual: list[float]) -> FixedPointSolution:
        count = torch.zeros(len(residual), dtype=torch.int64)
        z = torch.tensor(residual)[:, None]
        return FixedPointSolution(z, count, torch.tensor(residual), 2, (z.shape,), count, count)

    nan = float("nan")
    assert better_of(solution([nan, 1, 0.5, nan]), solution([1, nan, 0.2, nan])).residual.nan_to_num(-1).tolist() == pytest.approx(
        [1, 1, 0.2, -1]
    )


def test_a_restart_that_was_not_finite_at_any_time_is_not_chosen():
    class Bounded(nn.Module):
        """Undefined far from the origin, where some of the starts lie; what is seen of a state that was there once looks converged in the end."""

        def forward(self, z, x):
            return torch.where(z.abs().amax(1, keepdim=True) > 1.6, torch.nan, 0.5 * torch.tanh(z) + x)

    torch.manual_seed(0)
    layer, x = ReversibleFixedPoint(Bounded(), max_steps=8, initial_scale=1.0, num_restarts=8).eval(), 0.1 * torch.randn(3, 4)
    alone = [layer(x, z0=layer._start(x, number)) for number in range(8)]
    assert any(solution.nonfinite.any() and solution.residual.isfinite().all() for solution in alone)
    found = layer(x)
    assert found.z.isfinite().all()
    finite = torch.stack([solution.residual.masked_fill(solution.nonfinite > 0, torch.inf) for solution in alone])
    assert torch.equal(found.residual, finite.amin(0))


def residuals_from_each_start(layer, solve) -> torch.Tensor:
    """(starts, *rows): what a layer of three restarts finds from each of its start states."""
    found = []
    for number in range(3):
        layer.num_restarts, layer._start = 1, lambda x, _, number=number: type(layer)._start(layer, x, number)
        solve()
        found.append(layer.statistics.residual)
    del layer._start
    layer.num_restarts = 3
    return torch.stack(found)


def test_tokens_of_an_example_are_taken_together():
    config = dict(vocab_size=20, hidden_size=16, intermediate_size=16, num_attention_heads=2, is_causal=False, max_steps=2, num_labels=3)
    torch.manual_seed(0)
    model = RevDEQForTokenClassification(RevDEQConfig(**config, initial_scale=1.0, num_restarts=3)).eval()
    ids = torch.arange(10).reshape(2, 5)
    with torch.no_grad():
        best = residuals_from_each_start(model.model.solve, lambda: model(ids)).min(0).values
        assert model(ids).logits.shape == (2, 5, 3)
    assert torch.equal(model.model.solve.statistics.residual, best)


@pytest.mark.parametrize("gradient", [None, "reversible", "backprop"])
def test_padding_does_not_hold_an_example_back(gradient):
    """Nor has it a part in the residual: an example that stops as a whole stops where it would without padding."""
    config = dict(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_attention_heads=2, is_causal=False, max_steps=40, tol=0.03, num_labels=3
    )
    torch.manual_seed(0)
    model = awake(RevDEQForTokenClassification(RevDEQConfig(**config)), std=0.3).eval()
    ids = torch.randint(20, (3, 8))
    padded = torch.cat((ids, torch.zeros(3, 9, dtype=torch.long)), 1)
    mask = (torch.arange(17) < 8).long().expand(3, -1)
    with torch.set_grad_enabled(gradient is not None):
        model.model.solve.gradient = gradient or "reversible"
        alone = model(ids, output_solver_stats=True)
        together = model(padded, attention_mask=mask, output_solver_stats=True)
    assert torch.equal(alone.solver_steps, together.solver_steps)
    assert alone.solver_steps.max() < 40
    torch.testing.assert_close(together.logits[:, :8], alone.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.solver_residual, alone.solver_residual, rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        counted = model.model.solve(torch.randn(2, 5, 16), measure_mask=torch.ones(2, 5, dtype=torch.bool), max_steps=2)
        assert counted.residual.shape == (2,)
        with pytest.raises(ValueError, match=r"measure_mask must be \(batch, positions\) = \(2, 5\)"):
            model.model.solve(torch.randn(2, 5, 16), measure_mask=torch.ones(2, 4, dtype=torch.bool))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "settings",
    [
        dict(initial_scale=1.0, max_steps=4),
        dict(initial_scale=1.0, num_restarts=3, max_steps=2),
        dict(initial_scale=1.0, num_restarts=3, max_steps=30, tol=0.01),
        *(dict(solver=solver, gradient="implicit", max_steps=4) for solver in ("anderson", "broyden")),
        *(dict(solver=solver, gradient="implicit", max_steps=20, tol=0.03) for solver in ("anderson", "broyden", "picard", "relaxed")),
    ],
    ids=str,
)
def test_law_6_padding_changes_no_answer_where_a_sentence_is_one_solve(settings, side):
    """Neither through drawn starts, nor through the weights of solvers that remember, nor through where they stop."""
    config = dict(vocab_size=20, hidden_size=20, intermediate_size=16, num_attention_heads=2, is_causal=False, num_labels=3, **settings)
    model = awake(RevDEQForTokenClassification(RevDEQConfig(**config)), std=0.3).eval()
    ids, more = torch.randint(20, (3, 8)), torch.zeros(3, 9, dtype=torch.long)
    parts = [(ids, torch.ones_like(ids)), (more, more)]
    padded, mask = (torch.cat(part, 1) for part in zip(*(parts if side == "right" else reversed(parts)), strict=True))
    labels = torch.randint(3, (3, 8))
    gradients = []
    for arguments, kept, wanted in (
        (dict(input_ids=ids), slice(None), labels),
        (dict(input_ids=padded, attention_mask=mask), mask.bool(), torch.full_like(padded, -100).masked_scatter(mask.bool(), labels)),
    ):
        model.zero_grad()
        outputs = model(**arguments, labels=wanted, output_solver_stats=True)
        outputs.loss.backward()
        gradients.append(
            (outputs.logits[kept].reshape(3, 8, 3), outputs.solver_steps, [p.grad for p in model.parameters() if p.grad is not None])
        )
    (alone, steps, own), (together, same_steps, others) = gradients
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert torch.equal(steps, same_steps)
    for one, other in zip(own, others, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("solver", ["reversible", "picard", "relaxed", "anderson", "broyden"])
def test_a_measure_mask_is_a_measure(solver):
    """Places that do not count are solved for like the others, which may look at them, and what is not finite there is told."""

    class Neighbours(torch.nn.Module):
        def forward(self, z, x):
            return 0.4 * torch.tanh(z.roll(1, 1)) + x

    x, mask = torch.randn(2, 5, 3), torch.ones(2, 5, dtype=torch.bool)
    mask[:, 3:] = False
    layer = ReversibleFixedPoint(Neighbours(), max_steps=40, solver=solver, gradient="implicit")
    with torch.no_grad():
        torch.testing.assert_close(layer(x, measure_mask=mask).z, layer(x).z, rtol=1e-4, atol=1e-5)
        x[0, 4, 0] = torch.nan
        broken = layer(x, measure_mask=mask)
    assert broken.nonfinite[0] > 0
    assert broken.z[0].isnan().all()
    assert broken.z[1].isfinite().all()


def test_each_example_stops_by_itself_whatever_else_x_holds():
    """What all examples share may be as large as the batch, and is not taken apart with it."""

    class Shared(torch.nn.Module):
        def forward(self, z, x):
            return x["gain"] * torch.tanh(z + x["position"]) + x["inputs"]

    inputs, position = torch.randn(4, 4, 8), torch.randn(4, 8)
    gain = torch.tensor([0.1, 0.3, 0.6, 0.9]).view(4, 1, 1)
    layer = ReversibleFixedPoint(Shared(), max_steps=200, tol=1e-5)
    x = {"inputs": inputs, "gain": gain, "position": position}
    with torch.no_grad():
        solution = layer(x, z0=torch.zeros(4, 4, 8))
        assert solution.steps.unique().numel() > 1
        f = layer.block(solution.z, x)
    assert ((f - solution.z).flatten(1).norm(dim=1) / f.flatten(1).norm(dim=1)).max() < 1e-4


def test_positions_that_are_rows_are_taken_together():
    """The mean of an example's positions decides."""
    torch.manual_seed(0)
    block, x = make_block("attention")
    layer = ReversibleFixedPoint(block, row_dims=2, max_steps=2, initial_scale=1.0, num_restarts=3).eval()
    with torch.no_grad():
        starts = residuals_from_each_start(layer, lambda: layer(x))
        layer(x)
    best = starts.mean(2).argmin(0)
    assert torch.equal(layer.statistics.residual, starts[best, torch.arange(len(x))])


class Slow(torch.nn.Module):
    """Rows contract at rates that they bring along in x, so that they finish at different steps; counts the rows it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.batches: list[int] = []

    def forward(self, z, x):
        self.batches.append(len(z))
        return torch.tanh(self.weight * x[..., :1] * z + x)


@pytest.mark.parametrize("beta", [0.5, 0.8, 1.2])
def test_finished_rows_leave_the_batch_and_nothing_changes(beta):
    x = torch.rand(16, 6, generator=torch.Generator().manual_seed(0))
    x[:, 0] = torch.linspace(0.05, 0.97, 16)[torch.randperm(16, generator=torch.Generator().manual_seed(1))]
    layer = ReversibleFixedPoint(Slow(), beta=beta, max_steps=200, tol=1e-5).eval()
    with torch.no_grad():
        found = layer(x)
    rows = layer.block.batches
    assert rows == sorted(rows, reverse=True)
    assert rows[-1] < 8 < rows[0] == 16
    layer.block.batches = []
    expected = layer(x, gradient="backprop")  # keeps all rows
    assert set(layer.block.batches) == {16}
    for name in ("z", "steps", "residual", "clamped", "nonfinite"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert found.evaluations == expected.evaluations
    assert len(set(found.steps.tolist())) > 2
    assert found.shapes == expected.shapes


def test_finished_rows_stay_where_the_block_is_given_more_than_x():
    class Shifted(Slow):
        def forward(self, z, x, shift):
            return super().forward(z, x + shift)

    x = torch.rand(8, 4) * torch.linspace(0.1, 1, 8)[:, None]
    layer = ReversibleFixedPoint(Shifted(), max_steps=100, tol=1e-5).eval()
    with torch.no_grad():
        layer(x, torch.zeros(4))
    assert set(layer.block.batches) == {8}


def test_a_row_that_was_not_finite_comes_back_as_nan_also_from_a_smaller_batch():
    x = torch.rand(8, 4) * torch.linspace(0.1, 1, 8)[:, None]
    x[7, 2] = float("nan")
    layer = ReversibleFixedPoint(Slow(), max_steps=60, tol=1e-5).eval()
    with torch.no_grad():
        solution = layer(x)
    assert layer.block.batches[-1] < 8
    assert solution.z[7].isnan().all()
    assert solution.z[:7].isfinite().all()
    assert solution.nonfinite.tolist()[:7] == [0] * 7


def test_an_implicit_gradient_after_rows_have_left():
    x = (torch.rand(8, 4) * torch.linspace(0.1, 0.9, 8)[:, None]).requires_grad_()
    gradients = []
    for gradient in ("implicit", "backprop"):
        layer = ReversibleFixedPoint(Slow(), max_steps=200, tol=1e-7, gradient=gradient)
        layer(x).z.sum().backward()
        gradients.append(x.grad)
        x.grad = None
    assert relative_error(*gradients) < 1e-4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(num_restarts=2), "num_restarts=2 from a start state of zero would find the same 2 times; set initial_scale > 0"),
        (dict(num_restarts=0, initial_scale=1.0), "num_restarts must be a whole number >= 1, got 0"),
        (dict(initial_scale=-1.0), "initial_scale must be a finite number >= 0, got -1.0"),
        (dict(path_noise=float("inf")), "path_noise must be a finite number >= 0, got inf"),
        (dict(damping=1.0), r"damping must lie in \[0, 1\), got 1.0"),
        (dict(damping=0.5, solver="picard", gradient="implicit"), "damping=0.5 needs solver='reversible', got 'picard'"),
        (dict(path_noise=0.1, solver="picard", gradient="implicit"), "path_noise=0.1 needs solver='reversible', got 'picard'"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    block, _ = make_block("attention")
    with pytest.raises(ValueError, match=message):
        ReversibleFixedPoint(block, **settings)
    with pytest.raises(StrictDataclassError, match=message):
        RevDEQVisionConfig(**settings)
    with pytest.raises(StrictDataclassError, match=message):
        RevDEQConfig(is_causal=False, **settings)


def test_calls_that_do_not_fit_are_refused():
    block, x = make_block("attention")
    with pytest.raises(ValueError, match="set initial_scale > 0"):
        ReversibleFixedPoint(block)(x, num_restarts=2)
    layer = ReversibleFixedPoint(block, initial_scale=1.0).eval()
    with pytest.raises(ValueError, match=r"output_trajectory follows one solve, got num_restarts=2; set num_restarts=1"):
        layer(x, num_restarts=2, output_trajectory=True)
    with pytest.raises(TypeError, match="x must be a tensor or a tuple of tensors, got list"):
        layer([x])
    with pytest.raises(StrictDataclassError, match=r"initial_scale=1\.0 needs is_causal=False"):
        RevDEQConfig(initial_scale=1.0)


def test_the_image_model_has_the_settings():
    config = RevDEQVisionConfig(
        hidden_sizes=[16], expansion_ratios=[1], damping=0.2, initial_scale=0.5, path_noise=0.1, num_restarts=2, tol=1e-9, max_steps=3
    )
    model = RevDEQVisionModel(config).eval()
    stage = model.stages[0]
    assert (stage.damping, stage.initial_scale, stage.path_noise, stage.num_restarts) == (0.2, 0.5, 0.1, 2)
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        model(images)
        assert stage.statistics.evaluations == 12
        model(images, num_restarts=1)
        assert stage.statistics.evaluations == 6
