# Copyright 2026 The revdeq_hf authors. Licensed under the Apache License, Version 2.0.
"""The reversible fixed-point iteration, in arithmetic that can be undone to the last bit.

One step of the iteration (McCallum, Arora and Foster, arXiv 2509.12917, section 3) updates a pair of states of
the block `f(z, x)` by two half steps, two evaluations of `f` in all:

    y' = (1 - beta) y + beta f(z,  x)
    z' = (1 - beta) z + beta f(y', x)

Algebra inverts both lines, floating point does not: dividing by `1 - beta` multiplies every rounding error by
`1 / |1 - beta|`, at every half step. The lost bits are the whole problem, so they are kept:

* Write `1 - beta = n / d` in lowest terms. A state is an integer `v` that stands for `v / (2^F s)`, where the
  scale `s` depends on nothing but the number of steps taken. Multiplying the state by `n / d` is then no operation on
  `v` at all, only a change of scale `s -> s d / n`, and a half step is ONE integer addition, undone by ONE subtraction:

      forward   v += q s'          q = round(beta f 2^F), f first clamped to [-R, R], s' = s d / n
      inverse   v -= q s'

* The scale runs from `n^K` to `d^K` over a segment of K steps, as many as 64 bits hold (27 at beta = 0.5 with the default
  resolution, 11 at beta = 0.8). Between two segments the digits of `v` below the resolution, `v mod d^K`, are moved to a
  side stack (`Digits`), and when n > 1 digits below `n^K` are taken back from it ("bits back", MacKay et al., Reversible
  Recurrent Neural Networks, 2018). The stack therefore grows by log2(d / |n|) bits per step and element, which is just
  what the contraction discards, and not at all within the first segment.

`f` sees the same float in both directions, so if `f` itself is repeatable the reconstruction is exact for every rational
beta, any number of steps and any precision of `f`.

Why this representation: `python benchmarks/state_update.py` measures a half step (scale, clamp, round, accumulate, read back) on 524,288 elements and
two CPU cores. A float64 accumulator takes 0.6 to 1.1 of the time from run to run, but holds ten bits fewer: it spills, which costs integer divisions, about
twice as often, and cannot resolve float64 states at all. An int32 state that pushes a remainder at every half step divides every time and takes 3 to 6 times
as long. Beside an evaluation of a transformer block of width 256 the first two differ by about 1%.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from numbers import Real

import torch

MAX_DENOMINATOR = 1000
# elements for which there is room for arithmetic at once: on the CPU as many as its caches hold, elsewhere so many that starting a kernel costs little
BLOCKS = {"cpu": 2**18}
BLOCK = 2**22


@dataclass(frozen=True)
class Resolution:
    """The integers behind one choice of beta and dtype. Everything here is a Python number.

    Attributes:
        numerator, denominator: `1 - beta = numerator / denominator` in lowest terms; the numerator is negative for beta > 1.
        fraction_bits: F, the states' resolution is `2^-F`.
        value_limit: R, values of `f` are clamped to `[-R, R]`.
        state_limit: bound on every state, `R beta / (1 - |1 - beta|)`; initial states are clamped to it.
        segment: K, steps between two spills of digits.
    """

    numerator: int
    denominator: int
    fraction_bits: int
    value_limit: float
    state_limit: float
    segment: int

    @property
    def beta(self) -> float:
        """The relaxation in use, exactly `1 - numerator / denominator`."""
        return (self.denominator - self.numerator) / self.denominator

    @property
    def contraction(self) -> float:
        """The factor `1 - beta` in use."""
        return self.numerator / self.denominator

    def scale(self, phase: int) -> int:
        """The scale `s` after `phase` steps of a segment, `n^(K - phase) d^phase`, 0 <= phase <= K."""
        return self.numerator ** (self.segment - phase) * self.denominator**phase

    def spacing(self, phase: int) -> float:
        """The value of one unit of `v` after `phase` steps of a segment, `1 / (2^F s)`."""
        return 2.0**-self.fraction_bits / self.scale(phase)


def rational_beta(beta: float) -> Fraction:
    """The fraction with denominator at most 1000 that is nearest to `beta`.

    Every beta of up to three decimals, and every small fraction such as 1/3 or 6/7, is met to float precision; the caller
    tells the user where that is not so.

    Args:
        beta: relaxation, 0 < beta < 2, not 1.

    Raises:
        ValueError: beta is outside (0, 2), equal to 1 or not a finite number, or nearer to 0, 1 or 2 than 1/1000.
    """
    if isinstance(beta, bool) or not isinstance(beta, Real):
        raise ValueError(f"beta must be a number in (0, 2) other than 1, got {beta!r}")
    if not 0 < beta < 2:  # also catches NaN
        raise ValueError(f"beta must lie in (0, 2), got {beta}; 0.5 to 0.8 is usual")
    if beta == 1:
        raise ValueError("beta must not be 1: the iteration would forget its state and could not be reversed; try 0.8 or 0.9")
    fraction = Fraction(beta if isinstance(beta, Fraction) else float(beta)).limit_denominator(MAX_DENOMINATOR)
    if fraction in (0, 1, 2):
        raise ValueError(f"beta={beta} is nearer to {fraction} than 1/{MAX_DENOMINATOR}; choose a beta further from 0, 1 and 2")
    return fraction


def resolution_for(beta: float, dtype: torch.dtype) -> Resolution:
    """The resolution for states of `dtype`.

    float32, bfloat16 and float16 states are resolved to 2^-24 = 6e-8, float64 states to 2^-40 = 9e-13 (so that finite differences
    make sense); values of `f` may reach 2048 in either. Where beta is so near to 2 that the states' bound and a single step would not fit into 64
    bits beside that (float64, above about 1.98), the resolution is as fine as fits.

    Raises:
        ValueError: see `rational_beta`; or a dtype that is not a real floating one.
    """
    bits = {torch.float64: 40, torch.float32: 24, torch.bfloat16: 24, torch.float16: 24}.get(dtype)
    if bits is None:
        raise ValueError(f"states must be float64, float32, bfloat16 or float16, got {dtype}; convert x (and z0) first")
    ratio = 1 - rational_beta(beta)
    numerator, denominator = ratio.numerator, ratio.denominator
    limit = 2.0**11
    state_limit = limit * (denominator - numerator) / (denominator - abs(numerator))  # torch 2.11 cannot trace float(Fraction)
    # one sign bit, one bit of slack for the rounding of q and the digits below the resolution
    free = 62 - math.log2(state_limit)
    bits = min(bits, int(free - math.log2(denominator)))
    segment = int((free - bits) / math.log2(denominator))
    return Resolution(numerator, denominator, bits, limit, state_limit, segment)


def wider(dtype: torch.dtype) -> torch.dtype:
    """The dtype for arithmetic on states of this one: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32  # torch.promote_types counts as an operation


def per_row(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Reshapes figures of rows, (batch,) or (batch, positions), to as many dimensions as `like` has, by trailing ones."""
    return values.reshape(values.shape + (1,) * (like.dim() - values.dim()))


def rows(tensor: torch.Tensor, dims: int = 1) -> torch.Tensor:
    """A state with the elements of each row in one last dimension; a row is an entry of the first `dims` dimensions."""
    return tensor.reshape(*tensor.shape[:dims], math.prod(tensor.shape[dims:]))


def choose(active: torch.Tensor | None, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """`new` in the rows that are active (None: all), `old` in the others."""
    return new if active is None else torch.where(per_row(active, new), new, old)


def divide(number: torch.Tensor, base: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Integer quotient, rounded down, and remainder in [0, base)."""
    quotient = torch.div(number, base, rounding_mode="floor")
    return quotient, number - quotient * base


def _row_blocks(tensor: torch.Tensor) -> list[slice]:
    """Slices of the first dimension, of about as many elements as there shall be room for; none where the whole is no more than that."""
    block = BLOCKS.get(tensor.device.type, BLOCK)
    if torch.compiler.is_compiling() or tensor.numel() <= block:
        return []
    count = len(tensor)
    each = max(1, block * count // tensor.numel())
    return [slice(start, start + each) for start in range(0, count, each)]


class Digits:
    """A stack of digits for every element of a tensor, packed into int64 words: what does not fit into the state.

    Each call is undone by its opposite, calls in the opposite order, which also restores how the digits were packed. Rows that are not
    `active` keep their words. The words are the only memory: a new one for every 63 bits.

    Args:
        undoable: False where nothing will be undone. Then two words are kept, since digits are put on top before any is taken and no call takes more.
    """

    def __init__(self, undoable: bool = True) -> None:
        self.undoable = undoable
        self.words: list[torch.Tensor] = []  # the last one is in use, the others are full
        self._bounds: list[int] = []  # for each word: the values of active rows are below this
        # for each call: second word's bound or 0, first word's bound before it, its part of the base
        self._history: list[tuple[int, int, int]] = []

    def push(self, digit: torch.Tensor, base: int, active: torch.Tensor | None = None) -> None:
        """Puts a digit in [0, base) on top; one that does not fit into the top word is split between it and a new one."""
        if not self.words:
            self.words, self._bounds = [torch.zeros_like(digit)], [1]
        bound = self._bounds[-1]
        part = min(base, (2**63 - 1) // bound)  # as much of the digit as the top word has room for
        high, low = divide(digit, part) if part < base else (digit, digit)
        self._history.append((-(-base // part) if part < base else 0, bound, part))
        self.words[-1] = choose(active, self.words[-1] * part + low, self.words[-1])
        self._bounds[-1] *= part
        if part < base:
            self.words.append(choose(active, high, torch.zeros_like(high)))
            self._bounds.append(-(-base // part))
        if not self.undoable:
            self.words, self._bounds, self._history = self.words[-2:], self._bounds[-2:], []

    def undo_push(self, active: torch.Tensor | None = None) -> torch.Tensor:
        """Takes back the digit of the last `push`; what it returns for rows that are not active has no meaning."""
        split, bound, part = self._history.pop()
        high: torch.Tensor | int = 0
        if split:
            high = self.words.pop()
            self._bounds.pop()
        rest, low = divide(self.words[-1], part)
        self.words[-1].copy_(choose(active, rest, self.words[-1]))  # in place, see `ExactState.spill`
        self._bounds[-1] = bound
        if not self._history:
            self.words, self._bounds = [], []  # as before the first push
        return low + high * part

    def pop(self, base: int, active: torch.Tensor | None = None) -> torch.Tensor:
        """Takes a digit in [0, base) from the top, which must hold one; a top word of fewer values is used up and the next one gives the rest."""
        top = self._bounds[-1]
        both = active is None and top < base and len(self.words) > 1
        part = base // top if both else base
        high: torch.Tensor | int = 0
        if both:
            high = self.words.pop()
            self._bounds.pop()
        self._history.append((top if both else 0, self._bounds[-1], part))
        rest, low = divide(self.words[-1], part)
        self.words[-1] = choose(active, rest, self.words[-1])
        self._bounds[-1] = -(-self._bounds[-1] // part)
        return low + high * part

    def undo_pop(self, digit: torch.Tensor, active: torch.Tensor | None = None) -> None:
        """Puts back the digit of the last `pop`."""
        top, bound, part = self._history.pop()
        high, low = divide(digit, part) if top else (digit, digit)
        self.words[-1].copy_(choose(active, self.words[-1] * part + low, self.words[-1]))
        self._bounds[-1] = bound
        if top:
            self.words.append(high)
            self._bounds.append(top)

    def packing(self) -> "Digits":
        """How the digits are packed, without the words."""
        other = Digits()
        other._bounds, other._history = list(self._bounds), list(self._history)
        return other

    def filled(self, words: Iterator[torch.Tensor]) -> "Digits":
        """A stack of this packing around the next tensors of `words`, as many as it needs."""
        other = self.packing()
        other.words = [next(words) for _ in self._bounds]
        return other


def accumulate(
    integers: torch.Tensor, f: torch.Tensor, gain: torch.Tensor, limit: torch.Tensor, factor: torch.Tensor, active: torch.Tensor | None
) -> None:
    """`integers += factor round(gain f)` in the active rows, f clamped to the limit and NaN taken as 0: `ExactState.advance` in one expression.

    gain and limit are 0-d floats, wide enough for f; factor is a 0-d integer; active has ones for dimensions to broadcast over.
    """
    q = (f.to(gain.dtype).clamp(-limit, limit).nan_to_num(nan=0.0) * gain).round().to(torch.int64) * factor
    integers.add_(q if active is None else q * active)


def read(integers: torch.Tensor, spacing: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`ExactState.value` in one expression; spacing broadcasts."""
    return (integers.to(spacing.dtype) * spacing).to(dtype)


@cache
def compiled(function: Callable) -> Callable:
    """Compiled once for all shapes: one kernel, where the operations one by one move four times as many bytes."""
    return torch.compile(function, dynamic=True)


class Scratch:
    """What is made once in a solve and used at every half step: fresh memory costs as much as the arithmetic done in it, and a table that is copied
    to an accelerator takes a call of its own.

    Args:
        fused: whether a half step's arithmetic is compiled to one kernel (`accumulate`, `read`) instead of operations in these tensors; the bits are the same.
    """

    def __init__(self, fused: bool = False) -> None:
        self.fused = fused
        self._tensors: dict[torch.Size, tuple[torch.Tensor, torch.Tensor]] = {}
        self._tables: dict[str, torch.Tensor] = {}

    def _table(self, name: str, numbers: Callable[[], list], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        if name not in self._tables:
            self._tables[name] = torch.tensor(numbers(), dtype=dtype, device="cpu").to(
                device, non_blocking=True
            )  # the host need not wait for it
        return self._tables[name]

    def spacings(self, resolution: Resolution, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The spacing at each phase, (K + 1,), float32 or float64."""
        return self._table("spacings", lambda: [resolution.spacing(phase) for phase in range(resolution.segment + 1)], dtype, device)

    def arithmetic(
        self, resolution: Resolution, dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What `accumulate` multiplies and clamps with: gain and limit, 0-d, float32 or float64, and the scale at each phase, (K + 1,) int64."""
        gain, limit = self._table("gain", lambda: [resolution.beta * 2.0**resolution.fraction_bits, resolution.value_limit], dtype, device)
        scales = self._table("scales", lambda: [resolution.scale(phase) for phase in range(resolution.segment + 1)], torch.int64, device)
        return gain, limit, scales

    def tensors(self, f: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A float tensor, wide enough for `f`, and an int64 one, both of its shape."""
        if f.shape not in self._tensors:
            self._tensors[f.shape] = torch.empty_like(f, dtype=wider(f.dtype)), torch.empty_like(f, dtype=torch.int64)
        return self._tensors[f.shape]


class ExactState:
    """One state tensor held as integers.

    An example, with beta = 0.8 (n = 1, d = 5) and F = 0 for short numbers: the state 3 is v = 3, of scale 1. A half step with f = 2 adds q = round(0.8 f) = 2
    in units of the next scale, 5: v = 3 + 2 * 5 = 13, which stands for 13 / 5 = 0.2 * 3 + 2. The way back is 13 - 10 = 3. After K steps the scale is 5^K,
    and a spill keeps `v div 5^K`, which is of scale 1 again, while `v mod 5^K` goes to the digits.

    Args:
        integers: int64 tensor, the state in units of `resolution.spacing(phase)`. Changed in place.
        resolution: the arithmetic.
        digits: what was spilled so far.
        scratch: room for `increment`, to be shared by states that are not used at the same time.

    Memory: 8 bytes per element, and the words of `digits`.
    """

    def __init__(
        self, integers: torch.Tensor, resolution: Resolution, digits: Digits | None = None, scratch: "Scratch | None" = None
    ) -> None:
        self.integers = integers
        self.resolution = resolution
        self.digits = Digits() if digits is None else digits
        self._scratch = scratch or Scratch()

    @classmethod
    def from_float(
        cls, start: torch.Tensor, resolution: Resolution, digits: Digits | None = None, scratch: "Scratch | None" = None
    ) -> "ExactState":
        """The state nearest to `start`, which is clamped to the state limit; non-finite values become 0 (the caller tells)."""
        limit = resolution.state_limit
        wide = torch.nan_to_num(start.to(torch.float64), nan=0.0, posinf=limit, neginf=-limit).clamp_(-limit, limit)
        integers = wide.mul_(2.0**resolution.fraction_bits).round_().to(torch.int64)
        return cls(integers.mul_(resolution.scale(0)), resolution, digits, scratch)

    def value(self, phase: "int | torch.Tensor", dtype: torch.dtype) -> torch.Tensor:
        """The state as floats: what `f` sees. `phase` is a number, or an integer for each row where they stopped at different steps."""
        wide = wider(dtype)
        if self._scratch.fused or not isinstance(phase, int):
            spacing = per_row(self._scratch.spacings(self.resolution, wide, self.integers.device)[phase], self.integers)
            if self._scratch.fused:
                return compiled(read)(self.integers, spacing, dtype)
            return self.integers.to(wide).mul_(spacing).to(dtype)
        unit = self.resolution.spacing(phase)
        # a whole number times a Python float is of torch's default dtype: one operation where that is the one wanted, with the same bits
        floats = self.integers * unit if torch.get_default_dtype() == wide else self.integers.to(wide).mul_(unit)
        return floats.to(dtype)

    def increment(self, f: torch.Tensor) -> torch.Tensor:
        """`q = round(beta f 2^F)` as int64, f clamped to the value limit and NaN taken as 0 (the caller tells). Valid until the next call."""
        r = self.resolution
        if torch.compiler.is_compiling():  # a program makes room by itself, and one that is exported may be run where gradients are on
            floats = f.to(wider(f.dtype)).clamp(-r.value_limit, r.value_limit).nan_to_num(nan=0.0) * (r.beta * 2.0**r.fraction_bits)
            return floats.round().to(torch.int64)
        wide, q = self._scratch.tensors(f)
        torch.clamp(f if f.dtype == wide.dtype else wide.copy_(f), -r.value_limit, r.value_limit, out=wide).nan_to_num_(nan=0.0)
        return q.copy_(wide.mul_(r.beta * 2.0**r.fraction_bits).round_())

    def advance(self, f: torch.Tensor, phase: int, active: torch.Tensor | None = None) -> None:
        """`state = (1 - beta) state + beta f`, in place, from `phase` to `phase + 1`; rows that are not `active` stay as they are."""
        self._add(f, phase + 1, 1, active)

    def retreat(self, f: torch.Tensor, phase: int, active: torch.Tensor | None = None) -> None:
        """The inverse of `advance` with the same arguments."""
        self._add(f, phase + 1, -1, active)

    def _add(self, f: torch.Tensor, phase: int, sign: int, active: torch.Tensor | None) -> None:
        if self._scratch.fused:
            gain, limit, scales = self._scratch.arithmetic(self.resolution, wider(f.dtype), f.device)
            rows = None if active is None else per_row(active, f)
            compiled(accumulate)(self.integers, f, gain, limit, sign * scales[phase], rows)
            return
        factor = sign * self.resolution.scale(phase)
        if not (blocks := _row_blocks(f)):
            self._add_rows(self.integers, f, factor, active)
        for part in blocks:
            self._add_rows(self.integers[part], f[part], factor, None if active is None else active[part])

    def _add_rows(self, integers: torch.Tensor, f: torch.Tensor, factor: int, active: torch.Tensor | None) -> None:
        q = self.increment(f)
        if active is not None:
            q.mul_(per_row(active, q))
        integers.add_(q, alpha=factor)

    def keep(self, rows: torch.Tensor, scratch: Scratch) -> None:
        """Drops all rows but those of these indices; for states that are not to be reversed."""
        self.integers, self.digits.words = self.integers[rows], [word[rows] for word in self.digits.words]
        self._scratch = scratch

    def spill(self, active: torch.Tensor | None = None) -> None:
        """Ends a segment: the digits below the resolution go to the stack; the phase of the active rows goes from K to 0."""
        take, give, sign = self._bases()
        whole, low = divide(self.integers, take)
        if give > 1 or self.digits.undoable:
            self.digits.push(low, take, active)
        new = whole if give == 1 else whole * give + self.digits.pop(give, active)
        self.integers.copy_(choose(active, new * sign, self.integers))  # in place: what was saved for the backward pass is this very tensor

    def undo_spill(self, active: torch.Tensor | None = None) -> None:
        """The inverse of `spill` with the same argument."""
        take, give, sign = self._bases()
        whole = self.integers * sign
        if give != 1:
            whole, digit = divide(whole, give)
            self.digits.undo_pop(digit, active)
        self.integers.copy_(choose(active, whole * take + self.digits.undo_push(active), self.integers))

    def _bases(self) -> tuple[int, int, int]:
        start = self.resolution.scale(0)  # negative for beta > 1 and odd K
        return self.resolution.scale(self.resolution.segment), abs(start), 1 if start > 0 else -1
