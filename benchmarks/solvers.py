"""What the approximate gradients and the other solvers are worth, on problems whose answers are known. All in float64.

1. `implicit` against the closed form on a linear problem, with each solver.
2. `implicit` against `backprop` on a contractive map, as the steps of the forward solve grow.
3. `phantom` against `backprop` on the same map, as its damped steps k grow.
4. Evaluations until the relative residual is 1e-6 on a linear problem of growing spectral radius, with each solver.

    python benchmarks/solvers.py                     # a minute on one core

Ends with exit code 1 if an implicit gradient is off the closed form by more than 1e-6, if the errors of 2 and 3 do not fall, or if anderson or broyden
need as many evaluations as picard on the stiffest problem.
"""

import argparse
import sys
from typing import Any

import torch
from common import keep
from torch import nn

from revdeq_hf import ReversibleFixedPoint

SOLVERS = ("picard", "relaxed", "reversible", "anderson", "broyden")
MEMORY = 8
Row = dict[str, Any]


class Linear(nn.Module):
    """f(z, x) = A z + x, A symmetric with eigenvalues spread evenly from -radius / 10 to radius; the fixed point is (I - A)^-1 x."""

    def __init__(self, size: int, radius: float) -> None:
        super().__init__()
        basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]
        self.matrix = nn.Parameter(basis @ torch.diag(torch.linspace(-radius / 10, radius, size, dtype=torch.float64)) @ basis.T)

    def forward(self, z, x):
        return z @ self.matrix.T + x

    def solution(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.solve(torch.eye(len(self.matrix), dtype=x.dtype, device=x.device) - self.matrix, x.T).T


class Contraction(nn.Module):
    """f(z, x) = tanh(k Q z + x), Q orthogonal: Lipschitz with constant k."""

    def __init__(self, size: int, k: float) -> None:
        super().__init__()
        self.matrix = nn.Parameter(k * torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0])

    def forward(self, z, x):
        return torch.tanh(z @ self.matrix.T + x)


def gradients(z: torch.Tensor, inputs: list[torch.Tensor]) -> torch.Tensor:
    """Of a loss with a generator of its own, all in one vector."""
    weights = torch.linspace(-1, 1, z.numel(), dtype=z.dtype, device=z.device).view_as(z)
    return torch.cat([g.flatten() for g in torch.autograd.grad((z * weights).sum() + z.square().sum(), inputs)])


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def row(part: str, problem: str, solver: str, setting: str, value: float, **measured: Any) -> Row:
    empty: Row = {"gradient_error": "", "state_error": "", "evaluations": ""}
    return {"part": part, "problem": problem, "solver": solver, "setting": setting, "value": value, **empty, **measured}


def closed_form(device: str) -> list[Row]:
    rows = []
    for radius in (0.5, 0.9):
        for solver in SOLVERS:
            torch.manual_seed(0)
            block = Linear(32, radius).to(device)
            x = torch.randn(4, 32, dtype=torch.float64, device=device, requires_grad=True)
            layer = ReversibleFixedPoint(
                block,
                0.8,
                400,
                tol=1e-11,
                gradient="implicit",
                solver=solver,
                solver_memory=MEMORY,
                adjoint_tol=1e-12,
                adjoint_max_steps=400,
            )
            solution, exact = layer(x), block.solution(x)
            errors = relative(gradients(solution.z, [x, block.matrix]), gradients(exact, [x, block.matrix])), relative(solution.z, exact)
            shown = dict(zip(("gradient_error", "state_error"), (f"{e:.1e}" for e in errors), strict=True))
            rows.append(row("closed form", "linear", solver, "radius", radius, **shown, evaluations=solution.evaluations))
    return rows


def approximations(device: str) -> list[Row]:
    rows = []
    for k in (0.5, 0.8):
        torch.manual_seed(0)
        block = Contraction(32, k).to(device)
        x = torch.randn(4, 32, dtype=torch.float64, device=device, requires_grad=True)
        inputs = [x, block.matrix]
        problem = f"tanh, k = {k}"
        for steps in (1, 2, 4, 8, 16, 32):
            stored = gradients(ReversibleFixedPoint(block, 0.8, steps, gradient="backprop")(x).z, inputs)
            layer = ReversibleFixedPoint(block, 0.8, steps, gradient="implicit", adjoint_tol=1e-12, adjoint_max_steps=400)
            found = relative(gradients(layer(x).z, inputs), stored)
            rows.append(row("implicit", problem, "reversible", "steps", steps, gradient_error=f"{found:.1e}"))
        stored = gradients(ReversibleFixedPoint(block, 0.8, 100, gradient="backprop")(x).z, inputs)
        for count in (1, 2, 4, 8, 16, 32):
            z = ReversibleFixedPoint(block, 0.8, 100, gradient="phantom", phantom_steps=count)(x).z
            rows.append(row("phantom", problem, "reversible", "k", count, gradient_error=f"{relative(gradients(z, inputs), stored):.1e}"))
    return rows


def evaluations(device: str) -> list[Row]:
    rows = []
    for radius in (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995):
        torch.manual_seed(0)
        block = Linear(64, radius).to(device)
        x = torch.randn(4, 64, dtype=torch.float64, device=device)
        for solver in SOLVERS:
            layer = ReversibleFixedPoint(block, 0.8, 5000, tol=1e-6, gradient="implicit", solver=solver, solver_memory=MEMORY)
            with torch.no_grad():
                solution = layer(x)
                off = relative(solution.z, block.solution(x))
            assert solution.residual is not None
            count = solution.evaluations if bool((solution.residual <= 1e-6).all()) else f"over {solution.evaluations}"
            rows.append(row("evaluations", "linear", solver, "radius", radius, state_error=f"{off:.1e}", evaluations=count))
    return rows


def table(rows: list[Row], part: str, column: str) -> str:
    """Markdown: a line for each problem and solver, a column for each value of the setting."""
    of = [r for r in rows if r["part"] == part]
    values = list(dict.fromkeys(r["value"] for r in of))
    lines = [
        f"| {part}: {column} | " + " | ".join(f"{of[0]['setting']} = {value}" for value in values) + " |",
        "|---" * (1 + len(values)) + "|",
    ]
    for problem, solver in dict.fromkeys((r["problem"], r["solver"]) for r in of):
        cells = [str(r[column]) for r in of if (r["problem"], r["solver"]) == (problem, solver)]
        lines.append(f"| {problem}, {solver} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def falls(rows: list[Row], part: str) -> bool:
    """Whether every error is below the one before, and the last far below the first."""
    for problem in {r["problem"] for r in rows if r["part"] == part}:
        errors = [float(r["gradient_error"]) for r in rows if (r["part"], r["problem"]) == (part, problem)]
        if any(later >= earlier > 1e-9 for earlier, later in zip(errors, errors[1:], strict=False)) or errors[-1] > 1e-3 * errors[0]:
            return False
    return True


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0]).parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = closed_form(device) + approximations(device) + evaluations(device)
    print(keep("solvers", rows))
    for part, column in (
        ("closed form", "gradient_error"),
        ("implicit", "gradient_error"),
        ("phantom", "gradient_error"),
        ("evaluations", "evaluations"),
    ):
        print(table(rows, part, column))
    wrong = [r for r in rows if r["part"] == "closed form" and not float(r["gradient_error"]) <= 1e-6]
    stiffest = {r["solver"]: r["evaluations"] for r in rows if r["part"] == "evaluations" and r["value"] == 0.995}
    slow = [name for name in ("anderson", "broyden") if isinstance(stiffest[name], str) or not stiffest[name] < stiffest["picard"]]
    if wrong or slow or not falls(rows, "implicit") or not falls(rows, "phantom"):
        sys.exit(f"not as promised: off the closed form {wrong}, no faster than picard {slow}, or an error above that does not fall")


if __name__ == "__main__":
    main()
