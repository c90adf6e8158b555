# Copyright 2026 The revdeq_hf authors. Licensed under the Apache License, Version 2.0.
"""Fixed-point solvers that are not reversible, for the gradient modes that need no reversal.

All work on states flattened to (batch, elements) and look for a root of `g(z) = f(z) - z`, every example by itself (in causal models every position,
which must not see those after it through weights that they share):

    picard      z' = f(z)
    relaxed     z' = (1 - beta) z + beta f(z)
    anderson    z' = sum_i a_i ((1 - beta) z_i + beta f(z_i)), weights a that sum to 1 and minimise ||sum_i a_i g(z_i)|| over the last m
                iterates (Walker and Ni, Anderson acceleration for fixed-point iterations, 2011)
    broyden     z' = z - B g(z), B an approximate inverse Jacobian of g in m rank-one updates (Broyden, 1965, "good" variant)

A step is two evaluations, as in the reversible iteration, so that a solve of N steps costs 2N for every solver.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

FLOAT_SOLVERS = ("picard", "relaxed", "anderson", "broyden")
DIFFERENTIABLE_SOLVERS = ("picard", "relaxed")  # those that autograd may follow


@dataclass
class FloatSolve:
    """The result of `find_fixed_point`.

    Attributes:
        z: (batch, elements); in the examples that met `tol` the state that met it.
        steps: (batch,) int64.
        residual: (batch,) float32, at the start of an example's last step, or of `z` where that met `tol`.
        nonfinite: (batch,) int64, evaluations that were not finite.
        evaluations: calls of `f`.
        trajectory, step_residuals: where they were asked for, the states after and the residuals at the start of each step.
    """

    z: torch.Tensor
    steps: torch.Tensor
    residual: torch.Tensor
    nonfinite: torch.Tensor
    evaluations: int
    trajectory: list[torch.Tensor]
    step_residuals: list[torch.Tensor]


def find_fixed_point(
    solver: str,
    f: Callable[[torch.Tensor], torch.Tensor],
    z0: torch.Tensor,
    *,
    max_steps: int,
    tol: float | None,
    beta: float,
    memory: int,
    floor: float,
    record: bool = False,
    counting: torch.Tensor | None = None,
) -> FloatSolve:
    """Runs a solver.

    Args:
        solver: one of `FLOAT_SOLVERS`.
        f: maps (batch, elements) to the same.
        z0: start state, (batch, elements), float32 or float64.
        max_steps: steps of two evaluations.
        tol: relative residual at which an example stops, or None. Costs one host synchronisation a step.
        beta: relaxation of "relaxed" and "anderson".
        memory: iterates of "anderson", updates of "broyden"; each costs two state tensors.
        floor: added to the norm of f in the residual.
        record: whether to keep the states and residuals of all steps.
        counting: (batch, elements) bool, which elements count in the residual and in what "anderson" and "broyden" make of earlier states; None: all.

    Follows autograd where it is on and the solver is one of `DIFFERENTIABLE_SOLVERS`.
    """
    update: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    if solver == "picard":
        update = lambda z, value: value  # noqa: E731
    elif solver == "relaxed":
        update = lambda z, value: torch.lerp(z, value, beta)  # noqa: E731
    elif solver == "anderson":
        update = _Anderson(beta, memory, counting)
    else:
        update = _Broyden(memory, counting)
    batch = z0.shape[0]
    z = z0
    active = torch.ones(batch, dtype=torch.bool, device=z.device)
    steps = torch.zeros(batch, dtype=torch.int64, device=z.device)
    nonfinite = torch.zeros_like(steps)
    residual = torch.zeros(batch, dtype=torch.float32, device=z.device)
    evaluations = 0
    trajectory: list[torch.Tensor] = []
    step_residuals: list[torch.Tensor] = []
    for half in range(2 * max_steps):
        value = f(z)
        evaluations += 1
        with torch.no_grad():
            size = torch.linalg.vector_norm(value, dim=1)
            nonfinite += ~size.isfinite() & active
            if half % 2 == 0:
                away = torch.linalg.vector_norm(_counted(value - z, counting), dim=1)
                if counting is not None:
                    size = torch.linalg.vector_norm(_counted(value, counting), dim=1)
                relative = (away / (floor + size)).float()
                residual = torch.where(active, relative, residual)
                if record:
                    step_residuals.append(residual)
                if tol is not None:
                    active = active & ~(relative <= tol)
                    if not active.any():
                        break
                steps += active
        z = torch.where(active[:, None], update(z, value), z)
        if record and half % 2:
            trajectory.append(z)
    return FloatSolve(z, steps, residual, nonfinite, evaluations, trajectory, step_residuals)


def _counted(part: torch.Tensor, counting: torch.Tensor | None) -> torch.Tensor:
    """With 0 for what does not count."""
    return part if counting is None else torch.where(counting, part, 0.0)


class _Anderson:
    """Keeps the last `memory` iterates and their values; solves a small bordered system for the weights of each example."""

    RIDGE = 1e-10  # relative to the largest entry of the Gram matrix: keeps the system solvable when iterates coincide

    def __init__(self, beta: float, memory: int, counting: torch.Tensor | None) -> None:
        self.beta, self.memory, self.counting = beta, memory, None if counting is None else counting[:, None]
        self.states: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def __call__(self, z: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        self.states, self.values = [*self.states, z][-self.memory :], [*self.values, value][-self.memory :]
        states, values = torch.stack(self.states, 1), torch.stack(self.values, 1)  # (batch, kept, elements)
        gaps = _counted(values - states, self.counting).double()
        gram = gaps @ gaps.transpose(1, 2)
        kept = gram.shape[1]
        scale = gram.diagonal(dim1=1, dim2=2).amax(1).clamp_min(torch.finfo(torch.float64).tiny)
        identity = torch.eye(kept, dtype=gram.dtype, device=gram.device)
        gram = gram / scale[:, None, None] + self.RIDGE * identity
        # a non-finite example is told of elsewhere, and must not keep the others from being solved
        gram = torch.where(gram.isfinite().all(2).all(1)[:, None, None], gram, identity)
        weights = torch.linalg.solve(gram, torch.ones_like(gram[:, :, :1]))
        weights = (weights / weights.sum(1, keepdim=True)).to(z.dtype)
        return (weights * torch.lerp(states, values, self.beta)).sum(1)


class _Broyden:
    """`B = -I + sum_i u_i v_i^T`, starting from the plain iteration; when the memory is full it starts anew."""

    def __init__(self, memory: int, counting: torch.Tensor | None) -> None:
        self.memory, self.counting = memory, counting
        self.left: list[torch.Tensor] = []
        self.right: list[torch.Tensor] = []
        self.last: tuple[torch.Tensor, torch.Tensor] | None = None  # state and gap

    def _apply(self, gap: torch.Tensor) -> torch.Tensor:
        out = -gap
        for u, v in zip(self.left, self.right, strict=True):
            out = out + u * (v * gap).sum(1, keepdim=True)
        return out

    def _apply_transposed(self, row: torch.Tensor) -> torch.Tensor:
        out = -row
        for u, v in zip(self.left, self.right, strict=True):
            out = out + v * (u * row).sum(1, keepdim=True)
        return out

    def __call__(self, z: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        gap = value - z
        if self.last is not None:
            step, change = z - self.last[0], gap - self.last[1]
            if len(self.left) == self.memory:
                self.left, self.right = [], []
            moved = self._apply(change)
            counted = _counted(step, self.counting)  # so the rows, of which all products are, are 0 where nothing counts
            row = self._apply_transposed(counted)
            denominator = (counted * moved).sum(1, keepdim=True)
            # an example that does not move any more has no direction to learn from
            safe = denominator.abs() > torch.finfo(z.dtype).eps * counted.square().sum(1, keepdim=True)
            self.left.append(torch.where(safe, (step - moved) / torch.where(safe, denominator, 1.0), 0.0))
            self.right.append(row)
        self.last = (z, gap)
        return z - self._apply(gap)
