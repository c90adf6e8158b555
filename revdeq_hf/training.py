"""What a training script needs around transformers' Trainer: a callback that logs the solver, text scores, checkpoints, figures."""

import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import evaluate
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .layer_revdeq import ReversibleFixedPoint, fixed_point_layers


class RevDEQCallback(TrainerCallback):
    """Adds what the solver did to the Trainer's logs: since the last log, over all layers and micro-batches,

    - `residual`, `residual_max`: mean and greatest relative residual of the examples;
    - `solver_steps`: mean steps per example;
    - `drift`: greatest difference between a reconstructed and the true start state, 0 when every backward pass was exact;
    - `clamped`, `nonfinite`: evaluations of examples in which the block left its value range or was not finite.

    Costs no evaluation and no host synchronisation between two logs. Put it before the reporting callbacks, so that these see the
    figures: `trainer.callback_handler.callbacks.insert(0, RevDEQCallback())`; with `Trainer(callbacks=[...])` the console and the log history
    have them.
    """

    def __init__(self) -> None:
        self._layers: list[ReversibleFixedPoint] = []
        self._sums: torch.Tensor | None = None
        self._peaks: torch.Tensor | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, **kwargs) -> None:
        self._layers = [layer for _, layer in fixed_point_layers(model)] if model is not None else []
        self._sums = self._peaks = None

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._add()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._add()

    def _add(self) -> None:
        for layer in self._layers:
            figures = layer.statistics
            if figures is None or figures.residual is None:
                continue
            residual = figures.residual.detach()
            sums = torch.stack(
                [
                    torch.full((), float(residual.numel()), device=residual.device),
                    residual.sum(),
                    figures.steps.sum().to(residual.dtype),
                    figures.clamped.sum().to(residual.dtype),
                    figures.nonfinite.sum().to(residual.dtype),
                ]
            )
            peaks = torch.stack([residual.max(), layer.drift.to(residual.device)])
            self._sums = sums if self._sums is None else self._sums + sums
            self._peaks = peaks if self._peaks is None else torch.maximum(self._peaks, peaks)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs=None, **kwargs) -> None:
        if logs is None or "loss" not in logs or self._sums is None or self._peaks is None:
            return
        count, residual, steps, clamped, nonfinite = self._sums.tolist()
        peak, drift = self._peaks.tolist()
        self._sums = self._peaks = None
        figures = {
            "residual": residual / count,
            "residual_max": peak,
            "solver_steps": steps / count,
            "drift": drift,
            "clamped": clamped,
            "nonfinite": nonfinite,
        }
        logs.update(figures)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(figures)  # Trainer has appended its copy already


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

    Exact where a process's memory is not (allocators keep freed memory), and slow: it looks at every operation.

    Example:
        >>> with LiveBytes() as memory:
        ...     kept = torch.ones(1000)
        ...     also = (torch.ones(1000) + 1).sum()
        >>> memory.alive(), memory.peak
        (4004, 12000)
    """

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages[StorageWeakRef(storage)] = storage.nbytes()
        self.peak = max(self.peak, self.alive())
        return out

    def alive(self) -> int:
        self.storages = {ref: size for ref, size in self.storages.items() if not ref.expired()}
        return sum(self.storages.values())


def text_size(texts: Iterable[str]) -> dict[str, int]:
    """Words (separated by white space, and one more for every line end, as published word perplexities count) and UTF-8 bytes."""
    words = size = 0
    for text in texts:
        words += len(text.split()) + text.count("\n")
        size += len(text.encode("utf-8"))
    return {"words": words, "bytes": size}


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


def last_whole_checkpoint(folder: str | os.PathLike) -> str | None:
    """The newest checkpoint of a Trainer's output folder that was written to its end, or None.

    Trainer writes `trainer_state.json` last, so a checkpoint that a kill cut short has none, or one that cannot be read.
    """
    steps = []
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = path.name.rsplit("-", 1)[1]
        if number.isdigit() and _is_json(path / "trainer_state.json"):
            steps.append((int(number), str(path)))
    return max(steps)[1] if steps else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return False
    return True


@torch.no_grad()
def residual_curve(model: nn.Module, inputs: dict[str, torch.Tensor], steps: int) -> dict[str, list[float]]:
    """Mean relative residual of each layer at the start of steps 1 to `steps` on one batch; costs `steps` solves of up to `steps` steps.

    Returns:
        For each layer's name, `steps` numbers.
    """
    layers = fixed_point_layers(model)
    was_training = model.training
    model.eval()
    curves: dict[str, list[float]] = {name: [] for name, _ in layers}
    try:
        for count in range(1, steps + 1):
            model(**inputs, max_steps=count)
            for name, layer in layers:
                assert layer.statistics is not None
                assert layer.statistics.residual is not None
                curves[name].append(layer.statistics.residual.mean().item())
    finally:
        model.train(was_training)
    return curves


def plot_training(history: list[dict[str, Any]], curves: dict[str, list[float]], trained_steps: int, path: str | os.PathLike) -> None:
    """Draws loss and residual over training, and the residual over the steps of a solve, to a PNG file. Needs matplotlib.

    Args:
        history: the Trainer's `state.log_history`.
        curves: what `residual_curve` returns.
        trained_steps: steps of a solve in training, marked in the last panel.
        path: file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    loss, residual, convergence = figure.subplots(1, 3)
    for key, label in (("loss", "training"), ("eval_loss", "validation")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry and "step" in entry]
        if points:
            loss.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 20 else None)
    loss.set(xlabel="update", ylabel="loss", title="Loss")
    for key, label in (("residual", "mean"), ("residual_max", "greatest")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            residual.plot(*zip(*points, strict=True), label=label)
    drifts = [entry["drift"] for entry in history if "drift" in entry]
    worst = f", greatest drift {max(drifts):g}" if drifts else ""
    residual.set(xlabel="update", ylabel="relative residual", yscale="log", title=f"Residual in training{worst}")
    for name, values in curves.items():
        convergence.plot(range(1, len(values) + 1), values, marker=".", label=name)
    if curves:
        convergence.axvline(trained_steps, color="grey", linestyle=":", label="steps in training")
    convergence.set(xlabel="step of the solve", ylabel="relative residual", yscale="log", title="Convergence after training")
    for axes in (loss, residual, convergence):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:  # a short run, or a model without fixed points, leaves a panel empty
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def checkpoint_to_resume(args: TrainingArguments) -> str | None:
    """The checkpoint that `--resume_from_checkpoint` means: a folder, or with "true" the newest whole one of the output folder.

    Raises:
        FileNotFoundError: there is none.
    """
    wanted = args.resume_from_checkpoint
    if not wanted or str(wanted).lower() == "false":
        return None
    if str(wanted).lower() != "true":
        if not _is_json(Path(wanted) / "trainer_state.json"):
            raise FileNotFoundError(
                f"--resume_from_checkpoint: {wanted!r} is not a whole checkpoint (no readable trainer_state.json in it)"
            )
        return str(wanted)
    found = last_whole_checkpoint(args.output_dir or ".")
    if found is None:
        raise FileNotFoundError(
            f"--resume_from_checkpoint true: there is no whole checkpoint in {args.output_dir!r}; start without the flag"
        )
    return found


def peak_memory() -> int | None:
    """Peak bytes of this process: allocated on the accelerator where there is one, else resident (None where the system does not say)."""
    if torch.accelerator.is_available():
        return int(torch.get_device_module().max_memory_allocated())
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
