# Copyright 2026 The revdeq_hf authors. Licensed under the Apache License, Version 2.0.
"""Approximate gradients, which look at the fixed point only: `implicit` and `phantom`; and the solvers that need no reversal.

`implicit` takes the state returned for the fixed point `z = f(z, x)`. By the implicit function theorem the gradient of a loss with
`g = dL/dz` is then `J_x^T u` for x and the parameters alike, where `u = g + J_z^T u`: a fixed-point problem again, which is solved by products of
the transposed Jacobian. It is right to the tolerance of both solves; memory is one evaluation's graph.

`phantom` (Geng et al., On Training Implicit Models, 2021) differentiates k damped iterations `z <- (1 - beta) z + beta f(z, x)` from the state
returned. Its error falls with k, at the rate of the iteration. Neither gives a gradient to the initial state.
"""

from dataclasses import dataclass
from typing import Any

import torch

from .adjoint_revdeq import (
    RESIDUAL_FLOOR,
    Unchanged,
    refuse_double_backward,
    refuse_other_parameters,
    stored_evaluation,
    trainable_parameters,
    with_value,
    without_hooks,
)
from .evaluator_revdeq import Evaluator, State, as_leaves, evaluate_with_graph, refuse_hidden_inputs
from .fixed_point_solvers_revdeq import FloatSolve, find_fixed_point
from .solver_revdeq import per_row, rows


@dataclass(frozen=True)
class Approximation:
    """Settings of this file, see `ReversibleFixedPoint`."""

    solver: str
    beta: float
    memory: int
    adjoint_tol: float
    adjoint_max_steps: int
    phantom_steps: int


def flatten(state: State, row_dims: int = 1) -> torch.Tensor:
    """The tensors of a state side by side, (rows, elements), in float32 or float64; a row is an entry of the first `row_dims` dimensions."""
    flat = torch.cat([rows(part, row_dims) for part in state], dim=-1).flatten(0, row_dims - 1)
    return flat if flat.dtype == torch.float64 else flat.float()


def unflatten(flat: torch.Tensor, evaluator: Evaluator, row_dims: int = 1) -> State:
    """The inverse of `flatten`."""
    parts = flat.split([shape[row_dims:].numel() for shape in evaluator.shapes], dim=1)
    return tuple(part.reshape(shape).to(evaluator.dtype) for part, shape in zip(parts, evaluator.shapes, strict=True))


def solve_float(
    evaluator: Evaluator,
    z0: State | None,
    max_steps: int,
    tol: float | None,
    settings: Approximation,
    recompute_before: int | None,
    row_dims: int = 1,
    record: bool = False,
    measure_mask: torch.Tensor | None = None,
) -> tuple[State, FloatSolve]:
    """Runs a solver that is not reversible, on every row by itself. With `recompute_before` autograd follows it (see `stored_evaluation`), with None not.
    What `measure_mask` leaves out is iterated with the rest, and adds nothing to any sum over a row."""
    numbers = iter(range(2 * max_steps))
    with torch.set_grad_enabled(recompute_before is not None):
        evaluate = stored_evaluation(evaluator, recompute_before or 0)
        if z0 is None:
            z0 = tuple(torch.zeros(shape, dtype=evaluator.dtype, device=evaluator.device) for shape in evaluator.shapes)
        counting = None
        if measure_mask is not None:
            counting = flatten(tuple(per_row(measure_mask, part).expand_as(part) for part in z0)) > 0
        solution = find_fixed_point(
            settings.solver,
            lambda z: flatten(evaluate(unflatten(z, evaluator, row_dims), next(numbers)), row_dims),
            flatten(z0, row_dims),
            max_steps=max_steps,
            tol=tol,
            beta=settings.beta,
            memory=settings.memory,
            floor=RESIDUAL_FLOOR,
            record=record,
            counting=counting,
        )
        leading = evaluator.shapes[0][:row_dims]
        for name in ("steps", "residual", "nonfinite"):
            setattr(solution, name, getattr(solution, name).view(leading))
        solution.step_residuals = [residual.view(leading) for residual in solution.step_residuals]
        bad = solution.nonfinite > 0
        z = tuple(part.masked_fill(per_row(bad, part), torch.nan) for part in unflatten(solution.z, evaluator, row_dims))
    return z, solution


def attach_phantom(evaluator: Evaluator, z: State, settings: Approximation) -> State:
    """`z` with the gradient of `phantom_steps` damped iterations from there. Costs as many evaluations, whose graphs are kept."""
    evaluate = stored_evaluation(evaluator, 0)
    state = tuple(part.detach() for part in z)
    for number in range(settings.phantom_steps):
        f = evaluate(state, number)
        state = tuple(torch.lerp(a, b, settings.beta) for a, b in zip(state, f, strict=True))
    return tuple(with_value(a, b).clone() for a, b in zip(state, z, strict=True))  # what may be changed in place, as with the other modes


def attach_implicit(evaluator: Evaluator, z: State, settings: Approximation, certificate: Any) -> State:
    """`z` with the gradient of the implicit function theorem. Costs one evaluation and the adjoint solve in the backward pass."""
    return _Implicit.apply(evaluator, settings, certificate, len(z), *z, *evaluator.tensors, *trainable_parameters(evaluator.block))


class _Implicit(torch.autograd.Function):
    """Passes the state on; its backward pass solves `u = g + J^T u`."""

    @staticmethod
    def forward(ctx, evaluator, settings, certificate, count, *tensors):
        ctx.evaluator, ctx.settings, ctx.certificate, ctx.count = evaluator, settings, certificate, count
        ctx.end = count + len(evaluator.tensors)
        ctx.parameters = tensors[ctx.end :]
        ctx.save_for_backward(*tensors)
        ctx.unchanged = Unchanged(evaluator.block.parameters())
        evaluator.tensors = []  # from here on they are the saved ones
        return tuple(part.clone() for part in tensors[:count])  # no views, which torch would not let anybody change in place

    @staticmethod
    def backward(ctx, *gradients):
        refuse_double_backward()
        evaluator, settings, count = ctx.evaluator, ctx.settings, ctx.count
        refuse_other_parameters(evaluator.block, ctx.parameters)
        ctx.unchanged.check()
        needed = ctx.needs_input_grad[4:]
        saved = ctx.saved_tensors  # once: torch.utils.checkpoint unpacks nothing twice
        z, arguments = saved[:count], saved[count : ctx.end]
        leaves = as_leaves(arguments, needed[count : ctx.end])
        g = flatten(gradients)
        with evaluator.replay(alike=True):
            evaluation = evaluate_with_graph(evaluator, z, leaves)
        refuse_hidden_inputs(evaluation.f, (*evaluation.state, *evaluation.leaves), ctx.parameters)
        outputs = [part for part in evaluation.f if part.requires_grad]
        chosen = [part.requires_grad for part in evaluation.f]

        def pull(inputs: list[torch.Tensor], u: torch.Tensor, last: bool) -> tuple:
            weights = [part for part, keep in zip(unflatten(u, evaluator), chosen, strict=True) if keep]
            with without_hooks(inputs):
                return torch.autograd.grad(outputs, inputs, weights, retain_graph=not last, allow_unused=True, materialize_grads=not last)

        def adjoint(u: torch.Tensor) -> torch.Tensor:
            if not outputs:
                return g
            return g + flatten(pull(list(evaluation.state), u, last=False))

        solution = find_fixed_point(
            "relaxed" if settings.solver == "reversible" else settings.solver,
            adjoint,
            g,
            max_steps=settings.adjoint_max_steps,
            tol=settings.adjoint_tol,
            beta=settings.beta,
            memory=settings.memory,
            floor=torch.finfo(g.dtype).tiny,
        )
        if solution.residual.numel():
            ctx.certificate.adjoint_residual = solution.residual.max()
        wanted = [t for t, need in zip((*leaves, *ctx.parameters), needed[count:], strict=True) if need]
        found = iter(pull(wanted, solution.z, last=True) if outputs else [None] * len(wanted))
        return None, None, None, None, *(None for _ in z), *(next(found) if need else None for need in needed[count:])
