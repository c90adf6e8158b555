"""Time and memory of a training step of the paper's multi-scale image network in each exact gradient mode, as ratios to stored backpropagation.

python benchmarks/image_modes.py [--batch 64] [--bf16]
"""

import argparse
from functools import partial
from typing import Any

import torch
from common import interleaved, keep, median

from revdeq_hf import RevDEQForImageClassification, RevDEQVisionConfig
from revdeq_hf.layer_revdeq import fixed_point_layers
from revdeq_hf.training import LiveBytes

MODES = ("reversible", "checkpoint", "backprop")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--bf16", action="store_true", help="under bfloat16 autocast")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model: Any = RevDEQForImageClassification(RevDEQVisionConfig.paper_cifar10_multiscale()).to(device)
    images, labels = torch.randn(options.batch, 3, 32, 32, device=device), torch.randint(0, 10, (options.batch,), device=device)
    layers = [layer for _, layer in fixed_point_layers(model)]

    def step(mode: str) -> None:
        for layer in layers:
            layer.gradient = mode
        model.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=options.bf16):
            loss = model(images, labels=labels).loss
        loss.backward()

    peaks, drifts = {}, {}
    for mode in MODES:  # this warms up too
        model.zero_grad(set_to_none=True)
        with LiveBytes() as memory:
            step(mode)
        peaks[mode] = memory.peak  # the weights were there before
        drifts[mode] = max(layer.drift.item() for layer in layers) if mode == "reversible" else ""
    times = interleaved({mode: partial(step, mode) for mode in MODES}, options.repeats, warm_up=0)
    rows: list[dict[str, Any]] = []
    for mode in MODES:
        ratios = [a / b for a, b in zip(times[mode], times["backprop"], strict=True)]
        rows.append(
            {
                "f": "bfloat16 autocast" if options.bf16 else "float32",
                "batch": options.batch,
                "mode": mode,
                "ratio_to_backprop": round(median(ratios), 3),
                "spread": round(max(ratios) - min(ratios), 3),
                "peak_bytes": peaks[mode],
                "drift": drifts[mode],
            }
        )
        print(rows[-1], flush=True)
    print(keep("image_modes", rows))


if __name__ == "__main__":
    main()
