"""The arithmetic: every state comes back to the last bit, and stands for what it should."""

from fractions import Fraction

import pytest
import torch

from revdeq_hf.solver_revdeq import ExactState, rational_beta, resolution_for

BETAS = [0.01, 0.3, 1 / 3, 0.5, 0.55, 0.7, 0.75, 0.8, 0.9, 1.2, 1.5, 1.95]


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [1, 9, 300])
def test_forward_and_back_is_the_identity(beta, dtype, steps):
    """Values up to the clamp and beyond it, rows that stop at different steps, far past the 64 bits of a state."""
    r = resolution_for(beta, dtype)
    state = ExactState.from_float(torch.randn(3, 5) * 100, r)
    start = state.integers.clone()
    reference = state.value(0, torch.float64)
    stops = torch.tensor([steps, steps // 2, steps])
    phase = torch.zeros(3, dtype=torch.long)
    updates = []
    for step in range(steps):
        if step and step % r.segment == 0:
            entered = stops >= step
            state.spill(entered)
            phase = torch.where(entered, 0, phase)
        active = stops > step
        updates.append((torch.randn(3, 5) * 3000).to(dtype))
        state.advance(updates[-1], step % r.segment, active)
        phase = phase + active
        reference = torch.where(active[:, None], r.contraction * reference + r.beta * updates[-1].double().clamp(-2048, 2048), reference)
    # float32 rounds beta * f * 2^F to 24 bits: 2048 * 2^-24 an update
    tolerance = 2e-3 if dtype == torch.float32 else 1e-8
    torch.testing.assert_close(state.value(phase, torch.float64), reference, rtol=0, atol=tolerance)
    for step in reversed(range(steps)):
        state.retreat(updates[step], step % r.segment, stops > step)
        if step and step % r.segment == 0:
            state.undo_spill(stops >= step)
    assert torch.equal(state.integers, start)
    assert not state.digits.words


@pytest.mark.parametrize("beta", BETAS)
def test_digits_cost_the_bits_that_the_contraction_discards(beta):
    r = resolution_for(beta, torch.float32)
    state = ExactState.from_float(torch.zeros(1, 64), r)
    steps = 400
    for step in range(steps):
        if step and step % r.segment == 0:
            state.spill()
        state.advance(torch.randn(1, 64), step % r.segment)
    lost = torch.log2(torch.tensor(r.denominator / abs(r.numerator))).item()
    # whole words of 63 bits, and the integer bounds of the packing
    assert len(state.digits.words) * 64 <= steps * lost * 64 / 63 + 64 + steps / r.segment


@pytest.mark.parametrize("beta", [*BETAS, 0.001, 0.123, 0.999, 1.001, 1.99, 1.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bits_of_a_segment_fit(beta, dtype):
    r = resolution_for(beta, dtype)
    bound = int(r.state_limit * 2**r.fraction_bits + 1) * max(abs(r.scale(p)) for p in range(r.segment + 1))
    assert bound < 2**63
    q = r.beta * r.value_limit * 2**r.fraction_bits
    assert q * max(abs(r.scale(p)) for p in range(r.segment + 1)) < 2**63


@pytest.mark.parametrize(
    ("beta", "expected"), [(0.8, Fraction(4, 5)), (0.5, Fraction(1, 2)), (1 / 3, Fraction(1, 3)), (1.2, Fraction(6, 5))]
)
def test_beta_is_taken_as_the_fraction_it_means(beta, expected):
    assert rational_beta(beta) == expected


@pytest.mark.parametrize("beta", [0, 1, 2, -0.5, 2.5, float("nan"), float("inf"), "0.5", True, None, 1e-9, 0.99999])
def test_an_unusable_beta_is_refused(beta):
    with pytest.raises(ValueError, match="beta"):
        rational_beta(beta)


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match="complex64"):
        resolution_for(0.5, torch.complex64)
