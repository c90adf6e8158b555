"""Theorem 3.1 of the paper (arXiv 2509.12917), measured on the iterates.

Let f be k-Lipschitz in z with k < 1, z* its fixed point, and 0 < beta < 2 / (1 + k). Then r = |1 - beta| + beta k < 1, and with the norm of a pair
e(y, z) = max(||y - z*||, ||z - z*||) every step of the iteration contracts by r:

    ||y' - z*|| <= |1 - beta| ||y - z*|| + beta k ||z  - z*|| <= r e
    ||z' - z*|| <= |1 - beta| ||z - z*|| + beta k ||y' - z*|| <= (|1 - beta| + beta k r) e <= r e

The norm must be that of the pair: ||z - z*|| by itself need not fall at every step.
"""

import math
from fractions import Fraction

import pytest
import torch
from torch import nn

from revdeq_hf import ReversibleFixedPoint

SIZE = 6
RESOLUTION = 2.0**-40  # of float64 states; what rounding adds to an error in a step is a few of these


class Lipschitz(nn.Module):
    """f(z, x) = k g(Q z) + x, Q orthogonal and g = identity, sin or tanh: k is its Lipschitz constant, for the identity at every z."""

    def __init__(self, kind: str, k: float) -> None:
        super().__init__()
        random = torch.linalg.qr(torch.randn(SIZE, SIZE, dtype=torch.float64))[0]
        signs = torch.tensor([1.0, -1.0] * (SIZE // 2), dtype=torch.float64)
        quarter = torch.block_diag(*[torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)] * (SIZE // 2))
        self.matrix = {
            "eigenvalues +-k": random @ signs.diag() @ random.T,
            "eigenvalues +-ik": random @ quarter @ random.T,
            "eigenvalues of modulus k": random,
        }.get(kind, random)
        self.g = {"sin": torch.sin, "tanh": torch.tanh}.get(kind, lambda z: z)
        self.k = k
        self.x, self.z0 = torch.randn(2, 3, SIZE, dtype=torch.float64)
        self.solution = self.x
        for _ in range(math.ceil(math.log(1e-14) / math.log(k))):
            self.solution = self(self.solution, self.x)

    def forward(self, z, x):
        return self.k * self.g(z @ self.matrix.T) + x


KINDS = ["eigenvalues +-k", "eigenvalues +-ik", "eigenvalues of modulus k", "sin", "tanh"]


def errors(block: Lipschitz, beta: float, steps: int) -> torch.Tensor:
    """e(y_n, z_n), (steps + 1, batch): the states that the block was called with, z_0, y_1, z_1, y_2, ..., and the state returned."""
    seen: list[torch.Tensor] = []
    handle = block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    with torch.no_grad():
        solution = ReversibleFixedPoint(block, beta=beta, max_steps=steps)(block.x, z0=block.z0, output_trajectory=True)
    handle.remove()
    assert solution.clamped.sum() == 0
    z, y = [seen[0], *solution.trajectory], [seen[0], *seen[1::2]]
    assert len(y) == len(z) == steps + 1
    for a, b in zip(z[1:-1], seen[2::2], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=RESOLUTION)  # between two segments a state is rounded to the resolution
    target = block.solution
    return torch.stack([torch.maximum((a - target).norm(dim=1), (b - target).norm(dim=1)) for a, b in zip(y, z, strict=True)])


def betas_within(k: float) -> list[Fraction]:
    """Across (0, 2 / (1 + k)): fractions of the bound, and those in use."""
    bound = Fraction(2 / (1 + k))
    found = {(bound * share / 1000).limit_denominator(1000) for share in (10, 300, 700, 990)}
    found |= {Fraction(n, 10) for n in (5, 8, 12, 15) if Fraction(n, 10) < bound}
    return sorted(beta for beta in found if 0 < beta < bound and beta != 1)


@pytest.mark.parametrize("k", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("kind", KINDS)
def test_the_pair_contracts_at_every_step(kind, k):
    block = Lipschitz(kind, k)
    for beta in betas_within(k):
        rate = abs(1 - float(beta)) + float(beta) * k
        assert rate < 1
        e = errors(block, float(beta), steps=30)
        assert (e[1:] <= rate * e[:-1] + 4 * SIZE * RESOLUTION).all(), (beta, (e[1:] / e[:-1]).max())
        assert (e[-1] <= rate**30 * e[0] + 4 * SIZE * RESOLUTION / (1 - rate)).all()


@pytest.mark.parametrize("k", [0.3, 0.5, 0.9])
def test_the_bound_is_sharp(k):
    """Where f turns by a quarter, beta just outside diverges though f contracts, and just inside converges."""
    block = Lipschitz("eigenvalues +-ik", k)
    bound = 2 / (1 + k)
    inside, outside = (float(Fraction(bound * share).limit_denominator(1000)) for share in (0.98, 1.02))
    assert 0 < inside < bound < outside < 2
    assert (errors(block, inside, 200)[-1] < errors(block, inside, 1)[0] * 0.1).all()
    e = errors(block, outside, 60)
    assert (e[-1] > 1.5 * e[20]).all()
    assert (e[20] > e[0] / 2).all()


@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("beta", [0.3, 0.5, 0.8, 1.2])
def test_the_rate_of_linear_maps_is_that_of_the_pairs_matrix(kind, beta):
    """An eigenvalue a of f gives the pair a matrix of its own, [[1 - beta, beta a], [beta a (1 - beta), 1 - beta + (beta a)^2]]: y' is used at once."""
    k = 0.6
    a = beta * k * (1 if kind == KINDS[0] else 1j)
    matrix = torch.tensor([[1 - beta, a], [a * (1 - beta), 1 - beta + a * a]], dtype=torch.complex128)
    predicted = torch.linalg.eigvals(matrix).abs().max().item()
    steps = min(60, int(math.log(1e-7) / math.log(predicted)))
    e = errors(Lipschitz(kind, k), beta, steps)
    half = steps // 2
    measured = (e[-1] / e[half]) ** (1 / (steps - half))
    torch.testing.assert_close(measured, torch.full_like(measured, predicted), rtol=0.1, atol=0)
    assert predicted <= abs(1 - beta) + beta * k
