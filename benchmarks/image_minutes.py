"""How good is an image classifier after so many minutes on a processor? The blocks of the study beside explicit residual networks in the same surroundings.

Each network trains for as many updates as fit into the minutes (by the median time of its own updates, measured first), in the order and with the augmentation
and schedule of the study; the loops in the gradient mode `reversible`. A row is kept per network.

    python benchmarks/image_minutes.py --data cifar10 [--minutes 10] [--threads 1] [--networks NAME ...]     # folders as in image_study.py
    python benchmarks/image_minutes.py --table
"""

import argparse
import time
from pathlib import Path
from typing import Any, cast

import torch
from common import fit, keep, kept, median
from image_study import VARIANTS, StudyModel, build, evaluate, losses, read_both

from revdeq_hf import ReversibleFixedPoint
from revdeq_hf.training import LiveBytes

NETWORKS = (
    "mixer 5",
    "paper",
    "explicit, same parameters",
    "explicit, same evaluations",
    "explicit mixer, same parameters",
    "explicit mixer, same evaluations",
)
BATCH, RATE, SEED = 64, 3e-3, 0


def make(name: str, classes: int) -> StudyModel:
    model = build(VARIANTS[name], classes, SEED)
    if not model.variant.explicit:
        for stage in cast(list[ReversibleFixedPoint], list(model.stages)):
            stage.gradient = "reversible"
    return model


def measure(model: StudyModel, images: torch.Tensor, labels: torch.Tensor) -> tuple[float, int]:
    """Median seconds of an update and the peak bytes of a training step beyond the weights; the model is changed."""
    next_loss = losses(model, images, labels, BATCH, SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    model.train()

    def update() -> None:
        optimizer.zero_grad(set_to_none=True)
        next_loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    times = []
    for _ in range(13):
        began = time.perf_counter()
        update()
        times.append(time.perf_counter() - began)
    with LiveBytes() as memory:
        update()
    return median(times[3:]), memory.peak


def train(name: str, minutes: float, data: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Any]:
    """One network; returns its row."""
    images, labels = data["train"]
    classes = int(labels.max()) + 1
    seconds_per_update, peak = measure(make(name, classes), images, labels)
    updates = max(20, int(60 * minutes / seconds_per_update))
    model = make(name, classes)
    next_loss = losses(model, images, labels, BATCH, SEED)
    loss, seconds = fit(name, model, next_loss, updates, RATE, weight_decay=0.05, warm_up=updates // 10)
    found = evaluate(model, *data["test"])
    return {
        "network": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "minutes": minutes,
        "updates": updates,
        "batch": BATCH,
        "seconds_per_update": round(seconds_per_update, 4),
        "seconds": seconds,
        "peak_bytes": peak,
        "train_loss": loss,
        **{
            column: found[column] for column in ("accuracy", "loss", "accuracy_double", "accuracy_quadruple", "residual_quadruple", "drift")
        },
    }


def table() -> None:
    """Prints the rows as Markdown, the most accurate first."""
    print(f"| network | parameters | updates | seconds | peak MB | accuracy | at 2N | at 4N | drift |\n|{'---|' * 9}")
    for row in sorted(kept("image_minutes"), key=lambda row: -float(row["accuracy"])):
        accuracies = (row[column] and f"{float(row[column]):.1%}" for column in ("accuracy", "accuracy_double", "accuracy_quadruple"))
        cells = (
            row["network"],
            row["parameters"],
            row["updates"],
            row["seconds"],
            f"{int(row['peak_bytes']) / 1e6:.0f}",
            *accuracies,
            row["drift"],
        )
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", type=Path, default=Path("cifar10"), help="folder with train/CLASS/*.png and test/CLASS/*.png")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS, metavar="NAME", help="only these")
    parser.add_argument("--minutes", type=float, default=10.0, help="of training, each")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--test_images", type=int, default=10_000, help="test images, spread over the classes")
    parser.add_argument("--table", action="store_true", help="print the rows kept so far and stop")
    options = parser.parse_args()
    if options.table:
        table()
        return
    torch.set_num_threads(options.threads)
    data = read_both(options.data, options.test_images)
    for name in options.networks:
        row = train(name, options.minutes, data)
        print(row, flush=True)
        keep("image_minutes", [row])


if __name__ == "__main__":
    main()
