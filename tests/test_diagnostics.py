"""What `diagnose` reports is true: spectral radius, rates, warnings; and it leaves no trace."""

import math
import warnings

import pytest
import torch
from conftest import awake, make_block
from torch import nn

from revdeq_hf import RevDEQConfig, RevDEQForCausalLM, ReversibleFixedPoint, diagnose, logit_lens


class Affine(nn.Module):
    """f(z, x) = A z + x."""

    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix)

    def forward(self, z, x):
        return z @ self.matrix.T + x


def rotation(radius: float, angle: float) -> torch.Tensor:
    return radius * torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("matrix", "radius"),
    [
        (torch.diag(torch.tensor([0.7, 0.3, -0.2], dtype=torch.float64)), 0.7),
        (torch.diag(torch.tensor([0.3, -0.9], dtype=torch.float64)), 0.9),
        (rotation(0.6, 1.1), 0.6),
        (rotation(0.95, 2.9), 0.95),
        (torch.tensor([[0.5, 40.0], [0.0, 0.4]], dtype=torch.float64), 0.5),  # far from normal: its norm is 40
        (torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64), 0.0),
    ],
    ids=["diagonal", "negative", "rotation", "almost -1", "not normal", "nilpotent"],
)
def test_the_spectral_radius_is_right(matrix, radius):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = diagnose(ReversibleFixedPoint(Affine(matrix), beta=0.5, max_steps=10), torch.randn(3, len(matrix), dtype=torch.float64))
    torch.testing.assert_close(found.spectral_radius, torch.full((3,), radius), rtol=0.05, atol=1e-3)
    assert found.drift == 0
    assert found.beta_limit == pytest.approx(2 / (1 + radius), rel=0.05)
    assert found.rate == pytest.approx(0.5 + 0.5 * radius, rel=0.05)


@pytest.mark.filterwarnings("ignore:values of the block beyond")
def test_a_beta_outside_the_theorem_is_told_and_does_diverge():
    """A quarter turn is the map for which the bound is sharp: with real eigenvalues below 1 every beta below 2 converges."""
    block, x = Affine(rotation(0.9, math.pi / 2)), torch.randn(2, 2, dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"need not converge.*take beta below 1\.05"):
        outside = diagnose(ReversibleFixedPoint(block, beta=1.1, max_steps=60), x)
    assert (outside.residuals[-1] > outside.residuals[5]).all(), "it converges all the same"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inside = diagnose(ReversibleFixedPoint(block, beta=1.01, max_steps=60), x)
    assert (inside.residuals[-1] < inside.residuals[5]).all()


@pytest.mark.filterwarnings("ignore:values of the block beyond")
def test_a_block_that_is_not_contractive_is_told():
    block = Affine(1.4 * torch.eye(2, dtype=torch.float64))
    with pytest.warns(UserWarning, match=r"spectral radius k = 1\.4.*bound the block"):
        found = diagnose(ReversibleFixedPoint(block, beta=0.5, max_steps=40), torch.randn(2, 2, dtype=torch.float64))
    assert found.clamped > 0, "it converges all the same"


def test_the_residuals_fall_at_the_predicted_rate():
    found = diagnose(
        ReversibleFixedPoint(Affine(0.8 * torch.eye(3, dtype=torch.float64)), beta=0.5, max_steps=30), torch.ones(1, 3).double()
    )
    measured = (found.residuals[-1] / found.residuals[-2]).item()
    assert measured <= found.rate + 1e-6
    assert found.rate == pytest.approx(0.9)
    assert measured > 0.6


def test_a_model_is_diagnosed_layer_by_layer_and_left_as_it_was(tmp_path):
    torch.manual_seed(0)
    config = RevDEQConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_attention_heads=2, hidden_dropout=0.2, tol=1e-3, max_steps=12
    )
    model = awake(RevDEQForCausalLM(config))
    ids = torch.randint(0, 50, (3, 7))
    state = torch.get_rng_state()
    found = diagnose(model, ids, labels=ids)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert list(found) == ["model.solve"]
    report = found["model.solve"]
    assert report.spectral_radius.shape == (3,)
    assert report.residuals.shape[1:] == (3, 7)
    assert report.steps.shape == (3, 7)
    assert report.drift == 0
    assert 0 < report.spectral_radius.max() < 1
    assert "spectral_radius max" in repr(report)
    with pytest.raises(ValueError, match="top_k must lie in 1 to 50, the size of the vocabulary, got 51"):
        logit_lens(model, ids, top_k=51)
    with pytest.raises(ValueError, match="looks at the solve of a RevDEQForCausalLM, got RevDEQModel"):
        logit_lens(model.model, ids)
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    report.plot(tmp_path / "diagnosis.png")
    assert (tmp_path / "diagnosis.png").stat().st_size > 5000


def test_tuple_states_context_and_other_modes():
    block, x = make_block("tuple")
    found = diagnose(ReversibleFixedPoint(block, max_steps=5, gradient="implicit", solver="anderson"), x)
    assert found.drift is None
    assert found.spectral_radius.shape == (3,)
    jacobian = torch.autograd.functional.jacobian  # the whole Jacobian of one example, for its eigenvalues
    z = ReversibleFixedPoint(block, max_steps=60)(x).z
    flat = lambda a, b: torch.cat(block((a, b), tuple(part[0].detach() for part in x)))  # noqa: E731
    both = torch.cat(jacobian(flat, tuple(part[0].detach() for part in z)), dim=1)
    exact = torch.linalg.eigvals(both).abs().max()
    found = diagnose(ReversibleFixedPoint(block, max_steps=60), x)
    torch.testing.assert_close(found.spectral_radius[0], exact, rtol=0.05, atol=1e-3)


def test_the_radius_is_that_of_the_solves_own_dropout_mask():
    class Masked(nn.Module):
        def forward(self, z, x):
            return nn.functional.dropout(0.4 * z, 0.5) + x

    layer, x = ReversibleFixedPoint(Masked(), max_steps=20), torch.ones(16, 1, dtype=torch.float64)
    found = diagnose(layer, x)
    assert set(found.spectral_radius.mul(10).round().int().tolist()) == {0, 8}, "kept elements count double, others not at all"
    slow = found.residuals[-1] > 1e-9  # where the element was dropped the map is constant, and the state reaches it to the last digit
    assert torch.equal(slow, found.spectral_radius > 0.4)
    empty = diagnose(layer, torch.ones(0, 1, dtype=torch.float64))
    assert empty.spectral_radius.shape == (0,)


def test_bad_calls_are_told():
    with pytest.raises(ValueError, match="nothing to diagnose"):
        diagnose(nn.Linear(2, 2), torch.randn(1, 2))
    with pytest.raises(ValueError, match="power_iterations"):
        diagnose(nn.Linear(2, 2), torch.randn(1, 2), power_iterations=1)


@pytest.mark.parametrize("settings", [dict(), dict(num_prelude_layers=1, num_coda_layers=1), dict(tol=0.02)], ids=str)
def test_the_logit_lens_shows_what_shorter_solves_say(settings, tmp_path):
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=16, intermediate_size=32, num_attention_heads=2)
    model = awake(RevDEQForCausalLM(RevDEQConfig(**sizes, max_steps=6, beta=0.8, **settings)), 0.3).eval()
    ids = torch.randint(0, 50, (2, 9))
    lens = logit_lens(model, ids, top_k=3)
    steps = len(lens.tokens)
    assert lens.tokens.shape == lens.log_probs.shape == (steps, 2, 9, 3)
    with torch.no_grad():
        for count in range(1, steps + 1):
            shorter = torch.log_softmax(model(ids, max_steps=count).logits, -1)
            torch.testing.assert_close(lens.log_probs[count - 1], shorter.topk(3).values, rtol=0, atol=1e-5)
        last = torch.log_softmax(model(ids).logits, -1)
        first = torch.log_softmax(model(ids, max_steps=1).logits, -1)
    expected = torch.nn.functional.kl_div(first, last, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(lens.divergence[0], expected, rtol=1e-3, atol=1e-5)
    assert lens.divergence[-1].max() == 0
    assert torch.equal(lens.tokens[-1, ..., 0], last.argmax(-1))
    for row in range(2):
        for position in range(9):
            said, step = lens.tokens[:, row, position, 0], int(lens.settled[row, position])
            assert (said[step - 1 :] == said[-1]).all()
            assert step == 1 or said[step - 2] != said[-1]
    assert lens.residual.shape == (steps + (0 if "tol" not in settings or steps == 6 else 1), 2, 9)
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    lens.plot(tmp_path / "lens.png", [str(i) for i in ids[0].tolist()])
    assert (tmp_path / "lens.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="9 positions"):
        lens.plot(tmp_path / "lens.png", ["one"])
    with pytest.raises(ValueError, match="past_key_values=None"), torch.no_grad():
        model.model(ids, past_key_values=model(ids, use_cache=True).past_key_values, output_trajectory=True)


class Turns(torch.nn.Module):
    """Every state is thrown to the other side, -1.5 times as far, and the far ones come to rest in a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(-1.5))

    def forward(self, z, x):
        return torch.tanh(self.weight * z + 0.1 * x)


def test_a_pair_is_told_from_a_fixed_point():
    """Its residual is large and its spectral radius below 1, so that nothing else would tell; with damping the fixed point is found."""
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    layer = ReversibleFixedPoint(Turns(), max_steps=40)
    with pytest.warns(UserWarning, match="3 of the 3 rows .* rest in a pair"):
        found = diagnose(layer, x)
    assert found.pairs == 3
    assert found.spectral_radius.max() < 1
    assert found.residuals[-1].min() > 1
    layer.damping = 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = diagnose(layer, x)
    assert found.pairs == 0
    assert found.residuals[-1].max() < 1e-3
