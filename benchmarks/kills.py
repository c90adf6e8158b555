"""Kills a training run at random moments and compares the run that goes on with one that was never stopped.

    python benchmarks/kills.py

Each trial starts examples/train_language.py, kills it (SIGKILL) at a moment drawn between the birth of its output folder and its end, and goes on
from the newest whole checkpoint, or from the start where there is none; half of the runs that go on are killed once more. Steps are
drawn, dropout is on, gradients are accumulated, checkpoints are written every fifth update. Every other trial streams its data. Further trials
wait after that moment until a checkpoint is half written, and kill then. Appends a row per trial to results/kills.csv: losses, gradient norms,
residuals and final weights are compared, so 0 is equality to the last bit.
"""

import argparse
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import keep
from safetensors.torch import load_file

from revdeq_hf.checkpoints import STATE, checkpoint_defect, last_whole_checkpoint

SCRIPT = Path(__file__).parents[1] / "examples" / "train_language.py"
FLAGS = shlex.split(
    "--vocab_size 300 --block_size 32 --hidden_size 32 --intermediate_size 64 --dropout 0.1 --per_device_train_batch_size 4 "
    "--gradient_accumulation_steps 2 --max_steps 60 --save_steps 5 --logging_steps 5 --learning_rate 1e-2 --sample_tokens 0 --disable_tqdm true"
)
DATA = {"packed": [], "stream": ["--streaming", "true", "--shuffle_buffer", "16"]}
COMPARED = ("step", "loss", "grad_norm", "learning_rate", "residual", "residual_max", "solver_steps", "drift", "eval_loss")


def command(folder: Path, corpus: Path, data: str, *more: str) -> list[str]:
    steps = json.dumps({"distribution": "uniform", "min_steps": 1, "max_steps": 4})
    return [
        *(sys.executable, str(SCRIPT), "--train_file", str(corpus), "--output_dir", str(folder), "--steps_sampling", steps),
        *(*FLAGS, *DATA[data], *more),
    ]


def finished(arguments: list[str]) -> None:
    subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def timed(arguments: list[str], folder: Path) -> float:
    """Runs to the end; returns the seconds from the birth of the folder on."""
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        born = birth(process, folder)
    if process.returncode:
        raise RuntimeError(f"the run ended with code {process.returncode}: {' '.join(arguments)}")
    return time.perf_counter() - born


def birth(process: subprocess.Popen, folder: Path) -> float:
    while not folder.exists():
        if process.poll() is not None:
            raise RuntimeError(f"the run ended with code {process.returncode} before it began to train")
        time.sleep(0.01)
    return time.perf_counter()


def killed(arguments: list[str], folder: Path, moment: float, writing: bool = False) -> bool:
    """Runs for so many seconds after the birth of the folder (of the process, where it is there) and kills; False if it had ended.

    With `writing` it waits on until there is a checkpoint without the file that is written last.
    """
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        birth(process, folder)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            while writing and process.poll() is None and all((path / STATE).exists() for path in folder.glob("checkpoint-*")):
                time.sleep(0.001)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
    return process.returncode == -signal.SIGKILL


def logged(folder: Path) -> list[dict]:
    entries = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [{name: entry[name] for name in COMPARED if name in entry} for entry in entries if {"loss", "eval_loss"} & entry.keys()]


def differences(whole: Path, other: Path) -> dict[str, float]:
    """The greatest difference of a logged number and of a weight; NaN where the logs have not the same entries."""
    one, two = logged(whole), logged(other)
    same = [entry.keys() for entry in one] == [entry.keys() for entry in two]
    log = max(abs(a[name] - b[name]) for a, b in zip(one, two, strict=True) for name in a) if same else float("nan")
    weights, others = (load_file(folder / "model.safetensors") for folder in (whole, other))
    return {"log_difference": log, "weight_difference": max(float((weights[name] - others[name]).abs().max()) for name in weights)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=10, help="killed at a random moment")
    parser.add_argument("--writing", type=int, default=4, help="further trials, killed while a checkpoint is written")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    torch.set_num_threads(1)
    draw, rows = random.Random(options.seed), []
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        corpus = home / "corpus.txt"
        words = ("alpha", "beta", "gamma", "delta")
        corpus.write_text("".join(" ".join(word for word in draw.choices(words, k=6) for _ in (0, 1)) + "\n" for _ in range(400)))
        seconds = {data: timed(command(home / data, corpus, data), home / data) for data in DATA}
        for trial in range(options.trials + options.writing):
            writing = trial >= options.trials
            data = list(DATA)[trial % len(DATA)]
            folder = home / f"trial-{trial}"
            kills = 0
            while not kills:  # a run that was faster than the first one may have ended before its moment
                shutil.rmtree(folder, ignore_errors=True)
                moment = draw.uniform(0, seconds[data] / (4 if writing else 1))
                kills += killed(command(folder, corpus, data), folder, moment, writing)
            from_step, torn = state(folder)
            if draw.random() < 0.5:
                kills += killed(resuming(folder, corpus, data), folder, draw.uniform(0, 2 * seconds[data]))
                torn += state(folder)[1]
            finished(resuming(folder, corpus, data))
            row = {
                "trial": trial,
                "data": data,
                "killed": "writing" if writing else "any time",
                "moment_seconds": round(moment, 2),
                "run_seconds": round(seconds[data], 2),
                "kills": kills,
                "resumed_from_update": from_step,
                "torn_checkpoints": torn,
                **differences(home / data, folder),
            }
            rows.append(row)
            print(row, flush=True)
    print(keep("kills", rows))


def state(folder: Path) -> tuple[int, int]:
    """The update of the newest whole checkpoint, and how many are not whole."""
    last = last_whole_checkpoint(folder)
    torn = sum(checkpoint_defect(path) is not None for path in folder.glob("checkpoint-*"))
    return int(Path(last).name.rsplit("-", 1)[1]) if last else 0, torn


def resuming(folder: Path, corpus: Path, data: str) -> list[str]:
    return command(folder, corpus, data, *(["--resume_from_checkpoint", "true"] if last_whole_checkpoint(folder) else []))


if __name__ == "__main__":
    main()
