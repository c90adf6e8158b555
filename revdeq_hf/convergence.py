"""Learning to converge: the residual of a model's solves as a term of the loss."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .checks_revdeq import SOLVER_ARGUMENTS, partitioned
from .diagnostics import sharded_parts
from .layer_revdeq import FixedPointSolution, ReversibleFixedPoint, fixed_point_layers
from .solver_revdeq import per_row

ROUNDING = 1e-4  # residual of a place below which it is squared: what is left there has no direction


class ResidualLoss:
    """How far the solves of a model's last call ended from their fixed points, differentiable.

    A loss of labels alone is content with a state from which the answer can be read; whether it is a fixed point shows only in problems larger than those of
    the training, where what had not come to rest goes on moving. With this term mazes six times as long and wide as those of the training are solved and
    settle (docs/think_longer.md).

        residual = ResidualLoss(model)
        loss = model(**batch).loss
        loss = loss + 1.5 * share_of_training_done * residual()

    In a Trainer the second line of a `compute_loss` of your own, with `trainer.model_accepts_loss_kwargs = False`, so that both terms are divided by the
    accumulated batches. Let the weight grow from 0: first to be right, then to converge.

    Each place (a pixel, a token) counts by itself, with `||f(z) - z|| / ||f(z)||` over its channels, not squared, and the mean is taken: what does not settle
    is few places of many, and these a little, which the square of a whole example's residual hardly sees. Channels are the second dimension of states with
    four or more (grids), else the last one. Places that `measure_mask` leaves out do not count. `f` is the block without damping and noise on the path.

    Args:
        model: holds one or more `ReversibleFixedPoint`; each of its calls with gradients is measured from now on, until `remove()`.

    Returns, when called:
        0-d float32 tensor in [0, 2) or about, the mean of the solves of the model's last call; 0 where no place counts. Its gradient goes through the solves
        as well, by the layer's gradient mode: exact with "reversible".

    Cost: in each pass through a layer one more evaluation of its block, with its graph; the drift certificate is not concerned.

    Dropout in the block draws another mask for this evaluation, so that the residual stays above 0 where there is any.

    Raises:
        ValueError: the model has no fixed-point layer.
        RuntimeError: when called without a call of the model with gradients before; in a model sharded by FSDP2 or ZeRO-3, where a block is evaluated
            inside its solve alone.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = [layer for _, layer in fixed_point_layers(model)]
        within = {module for layer in layers for module in layer.block.modules()}  # a solve within a solve is part of a block
        layers = [layer for layer in layers if layer not in within]
        if not layers:
            raise ValueError(f"{type(model).__name__} has no ReversibleFixedPoint, whose residual could be measured")
        self._model = model
        self._measured: list[torch.Tensor] = []
        self._hooks = [layer.register_forward_hook(_Hook(self._measure), with_kwargs=True) for layer in layers]
        self._hooks.append(model.register_forward_pre_hook(_Hook(self._begin)))

    def __call__(self) -> torch.Tensor:
        if not self._measured:
            raise RuntimeError("no solve to measure: call the model with gradients before each call of ResidualLoss")
        found, self._measured = self._measured, []  # with it the graph would live until the next batch
        return torch.stack(found).mean()

    def remove(self) -> None:
        """Measures no more calls of the model."""
        for hook in self._hooks:
            hook.remove()

    def _begin(self, model: nn.Module, args: tuple) -> None:
        if torch.is_grad_enabled():
            self._measured = []

    def _measure(self, layer: ReversibleFixedPoint, args: tuple, kwargs: dict[str, Any], solution: FixedPointSolution) -> None:
        if not torch.is_grad_enabled():
            return
        if sharded_parts(self._model) or partitioned(layer.block.parameters()):
            raise RuntimeError(
                "ResidualLoss evaluates blocks outside of their solves, which FSDP2 and DeepSpeed's ZeRO-3 shard as a whole; train with DDP or ZeRO-2, or "
                "without it"
            )
        if kwargs.get("past_key_values") is not None:
            raise RuntimeError(
                "ResidualLoss evaluates blocks once more, which would write to the cache again; call the model with use_cache=False"
            )
        context = {key: value for key, value in kwargs.items() if key not in SOLVER_ARGUMENTS}
        from transformers.utils.output_capturing import _active_collector  # no public name, and needed here alone

        token = _active_collector.set(None)  # hidden states and attentions that are asked for are those of the solve
        try:
            f = layer.block(solution.z, *args, **context)
        finally:
            _active_collector.reset(token)
        parts = zip(f, solution.z, strict=True) if isinstance(f, tuple) else ((f, solution.z),)
        mask = kwargs.get("measure_mask")
        self._measured.append(torch.stack([_residual_of_places(*part, mask) for part in parts]).mean())


class _Hook:
    """A hook of a module; copies and pickles of the module, such as averaged weights, have one that does nothing."""

    def __init__(self, act: Callable[..., None] | None = None) -> None:
        self._act = act

    def __call__(self, *arguments: Any) -> None:
        if self._act is not None:
            self._act(*arguments)

    def __reduce__(self) -> tuple:
        return _Hook, ()


def _residual_of_places(f: torch.Tensor, z: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    channels = 1 if f.dim() > 3 else -1
    away, size = (part.float().square().sum(channels) for part in (f - z, f))
    residual = (away / (size + 1e-10) + ROUNDING**2).sqrt()
    if mask is None:
        return residual.sum() / max(1, residual.numel())
    counting = per_row(mask, residual).expand_as(residual)
    return torch.where(counting, residual, 0.0).sum() / counting.sum().clamp(min=1)
