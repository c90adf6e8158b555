"""An equilibrium network for Sudoku, and for whoever wants to see a whole transformers model built around `ReversibleFixedPoint`.

A cell of a puzzle with n digits has n *candidates*, one for each digit that it might hold: the network's places are these (n^3 of them, 729 for
9 x 9), all with the same weights. What a candidate knows of the others are means over its *units*: the same digit in its row, its column and its
box, and the other digits of its cell. So the rules are all that the network is told, and its answer to a puzzle in another guise (digits renamed,
rows or columns permuted within their bands, transposed) is the same answer in that guise: it need not learn them. (The exchangeable layers of Hartford
et al., arXiv 1803.02879, with one unit more.)

    config = SudokuConfig(hidden_size=32, max_steps=12)
    model = SudokuNetwork(config)
    model(input_ids=digits, labels=solution).loss.backward()  # digits (puzzles, 81), 0 where nothing is given; solution (puzzles, 81), the digits less one
"""

import math
from functools import cache

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import TokenClassifierOutput

from revdeq_hf import ReversibleFixedPoint

SOLVER_SETTINGS = (
    *("beta", "max_steps", "tol", "gradient", "steps_sampling"),
    *("damping", "initial_scale", "path_noise", "num_restarts"),
)
UNKNOWN, GIVEN, EXCLUDED = range(3)  # what is given of a candidate: nothing, its digit, another digit of its cell


class SudokuConfig(PreTrainedConfig):
    """hidden_size: channels of a candidate's state. intermediate_size: channels inside the block. The others: as in `ReversibleFixedPoint`."""

    model_type = "revdeq_sudoku"

    hidden_size: int = 32
    intermediate_size: int = 64
    beta: int | float = 0.8
    max_steps: int = 12
    tol: int | float | None = None
    gradient: str = "reversible"
    steps_sampling: dict | None = None
    damping: int | float = 0.0
    initial_scale: int | float = 0.0
    path_noise: int | float = 0.0
    num_restarts: int = 1


@cache  # by the device too: a copy to it at every evaluation would make the host wait
def units(side: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """(3 * side, side * side): 1 where the cell lies in the row, the column or the box, else 0."""
    cells, root = torch.arange(side * side, device=device), math.isqrt(side)
    row, column = cells // side, cells % side
    box = root * (row // root) + column // root
    return torch.cat([line == cells[:side, None] for line in (row, column, box)]).to(dtype)


class SudokuBlock(nn.Module):
    """`f(z, x) = LN(W ReLU(LN(V z + sum_k U_k m_k(z) + V' x)) + x)`, over the four units k of each candidate; rows and columns share their U.

    `m_k(z)` is thrice the mean of the states in the unit, the candidate's own included. (Thrice, so that it has the scale of z where these are nine that
    differ. Means, since what is learned with nine digits then carries over to sixteen, better than with sums or sums over the root of n.) Like the recall
    block of dense prediction it has no identity path from z, so that a candidate forgets what it was before.
    """

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.own = nn.Linear(hidden, intermediate)
        self.line, self.box, self.cell, self.given = (nn.Linear(hidden, intermediate, bias=False) for _ in range(4))
        self.inner_norm = nn.LayerNorm(intermediate)
        self.out = nn.Linear(intermediate, hidden)
        self.norm = nn.LayerNorm(hidden)

    def forward(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """z and x (puzzles, candidates, hidden): cell by cell, of each cell digit by digit."""
        puzzles, candidates, hidden = z.shape
        side = round(candidates ** (1 / 3))
        belongs, scale = units(side, z.device, z.dtype), 3 / side
        by_unit = (scale * belongs @ z.view(puzzles, side**2, side * hidden)).view(puzzles, 3 * side, side, hidden)
        lines, boxes = by_unit.split((2 * side, side), 1)
        heard = torch.cat([self.line(lines), self.box(boxes)], 1)
        heard = belongs.T @ heard.view(puzzles, 3 * side, -1)  # (puzzles, cells, side * intermediate)
        in_cell = self.cell(scale * z.view(puzzles, side**2, side, hidden).sum(2, keepdim=True))
        inner = (heard.view(puzzles, side**2, side, -1) + in_cell).view(puzzles, candidates, -1) + self.own(z) + self.given(x)
        return self.norm(self.out(F.relu(self.inner_norm(inner))) + x)


def embed(digits: torch.Tensor, embedding: nn.Embedding) -> torch.Tensor:
    """What is given of each candidate: digits (puzzles, cells), 0 for an empty cell, to (puzzles, candidates, hidden)."""
    side = math.isqrt(digits.shape[-1])
    if digits.dim() != 2 or math.isqrt(side) ** 4 != digits.shape[-1]:
        raise ValueError(f"input_ids must be (puzzles, cells) of 16, 81 or 256 cells, row by row, got {tuple(digits.shape)}")
    if digits.numel() and not 0 <= int(digits.min()) <= int(digits.max()) <= side:
        raise ValueError(f"input_ids are digits of 1 to {side}, or 0 for an empty cell, got {int(digits.min())} to {int(digits.max())}")
    here = digits[..., None] == torch.arange(1, side + 1, device=digits.device)
    state = torch.where(here, GIVEN, torch.where(digits[..., None] == 0, UNKNOWN, EXCLUDED))
    return embedding(state.flatten(1))


def answer(logits: torch.Tensor, labels: torch.Tensor | None) -> TokenClassifierOutput:
    """logits (puzzles, candidates), labels (puzzles, cells) or None; the output has the logits as (puzzles, cells, side), one for each digit."""
    side = round(logits.shape[-1] ** (1 / 3))
    logits = logits.view(len(logits), side**2, side)
    loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
    return TokenClassifierOutput(loss=loss, logits=logits)


class SudokuNetwork(PreTrainedModel):
    """The equilibrium of the block above. Residual and steps of a puzzle are in `solve.statistics`."""

    config: SudokuConfig
    main_input_name = "input_ids"
    base_model_prefix = "solve"  # the body, whose matrices Muon trains; embedding and classifier are AdamW's

    def __init__(self, config: SudokuConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(3, config.hidden_size)
        block = SudokuBlock(config.hidden_size, config.intermediate_size)
        self.solve = ReversibleFixedPoint(block, **{name: getattr(config, name) for name in SOLVER_SETTINGS})
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """torch's own initialisation stays."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, max_steps: int | None = None) -> TokenClassifierOutput:
        """input_ids (puzzles, cells): digits given, 0 for an empty cell; labels (puzzles, cells): the solution's digits less one."""
        solution = self.solve(embed(input_ids, self.embedding), max_steps=max_steps)
        return answer(self.classifier(solution.z).squeeze(-1), labels)


class SudokuStack(nn.Module):
    """The explicit counterpart: `depth` such blocks one after the other, each with weights of its own, `h + f_i(h, x)`."""

    def __init__(self, hidden: int, intermediate: int, depth: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(3, hidden)
        self.blocks = nn.ModuleList(SudokuBlock(hidden, intermediate) for _ in range(depth))
        self.classifier = nn.Linear(hidden, 1)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> TokenClassifierOutput:
        """As of `SudokuNetwork`."""
        x = embed(input_ids, self.embedding)
        hidden_states = x
        for block in self.blocks:
            hidden_states = hidden_states + block(hidden_states, x)
        return answer(self.classifier(hidden_states).squeeze(-1), labels)
