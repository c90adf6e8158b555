"""Is every gradient exact? All betas, depths and precisions, three kinds of block, and the published floating-point reversal beside each.

A cell is one training step. For this package: the drift (greatest absolute difference between the reconstructed and the true start state), whether
all gradients equal those of stored backpropagation in every bit, and their relative error if not. For the published reversal, which divides by
`1 - beta`, with states in float32 and in float64: the relative error of its gradients against stored backpropagation through the very
same floating-point iteration, and its drift. The error is that of all gradients (parameters and x) together.

    python benchmarks/exactness.py                   # 864 cells, some minutes on one core
    python benchmarks/exactness.py --steps 4 8       # fewer
    python benchmarks/exactness.py --tables          # only prints the tables of results/exactness.csv

Ends with exit code 1 if in any cell this package's drift is not 0 or its gradient error is above 1e-5.
"""

import argparse
import math
import sys
from collections.abc import Iterable
from typing import Any

import torch
from common import keep, kept, median, newest
from gradients import FloatReversal, float_iteration
from torch import nn

from revdeq_hf import ReversibleFixedPoint

BETAS = (0.3, 0.5, 0.7, 0.75, 0.8, 0.9, 1.2, 1.5)
STEPS = (1, 2, 4, 8, 13, 16, 32, 64, 100)
PRECISIONS = ("float32", "bfloat16 autocast", "float16 autocast", "float64")
LARGEST_ERROR = 1e-5
TOLERABLE = 1e-2  # a gradient wrong by a percent; the third table says how deep each reversal stays within it
Row = dict[str, Any]


class Transformer(nn.Module):
    """A pre-norm layer on z + x with the identity path from x and a normalised output, which bounds the states at every beta."""

    example = ((2, 16, 32),)

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(3))
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 96), nn.Linear(96, 32)

    def forward(self, z, x):
        u = self.norms[0](z + x)
        q, k, v = (part.view(*u.shape[:2], 4, 8).transpose(1, 2) for part in self.qkv(u).chunk(3, -1))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = x + self.out(attended.transpose(1, 2).reshape(u.shape))
        return self.norms[2](h + self.down(nn.functional.gelu(self.up(self.norms[1](h)))))


class Convolution(nn.Module):
    """3x3 convolutions and group normalisation."""

    example = ((2, 8, 8, 8),)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))
        self.inner, self.outer = nn.GroupNorm(2, 8), nn.GroupNorm(2, 8)

    def forward(self, z, x):
        return self.outer(x + self.second(torch.relu(self.inner(self.first(z) + x))))


class Pair(nn.Module):
    """A state of two tensors of other shapes, each computed from both."""

    example = ((4, 24), (4, 16))

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(40, 24), nn.Linear(40, 16)

    def forward(self, z, x):
        both = torch.cat(z, dim=1)
        return torch.tanh(self.wide(both) + x[0]), torch.tanh(self.narrow(both) + x[1])


BLOCKS: dict[str, Any] = {"transformer": Transformer, "convolution": Convolution, "tuple": Pair}


class Cell:
    """One training step's block, input and loss, made anew from the same seed for each way to compute its gradients."""

    def __init__(self, kind: str, precision: str, device: str) -> None:
        torch.manual_seed(0)
        dtype = torch.float64 if precision == "float64" else torch.float32
        self.block: Any = BLOCKS[kind]().to(device, dtype)
        for parameter in self.block.parameters():
            if parameter.dim() > 1:
                parameter.data.mul_(2.0)  # or f hardly depends on its state: it converges slowly so, and at beta = 1.5 not at all
        self.shapes = self.block.example
        self.x = [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for shape in self.shapes]
        self.weights = [torch.linspace(-1, 1, shape[-1], device=device, dtype=dtype) for shape in self.shapes]
        self.device, self.half = device, getattr(torch, precision.split(maxsplit=1)[0]) if precision.endswith("autocast") else None

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, dtype=self.half, enabled=self.half is not None, cache_enabled=False)

    def gradients(self, z: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        loss = torch.stack([(part * weight).mean() for part, weight in zip(z, self.weights, strict=True)]).sum()
        return list(torch.autograd.grad(loss, [*self.block.parameters(), *self.x]))

    def layer(self, gradient: str, beta: float, steps: int) -> tuple[list[torch.Tensor], ReversibleFixedPoint, float]:
        """Gradients in one of this package's modes, the layer, and the greatest residual at the start of the last step."""
        layer = ReversibleFixedPoint(self.block, beta=beta, max_steps=steps, gradient=gradient, drift_policy="ignore")
        with self.autocast():
            solution = layer(tuple(self.x) if len(self.x) > 1 else self.x[0])
        z = solution.z if isinstance(solution.z, tuple) else (solution.z,)
        assert solution.residual is not None
        return self.gradients(z), layer, solution.residual.max().item()

    def flat(self, parts: Iterable[torch.Tensor]) -> torch.Tensor:
        """Tensors of a state side by side, for the floating-point reversal, which knows one tensor only."""
        return torch.cat([part.flatten(1) for part in parts], dim=1)

    def parts(self, flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        sizes = [math.prod(shape[1:]) for shape in self.shapes]
        return tuple(part.reshape(shape) for part, shape in zip(flat.split(sizes, dim=1), self.shapes, strict=True))

    def floating(self, stored: bool, beta: float, steps: int, wide: torch.dtype) -> list[torch.Tensor]:
        """Gradients of the floating-point iteration, stored by autograd or reversed as published."""

        def call(state: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            z, inputs = self.parts(state), self.parts(x)
            with self.autocast():
                f = self.block(z, inputs) if len(z) > 1 else (self.block(z[0], inputs[0]),)
            return self.flat(f).to(x.dtype)

        x = self.flat(self.x)
        if not stored:
            return self.gradients(self.parts(FloatReversal.apply(call, x, beta, steps, wide, *self.block.parameters())))
        return self.gradients(self.parts(float_iteration(call, x, beta, steps, wide)[1].to(x.dtype)))


def error(got: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Relative, of all tensors together; infinite where anything is not finite."""
    a, b = (torch.cat([t.double().flatten() for t in tensors]) for tensors in (got, expected))
    found = ((a - b).norm() / b.norm()).item()
    return found if math.isfinite(found) else math.inf


def measure(kind: str, precision: str, beta: float, steps: int, device: str) -> Row:
    cell = Cell(kind, precision, device)
    expected, _, residual = cell.layer("backprop", beta, steps)
    got, layer, _ = cell.layer("reversible", beta, steps)
    row: Row = {
        "block": kind,
        "f": precision,
        "beta": beta,
        "steps": steps,
        "residual": f"{residual:.1e}",
        "drift": layer.drift.item(),
        "bit_equal": all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)),
        "gradient_error": error(got, expected),
    }
    for wide in (torch.float32, torch.float64):
        stored, back = (cell.floating(way, beta, steps, wide) for way in (True, False))
        name = str(wide).removeprefix("torch.")
        row[f"{name}_error"] = f"{error(back, stored):.1e}"
        row[f"{name}_drift"] = f"{FloatReversal.drift:.1e}"
    return row


def available(precision: str, device: str) -> bool:
    """Whether every block runs in this precision here."""
    try:
        for kind in BLOCKS:
            Cell(kind, precision, device).layer("reversible", 0.5, 1)
    except RuntimeError as reason:
        print(f"{precision} is left out, {device} does not have it: {reason}")
        return False
    return True


def tables(rows: list[Row]) -> str:
    """Markdown: this package by precision and block; the floating-point reversal beside it by steps; and how deep it stays within a percent."""
    precisions = list(dict.fromkeys(row["f"] for row in rows))
    kinds = list(dict.fromkeys(row["block"] for row in rows))
    steps = sorted({int(row["steps"]) for row in rows})
    betas = sorted({float(row["beta"]) for row in rows})
    lines = [
        "| f | block | cells | greatest drift | equal in every bit | greatest gradient error | residual |",
        "|---|---|---|---|---|---|---|",
    ]
    for f in precisions:
        for kind in kinds:
            of = [row for row in rows if (row["f"], row["block"]) == (f, kind)]
            equal = sum(str(row["bit_equal"]) == "True" for row in of)
            drift, wrong = (max(float(row[name]) for row in of) for name in ("drift", "gradient_error"))
            residuals = [float(row["residual"]) for row in of if int(row["steps"]) == steps[-1]]
            span = f"{min(residuals):.0e} to {max(residuals):.0e}"
            lines.append(f"| {f} | {kind} | {len(of)} | {drift:g} | {equal} | {wrong:.1g} | {span} |")
    lines += ["", "| f | block | states | " + " | ".join(f"N = {n}" for n in steps) + " |", "|---" * (3 + len(steps)) + "|"]
    for f in precisions:
        for kind in kinds:
            for wide in ("float32", "float64"):
                shown = []
                for n in steps:
                    found = [float(row[f"{wide}_error"]) for row in rows if (row["f"], row["block"], int(row["steps"])) == (f, kind, n)]
                    shown.append(f"{median(found):.0e}, {max(found):.0e}")
                lines.append(f"| {f} | {kind} | {wide} | " + " | ".join(shown) + " |")
    columns = [(f, wide) for f in precisions for wide in ("float32", "float64")]
    lines += [
        "",
        "| beta | this package | " + " | ".join(f"{f}, {wide} states" for f, wide in columns) + " |",
        "|---" * (2 + len(columns)) + "|",
    ]
    for beta in betas:
        of = [row for row in rows if float(row["beta"]) == beta]
        shown = [depth(of, steps, "gradient_error")]
        shown += [depth([row for row in of if row["f"] == f], steps, f"{wide}_error") for f, wide in columns]
        lines.append(f"| {beta:g} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def depth(rows: list[Row], steps: list[int], column: str) -> str:
    """The most steps up to which the error of no block exceeds a percent."""
    reached = 0
    for n in steps:
        if any(float(row[column]) > TOLERABLE for row in rows if int(row["steps"]) == n):
            return f"{reached}"
        reached = n
    return f"{reached}+"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--betas", type=float, nargs="+", default=BETAS)
    parser.add_argument("--tables", action="store_true", help="measure nothing, print the tables of results/exactness.csv")
    options = parser.parse_args()
    if options.tables:
        print(tables(newest(kept("exactness"), "device", "block", "f", "beta", "steps")))
        return
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[Row] = []
    for precision in PRECISIONS:
        if not available(precision, device):
            continue
        for kind in BLOCKS:
            for beta in options.betas:
                rows += [measure(kind, precision, beta, steps, device) for steps in options.steps]
                print(rows[-1], flush=True)
    print(keep("exactness", rows))
    print(tables(rows))
    bad = [row for row in rows if row["drift"] != 0 or not row["gradient_error"] <= LARGEST_ERROR]
    if bad:
        sys.exit(f"{len(bad)} of {len(rows)} cells are not exact, the first: {bad[0]}")


if __name__ == "__main__":
    main()
