"""What a training script needs around transformers' Trainer: a callback that logs the solver, text scores, counts and tables."""

import hashlib
import math
import platform
import re
import subprocess
import time
import warnings
import weakref
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, cast

import datasets
import evaluate
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .diagnostics import Diagnosis, diagnose, evaluating
from .flops import training_flops
from .hub_revdeq import __version__
from .layer_revdeq import ReversibleFixedPoint, SolveStatistics, fixed_point_layers

DIVERGENCE = ("ignore", "warn", "stop", "lower_lr")
_SUMS = ("rows", "residual", "steps", "clamped", "nonfinite")  # of a layer since the last log


class RevDEQCallback(TrainerCallback):
    """Adds what the solver did to the Trainer's logs: since the last log, over all layers, micro-batches and ranks,

    - `residual`, `residual_max`: mean and greatest relative residual of the examples (or tokens);
    - `solver_steps`, `evaluations`: mean steps per example, and calls of the block per solve;
    - `drift`: greatest difference between a reconstructed and the true start state, 0 when every backward pass was exact; where passes are reversed;
    - `clamped`, `nonfinite`: evaluations of examples in which the block left its value range or was not finite;
    - `tokens_per_second` or `images_per_second`: of all ranks, padding included; evaluation and saving are not in the seconds;
    - `flops_per_second`, `mfu`: floating-point operations of the model (see `training_flops`) per second and device, and their share of `peak_flops`;
    - `peak_memory_bytes`: greatest of the ranks' `peak_memory()`.

    Costs no evaluation and no host synchronisation between two logs. Put it before the reporting callbacks, so that these see the
    figures: `trainer.callback_handler.callbacks.insert(0, RevDEQCallback())`; with `Trainer(callbacks=[...])` the console and the log history
    have them.

    Args:
        on_divergence: what to do at a log when a loss or a value of the block was not finite, or when the mean residual is above 0.1 and 10 times the
            smallest one logged, twice in a row (not judged where steps are drawn).
            "warn" explains it in a warning, once; "stop" also ends the training; "lower_lr" also halves the
            learning rates, at every such log; "ignore" does nothing.
        probe: arguments of the model for a small batch, e.g. `{"input_ids": ids}`; the explanation then has the spectral radius of each layer, from
            `diagnose`, which costs some solves of that batch when training diverges and nothing before.
        peak_flops: operations per second that a device can do. Default: what `matrix_rate` measures when training begins. 0: log no `mfu`.

    Raises:
        ValueError: `on_divergence` is unknown.
    """

    def __init__(self, on_divergence: str = "warn", probe: dict[str, Any] | None = None, peak_flops: float | None = None) -> None:
        if on_divergence not in DIVERGENCE:
            raise ValueError(f"on_divergence must be one of {', '.join(map(repr, DIVERGENCE))}, got {on_divergence!r}")
        self.on_divergence, self.probe, self.peak_flops = on_divergence, probe, peak_flops
        self._layers: list[tuple[str, ReversibleFixedPoint]] = []
        self._resting = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, **kwargs) -> None:
        self._layers = fixed_point_layers(model) if model is not None else []
        images = getattr(model, "main_input_name", None) == "pixel_values"
        self._unit = "images_per_second" if images else "tokens_per_second"
        self._least, self._rises, self._warned = math.inf, 0, False
        if self.peak_flops is None and self._layers:
            own = next(self._layers[0][1].parameters(), torch.zeros(0)).dtype  # of weights in half precision, which need no autocast
            self.peak_flops = matrix_rate(args.device, torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else own)
        self._clear()

    def _clear(self) -> None:
        self._sums: torch.Tensor | None = None  # (layers, sums), added up on the device
        self._peaks: torch.Tensor | None = None  # (layers, [residual, drift, `_earliest_bad`])
        self._evaluations = self._solves = self._items = 0
        self._flops = self._paused = 0.0
        self._began: float | None = None
        self._ended = 0.0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        now = time.perf_counter()
        if self._began is None:
            self._began = self._ended = now
        if self._resting:  # an evaluation or a checkpoint came between two updates
            self._paused += now - self._ended
            self._resting = False

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._resting = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._resting = True

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, **kwargs) -> None:
        self._add(model)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, **kwargs) -> None:
        self._add(model)
        self._ended = time.perf_counter()

    def _add(self, model: nn.Module) -> None:
        sums, peaks = [], []
        for _, layer in self._layers:
            figures = layer.statistics
            if figures is None or figures.residual is None:
                return
            residual = figures.residual.detach()
            steps, rows = figures.steps, torch.ones_like(residual)
            if figures.counting is not None:  # padding does not
                rows, residual, steps = (part.masked_fill(~figures.counting, 0) for part in (rows, residual, steps))
            counted = (rows, residual, steps, figures.clamped, figures.nonfinite)
            sums.append(torch.stack([part.sum().to(residual.dtype) for part in counted]))
            peaks.append(torch.stack([residual.max(), layer.drift.to(residual.device), _earliest_bad(figures).to(residual.dtype)]))
            self._evaluations, self._solves = self._evaluations + figures.evaluations, self._solves + 1
        if not sums:
            return
        device = sums[0].device  # a device map may part the layers
        added, highest = torch.stack([part.to(device) for part in sums]), torch.stack([part.to(device) for part in peaks])
        self._sums = added if self._sums is None else self._sums + added
        self._peaks = highest if self._peaks is None else torch.maximum(self._peaks, highest)
        shape = self._layers[0][1].statistics.shapes[0]  # type: ignore[union-attr]
        self._items += shape[0] if self._unit == "images_per_second" else shape[:-1].numel()
        self._flops += training_flops(model)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs=None, model=None, **kwargs) -> None:
        if logs is None or "loss" not in logs or self._sums is None or self._peaks is None or self._began is None:
            return
        sums, peaks = (part.to(torch.float32 if part.device.type == "mps" else torch.float64) for part in (self._sums, self._peaks))
        totals = sums.new_tensor([self._items, self._flops])
        memory = sums.new_tensor(float(peak_memory() or 0))
        ranks = 1
        if dist.is_available() and dist.is_initialized():
            ranks = dist.get_world_size()
            for tensor, operation in (
                (sums, dist.ReduceOp.SUM),
                (totals, dist.ReduceOp.SUM),
                (peaks, dist.ReduceOp.MAX),
                (memory, dist.ReduceOp.MAX),
            ):
                dist.all_reduce(tensor, operation)
        table = [dict(zip(_SUMS, row, strict=True)) for row in sums.tolist()]
        highest = peaks.tolist()
        items, flops = totals.tolist()  # the lists are the host's synchronisation, so the seconds end here
        seconds = time.perf_counter() - self._began - self._paused
        count = sum(row["rows"] for row in table)
        figures = {
            "residual": sum(row["residual"] for row in table) / count,
            "residual_max": _greatest(row[0] for row in highest),
            "solver_steps": sum(row["steps"] for row in table) / count,
            "evaluations": self._evaluations / self._solves,
            **({"drift": _greatest(row[1] for row in highest)} if any(layer.reversed for _, layer in self._layers) else {}),
            "clamped": sum(row["clamped"] for row in table),
            "nonfinite": sum(row["nonfinite"] for row in table),
            self._unit: items / seconds,
            "flops_per_second": flops / seconds / ranks,
        }
        if self.peak_flops:
            figures["mfu"] = figures["flops_per_second"] / self.peak_flops
        if memory:
            figures["peak_memory_bytes"] = int(memory.item())
        logs.update(figures)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(figures)  # Trainer has appended its copy already
        self._clear()
        # Trainer shows a loss that is not finite as 0 (`logging_nan_inf_filter`); in float16 the scaler leaves out steps whose gradient is not finite
        norm = 0.0 if args.fp16 else logs.get("grad_norm") or 0.0
        reasons = self._reasons(logs["loss"], norm, figures["residual"], table, highest)
        if reasons and self.on_divergence != "ignore":
            self._act(args, state, control, model, reasons, **kwargs)

    def _reasons(self, loss: float, norm: float, residual: float, table: list[dict[str, float]], highest: list[list[float]]) -> list[str]:
        """What speaks for divergence: sentences, none where all is well. The same on all ranks."""
        found = []
        for (name, _), row, (_, _, bad) in zip(self._layers, table, highest, strict=True):
            if row["nonfinite"]:
                found.append(
                    f"the block of {name!r} was not finite in {row['nonfinite']:.0f} evaluations of an example, first at step {-int(bad) // 2 + 1} of the "
                    "solve or before"
                )
        if not found and not math.isfinite(loss):
            found.append(f"the loss is {loss}")
        if not found and not math.isfinite(norm):
            found.append(f"the norm of the gradient is {norm}")
        drawn = any(layer.steps_sampling is not None for _, layer in self._layers)  # residuals of other numbers of steps do not compare
        self._rises = self._rises + 1 if residual > max(0.1, 10 * self._least) and not drawn else 0
        self._least = min(self._least, residual)
        if self._rises >= 2:
            means = ", ".join(f"{name!r}: {row['residual'] / row['rows']:.2g}" for (name, _), row in zip(self._layers, table, strict=True))
            found.append(f"the mean residual rises: it was {self._least:.2g} and is now {residual:.2g} ({means})")
        return found

    def _act(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any, reasons: list[str], **kwargs) -> None:
        if self.on_divergence == "lower_lr":
            _halve_learning_rates(kwargs["optimizer"], kwargs["lr_scheduler"])
        if self.on_divergence == "stop":
            control.should_training_stop = True
        if self._warned:
            return
        self._warned = True
        if self.probe is not None:
            device = next(model.parameters()).device
            inputs: dict[str, Any] = {
                name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in self.probe.items()
            }
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what it would warn about is said here
                for name, look in cast(dict[str, Diagnosis], diagnose(model, **inputs)).items():
                    radius = look.spectral_radius.max().item()
                    verdict = "above 1, so more steps do not converge" if radius > 1 else "below 1"
                    reasons.append(f"the spectral radius of {name!r} is {radius:.2f}, {verdict}")
        done = {
            "warn": "Lower the learning rate, clip gradients, or pass on_divergence='stop' or 'lower_lr'",
            "stop": "Training stops here; go on from an earlier checkpoint with a lower learning rate",
            "lower_lr": "The learning rates are halved, and again at each further log like this",
        }[self.on_divergence]
        warnings.warn(f"training diverges at update {state.global_step}: {'; '.join(reasons)}. {done}", stacklevel=2)


def _earliest_bad(figures: SolveStatistics) -> torch.Tensor:
    """Minus the number, from 0, of the evaluation by which a row has been non-finite at the latest; -inf where none was."""
    count = figures.nonfinite.max()
    return torch.where(count > 0, count - figures.evaluations, -math.inf)


def _greatest(values: Iterable[float]) -> float:
    """The greatest value, NaN if one is."""
    values = list(values)
    return math.nan if any(map(math.isnan, values)) else max(values)


def _halve_learning_rates(optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    """Of the optimiser, and of what the scheduler will compute from now on (both are saved in checkpoints)."""
    for group in optimizer.param_groups:
        for name in {"lr", "initial_lr", "max_lr", "min_lr"} & group.keys():  # OneCycleLR goes by the last three
            group[name] /= 2

    def halve(scheduler: Any) -> None:
        if hasattr(scheduler, "base_lrs"):
            scheduler.base_lrs = [rate / 2 for rate in scheduler.base_lrs]
        for part in getattr(scheduler, "_schedulers", []):  # SequentialLR, ChainedScheduler
            halve(part)

    halve(getattr(scheduler, "scheduler", scheduler))  # Accelerate's wrapper


@torch.no_grad()
def matrix_rate(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """Floating-point operations per second of a large matrix product, the best of five; takes about a tenth of a second (half precision on a CPU: more).

    Its matrices do not count in `peak_memory`.
    """
    before = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    size = 8192 if device.type == "cuda" else 768
    generator = torch.Generator(device).manual_seed(0)  # its own: measuring must not move the one that training draws from
    a = torch.randn(size, size, device=device, generator=generator).to(dtype)
    best = math.inf
    for _ in range(6):  # the first warms up
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        began = time.perf_counter()
        a @ a
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        best = min(best, time.perf_counter() - began)
    del a
    if device.type == "cuda" and torch.cuda.max_memory_allocated(device) > before:  # of these matrices, then
        torch.cuda.reset_peak_memory_stats(device)
    return 2 * size**3 / best


class TextScores(evaluate.Metric):
    """Perplexity per token and per word, and bits per byte, from the loss of every token. Works without a network.

    `compute(predictions=..., words=..., bytes=...)`: predictions are the negative log-likelihoods in nats of all tokens of a text, `words` and
    `bytes` the sizes of that text. Returns `loss` (nats per token), `perplexity`, `word_perplexity`, `bits_per_byte`, `tokens`.

    A perplexity per word divides the same sum by fewer units, so it is a larger number than one per token: state which.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Perplexity per token and per word, bits per byte.",
            citation="",
            inputs_description=self.__doc__,
            features=datasets.Features({"predictions": datasets.Value("float64")}),
        )

    def _compute(self, predictions: Sequence[float], words: int, bytes: int) -> dict[str, float]:
        return text_scores(math.fsum(predictions), len(predictions), words, bytes)


def text_scores(nats: float, tokens: int, words: int, bytes: int) -> dict[str, float]:
    """The scores of a text whose tokens have a summed negative log-likelihood of `nats`.

    Raises:
        ValueError: a count is 0.
    """
    if min(tokens, words, bytes) < 1:
        raise ValueError(f"an empty text has no perplexity: got {tokens} tokens, {words} words, {bytes} bytes")
    return {
        "loss": nats / tokens,
        "perplexity": _exp(nats / tokens),
        "word_perplexity": _exp(nats / words),
        "bits_per_byte": nats / bytes / math.log(2),
        "tokens": tokens,
    }


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made while it is on, on any device: those still alive, and the most that were alive at once.

    Exact where a process's memory is not (allocators keep freed memory), but for what kernels take for themselves while they run. It looks at every
    operation, at a cost that does not depend on how many tensors are alive.

    Attributes:
        alive, peak: bytes now, and the most at once.

    Example:
        >>> with LiveBytes() as memory:
        ...     kept = torch.ones(1000)
        ...     also = (torch.ones(1000) + 1).sum()
        >>> memory.alive, memory.peak
        (4004, 12000)
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._storages: dict[int, tuple[int, weakref.ref, Any]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.see(out)
        return out

    def see(self, out: Any, scratch: int = 0) -> bool:
        """Counts what an operation returned; `scratch`: bytes that its kernel took for itself. Whether the peak has risen."""
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._storages:
                    self._storages[key] = size, weakref.ref(storage, partial(self._forget, key)), self.describe(tensor)
                    self.alive += size
        higher = self.alive + scratch > self.peak
        self.peak = max(self.peak, self.alive + scratch)
        return higher

    def describe(self, tensor: torch.Tensor) -> Any:
        """What a subclass keeps of a new tensor while it is alive."""
        return None

    def _forget(self, key: int, _: weakref.ref) -> None:
        self.alive -= self._storages.pop(key)[0]


def text_size(texts: Iterable[str | None]) -> dict[str, int]:
    """Words (separated by white space, and one more for every line end, as published word perplexities count) and UTF-8 bytes."""
    words = size = 0
    for text in texts:
        if text is None:  # an empty cell of a table
            continue
        words += len(text.split()) + text.count("\n")
        size += len(text.encode("utf-8"))
    return {"words": words, "bytes": size}


def text_hash(texts: Iterable[str | None]) -> str:
    """sha256 of the rows of a text, by which runs tell that they saw the same data."""
    return hashlib.sha256("\0".join(text or "" for text in texts).encode("utf-8")).hexdigest()


def unigram_scores(train_ids: Iterable[Sequence[int]], test_ids: Iterable[Sequence[int]], vocab_size: int, words: int, bytes: int) -> dict:
    """The scores of a model that knows nothing but how often each token occurs in the training text (plus one)."""

    def count(rows: Iterable[Sequence[int]]) -> torch.Tensor:
        counts = torch.zeros(vocab_size, dtype=torch.float64)
        for ids in rows:
            counts.add_(torch.bincount(torch.as_tensor(ids, dtype=torch.int64), minlength=vocab_size))
        return counts

    counts, seen = count(train_ids) + 1, count(test_ids)
    nats = -(seen * (counts / counts.sum()).log()).sum().item()
    return text_scores(nats, int(seen.sum()), words, bytes)


@torch.no_grad()
def residual_curve(model: nn.Module, inputs: dict[str, torch.Tensor], steps: int) -> dict[str, list[float]]:
    """Mean relative residual of each layer at the start of steps 1 to `steps` on one batch; costs `steps` solves of up to `steps` steps.

    Returns:
        For each layer's name, `steps` numbers.
    """
    layers = fixed_point_layers(model)
    curves: dict[str, list[float]] = {name: [] for name, _ in layers}
    with evaluating(model):
        for count in range(1, steps + 1):
            model(**inputs, max_steps=count)
            for name, layer in layers:
                assert layer.statistics is not None
                assert layer.statistics.residual is not None
                curves[name].append(layer.statistics.residual.mean().item())
    return curves


def peak_memory() -> int | None:
    """Peak bytes of this process: allocated on the accelerator where there is one, of several on the fullest, else resident (None where the system or the
    device does not say)."""
    if torch.accelerator.is_available():
        tell = getattr(torch.get_device_module(), "max_memory_allocated", None)  # MPS has none
        return None if tell is None else max(int(tell(index)) for index in range(torch.accelerator.device_count()))
    try:
        import resource
    except ImportError:  # Windows
        return None
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints an aligned table; numbers with four significant digits."""

    def show(value: Any) -> str:
        if value is None:
            return "-"
        return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)

    cells = [list(header), *([show(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    print()
    for number, row in enumerate(cells):
        print(
            "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        )
        if number == 0:
            print("  ".join("-" * width for width in widths))


def run_record(command: str, device: torch.device) -> dict[str, Any]:
    """What identifies a run: command (without tokens), date, device, versions, and the commit where the package is part of a git checkout."""
    record = {
        "command": re.sub(r"\bhf_\w{20,}", "hf_...", re.sub(r"(--[\w-]*token[ =])('[^']*'|\S+)", r"\1...", command)),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": _device_name(device),
        "versions": {
            "revdeq_hf": __version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "datasets": datasets.__version__,
            "python": platform.python_version(),
        },
    }
    commit = _package_commit()
    return {**record, "commit": commit} if commit else record


def greatest_drift(history: list[dict[str, Any]]) -> float | None:
    """The greatest drift in a Trainer's `log_history`; None where nothing was reversed."""
    drifts = [entry["drift"] for entry in history if "drift" in entry]
    return _greatest(drifts) if drifts else None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    name = platform.processor() or platform.machine()
    table = Path("/proc/cpuinfo")
    if table.is_file():  # Linux names the architecture only
        name = next((line.split(":", 1)[1].strip() for line in table.read_text().splitlines() if line.startswith("model name")), name)
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}" if device.type == "cpu" else device.type


def _package_commit() -> str | None:
    """The commit that the package's files are of, with "-dirty" where a tracked file differs; None where they are not tracked."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
        except FileNotFoundError:  # no git
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    return (
        git("describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*")
        if git("ls-files", "--error-unmatch", "__init__.py")
        else None
    )
