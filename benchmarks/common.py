"""What the benchmarks share: where they ran, and how rows are kept."""

import csv
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from revdeq_hf import RevDEQConfig
from revdeq_hf.block_revdeq import RevDEQTransformerBlock
from revdeq_hf.modeling_revdeq import RevDEQRotaryEmbedding

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, str]:
    """Commit (with a mark where files differ from it), device, threads and versions."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True, check=False).stdout.strip()

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "commit": git("rev-parse", "--short", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", "../revdeq_hf") else ""),
        "device": device,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def keep(name: str, rows: list[dict[str, Any]]) -> Path:
    """Appends rows, with the environment, to results/NAME.csv; a file of other columns is refused."""
    RESULTS.mkdir(exist_ok=True)
    path, columns = RESULTS / f"{name}.csv", [*environment(), *rows[0]]
    new = not path.exists()
    if not new:
        header = path.read_text(encoding="utf-8").splitlines()[0].split(",")
        if header != columns:
            raise ValueError(f"{path} has the columns {header}, this benchmark writes {columns}; move the old file away")
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        writer.writerows({**environment(), **row} for row in rows)
    return path


def kept(name: str) -> list[dict[str, str]]:
    """The rows of results/NAME.csv; none where there is no such file."""
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def newest(rows: Iterable[dict[str, str]], *columns: str) -> list[dict[str, str]]:
    """Of the rows that are alike in these columns the last one, in their order: what a repeated run measured anew."""
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        key = tuple(row[column] for column in columns)
        found.pop(key, None)
        found[key] = row
    return list(found.values())


def fit(
    name: str, model: nn.Module, next_loss: Callable[[], torch.Tensor], updates: int, rate: float, weight_decay: float, warm_up: int
) -> tuple[float, float]:
    """Trains with AdamW (vectors are not decayed), a linear warm-up of so many updates, a cosine to 0, and gradients clipped at 1.

    Stops where the loss is not finite. Returns the mean loss of the last 50 updates and the seconds of training.
    """
    groups = [[p for p in model.parameters() if (p.dim() > 1) == decayed] for decayed in (True, False)]
    optimizer = torch.optim.AdamW([dict(params=groups[0], weight_decay=weight_decay), dict(params=groups[1], weight_decay=0.0)], lr=rate)
    began, losses = time.perf_counter(), []
    model.train()
    for update in range(updates):
        share = (update + 1) / warm_up if update < warm_up else 0.5 * (1 + math.cos(math.pi * (update - warm_up) / (updates - warm_up)))
        for group in optimizer.param_groups:
            group["lr"] = rate * share
        loss = next_loss()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (update + 1) % 50 == 0:
            print(f"{name}: {update + 1} {sum(losses[-50:]) / 50:.3f} ({time.perf_counter() - began:.0f} s)", flush=True)
        if not math.isfinite(losses[-1]):
            break
    return round(sum(losses[-50:]) / len(losses[-50:]), 4), round(time.perf_counter() - began)


def interleaved(functions: Mapping[str, Callable[[], Any]], repeats: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Seconds of each function, run in turn so that all meet the same machine."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(warm_up + repeats):
        for name, function in functions.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            began = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= warm_up:
                times[name].append(time.perf_counter() - began)
    return times


def transformer_block(batch: int, length: int, width: int, device: str) -> tuple[Any, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """The block that is timed, the language model's; x (batch, length, width), which requires grad; and its rotary positions."""
    config = RevDEQConfig(hidden_size=width, intermediate_size=3 * width, num_attention_heads=4, attn_implementation="sdpa", vocab_size=8)
    x = torch.randn(batch, length, width, device=device, requires_grad=True)
    rotary = RevDEQRotaryEmbedding(config).to(device)(x, torch.arange(length, device=device)[None])
    return RevDEQTransformerBlock(config).to(device), x, rotary


def median(values: list[float]) -> float:
    return statistics.median(values)
