# Copyright 2026 The revdeq_hf authors. Licensed under the Apache License, Version 2.0.
"""Keys and values of a looped block in transformers' standard caches: a slot for every evaluation and layer."""

import torch
from transformers.cache_utils import Cache


class EvaluationSlots:
    """Shifts the layers of a block to the slots of the evaluation that runs, in any transformers cache.

    Slots are ordered: prelude layers, then for each evaluation the layers of the block, then coda layers; `config.num_hidden_layers` in all.
    The counter moves at each evaluation, so this serves one solve without gradients (a recomputation would write twice).

    Args:
        cache: `DynamicCache`, `StaticCache` or another cache with a slot for each of `config.num_hidden_layers`.
        first: slot of the first evaluation's first layer.
        layers: layers of the block.
    """

    def __init__(self, cache: Cache, first: int, layers: int) -> None:
        self.cache = cache
        self.layers = layers
        self._offset = first - layers

    def next_evaluation(self) -> None:
        """To be called when an evaluation begins."""
        self._offset += self.layers

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds the keys and values, (batch, heads, new tokens, dim), of a layer; returns those of all tokens."""
        return self.cache.update(keys, values, self._offset + layer_idx, *args, **kwargs)


def check_slots(cache: Cache, slots: int, max_steps: int) -> None:
    """Raises ValueError if the cache was filled by, or made for, another number of evaluations; nothing has been written then.

    Args:
        cache: the cache about to be used.
        slots: `config.num_hidden_layers` for this call.
        max_steps: steps of this call, for the message.
    """
    layers = len(cache.layers)
    lazy = getattr(cache, "layer_class_to_replicate", None) is not None  # grows on demand: only what was written counts
    if (layers != slots and not lazy) or (lazy and layers not in (0, slots)):
        raise ValueError(
            f"the cache has {layers} slots, and a solve of max_steps={max_steps} needs {slots} (one per evaluation and layer): it was made with "
            "another number of steps; use the same max_steps as before, or start with a new cache"
        )
