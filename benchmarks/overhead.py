"""What share of a training step is the solver's own work?

A training step of N steps by reversal is compared with the same evaluations of the block without any solver: 2N - 1 without a graph, 1 with its graph,
2N - 1 with graphs again (the recomputation of the backward pass) and 2N vector-Jacobian products, for the same inputs. Both are run in turn
within one process, and the ratio is taken turn by turn, so that neighbours in time met the same machine. With one thread the time is the
processor's, in which waiting for a core that others use does not count; with more, and on an accelerator, it is the clock's. The share is
1 - 1 / ratio: scaling, clamping, rounding and counting, the sums of gradients over evaluations, and what autograd itself does around the solve.

A difference of two long times is noisy, so the same is also measured directly: the solve around a block of one addition, less the same
evaluations of that block alone, as a share of the training step (without the sums of parameter gradients, of which that block has none).

    python benchmarks/overhead.py                    # width 256, 256 tokens, batch 8, on 1 and 2 threads
    python benchmarks/overhead.py --bf16 --threads 1 --steps 4 --repeats 2    # slow where the processor has no bfloat16
"""

import argparse
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from common import interleaved, keep, median, transformer_block
from torch import nn

from revdeq_hf import ReversibleFixedPoint


class Cheap(nn.Module):
    """A block that costs next to nothing."""

    def forward(self, z, x):
        return torch.add(x, z, alpha=0.5)


def in_turn(functions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each function: with one thread those that the processor spent on this process, else those of the clock."""
    if torch.cuda.is_available() or torch.get_num_threads() > 1:  # threads that wait for one another spend processor time too
        return interleaved(functions, repeats, warm_up=1)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(1 + repeats):
        for name, function in functions.items():
            began = time.process_time()
            function()
            if turn:
                times[name].append(time.process_time() - began)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--beta", type=float, default=0.5)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    block, x, rotary = transformer_block(options.batch, options.length, options.width, device)
    cheap = Cheap().to(device)
    state, weight = torch.randn_like(x), torch.randn_like(x)

    def evaluations_alone(block: nn.Module, steps: int, **inputs: Any) -> None:
        leaves = [x, *block.parameters()]

        def call(z: torch.Tensor) -> torch.Tensor:
            with torch.autocast(device, torch.bfloat16, enabled=options.bf16, cache_enabled=False):
                return block(z, x, **inputs).to(x.dtype)

        with torch.no_grad():
            for _ in range(2 * steps - 1):
                call(state)
        for _ in range(2 * steps):  # the first of them is the one whose graph is kept
            z = state.detach().requires_grad_()
            torch.autograd.grad(call(z), [z, *leaves], weight)

    def training_step(block: nn.Module, steps: int, **inputs: Any) -> None:
        layer = ReversibleFixedPoint(block, beta=options.beta, max_steps=steps, drift_policy="ignore")
        with torch.autocast(device, torch.bfloat16, enabled=options.bf16):
            z = layer(x, **inputs).z
        torch.autograd.grad(z, [x, *block.parameters()], weight)
        assert layer.drift == 0

    rows = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for steps in options.steps:
            own = in_turn(
                {"step": partial(training_step, cheap, steps), "alone": partial(evaluations_alone, cheap, steps)}, 3 * options.repeats
            )
            ways = {"step": training_step, "alone": evaluations_alone}
            times = in_turn({name: partial(way, block, steps, position_embeddings=rotary) for name, way in ways.items()}, options.repeats)
            ratios = sorted(a / b for a, b in zip(times["step"], times["alone"], strict=True))
            solver = median([a - b for a, b in zip(own["step"], own["alone"], strict=True)])
            rows.append(
                {
                    "f": "bfloat16 autocast" if options.bf16 else "float32",
                    "shape": f"{options.batch}x{options.length}x{options.width}",
                    "beta": options.beta,
                    "steps": steps,
                    "threads_used": threads,
                    "repeats": options.repeats,
                    "step_seconds": round(median(times["step"]), 3),
                    "ratio": round(median(ratios), 3),
                    "least_ratio": round(ratios[0], 3),
                    "greatest_ratio": round(ratios[-1], 3),
                    "share_outside_f": round(1 - 1 / median(ratios), 3),
                    "solver_seconds": round(solver, 4),
                    "solver_share": round(solver / median(times["step"]), 3),
                }
            )
            print(rows[-1], flush=True)
    print(keep("overhead", rows))


if __name__ == "__main__":
    main()
