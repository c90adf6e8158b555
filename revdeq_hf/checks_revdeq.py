# Copyright 2026 The revdeq_hf authors. Licensed under the Apache License, Version 2.0.
"""What is refused, with what was got, what was expected and what to change: settings, states and blocks that a solve could not be exact with."""

import math
import warnings
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from .evaluator_revdeq import State
from .fixed_point_solvers_revdeq import DIFFERENTIABLE_SOLVERS, FLOAT_SOLVERS
from .solver_revdeq import rational_beta
from .steps_revdeq import check_steps, check_steps_sampling

EXACT_MODES = ("reversible", "checkpoint", "backprop")
GRADIENT_MODES = (*EXACT_MODES, "implicit", "phantom")
SOLVERS = ("reversible", *FLOAT_SOLVERS)
Tolerance = float | Callable[[Any, Any], torch.Tensor]
DRIFT_POLICIES = ("warn", "raise", "ignore")
WITH_START = ", from which the state takes its form; with z0= the state has that of z0, and x may be anything that the block takes"
# keyword arguments of a layer's call that are not the block's
SOLVER_ARGUMENTS = ("z0", "max_steps", "tol", "gradient", "output_trajectory", "num_restarts", "measure_mask")


def check_settings(of: Any, max_steps: int) -> None:
    """Raises ValueError, with what was got and what was expected, unless the settings of a layer, or of a configuration, suit `ReversibleFixedPoint`."""
    rational_beta(of.beta)
    check_steps(max_steps)
    check_steps_sampling(of.steps_sampling)
    if of.tol is not None:
        check_tol(of.tol)
    for name, allowed in (("gradient", GRADIENT_MODES), ("solver", SOLVERS), ("drift_policy", DRIFT_POLICIES)):
        check_choice(name, getattr(of, name), allowed)
    check_combination(of.gradient, of.solver)
    check_count("keep_evaluations", of.keep_evaluations, 0)
    for name in ("initial_scale", "path_noise"):
        value = getattr(of, name)
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < math.inf:
            raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
    if isinstance(of.damping, bool) or not isinstance(of.damping, Real) or not 0 <= float(of.damping) < 1:
        raise ValueError(f"damping must lie in [0, 1), got {of.damping!r}")
    for name in ("damping", "path_noise"):
        if getattr(of, name) and of.solver != "reversible":
            raise ValueError(f"{name}={getattr(of, name)} needs solver='reversible', got {of.solver!r}")
    check_restarts(of.num_restarts, of.initial_scale)


def check_restarts(num_restarts: int, initial_scale: float) -> None:
    check_count("num_restarts", num_restarts, 1)
    if num_restarts > 1 and not initial_scale:
        raise ValueError(
            f"num_restarts={num_restarts} from a start state of zero would find the same {num_restarts} times; set initial_scale > 0"
        )


def check_tol(tol: Tolerance) -> Tolerance:
    if callable(tol):
        return tol
    if isinstance(tol, bool) or not isinstance(tol, Real) or not 0 <= tol < math.inf:
        raise ValueError(
            f"tol must be None (always max_steps), a finite number >= 0, or a function of the state and the block's value, got {tol!r}"
        )
    return float(tol)


def check_combination(gradient: str, solver: str) -> None:
    if solver == "reversible" or gradient in ("implicit", "phantom") or (solver in DIFFERENTIABLE_SOLVERS and gradient != "reversible"):
        return
    allowed = "'implicit' or 'phantom'" if solver not in DIFFERENTIABLE_SOLVERS else "'checkpoint', 'backprop', 'implicit' or 'phantom'"
    raise ValueError(f"gradient={gradient!r} cannot go with solver={solver!r}; use gradient={allowed}, or solver='reversible'")


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def check_count(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}")


def check_state(state, name: str, row_dims: int) -> tuple[torch.Tensor, ...]:
    parts = state if isinstance(state, tuple) else (state,)
    if not parts or not all(isinstance(part, torch.Tensor) for part in parts):
        raise TypeError(f"{name} must be a tensor or a tuple of tensors, got {type(state).__name__}{WITH_START * (name == 'x')}")
    for part in parts:
        if not part.is_floating_point() or part.dim() < row_dims:
            shape = "(batch, ...)" if row_dims == 1 else "(batch, positions, ...)"
            found = f"{part.dtype} of shape {tuple(part.shape)}"
            raise ValueError(f"{name} must hold floating tensors of shape {shape}, got {found}{WITH_START * (name == 'x')}")
    first = parts[0]
    for part in parts[1:]:
        got, expected = ((tuple(t.shape[:row_dims]), t.dtype, t.device) for t in (part, first))
        if got != expected:
            raise ValueError(f"the tensors of {name} must agree in batch size (and positions), dtype and device, got {expected} and {got}")
    return parts


def check_measure_mask(mask: torch.Tensor, state: State) -> None:
    expected = tuple(state[0].shape[:2])
    if mask.dtype != torch.bool or tuple(mask.shape) != expected or any(tuple(part.shape[:2]) != expected for part in state):
        raise ValueError(f"measure_mask must be (batch, positions) = {expected} of torch.bool, got {tuple(mask.shape)} of {mask.dtype}")


def tell_reserved_names(block: nn.Module) -> None:
    """Warns of arguments of the block that are given by name (they have defaults), and that a call of the layer takes for its own."""
    code = getattr(block.forward, "__code__", None)
    if code is None:
        return
    first = max(3, code.co_argcount - len(block.forward.__defaults__ or ()))
    named = code.co_varnames[first : code.co_argcount + code.co_kwonlyargcount]
    if own := [name for name in SOLVER_ARGUMENTS if name in named]:
        warnings.warn(
            f"{type(block).__name__}.forward has {', '.join(own)} among its arguments, which calls of the layer take as settings of the solver, so that the "
            "block never gets them by name; rename them, or pass them as context, by position",
            stacklevel=3,
        )


def refuse_uninitialised(parameters: Iterable[nn.Parameter], block: nn.Module) -> None:
    """Raises RuntimeError for lazy modules that have not seen an input yet: they would change their parameters within the solve."""
    if any(map(is_lazy, parameters)):
        names = [name for name, parameter in block.named_parameters() if is_lazy(parameter)]
        raise RuntimeError(
            f"the block's parameter {names[0]!r} has no shape yet (a lazy module), and would get it within the solve; call the block once before: "
            "with torch.no_grad(): layer.block(z, x)"
        )


def refuse_training_batchnorm(modules: Iterable[nn.Module], block: nn.Module) -> None:
    """Raises ValueError for batch normalisation in training mode: its statistics couple the examples and change at every call."""
    for module in modules:
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            name = next((name for name, other in block.named_modules() if other is module), "")
            raise ValueError(
                f"the block holds {type(module).__name__} ({name!r}) in training mode, whose statistics change at every evaluation, so that f is "
                "not one map and cannot be reversed; use GroupNorm, LayerNorm or RMSNorm inside the block, put BatchNorm outside, or call .eval() on it"
            )


def refuse_cached_parametrizations(modules: Iterable[nn.Module]) -> None:
    """Raises RuntimeError for parametrised weights inside `torch.nn.utils.parametrize.cached()`: cached without a graph, they would lose their gradients."""
    if parametrize._cache_enabled and torch.is_grad_enabled() and any(map(parametrize.is_parametrized, modules)):
        raise RuntimeError(
            "the block has parametrised weights and the solve runs inside torch.nn.utils.parametrize.cached(), whose cache holds them with or without a "
            "graph as it happens; leave the cached() region for the solve"
        )


def refuse_function_transforms(tensors: Iterable[torch.Tensor]) -> None:
    """Raises RuntimeError inside torch.func.grad, vjp, jvp, jacrev, jacfwd or vmap, and where one of the tensors has a tangent of forward-mode derivatives."""
    dual = forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)
    if dual or torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "ReversibleFixedPoint cannot be transformed by torch.func (grad, vjp, jvp, vmap, ...) and has no forward-mode derivative: its states are "
            "changed in place; use "
            "torch.autograd.grad or backward(), with gradient='backprop' for second derivatives, and batch examples along the first dimension"
        )


def partitioned(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether DeepSpeed's ZeRO-3 keeps these parameters in parts."""
    return any(hasattr(parameter, "ds_id") for parameter in parameters)


def refuse_unreduced(x: Any, is_tuple: bool, output_trajectory: bool) -> None:
    """Raises RuntimeError where ZeRO-3 would not reduce the gradients of a solve, or too early: it does so by a hook of torch's that looks for tensors among
    what a module is given by position, and returns, and in no list or tuple of them."""
    if isinstance(x, torch.Tensor) and x.requires_grad and not is_tuple and not output_trajectory:
        return
    what = "a state of several tensors" if is_tuple else "output_trajectory=True" if output_trajectory else "an x without a gradient"
    raise RuntimeError(
        f"DeepSpeed's ZeRO-3 reduces the gradients of a solve only where x is one tensor that requires grad, and z all that is returned, got {what}; "
        "use ZeRO-2 or FSDP2, and where what comes before the solve is frozen (LoRA) call model.enable_input_require_grads(), or x.requires_grad_()"
    )
