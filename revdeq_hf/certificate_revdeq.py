# Copyright 2026 The revdeq_hf authors. Licensed under the Apache License, Version 2.0.
"""The proof of a backward pass that reversed its solve: how far from the start state it arrived, and what is done about it."""

import warnings
from collections.abc import Callable
from typing import Any

import torch


class DriftError(RuntimeError):
    """A backward pass did not arrive at the start state, and `drift_policy` is "raise"."""


class _Glances:
    """Looks at numbers on a device without making the host wait for them.

    On the CPU at once. On an accelerator the number is copied in the background and looked at, once it has arrived, by a later `catch_up`.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[torch.Tensor, torch.Event, Callable[[float], None]]] = []

    def at(self, number: torch.Tensor, act: Callable[[float], None], wait: bool = False) -> None:
        if number.device.type == "meta":  # no number
            return
        if wait or number.device.type == "cpu":
            act(float(number))
            return
        copied = torch.empty_like(number, device="cpu", pin_memory=True)  # into pageable memory the host would wait for the copy
        copied.copy_(number, non_blocking=True)
        event = torch.Event(number.device)
        event.record(torch.accelerator.current_stream(number.device))  # without it: of the current device, which may be another
        self._waiting = [*self._waiting[-8:], (copied, event, act)]

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles of a layer begin without what waits, whose events belong to this process."""
        return {"_waiting": []}

    def catch_up(self) -> None:
        arrived = [item for item in self._waiting if item[1].query()]
        self._waiting = [item for item in self._waiting if item not in arrived]
        for number, _, act in arrived:
            act(float(number))


class Certificate:
    """The drift of a layer's backward passes, and what is done about it.

    Attributes:
        drift: 0-d float32, the greatest of the backward passes since the last forward pass.
        reversed: whether there has been one that reversed its solve.
    """

    def __init__(self, policy: str) -> None:
        self.policy = policy
        self.drift = torch.zeros((), dtype=torch.float32, device="cpu")  # models are made on the meta device
        self.reversed = False
        self.adjoint_residual: torch.Tensor | None = None
        self._glances = _Glances()
        self._new_account = True
        self._warned: set[str] = set()

    def open(self) -> None:
        """Called in each forward pass that will be reversed."""
        self._new_account = True

    def catch_up(self) -> None:
        """Called in each forward pass: acts on what has become known since."""
        self._glances.catch_up()

    def record(self, drift: torch.Tensor) -> None:
        """Called at the end of each backward pass with its drift, 0-d float32.

        Raises:
            DriftError: it is not 0, and the policy is "raise".
        """
        self.drift = drift if self._new_account else torch.maximum(self.drift, drift)
        self._new_account, self.reversed = False, True
        if self.policy != "ignore":
            self._glances.at(drift, self._judge, wait=self.policy == "raise")

    def watch_clamping(self, clamped: torch.Tensor, limit: float) -> None:
        """Called after each solve with the counts of clamped evaluations of the rows."""
        if "clamped" not in self._warned:
            self._glances.at(clamped.sum(), lambda count: self._warn_clamped(count, limit))

    def _warn_clamped(self, count: float, limit: float) -> None:
        if count:
            self._warn(
                "clamped",
                f"values of the block beyond +-{limit:g} were clamped in {count:g} evaluations of rows: the state grows out of the range in "
                "which it is kept exactly. Bound the block's output (a norm at its end, smaller weights), lower beta, or scale x down. "
                "Later occurrences are only counted (solution.clamped)",
            )

    def _judge(self, drift: float) -> None:
        if drift == 0.0:
            return
        message = (
            f"the reversible backward pass did not reconstruct its start state: drift {drift:.3g}, expected 0. The gradients of this pass "
            "are wrong, because the block did not give the same result twice for the same input. Likely causes: a nondeterministic kernel "
            "(see torch.use_deterministic_algorithms), random numbers from outside torch's default generators, a block that counts its calls, "
            "parameters or buffers changed between the passes, a block compiled otherwise than by "
            "layer.compile(), which met another program, or kernels chosen for one of the passes only (torch.nn.attention.sdpa_kernel, "
            "deterministic algorithms). "
            "gradient='checkpoint' tolerates small differences"
        )
        if self.policy == "raise":
            raise DriftError(message)
        self._warn("drift", message)

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, stacklevel=2)
