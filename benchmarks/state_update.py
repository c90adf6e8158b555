"""The arithmetic of one half step (q from f, accumulate, read back as float32) in three representations of the state.

    python benchmarks/state_update.py       # a minute; appends to benchmarks/results/state_update.csv

Why the solver holds int64 with a growing scale: it is as fast as float64, which holds ten bits fewer, and much faster than an int32 state that
divides at every half step.
"""

import argparse

import torch
from common import interleaved, keep, median

from revdeq_hf.solver_revdeq import ExactState, resolution_for

SHAPE = (8, 256, 256)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    f = torch.randn(SHAPE, device=device)
    rows = []
    for beta in (0.5, 0.8):
        r = resolution_for(beta, torch.float32)
        state = ExactState.from_float(torch.zeros(SHAPE, device=device), r)
        wide = torch.zeros(SHAPE, dtype=torch.float64, device=device)
        narrow = torch.zeros(SHAPE, dtype=torch.int32, device=device)
        buffer = torch.zeros(SHAPE, dtype=torch.int32, device=device)
        scratch = torch.empty_like(f)

        def growing_scale(state=state) -> torch.Tensor:
            state.advance(f, 0)
            state.retreat(f, 0)  # so that the state does not grow from call to call
            return state.value(1, torch.float32)

        def float64(wide=wide, scratch=scratch, r=r) -> torch.Tensor:
            for sign in (1, -1):
                q = scratch.copy_(f).nan_to_num_().clamp_(-2048, 2048).mul_(r.beta * 2.0**20).round_()
                wide.add_(q, alpha=sign * r.denominator)
            return wide.to(torch.float32).mul_(2.0**-20 / r.denominator)

        def int32_remainder(narrow=narrow, buffer=buffer, scratch=scratch, r=r) -> torch.Tensor:
            d = r.denominator
            for _ in range(2):
                q = scratch.copy_(f).nan_to_num_().clamp_(-2048, 2048).mul_(r.beta * 2.0**20).round_().to(torch.int32)
                quotient = torch.div(narrow, d, rounding_mode="floor")
                buffer.mul_(d).add_(narrow - quotient * d).remainder_(d)
                narrow.copy_(quotient.add_(q))
            return narrow.to(torch.float32).mul_(2.0**-20)

        times = interleaved({"int64 growing scale": growing_scale, "float64": float64, "int32 remainder": int32_remainder}, repeats=100)
        reference = median(times["int64 growing scale"])
        for name, seconds in times.items():
            rows.append(
                {
                    "beta": beta,
                    "representation": name,
                    "elements": f.numel(),
                    "half_step_ms": round(median(seconds) / 2 * 1e3, 4),
                    "ratio": round(median(seconds) / reference, 3),
                }
            )
            print(rows[-1])
    print(keep("state_update", rows))


if __name__ == "__main__":
    main()
