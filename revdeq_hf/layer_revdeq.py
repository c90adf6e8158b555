# Copyright 2026 The revdeq_hf authors. Licensed under the Apache License, Version 2.0.
"""`ReversibleFixedPoint`: the equilibrium of any block, as a module, with a proof of exactness after every backward pass."""

import contextlib
import itertools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from .adjoint_revdeq import (
    Solve,
    solve_plain,
    solve_reversible,
    solve_stored,
    trainable_parameters,
)
from .certificate_revdeq import Certificate
from .checks_revdeq import (
    DRIFT_POLICIES,
    EXACT_MODES,
    GRADIENT_MODES,
    Tolerance,
    check_choice,
    check_combination,
    check_count,
    check_measure_mask,
    check_restarts,
    check_settings,
    check_state,
    check_tol,
    partitioned,
    refuse_cached_parametrizations,
    refuse_function_transforms,
    refuse_training_batchnorm,
    refuse_uninitialised,
    refuse_unreduced,
    tell_reserved_names,
)
from .evaluator_revdeq import CompiledBlock, Evaluator, State
from .implicit_revdeq import Approximation, attach_implicit, attach_phantom, solve_float, unflatten
from .solver_revdeq import per_row, rational_beta
from .steps_revdeq import check_steps, draw_steps

# evaluations up to which a compiled caller without gradients gets the whole solve in its program: its compilation takes seconds for each
WRITTEN_OUT = 64
EXPORTING_IS_TOLD = torch.__version__ >= "2.13"


def span(steps: torch.Tensor) -> str:
    """The numbers of steps of a solve in words: "4", or "4 to 7"."""
    least, most = int(steps.min()), int(steps.max())
    return f"{least}" if least == most else f"{least} to {most}"


@dataclass(repr=False)
class SolveStatistics:
    """The figures of a solve, each for every row: (batch,), or (batch, positions) with `row_dims=2`.

    Attributes:
        steps: int64, steps taken.
        residual: float32, `||f(z) - z|| / (1e-5 + ||f(z)||)` over all of a row's state, for the state at the start of the last
            step, where it costs no evaluation; for a row that met `tol`, of the very state returned. Without a gradient (`ResidualLoss` has one).
        evaluations: calls of the block, 2 a step (and one more where `tol` ended the solve).
        shapes: of the state's tensors.
        clamped: int64, evaluations in which a value of the block was beyond +-2048 and was clamped.
        nonfinite: int64, evaluations in which a value of the block was NaN or infinite.
        counting: bool, with `row_dims=2` and a `measure_mask` the rows that it says count, else None: all do.
    """

    steps: torch.Tensor
    residual: torch.Tensor | None
    evaluations: int
    shapes: tuple[torch.Size, ...]
    clamped: torch.Tensor
    nonfinite: torch.Tensor
    counting: torch.Tensor | None = None

    def __repr__(self) -> str:
        steps, residual = self.steps, self.residual
        batch = "x".join(map(str, steps.shape))
        if steps.numel() == 0:
            return f"{type(self).__name__}(batch={batch})"
        shown = "" if residual is None else f", residual mean {residual.mean().item():.3g} max {residual.max().item():.3g}"
        return (
            f"{type(self).__name__}(batch={batch}, steps={span(steps)}, evaluations={self.evaluations}{shown}, "
            f"clamped={int(self.clamped.sum())}, nonfinite={int(self.nonfinite.sum())})"
        )


FIGURES = tuple(SolveStatistics.__dataclass_fields__)


class FixedPointSolution(NamedTuple):
    """What a solve returns. (A named tuple, since DeepSpeed, FSDP and torch's own hooks look for tensors in tuples.)

    Attributes:
        z: the fixed point, of the form of `x` (or `z0`): a tensor, or a tuple of tensors. NaN in every element of a row in which
            the block was not finite.
        steps, residual, evaluations, shapes, clamped, nonfinite, counting: the figures, see `SolveStatistics`.
        trajectory: where `output_trajectory=True` asked for it, the states after each step, of the form of `z`; else None. They have exact gradients with
            "reversible", "checkpoint" and "backprop", and none with "implicit" and "phantom", which look at the fixed point alone. (Of a row in which f is
            not finite later, "reversible" gives NaN for the states before, too.)
        step_residuals: the residuals at the start of each step, (steps begun, *rows) float32, where the trajectory was asked for; else None.
    """

    z: torch.Tensor | tuple[torch.Tensor, ...]
    steps: torch.Tensor
    residual: torch.Tensor | None
    evaluations: int
    shapes: tuple[torch.Size, ...]
    clamped: torch.Tensor
    nonfinite: torch.Tensor
    counting: torch.Tensor | None = None
    trajectory: list[torch.Tensor | tuple[torch.Tensor, ...]] | None = None
    step_residuals: torch.Tensor | None = None

    @property
    def figures(self) -> SolveStatistics:
        return SolveStatistics(**{name: getattr(self, name) for name in FIGURES})

    def __repr__(self) -> str:
        return f"{type(self).__name__}{str(self.figures).removeprefix(SolveStatistics.__name__)}"

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}; the fixed point itself is its `z`")


class ReversibleFixedPoint(nn.Module):
    """Iterates a block to its fixed point `z* = f(z*, x)`, with exact gradients in constant memory.

        y' = (1 - beta) y + beta f(z,  x)
        z' = (1 - beta) z + beta f(y', x)

    from `y = z = 0` (or `z0`); McCallum, Arora and Foster, Reversible Deep Equilibrium Models, arXiv 2509.12917. States are kept so
    that every step can be undone to the last bit (see `solver_revdeq.py`), for every beta and in every precision of the block.

    Args:
        block: module called as `block(z, x, *context, **block_kwargs)`; returns what it is given as `z`, in form, shape and dtype (under
            autocast any floating dtype). Examples are the entries of the first dimension and must not influence each other.
            The same call must give the same result: torch's generators, autocast and the buffers that modules in training mode change (spectral
            norm) are replayed, so that all evaluations of a solve use the same dropout mask and the same buffers; BatchNorm in training mode is refused.
            Forward hooks fire at every evaluation, also at those of the backward pass, removed in between or not. To compile it call `layer.compile()`, or
            `torch.compile` of the whole model, which does that: both passes run the same program (torch's own `block.compile()` does not promise it,
            where shapes change or several layers have blocks of one class). Where no gradient is wanted, `torch.compile` of the whole model in eval mode
            takes in the solve, written out, if it has a fixed number of at most 32 steps; `statistics` are kept, warnings are not given.
        beta: relaxation in (0, 2), not 1. Taken to the nearest fraction of a denominator up to 1000, with a warning where
            that differs; `layer.beta` is the value in use. Converges for beta < 2 / (1 + k) if the block is k-Lipschitz in z, k < 1.
        max_steps: N >= 1; a step is two evaluations of the block.
        tol: None: always `max_steps`. A float >= 0: each row stops at the first step at whose start its relative residual is
            at most `tol`; its state is frozen there. Costs one host synchronisation a step and one evaluation to notice the end. Without gradients,
            where the block is given x alone and rows are examples, finished examples leave the batch and cost nothing any more. Or a rule of your own, with
            the solver "reversible": a function of the state and the block's value there, in the state's form, that returns a bool tensor with an entry for
            each row, True where it is done. It is called without gradients, at the start of each step, with all rows.
        row_dims: leading dimensions of the state whose entries are measured and stopped by themselves: 1, examples; 2, for states of shape
            (batch, positions, ...), also positions, for blocks that are causal.
        damping: d in [0, 1); the iteration is that of `d z + (1 - d) f(z, x)`, which has the fixed points of f: where f turns states over (eigenvalues
            near or beyond -1), and against pairs `y = f(z), z = f(y)`, in which the iteration can come to rest as well. Steps go less far. May be
            changed after training, as beta may. Solver "reversible" only, the others relax by beta.
        steps_sampling: None, or a dict such as {"distribution": "uniform", "min_steps": 2, "max_steps": 8}, see `steps_revdeq.py`: in training
            mode with gradients each solve draws its number of steps, unless `max_steps` is given in the call.
        initial_scale: standard deviation of the start state, 0: it is zero. In training mode with gradients it is drawn anew for every example, so that
            the layer learns to forget where it began (path independence, arXiv 2211.09961); else it is a fixed draw, the same for every row.
        path_noise: standard deviation of the noise that training mode with gradients adds to every value of the block on the path, replayed in the
            backward pass: for a fixed point that is found again after a push. Solver "reversible" only.
        num_restarts: R >= 1; outside of training mode with gradients R solves are run from R fixed draws of the start state, one after the other, and each
            example takes the one of the smallest residual (with `row_dims=2` the mean of its positions). Needs `initial_scale > 0`.
        gradient: "reversible" (states are reconstructed), "checkpoint" (inputs of the evaluations are kept), "backprop" (all is kept): same
            outputs, same gradients. "implicit" and "phantom": same outputs, approximate gradients, none to z0 (see `implicit_revdeq.py`).
        solver: "reversible"; or "picard", "relaxed" (any gradient but "reversible"), "anderson", "broyden" (gradients "implicit" and "phantom"), see
            `fixed_point_solvers_revdeq.py`. A step is two evaluations for each of them.
        keep_evaluations: k >= 0, the last k evaluations keep their graphs in "reversible" and "checkpoint", so that the backward pass recomputes
            2N - k. With `tol` none are kept in "reversible".
        solver_memory: iterates that "anderson", or updates that "broyden" keeps, two state tensors each.
        adjoint_tol, adjoint_max_steps: when "implicit" stops to solve for the gradient, by the same kind of solver ("relaxed" for "reversible").
        phantom_steps: damped iterations that "phantom" differentiates.
        drift_policy: what a backward pass does that did not arrive at the start state: "warn" (once), "raise" `DriftError`, "ignore".

    Cost, in evaluations of the block (a vector-Jacobian product counts 2), and what is kept between the passes beside the inputs:

    - reversible: 8N - k a training step; two states as int64, k graphs. Past 27 steps at beta = 0.5 (11 at 0.8) also log2(d / |n|) bits per
      element and step for each of the two states, 1 - beta = n/d in lowest terms.
    - checkpoint: 8N - k; 2N - k states in their own dtype, k graphs. The smaller one for few steps.
    - backprop: 6N; 2N graphs.
    - implicit: 2N + 1 and two for each of its adjoint evaluations; one state, one graph in the backward pass.
    - phantom: 2N + 3 phantom_steps; as many graphs.

    Attributes:
        drift: 0-d float32 tensor, the greatest absolute difference between the reconstructed and the true start state in the backward passes
            since the last forward pass; 0 means that they were exact. Always 0 before the first one and in the other modes.
        reversed: whether a backward pass has reversed a solve, so that `drift` says something.
        statistics: `SolveStatistics` of the last solve, None before it.
        adjoint_residual: 0-d float32 tensor, greatest relative residual of the last adjoint solve of "implicit", None before it.

    Example:
        >>> import torch
        >>> from revdeq_hf import ReversibleFixedPoint
        >>> class Block(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.linear = torch.nn.Linear(16, 16)
        ...     def forward(self, z, x):
        ...         return torch.tanh(0.5 * self.linear(z) + x)
        >>> layer = ReversibleFixedPoint(Block(), beta=0.8, max_steps=8)
        >>> solution = layer(torch.randn(4, 16))
        >>> solution.z.square().sum().backward()
        >>> layer.drift
        tensor(0.)
        >>> solution.evaluations
        16
    """

    _z3_leaf = True  # DeepSpeed's ZeRO-3 gathers the parameters once for the whole solve, and once for its backward pass

    def __init__(
        self,
        block: nn.Module,
        beta: float = 0.8,
        max_steps: int = 8,
        tol: Tolerance | None = None,
        gradient: str = "reversible",
        solver: str = "reversible",
        keep_evaluations: int = 1,
        drift_policy: str = "warn",
        row_dims: int = 1,
        steps_sampling: "Mapping[str, Any] | None" = None,
        damping: float = 0.0,
        initial_scale: float = 0.0,
        path_noise: float = 0.0,
        num_restarts: int = 1,
        solver_memory: int = 6,
        adjoint_tol: float = 1e-6,
        adjoint_max_steps: int = 50,
        phantom_steps: int = 1,
    ) -> None:
        super().__init__()
        if not isinstance(block, nn.Module):
            raise TypeError(f"block must be a torch.nn.Module, so that its parameters get gradients, got {type(block).__name__}")
        tell_reserved_names(block)
        self.block = block
        self.beta = beta
        self.max_steps = max_steps
        self.tol = tol
        self.gradient = gradient
        self.solver = solver
        self.keep_evaluations = keep_evaluations
        self.row_dims = row_dims
        self.steps_sampling = steps_sampling
        self.damping, self.initial_scale, self.path_noise, self.num_restarts = damping, initial_scale, path_noise, num_restarts
        self.solver_memory, self.phantom_steps = solver_memory, phantom_steps
        self.adjoint_tol, self.adjoint_max_steps = adjoint_tol, adjoint_max_steps
        self.statistics: SolveStatistics | None = None
        self._compiled_block: list[CompiledBlock] = []  # in a list, which does not make it a submodule
        self._compiled = False  # by `compile`: also for callers that are not compiled
        # leading dimensions whose entries share a drawn start state, where nothing trains; None: row_dims
        self.start_dims: int | None = None
        self._certificate = Certificate(drift_policy)
        self._check_settings()
        self.steps_sampling = None if steps_sampling is None else dict(steps_sampling)

    def _check_settings(self) -> None:
        """Raises ValueError unless the settings suit one another: as they were given, and in each solve, since they may be set later."""
        check_settings(self, self.max_steps)
        if self.row_dims not in (1, 2):
            raise ValueError(f"row_dims must be 1 (examples) or 2 (positions of examples), got {self.row_dims!r}")
        for name in ("solver_memory", "adjoint_max_steps", "phantom_steps"):
            check_count(name, getattr(self, name), 1)
        if not 0 <= self.adjoint_tol < math.inf:
            raise ValueError(f"adjoint_tol must be a finite number >= 0, got {self.adjoint_tol!r}")

    @property
    def beta(self) -> float:
        return self._beta

    @beta.setter
    def beta(self, beta: float) -> None:
        self._beta = float(rational_beta(beta))
        if abs(self._beta - beta) > 1e-12 * beta:  # torch.compile does not know math.isclose of a number that it has seen change
            warnings.warn(
                f"beta={beta} is not a fraction with a denominator up to 1000; beta={rational_beta(beta)}={self._beta} is used",
                stacklevel=4,
            )

    @property
    def drift(self) -> torch.Tensor:
        return self._certificate.drift

    @property
    def reversed(self) -> bool:
        return self._certificate.reversed

    @property
    def adjoint_residual(self) -> torch.Tensor | None:
        return self._certificate.adjoint_residual

    @property
    def drift_policy(self) -> str:
        return self._certificate.policy

    @drift_policy.setter
    def drift_policy(self, policy: str) -> None:
        self._certificate.policy = check_choice("drift_policy", policy, DRIFT_POLICIES)

    @property
    def _approximation(self) -> Approximation:
        return Approximation(self.solver, self.beta, self.solver_memory, self.adjoint_tol, self.adjoint_max_steps, self.phantom_steps)

    @property
    def draws_steps(self) -> bool:
        """Whether a call without `max_steps` would now draw its number of steps."""
        return self.steps_sampling is not None and self._learns

    @property
    def _learns(self) -> bool:
        return self.training and torch.is_grad_enabled()

    def extra_repr(self) -> str:
        shown = f"beta={self.beta:g}, max_steps={self.max_steps}, tol={self.tol}, gradient={self.gradient!r}, solver={self.solver!r}"
        unusual = {"steps_sampling": None, "damping": 0, "initial_scale": 0, "path_noise": 0, "num_restarts": 1}
        return shown + "".join(f", {name}={getattr(self, name)}" for name, usual in unusual.items() if getattr(self, name) != usual)

    def forward(
        self,
        x,
        *context,
        z0=None,
        max_steps: int | None = None,
        tol: Tolerance | None = None,
        gradient: str | None = None,
        output_trajectory: bool = False,
        num_restarts: int | None = None,
        measure_mask: torch.Tensor | None = None,
        **block_kwargs,
    ) -> FixedPointSolution:
        """Solves for the fixed point.

        Ways through this file: eager, `_solve`; with `layer.compile()`, or from a compiled caller that wants gradients, `_solve_apart`, eager around a compiled
        block; from a compiled caller without gradients, or under torch.export, `_solve` traced into the caller's program (`_traceable`).

        Args:
            x: injected input, (batch, ...) floating tensor, or a tuple of such; fixes the form, shape and dtype of the state unless `z0` is given.
            context: further positional arguments of the block. Tensors in them (also inside tuples, lists and dicts) get gradients.
            z0: start state instead of zero, of the state's form. Gets a gradient. Values beyond the state limit (2048 for beta < 1) are clamped
                and counted.
            max_steps, tol, gradient, num_restarts: instead of the layer's, None: these. With `z0` there is nothing to restart from, and one solve is run.
            output_trajectory: also return the state after every step, with its gradient, and the residual at the start of every step; costs a state tensor
                a step.
            measure_mask: (batch, positions) bool: which entries of the state's second dimension count in the residual, hence in `tol`, in the choice of
                restarts, in what "anderson" and "broyden" make of earlier states, and in `ResidualLoss`. For padding, which must not hold an example
                back. None: all do. (With `row_dims=2` each position has a residual of its own, and the solve is the same.)
            block_kwargs: keyword arguments of the block; tensors in them get gradients.

        Returns:
            `FixedPointSolution`.

        Raises:
            ValueError, TypeError: arguments, or what the block returns, do not fit; nothing has been changed then.
            DriftError: in the backward pass, see `drift_policy`.
        """
        if not torch.compiler.is_compiling():
            self._check_settings()
        if num_restarts is not None:
            check_restarts(num_restarts, self.initial_scale)
        restarts = self.num_restarts if num_restarts is None else num_restarts
        settings = (x, context, max_steps, tol, gradient, output_trajectory, measure_mask, block_kwargs)
        if torch.compiler.is_compiling():
            solve = self._solve if self._traceable(max_steps, tol) else self._solve_apart
        else:
            solve = self._solve_apart if self._compiled else self._solve
        if z0 is not None or not self.initial_scale:
            return solve(z0, *settings)
        check_state(x, "x", self.row_dims)
        if self._learns:
            return solve(self._start(x, None), *settings)
        if restarts > 1 and output_trajectory:
            raise ValueError(f"output_trajectory follows one solve, got num_restarts={restarts}; set num_restarts=1")
        best = solve(self._start(x, 0), *settings)
        for number in range(1, restarts):
            best = better_of(best, solve(self._start(x, number), *settings))
        self.statistics = best.figures
        return best

    def _start(self, x, number: int | None) -> "torch.Tensor | tuple[torch.Tensor, ...]":
        """A start state of the form of x: a new draw for every example, or the fixed draw of this number for all (entries of the first `start_dims`
        dimensions)."""

        def draw(part: torch.Tensor) -> torch.Tensor:
            if number is None:
                return float(self.initial_scale) * torch.randn_like(part)
            # on the CPU, which every device has: the same everywhere
            values = torch.randn(part.shape[self.start_dims or self.row_dims :], generator=generator, dtype=torch.float32, device="cpu")
            return (float(self.initial_scale) * values).to(part.device, part.dtype).expand_as(part)

        generator = torch.Generator("cpu").manual_seed(number or 0)
        with torch.no_grad():
            return tuple(map(draw, x)) if isinstance(x, tuple) else draw(x)

    def compile(self, **settings: Any) -> None:
        """Compiles the block by itself, so that both passes run the same program: the first shape gets one of its own, all others share one for any shape.

        Nothing is compiled before the first call of each, which takes some seconds longer; what cannot be compiled is an error of torch's then.
        Evaluations that write to a cache with slots of their own run uncompiled.

        Args:
            settings: of `torch.compile`, such as `mode` and `backend`. With `dynamic` one program serves all shapes (True), or each has its own (False).
        """
        self._compiled_block, self._compiled = [CompiledBlock(self.block, **settings)], True

    def _traceable(self, max_steps: int | None, tol: Tolerance | None) -> bool:
        """Whether a compiled caller gets the solve as part of its own program, which is written out evaluation by evaluation."""
        if _is_exporting():
            return True
        if torch.is_grad_enabled() or any(module.training for module in self.block.modules()):  # dropout: one mask for all evaluations
            return False
        steps = self.max_steps if max_steps is None else max_steps
        return self.solver == "reversible" and self.tol is None and tol is None and not self.initial_scale and 2 * steps <= WRITTEN_OUT

    @torch.compiler.disable
    def _solve_apart(self, z0, x, context, max_steps, tol, gradient, output_trajectory, measure_mask, block_kwargs) -> FixedPointSolution:
        """Eager in a compiled caller; the block is compiled by itself, and the same program serves both passes."""
        self._check_settings()
        settings = (z0, x, context, max_steps, tol, gradient, output_trajectory, measure_mask, block_kwargs)
        if any(hasattr(value, "next_evaluation") for value in block_kwargs.values()):
            return self._solve(*settings)  # a cache with slots for each evaluation, which would be a program of its own each
        compiled = self._compiled_block
        if not compiled or compiled[0].block is not self.block:
            self._compiled_block = [CompiledBlock(self.block, **(compiled[0].settings if compiled else {}))]
        return self._solve(*settings, block=self._compiled_block[0])

    def _solve(
        self, z0, x, context, max_steps, tol, gradient, output_trajectory, measure_mask, block_kwargs, block: nn.Module | None = None
    ) -> FixedPointSolution:
        block = self.block if block is None else block
        mode = self.gradient if gradient is None else check_choice("gradient", gradient, GRADIENT_MODES)
        check_combination(mode, self.solver)
        state = check_state(x if z0 is None else z0, "x" if z0 is None else "z0", self.row_dims)
        if z0 is not None and isinstance(x, torch.Tensor) and x.dim() and x.shape[0] != state[0].shape[0]:
            raise ValueError(
                f"x and z0 must agree in their first dimension (the batch), got {x.shape[0]} and {state[0].shape[0]}; what all examples share goes in as "
                "context, layer(x, shared)"
            )
        if measure_mask is not None:
            check_measure_mask(measure_mask, state)
        within_rows, counting = (measure_mask, None) if self.row_dims == 1 else (None, measure_mask)
        if max_steps is not None:
            steps = check_steps(max_steps)
        elif self.draws_steps:
            assert self.steps_sampling is not None
            steps = draw_steps(self.steps_sampling)
        else:
            steps = self.max_steps
        tol = self.tol if tol is None else tol
        tol = None if tol is None else check_tol(tol)
        if callable(tol) and self.solver != "reversible":
            raise ValueError(f"a function given as tol needs solver='reversible', got {self.solver!r}")
        is_tuple = isinstance(x if z0 is None else z0, tuple)
        evaluator = Evaluator(block, (x, context, block_kwargs), is_tuple, state, float(self.damping))
        parameters = [p for module in evaluator.modules for p in module._parameters.values() if p is not None]
        if not torch.compiler.is_compiling():
            refuse_uninitialised(parameters, self.block)
        refuse_training_batchnorm(evaluator.modules, self.block)
        refuse_cached_parametrizations(evaluator.modules)
        refuse_function_transforms(itertools.chain(state, evaluator.tensors, parameters))
        start = None if z0 is None else state
        # what autograd follows by itself need not be among the arguments: keys in a cache, for example
        # what is exported of a model in eval mode is its inference path
        following = torch.is_grad_enabled() and (self.block.training or not _is_exporting())
        wants_gradient = following and (
            mode in ("backprop", "checkpoint", "phantom")
            or any(t.requires_grad for t in (*(start or ()), *evaluator.tensors))
            or bool(trainable_parameters(self.block))
        )
        if wants_gradient and partitioned(parameters):
            refuse_unreduced(x, is_tuple, output_trajectory)
        evaluator.differentiated = wants_gradient
        # of a compiled block an evaluation with a graph would be another program
        evaluator.unfollowed = following and not wants_gradient and not evaluator.compiled
        with contextlib.nullcontext() if torch.compiler.is_compiling() else _undone_on_failure(evaluator, state):
            statistics, z, states, residuals = self._run(evaluator, start, steps, tol, mode, wants_gradient, output_trajectory, within_rows)
        statistics.counting = counting
        self.statistics = statistics
        trajectory, step_residuals = None, None
        if output_trajectory:
            trajectory, step_residuals = [state if is_tuple else state[0] for state in states], torch.stack(residuals)
        figures = {name: getattr(statistics, name) for name in FIGURES}  # torch 2.11 traces no vars()
        return FixedPointSolution(z if is_tuple else z[0], **figures, trajectory=trajectory, step_residuals=step_residuals)

    def _run(
        self,
        evaluator: Evaluator,
        start: State | None,
        steps: int,
        tol: Tolerance | None,
        mode: str,
        wants_gradient: bool,
        record: bool,
        measure_mask: torch.Tensor | None = None,
    ) -> "tuple[SolveStatistics, State, Sequence[State], list[torch.Tensor]]":
        """The solve in its gradient mode: its figures, the state, and where they shall be recorded the states after and the residuals at the start of each
        step."""
        if not torch.compiler.is_compiling():
            self._certificate.catch_up()
        recompute_before = 2 * steps - self.keep_evaluations if mode == "checkpoint" else 0
        follow = wants_gradient and mode in EXACT_MODES
        if self.solver == "reversible":
            noise = float(self.path_noise) if self._learns else 0.0
            seed = int(torch.randint(2**62, (), device="cpu")) if noise else 0
            solve = Solve(evaluator, self.beta, steps, tol, self.row_dims, record, noise, seed, measure_mask)
            if not follow:
                z, states = solve_plain(solve, start), solve.trajectory
            elif mode == "reversible":
                self._certificate.open()
                z, states = solve_reversible(solve, start, min(self.keep_evaluations, 2 * steps), self._certificate)
            else:
                z, states = solve_stored(solve, start, recompute_before), solve.trajectory
            taken = solve.steps
            if taken is None:
                taken = torch.full(solve.rows, steps, dtype=torch.int64, device=evaluator.device)
            statistics = SolveStatistics(taken, solve.residual, solve.evaluations, evaluator.shapes, solve.clamped, solve.nonfinite)
            residuals = solve.step_residuals
            if not torch.compiler.is_compiling():
                self._certificate.watch_clamping(solve.clamped, solve.resolution.value_limit)
        else:
            recomputed = recompute_before if follow else None
            assert not callable(tol)
            z, found = solve_float(evaluator, start, steps, tol, self._approximation, recomputed, self.row_dims, record, measure_mask)
            states, residuals = [unflatten(state, evaluator, self.row_dims) for state in found.trajectory], found.step_residuals
            clamped = torch.zeros_like(found.nonfinite)
            statistics = SolveStatistics(found.steps, found.residual, found.evaluations, evaluator.shapes, clamped, found.nonfinite)
        if wants_gradient and evaluator.autocast:
            torch.clear_autocast_cache()  # weights cast without a graph must not be found by who needs one (torch 2.13 sees to it itself)
        if mode not in EXACT_MODES:
            evaluator.damping = 0.0  # these take the block itself, and relax by beta
        if wants_gradient and mode == "implicit":
            z = attach_implicit(evaluator, z, self._approximation, self._certificate)
        elif wants_gradient and mode == "phantom":
            z = attach_phantom(evaluator, z, self._approximation)
        return statistics, z, states, residuals


def _is_exporting() -> bool:
    """Whether torch.export traces. In torch 2.11 every trace by torch.compile says so, and only exports without such a trace (`strict=False`) are known."""
    return torch.compiler.is_exporting() and (EXPORTING_IS_TOLD or not torch.compiler.is_dynamo_compiling())


def fixed_point_layers(model: nn.Module) -> list[tuple[str, ReversibleFixedPoint]]:
    """The fixed-point layers of a model (wrapped or not) with their names, in order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, ReversibleFixedPoint)]


def better_of(one: FixedPointSolution, other: FixedPointSolution) -> FixedPointSolution:
    """For each example the solution of the smaller residual (mean over its positions); the evaluations are those of both."""

    def rank(solution: FixedPointSolution) -> torch.Tensor:
        assert solution.residual is not None
        bad = (solution.nonfinite > 0) | solution.residual.isnan()  # the residual alone tells only whether the last evaluation was finite
        residual = solution.residual.masked_fill(bad, math.inf)
        return residual.flatten(1).mean(1) if residual.dim() > 1 else residual

    other_is_better = rank(other) < rank(one)

    def choose(a, b):
        return tuple(map(choose, a, b)) if isinstance(a, tuple) else torch.where(per_row(other_is_better, a), b, a)

    chosen = {name: choose(getattr(one, name), getattr(other, name)) for name in ("z", "steps", "residual", "clamped", "nonfinite")}
    return one._replace(**chosen, evaluations=one.evaluations + other.evaluations)


@contextlib.contextmanager
def _undone_on_failure(evaluator: Evaluator, state: State) -> Iterator[None]:
    """Puts generators and buffers back where the solve fails. Adds to torch's own message of an allocation in the forward pass that failed, at whose
    beginning `auto_find_batch_size` looks, what a user can change."""
    try:
        yield
    except BaseException as error:
        evaluator.rewind()
        if not isinstance(error, RuntimeError):
            raise
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        count, each = len(state[0]), sum(part[0].numel() * part.element_size() for part in state if len(part))
        raise type(error)(
            f"{error}\nthe fixed point of {count} examples, each with a state of {each:,} bytes, did not fit into memory; take a smaller batch, to which "
            "what a solve needs is proportional, smaller examples, or torch.no_grad() where no gradient is needed"
        ) from error
