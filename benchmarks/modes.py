"""Time and memory of a training step in each gradient mode, as the steps grow.

One transformer block of the language model; modes are timed in turn within one run. Time is given as a ratio to stored backpropagation, memory in
bytes of the tensors made in the step (parameters and inputs not counted): held between the passes, and at the peak.

    python benchmarks/modes.py                       # float32, width 256, 256 tokens, batch 8
    python benchmarks/modes.py --bf16 --steps 8
"""

import argparse
from functools import partial
from typing import Any

import torch
from common import interleaved, keep, median, transformer_block
from torch.utils.checkpoint import checkpoint

from revdeq_hf import ReversibleFixedPoint
from revdeq_hf.training import LiveBytes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--memory_steps", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--beta", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    block, x, rotary = transformer_block(options.batch, options.length, options.width, device)

    def unrolled(steps: int) -> torch.Tensor:
        """Floating point, `torch.utils.checkpoint` around each evaluation: what one would write without this package."""
        beta = options.beta
        call = lambda state: checkpoint(block, state, x, position_embeddings=rotary, use_reentrant=False)  # noqa: E731
        y = z = torch.zeros_like(x)
        for _ in range(steps):
            y = (1 - beta) * y + beta * call(z)
            z = (1 - beta) * z + beta * call(y)
        return z

    layers: dict[str, dict[str, Any] | None] = {
        "reversible": dict(gradient="reversible"),
        "reversible, N graphs kept": dict(gradient="reversible", keep_evaluations=-1),
        "checkpoint": dict(gradient="checkpoint"),
        "backprop": dict(gradient="backprop"),
        "torch.utils.checkpoint, unrolled": None,
    }
    last_drift = torch.zeros(())

    def step(name: str, steps: int) -> int:
        """One forward and backward pass; returns nothing that keeps the graph."""
        nonlocal last_drift
        settings = layers[name]
        with torch.autocast(device, torch.bfloat16, enabled=options.bf16):
            if settings is None:
                z = unrolled(steps)
            else:
                kept = settings.get("keep_evaluations", 1)
                layer = ReversibleFixedPoint(
                    block, beta=options.beta, max_steps=steps, **{**settings, "keep_evaluations": steps if kept == -1 else kept}
                )
                z = layer(x, position_embeddings=rotary).z
        held = memory.alive if memory is not None else 0
        z.float().square().mean().backward()
        if settings is not None and settings["gradient"] == "reversible":
            last_drift = torch.maximum(last_drift, layer.drift.cpu())
        return held

    memory: LiveBytes | None = None
    rows = []
    for steps in sorted({*options.steps, *options.memory_steps}):
        names = [name for name in layers if steps <= 16 or name != "backprop"]
        times: dict[str, list[float]] = {}
        if steps in options.steps:
            times = interleaved({name: partial(step, name, steps) for name in names}, options.repeats, warm_up=1)
        for name in names:
            row: dict[str, Any] = {
                "f": "bfloat16 autocast" if options.bf16 else "float32",
                "shape": f"{options.batch}x{options.length}x{options.width}",
                "beta": options.beta,
                "steps": steps,
                "mode": name,
                "ratio_to_backprop": "",
                "spread": "",
                "held_bytes": "",
                "peak_bytes": "",
            }
            if times:
                # ratios turn by turn: neighbours in time met the same machine
                ratios = sorted(a / b for a, b in zip(times[name], times["backprop"], strict=True))
                row["ratio_to_backprop"], row["spread"] = round(median(ratios), 3), round(ratios[-1] - ratios[0], 3)
            if steps in options.memory_steps:
                block.zero_grad(set_to_none=True)
                x.grad = None
                with LiveBytes() as memory:
                    row["held_bytes"] = step(name, steps)
                row["peak_bytes"] = memory.peak
                memory = None
            row["drift"] = last_drift.item() if name.startswith("reversible") else ""
            rows.append(row)
            print(row, flush=True)
    print(keep("modes", rows))


if __name__ == "__main__":
    main()
