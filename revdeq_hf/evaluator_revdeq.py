# Copyright 2026 The revdeq_hf authors. Licensed under the Apache License, Version 2.0.
"""Calls of the block that give the same bits whenever they are repeated, with or without a graph."""

import contextlib
import itertools
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

State = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class _Slot:
    """Stands for the tensor of this number in a call's arguments."""

    index: int


def _map_leaves(act: Callable[[Any], Any], tree: Any) -> Any:
    """`tree` with `act` done to what plain tuples, lists and dicts, named tuples and ordered dicts hold. Not torch's pytree, which would take caches apart,
    whose copies the block would write to."""
    kind = type(tree)
    if not issubclass(kind, tuple | list | dict):  # as most are
        return act(tree)
    if kind in (tuple, list):
        return kind(_map_leaves(act, item) for item in tree)
    if kind in (dict, OrderedDict):
        return kind((key, _map_leaves(act, item)) for key, item in tree.items())
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return kind(*(_map_leaves(act, item) for item in tree))
    return act(tree)


def _take_tensors(tree: Any, found: list[torch.Tensor]) -> Any:
    """`tree` with every tensor replaced by a `_Slot`; the tensors are appended to `found`."""

    def take(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        found.append(leaf)
        return _Slot(len(found) - 1)

    return _map_leaves(take, tree)


def _put_tensors(tree: Any, tensors: "list[torch.Tensor]") -> Any:
    """The inverse of `_take_tensors`."""
    return _map_leaves(lambda leaf: tensors[leaf.index] if isinstance(leaf, _Slot) else leaf, tree)


def generator_states(device: torch.device) -> list[torch.Tensor]:
    """The states of torch's default generators, of the CPU and of an accelerator."""
    states = [torch.get_rng_state()]
    if device.type not in ("cpu", "meta"):
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def set_generator_states(states: list[torch.Tensor], device: torch.device) -> None:
    """Puts back what `generator_states` returned."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.get_device_module(device).set_rng_state(states[1], device)


@contextlib.contextmanager
def same_convolutions(device: torch.device) -> Iterator[None]:
    """Convolutions by an algorithm that depends on their shapes alone and repeats its bits.

    With `torch.backends.cudnn.benchmark` each thread measures for itself which one is fastest, and the backward pass is another thread.
    `torch.backends.cudnn.flags` would set every other flag as well, the precision of float32 among them.
    """
    if device.type != "cuda":
        yield
        return
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before


# beside floating-point and complex numbers; torch compares neither quantised ones nor bits
COMPARED = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)


class KeptBuffer:
    """A module's buffer as it is now: which tensor, and a copy of its values.

    Attributes:
        unversioned: whether it is written to without a new version, which then says nothing.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name, self.tensor = module, name, module._buffers[name]
        self.unversioned = False
        assert self.tensor is not None
        self.value, self._version = self.tensor.detach().clone(), self.tensor._version

    @property
    def moved(self) -> bool:
        """Whether it was changed in place, or another one has taken its place."""
        assert self.tensor is not None
        return self.unversioned or self.module._buffers[self.name] is not self.tensor or self.tensor._version != self._version

    @property
    def comparable(self) -> bool:
        t = self.tensor
        assert t is not None
        told = t.dtype.is_floating_point or t.dtype.is_complex or t.dtype in COMPARED
        return type(t) is torch.Tensor and t.layout == torch.strided and not t.is_nested and told

    def differs(self) -> torch.Tensor:
        """A 0-d bool tensor: whether it holds other values now."""
        assert self.tensor is not None
        if self.tensor.shape != self.value.shape:
            return torch.ones((), dtype=torch.bool, device=self.tensor.device)
        now, before = self.tensor.detach(), self.value
        unlike = now != before
        if now.dtype.is_floating_point or now.dtype.is_complex:
            unlike &= ~(now.isnan() & before.isnan())
        return unlike.any()

    @torch.no_grad()
    def put_back(self) -> None:
        assert self.tensor is not None
        if self.unversioned or self.tensor._version != self._version:  # not one that was replaced only: a stored graph may need it as it is
            if self.tensor.shape != self.value.shape:
                self.tensor.resize_(self.value.shape)
            self.tensor.copy_(self.value)
            self._version = self.tensor._version
        self.module._buffers[self.name] = self.tensor


# dicts of a module, by the number of a hook
FORWARD_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


def _without(hooks: dict, numbers: list[int]) -> None:
    for number in numbers:
        hooks.pop(number, None)


def moved_buffers(buffers: "list[KeptBuffer]", device: torch.device) -> "list[KeptBuffer]":
    """Those that were changed or replaced. Where versions tell nothing values are compared: torch's fused fake quantization writes to its buffers without a
    new version, and so does who writes to `.data`. An accelerator is waited for once, but for a CUDA graph in the making, which no host may wait for."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return [buffer for buffer in buffers if buffer.moved]
    still = [b for b in buffers if not b.moved and b.comparable and (b.value.device.type != "meta" or device.type == "meta")]
    if still:
        differ = torch.stack([buffer.differs().to(device) for buffer in still])
        if type(differ) is torch.Tensor and device.type != "meta":  # in a plan of memory there are no values
            for buffer, unlike in zip(still, differ.tolist(), strict=True):
                buffer.unversioned = unlike
    return [buffer for buffer in buffers if buffer.moved]


class SteadyBuffer:
    """A module's buffer that no evaluation changes, by its identity and version, and not by a copy."""

    def __init__(self, module: nn.Module, name: str, tensor: torch.Tensor) -> None:
        self.module, self.name, self.tensor = module, name, tensor
        self._version = _version_of(tensor)

    @property
    def changed(self) -> bool:
        """Whether it was changed in place."""
        return _version_of(self.tensor) != self._version

    @property
    def replaced(self) -> bool:
        """Whether another one has taken its place."""
        return self.module._buffers.get(self.name) is not self.tensor


def _version_of(tensor: torch.Tensor) -> int:
    """Of its changes those that replays have not taken back."""
    return tensor._version - getattr(tensor, "_taken_back", 0)


def kept_buffers(modules: Iterable[nn.Module]) -> list[KeptBuffer]:
    """The buffers of the modules themselves."""
    return [
        KeptBuffer(module, name)
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_inference()
    ]


def memory_format(tensor: torch.Tensor, block: nn.Module) -> torch.memory_format:
    """channels_last where a tensor is laid out so (and not contiguous as well): the states of a solve keep to it.

    On the CPU only for blocks with an attribute `channels_last_on_cpu = True`: there torch 2.13's GroupNorm, given channels_last values that need no
    gradient, crashes the process in its backward pass.
    """
    if tensor.device.type == "cpu" and not getattr(block, "channels_last_on_cpu", False):
        return torch.contiguous_format
    for dims, form in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if tensor.dim() == dims and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=form):
            return form
    return torch.contiguous_format


def _lengths(cache: Any) -> list[Any]:
    """How many tokens each layer of a cache of transformers' holds; of anything else nothing."""
    found = [layer.get_seq_length() for layer in cache.layers if hasattr(layer, "get_seq_length")] if isinstance(cache.layers, list) else []
    return [int(length) if isinstance(length, torch.Tensor) else length for length in found]


ANY_SHAPE = ()


class CompiledBlock(nn.Module):
    """A block compiled for one layer: every call of a shape runs the same program, whatever is called in between.

    torch.compile by itself does not promise that. It keeps programs by the code they were made of, which all blocks of a class share, takes the one used last
    of those that fit, and from the second shape on makes programs for any shape: a backward pass could then meet another one than its forward pass, which
    rounds otherwise. Here the shape that came first has a program of its own, all others one for any shape, both of code that nobody shares.

    Args:
        block: the layer's.
        settings: of torch.compile; with `dynamic` all shapes share what it makes.
    """

    _numbers = itertools.count()

    def __init__(self, block: nn.Module, **settings: Any) -> None:
        super().__init__()
        self._orig_mod = block  # the name by which compiled modules are known
        self.settings = settings
        self.channels_last_on_cpu = getattr(block, "channels_last_on_cpu", False)
        self._programs: dict[tuple, Callable] = {}

    @property
    def block(self) -> nn.Module:
        return self._orig_mod

    def __getstate__(self) -> dict[str, Any]:
        """Copies compile anew: programs hold on to the block they were made of."""
        return {**self.__dict__, "_programs": {}}

    def forward(self, z: Any, x: Any, *context: Any, **kwargs: Any) -> Any:
        """As the block is called, and with what it returns; the first call of a program takes the seconds of its compilation."""
        shape = tuple(tuple(part.shape) for part in (z if isinstance(z, tuple) else (z,)))
        alone = self.settings.get("dynamic") is None and (not self._programs or shape in self._programs)
        key = shape if alone else ANY_SHAPE
        if key not in self._programs:
            self._programs[key] = torch.compile(self._own_code(), **{"dynamic": not alone, **self.settings})
        return self._programs[key](z, x, *context, **kwargs)

    def _own_code(self) -> Callable:
        """A call of the block whose code object is new, by which torch keeps programs apart."""
        block = self.block

        def evaluate(z: Any, x: Any, *context: Any, **kwargs: Any) -> Any:
            return block(z, x, *context, **kwargs)

        code = evaluate.__code__.replace(co_name=f"evaluate_{next(self._numbers)}")
        return types.FunctionType(code, evaluate.__globals__, code.co_name, closure=evaluate.__closure__)


class _Draws(TorchDispatchMode):
    """Within it `found` tells whether an operation of this thread has drawn random numbers."""

    found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            names = [argument.name for argument in func._schema.arguments]
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            self.found |= given.get("dropout_p", 0.0 if "dropout_p" in names else 1.0) > 0  # attention has the tag without dropout, too
        return func(*args, **kwargs)


class Evaluator:
    """Calls the block so that the same state gives the same bits, at any later time.

    It restores what a recomputation would otherwise lose: the autocast state of the forward pass, the random numbers, and the buffers that modules in
    training mode change (spectral norm's vectors). All evaluations of a solve draw the same random numbers (one dropout mask per
    solve) and begin with the same buffers, so that `f` is one map, with a fixed point, during the solve; for the caller, a solve moves generators and
    buffers on as one call of the block does. What the block draws and changes is seen at its first evaluation.

    Args:
        block: called as `block(z, x, *context, **kwargs)`.
        arguments: `(x, context, kwargs)`; tensors in them, also inside tuples, lists and dicts, are taken out into `tensors`.
        is_tuple: whether states are handed to the block as a tuple.
        state: tensors of the shapes, dtype and device that the block must return.
        damping: share of the state in each value: `damping z + (1 - damping) f(z)`, which has the block's fixed points.

    Attributes:
        modules: the block and all that it holds.
        differentiated: set it where a gradient is wanted: evaluations may then be made again, and meet the hooks of the forward pass.
        unfollowed: set it where gradients are on and nothing that the block is known to use wants one: the first evaluation then looks, with a graph, for what
            it uses beside that.
    """

    def __init__(self, block: nn.Module, arguments: tuple, is_tuple: bool, state: State, damping: float = 0.0) -> None:
        self.block = block
        self.damping = damping
        self.tensors: list[torch.Tensor] = []
        self.template = _take_tensors(arguments, self.tensors)
        self.is_tuple = is_tuple
        self.shapes = tuple(s.shape for s in state)
        self.formats = [memory_format(s, block) for s in state]
        self.dtype = state[0].dtype
        self.device = state[0].device
        self.random = False
        self._changed: list[KeptBuffer] = []  # buffers that an evaluation changes, as they were before it
        self.modules = list(block.modules())
        self._modes: list[bool] = []  # which modules train
        self._steady: list[SteadyBuffer] = []
        self.compiled = any(m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in self.modules)
        self._generators: list[torch.Tensor] | None = None
        self._hooks: list[tuple[nn.Module, str, dict]] = []  # of modules, by their names in these, and what was in them
        self.differentiated = False
        self.unfollowed = False
        self._doubted = False  # whether it must still be found out who has drawn random numbers
        kinds = sorted({self.device.type, "cpu"} - {"meta"})
        self.autocast = {kind: torch.get_autocast_dtype(kind) for kind in kinds if torch.is_autocast_enabled(kind)}
        self._without_autocast = [kind for kind in kinds if kind not in self.autocast]

    @property
    def rows_are_apart(self) -> bool:
        """Whether rows can be taken out of what the block is given: x alone, one tensor whose first dimension is the batch, or tensors like those of the
        state. What is anything else may hold something that all examples share, of whatever size."""
        x, context, kwargs = self.template
        if context or kwargs:
            return False
        if isinstance(x, _Slot):
            return self.tensors[0].layout == torch.strided and self.tensors[0].shape[:1] == self.shapes[0][:1]
        slots = isinstance(x, tuple) and all(isinstance(part, _Slot) for part in x)
        return slots and tuple(t.shape for t in self.tensors) == self.shapes

    def keep(self, rows: torch.Tensor) -> None:
        """Drops all rows but those of these indices."""
        self.tensors = [t[rows] for t in self.tensors]
        self.shapes = tuple(torch.Size((len(rows), *shape[1:])) for shape in self.shapes)

    def __call__(self, state: State, tensors: list[torch.Tensor]) -> State:
        """`f(state)` in the dtypes of the state; `tensors` take the places of the call's own."""
        x, context, kwargs = _put_tensors(self.template, tensors)
        call = partial(self.block, state if self.is_tuple else state[0], x, *context, **kwargs)
        if torch.compiler.is_compiling():  # a trace has no generators, and buffers of its own
            values = self._checked(call())
        elif self._generators is None:
            values = self._first(call, [t for t in (*state, *tensors) if not t.is_inference()])
        else:
            if self._doubted:
                self._doubted, self.random = False, self._draws(call)
            if self.random:
                set_generator_states(self._generators, self.device)
            self._put_back()
            with same_convolutions(self.device):
                values = self._checked(call())
            self._keep_steady()
        return self._damped(state, values)

    def _keep_steady(self) -> None:
        """After an evaluation: what it changed is none that no evaluation changes."""
        self._steady = [buffer for buffer in self._steady if not (buffer.changed or buffer.replaced)]

    def _first(self, call: Callable[[], Any], inputs: list[torch.Tensor]) -> State:
        """The first evaluation of a solve, which shows what the block draws and changes."""
        self._generators = generator_states(self.device)
        self._modes = [module.training for module in self.modules]
        buffers = kept_buffers(itertools.compress(self.modules, self._modes))
        self._changed = buffers  # all of them, for the case that the block raises
        self._steady = [
            SteadyBuffer(module, name, buffer)
            for module in self.modules
            for name, buffer in module._buffers.items()
            if buffer is not None and not buffer.is_inference()
        ]
        versions = [t._version for t in inputs]
        _, context, kwargs = self.template
        caches = [value for value in (*context, *kwargs.values()) if hasattr(value, "layers") and not hasattr(value, "next_evaluation")]
        lengths = list(map(_lengths, caches))
        with same_convolutions(self.device), torch.set_grad_enabled(torch.is_grad_enabled() or self.unfollowed):
            out = call()
        self._changed = moved_buffers(buffers, self.device)
        if self.differentiated:  # after it, since there are hooks that remove themselves
            filled = ((module, name) for module in self.modules for name in FORWARD_HOOKS if getattr(module, name, None))
            self._hooks = [(*place, dict(getattr(*place))) for place in filled]
        self._keep_steady()
        moved = not all(torch.equal(a, b) for a, b in zip(self._generators, generator_states(self.device), strict=True))
        # where nothing trains it may have been another thread, whose numbers must not be drawn twice
        quiet = not (self.compiled or torch.is_grad_enabled() or any(self._modes))
        # one more call of the block would go on to the next slot of a cache, and a model that decodes in eval mode draws nothing
        cached = any(hasattr(value, "next_evaluation") for value in self.template[2].values())
        self._doubted = moved and quiet and not cached
        self.random = moved and not quiet
        if any(t._version != version for t, version in zip(inputs, versions, strict=True)):
            raise ValueError(
                "the block changes one of its inputs in place, so a second evaluation would meet another map; "
                "use out-of-place operations on z, x and the context (z + x, not z.add_(x))"
            )
        if list(map(_lengths, caches)) != lengths:
            raise ValueError(
                f"the block wrote to a {type(caches[0]).__name__}, as every evaluation would, and the next one would attend to what this one wrote; they need "
                "slots of their own: past_key_values=revdeq_hf.EvaluationSlots(cache, 0, layers), and a new cache in place of this one"
            )
        values = self._checked(out)
        if self.unfollowed:
            refuse_hidden_inputs(values, (), ())
            values = tuple(value.detach() for value in values)
        return values

    def _draws(self, call: Callable[[], Any]) -> bool:
        """Whether the block draws random numbers, found out by one more call of it, which draws no others if it does not."""
        with _Draws() as seen:
            self._put_back()
            call()
        return seen.found

    def _damped(self, state: State, values: State) -> State:
        if not self.damping:
            return values
        return tuple(torch.lerp(f, z, self.damping) for f, z in zip(values, state, strict=True))

    def _checked(self, out: Any) -> State:
        values = out if isinstance(out, tuple) else (out,)
        if isinstance(out, tuple) != self.is_tuple or not all(isinstance(v, torch.Tensor) for v in values):
            expected = f"a tuple of {len(self.shapes)} tensors" if self.is_tuple else "one tensor, as the state is one"
            raise TypeError(
                f"the block must return {expected}, got {type(out).__name__}; the state takes its form from x (or z0), and what else the "
                "block has to tell (an auxiliary loss) it stores, to be taken from one more call, layer.block(solution.z, x)"
            )
        got, expected_shapes = [tuple(v.shape) for v in values], [tuple(s) for s in self.shapes]
        if got != expected_shapes:
            raise ValueError(
                f"the block must return the shape of its state, got {got}, expected {expected_shapes}; "
                "x fixes the shape of the state unless z0 is given: pass z0, or project x to the state's shape first"
            )
        for value in values:
            if not value.is_floating_point() or (value.dtype != self.dtype and not self.autocast):
                raise TypeError(
                    f"the block must return the dtype of its state, got {value.dtype}, expected {self.dtype}; "
                    "convert x to the block's dtype, or run under torch.autocast for mixed precision"
                )
        return tuple(value.to(self.dtype) for value in values)

    def precision(self) -> contextlib.AbstractContextManager:
        """The forward pass's autocast, without its cache of cast weights: the cache would hand weights cast without a graph to an evaluation
        that needs one, and makes autograd add up the gradients of all evaluations in half precision."""
        unlike = [kind for kind in self._without_autocast if torch.is_autocast_enabled(kind)]  # around the backward pass alone
        return self._casting(unlike) if self.autocast or unlike else contextlib.nullcontext()

    @contextlib.contextmanager
    def _casting(self, unlike: list[str]) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for kind, dtype in self.autocast.items():
                stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=False))
            for kind in unlike:
                stack.enter_context(torch.autocast(kind, enabled=False))
            yield

    def replay(self, alike: bool = False) -> "_Replay":
        """A context around recomputation, in which the block has the buffers and hooks and trains as it did, and which leaves the user's generators and
        the block's buffers as they are; may be entered again. With `alike` it raises RuntimeError where a buffer was changed in place, of which there is no
        copy."""
        return _Replay(self, alike)

    def rewind(self) -> None:
        """Puts generators and buffers back to where they were before the solve, which has failed."""
        if self._generators is not None:
            set_generator_states(self._generators, self.device)
            self._put_back()

    def _put_back(self) -> None:
        for buffer in self._changed:
            buffer.put_back()


class _Replay:
    def __init__(self, evaluator: Evaluator, alike: bool) -> None:
        self.evaluator, self.alike = evaluator, alike
        self.stacks: list[contextlib.ExitStack] = []

    def __enter__(self) -> None:
        evaluator = self.evaluator
        for buffer in evaluator._steady:
            if self.alike and buffer.changed:
                raise RuntimeError(
                    f"the buffer {buffer.name!r} of shape {tuple(buffer.tensor.shape)} of the block's {type(buffer.module).__name__} has been changed between "
                    "the forward and the backward pass, so the evaluations cannot be recomputed; change it after the backward pass, or out of place"
                )
        with contextlib.ExitStack() as stack:  # which puts back what has been done if the rest fails
            for buffer in evaluator._steady:
                if buffer.replaced and buffer.name in buffer.module._buffers:
                    stack.callback(buffer.module._buffers.__setitem__, buffer.name, buffer.module._buffers[buffer.name])
                    buffer.module._buffers[buffer.name] = buffer.tensor
            for module, training in zip(evaluator.modules, evaluator._modes, strict=False):  # a trace has not looked
                if module.training != training:
                    stack.callback(setattr, module, "training", module.training)
                    module.training = training
            for module, name, before in evaluator._hooks:
                hooks = getattr(module, name)
                if removed := [number for number in before if number not in hooks]:  # as peft removes its own after each forward pass
                    stack.callback(_without, hooks, removed)
                    later = dict(hooks)
                    hooks.clear()
                    hooks.update({**before, **later})
            for changed in evaluator._changed:
                stack.callback(_take_back, KeptBuffer(changed.module, changed.name))
            if evaluator.random:
                stack.callback(set_generator_states, generator_states(evaluator.device), evaluator.device)
            self.stacks.append(stack.pop_all())

    def __exit__(self, *error: Any) -> None:
        self.stacks.pop().close()


def _take_back(buffer: KeptBuffer) -> None:
    """Puts a buffer back, and remembers that what has happened to it since is nothing."""
    assert buffer.tensor is not None
    before = buffer._version
    buffer.put_back()
    if bumps := buffer.tensor._version - before:
        buffer.tensor._taken_back = getattr(buffer.tensor, "_taken_back", 0) + bumps  # type: ignore[attr-defined]


@dataclass
class Evaluation:
    """An evaluation with its graph: aliases of leaves, which stand for the state and the arguments, and `f` of them."""

    state: State
    leaves: list[torch.Tensor]
    f: State


def evaluate_with_graph(evaluator: Evaluator, state: State, leaves: list[torch.Tensor]) -> Evaluation:
    """The autocast covers the evaluation only: derivatives are computed outside it, as they are everywhere else."""
    with torch.enable_grad(), evaluator.precision():
        state = tuple(_alias(root) for root in as_leaves(state, [True] * len(state)))
        leaves = [_alias(leaf) if leaf.requires_grad else leaf for leaf in leaves]
        return Evaluation(state, leaves, evaluator(state, leaves))


def _alias(leaf: torch.Tensor) -> torch.Tensor:
    """It is no leaf: hooks on the inputs of modules (FlopCounterMode's, for one) cannot follow a leaf within `torch.autograd.grad`."""
    return leaf.view_as(leaf) if leaf.layout == torch.strided else leaf


def as_leaves(tensors: Iterable[torch.Tensor], needed: Iterable[bool]) -> list[torch.Tensor]:
    """Tensors that share memory with `tensors` and begin a graph of their own, requiring grad where it is needed.

    Derivatives are asked for by aliases of them, so a gradient that arrives at one comes from a tensor that the block has stored, and would go no further.
    """
    leaves = [t.detach().requires_grad_() if need else t.detach() for t, need in zip(tensors, needed, strict=True)]
    for leaf in leaves:
        if leaf.requires_grad and leaf.layout == torch.strided:
            leaf.register_hook(_refuse_stored)
    return leaves


def _refuse_stored(gradient: torch.Tensor) -> None:
    raise RuntimeError(
        "a tensor that the block stored in one of its evaluations (an auxiliary loss?) is differentiated, and its gradient would end at that "
        "evaluation. Return it as part of the state; or call the block once more after the solve, solution = layer(x); layer.block(solution.z, x), "
        "and take it from there, which is exact; or use gradient='backprop'. (A block that calls backward() itself should call torch.autograd.grad.)"
    )


def refuse_hidden_inputs(
    outputs: Iterable[torch.Tensor],
    inputs: Iterable[torch.Tensor],
    parameters: Iterable[torch.Tensor],
    mark: "tuple[object, int] | None" = None,
) -> None:
    """Follows the graph of an evaluation back to its `inputs` (those of `Evaluation`) and the block's parameters.

    Raises RuntimeError where it comes to another leaf, which would silently get no gradient; or to what another evaluation came to as well, of the same first
    part of `mark` and another second one: it was computed outside of both, and would get the gradient of one.
    """
    inputs = list(inputs)
    known = {id(tensor) for tensor in (*inputs, *parameters)}
    seen = {alias.grad_fn for alias in inputs if alias.grad_fn is not None}
    todo = [part.grad_fn for part in outputs if part.grad_fn is not None and part.grad_fn not in seen]
    seen.update(todo)
    while todo:
        node = todo.pop()
        foreign = getattr(node, "variable", None)
        if foreign is not None and id(foreign) not in known:
            raise RuntimeError(
                f"the block uses a tensor of shape {tuple(foreign.shape)} that requires grad and is neither one of its parameters nor one of "
                "its arguments (or was made of one of them by another evaluation, and kept), so this gradient mode cannot give it a gradient; "
                "pass it to the layer as a context argument (a tensor, or in tuples, lists and dicts; dict(x) of a BatchEncoding, in which nothing is "
                "looked for), register it as a parameter of the block, or use "
                "gradient='backprop'. nn.DataParallel and FSDP inside the solve hide parameters so: use torchrun with DDP, or shard the layer as a whole"
            )
        if foreign is None and mark is not None:
            marks: dict = node.metadata  # type: ignore[assignment]
            owner, number = marks.get("revdeq_hf", mark)
            if owner is mark[0] and number != mark[1]:
                raise RuntimeError(
                    f"the block uses something that requires grad and was computed outside of the evaluation ({node.name()}): before the solve, or in another "
                    "one and kept. This gradient mode would give it the gradient of one evaluation; compute it in the block at every evaluation, "
                    "or before the solve and pass it to the layer as a context argument, or use gradient='backprop'"
                )
            marks["revdeq_hf"] = mark
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                todo.append(following)
