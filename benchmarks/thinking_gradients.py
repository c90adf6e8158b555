"""What is the exact gradient worth? One network learns prefix sums with each kind of gradient, for as many updates; judged on longer strings with more steps.

    python benchmarks/thinking_gradients.py            # trains what has no row yet in benchmarks/results/thinking_gradients.csv
    python benchmarks/thinking_gradients.py --table

The network of examples/think_longer.py, beta 0.8, trained on 16 bits with a fixed number of steps. `float32 reversal` is the reversal as published, which
divides by 1 - beta in floating point. Peak memory is that of the second training step beyond weights and optimizer.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import fit, keep, kept, median
from gradients import FloatReversal
from torch import nn

from revdeq_hf import RevDEQForSemanticSegmentation, RevDEQVisionConfig, ReversibleFixedPoint
from revdeq_hf.training import LiveBytes

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from problems import collate, prefix_sums

BETA, BITS, LONG, BATCH = 0.8, 16, 128, 32
WAYS: dict[str, dict[str, Any]] = {
    "reversible": dict(gradient="reversible"),
    "phantom, k = 1": dict(gradient="phantom", phantom_steps=1),
    "phantom, k = 5": dict(gradient="phantom", phantom_steps=5),
    "implicit": dict(gradient="implicit", adjoint_max_steps=50, adjoint_tol=1e-4),
    "float32 reversal": {},
}


class PublishedReversal(nn.Module):
    """Stands in for a fixed-point layer in training."""

    draws_steps = False

    def __init__(self, block: nn.Module, steps: int) -> None:
        super().__init__()
        self.block, self.steps, self.max_steps = block, steps, steps

    def forward(self, x: torch.Tensor, **kwargs: Any) -> argparse.Namespace:
        z = FloatReversal.apply(self.block, x, BETA, self.steps, torch.float32, *self.block.parameters())
        rows = x.new_zeros(len(x))
        return argparse.Namespace(
            z=z, steps=rows.long(), residual=rows, clamped=rows.long(), nonfinite=rows.long(), evaluations=2 * self.steps
        )


def train(way: str, steps: int, updates: int, hidden: int, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    config = RevDEQVisionConfig.dense_prediction(
        num_channels=1, num_labels=2, kernel_size=(1, 3), hidden_sizes=[hidden], beta=BETA, max_steps=steps, steps_sampling=None
    )
    model: Any = RevDEQForSemanticSegmentation(config)
    exact = model.model.stages[0]
    if way == "float32 reversal":
        learner: Any = PublishedReversal(exact.block, steps)
    else:
        learner = ReversibleFixedPoint(exact.block, beta=BETA, max_steps=steps, **WAYS[way])
    model.model.stages[0] = learner
    rows = list(prefix_sums(BATCH * updates, BITS, seed))
    batches = iter([collate(rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)])
    peaks: list[int] = []

    def next_loss() -> torch.Tensor:
        batch = next(batches)
        if len(peaks) < 2:  # one step more for the measurement, which leaves nothing behind
            with LiveBytes() as memory:
                model(**batch).loss.backward()
            peaks.append(memory.peak)
            model.zero_grad(set_to_none=True)
        return model(**batch).loss

    loss, seconds = fit(f"{way}, {steps} steps, seed {seed}", model, next_loss, updates, 2e-3, 0.0, 50)
    drift: float | str = FloatReversal.drift if way == "float32 reversal" else ""
    if way == "reversible":
        drift = learner.drift.item()
    model.model.stages[0] = exact
    model.eval()

    @torch.no_grad()
    def share_solved(bits: int, most: int) -> float:
        test = prefix_sums(1000, bits, seed + 1, "test")
        right = []
        for start in range(0, 1000, 100):
            batch = collate(list(test.select(range(start, start + 100))))
            right.append((model(batch["pixel_values"], max_steps=most).logits.argmax(1) == batch["labels"]).flatten(1).all(1))
        return round(torch.cat(right).float().mean().item(), 4)

    return {
        "steps": steps,
        "way": way,
        "hidden": hidden,
        "updates": updates,
        "seed": seed,
        "loss": loss,
        f"solved_{BITS}": share_solved(BITS, steps),
        f"solved_{LONG}_at_128": share_solved(LONG, 128),
        "seconds": seconds,
        "peak_bytes": peaks[-1],
        "drift": drift,
    }


def table() -> str:
    """Markdown of the kept rows: what each seed gave, the median of the seconds, the greatest drift."""
    lines = [
        f"| steps | gradient | loss, by seed | solved, {BITS} bits (%) | solved, {LONG} bits at 128 steps (%) | seconds | peak MB | greatest drift |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in sorted(kept("thinking_gradients"), key=lambda row: (int(row["steps"]), list(WAYS).index(row["way"]), int(row["seed"]))):
        groups.setdefault((row["steps"], row["way"]), []).append(row)
    for (steps, way), rows in groups.items():
        solved = [", ".join(f"{100 * float(row[name]):.4g}" for row in rows) for name in (f"solved_{BITS}", f"solved_{LONG}_at_128")]
        drifts = [float(row["drift"]) for row in rows if row["drift"]]
        drift = f"{np.max(drifts):.2g}" if drifts else ""  # NaN, if one is
        seconds = median([float(row["seconds"]) for row in rows])
        peak = max(int(row["peak_bytes"]) for row in rows) / 1e6
        cells = [steps, way, ", ".join(row["loss"] for row in rows), *solved, f"{seconds:.0f}", f"{peak:.1f}", drift]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[12, 24, 64])
    parser.add_argument("--updates", type=int, default=600)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--table", action="store_true", help="print what has been measured")
    options = parser.parse_args(arguments)
    if options.table:
        print(table())
        return
    wanted = [(way, steps, options.updates, options.hidden, seed) for seed in options.seeds for steps in options.steps for way in WAYS]
    done = {(row["way"], *(int(row[name]) for name in ("steps", "updates", "hidden", "seed"))) for row in kept("thinking_gradients")}
    for task in wanted:
        if task not in done:
            print("kept in", keep("thinking_gradients", [partial(train, *task)()]))


if __name__ == "__main__":
    main()
