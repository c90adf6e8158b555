"""What happened in a run, or in several: one figure and one table from what the Trainer left in its folder.

    python -m revdeq_hf.report runs/language                      # draws runs/language/report.png, prints the table
    python -m revdeq_hf.report runs/a runs/b --output both.png    # compares

Needs matplotlib. It does not travel to the Hub.
"""

import argparse
import json
import os
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .checkpoints import last_whole_checkpoint
from .training import greatest_drift, print_table

RATES = ("tokens_per_second", "images_per_second")


@dataclass
class Run:
    """A training run.

    Attributes:
        name: what figures and tables call it.
        history: the Trainer's `state.log_history`, with the figures of `RevDEQCallback` where it ran.
        convergence: for each fixed-point layer its mean residual at the start of each step after training, as `residual_curve` returns it.
        trained_steps: steps of a solve in training, marked among the above.
        results: other figures of the run (the scripts' `results.json`).
    """

    name: str
    history: list[dict[str, Any]]
    convergence: dict[str, list[float]] = field(default_factory=dict)
    trained_steps: int | None = None
    results: dict[str, Any] = field(default_factory=dict)

    def points(self, key: str) -> list[tuple[int, float]]:
        """(update, value) of every log that has the figure."""
        return [(entry["step"], entry[key]) for entry in self.history if isinstance(entry.get(key), int | float) and "step" in entry]

    def values(self, key: str) -> list[float]:
        return [value for _, value in self.points(key)]


def read_run(folder: "str | os.PathLike", name: str | None = None) -> Run:
    """The run in a Trainer's output folder: of its `trainer_state.json`, or while it goes on of its newest whole checkpoint; and of `results.json`.

    Of a `trainer_state.json` that is cut short or damaged a warning tells, and the checkpoint's is taken.

    Raises:
        FileNotFoundError: the folder has neither.
        ValueError: it has no whole one, or `results.json` is damaged.
    """
    folder = Path(folder)
    state = folder / "trainer_state.json"
    checkpoint = last_whole_checkpoint(folder)
    if not state.is_file():
        if checkpoint is None:
            raise FileNotFoundError(
                f"there is no run in {str(folder)!r}: expected trainer_state.json in it or in a checkpoint-* folder; give the --output_dir of a training "
                "with transformers' Trainer"
            )
        state, checkpoint = Path(checkpoint) / "trainer_state.json", None
    results = _fields(folder / "results.json") if (folder / "results.json").is_file() else {}
    convergence = results.get("convergence", {})
    try:
        history = _fields(state, "log_history")["log_history"]
    except ValueError as error:
        if checkpoint is None:
            raise
        history = _fields(Path(checkpoint) / "trainer_state.json", "log_history")["log_history"]
        warnings.warn(f"{error}; this is the run up to {Path(checkpoint).name}, the newest whole checkpoint", stacklevel=2)
    return Run(name or folder.name, history, convergence.get("residuals", {}), convergence.get("trained_steps"), results)


def _fields(path: Path, *expected: str) -> dict[str, Any]:
    """The JSON object in a file; a ValueError where it is none, or lacks what is expected in it."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is cut short or damaged ({error})") from error
    if not isinstance(fields, dict) or not fields.keys() >= set(expected):
        raise ValueError(f"{str(path)!r} must hold a JSON object{' with ' if expected else ''}{', '.join(expected)}")
    return fields


def _output_defect(path: Path) -> str | None:
    """Why no figure can be written to a path, or None: told before runs are read and drawn."""
    from matplotlib.figure import Figure

    if not path.parent.is_dir():
        return f"there is no folder {str(path.parent)!r} to write the figure to; make it first"
    if path.is_dir():
        return f"{str(path)!r} is a folder; expected the name of a picture, such as {str(path / 'report.png')!r}"
    endings = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix and path.suffix[1:].lower() not in endings:
        return f"expected a picture that ends in one of {', '.join(endings)}, got {str(path)!r}"
    return None


def plot_runs(runs: Sequence[Run], path: "str | os.PathLike") -> None:
    """Draws loss, residual, steps, drift and throughput over training, and the convergence after it, to a PNG or PDF file. Needs matplotlib.

    Of one run the curves of a panel have colours of their own, of several each run has one colour.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 7.5), layout="constrained")
    loss, residual, steps, drift, speed, convergence = figure.subplots(2, 3).flat
    several = len(runs) > 1

    def draw(axes: Any, run: Run, number: int, kinds: Sequence[tuple[str, str, str]]) -> None:
        for index, (key, label, line) in enumerate(kinds):
            points = run.points(key)
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    line,
                    color=f"C{number if several else index}",
                    label=f"{run.name}, {label}" if several else label,
                    marker="." if len(points) < 20 else None,
                )

    for number, run in enumerate(runs):
        draw(loss, run, number, [("loss", "training", "-"), ("eval_loss", "validation", "--")])
        draw(residual, run, number, [("residual", "mean", "-"), ("residual_max", "greatest", ":")])
        draw(steps, run, number, [("solver_steps", "steps of an example", "-"), ("evaluations", "evaluations of the block", "--")])
        draw(drift, run, number, [("drift", "drift", "-"), ("nonfinite", "not finite", "--"), ("clamped", "clamped", ":")])
        draw(speed, run, number, [(key, key.split("_", maxsplit=1)[0], "-") for key in RATES])
        for index, (layer, values) in enumerate(run.convergence.items()):
            label = f"{run.name}, {layer}" if several else layer
            convergence.plot(range(1, len(values) + 1), values, marker=".", label=label, color=f"C{number if several else index}")
        if run.convergence and run.trained_steps:
            convergence.axvline(
                run.trained_steps, color=f"C{number}" if several else "grey", linestyle=":", label=None if several else "in training"
            )
    worst = greatest_drift([entry for run in runs for entry in run.history])
    shares = [statistics.median(run.values("mfu")) for run in runs if run.values("mfu")]
    loss.set(ylabel="loss", title="Loss")
    residual.set(ylabel="relative residual", title="Residual in training")
    steps.set(ylabel="a solve", title="Steps", ylim=(0, None))
    exact = "" if worst is None else f": up to {worst:g}" if worst else ": 0, every gradient exact"
    drift.set(ylabel="since the last log", title=f"Drift{exact}")
    used = f", {' and '.join(f'{share:.0%}' for share in shares)} of the matrix rate" if shares else ""
    speed.set(ylabel="per second", title=f"Throughput{used}", ylim=(0, None))
    for axes in (loss, residual, steps, drift, speed):
        axes.set_xlabel("update")
    convergence.set(xlabel="step of the solve", ylabel="relative residual", title="Convergence after training")
    logged = [value for run in runs for key in ("residual", "residual_max") for value in run.values(key)]
    ended = [value for run in runs for values in run.convergence.values() for value in values]
    for axes, values in ((residual, logged), (convergence, ended)):
        if any(value > 0 for value in values):  # of a run that diverged none may be a number
            axes.set_yscale("log")
    for axes in (loss, residual, steps, drift, speed, convergence):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small")
        else:  # a short run, or a model without fixed points
            axes.text(0.5, 0.5, "nothing logged", transform=axes.transAxes, ha="center", color="grey")
            axes.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=120)


def summary(run: Run) -> dict[str, Any]:
    """The row of a run in the table: last losses, and of the solver's figures the last, greatest or median one as fits; None if unknown."""

    def taken(key: str, choose: Any) -> Any:
        values = run.values(key)
        return choose(values) if values else None

    rate = next((key for key in RATES if run.values(key)), RATES[0])
    memory = taken("peak_memory_bytes", max)
    return {
        "updates": max((entry.get("step", 0) for entry in run.history), default=0),
        "training loss": taken("loss", lambda values: values[-1]),
        "validation loss": run.results.get("validation_loss", run.results.get("loss", taken("eval_loss", lambda values: values[-1]))),
        "residual": taken("residual", lambda values: values[-1]),
        "steps": taken("solver_steps", lambda values: values[-1]),
        "greatest drift": greatest_drift(run.history),
        "not finite": taken("nonfinite", sum),
        "clamped": taken("clamped", sum),
        rate.replace("_", " "): taken(rate, statistics.median),
        "share of the matrix rate": taken("mfu", statistics.median),
        "peak memory (MB)": None if memory is None else memory / 1e6,
    }


def print_runs(runs: Sequence[Run]) -> None:
    """Prints `summary` of the runs, a column each."""
    rows = [summary(run) for run in runs]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    print_table(["", *(run.name for run in runs)], [[key, *(row.get(key) for row in rows)] for key in keys])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m revdeq_hf.report", description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="output folder of a training run")
    parser.add_argument("--output", help="picture to write; default: report.png in the folder, of several folders report.png here")
    options = parser.parse_args(arguments)
    if options.output and (defect := _output_defect(Path(options.output))):
        parser.error(f"--output: {defect}")
    names = [Path(folder).resolve().name for folder in options.folders]
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            runs = [
                read_run(folder, folder if names.count(name) > 1 else name) for folder, name in zip(options.folders, names, strict=True)
            ]
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    for warning in told:
        print(f"{warning.message}.")
    path = options.output or (Path(options.folders[0]) / "report.png" if len(runs) == 1 else "report.png")
    plot_runs(runs, path)
    print_runs(runs)
    print(f"\nThe figure is in {path}.")


if __name__ == "__main__":
    main()
