"""examples/sudoku_network.py: a whole model around the fixed-point layer, told the rules of Sudoku by its shape alone."""

import importlib
import math

import pytest
import torch
from torch.nn import functional as F

pytestmark = pytest.mark.usefixtures("scripts")


@pytest.fixture(scope="module")
def sudoku(scripts):
    return importlib.import_module("sudoku_network")


@pytest.fixture(scope="module")
def problems(scripts):
    return importlib.import_module("problems")


def network(sudoku, **settings):
    torch.manual_seed(0)
    return sudoku.SudokuNetwork(sudoku.SudokuConfig(**{"hidden_size": 8, "intermediate_size": 12, "max_steps": 5, **settings}))


def puzzles_of(side: int, count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Any digits, and labels: what a network does with them does not depend on whether there is a solution."""
    numbers = torch.Generator().manual_seed(side)
    digits, labels = (torch.randint(0, most, (count, side * side), generator=numbers) for most in (side + 1, side))
    return digits * (torch.rand(digits.shape, generator=numbers) < 0.4), labels


@pytest.mark.parametrize("side", [4, 9])
def test_the_block_is_what_it_is_said_to_be(sudoku, side):
    """Candidate by candidate: its own state, thrice the means over its row, column, box (the same digit) and cell (all digits)."""
    torch.manual_seed(0)
    block = sudoku.SudokuBlock(6, 10).double()
    z, x = torch.randn(2, 2, side**3, 6, dtype=torch.float64).unbind()
    root = math.isqrt(side)
    place = lambda cell, digit: cell * side + digit  # noqa: E731
    expected = torch.empty_like(z)
    for cell in range(side * side):
        row, column = divmod(cell, side)
        lines = [[(row, other) for other in range(side)], [(other, column) for other in range(side)]]
        box = [(r, c) for r in range(side) for c in range(side) if (r // root, c // root) == (row // root, column // root)]
        for digit in range(side):
            here = place(cell, digit)
            heard = [
                *((block.line, [place(r * side + c, digit) for r, c in line]) for line in lines),
                (block.box, [place(r * side + c, digit) for r, c in box]),
                (block.cell, [place(cell, other) for other in range(side)]),
            ]
            inner = block.own(z[:, here]) + block.given(x[:, here])
            for matrix, members in heard:
                inner = inner + matrix(3 * z[:, members].mean(1))
            expected[:, here] = block.norm(block.out(F.relu(block.inner_norm(inner))) + x[:, here])
    torch.testing.assert_close(block(z, x), expected, rtol=1e-10, atol=1e-10)


def test_another_guise_has_the_same_answer_in_that_guise(sudoku):
    model = network(sudoku).double()
    digits, _ = puzzles_of(9)
    logits = model(digits).logits.detach()
    grid = torch.arange(81).view(9, 9)
    rows, names = torch.tensor([5, 3, 4, 0, 2, 1, 6, 8, 7]), torch.tensor([4, 0, 8, 2, 1, 7, 3, 6, 5])
    for turned in (grid[rows], grid[:, rows], grid.T):  # bands and rows within them, stacks and columns, transposed
        cells = turned.reshape(-1)
        torch.testing.assert_close(model(digits[:, cells]).logits, logits[:, cells])
    renamed = torch.where(digits > 0, names[digits - 1] + 1, 0)
    torch.testing.assert_close(model(renamed).logits[..., names], logits)
    apart = grid[torch.tensor([3, 1, 2, 0, 4, 5, 6, 7, 8])].reshape(-1)  # two rows of different bands: another puzzle
    assert not torch.allclose(model(digits[:, apart]).logits, logits[:, apart])


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("side", [4, 9])
def test_gradients_are_those_of_stored_states(sudoku, side, bf16):
    model, (digits, labels) = network(sudoku), puzzles_of(side)

    def gradients(mode: str) -> list[torch.Tensor]:
        model.solve.gradient = mode
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
            model(digits, labels=labels).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    found = gradients("reversible")
    assert model.solve.reversed
    assert model.solve.drift == 0.0
    for gradient, stored in zip(found, gradients("backprop"), strict=True):
        assert stored.abs().max() > 0
        torch.testing.assert_close(gradient, stored, rtol=2e-2 if bf16 else 1e-4, atol=(2e-2 if bf16 else 1e-5) * stored.abs().max())


def test_one_network_for_every_size_and_a_loss_of_every_cell(sudoku):
    model = network(sudoku).eval()
    for side in (4, 9, 16):
        digits, labels = puzzles_of(side)
        out = model(digits, labels=labels)
        assert out.logits.shape == (2, side * side, side)
        torch.testing.assert_close(out.loss, F.cross_entropy(out.logits.transpose(1, 2), labels))
    assert model.solve.statistics.steps.tolist() == [5, 5]
    model(digits, max_steps=3)
    assert model.solve.statistics.steps.tolist() == [3, 3]


def test_saved_and_loaded(sudoku, tmp_path):
    model, (digits, _) = (
        network(sudoku, beta=0.7, steps_sampling={"distribution": "uniform", "min_steps": 2, "max_steps": 5}),
        puzzles_of(9),
    )
    model.save_pretrained(tmp_path)
    again = sudoku.SudokuNetwork.from_pretrained(tmp_path)
    assert torch.equal(again.eval()(digits).logits, model.eval()(digits).logits)
    assert again.solve.draws_steps is model.solve.draws_steps
    damped = sudoku.SudokuNetwork.from_pretrained(tmp_path, damping=0.5, max_steps=9)
    assert (damped.solve.beta, damped.solve.damping, damped.solve.max_steps) == (0.7, 0.5, 9)


def test_the_stack_has_as_many_blocks_of_its_own(sudoku):
    """With the same weights in all of them it is the plain iteration h + f(h, x) from x."""
    torch.manual_seed(0)
    stack, (digits, labels) = sudoku.SudokuStack(8, 12, 3), puzzles_of(9)
    assert len({id(block) for block in stack.blocks}) == 3
    x = h = sudoku.embed(digits, stack.embedding)
    for block in stack.blocks:
        h = h + block(h, x)
    out = stack(digits, labels=labels)
    torch.testing.assert_close(out.logits.flatten(1), stack.classifier(h).squeeze(-1))
    out.loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in stack.blocks.parameters())


def test_what_is_given(sudoku):
    embedding = torch.nn.Embedding.from_pretrained(torch.arange(3.0)[:, None])
    digits = torch.tensor([[0, 3, *[0] * 14]])
    found = sudoku.embed(digits, embedding).view(16, 4)
    assert found[0].tolist() == [sudoku.UNKNOWN] * 4
    assert found[1].tolist() == [sudoku.EXCLUDED, sudoku.EXCLUDED, sudoku.GIVEN, sudoku.EXCLUDED]


@pytest.mark.parametrize(
    ("digits", "message"),
    [
        (torch.zeros(1, 80, dtype=torch.long), r"16, 81 or 256 cells, row by row, got \(1, 80\)"),
        (torch.zeros(1, 36, dtype=torch.long), r"16, 81 or 256 cells, row by row, got \(1, 36\)"),
        (torch.zeros(81, dtype=torch.long), r"must be \(puzzles, cells\).* got \(81,\)"),
        (torch.full((1, 81), 10), "digits of 1 to 9, or 0 for an empty cell, got 10 to 10"),
        (torch.full((1, 16), -1), "digits of 1 to 4, or 0 for an empty cell, got -1 to -1"),
    ],
)
def test_what_is_no_puzzle_is_refused(sudoku, digits, message):
    with pytest.raises(ValueError, match=message):
        network(sudoku)(digits)


@pytest.mark.slow
def test_it_learns_sudoku_in_minutes(sudoku, problems):
    """120 updates of 16 puzzles: of 40 others most are solved, in more steps than any update had, and what settles is right."""
    rows = problems.sudoku(200, 36, seed=1)
    digits, labels = (torch.tensor(rows[name][:]) for name in ("digits", "labels"))
    model = network(sudoku, hidden_size=24, intermediate_size=48, max_steps=8)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, betas=(0.9, 0.99), weight_decay=0.0)
    for _ in range(120):
        chosen = torch.randint(len(digits), (16,))
        model(digits[chosen], labels=labels[chosen]).loss.backward()
        assert model.solve.drift == 0.0
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    others = problems.sudoku(40, 36, seed=2, split="test")
    model.eval()
    model.solve.damping, model.solve.tol = 0.5, 1e-3
    with torch.no_grad():
        answers = model(torch.tensor(others["digits"][:]), max_steps=64).logits.argmax(-1)
    right = (answers == torch.tensor(others["labels"][:])).all(1)
    settled = model.solve.statistics.residual <= 1e-3
    assert right.float().mean() > 0.8
    assert (right & settled).sum() > 0.8 * settled.sum() > 10
