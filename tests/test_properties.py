"""Exactness on examples that nobody chose: hypothesis draws shapes, betas, depths, dtypes and values, and shrinks what fails.

A quick, repeatable choice of examples runs by default. More, and others in every run:

    REVDEQ_EXAMPLES=2000 pytest tests/test_properties.py
"""

import math
import os
import warnings
from dataclasses import dataclass, field
from fractions import Fraction

import pytest
import torch
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st
from torch import nn

from revdeq_hf import DriftError, ReversibleFixedPoint
from revdeq_hf.solver_revdeq import MAX_DENOMINATOR, Digits, ExactState, rational_beta, resolution_for

EXAMPLES = int(os.environ.get("REVDEQ_EXAMPLES", "0"))  # of all properties together


def examples(share: float):
    """Settings of a property that takes this share of all examples."""
    return settings(
        max_examples=max(1, round(share * (EXAMPLES or 200))),
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@st.composite
def betas(draw) -> Fraction:
    """Every fraction in (0, 2) but 1 that is admissible, often one at the edges."""
    if draw(st.booleans()):
        return draw(st.sampled_from([Fraction(n, d) for n, d in EDGES]))
    denominator = draw(st.integers(2, MAX_DENOMINATOR))
    distance = Fraction(draw(st.integers(1, denominator - 1)), denominator)  # from 1
    return 1 + draw(st.sampled_from([1, -1])) * distance


EDGES = [(1, 2), (4, 5), (3, 2), (1, 1000), (999, 1000), (1001, 1000), (1999, 1000), (1, 3), (1997, 999), (1, 999), (998, 999), (19, 10)]


@dataclass
class Case:
    """One training step."""

    shapes: list[tuple[int, ...]]
    dtype: torch.dtype
    autocast: torch.dtype | None
    beta: Fraction
    steps: int
    tol: float | None
    row_dims: int
    keep_evaluations: int
    start: float | None  # size of z0
    gain: float  # of the weights; the iteration need not converge
    activation: str
    dropout: float
    seed: int


@st.composite
def cases(draw) -> Case:
    row_dims = draw(st.sampled_from([1, 1, 2]))
    sizes = st.sampled_from([1, 2, 3, 5, 7])
    rows = [draw(sizes) for _ in range(row_dims)]
    shapes = [(*rows, *dims) for dims in draw(st.lists(st.lists(sizes, max_size=2), min_size=1, max_size=2))]
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    steps = draw(st.sampled_from([1, 2, 3, 4, 7, 12, 29, 45]))
    return Case(
        shapes=shapes,
        dtype=dtype,
        autocast=draw(st.sampled_from([None, torch.bfloat16])) if dtype == torch.float32 else None,
        beta=draw(betas()),
        steps=steps,
        tol=draw(st.sampled_from([None, None, 0.0, 1e-3, 0.05, 0.5])),
        row_dims=row_dims,
        keep_evaluations=draw(st.integers(0, 2 * steps + 1)),
        start=draw(st.sampled_from([None, 0.0, 1.0, 3000.0])),
        gain=draw(st.sampled_from([0.3, 1.0, 3.0])),
        activation=draw(st.sampled_from(["tanh", "relu", "linear"])),
        dropout=draw(st.sampled_from([0.0, 0.3])),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


class Block(nn.Module):
    """States of any shape: each is mixed along its last dimension, and moved by the mean of each example's other states."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        sizes = [shape[-1] if len(shape) > 1 else 1 for shape in case.shapes]
        self.mix = nn.ParameterList(nn.Parameter(torch.randn(n, n, dtype=case.dtype) * case.gain / math.sqrt(n)) for n in sizes)
        self.shift = nn.ParameterList(nn.Parameter(torch.randn(n, dtype=case.dtype)) for n in sizes)
        self.activation, self.dropout = case.activation, case.dropout

    def forward(self, z, x):
        parts, inputs = (z, x) if isinstance(z, tuple) else ((z,), (x,))
        means = [part.reshape(part.shape[0], -1).mean(1) for part in parts]
        out = []
        for number, (part, given_x) in enumerate(zip(parts, inputs, strict=True)):
            value = part.reshape(*(part.shape if part.dim() > 1 else (*part.shape, 1)))
            value = (value @ self.mix[number] + self.shift[number]).reshape(part.shape) + given_x
            for other, mean in enumerate(means):
                if other != number:
                    value = value + mean.reshape(-1, *(1,) * (part.dim() - 1))
            value = {"tanh": torch.tanh, "relu": torch.relu, "linear": lambda v: v}[self.activation](value)
            out.append(nn.functional.dropout(value, self.dropout))
        return tuple(out) if isinstance(z, tuple) else out[0]


def train(case: Case, gradient: str):
    """Outputs, steps and gradients of one training step, and the layer."""
    torch.manual_seed(case.seed)
    block = Block(case)
    x = [torch.randn(shape, dtype=case.dtype).requires_grad_() for shape in case.shapes]
    z0 = None if case.start is None else [(torch.randn(s, dtype=case.dtype) * case.start).requires_grad_() for s in case.shapes]
    layer = ReversibleFixedPoint(
        block,
        beta=float(case.beta),
        max_steps=case.steps,
        tol=case.tol,
        row_dims=case.row_dims,
        gradient=gradient,
        keep_evaluations=case.keep_evaluations,
        drift_policy="raise",
    )
    single = len(x) == 1
    with warnings.catch_warnings(), torch.autocast("cpu", dtype=case.autocast, enabled=case.autocast is not None):
        warnings.simplefilter("ignore")  # of values that were clamped
        solution = layer(x[0] if single else tuple(x), z0=None if z0 is None else (z0[0] if single else tuple(z0)))
    z = [solution.z] if single else list(solution.z)
    loss = torch.stack([(part.double() * torch.linspace(-1, 2, part.numel(), dtype=torch.float64).reshape(part.shape)).sum() for part in z])
    inputs = [*block.parameters(), *x, *(z0 or [])]
    if loss.requires_grad:
        gradients = torch.autograd.grad(loss.sum(), inputs, allow_unused=True, materialize_grads=True)
    else:  # every example met tol at the zero start: stored backpropagation sees a constant
        gradients = [torch.zeros_like(tensor) for tensor in inputs]
    return [*z, solution.steps, *gradients], layer, solution


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0), b.nan_to_num(0))


@given(case=cases())
@examples(0.5)
def test_reversal_is_exact(case):
    """Laws 1 and 2: drift is exactly 0, and outputs, steps and gradients are those of stored backpropagation in every bit."""
    exact, layer, solution = train(case, "reversible")
    assert layer.drift.item() == 0.0
    stored, _, _ = train(case, "backprop")
    if solution.nonfinite.any():  # float16 that overflows: the outputs say so, and their gradients have no value to agree on
        exact, stored = (found[: len(case.shapes) + 1] for found in (exact, stored))
        assert any(part.isnan().any() for part in exact)
    for number, (a, b) in enumerate(zip(exact, stored, strict=True)):
        assert same_bits(a, b), f"tensor {number} of outputs, steps and gradients differs"
    event(f"finite: {not solution.nonfinite.any()}")
    event(f"clamped: {bool(solution.clamped.any())}")
    event(f"stopped early: {case.tol is not None and bool((solution.steps < case.steps).any())}")


def adversarial(limit: float):
    """Values at which rounding, clamping or conversion could go wrong, and ordinary ones."""
    edges = [0.0, -0.0, limit, -limit, math.nextafter(limit, math.inf), 2 * limit, 1e30, -1e300, math.nan, math.inf, -math.inf]
    edges += [5e-324, -1e-310, 1e-45, 2.0**-25, 2.0**-41, 3 * 2.0**-25, 1 / 3, -1.0]
    return st.one_of(st.sampled_from(edges), st.floats(-limit, limit))


@st.composite
def histories(draw):
    """A state's whole life: dtype, beta, start, and for every step the values of f; two rows, of which the second may stop early."""
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    beta = draw(betas())
    steps = draw(st.integers(1, 40))
    limit = resolution_for(float(beta), dtype).state_limit
    start = draw(st.lists(adversarial(limit), min_size=2, max_size=2))
    # some values an example, which every step takes in turn: long lists of floats are slow to draw, and add nothing
    values = draw(st.lists(adversarial(2048.0), min_size=1, max_size=7))
    return dtype, beta, steps, draw(st.integers(0, steps)), start, values


@given(history=histories())
@examples(0.25)
def test_an_integer_state_comes_back_whatever_it_met(history):
    """Forward and back is the identity; nothing overflows (Python's integers, which cannot, find the same); the bound on the state holds."""
    dtype, beta, steps, stop, start, values = history
    r = resolution_for(float(beta), dtype)
    state = ExactState.from_float(torch.tensor(start, dtype=torch.float64)[:, None], r)
    first = state.integers.clone()
    unit = [abs(r.scale(phase)) for phase in range(r.segment + 1)]
    rounding = 1 + 2.0**-23 if dtype == torch.float32 else 1.0  # of beta f 2^F
    bound = r.state_limit * 2.0**r.fraction_bits * rounding + 2 * steps  # each step rounds to a unit once, each spill once
    assert abs(first).max().item() <= bound * unit[0]
    updates = [torch.tensor([[values[step % len(values)]], [values[(3 * step + 1) % len(values)]]]).to(dtype) for step in range(steps)]
    expected = [int(v) for v in first.flatten()]
    masks = [None if stop == steps else torch.tensor([True, stop > step]) for step in range(steps)]
    entered = [None if stop == steps else torch.tensor([True, stop >= step]) for step in range(steps)]
    for step in range(steps):
        phase = step % r.segment
        if step and phase == 0:
            before = state.integers.flatten().tolist()
            state.spill(entered[step])
            for row in range(2 if stop >= step else 1):
                exact = Fraction(before[row], r.denominator**r.segment) * r.numerator**r.segment  # in units of the phase 0
                expected[row] = state.integers[row].item()
                assert abs(expected[row] - exact) <= abs(r.numerator) ** r.segment, "a spill moves the state by less than the resolution"
            if stop < step:
                assert state.integers[1].item() == before[1], "a row that has stopped stays as it is"
        q = state.increment(updates[step]).flatten().tolist()
        assert all(abs(part) <= 2048 * r.beta * 2.0**r.fraction_bits * rounding + 1 for part in q)
        state.advance(updates[step], phase, masks[step])
        for row in range(2 if stop > step else 1):
            expected[row] += q[row] * r.scale(phase + 1)
            assert abs(expected[row]) <= bound * unit[phase + 1]
        assert state.integers.flatten().tolist() == expected
    for step in reversed(range(steps)):
        state.retreat(updates[step], step % r.segment, masks[step])
        if step and step % r.segment == 0:
            state.undo_spill(entered[step])
    assert torch.equal(state.integers, first)
    assert not state.digits.words


@dataclass
class Past:
    """What a stack was before a call, and how to undo the call."""

    words: list[torch.Tensor]
    packing: tuple
    undo: str
    digit: torch.Tensor
    active: torch.Tensor | None = field(default=None)


@given(data=st.data())
@examples(0.15)
def test_digits_come_back_in_the_opposite_order(data):
    """Any sequence of pushes and pops, with rows that drop out for good: undone, every state of the stack returns."""
    draw = data.draw
    digits, rows = Digits(), 3
    active = None if draw(st.booleans()) else torch.tensor([True] * rows)
    room = 0.0  # bits that a pop may take
    past: list[Past] = []
    for _ in range(draw(st.integers(1, 25))):
        if active is not None and draw(st.integers(0, 5)) == 0:
            active = active & torch.tensor(draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
        base = draw(st.one_of(st.sampled_from([2, 3, 1000, 10**6 + 3, 2**30, 2**31 - 1]), st.integers(2, 2**30)))
        packing = list(digits._bounds), list(digits._history)
        words = [word.clone() for word in digits.words]
        # a pop may waste what its base does not divide, so leave a margin
        if draw(st.booleans()) and room > 4 * math.log2(base):
            room -= 2 * math.log2(base)
            digit = digits.pop(base, active)
            inside = (digit >= 0) & (digit < base)
            assert inside.all() if active is None else inside[active].all()
            past.append(Past(words, packing, "pop", digit, active))
        else:
            digit = torch.tensor(draw(st.lists(st.one_of(st.just(base - 1), st.integers(0, base - 1)), min_size=rows, max_size=rows)))
            digits.push(digit, base, active)
            room += math.log2(base)
            past.append(Past(words, packing, "push", digit, active))
        assert all((word >= 0).all() for word in digits.words)
    for then in reversed(past):
        if then.undo == "push":
            digit = digits.undo_push(then.active)
            same = digit == then.digit
            assert same.all() if then.active is None else same[then.active].all()
        else:
            digits.undo_pop(then.digit, then.active)
        assert (digits._bounds, digits._history) == then.packing
        assert len(digits.words) == len(then.words)
        assert all(torch.equal(a, b) for a, b in zip(digits.words, then.words, strict=True))


@given(data=st.data())
@examples(0.1)
def test_digits_that_are_not_put_back_need_two_words(data):
    """Spills, a push and a pop of a smaller digit: what is taken is the same where all but the last two words are forgotten."""
    draw = data.draw
    whole, short, rows = Digits(), Digits(undoable=False), 3
    for _ in range(draw(st.integers(1, 30))):
        take = draw(st.one_of(st.integers(2, 2**20), st.integers(2**40, 2**62)))
        give = draw(st.integers(1, take - 1))
        digit = torch.tensor(draw(st.lists(st.integers(0, take - 1), min_size=rows, max_size=rows)))
        for digits in (whole, short):
            digits.push(digit, take)
        if give > 1:
            assert torch.equal(whole.pop(give), short.pop(give))
        assert len(short.words) <= 2


@given(beta=st.one_of(betas(), st.floats(0, 2, exclude_min=True, exclude_max=True), st.floats(0.998, 1.002), st.floats(1.998, 2.0)))
@example(beta=Fraction(1, 1000))
@example(beta=Fraction(1999, 1000))
@examples(0.1)
def test_every_beta_is_refused_or_fits_64_bits(beta):
    try:
        fraction = rational_beta(beta)
    except ValueError:
        assert beta in (1, 2) or Fraction(beta).limit_denominator(MAX_DENOMINATOR) in (0, 1, 2)
        return
    assert abs(fraction - Fraction(beta)) <= Fraction(1, MAX_DENOMINATOR)
    assert fraction.denominator <= MAX_DENOMINATOR
    for dtype in (torch.float32, torch.float64):
        r = resolution_for(beta, dtype)
        assert Fraction(r.numerator, r.denominator) == 1 - fraction
        assert r.segment >= 1
        # the state, and the addend of a half step, in units of every phase
        widest = max(abs(r.scale(phase)) for phase in range(r.segment + 1))
        assert int(r.state_limit * 2**r.fraction_bits + 2 * r.segment) * widest < 2**63
        assert int(r.beta * r.value_limit * 2**r.fraction_bits + 1) * widest < 2**63


def test_the_properties_can_fail(monkeypatch):
    """A reversal that loses one unit of the last place does not pass for exact."""
    case = Case([(2, 3)], torch.float32, None, Fraction(4, 5), 4, None, 1, 0, None, 1.0, "tanh", 0.0, 0)
    retreat = ExactState.retreat

    def lossy(self, f, phase, active=None):
        retreat(self, f, phase, active)
        self.integers += 1

    monkeypatch.setattr(ExactState, "retreat", lossy)
    with pytest.raises(DriftError):
        train(case, "reversible")
