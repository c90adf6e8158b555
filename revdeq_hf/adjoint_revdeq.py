# Copyright 2026 The revdeq_hf authors. Licensed under the Apache License, Version 2.0.
"""Gradients of the fixed-point iteration: every mode runs the same forward map (`Solve.iterate`) and differs in what it keeps.

`reversible` keeps the last pair of states and reconstructs all earlier ones while it goes back (`_Reversible`). With `J` the
Jacobian of `f`, from `gz = dL/dz_N` and `gy = 0`, per step from the last to the first:

    gy += beta J(y')^T gz                         then the inverse half step gives z
    gz  = (1 - beta) gz + beta J(z)^T gy          then the inverse half step gives y
    gy  = (1 - beta) gy

Each half step evaluates `f` once and uses the evaluation for the inverse and for the vector-Jacobian product. `backprop` lets
autograd keep everything and sees the rounding of the states as the identity (`_Relax`), which is the very gradient above;
`checkpoint` is `backprop` with `torch.utils.checkpoint` around each evaluation.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .evaluator_revdeq import Evaluation, Evaluator, State, as_leaves, evaluate_with_graph, refuse_hidden_inputs
from .solver_revdeq import Digits, ExactState, Resolution, Scratch, per_row, resolution_for, rows, wider

RESIDUAL_FLOOR = 1e-5
# rows that met tol leave the batch when no more than this share would stay: copying the others costs little beside an evaluation
STAYING = 0.75
# how many times the elements of a state are more than the rows' figures that are noted before they are counted
NOTED = 8
UNFUSED_DEVICES = ("cpu", "meta")


class _Relax(torch.autograd.Function):
    """The new value of a half step, differentiated as `keep * old + gain * f`: the rounding to integers counts as the identity."""

    @staticmethod
    def forward(ctx, old, f, new, keep, gain):
        ctx.keep, ctx.gain = keep, gain
        return new.view_as(new)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.keep * gradient, None if ctx.gain is None else ctx.gain * gradient, None, None, None


class Solve:
    """One run of the iteration: its arithmetic, its inputs and its figures.

    Args:
        evaluator: calls the block.
        beta, max_steps, tol: as in `ReversibleFixedPoint`.
        row_dims: leading dimensions of the state whose entries, its rows, are measured and stopped by themselves.
        record: whether to keep `trajectory`, the values of z after each step, and `step_residuals`, those at the start of each step.
        noise: standard deviation of what is added to each value of the block on the path, 0 for none; residuals are those of the bare values. It follows
            from `noise_seed` and the number of the evaluation, so that the backward pass meets it again.
        measure_mask: (batch, positions) bool, with `row_dims` 1: what of the state counts in the residuals; None: all.

    Attributes after `iterate`:
        taken, entered, evaluations: steps executed (the most of all rows), those begun (one more where `tol` ended it), calls of the block.
        steps: int64 for each row, or None where every row took `taken` (no `tol`).
        residual: float32 for each row, of the state at the start of its last step, or of the state it returns where that met `tol`.
        clamped, nonfinite: int64 for each row, evaluations in which a value left `[-R, R]`, or was not finite.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        beta: float,
        max_steps: int,
        tol: float | Callable[[Any, Any], torch.Tensor] | None,
        row_dims: int = 1,
        record: bool = False,
        noise: float = 0.0,
        noise_seed: int = 0,
        measure_mask: torch.Tensor | None = None,
    ) -> None:
        self.evaluator = evaluator
        self.noise, self.noise_seed = noise, noise_seed
        self.measure_mask = measure_mask
        self.row_dims = row_dims
        self.record = record
        self.trajectory: list[State] = []
        self.step_residuals: list[torch.Tensor] = []
        self.max_steps = max_steps
        self.tol = tol
        self.resolution: Resolution = resolution_for(beta, evaluator.dtype)
        self.rows, device = evaluator.shapes[0][:row_dims], evaluator.device
        self.taken = self.entered = self.evaluations = 0
        self.active: torch.Tensor | None = None
        self.steps: torch.Tensor | None = None
        self.phase: int | torch.Tensor = 0
        if tol is not None:
            self.active = torch.ones(self.rows, dtype=torch.bool, device=device)
            self.steps = torch.zeros(self.rows, dtype=torch.int64, device=device)
            self.phase = torch.zeros(self.rows, dtype=torch.int64, device=device)
        self.residual: torch.Tensor | None = None
        self.clamped = torch.zeros(self.rows, dtype=torch.int64, device=device)
        self.nonfinite = torch.zeros(self.rows, dtype=torch.int64, device=device)
        # greatest and least values of rows that `_count` has not looked at yet, and which rows were active then
        self._reaches: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._whose: list[Any] = []
        self._present: torch.Tensor | None = None  # indices of the rows still here, None: all
        self._left: list[tuple[torch.Tensor, State, list[torch.Tensor]]] = []  # of rows that are finished: indices, z, figures

    def scratch(self) -> Scratch:
        """Where the block is compiled by itself the arithmetic is as well, but for the CPU, on which one operation at a time was faster."""
        apart = self.evaluator.compiled and not torch.compiler.is_compiling()
        return Scratch(fused=apart and self.evaluator.device.type not in UNFUSED_DEVICES)

    def start(self, z0: State | None, scratch: Scratch, reversed_later: bool = True) -> list[ExactState]:
        """The start state as integers; zero where `z0` is None. States that are not reversed later keep nothing for it: their memory does not grow."""
        if z0 is None:
            parts = zip(self.evaluator.shapes, self.evaluator.formats, strict=True)
            settings: dict[str, Any] = dict(dtype=torch.int64, device=self.evaluator.device)
            empty = [torch.empty(shape, memory_format=form, **settings) for shape, form in parts]
            return [ExactState(tensor.zero_(), self.resolution, Digits(reversed_later), scratch) for tensor in empty]
        return [ExactState.from_float(tensor.detach(), self.resolution, Digits(reversed_later), scratch) for tensor in z0]

    def values(self, states: list[ExactState], phase: "int | torch.Tensor") -> State:
        """What the block sees of the states."""
        return tuple(state.value(phase, self.evaluator.dtype) for state in states)

    def iterate(
        self,
        y: list[ExactState],
        z: list[ExactState],
        z0: State | None,
        evaluate: Callable[[State, int], State],
        differentiable: bool = False,
        compact: bool = False,
    ) -> State:
        """Runs the iteration, changing `y` and `z` in place: the one forward map of all gradient modes.

        Args:
            y, z: the pair of states, equal at the start.
            z0: the tensors the start was made from, None where it is zero.
            evaluate: `f` of a state; its second argument counts the evaluations from 0.
            differentiable: whether autograd shall see the loop.
            compact: whether rows that met `tol` may leave the batch, so that they cost nothing any more; for states that are not reversed.

        Returns:
            The value of z after the last step; NaN in the rows in which f was not finite.
        """
        segment, limit = self.resolution.segment, self.resolution.value_limit
        z_values = self.values(z, self.phase)
        if z0 is not None:
            for tensor in z0:
                self._note(tensor.detach(), self.resolution.state_limit)
            self._count(self.resolution.state_limit)
            if differentiable:
                z_values = tuple(with_value(a, b) for a, b in zip(z0, z_values, strict=True))
        y_values = z_values

        def renew(states: list[ExactState], old: State, f: "State | None" = None) -> State:
            new = self.values(states, self.phase)
            if not differentiable:
                return new
            if f is None:
                return tuple(with_value(a, b) for a, b in zip(old, new, strict=True))
            factors = (self.coefficients(self.active, part) for part in new)
            return tuple(_Relax.apply(a, b, c, *both) for a, b, c, both in zip(old, f, new, factors, strict=True))

        def advance(states: list[ExactState], f: State, phase: int) -> None:
            values = tuple(part.detach() for part in f) if differentiable else f
            for state, part in zip(states, values, strict=True):
                self._note(part, limit)
                state.advance(part, phase, self.active)

        for step in range(self.max_steps):
            self.entered, phase = step + 1, step % segment
            if step and phase == 0:
                self._count(limit)
                for state in (*y, *z):
                    state.spill(self.active)
                self.phase = 0 if self.active is None else torch.where(self.active, 0, self.phase)
                y_values, z_values = renew(y, y_values), renew(z, z_values)
            f = evaluate(z_values, 2 * step)
            if self.tol is not None or self.record or step == self.max_steps - 1:
                self._measure(f, z_values)
                # a program takes all steps, in which settled rows stay as they are
                if self.active is not None and not torch.compiler.is_compiling():
                    # the one host synchronisation a step, with tol only; a plan of memory answers "any" as if no row had met it
                    staying = int(self.active.sum()) if compact else bool(self.active.any())
                    if not staying:
                        if differentiable and step == 0:  # nothing was done: what is not the start's gradient is zero, but there is some
                            z_values = tuple(_Relax.apply(value, part, value, 1.0, 0.0) for part, value in zip(f, z_values, strict=True))
                        break
                    if compact and not self.evaluator.random and staying <= STAYING * len(self.active):
                        f, y_values, z_values = self._part_with_finished(y, z, f, y_values, z_values)
            f = self.perturbed(f, 2 * step)
            advance(y, f, phase)
            self.phase = self.phase + 1 if self.active is None else self.phase + self.active
            y_values = renew(y, y_values, f)
            f = self.perturbed(evaluate(y_values, 2 * step + 1), 2 * step + 1)
            advance(z, f, phase)
            z_values = renew(z, z_values, f)
            if self.record:
                self._count(limit)
                self.trajectory.append(self.poisoned(z_values))
            self.taken = step + 1
            if self.steps is not None and self.active is not None:
                self.steps = self.steps + self.active
        self._count(limit)
        self.evaluations = 2 * self.taken + (self.entered > self.taken)
        return self.poisoned(self._reunite(z_values))

    def perturbed(self, f: State, number: int) -> State:
        """The block's value with the noise of this evaluation."""
        if not self.noise:
            return f
        generator = torch.Generator(self.evaluator.device).manual_seed(self.noise_seed + number)
        wide = wider(self.evaluator.dtype)
        return tuple(
            part + (self.noise * torch.randn(part.shape, generator=generator, device=part.device, dtype=wide)).to(part.dtype) for part in f
        )

    def _part_with_finished(self, y: list[ExactState], z: list[ExactState], *values: State) -> list[State]:
        """Takes the rows that are not active out of everything; `values` (the last one of z) are returned without them.

        Makes the host wait for the indices, at most once each time that a quarter of the rows has finished.
        """
        assert self.active is not None
        self._count(self.resolution.value_limit)
        going, staying = (~self.active).nonzero().squeeze(1), self.active.nonzero().squeeze(1)
        present = torch.arange(len(self.active), device=self.active.device) if self._present is None else self._present
        self._left.append((present[going], tuple(part[going] for part in values[-1]), [figure[going] for figure in self._figures()]))
        self._present, self.active = present[staying], self.active[staying]
        assert isinstance(self.phase, torch.Tensor)
        self.phase = self.phase[staying]
        self.steps, self.residual, self.clamped, self.nonfinite = (figure[staying] for figure in self._figures())
        scratch = self.scratch()
        for state in (*y, *z):
            state.keep(staying, scratch)
        self.evaluator.keep(staying)
        return [tuple(part[staying] for part in state) for state in values]

    def _figures(self) -> list[torch.Tensor]:
        assert self.steps is not None
        assert self.residual is not None
        return [self.steps, self.residual, self.clamped, self.nonfinite]

    def _reunite(self, z_values: State) -> State:
        """z, and the figures, of all rows in their order."""
        if self._present is None:
            return z_values
        parts = [*self._left, (self._present, z_values, self._figures())]
        order = torch.cat([indices for indices, _, _ in parts]).argsort()
        together = lambda tensors: torch.cat(tensors)[order]  # noqa: E731
        self.steps, self.residual, self.clamped, self.nonfinite = map(together, zip(*(figures for _, _, figures in parts), strict=True))
        return tuple(map(together, zip(*(state for _, state, _ in parts), strict=True)))

    def poisoned(self, values: State) -> State:
        """The values, of states or of their gradients, with NaN in the rows in which f was not finite: a gradient scaler must see it."""
        bad = self.nonfinite > 0
        factors = (torch.where(per_row(bad, value), torch.nan, 1.0).to(value.dtype) for value in values)
        return tuple(value * factor for value, factor in zip(values, factors, strict=True))

    def coefficients(self, active: torch.Tensor | None, like: torch.Tensor) -> tuple:
        """`(1 - beta, beta)` for a tensor of the state; where only some rows are active, tensors that broadcast to it, with (1, 0) in the others."""
        r = self.resolution
        if active is None:
            return r.contraction, r.beta
        mask = per_row(active, like)
        keep = torch.ones_like(mask, dtype=like.dtype).masked_fill(mask, r.contraction)
        gain = torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, r.beta)
        return keep, gain

    def _note(self, values: torch.Tensor, limit: float) -> None:
        """Notes how far the values of each row reach; `_count`, by the end of the segment, compares it with the limit."""
        if not values.numel():
            return
        within = tuple(range(self.row_dims, values.dim()))
        # on the CPU much faster than aminmax, or abs and amax, or the maximum norm
        self._reaches.append((values.amax(within), values.amin(within)) if within else (values, values))
        self._whose.append(self.active)
        if NOTED * len(self._reaches) * self._reaches[0][0].numel() >= values.numel():  # not so much that memory would grow
            self._count(limit)

    def _count(self, limit: float) -> None:
        """Counts the evaluations noted, all at once: for one token each operation costs as much as any."""
        if not self._reaches:
            return
        greatest, least = map(torch.stack, zip(*self._reaches, strict=True))
        reach = torch.maximum(greatest, least.neg_())
        nonfinite, outside = ~(reach < torch.inf), reach > limit
        if self.active is not None:
            active = torch.stack(self._whose)
            nonfinite, outside = nonfinite & active, outside & active
        self.nonfinite += nonfinite.sum(0)
        self.clamped += (outside & ~nonfinite).sum(0)
        self._reaches, self._whose = [], []

    def _measure(self, f: State, z: State) -> None:
        """Residuals of the rows still active, which cease to be where they meet `tol`."""
        with torch.no_grad():
            if damping := self.evaluator.damping:  # of the block itself
                wide = wider(self.evaluator.dtype)
                f = tuple((a.to(wide) - damping * b.to(wide)) / (1 - damping) for a, b in zip(f, z, strict=True))
            whole = z, f
            if self.measure_mask is not None:
                f, z = (tuple(part.masked_fill(~per_row(self.measure_mask, part), 0) for part in state) for state in whole[::-1])
            residual = residual_of(f, z, self.row_dims)
            if self.active is None or self.residual is None:
                self.residual = residual
            else:
                self.residual = torch.where(self.active, residual, self.residual)
            if self.record:
                self.step_residuals.append(self.residual)
            if self.active is not None and self.tol is not None:
                met = self._told(self.tol, *whole) if callable(self.tol) else residual <= self.tol
                self.active = self.active & ~met

    def _told(self, rule: Callable[[Any, Any], torch.Tensor], *states: State) -> torch.Tensor:
        """Which rows are done by a rule of the user's."""
        met = rule(*(state if self.evaluator.is_tuple else state[0] for state in states))
        if not isinstance(met, torch.Tensor) or met.dtype != torch.bool or met.shape != self.rows:
            got = f"{met.dtype} of {tuple(met.shape)}" if isinstance(met, torch.Tensor) else repr(met)
            raise ValueError(
                f"a function given as tol must return a bool tensor of shape {tuple(self.rows)}, True where a row is done, got {got}"
            )
        return met


def residual_of(f: State, z: State, row_dims: int = 1) -> torch.Tensor:
    """`||f - z|| / (1e-5 + ||f||)` of each row, float32, over all tensors of the state; NaN where `f` is not finite."""
    norm = lambda part: torch.linalg.vector_norm(rows(part, row_dims).float(), dim=-1)  # noqa: E731
    difference = torch.stack([norm(a - b) for a, b in zip(f, z, strict=True)])
    size = torch.stack([norm(a) for a in f])
    return difference.norm(dim=0) / (RESIDUAL_FLOOR + size.norm(dim=0))


class _Sums:
    """Sums of gradients, changed in place once they are our own tensors."""

    def __init__(self, count: int) -> None:
        self.totals: list[torch.Tensor | None] = [None] * count
        self._own = [False] * count

    def add(self, gradients: "Sequence[torch.Tensor | None]") -> None:
        for i, gradient in enumerate(gradients):
            total = self.totals[i]
            if gradient is None:
                continue
            if total is None:
                self.totals[i] = gradient
            elif self._own[i]:
                total.add_(gradient)
            else:
                self.totals[i], self._own[i] = total + gradient, True


def _without_packing() -> contextlib.AbstractContextManager:
    """Around a graph that is dropped: what the user's hooks (`save_on_cpu`, a count) pack of operations that save their own result is never freed."""
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is None:  # as nearly always, and hooks cost a call for each tensor
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda tensor: tensor)


class _Reversible(torch.autograd.Function):
    """The iteration, with its reversal as backward pass.

    The tensors are those of `z0` (none for a zero start), then the evaluator's, then the block's parameters. Kept between the passes: these,
    the last pair of states as integers with their digits, and the graphs of the last `keep` evaluations.
    """

    @staticmethod
    def forward(ctx, solve, keep, certificate, z0_count, *tensors):
        evaluator: Evaluator = solve.evaluator
        end = z0_count + len(evaluator.tensors)
        z0 = tensors[:z0_count] or None
        needed = ctx.needs_input_grad[4:]
        leaves = as_leaves(tensors[z0_count:end], needed[z0_count:end])
        # with tol the last evaluation is not known beforehand, and none is kept
        keep_from = 2 * solve.max_steps - (keep if solve.tol is None else 0)
        kept: list[Evaluation] = []

        def evaluate(state: State, number: int) -> State:
            # with a graph, though most are dropped: torch takes other kernels, with other rounding, where there is none (compiled programs, LSTM, attention
            # with a learned bias, encoder layers in eval mode), and the backward pass must meet the same ones
            keeps = number >= keep_from
            with contextlib.nullcontext() if keeps else _without_packing():
                evaluation = evaluate_with_graph(evaluator, state, leaves)
            if keeps:
                kept.append(evaluation)
            return tuple(part.detach() for part in evaluation.f)

        scratch = solve.scratch()
        y, z = solve.start(z0, scratch), solve.start(z0, scratch)
        out = solve.iterate(y, z, z0, evaluate)
        pair = (*y, *z)
        ctx.save_for_backward(*tensors, *(s.integers for s in pair), *(word for s in pair for word in s.digits.words))
        ctx.packings = [s.digits.packing() for s in pair]
        evaluator.tensors = []  # from here on they are the saved ones
        ctx.solve, ctx.kept, ctx.certificate = solve, kept, certificate
        ctx.end, ctx.z0_count, ctx.parameters = end, z0_count, tensors[end:]
        ctx.set_materialize_grads(False)  # of states on the way most have none
        states, solve.trajectory = solve.trajectory, []  # the solve is kept with the graph, which these will hold
        return (*out, *(part for state in states for part in state))

    @staticmethod
    def backward(ctx, *gradients):
        refuse_double_backward()
        solve: Solve = ctx.solve
        evaluator = solve.evaluator
        refuse_other_parameters(evaluator.block, ctx.parameters)
        saved = ctx.saved_tensors
        z0, arguments, exact = saved[: ctx.z0_count] or None, saved[ctx.z0_count : ctx.end], saved[ctx.end + len(ctx.parameters) :]
        needed = ctx.needs_input_grad[4:]
        argument_needed, parameter_needed = needed[ctx.z0_count : ctx.end], needed[ctx.end :]
        parameters = [p for p, need in zip(ctx.parameters, parameter_needed, strict=True) if need]
        leaves = as_leaves(arguments, argument_needed)
        y, z = _unpack(ctx.packings, exact, solve)
        argument_sums: list[torch.Tensor | None] = [None] * sum(argument_needed)
        parameter_sums = _Sums(len(parameters))
        segment = solve.resolution.segment
        kept, ctx.kept = ctx.kept, []  # a second backward pass over the same graph recomputes them
        mark = object()

        # Sums over the evaluations: an argument's goes into the next `autograd.grad` as a seed of its alias, so that autograd adds in the order of stored
        # backpropagation; a parameter has no alias, and its sum is kept beside (`_Sums`).
        def half_step(
            number: int,
            moved: list[ExactState],
            still: list[ExactState],
            phase: "int | torch.Tensor",
            active: torch.Tensor | None,
            weights: State,
            carried: State,
        ) -> State:
            """Undoes the half step of this evaluation, in which f at the state that stayed still moved the other one. Returns `carried + J^T weights` of the
            one that stayed; the products for arguments and parameters are added to their sums.

            What is carried over goes through the graph as the gradient of an alias, made after f: so autograd adds it to the contributions of f
            one by one in the order in which stored backpropagation would, and the sums agree to the last bit.
            """
            nonlocal argument_sums
            evaluation = kept.pop() if kept else evaluate_with_graph(evaluator, solve.values(still, phase), leaves)
            if number >= 2 * solve.taken - 2:  # the first two met: all are of one map, and share nothing but its inputs
                refuse_hidden_inputs(evaluation.f, (*evaluation.state, *evaluation.leaves), ctx.parameters, (mark, number))
            inputs = [leaf for leaf, need in zip(evaluation.leaves, argument_needed, strict=True) if need]
            outputs, seeds = [], []
            with torch.enable_grad():
                for tensor, gradient in zip((*evaluation.state, *inputs), (*carried, *argument_sums), strict=True):
                    if gradient is not None:
                        outputs.append(tensor.view_as(tensor) if tensor.layout == torch.strided else tensor.clone())
                        seeds.append(gradient)
            for part, weight in zip(evaluation.f, weights, strict=True):
                if part.requires_grad:
                    outputs.append(part)
                    seeds.append(weight)
            found = torch.autograd.grad(outputs, [*evaluation.state, *inputs, *parameters], seeds, allow_unused=True)
            end = len(still) + len(inputs)
            argument_sums = list(found[len(still) : end])
            parameter_sums.add(found[end:])
            f = solve.perturbed(tuple(part.detach() for part in evaluation.f), number)
            for state, part in zip(moved, f, strict=True):
                state.retreat(part, number // 2 % segment, active)
            return found[: len(still)]

        at_steps = _grouped(gradients, len(evaluator.shapes))  # of what was returned, then of the states after each step
        zeros = partial(torch.zeros, dtype=evaluator.dtype, device=evaluator.device)
        gz = solve.poisoned(tuple(zeros(shape) if g is None else g for g, shape in zip(at_steps[0], evaluator.shapes, strict=True)))
        gy = tuple(torch.zeros_like(g) for g in gz)
        phase = solve.phase
        with evaluator.replay(), without_hooks(parameters):
            for step in reversed(range(solve.entered)):
                if step < solve.taken:
                    if len(at_steps) > 1:
                        gz = tuple(g if more is None else g + more for g, more in zip(gz, at_steps[step + 1], strict=True))
                    active = None if solve.steps is None else solve.steps > step
                    before = phase - 1 if active is None else phase - active.long()
                    factors = [solve.coefficients(active, g) for g in gz]
                    weights = tuple(gain * g for (_, gain), g in zip(factors, gz, strict=True))
                    gy = half_step(2 * step + 1, z, y, phase, active, weights, gy)
                    weights = tuple(gain * g for (_, gain), g in zip(factors, gy, strict=True))
                    # the names are given up one by one, so that nothing is held through the next evaluation that is not needed any more
                    gz, gy = (tuple(keep * g for (keep, _), g in zip(factors, pair, strict=True)) for pair in (gz, gy))
                    if step == 0:  # y and z are one tensor here
                        gz = tuple(a + b for a, b in zip(gz, gy, strict=True))
                    gz = half_step(2 * step, y, z, before, active, weights, gz)
                    phase = before
                if step and step % segment == 0:
                    entered = None if solve.steps is None else solve.steps >= step
                    for state in (*y, *z):
                        state.undo_spill(entered)
                    phase = segment if entered is None else torch.where(entered, segment, phase)
        start = solve.start(z0, solve.scratch())
        gaps = [torch.max(torch.abs(a.integers - b.integers)) for a, b in zip((*y, *z), start * 2, strict=True) if a.integers.numel()]
        drift = torch.stack(gaps).max().to(torch.float32) * abs(solve.resolution.spacing(0)) if gaps else torch.zeros((), device="cpu")
        ctx.certificate.record(drift)
        found = iter((*argument_sums, *parameter_sums.totals))
        for_start = [g if need else None for g, need in zip(gz, needed[: ctx.z0_count], strict=False)]
        return None, None, None, None, *for_start, *(next(found) if need else None for need in needed[ctx.z0_count :])


def _grouped(tensors: Sequence, size: int) -> list[tuple]:
    return [tuple(tensors[i : i + size]) for i in range(0, len(tensors), size)]


def _unpack(packings: list[Digits], exact: "Sequence[torch.Tensor]", solve: Solve) -> tuple[list[ExactState], list[ExactState]]:
    """The pair of states from what was saved; copies of it, where the graph is kept and may be gone back through again."""
    own = [tensor.clone() if _graph_is_kept() else tensor.detach() for tensor in exact]
    words, scratch = iter(own[len(packings) :]), solve.scratch()
    states = [ExactState(v, solve.resolution, packing.filled(words), scratch) for v, packing in zip(own, packings, strict=False)]
    return states[: len(states) // 2], states[len(states) // 2 :]


def _graph_is_kept() -> bool:
    """Whether the backward pass that is running was called with retain_graph=True; True where torch does not tell."""
    tell = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return tell is None or tell()


def trainable_parameters(block: nn.Module) -> list[nn.Parameter]:
    """The parameters that require grad at this moment, each once."""
    return [parameter for parameter in block.parameters() if parameter.requires_grad]


def refuse_double_backward() -> None:
    """To be called in a backward pass: raises RuntimeError where it was asked for with create_graph=True."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "this gradient mode has no second derivative, and backward was called with create_graph=True; "
            "use gradient='backprop' for double backward"
        )


def refuse_other_parameters(block: nn.Module, parameters: Sequence[torch.Tensor]) -> None:
    """Raises RuntimeError unless the block's trainable parameters are still these very tensors."""
    current = trainable_parameters(block)
    if len(current) != len(parameters) or any(a is not b for a, b in zip(current, parameters, strict=True)):
        raise RuntimeError(
            "the block's trainable parameters are other tensors in the backward pass than in the forward pass "
            "(torch.func.functional_call, a wrapper that swaps them, or requires_grad changed in between; or the block made some in its first "
            "call, which then belongs before the solve: with torch.no_grad(): layer.block(z, x)), so the evaluations cannot be recomputed; use "
            "gradient='backprop'"
        )


class Unchanged:
    """Tensors that an evaluation shall meet again as they are now, in what their memory holds."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._versions = [(tensor, tensor._version) for tensor in tensors if not tensor.is_inference()]

    def check(self) -> None:
        """Raises RuntimeError where one of them has been changed in place since."""
        for tensor, version in self._versions:
            if tensor._version != version:
                raise RuntimeError(
                    f"a tensor of shape {tuple(tensor.shape)} that the block uses has been modified by an inplace operation between the forward and the "
                    f"backward pass (it is at version {tensor._version}, expected version {version}), so the evaluations cannot be recomputed; change it "
                    "after the backward pass, or out of place (h = h + layer(h).z, not h += layer(h).z)"
                )


@contextlib.contextmanager
def without_hooks(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Lifts the hooks of `Tensor.register_hook`: autograd calls them for every part of a gradient that is asked of it here, and again for the sum, which
    alone is what they were registered for."""
    held = [(tensor, tensor._backward_hooks) for tensor in tensors if tensor._backward_hooks]
    for tensor, _ in held:
        tensor._backward_hooks = None
    try:
        yield
    finally:
        for tensor, hooks in held:
            tensor._backward_hooks = hooks


def solve_plain(solve: Solve, z0: State | None) -> State:
    """Without gradients: nothing is kept."""
    scratch = solve.scratch()
    y, z = (solve.start(z0, scratch, reversed_later=False) for _ in range(2))
    evaluator = solve.evaluator
    # a compiled block would be compiled again for each number of rows
    compact = (
        evaluator.rows_are_apart
        and not evaluator.compiled
        and solve.row_dims == 1
        and not solve.record
        and solve.measure_mask is None
        and not callable(solve.tol)  # which may know its rows by their places
    )
    whole = evaluator.tensors, evaluator.shapes
    with torch.no_grad():
        out = solve.iterate(y, z, z0, lambda state, _: evaluator(state, evaluator.tensors), compact=compact)
    evaluator.tensors, evaluator.shapes = whole
    return out


def solve_reversible(solve: Solve, z0: State | None, keep: int, certificate: Any) -> tuple[State, list[State]]:
    """With exact gradients by reversal, of the recorded states, too. Cost: 2N evaluations forward and 2N - keep backward."""
    evaluator = solve.evaluator
    start = z0 or ()
    found = _Reversible.apply(solve, keep, certificate, len(start), *start, *evaluator.tensors, *trainable_parameters(evaluator.block))
    z, *states = _grouped(found, len(evaluator.shapes))
    return z, states


def stored_evaluation(evaluator: Evaluator, recompute_before: int) -> Callable[[State, int], State]:
    """Evaluations that autograd sees. Those of a number below `recompute_before` keep their inputs only, the others their graphs."""
    arguments = evaluator.tensors
    parameters = trainable_parameters(evaluator.block) if recompute_before else []
    unchanged = Unchanged([*arguments, *evaluator.block.parameters()] if recompute_before else [])

    def call(state: State) -> State:
        with evaluator.precision():
            return evaluator(state, arguments)

    def recomputable(state: State) -> State:
        refuse_other_parameters(evaluator.block, parameters)
        unchanged.check()
        return call(state)

    def evaluate(state: State, number: int) -> State:
        if number >= recompute_before:
            return call(state)
        contexts = lambda: (contextlib.nullcontext(), evaluator.replay(alike=True))  # noqa: E731
        return checkpoint(recomputable, state, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    return evaluate


def solve_stored(solve: Solve, z0: State | None, recompute_before: int) -> State:
    """With exact gradients by autograd: `checkpoint`, and with `recompute_before=0` `backprop`."""
    scratch = solve.scratch()
    y, z = (solve.start(z0, scratch, reversed_later=False) for _ in range(2))
    return solve.iterate(y, z, z0, stored_evaluation(solve.evaluator, recompute_before), differentiable=True)


def with_value(source: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`value`, whose gradient goes to `source` unchanged."""
    return _Relax.apply(source, None, value, 1.0, None)
