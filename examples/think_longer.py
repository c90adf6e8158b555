#!/usr/bin/env python
"""Trains an equilibrium network on small problems and tests it on larger ones, with more steps: it thinks longer, and its residual says when it is done.

    python examples/think_longer.py                                          # prefix sums: trained on 32 bits, tested on up to 512
    python examples/think_longer.py --problem mazes --output_dir runs/mazes  # mazes: trained on 9 x 9, tested on 21 x 21
    python examples/think_longer.py --problem sudoku --output_dir runs/sudoku # Sudoku: trained on 26 givens, tested down to 24
    python examples/think_longer.py --problem permutations --output_dir runs/s5 # words of permutations: trained on 16 letters, tested on up to 128
    python examples/think_longer.py --network stack --depth 30               # an explicit network of as many evaluations, with weights of their own
    python examples/think_longer.py --network stack --depth 26 --hidden_size 6 # and one of about as many parameters

The problems are made by `problems.py`; nothing is downloaded. Every flag of TrainingArguments can be given (`--help`). The output folder holds the model,
`results.json`, `think_longer.png` (accuracy against steps for each size, residual of right and wrong answers, steps taken), for mazes also `maze.gif`, one
being solved. An interrupted run goes on with `--resume_from_checkpoint true`; `--max_steps 0` with `--model_name_or_path FOLDER` tests a trained model.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from datasets import Dataset
from flags import given_flags, refuse_idle
from problems import (
    collate,
    collate_digits,
    collate_mosaic,
    collate_sudoku,
    collate_words,
    contradicting,
    guises,
    mazes,
    permutations,
    prefix_sums,
    sudoku,
    sudoku_file,
    turned,
)
from sudoku_network import SudokuConfig, SudokuNetwork, SudokuStack
from time_limit import MAX_MINUTES, TimedTrainer, check_minutes
from torch import nn
from torch.nn import functional as F
from transformers import HfArgumentParser, LlamaConfig, LlamaForTokenClassification, PreTrainedModel, TrainingArguments, set_seed

from revdeq_hf import ResidualLoss, RevDEQConfig, RevDEQForSemanticSegmentation, RevDEQForTokenClassification, RevDEQVisionConfig
from revdeq_hf.block_revdeq import RevDEQPositionNorm
from revdeq_hf.checkpoints import checkpoint_to_resume
from revdeq_hf.layer_revdeq import fixed_point_layers
from revdeq_hf.optimizers import muon_adamw
from revdeq_hf.training import RevDEQCallback, greatest_drift, peak_memory, run_record

Figures = dict[str, Any]
SOLVER = ("beta", "damping", "num_restarts", "gradient", "initial_scale", "path_noise")  # flags that a layer takes as they are
OF_STEPS = ("tol", "test_damping", "test_views")  # of tests of a fixed point; the others are what a comparison of networks shares
OF_TRAINING = ("train_steps", "gradient", "path_noise", "learning_rate", "muon_learning_rate")


@dataclass(frozen=True)
class Problem:
    """What is trained and tested by default. A size is bits, cells of a side, or givens."""

    make: Callable[..., Dataset]  # of count, size, seed, split
    train_size: int
    test_sizes: list[int]
    test_steps: list[int]
    batch: int
    model: type[PreTrainedModel] = RevDEQForSemanticSegmentation
    train_count: int = 20_000
    channels: int = 1  # of its grids
    kernel: tuple[int, int] = (3, 3)
    tokens: dict[str, Any] = field(default_factory=dict)  # of a language model's configuration
    train_steps: tuple[int, int] = (6, 24)  # least and most of a training batch
    test_damping: float | None = None  # None: that of the training
    view: Callable[[Dataset, int], Dataset] | None = None  # the same problems in another guise, of that number
    flags: dict[str, Any] = field(default_factory=dict)  # whose defaults differ, as docs/think_longer.md has them
    collate: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]] = collate


PROBLEMS = {
    "prefix_sums": Problem(
        *(prefix_sums, 32, [32, 128, 512], [12, 24, 48, 96, 192], 64),
        kernel=(1, 3),
        flags=dict(muon_learning_rate=5e-3, residual_weight=1.0),
    ),
    "mazes": Problem(
        *(mazes, 9, [9, 21], [12, 24, 48, 96, 192, 384], 8),
        train_count=120_000,
        channels=3,
        test_damping=0.5,
        train_steps=(8, 24),
        view=turned,
        flags=dict(
            learning_rate=1.5e-3,
            adam_beta2=0.99,
            max_grad_norm=0.25,
            max_steps=15_000,
            label_weights=[1.0, 30.0],
            tiles=2,
            residual_weight=1.5,
        ),
    ),
    "sudoku": Problem(
        *(sudoku, 26, [32, 28, 26, 24], [8, 16, 32, 64, 128], 16, SudokuNetwork),
        train_count=1_000,
        collate=collate_digits,
        test_damping=0.5,
        train_steps=(4, 16),
        flags=dict(
            learning_rate=2e-3,
            adam_beta2=0.99,
            max_grad_norm=0.5,
            max_steps=2000,
            train_guises=1,
            residual_weight=1.0,
        ),
    ),
    "sudoku_tokens": Problem(
        *(sudoku, 36, [40, 32, 26], [8, 16, 32, 64, 128], 32, RevDEQForTokenClassification),
        train_count=1_000,
        tokens=dict(vocab_size=810, num_labels=9, is_causal=False),
        collate=collate_sudoku,
        view=lambda rows, number: guises(rows, 1, number),
        train_steps=(4, 12),
        flags=dict(hidden_size=96, learning_rate=2e-3, max_steps=4000),
    ),
    "permutations": Problem(
        *(permutations, 16, [16, 32, 64, 128], [8, 16, 32, 64, 128, 256], 32, RevDEQForTokenClassification),
        train_count=40_000,
        tokens=dict(vocab_size=3, num_labels=120, use_cache=False),
        collate=collate_words,
        test_damping=0.5,
        train_steps=(8, 16),
        flags=dict(hidden_size=64, learning_rate=3e-3, muon_learning_rate=0.01, adam_beta2=0.98, max_steps=1200),
    ),
}


@dataclass
class ProblemArguments:
    problem: str = field(
        default="prefix_sums",
        metadata={"help": f"One of {', '.join(PROBLEMS)}; defaults below that depend on it are those of prefix sums."},
    )
    train_size: int | None = field(
        default=None, metadata={"help": "Bits, cells of a side, givens or letters of the problems to train on. Default: the problem's."}
    )
    train_count: int | None = field(
        default=None,
        metadata={
            "help": "Problems to train on. Default: 20,000, of mazes 120,000, of Sudoku of either kind 1,000, of permutations 40,000."
        },
    )
    train_guises: int = field(
        default=100,
        metadata={
            "help": "Guises of each Sudoku to train on: digits renamed, rows and columns permuted. Default: 100, of sudoku 1, whose network knows them."
        },
    )
    tiles: int = field(
        default=1,
        metadata={
            "help": "So many training mazes lie side by side on a grid, in each direction, so that its edge is not near everywhere. Default: of mazes 2."
        },
    )
    test_sizes: list[int] | None = field(default=None, metadata={"help": "Sizes to test on. Default: the problem's."})
    test_side: int = field(
        default=9, metadata={"help": "Cells of a side of the Sudoku to test on: 4, 9 or 16; --test_sizes are their givens."}
    )
    test_file: str | None = field(
        default=None,
        metadata={
            "help": "Sudoku to test on in place of drawn ones: a text file, 81 digits or dots a line. --test_count of them are taken."
        },
    )
    test_count: int = field(default=1_000, metadata={"help": "Problems of each size to test on with adaptive steps."})
    curve_count: int = field(default=100, metadata={"help": "So many of them also with each number of steps."})
    test_steps: list[int] | None = field(default=None, metadata={"help": "Steps to test with. Default: the problem's."})
    test_views: int = field(
        default=1,
        metadata={
            "help": "Ways to look at a maze (turned, mirrored: up to 8) or a Sudoku of tokens (in guises) in the test of adaptive steps. "
            "What does not settle in one is looked at in the next; the answer of the smallest residual counts."
        },
    )
    tol: float = field(default=1e-3, metadata={"help": "Relative residual at which an answer is given, in the test of adaptive steps."})
    test_damping: float | None = field(
        default=None,
        metadata={
            "help": "Damping in the tests, which changes no fixed point and lets more be found. "
            "Default: 0.5 for mazes, sudoku and permutations, else the training's."
        },
    )
    problem_seed: int = field(default=1, metadata={"help": "Seed of the problems."})


@dataclass
class NetworkArguments:
    model_name_or_path: str | None = field(default=None, metadata={"help": "Folder of a trained model to go on from, or to test."})
    network: str = field(default="equilibrium", metadata={"help": "equilibrium, or stack: residual blocks with weights of their own."})
    hidden_size: int = field(default=32, metadata={"help": "Channels of the state."})
    depth: int = field(
        default=30, metadata={"help": "Blocks of the stack, each two convolutions like an evaluation of the equilibrium's block."}
    )
    block_type: str = field(default="recall", metadata={"help": "recall, paper or modern."})
    beta: float | None = field(default=None, metadata={"help": "Relaxation, in (0, 2), not 1. Default: 0.8, or that of the trained model."})
    damping: float | None = field(
        default=None,
        metadata={"help": "Share of the state in each value of the block, in [0, 1). Default: 0, or that of the trained model."},
    )
    train_steps: list[int] | None = field(
        default=None,
        metadata={
            "help": "Least and most steps of a training batch, or their number. Default: those of the trained model, or the problem's."
        },
    )
    gradient: str | None = field(
        default=None,
        metadata={"help": "reversible, checkpoint, backprop, implicit or phantom. Default: that of the trained model, or reversible."},
    )
    initial_scale: float | None = field(
        default=None,
        metadata={"help": "Standard deviation of the start states, drawn for each problem. Default: that of the trained model, or 0."},
    )
    path_noise: float | None = field(
        default=None, metadata={"help": "Standard deviation of noise on the path, in training. Default: that of the trained model, or 0."}
    )
    residual_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the places' relative residual in the loss, growing from 0: learn to be right, then to converge. "
            "Default: 1, of mazes 1.5, of sudoku_tokens and permutations 0."
        },
    )
    label_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "How often each of the two labels of a grid counts in the loss, the logits still telling the likelier. Default: once, of mazes 1 and 30."
        },
    )
    num_restarts: int | None = field(
        default=None, metadata={"help": "Start states in the tests, of which the answer of the smallest residual is taken. Default: one."}
    )


@dataclass
class ThinkingArguments(TrainingArguments):
    output_dir: str = field(default="runs/think_longer", metadata={"help": "Where the model and the results are written."})
    max_steps: int = field(default=600, metadata={"help": "Updates."})
    per_device_train_batch_size: int = field(
        default=0, metadata={"help": "Problems in an update. Default: 64, of mazes 8, of sudoku 16, of sudoku_tokens and permutations 32."}
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate."})
    warmup_steps: float = field(default=100, metadata={"help": "Updates over which it rises; or their share, if below 1."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "How it falls."})
    logging_steps: float = field(default=50, metadata={"help": "Updates between logs."})
    save_steps: float = field(default=500, metadata={"help": "Updates between checkpoints."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Keep False: the collator takes what it needs."})
    max_minutes: float | None = field(default=None, metadata={"help": MAX_MINUTES})
    muon_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Peak learning rate of Muon for the matrices, AdamW having the rest. Default: 0.005, of permutations 0.01, of others 0: AdamW alone."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_minutes(self.max_minutes)


class Stack(nn.Module):
    """An explicit residual network: `depth` blocks `h + conv(ReLU(LN(conv(ReLU(LN(h))))))`, each with weights of its own."""

    def __init__(self, channels: int, hidden: int, depth: int, kernel: tuple[int, int], labels: int) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2)
        self.stem = nn.Conv2d(channels, hidden, kernel, padding=padding)

        def half() -> list[nn.Module]:
            return [RevDEQPositionNorm(hidden), nn.ReLU(), nn.Conv2d(hidden, hidden, kernel, padding=padding)]

        self.blocks = nn.ModuleList(nn.Sequential(*half(), *half()) for _ in range(depth))
        self.classifier = nn.Sequential(RevDEQPositionNorm(hidden), nn.Conv2d(hidden, labels, 1))

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        hidden = self.stem(pixel_values)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        logits = self.classifier(hidden)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def refuse_idle_flags(given: set[str], options: NetworkArguments, data: ProblemArguments, trains: bool = True) -> None:
    """A ValueError for flags that would have no effect on the network and the problem that the others name."""
    problem = PROBLEMS[data.problem]
    if options.model_name_or_path:
        refuse_idle(given, ("hidden_size", "depth", "block_type"), f"{options.model_name_or_path!r} has a network already")
    if options.network == "stack":
        refuse_idle(given, (*SOLVER, *OF_STEPS, "train_steps", "block_type", "residual_weight"), "a stack has no fixed point")
    else:
        refuse_idle(given, ["depth"], "it is that of --network stack")
    if problem.model is not RevDEQForSemanticSegmentation:
        refuse_idle(given, ["block_type"], f"the network of {data.problem} has a block of its own")
    if problem.make is not sudoku:
        refuse_idle(given, ["train_guises"], f"--problem {data.problem} is no Sudoku")
    if not trains:
        refuse_idle(
            given,
            (*OF_TRAINING, "train_size", "train_count", "train_guises", "tiles", "label_weights", "residual_weight"),
            "--max_steps 0 trains nothing",
        )
    if data.test_file:
        refuse_idle(given, ["test_sizes"], "the tests are those of --test_file")


def build_stack(options: NetworkArguments, problem: Problem, layer: dict[str, int]) -> nn.Module:
    if options.model_name_or_path:
        if not problem.tokens:
            raise ValueError("--model_name_or_path takes an equilibrium network, or a llama; other stacks are trained from the start")
        return LlamaForTokenClassification.from_pretrained(options.model_name_or_path)
    if problem.model is SudokuNetwork:
        return SudokuStack(options.hidden_size, layer["intermediate_size"], options.depth)
    if problem.tokens:  # the same layers; the problem's mask tells what each token sees
        return LlamaForTokenClassification(LlamaConfig(**layer, num_hidden_layers=options.depth, **problem.tokens))
    return Stack(problem.channels, options.hidden_size, options.depth, problem.kernel, labels=2)


def build_network(options: NetworkArguments, problem: Problem) -> nn.Module:
    if options.network not in ("equilibrium", "stack"):
        raise ValueError(f"--network must be equilibrium or stack, got {options.network!r}")
    layer = dict(hidden_size=options.hidden_size, intermediate_size=2 * options.hidden_size, num_attention_heads=4)
    if options.network == "stack":
        return build_stack(options, problem, layer)
    given: dict[str, Any] = {name: value for name in SOLVER if (value := getattr(options, name)) is not None}
    steps = options.train_steps or (None if options.model_name_or_path else problem.train_steps)
    if steps:
        least, most = steps[0], steps[-1]
        if len(steps) > 2 or not 1 <= least <= most:
            raise ValueError(f"--train_steps takes a number of steps, or the least and the most of them, got {' '.join(map(str, steps))}")
        given["max_steps"] = most
        given["steps_sampling"] = {"distribution": "uniform", "min_steps": least, "max_steps": most} if least < most else None
    if options.model_name_or_path:
        return problem.model.from_pretrained(options.model_name_or_path, **given)
    solve = {"beta": 0.8, **given}
    if problem.model is SudokuNetwork:
        return SudokuNetwork(SudokuConfig(hidden_size=options.hidden_size, intermediate_size=layer["intermediate_size"], **solve))
    if problem.tokens:
        return RevDEQForTokenClassification(RevDEQConfig(**layer, **solve, **problem.tokens))
    config = RevDEQVisionConfig.dense_prediction(
        num_channels=problem.channels,
        num_labels=2,
        kernel_size=problem.kernel,
        hidden_sizes=[options.hidden_size],
        block_type=options.block_type,
        **solve,
    )
    return RevDEQForSemanticSegmentation(config)


class ThinkingTrainer(TimedTrainer):
    """Trains with a loss of its own, where weights are given.

    Args:
        label_weights: label i counts `label_weights[i]` times, in the cross-entropy of the logits shifted by the logarithms of the weights. What cannot be
            known yet is then left at the label of the greater weight; the shift makes up for it in the logits, of which the largest is still that of the
            likeliest label.
        residual_weight: of `ResidualLoss`; the weight rises from 0 to this. A right answer may be read from a state that is no fixed point: one with
            z = f(y), y = f(z) and y other than z, which no step changes either.
        kwargs: of Trainer.
    """

    def __init__(self, label_weights: list[float] | None = None, residual_weight: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.label_weights = label_weights
        self.residual_weight = residual_weight
        self.residual = ResidualLoss(kwargs["model"]) if residual_weight else None
        if label_weights or residual_weight:
            self.model_accepts_loss_kwargs = False  # the loss is a mean of the batch, to be divided by the accumulated ones

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if self.label_weights:
            logits = outputs["logits"].float()
            weights = logits.new_tensor(self.label_weights)
            loss = F.cross_entropy(logits + weights.log().view(-1, 1, 1), inputs["labels"], weights)
        if self.residual and model.training:  # in an evaluation nothing is kept that it could be taken from
            loss = loss + self.residual_weight * self.share * self.residual()
        return (loss, outputs) if return_outputs else loss


# --- the tests ---


@torch.no_grad()
def examine(
    model: nn.Module, problem: Problem, rows: Dataset, device: torch.device, steps: int, tol: float | None = None
) -> dict[str, np.ndarray]:
    """For each problem whether every label is right, the share that is, and the residual and steps of its solve; with `tol` each stops by itself.

    Of causal models, whose places stop one by one, the greatest residual and steps of a problem's places, and for each place its steps and whether its
    label is right, (problems, places).
    """
    layers = [layer for _, layer in fixed_point_layers(model)]
    for layer in layers:
        layer.tol = tol
    cells = problem.collate([rows[0]])["labels"].numel()
    batch_size = max(1, min(100, (8192 if device.type == "cpu" else 2**20) // cells))
    parts = []
    for start in range(0, len(rows), batch_size):
        batch = problem.collate([rows[index] for index in range(start, min(start + batch_size, len(rows)))])
        labels = batch.pop("labels")
        out: Any = model(**{name: value.to(device) for name, value in batch.items()}, **({"max_steps": steps} if layers else {}))
        right = (out["logits"].argmax(1 if "pixel_values" in batch else -1).cpu() == labels).flatten(1).float()
        found = {"exact": right.min(1).values, "labels": right.mean(1)}
        if layers:
            statistics = layers[0].statistics
            assert statistics is not None
            assert statistics.residual is not None
            worst, most = (part.view(len(labels), -1).max(1).values for part in (statistics.residual, statistics.steps))
            found |= {"residual": worst, "steps": most.float()}
            if statistics.steps.numel() > len(labels):
                found |= {"steps_by_place": statistics.steps.view(len(labels), -1), "right_by_place": right}
        parts.append({name: value.cpu().numpy() for name, value in found.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def problems_to_test(problem: Problem, data: ProblemArguments) -> Iterator[tuple[int | str, Dataset]]:
    """Each size, or the file's name, with its problems."""
    if data.test_file:
        yield Path(data.test_file).stem, sudoku_file(data.test_file, data.test_count, data.problem_seed + 1)
        return
    side = {} if data.test_side == 9 else {"side": data.test_side}
    for size in data.test_sizes or problem.test_sizes:
        flags = f"--test_sizes {size}" + (f", --test_side {data.test_side}" if side else "")
        yield size, made(problem, flags, data.test_count, size, data.problem_seed + 1, "test", **side)


def made(problem: Problem, flags: str, *arguments: Any, **side: int) -> Dataset:
    """The problems; where they cannot be made the error names the flags that asked for them."""
    try:
        return problem.make(*arguments, **side)
    except ValueError as error:
        raise ValueError(f"{flags}: {error}") from error


def how_difficult(rows: Dataset, size: int | str) -> list[int]:
    """Cells of each maze's path, givens of each Sudoku, else the size."""
    if "digits" in rows.column_names:
        return [sum(digit > 0 for digit in digits) for digits in rows["digits"]]
    return list(rows["length"]) if "length" in rows.column_names else [int(size)] * len(rows)


def check_tests(data: ProblemArguments, problem: Problem) -> None:
    """Raises an error for tests that could not be made, which would else be told after the training."""
    steps = data.test_steps or problem.test_steps
    for name, value, good, expected in (
        ("test_count", data.test_count, data.test_count >= 1, "at least 1"),
        ("curve_count", data.curve_count, data.curve_count >= 1, "at least 1"),
        ("test_steps", steps, min(steps) >= 1, "at least 1 each"),
        ("tol", data.tol, 0 < data.tol < float("inf"), "a finite number above 0"),
        ("test_damping", data.test_damping, data.test_damping is None or 0 <= data.test_damping < 1, "in [0, 1)"),
    ):
        if not good:
            raise ValueError(f"--{name} must be {expected}, got {value}")
    for _ in problems_to_test(problem, replace(data, test_count=1)):
        pass


def test(model: nn.Module, problem: Problem, data: ProblemArguments, options: NetworkArguments, device: torch.device) -> Figures:
    """Accuracy at every size and number of steps, then with adaptive steps: how residual and right answers go together."""
    model.eval()
    curve: list[Figures] = []
    adaptive: list[Figures] = []
    layers = [layer for _, layer in fixed_point_layers(model)]
    equilibrium = bool(layers)
    damping = problem.test_damping if data.test_damping is None else data.test_damping
    if damping is not None:
        for layer in layers:
            layer.damping = damping
    steps_tested = data.test_steps or problem.test_steps

    def settle(rows: Dataset, size: int | str, kind: str = "") -> Figures:
        began = time.perf_counter()
        found = examine(model, problem, rows, device, max(steps_tested), data.tol)
        for number in range(1, data.test_views):
            assert problem.view is not None
            left = np.flatnonzero(~(found["residual"] <= data.tol))
            if not len(left):
                break
            again = examine(model, problem, problem.view(rows.select(left), number), device, max(steps_tested), data.tol)
            again["steps"] += found["steps"][left]
            found["steps"][left] = again["steps"]
            better = ~(found["residual"][left] <= again["residual"]) & ~np.isnan(again["residual"])
            for name, values in again.items():
                found[name][left[better]] = values[better]
        settled, right = found["residual"] <= data.tol, found["exact"] == 1
        by_place = {
            name: found[name].astype(float).mean(0).round(4).tolist() for name in ("steps_by_place", "right_by_place") if name in found
        }
        return {
            "size": f"{size}{kind}",
            "tol": data.tol,
            "most_steps": max(steps_tested),
            "views": data.test_views,
            "steps": float(found["steps"].mean()),
            "exact": float(right.mean()),
            "settled_right": int((settled & right).sum()),
            "settled_wrong": int((settled & ~right).sum()),
            "unsettled_right": int((~settled & right).sum()),
            "unsettled_wrong": int((~settled & ~right).sum()),
            "seconds": round(time.perf_counter() - began, 2),
            "residuals": [float(f"{value:.3g}") for value in found["residual"]],
            "right": right.astype(int).tolist(),
            "steps_taken": found["steps"].astype(int).tolist(),
            "difficulty": how_difficult(rows, size),
        } | by_place

    for size, rows in problems_to_test(problem, data):
        few = rows.select(range(min(data.curve_count, len(rows)))) if equilibrium else rows
        for steps in steps_tested if equilibrium else [options.depth]:
            began = time.perf_counter()
            found = examine(model, problem, few, device, steps)
            figures: Figures = {name: float(found[name].mean()) for name in ("exact", "labels", "residual") if name in found}
            curve.append({"size": size, "steps": steps, **figures, "seconds": round(time.perf_counter() - began, 2)})
        if equilibrium:
            adaptive.append(settle(rows, size))
            if problem.make is sudoku:
                adaptive.append(settle(contradicting(few, data.problem_seed + 2), size, ", contradicting"))
    return {"curve": curve, "adaptive": adaptive, "test_damping": layers[0].damping if equilibrium else None}


# --- what is shown ---


def plot(tests: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (accuracy, trust, effort) = pyplot.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    for number, size in enumerate(dict.fromkeys(row["size"] for row in tests["curve"])):
        rows = [row for row in tests["curve"] if row["size"] == size]
        accuracy.plot([row["steps"] for row in rows], [100 * row["exact"] for row in rows], "o-", color=f"C{number}", label=f"size {size}")
    accuracy.set(xlabel="steps", ylabel="solved without a mistake (%)", title="Accuracy against steps", ylim=(-4, 104))
    accuracy.legend()
    for number, row in enumerate(tests["adaptive"]):
        right, residuals = np.array(row["right"], bool), np.maximum(row["residuals"], 1e-9)
        spread = np.random.default_rng(0).uniform(-0.3, 0.3, len(right))
        trust.scatter(residuals[right], number + spread[right], s=9, color=f"C{number}", label=f"size {row['size']}, right")
        trust.scatter(residuals[~right], number + spread[~right], s=18, color="black", marker="x")
        if "steps_by_place" in row:
            effort.plot(range(1, len(row["steps_by_place"]) + 1), row["steps_by_place"], color=f"C{number}", label=f"size {row['size']}")
        else:
            effort.scatter(row["difficulty"], row["steps_taken"], s=9, color=f"C{number}", label=f"size {row['size']}")
    if tests["adaptive"]:
        trust.axvline(tests["adaptive"][0]["tol"], color="grey", linestyle=":")
        trust.set(xscale="log", xlabel="residual (dotted: tol; crosses: wrong answers)", title="Residual and right answers")
        trust.set(yticks=range(len(tests["adaptive"])), yticklabels=[row["size"] for row in tests["adaptive"]], ylabel="size")
        effort.set(
            xlabel="place in the word" if "steps_by_place" in tests["adaptive"][0] else "cells of the path, bits, or givens",
            ylabel="steps taken",
            title="Steps until the residual meets tol",
        )
        effort.set_yscale("log", base=2)
        effort.yaxis.set_major_formatter("{x:g}")
        effort.legend(fontsize="small")
    difficulties = [value for row in tests["adaptive"] if "steps_by_place" not in row for value in row["difficulty"]]
    narrow = bool(difficulties) and max(difficulties) < 2 * min(difficulties)  # givens: on a logarithmic axis hardly a tick
    for axes in (accuracy, effort) if tests["adaptive"] and not narrow else (accuracy,):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


@torch.no_grad()
def animate(model: RevDEQForSemanticSegmentation, row: dict[str, Any], steps: int, path: Path, frames: int = 60) -> None:
    """A GIF of a maze being solved: how much each cell is taken for one of the path after each step. Frames lie closer together at the beginning."""
    from PIL import Image

    batch = collate([row])
    grid = batch["pixel_values"]
    device = next(model.parameters()).device
    states = model(grid.to(device), max_steps=steps, num_restarts=1, output_trajectory=True).trajectory[0]
    wanted = sorted({round(index) for index in (len(states) - 1) * np.linspace(0, 1, frames) ** 1.5})
    walls, start, goal = grid[0, 0].numpy() > 0.5, grid[0, 1].numpy() > 0.5, grid[0, 2].numpy() > 0.5
    images = []
    for index in wanted:
        share = model.classifier(states[index])[0].softmax(0)[1].cpu().numpy()[..., None]
        picture = (1 - share) * np.array([245, 245, 245]) + share * np.array([230, 110, 30])
        picture[walls], picture[start], picture[goal] = (40, 44, 60), (40, 160, 80), (60, 90, 220)
        scale = max(1, 354 // len(walls))
        images.append(Image.fromarray(picture.astype(np.uint8)).resize((scale * len(walls),) * 2, Image.Resampling.NEAREST))
    images[0].save(path, save_all=True, append_images=images[1:], duration=[100] * (len(images) - 1) + [2000], loop=0)


def main(arguments: list[str] | None = None) -> dict:
    parser = HfArgumentParser(
        (NetworkArguments, ProblemArguments, ThinkingArguments), description=__doc__.split("\n\n")[0] if __doc__ else None
    )
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--problem", default="prefix_sums")
    chosen = PROBLEMS.get(first.parse_known_args(arguments)[0].problem)
    parser.set_defaults(**(chosen.flags if chosen else {}))
    options, data, training = parser.parse_args_into_dataclasses(args=arguments)
    record = run_record(
        f"python examples/think_longer.py {shlex.join(sys.argv[1:] if arguments is None else arguments)}".strip(), training.device
    )
    if data.problem not in PROBLEMS:
        raise ValueError(f"--problem must be one of {', '.join(PROBLEMS)}, got {data.problem!r}")
    problem = PROBLEMS[data.problem]
    training.per_device_train_batch_size = training.per_device_train_batch_size or problem.batch
    folder = Path(training.output_dir)
    if training.max_steps != 0:
        resume = checkpoint_to_resume(training)
    elif (folder / "results.json").exists():
        raise FileExistsError(f"{folder} holds the results of another run; choose another --output_dir for these tests")
    weights = options.label_weights
    if weights and (problem.model is not RevDEQForSemanticSegmentation or len(weights) != 2 or min(weights) <= 0):
        raise ValueError(f"--label_weights takes two positive numbers, for the labels 0 and 1 of prefix sums or mazes, got {weights}")
    if data.test_views < 1 or (data.test_views > 1 and problem.view is None) or (data.test_views > 8 and problem.make is mazes):
        raise ValueError(f"--test_views is for mazes (1 to 8) and sudoku_tokens (1 or more), got {data.test_views} for {data.problem}")
    if data.tiles != 1 and (problem.make is not mazes or data.tiles < 1):
        raise ValueError(f"--tiles is for mazes and at least 1, got {data.tiles} for {data.problem}")
    if data.test_side != 9 and (problem.model is not SudokuNetwork or data.test_file):
        raise ValueError(
            f"--test_side is for puzzles that --problem sudoku draws, got {data.test_side} for {data.test_file or data.problem}"
        )
    if data.test_file and problem.make is not sudoku:
        raise ValueError(f"--test_file holds Sudoku, got --problem {data.problem}")
    if training.max_steps == 0 and not options.model_name_or_path:
        raise ValueError("--max_steps 0 tests a trained model without training: name it with --model_name_or_path")
    refuse_idle_flags(given_flags(parser, arguments), options, data, trains=training.max_steps != 0)
    check_tests(data, problem)
    set_seed(training.seed)
    model: Any = build_network(options, problem)
    results: Figures = {"problem": data.problem, "parameters": sum(p.numel() for p in model.parameters())}
    if training.max_steps != 0:
        train_size = data.train_size or problem.train_size
        train_count = data.train_count or problem.train_count
        flags = f"--train_size {train_size}, --train_count {train_count}"
        rows = made(problem, flags, train_count, train_size, data.problem_seed, "train")
        if problem.make is sudoku:
            rows = guises(rows, data.train_guises, data.problem_seed)
        trainer = ThinkingTrainer(
            weights,
            options.residual_weight if options.network == "equilibrium" else 0.0,
            model=model,
            args=training,
            train_dataset=rows,
            data_collator=partial(collate_mosaic, tiles=data.tiles) if data.tiles > 1 else problem.collate,
            optimizer_cls_and_kwargs=muon_adamw(training),
        )
        trainer.callback_handler.callbacks.insert(0, RevDEQCallback())  # ahead of the reporting ones
        trained = trainer.train(resume_from_checkpoint=resume)
        trainer.save_model()
        trainer.save_state()
        history = trainer.state.log_history
        results |= {
            "train_size": train_size,
            "updates": trainer.state.global_step,
            "train_loss": [trained.training_loss, *(entry["loss"] for entry in history if "loss" in entry)][-1],
            "train_seconds": trained.metrics["train_seconds"],
            "greatest_drift": greatest_drift(history),
            "peak_memory_bytes": peak_memory(),
        }
        if not trainer.is_world_process_zero():
            return results
        model = extract_model_from_parallel(
            model, keep_fp32_wrapper=False
        )  # tests have no autocast, in which no residual meets a tol of 1e-3
    tests = test(model, problem, data, options, training.device)
    results |= {**tests, "run": record}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    plot(tests, folder / "think_longer.png")
    if data.problem == "mazes" and isinstance(model, RevDEQForSemanticSegmentation):
        size = (data.test_sizes or problem.test_sizes)[-1]
        longest = max(mazes(8, size, data.problem_seed + 2, "test"), key=lambda row: row["length"])
        animate(model, longest, max(1, max(data.test_steps or problem.test_steps) // 2), folder / "maze.gif")
    print(f"{results['parameters']:,} parameters, greatest drift {results.get('greatest_drift')}")
    for row in tests["curve"] + tests["adaptive"]:
        shown = {name: value for name, value in row.items() if not isinstance(value, list)}
        print("  ".join(f"{name} {value:.4g}" if isinstance(value, int | float) else f"{name} {value}" for name, value in shown.items()))
    return results


if __name__ == "__main__":
    main()
