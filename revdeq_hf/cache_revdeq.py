# Copyright 2026 The revdeq_hf authors. Licensed under the Apache License, Version 2.0.
"""Keys and values of a looped block in transformers' standard caches: which slot belongs to which evaluation and layer?

Slots are ordered: prelude layers, the fixed point's, coda layers; `config.num_hidden_layers` in all. The fixed point has

    kv_cache="per_evaluation"   for each evaluation the layers of the block, 2N in all. A token attends to its predecessors' keys and values of
                                the same evaluation, as in the forward pass over the whole text, which this reproduces exactly.
    kv_cache="shared"           the layers of the block once, for the last evaluation. Every evaluation of a token attends to what its
                                predecessors ended with: 2N times smaller, the same at the fixed point, an approximation before it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

# how transformers calls a cache in arguments and outputs: "past_key_values", and from 5.24 on "cache"
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"


def one_cache(cache: Cache | None, past_key_values: Cache | None, others: Mapping[str, Any] | None = None) -> Cache | None:
    """The cache of a call, which may be given by either name.

    Raises:
        ValueError: by both; or one is among the `others` of the call's keywords, under a name that nobody would look at, and wrong tokens would come out.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are two names of one argument, got both; pass one of them")
    if unseen := [name for name, value in (others or {}).items() if isinstance(value, Cache)]:
        raise ValueError(f"a cache was passed as {unseen[0]!r}, which this model does not know; it takes `past_key_values` or `cache`")
    return past_key_values if cache is None else cache


class EvaluationSlots:
    """The cache as the block's layers see it while a solve runs (`kv_cache="per_evaluation"`).

    The counter moves at each evaluation, so this serves one solve without recomputation (which would write twice).

    Args:
        cache: `DynamicCache`, `StaticCache` or another cache with a slot for each of `config.num_hidden_layers`.
        first: slot of the first evaluation's first layer.
        layers: layers of the block.
        alternating: whether the solver evaluates two states in turn, as the reversible iteration does.
    """

    def __init__(self, cache: Cache, first: int, layers: int, alternating: bool = True) -> None:
        self.cache = cache
        self.first = first
        self.layers = layers
        self.alternating = alternating
        self.evaluation = -1
        # of the last evaluation of an even and of an odd number: the keys and values of each layer
        self._last: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[], []]

    def next_evaluation(self) -> None:
        """To be called when an evaluation begins."""
        self.evaluation += 1
        self._last[self.evaluation % 2] = []

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds the keys and values, (batch, heads, new tokens, dim), of a layer; returns those of all tokens."""
        self._last[self.evaluation % 2].append((keys, values))
        return self.cache.update(keys, values, self.first + self.evaluation * self.layers + layer_idx, *args, **kwargs)

    def finish(self, evaluations: int) -> None:
        """To be called after the solve: where it stopped before all its `evaluations`, the remaining slots get what they would have got.

        A token that has stopped keeps its pair of states, so that evaluations of even number go on seeing its z and those of odd number its y, and with
        one layer in the block their keys and values stay the same too. (With several layers, those of the later layers would follow what
        the predecessors still do; they are kept as they were, which is right to `tol`.)
        """
        for evaluation in range(self.evaluation + 1, evaluations):
            kept = self._last[(evaluation if self.alternating else self.evaluation) % 2] or self._last[0]
            for layer, (keys, values) in enumerate(kept):
                self.cache.update(keys, values, self.first + evaluation * self.layers + layer)


class SharedSlots:
    """The same for `kv_cache="shared"`: each evaluation writes over what the one before it wrote."""

    def __init__(self, cache: Cache, first: int) -> None:
        self.cache = cache
        self.first = first
        self.evaluation = -1

    def next_evaluation(self) -> None:
        self.evaluation += 1

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        slot = self.first + layer_idx
        if self.evaluation:
            _take_back(self.cache.layers[slot], keys.shape[-2])
        return self.cache.update(keys, values, slot, *args, **kwargs)

    def finish(self, evaluations: int) -> None:
        """Nothing is left to do: the last evaluation's keys and values are in place, whichever it was."""


def _take_back(layer, tokens: int) -> None:
    """Removes the last tokens of a cache layer."""
    if type(layer) is StaticLayer:  # what was written there will be overwritten
        layer.cumulative_length.sub_(tokens)
    else:
        layer.crop(-tokens)


def check_slots(cache: Cache, slots: int, max_steps: int, kv_cache: str) -> None:
    """Raises ValueError if the cache was filled by, or made for, another number of evaluations, or cannot serve `kv_cache`; nothing has been written then.

    Args:
        cache: the cache about to be used.
        slots: `config.num_hidden_layers` for this call.
        max_steps: steps of this call, for the message.
        kv_cache: as in the config.
    """
    layers: Sequence = cache.layers
    lazy = getattr(cache, "layer_class_to_replicate", None) is not None  # grows on demand: only what was written counts
    if (len(layers) != slots and not lazy) or (lazy and len(layers) not in (0, slots)):
        needed = "one per layer" if kv_cache == "shared" else "one per evaluation and layer"
        raise ValueError(
            f"the cache has {len(layers)} slots, and a solve of max_steps={max_steps} with kv_cache={kv_cache!r} needs {slots} ({needed}): it was made "
            "with another number of steps, or for another model; use the same max_steps as before, or start with a new cache"
        )
    if kv_cache == "shared":
        if getattr(cache, "offloading", False):
            raise ValueError(
                "kv_cache='shared' visits the same slots at every evaluation, which an offloaded cache moves away after one visit; the shared cache is small, "
                "so keep it on the device (a dynamic or static cache without offloading), or use kv_cache='per_evaluation'"
            )
        kinds = {type(layer) for layer in layers} | ({cache.layer_class_to_replicate} if lazy else set())
        for kind in kinds - {DynamicLayer, StaticLayer}:  # quantized layers inherit a crop that does not reach what is quantized
            raise ValueError(
                f"kv_cache='shared' writes over the last tokens of a slot, which {kind.__name__} does not allow; use a dynamic or a static "
                "cache, or kv_cache='per_evaluation'"
            )
