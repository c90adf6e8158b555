"""examples/problems.py: every problem has one right answer, the same from the same seed; no test problem is trained on."""

import importlib
import itertools
import math
import random

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.usefixtures("scripts")


@pytest.fixture(scope="module")
def problems(scripts):
    return importlib.import_module("problems")


def given(row: dict) -> bytes:
    return np.asarray(next(row[name] for name in ("digits", "input_ids", "pixel_values") if name in row), np.float32).tobytes()


@pytest.mark.parametrize(("name", "size"), [("prefix_sums", 6), ("permutations", 12), ("mazes", 5), ("sudoku", 60)])
def test_train_and_test_have_nothing_in_common(problems, name, size):
    """Sizes so small that draws repeat (but for Sudoku)."""
    make = getattr(problems, name)
    first = make(120, size, seed=1)
    assert make(120, size, seed=1).to_list() == first.to_list()
    assert make(120, size, seed=2).to_list() != first.to_list()
    train = {given(row) for row in first} | {given(row) for row in make(120, size, seed=2)}
    test = {given(row) for row in make(40, size, seed=1, split="test")}
    assert len(test) > 5 if name == "prefix_sums" else len(test) > 30
    assert not train & test


@pytest.mark.parametrize("bits", [1, 32, 77])
def test_prefix_sums(problems, bits):
    for row in problems.prefix_sums(20, bits, seed=0):
        parity = 0
        for value, label in zip(row["pixel_values"][0][0], row["labels"][0], strict=True):
            assert value in (-1.0, 1.0)
            parity ^= value == 1.0
            assert label == parity


def test_permutations(problems):
    """The labels by moving five things about, and every one of the 120 arrangements comes up."""
    seen = set()
    for row in problems.permutations(60, 40, seed=0):
        things = list("abcde")
        start, *letters = row["input_ids"]
        assert (start, row["labels"][0]) == (2, 0)  # no letter
        for letter, label in zip(letters, row["labels"][1:], strict=True):
            things = [things[place] for place in problems.LETTERS[letter]]
            assert label == list(itertools.permutations("abcde")).index(tuple(things))
            seen.add(label)
    assert seen == set(range(120))
    batch = problems.collate_words(list(problems.permutations(3, 12, seed=0)))
    assert {name: (tuple(part.shape), part.dtype) for name, part in batch.items()} == {
        "input_ids": ((3, 13), torch.int64),
        "labels": ((3, 13), torch.int64),
        "attention_mask": ((3, 1, 13, 13), torch.bool),
    }
    assert batch["attention_mask"][0, 0].sum(1).tolist() == [1, 2, 3, *[4] * 10]
    assert not batch["attention_mask"][0, 0].triu(1).any()


@pytest.mark.parametrize("size", [3, 9, 21])
def test_a_maze_is_a_tree_and_its_labels_are_the_path(problems, size):
    """Connected, with one passage fewer than rooms: so there is one path between any two, and the labels must be it."""
    for row in problems.mazes(20, size, seed=0):
        walls, start, goal = np.array(row["pixel_values"]) > 0
        (begin,), (end,) = np.argwhere(start), np.argwhere(goal)
        assert not walls[::2, ::2].any()
        assert walls[1::2, 1::2].all()
        free = {tuple(cell) for cell in np.argwhere(~walls)}
        edges = {(a, b) for a in free for b in ((a[0] + 1, a[1]), (a[0], a[1] + 1)) if b in free}
        assert len(edges) == len(free) - 1
        reached, todo = {tuple(begin)}, [tuple(begin)]
        while todo:
            here = todo.pop()
            new = {b for a, b in edges if a == here} | {a for a, b in edges if b == here}
            todo += new - reached
            reached |= new
        assert reached == free
        path = {tuple(cell) for cell in np.argwhere(np.array(row["labels"]))}
        assert len(path) == row["length"]
        neighbours = {cell: sum(other in path for edge in edges if cell in edge for other in edge if other != cell) for cell in path}
        assert sorted(neighbours.values()) == [1, 1] + [2] * (len(path) - 2)
        assert {cell for cell, count in neighbours.items() if count == 1} == {tuple(begin), tuple(end)}


def test_a_turned_maze_is_the_same_maze_in_another_position(problems):
    rows = problems.mazes(3, 7, seed=0)
    seen = [problems.turned(rows, number) for number in range(8)]
    assert seen[0][:] == rows[:]
    assert [list(other["length"]) for other in seen] == [list(rows["length"])] * 8
    for index in range(3):
        grids = [np.array(other[index]["pixel_values"]) for other in seen]
        assert len({grid.tobytes() for grid in grids}) == 8
        for grid, other in zip(grids, seen, strict=True):
            start, goal = (tuple(int(at[0]) for at in np.nonzero(grid[channel])) for channel in (1, 2))
            path = np.zeros((7, 7), int)
            path[tuple(zip(*problems.the_path(grid[0], start, goal), strict=True))] = 1
            assert (path == np.array(other[index]["labels"])).all()


def test_no_path_is_said(problems):
    walls = np.ones((3, 3))
    walls[0, 0] = walls[2, 2] = 0
    with pytest.raises(ValueError, match=r"no path leads from \(0, 0\) to \(2, 2\)"):
        problems.the_path(walls, (0, 0), (2, 2))


def is_solution(grid: np.ndarray) -> bool:
    grid = np.array(grid).reshape(9, 9)
    boxes = grid.reshape(3, 3, 3, 3).swapaxes(1, 2).reshape(9, 9)
    return all(sorted(unit) == list(range(1, 10)) for units in (grid, grid.T, boxes) for unit in units)


def other_solutions(digits: list[int], known: list[int]) -> int:
    """How many solutions differ from the known one, by plain search without any inference: for each empty cell, every other digit is tried to the end."""

    def fits(grid, cell, digit):
        row, column = divmod(cell, 9)
        for other in range(81):
            r, c = divmod(other, 9)
            if grid[other] == digit and other != cell and (r == row or c == column or (r // 3, c // 3) == (row // 3, column // 3)):
                return False
        return True

    def count(grid):
        open_cells = [(sum(fits(grid, cell, d) for d in range(1, 10)), cell) for cell in range(81) if not grid[cell]]
        if not open_cells:
            return int(grid != known)
        _, cell = min(open_cells)
        found = 0
        for digit in range(1, 10):
            if fits(grid, cell, digit):
                found += count([*grid[:cell], digit, *grid[cell + 1 :]])
        return found

    return count(list(digits))


@pytest.mark.parametrize(("side", "givens"), [(4, 6), (4, 15), (16, 150)])
def test_sudoku_of_other_sides(problems, side, givens):
    root, every = math.isqrt(side), set(range(side))
    for row in problems.sudoku(2, givens, seed=0, side=side):
        grid = np.array(row["labels"]).reshape(side, side)
        boxes = grid.reshape(root, root, root, root).swapaxes(1, 2).reshape(side, side)
        assert all(set(unit) == every for unit in (*grid.tolist(), *grid.T.tolist(), *boxes.tolist()))
        digits = np.array(row["digits"])
        assert (digits > 0).sum() == givens
        assert ((digits == 0) | (digits == grid.reshape(-1) + 1)).all()
        assert problems.solutions(row["digits"]) == [(grid.reshape(-1) + 1).tolist()]
    (wrong,) = problems.contradicting(problems.sudoku(1, givens, seed=0, side=side).select([0]), seed=0)
    assert problems.solutions(wrong["digits"]) == []


@pytest.mark.parametrize("givens", [24, 36, 80])
def test_sudoku_has_one_solution_and_as_many_givens_as_asked(problems, givens):
    for row in problems.sudoku(3, givens, seed=0):
        solution = [label + 1 for label in row["labels"]]
        assert is_solution(solution)
        assert sum(digit > 0 for digit in row["digits"]) == givens
        assert all(digit in (0, right) for digit, right in zip(row["digits"], solution, strict=True))
        assert other_solutions(row["digits"], solution) == 0


def test_solutions_finds_none_two_and_all(problems):
    full = [label + 1 for label in problems.sudoku(1, 80, seed=0)[0]["labels"]]
    assert problems.solutions(full) == [full]
    assert problems.solutions([1, 1, *[0] * 79]) == []
    assert len(problems.solutions([0] * 81, limit=5)) == 5
    broken = list(full)
    broken[0] = 0
    broken[1] = full[0]
    assert problems.solutions(broken) == []


def test_puzzles_of_a_file(problems, tmp_path):
    rows = list(problems.sudoku(6, 40, seed=0))
    lines = ["".join(map(str, row["digits"])) for row in rows]
    file = tmp_path / "puzzles.txt"
    file.write_text("\ufeff# rated\n  # so\n" + lines[0].replace("0", ".") + " 11.9\n\n" + lines[1] + ",x\n" + "\n".join(lines[2:]) + "\n")
    found = problems.sudoku_file(file, 100, seed=0).to_list()
    assert sorted(found, key=str) == sorted(rows, key=str)
    few = problems.sudoku_file(file, 3, seed=1).to_list()
    assert len({str(row) for row in few}) == 3
    assert few == problems.sudoku_file(file, 3, seed=1).to_list() != problems.sudoku_file(file, 3, seed=2).to_list()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("." * 80, r"line 2: expected 81 digits or dots \(a Sudoku row by row\), got"),
        ("x" + "." * 80, "line 2: expected 81 digits or dots"),
        ("." * 81, "line 2: a Sudoku must have one solution, this has more"),
        ("", "puzzles.txt holds no puzzle; expected lines of 81 digits or dots"),
        ("11" + "." * 79, "line 2: a Sudoku must have one solution, this has none"),
    ],
)
def test_a_line_that_is_no_puzzle_is_named(problems, tmp_path, line, message):
    (tmp_path / "puzzles.txt").write_text("# puzzles\n" + line + "\n")
    with pytest.raises(ValueError, match=message):
        problems.sudoku_file(tmp_path / "puzzles.txt", 5, seed=0)


def test_a_search_that_takes_too_long_is_given_up(problems, monkeypatch):
    puzzle = problems.sudoku(1, 24, seed=3)[0]
    guesses = next(most for most in range(1, 1000) if not gives_up(problems, puzzle["digits"], most))
    assert gives_up(problems, puzzle["digits"], guesses - 1)
    assert problems.solutions(puzzle["digits"], most_guesses=guesses) == problems.solutions(puzzle["digits"])
    usual = problems.sudoku(6, 30, seed=0).to_list()
    monkeypatch.setitem(problems.MOST_GUESSES, 9, 48)  # half of the full grids take more
    rows = problems.sudoku(6, 30, seed=0).to_list()
    assert rows != usual
    assert all(problems.solutions(row["digits"]) == [[label + 1 for label in row["labels"]]] for row in rows)


def gives_up(problems, digits: list[int], most: int) -> bool:
    try:
        problems.solutions(digits, most_guesses=most)
    except problems.TooManyGuesses:
        return True
    return False


def test_guises_are_puzzles_with_one_solution(problems):
    puzzles = problems.sudoku(2, 30, seed=0)
    disguised = problems.guises(puzzles, copies=4, seed=0)
    assert len({given(row) for row in disguised}) == 8
    assert problems.guises(puzzles, copies=4, seed=0).to_list() == disguised.to_list()
    for row in disguised:
        assert sum(digit > 0 for digit in row["digits"]) == 30
        assert problems.solutions(row["digits"]) == [[label + 1 for label in row["labels"]]]


def test_guises_are_of_nine_digits(problems):
    with pytest.raises(ValueError, match="guises are those of 9 x 9 puzzles, got one of 16 cells"):
        problems.guises(problems.sudoku(1, 8, 0, side=4), 1, 0)


def test_contradicting_puzzles_have_no_solution(problems):
    rows = problems.contradicting(problems.sudoku(4, 30, seed=0), seed=0)
    for row in rows:
        assert sum(digit > 0 for digit in row["digits"]) == 31
        assert problems.solutions(row["digits"]) == []
    full = [{"digits": [label + 1 for label in row["labels"]], "labels": row["labels"]} for row in rows]  # nothing is left to give
    for row, before in zip(problems.contradicting(full, seed=0), full, strict=True):
        assert sum(a != b for a, b in zip(row["digits"], before["digits"], strict=True)) == 1
        assert problems.solutions(row["digits"]) == []


def test_batches(problems):
    mazes = problems.mazes(3, 7, seed=0)
    batch = problems.collate(list(mazes))
    assert batch["pixel_values"].shape == (3, 3, 7, 7)
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["labels"].shape == (3, 7, 7)
    assert torch.equal(problems.collate_mosaic(list(mazes), tiles=1)["pixel_values"], batch["pixel_values"])
    puzzles = problems.sudoku(2, 40, seed=0)
    assert {name: part.tolist() for name, part in problems.collate_digits(list(puzzles)).items()} == {
        "input_ids": puzzles["digits"][:],
        "labels": puzzles["labels"][:],
    }
    batch = problems.collate_sudoku(list(puzzles))
    assert torch.equal(batch["input_ids"] // 10, torch.arange(81).expand(2, 81))
    assert torch.equal(batch["input_ids"] % 10, torch.tensor(puzzles["digits"][:]))
    mask = batch["attention_mask"][0, 0]
    assert torch.equal(mask, mask.T)
    assert (mask.sum(1) == 21).all()
    assert mask[40].nonzero().flatten().tolist() == sorted({*range(36, 45), *range(4, 81, 9), 30, 31, 32, 39, 40, 41, 48, 49, 50})


def test_a_mosaic_holds_every_maze_once_with_walls_between(problems):
    rows = list(problems.mazes(6, 7, seed=0))
    single, batch = problems.collate(rows), problems.collate_mosaic(rows, tiles=2)
    assert batch["pixel_values"].shape == (2, 3, 15, 15)
    assert batch["labels"].shape == (2, 15, 15)
    found = [(g, r, c) for g in range(2) for r in (0, 8) for c in (0, 8)]
    for number, (grid, row, column) in enumerate(found):
        maze = batch["pixel_values"][grid, :, row : row + 7, column : column + 7]
        path = batch["labels"][grid, row : row + 7, column : column + 7]
        if number < 6:
            assert torch.equal(maze, single["pixel_values"][number])
            assert torch.equal(path, single["labels"][number])
        else:
            assert torch.equal(maze, torch.tensor([1.0, 0, 0])[:, None, None].expand(3, 7, 7))
    between = torch.zeros(15, 15, dtype=torch.bool)
    between[7, :] = between[:, 7] = True
    assert (batch["pixel_values"][:, problems.WALL, between] == 1).all()
    assert batch["pixel_values"].sum() == single["pixel_values"].sum() + 2 * between.sum() + 2 * 49
    assert batch["labels"].sum() == single["labels"].sum()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (("mazes", 1, 8, 0), "size must be odd and at least 3 .*got 8"),
        (("sudoku", 1, 17, 0), "givens must lie in 24 to 80 .*got 17"),
        (("sudoku", 1, 100, 0, "train", 16), "givens must lie in 112 to 255 .*got 100"),
        (("sudoku", 1, 100, 0, "train", 25), "side must be 4, 9 or 16, got 25"),
        (("permutations", 1, 8, 0), "length must be at least 12 .*got 8"),
        (("prefix_sums", 1, 0, 0), "bits must be at least 1, got 0"),
        (("prefix_sums", 1, 1, 0, "test"), "none belongs to the split 'test': there are too few of this size"),
        (("prefix_sums", 0, 4, 0), "count must be at least 1, got 0"),
        (("mazes", 1, 9, 0, "validation"), "split must be 'train' or 'test', got 'validation'"),
    ],
)
def test_what_cannot_be_made_is_said(problems, call, message):
    name, *arguments = call
    with pytest.raises(ValueError, match=message):
        getattr(problems, name)(*arguments)


def test_random_full_grids_differ(problems):
    numbers = random.Random(0)
    grids = {tuple(problems.solutions([0] * 81, 1, numbers)[0]) for _ in range(10)}
    assert len(grids) == 10
    assert all(is_solution(grid) for grid in grids)
