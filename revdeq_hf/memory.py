"""How much memory will training take? Predicts the peak of a training step before it runs, and advises gradient mode and batch.

The step itself is run, on tensors that have a shape and a dtype but no data (torch's `FakeTensorMode`), while the bytes of all tensors alive are
counted: every config, precision and optimiser is met without a formula of its own, and on a laptop as for a machine of any size.

    python -m revdeq_hf.memory runs/language --batch 8 --length 256 --precision bf16 --budget 24GB
"""

import argparse
import copy
import json
import math
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_leaves
from transformers.optimization import Adafactor

from .configuration_revdeq import RevDEQConfig, RevDEQVisionConfig
from .modeling_revdeq import RevDEQForCausalLM
from .modeling_revdeq_vision import RevDEQForImageClassification
from .training import LiveBytes, print_table

PRECISIONS = ("fp32", "bf16", "fp16", "pure_bf16")  # float32; mixed precision by autocast; weights, gradients and all else in bfloat16
# as TrainingArguments(optim=...) names them, with Trainer's settings where they change what is kept
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw_torch": torch.optim.AdamW,
    "adamw_torch_fused": partial(torch.optim.AdamW, fused=True),
    "sgd": partial(torch.optim.SGD, lr=1e-3),
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
    "adafactor": partial(Adafactor, lr=1e-3, scale_parameter=False, relative_step=False),
}
MODES = ("reversible", "checkpoint", "backprop")  # the exact ones, whose costs are known beforehand
Config = RevDEQConfig | RevDEQVisionConfig
PRESETS: dict[str, Callable[[], Config]] = {
    "paper_wikitext103": RevDEQConfig.paper_wikitext103,
    "paper_cifar10_multiscale": RevDEQVisionConfig.paper_cifar10_multiscale,
    "paper_cifar10_singlescale": RevDEQVisionConfig.paper_cifar10_singlescale,
}
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
LARGEST_BATCH = 2**20
SMALLEST_SHARE = 0.01  # of the peak: groups of tensors below it are not told one by one


@dataclass(frozen=True)
class AtPeak:
    """Tensors alive at the peak of a training step that are alike in all that is said of them here.

    Attributes:
        what: "weights" (the parameters), "buffers", "gradients" (that parameters have already), "optimizer exp_avg" and the like, "inputs"; of the rest the
            operation that made them, such as "aten.mm", or "room of aten.logsumexp", which its kernel takes for itself; "others": what is below 1%.
        phase: in which the operation ran, see `MemoryPlan`; "" for what has a name of its own, as are the next three.
        module: the innermost one that was running, or being gone back through; "" for none.
        line: of this package, that led to the operation, such as "loss_revdeq.py:123"; "" for none.
        shape: of each tensor; None where it is not told.
        dtype: of each tensor; None where it is not told.
        count, bytes: tensors, and what they take together.
    """

    what: str
    phase: str
    module: str
    line: str
    shape: tuple[int, ...] | None
    dtype: torch.dtype | None
    count: int
    bytes: int


@dataclass(frozen=True)
class MemoryPlan:
    """What one training step will take, in bytes.

    Attributes:
        gradient, batch_size, length, precision, optimizer: what was planned for; `length` is None for images.
        peak: the most that is alive at once, in the passes and the optimiser's step.
        phase: where that is: "forward", "backward" or "optimizer".
        weights: parameters and buffers.
        optimizer_state: what the optimiser keeps between its steps.
        gradients: of all parameters, at the end of the backward pass.
        activations: alive between forward and backward pass beside weights, optimiser state and the gradients of earlier micro-batches: the batch, and
            what is kept for the backward pass.
        operation: the one at the peak, its module and line, see `AtPeak`; "" without `explain`.
        at_peak: what is alive at the peak, the greatest first and "others" last, in all `peak` bytes; empty without `explain`.
    """

    gradient: str
    batch_size: int
    length: int | None
    precision: str
    optimizer: str
    peak: int
    phase: str
    weights: int
    optimizer_state: int
    gradients: int
    activations: int
    operation: str = ""
    at_peak: tuple[AtPeak, ...] = ()


@dataclass(frozen=True)
class ModeAdvice:
    """One gradient mode within a budget.

    Attributes:
        plan: for the batch that was asked for.
        fits: whether that is within the budget.
        largest_batch: the largest batch that is, found to within 2%; 0 where not even one example is.
        time: of a training step as a multiple of "backprop", by count of evaluations of the block ((8N - k) / 6N); what a machine makes of it is in
            docs/gradient_modes.md.
    """

    plan: MemoryPlan
    fits: bool
    largest_batch: int
    time: float


@dataclass(frozen=True)
class Advice:
    """Gradient modes within a budget.

    Attributes:
        modes: one entry for each mode.
        gradient: the mode to take: of those that hold the batch the one of the fewest evaluations, then of the least memory; where none does, the
            one of the largest batch.
        batch_size: the largest batch of that mode, 0 where no mode holds an example.
    """

    modes: tuple[ModeAdvice, ...]
    gradient: str
    batch_size: int


def plan_memory(
    config: Config,
    batch_size: int,
    length: int | None = None,
    *,
    precision: str = "fp32",
    gradient: str | None = None,
    optimizer: str = "adamw_torch_fused",
    gradient_accumulation_steps: int = 1,
    padded: bool = False,
    max_steps: "int | list[int] | None" = None,
    explain: bool = False,
) -> MemoryPlan:
    """The memory of a training step of `RevDEQForCausalLM` or `RevDEQForImageClassification` made from `config`, on one device.

    It is that of a later step, with the optimiser's state there; `tol` is taken to be met by no example before its last step.

    Args:
        config: of the language or the image model; not changed.
        batch_size: examples of a micro-batch, >= 1.
        length: tokens of each, for the language model; None for the image model, whose images are of `config.image_size`.
        precision: "fp32"; "bf16" or "fp16", autocast with weights in float32; "pure_bf16", weights in bfloat16.
        gradient: gradient mode; None: the config's.
        optimizer: one of `OPTIMIZERS`, as in `TrainingArguments(optim=...)`.
        gradient_accumulation_steps: micro-batches to an update; from 2 on gradients are there during the forward pass, too.
        padded: whether batches of text hold padding, whose mask takes room that grows with the square of `length`.
        max_steps: steps of the solve; None: the config's, with `steps_sampling` the most that it draws.
        explain: whether to tell what the peak consists of (`MemoryPlan.at_peak`); takes hardly longer.

    Returns:
        `MemoryPlan`.

    Cost: no memory to speak of; one to three seconds of one core for 4 steps, and as much more for every 4 further ones.

    Counted are the tensors that operations return, and the room that the kernels of two of them take for themselves (`_scratch`). Within 4% of what
    torch's allocator hands out on the CPU in all that was measured (docs/memory.md). Not counted: other kernels' own room, freed memory that an allocator
    keeps, buckets of DDP, shards of FSDP, evaluation, and what else the process holds. On an accelerator (an H100: 1 to 7%
    more than predicted) the context and the workspaces of cuBLAS and cuDNN come on top, attention and autocast run by other kernels that keep other things,
    and "adamw_torch" updates many tensors at once.

    Raises:
        ValueError, TypeError: an argument is none of the above, or does not fit the config.
    """
    config, steps = _checked(config, batch_size, length, precision, gradient, optimizer, gradient_accumulation_steps, padded, max_steps)
    autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    dtype = torch.bfloat16 if precision == "pure_bf16" else torch.float32
    with FakeTensorMode(allow_non_fake_inputs=True), _Counter(explain) as counter:
        model = _model_class(config)._from_config(config, dtype=dtype).train()
        parameters = list(model.parameters())
        if explain:
            counter.follow(model)
        weights = counter.alive
        update = OPTIMIZERS[optimizer](parameters)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        _update(update, parameters)  # makes the optimiser's state
        state = counter.alive - weights
        for states in update.state.values():
            for kind, value in states.items():
                counter.name(f"optimizer {kind}", [value])
        counter.peak = 0
        for _ in range(min(gradient_accumulation_steps, 2)):  # the second one has met the gradients of another already
            before, counter.phase = counter.alive, "forward"
            batch = _batch(config, batch_size, length, padded)
            counter.name("inputs", batch.values())
            with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
                loss = model(**batch, max_steps=steps).loss
            activations, counter.phase = counter.alive - before, "backward"
            loss.backward()
            del loss, batch
        counter.phase = "optimizer"
        gradients = sum(parameter.grad.untyped_storage().nbytes() for parameter in parameters if parameter.grad is not None)
        _update(update, parameters)
    return MemoryPlan(
        gradient=config.gradient,
        batch_size=batch_size,
        length=length,
        precision=precision,
        optimizer=optimizer,
        peak=counter.peak,
        phase=counter.peak_phase,
        weights=weights,
        optimizer_state=state,
        gradients=gradients,
        activations=activations,
        operation=counter.operation,
        at_peak=_grouped(counter.at_peak, counter.peak) if explain else (),
    )


def advise(
    config: Config,
    batch_size: int,
    length: int | None = None,
    *,
    budget: int,
    reserve: float = 0.1,
    modes: Sequence[str] = MODES,
    **settings: Any,
) -> Advice:
    """Compares gradient modes within a budget of memory, and finds the largest batch of each.

    Args:
        config, batch_size, length: as in `plan_memory`.
        budget: bytes of the device.
        reserve: the part of the budget, in [0, 1), that is left to what a plan does not count.
        modes: of "reversible", "checkpoint" and "backprop", those to compare.
        settings: further arguments of `plan_memory`, but not `gradient`.

    Returns:
        `Advice`.

    Cost: about four plans for each mode, which take the longer the larger the batch that fits (the loss of a language model goes by chunks of tokens).

    Raises:
        ValueError, TypeError: as `plan_memory`; budget, reserve or modes are none of the above.
    """
    if not budget > 0 or not 0 <= reserve < 1:
        raise ValueError(f"budget must be a number of bytes above 0 and reserve lie in [0, 1), got {budget!r} and {reserve!r}")
    if not modes or any(mode not in MODES for mode in modes):
        raise ValueError(f"modes must be some of {', '.join(map(repr, MODES))}, got {modes!r}; plan_memory(gradient=...) plans the others")
    room = math.floor(budget * (1 - reserve))
    entries = []
    for mode in modes:
        plan = plan_memory(config, batch_size, length, gradient=mode, **settings)
        peaks = {batch_size: plan.peak}
        largest = _largest(lambda size: plan_memory(config, size, length, gradient=mode, **settings).peak, room, peaks)  # noqa: B023
        entries.append(ModeAdvice(plan, plan.peak <= room, largest, _time(config, mode, settings.get("max_steps"))))
    fitting = [entry for entry in entries if entry.fits]
    best = min(fitting, key=lambda e: (e.time, e.plan.peak)) if fitting else max(entries, key=lambda e: (e.largest_batch, -e.time))
    return Advice(tuple(entries), best.plan.gradient, best.largest_batch)


class _Counter(LiveBytes):
    """Lets a step run on tensors without data, and counts what it takes, with the room of kernels.

    Args:
        explain: whether to remember where tensors come from.

    Attributes:
        phase, peak_phase: what is going on, and what was at the peak.
        operation: at the peak, as in `MemoryPlan`.
        at_peak: bytes of each tensor alive at the peak, and the first six fields of its `AtPeak`.
    """

    def __init__(self, explain: bool = False) -> None:
        super().__init__()
        self.explain = explain
        self.phase = self.peak_phase = self.operation = ""
        self.at_peak: list[tuple[int, tuple]] = []
        self._origin = ("", "", "", "")  # of what is being made: the first four fields
        self._running: list[str] = []  # names of modules, the innermost last

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # every second call, and makes no tensor
            return func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if tensors and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            with unset_fake_temporarily():  # ids, labels and states of generators have data: what is decided by them is
                out = func(*args, **kwargs)
        elif func is torch.ops.aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 0  # examples still to solve; a drift, or values clamped
        else:
            out = func(*args, **kwargs)
        if self.explain:
            self._origin = (str(func.overloadpacket), self.phase, self._module(), _line())
        scratch = _scratch(func, args, out)
        if self.see(out, scratch):
            self.peak_phase = self.phase
            if self.explain:
                what, phase, module, line = self._origin
                self.operation = what + (module and f" in {module}") + (line and f", {line}")
                self.at_peak = [(size, label) for size, _, label in self._storages.values()]
                if scratch:
                    self.at_peak.append((scratch, (f"room of {what}", phase, module, line, None, None)))
        return out

    def describe(self, tensor: torch.Tensor) -> tuple:
        return (*self._origin, tuple(tensor.shape), tensor.dtype)

    def name(self, what: str, tensors: Iterable[Any]) -> None:
        """From here on the tensors among these are called so, and not by what made them."""
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                key = tensor.untyped_storage()._cdata
                self._storages[key] = (*self._storages[key][:2], (what, "", "", "", None, tensor.dtype))

    def follow(self, model: torch.nn.Module) -> None:
        """Names weights, and gradients as soon as parameters have them, and notes which module is running."""
        self.name("weights", model.parameters())
        self.name("buffers", model.buffers())
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda parameter: self.name("gradients", [parameter.grad]))
        for name, module in model.named_modules():
            module.register_forward_pre_hook(partial(self._begin, name or type(model).__name__))
            module.register_forward_hook(self._end, always_call=True)  # a recomputation of checkpointing ends by an exception

    def _begin(self, name: str, module: torch.nn.Module, args: Any) -> None:
        self._claim(args)
        self._running.append(name)

    def _end(self, module: torch.nn.Module, args: Any, out: Any) -> None:
        self._claim(out)
        self._running.pop()

    _end.only_looks = True  # type: ignore[attr-defined]  # so that a head with this hook takes its loss as it does without

    def _claim(self, tensors: Any) -> None:
        """Leaves the name of the running module with those nodes of the tensors' graph that have none, for the backward pass."""
        todo: list[Any] = [leaf.grad_fn for leaf in tree_leaves(tensors) if isinstance(leaf, torch.Tensor)]
        while self._running and todo:
            node = todo.pop()
            if node is not None and "module" not in node.metadata:
                node.metadata["module"] = self._running[-1]
                todo += [earlier for earlier, _ in node.next_functions]

    def _module(self) -> str:
        node: Any = torch._C._current_autograd_node()
        return self._running[-1] if self._running else "" if node is None else node.metadata.get("module", "")


def _line() -> str:
    """The innermost line of this package, but for this file's, that is being executed."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        folder, file = os.path.split(frame.f_code.co_filename)
        if folder == os.path.dirname(__file__) and file != os.path.basename(__file__):
            return f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def _grouped(tensors: list[tuple[int, tuple]], peak: int) -> tuple[AtPeak, ...]:
    """`MemoryPlan.at_peak` of what `_Counter` found."""
    groups = defaultdict(list)
    for size, label in tensors:
        groups[label].append(size)
    lines = sorted((AtPeak(*label, len(sizes), sum(sizes)) for label, sizes in groups.items()), key=lambda line: -line.bytes)
    told = [line for line in lines if line.bytes >= SMALLEST_SHARE * peak]
    others = lines[len(told) :]
    if others:
        told.append(AtPeak("others", "", "", "", None, None, sum(line.count for line in others), sum(line.bytes for line in others)))
    return tuple(told)


def _scratch(func: Any, args: tuple, out: Any) -> int:
    """Bytes that the kernel of an operation takes for itself while it runs; 0 but for the two that take much."""
    if func is torch.ops.aten.logsumexp.default:  # exp(x - max): one implementation for all devices; x is the loss's logits
        return args[0].nbytes
    if func is torch.ops.aten.convolution.default:
        inputs, weight, outputs = args[0], args[1], out
    elif func is torch.ops.aten.convolution_backward.default:
        outputs, inputs, weight = args[:3]
    else:
        return 0
    native = {torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported, torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported}
    if inputs.dtype not in native or native[inputs.dtype]():
        return 0
    # this CPU has no half precision instructions: the images are unfolded, a column of the kernel's size for each position
    return outputs[:, 0].numel() * weight[0].numel() * inputs.element_size()


def _update(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter]) -> None:
    """As Trainer does it."""
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def _batch(config: Config, batch_size: int, length: int | None, padded: bool) -> dict[str, torch.Tensor]:
    """Whole numbers are real, as models and transformers look at them."""
    with unset_fake_temporarily():
        if isinstance(config, RevDEQVisionConfig):
            labels = torch.zeros(batch_size, dtype=torch.int64)
        else:
            assert length is not None
            ids = torch.zeros(batch_size, length, dtype=torch.int64)
            batch = dict(input_ids=ids, labels=ids.clone(), position_ids=torch.arange(length)[None])
            if padded:
                batch["attention_mask"] = torch.ones_like(ids)
                batch["attention_mask"][:, -1] = 0
            return batch
    return dict(pixel_values=torch.randn(batch_size, config.num_channels, config.image_size, config.image_size), labels=labels)


def _model_class(config: Config) -> Any:
    return RevDEQForImageClassification if isinstance(config, RevDEQVisionConfig) else RevDEQForCausalLM


def _checked(
    config: Config,
    batch_size: int,
    length: int | None,
    precision: str,
    gradient: str | None,
    optimizer: str,
    gradient_accumulation_steps: int,
    padded: bool,
    max_steps: "int | list[int] | None",
) -> "tuple[Config, int | list[int] | None]":
    """A config of the gradient mode, and the steps of a solve (None: the config's); or an error that says what does not fit."""
    if not isinstance(config, Config):
        raise TypeError(f"config must be a RevDEQConfig or a RevDEQVisionConfig, got {type(config).__name__}")
    images = isinstance(config, RevDEQVisionConfig)
    if images and (length is not None or padded):
        raise ValueError(f"images have no length and no padding, got length={length!r}, padded={padded!r}; set config.image_size instead")
    counts = {"batch_size": batch_size, "gradient_accumulation_steps": gradient_accumulation_steps}
    for name, value in (counts if images else {**counts, "length": length}).items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
    for name, choice, allowed in (("precision", precision, PRECISIONS), ("optimizer", optimizer, tuple(OPTIMIZERS))):
        if choice not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {choice!r}")
    config = copy.deepcopy(config)
    if gradient is not None:
        config.gradient = gradient
    config.validate_solver()
    sampling = config.steps_sampling
    if max_steps is None and sampling is not None:
        max_steps = max(sampling["steps"]) if "steps" in sampling else sampling.get("max_steps")
        if max_steps is None:
            raise ValueError(f"steps_sampling={sampling!r} has no bound to plan for; give it a 'max_steps', or pass max_steps")
    return config, max_steps


def _time(config: Config, mode: str, max_steps: "int | list[int] | None") -> float:
    """Evaluations of the block in a training step, its product with a Jacobian as two of them, over those of "backprop"; stages count alike."""
    given = max_steps or (config.steps_per_stage if isinstance(config, RevDEQVisionConfig) else config.max_steps)
    stages = [given] if isinstance(given, int) else given
    kept = 0 if mode == "reversible" and config.tol is not None else config.keep_evaluations
    backprop = sum(6 * steps for steps in stages)
    return 1.0 if mode == "backprop" else sum(8 * steps - min(kept, 2 * steps) for steps in stages) / backprop


def _largest(peak_of: Callable[[int], int], room: int, peaks: dict[int, int]) -> int:
    """A batch that fits into `room`, such that one larger by 1/64 (and by 1) does not; 0 if none fits. `peaks` holds what is known of them already.

    The peak as a function of the batch is a number of straight pieces, so the line through two batches soon gives the answer.
    """
    low, high, turn = 0, LARGEST_BATCH + 1, 0

    def try_(size: int) -> None:
        nonlocal low, high
        if size not in peaks:
            peaks[size] = peak_of(size)
        low, high = (size, high) if peaks[size] <= room else (low, size)

    for size in sorted(peaks):
        try_(size)
    while high - low > max(1, low // 64):
        turn += 1
        if low == 0:
            guess = 1
        elif high > LARGEST_BATCH:
            smaller = max((size for size in peaks if size < low), default=None)
            guess = 2 * low if smaller is None else low + (room - peaks[low]) * (low - smaller) // max(peaks[low] - peaks[smaller], 1)
        elif turn % 3 == 0:
            guess = (low + high) // 2
        else:
            guess = low + (room - peaks[low]) * (high - low) // (peaks[high] - peaks[low])
        try_(min(max(guess, low + max(1, low // 64)), high - 1))
    return low


def load_config(source: str) -> Config:
    """The config of a model folder, of a JSON file, or of a preset's name (`PRESETS`). Nothing is downloaded.

    Raises:
        FileNotFoundError: it is none of these.
        ValueError: the file is not JSON, or of another kind of model.
    """
    if source in PRESETS:
        return PRESETS[source]()
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"expected a model folder, a JSON file or one of {', '.join(PRESETS)}; there is no {str(path)!r}")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    classes: dict[str, Any] = {found.model_type: found for found in (RevDEQConfig, RevDEQVisionConfig)}
    kind = fields.get("model_type") if isinstance(fields, dict) else None
    if kind not in classes:
        raise ValueError(f"{path} must be the config of a model with model_type {' or '.join(map(repr, classes))}, got {kind!r}")
    return classes[kind].from_dict(fields)


def parse_bytes(text: str) -> int:
    """Bytes of "24GB" (10^9), "24GiB" (2^30), "800 MB" or a plain number.

    Raises:
        ValueError: it is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].upper() not in UNITS:
        raise ValueError(f"expected bytes such as 24GB, 22.5GiB or 800MB, got {text!r}")
    return math.floor(float(match[1]) * UNITS[match[2].upper()])


def show_bytes(size: int) -> str:
    """In three or four digits: "1.234 GB"."""
    for unit in ("GB", "MB", "KB"):
        if size >= UNITS[unit]:
            return f"{size / UNITS[unit]:.4g} {unit}"
    return f"{size} B"


def _print_peak(plan: MemoryPlan) -> None:
    print(f"\n{plan.gradient}: the peak of {show_bytes(plan.peak)} is in {plan.phase}, at {plan.operation}.")
    rows: list[list[Any]] = []
    for line in plan.at_peak:
        sizes = [show_bytes(line.bytes), f"{line.bytes / plan.peak:.1%}", line.count]
        shape, dtype = "x".join(map(str, line.shape or ())), str(line.dtype or "").removeprefix("torch.")
        rows.append([line.what, *sizes, *(cell or None for cell in (shape, dtype, line.phase, line.module, line.line))])
    print_table(["what", "bytes", "share", "count", "shape", "dtype", "made in", "module", "line"], rows)


def main(arguments: "Sequence[str] | None" = None) -> None:
    """The command; `arguments` instead of the command line's."""
    parser = argparse.ArgumentParser(prog="python -m revdeq_hf.memory", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("config", help=f"a model folder, a config's JSON file, or one of {', '.join(PRESETS)}")
    parser.add_argument("--batch", type=int, default=8, help="examples of a micro-batch")
    parser.add_argument("--length", type=int, help="tokens of an example (language model)")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--optim", choices=OPTIMIZERS, default="adamw_torch_fused")
    parser.add_argument("--gradient", choices=MODES, nargs="+", default=MODES, help="gradient modes to compare")
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--padded", action="store_true", help="batches of text hold padding")
    parser.add_argument("--max_steps", type=int, help="steps of the solve instead of the config's")

    def budget(text: str) -> int:
        try:
            return parse_bytes(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error  # of a ValueError argparse shows no message

    parser.add_argument(
        "--budget", type=budget, help="memory of the device, such as 24GB or 80GiB: find the largest batch and advise the mode"
    )
    parser.add_argument("--reserve", type=float, default=0.1, help="part of the budget left to what is not counted (default 0.1)")
    parser.add_argument("--explain", action="store_true", help="tell what the peak of each mode consists of")
    options = parser.parse_args(arguments)
    settings: dict[str, Any] = dict(
        precision=options.precision,
        optimizer=options.optim,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        padded=options.padded,
        max_steps=options.max_steps,
        explain=options.explain,
    )
    advice = None
    try:
        config = load_config(options.config)
        if options.budget is None:
            plans = [plan_memory(config, options.batch, options.length, gradient=mode, **settings) for mode in options.gradient]
        else:
            limits = dict(budget=options.budget, reserve=options.reserve, modes=options.gradient)
            advice = advise(config, options.batch, options.length, **limits, **settings)
            plans = [entry.plan for entry in advice.modes]
    except (ValueError, TypeError, FileNotFoundError, StrictDataclassError) as error:
        parser.error(str(error))
    header = ["gradient", "weights", "gradients", "optimiser", "activations", "peak", "in", "time"]
    rows: list[list[Any]] = []
    for plan in plans:
        sizes = [show_bytes(size) for size in (plan.weights, plan.gradients, plan.optimizer_state, plan.activations, plan.peak)]
        rows.append([plan.gradient, *sizes, plan.phase, f"{_time(config, plan.gradient, options.max_steps):.2f}"])
    if advice is not None:
        header += ["fits", "largest batch"]
        rows = [[*row, "yes" if entry.fits else "no", entry.largest_batch] for row, entry in zip(rows, advice.modes, strict=True)]
    print_table(header, rows)
    if options.explain:
        for plan in plans:
            _print_peak(plan)
    shape = f"batch {options.batch}" + ("" if options.length is None else f" of {options.length} tokens")
    print(
        f"\nOne training step of {shape}, {options.precision}, {options.optim}. Time: evaluations of the block, as a multiple of backprop's."
    )
    if advice is None:
        return
    limit = f"{show_bytes(options.budget)} with {options.reserve:.0%} in reserve"
    if not advice.batch_size:
        print(f"Not even one example fits into {limit}: a smaller model, a shorter length or a leaner optimiser is needed.")
    elif any(entry.fits for entry in advice.modes):
        print(
            f'Take gradient="{advice.gradient}": it has the fewest evaluations of what fits into {limit}, up to batch {advice.batch_size}.'
        )
    else:
        print(
            f'Batch {options.batch} does not fit into {limit}. Take gradient="{advice.gradient}" with batch {advice.batch_size}, and '
            "--gradient_accumulation_steps for the rest."
        )


if __name__ == "__main__":
    main()
