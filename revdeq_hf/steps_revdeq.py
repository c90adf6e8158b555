# Copyright 2026 The revdeq_hf authors. Licensed under the Apache License, Version 2.0.
"""How many steps does a solve take: the bounds of `max_steps`, and numbers of steps drawn anew for every training batch.

Training at various depths teaches a block to be right at every depth, and stable beyond those it was trained at. `steps_sampling` is a plain dict, so that it
can be kept in a model's config:

    {"distribution": "uniform", "min_steps": 2, "max_steps": 8}               each number from 2 to 8 alike
    {"distribution": "poisson", "mean": 6, "min_steps": 1, "max_steps": 32}   1 + Poisson(mean - 1), so 6 on average
    {"distribution": "lognormal_poisson", "mean": 6, "sigma": 0.5, ...}       its rate drawn from a log-normal distribution of that mean, with the
                                                                              long tail of Geiping et al., arXiv 2502.05171, section 3.3
    {"distribution": "choice", "steps": [2, 4, 16], "weights": [1, 2, 1]}     one of a list

`min_steps` (default 1) and `max_steps` (default 100,000) bound what the two Poisson distributions give.
"""

import math
import operator
from collections.abc import Mapping
from typing import Any, SupportsIndex

import torch
import torch.distributed as dist

MAX_STEPS_LIMIT = 100_000
DISTRIBUTIONS = {
    "uniform": {"min_steps", "max_steps"},
    "poisson": {"mean", "min_steps", "max_steps"},
    "lognormal_poisson": {"mean", "sigma", "min_steps", "max_steps"},
    "choice": {"steps", "weights"},
}
_host_groups: dict[Any, Any] = {}  # a group of host memory for each default process group


def check_steps(max_steps: SupportsIndex, name: str = "max_steps", written: bool = False) -> int:
    """Returns `max_steps` as an int if it is a whole number from 1 to 100,000: an int, one of NumPy's, a tensor of one.

    Raises:
        ValueError: it is not; or, of what is `written` to a config, it is no int, for JSON has no others.
    """
    number = max_steps if type(max_steps) is int else None if written else _index(max_steps)
    if number is None or not 1 <= number <= MAX_STEPS_LIMIT:
        raise ValueError(f"{name} must be a whole number from 1 to {MAX_STEPS_LIMIT}, got {max_steps!r}")
    return number


def _index(value: Any) -> int | None:
    if isinstance(value, bool) or getattr(value, "dtype", None) == torch.bool:  # operator.index takes True for 1
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def check_steps_sampling(sampling: "Mapping[str, Any] | None") -> None:
    """Raises ValueError, with what was got and what was expected, unless `sampling` is None or one of the forms above."""
    if sampling is None:
        return
    kind = sampling.get("distribution") if isinstance(sampling, Mapping) else None
    if kind not in DISTRIBUTIONS:
        raise ValueError(
            f"steps_sampling must be None or a dict whose 'distribution' is one of {', '.join(map(repr, DISTRIBUTIONS))}, got {sampling!r}"
        )
    unknown = set(sampling) - DISTRIBUTIONS[kind] - {"distribution"}
    if unknown:
        raise ValueError(f"steps_sampling with distribution {kind!r} knows {sorted(DISTRIBUTIONS[kind])}, got {sorted(unknown)}")
    if kind == "choice":
        steps, weights = sampling.get("steps"), sampling.get("weights")
        if not isinstance(steps, (list, tuple)) or not steps:
            raise ValueError(f"steps_sampling 'steps' must be a list of numbers of steps, got {steps!r}")
        for number in steps:
            check_steps(number, "steps_sampling 'steps'", written=True)
        if weights is not None and (
            not isinstance(weights, (list, tuple))
            or len(weights) != len(steps)
            or not all(_is_number(w) and w >= 0 for w in weights)
            or sum(weights) <= 0
        ):
            raise ValueError(f"steps_sampling 'weights' must hold a number >= 0 for each of 'steps', not all 0, got {weights!r}")
        return
    if kind == "uniform" and not {"min_steps", "max_steps"} <= set(sampling):
        raise ValueError(f"steps_sampling with distribution 'uniform' needs 'min_steps' and 'max_steps', got {sampling!r}")
    low = check_steps(sampling.get("min_steps", 1), "steps_sampling 'min_steps'", written=True)
    high = check_steps(sampling.get("max_steps", MAX_STEPS_LIMIT), "steps_sampling 'max_steps'", written=True)
    if low > high:
        raise ValueError(f"steps_sampling 'min_steps' must not be above 'max_steps', got {low} and {high}")
    if kind != "uniform":
        mean: Any = sampling.get("mean")
        sigma: Any = sampling.get("sigma", 0.5)
        if not _is_number(mean) or not 1 <= mean <= MAX_STEPS_LIMIT:
            raise ValueError(f"steps_sampling 'mean' must be a number from 1 to {MAX_STEPS_LIMIT}, got {mean!r}")
        if not _is_number(sigma) or not 0 <= sigma <= 10:
            raise ValueError(f"steps_sampling 'sigma' must be a number from 0 to 10, got {sigma!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def draw_steps(sampling: Mapping[str, Any]) -> int:
    """A number of steps from torch's default generator of the CPU, and the same on all ranks of a distributed run.

    That generator is what `torch.manual_seed` seeds, `torch.utils.checkpoint` replays and Trainer's checkpoints keep. Ranks take the draw of rank 0, by
    a broadcast of one number in host memory (the accelerator is not waited for), since their generators differ as soon as one of them has drawn a
    number more; so every rank must come here as often as the others.
    """
    kind = sampling["distribution"]
    low, high = sampling.get("min_steps", 1), sampling.get("max_steps", MAX_STEPS_LIMIT)
    if kind == "uniform":
        steps = int(torch.randint(low, high + 1, (), device="cpu"))
    elif kind == "choice":
        weights = torch.tensor(sampling.get("weights") or [1.0] * len(sampling["steps"]), dtype=torch.float64, device="cpu")
        steps = sampling["steps"][int(torch.multinomial(weights, 1))]
    else:
        rate = torch.full((), float(sampling["mean"]) - 1, dtype=torch.float64, device="cpu")
        if kind == "lognormal_poisson":
            sigma = sampling.get("sigma", 0.5)
            rate = rate * torch.exp(sigma * torch.randn((), dtype=torch.float64, device="cpu") - sigma**2 / 2)
        steps = min(max(1 + int(torch.poisson(rate)), low), high)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        number = torch.tensor(steps, dtype=torch.int64, device="cpu")
        dist.broadcast(number, src=0, group=_host_group())
        steps = int(number)
    return steps


def _host_group() -> Any:
    world = dist.group.WORLD
    if world not in _host_groups:
        _host_groups.clear()  # groups of an earlier run that was ended
        _host_groups[world] = dist.new_group(backend="gloo")
    return _host_groups[world]
