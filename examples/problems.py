"""Problems of any size with one right answer, from a seed, as `datasets`, split into train and test without overlap.

    prefix_sums(count, bits, seed)     # running parity of a string of bits
    permutations(count, length, seed)  # running product of permutations of five things
    mazes(count, size, seed)           # the only path between two rooms
    sudoku(count, givens, seed)        # one solution; 9 x 9, or 4 x 4 and 16 x 16 by `side`
    sudoku_file(path, count, seed)     # those of a file

Every function takes `split="train"` (default) or `"test"`: a problem belongs to the one or the other by a checksum of what is given, so that no problem is in
both whatever the seeds and counts. `collate` makes a batch of grids, `collate_mosaic` of grids with several mazes each, `collate_words` and
`collate_sudoku` of tokens.
"""

import itertools
import math
import random
import re
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

Batch = dict[str, torch.Tensor]
TEST_SHARE = 8  # one of so many problems belongs to the tests


def _dataset(draw: Callable[[random.Random], dict[str, Any]], count: int, seed: int, split: str) -> Dataset:
    """The first `count` problems of the seed that belong to the split."""
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    numbers = random.Random(seed)

    def problems() -> Iterator[dict[str, Any]]:
        missed = 0
        while missed < 100_000:
            problem = draw(numbers)
            missed += 1
            if (zlib.crc32(problem["given"]) % TEST_SHARE == 0) == (split == "test"):
                yield {name: value for name, value in problem.items() if name != "given"}
                missed = 0
        raise ValueError(f"of {missed:,} problems none belongs to the split {split!r}: there are too few of this size, take larger ones")

    source = problems()
    return Dataset.from_list([next(source) for _ in range(count)])


def collate(rows: list[dict[str, Any]]) -> Batch:
    """A batch for `RevDEQForSemanticSegmentation`: `pixel_values` (problems, channels, height, width), float32, and `labels` (problems, height, width)."""
    pixels = np.stack([np.asarray(row["pixel_values"], np.float32) for row in rows])
    return {
        "pixel_values": torch.from_numpy(pixels),
        "labels": torch.from_numpy(np.stack([np.asarray(row["labels"], np.int64) for row in rows])),
    }


# --- prefix sums ---


def prefix_sums(count: int, bits: int, seed: int, split: str = "train") -> Dataset:
    """Strings of random bits; the label of each place is the parity of the bits up to it, itself included.

    `pixel_values` (1, 1, bits), -1 for a 0 and 1 for a 1; `labels` (1, bits), 0 or 1. A step of a convolution of width 3 sees one place to its left, so
    that the last label needs a number of steps that grows with the string.
    """
    if bits < 1:
        raise ValueError(f"bits must be at least 1, got {bits}")

    def draw(numbers: random.Random) -> dict[str, Any]:
        string = [numbers.getrandbits(1) for _ in range(bits)]
        parity = np.cumsum(string) % 2
        return {"given": bytes(string), "pixel_values": [[[2.0 * bit - 1 for bit in string]]], "labels": [parity.tolist()]}

    return _dataset(draw, count, seed, split)


# --- permutations ---

SEEN = 4  # places that a letter attends to, its own included
LETTERS = ((1, 0, 2, 3, 4), (1, 2, 3, 4, 0))  # a swap and a cycle, which together make all 120 permutations of five things
BEGIN = len(LETTERS)


@cache
def products() -> np.ndarray:
    """(120, letters): the number of the permutation that comes of one of the 120 and a letter after it."""
    group = list(itertools.permutations(range(5)))
    number = {permutation: index for index, permutation in enumerate(group)}
    return np.array([[number[tuple(before[place] for place in letter)] for letter in LETTERS] for before in group])


def permutations(count: int, length: int, seed: int, split: str = "train") -> Dataset:
    """Words of `length` letters, each letter one of two permutations of five things; the label of each place is their product so far, one of 120.

    The word problem of the group S5: since the group is not solvable, no network of fixed depth is believed to solve it at every length (Barrington's theorem;
    Merrill, Petty and Sabharwal, arXiv 2404.08819). `input_ids` (1 + length): `BEGIN`, whose label is the identity, then letters 0 or 1; `labels` (1 + length),
    0 to 119. Without a start a letter that repeats could not tell whether it is the first. There are 2^length words, of which test and train split all, so
    `length` is at least 12.
    """
    if length < 12:
        raise ValueError(f"length must be at least 12 (there are only 2^length words), got {length}")

    def draw(numbers: random.Random) -> dict[str, Any]:
        letters = [numbers.randrange(len(LETTERS)) for _ in range(length)]
        places = itertools.accumulate(letters, lambda before, letter: int(products()[before, letter]), initial=0)
        return {"given": bytes(letters), "input_ids": [BEGIN, *letters], "labels": list(places)}

    return _dataset(draw, count, seed, split)


def collate_words(rows: list[dict[str, Any]]) -> Batch:
    """A batch for a causal token classifier: `input_ids` and `labels`, (words, 1 + length); `attention_mask` (words, 1, places, places).

    Each place sees itself and the three before it, at any length, so that longer words differ from short ones in nothing but the depth they need: attention
    over a whole word does worse on words longer than those of the training for a reason of its own, distances that it has not met.
    """
    batch = {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}
    places = torch.arange(batch["labels"].shape[1])
    before = places[:, None] - places
    return batch | {"attention_mask": ((before >= 0) & (before < SEEN)).repeat(len(rows), 1, 1, 1)}  # a view could not be pinned


# --- mazes ---

WALL, START, GOAL = range(3)  # the channels of a maze


def mazes(count: int, size: int, seed: int, split: str = "train") -> Dataset:
    """Mazes of `size` x `size` cells, drawn by a random depth-first search, with two random rooms; labelled are the cells of the only path between them.

    `size` is odd: rooms lie at the even rows and columns, passages and walls between them, no wall around. `pixel_values` (3, size, size): 1 where there is
    a wall, the start, the goal; `labels` (size, size): 1 on the path, both ends included; `length`: cells of the path. The passages form a tree, which is why
    the path is unique, and a depth-first search makes it long: some 320 of a 59 x 59 maze's
    cells lie on it, up to a thousand.
    """
    if size < 3 or size % 2 == 0:
        raise ValueError(f"size must be odd and at least 3 (rooms at the even rows and columns), got {size}")
    rooms = [(row, column) for row in range(0, size, 2) for column in range(0, size, 2)]

    def draw(numbers: random.Random) -> dict[str, Any]:
        start, goal = numbers.sample(rooms, 2)
        walls = np.ones((size, size), np.int64)
        origin = numbers.choice(rooms)
        walls[origin] = 0
        trail = [origin]
        while trail:
            row, column = trail[-1]
            doors = [(row + down, column + right) for down, right in ((-1, 0), (1, 0), (0, -1), (0, 1))]
            ahead = [(2 * door[0] - row, 2 * door[1] - column, door) for door in doors]
            closed = [(door, (r, c)) for r, c, door in ahead if 0 <= r < size and 0 <= c < size and walls[r, c]]
            if closed:
                door, room = numbers.choice(closed)
                walls[door] = walls[room] = 0
                trail.append(room)
            else:
                trail.pop()
        path = the_path(walls, start, goal)
        pixels = np.zeros((3, size, size), np.float32)
        pixels[WALL] = walls
        pixels[(START, *start)] = pixels[(GOAL, *goal)] = 1
        labels = np.zeros((size, size), np.int64)
        labels[tuple(zip(*path, strict=True))] = 1
        return {"given": pixels.tobytes(), "pixel_values": pixels.tolist(), "labels": labels.tolist(), "length": len(path)}

    return _dataset(draw, count, seed, split)


def collate_mosaic(rows: list[dict[str, Any]], tiles: int = 2) -> Batch:
    """A batch of grids with `tiles` x `tiles` mazes each, side by side with a wall of one cell between them; places without a maze are walls.

    A maze has no wall around, so that in a small one the edge of the grid is near everywhere, which in a large one it is not. Here half of what lies around
    a maze are other mazes. Shapes as of `collate`, with a side of `tiles * (size + 1) - 1`.
    """
    if tiles < 1:
        raise ValueError(f"tiles must be at least 1, got {tiles}")
    single = collate(rows)
    size = single["labels"].shape[-1]
    grids = -(-len(rows) // tiles**2)
    side = tiles * (size + 1) - 1
    pixels, labels = torch.zeros(grids, 3, side, side), torch.zeros(grids, side, side, dtype=torch.int64)
    pixels[:, WALL] = 1
    for number, (maze, path) in enumerate(zip(single["pixel_values"], single["labels"], strict=True)):
        grid, place = divmod(number, tiles**2)
        row, column = (slice(index * (size + 1), index * (size + 1) + size) for index in divmod(place, tiles))
        pixels[grid, :, row, column] = maze
        labels[grid, row, column] = path
    return {"pixel_values": pixels, "labels": labels}


def turned(grids: Dataset, number: int) -> Dataset:
    """The same mazes in another of the square's eight positions: `number` quarter turns to the left, from 4 on mirrored at the diagonal before."""
    if not 0 <= number < 8:
        raise ValueError(f"number must lie in 0 to 7, got {number}")

    def turn(row: dict[str, Any]) -> dict[str, Any]:
        parts = {name: np.asarray(row[name]) for name in ("pixel_values", "labels")}
        return {name: np.rot90(part.swapaxes(-1, -2) if number > 3 else part, number, (-2, -1)).tolist() for name, part in parts.items()}

    return Dataset.from_list([row | turn(row) for row in grids])


def the_path(walls: np.ndarray, start: tuple[int, int], goal: tuple[int, int]) -> list[tuple[int, int]]:
    """Cells of a shortest path from start to goal; a ValueError where there is none."""
    came_from: dict[tuple[int, int], tuple[int, int]] = {start: start}
    frontier = [start]
    while frontier and goal not in came_from:
        following = []
        for row, column in frontier:
            for cell in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
                inside = 0 <= cell[0] < walls.shape[0] and 0 <= cell[1] < walls.shape[1]
                if inside and not walls[cell] and cell not in came_from:
                    came_from[cell] = (row, column)
                    following.append(cell)
        frontier = following
    if goal not in came_from:
        raise ValueError(f"no path leads from {start} to {goal}")
    path = [goal]
    while path[-1] != start:
        path.append(came_from[path[-1]])
    return path[::-1]


# --- Sudoku ---

Grid = list[int]  # digits from 1 on, row by row, 0 for an empty cell


@cache
def peers(side: int = 9) -> tuple[tuple[int, ...], ...]:
    """Of each cell the others of its row, column and box, 20 where the grid has 9 x 9 cells."""
    root, cells = math.isqrt(side), range(side * side)

    def units(cell: int) -> tuple[int, int, int]:
        row, column = divmod(cell, side)
        return row, column, root * (row // root) + column // root

    return tuple(
        tuple(other for other in cells if other != cell and any(a == b for a, b in zip(units(cell), units(other), strict=True)))
        for cell in cells
    )


class TooManyGuesses(Exception):
    """A search was given up."""


def solutions(grid: Grid, limit: int = 2, numbers: random.Random | None = None, most_guesses: int | None = None) -> list[Grid]:
    """The first `limit` solutions, found by filling the cell with the fewest possible digits; in random order with `numbers`. None for contradicting givens.

    Raises:
        TooManyGuesses: more than `most_guesses` cells had to be guessed. Most searches need few, some few of large grids millions.
    """
    guesses = 0
    side, cells = math.isqrt(len(grid)), range(len(grid))
    free = [(2 << side) - 2] * len(grid)  # bit d: digit d may stand here
    found: list[Grid] = []
    filled = [0] * len(grid)

    def place(cell: int, digit: int, free: list[int]) -> bool:
        """Writes a digit and what follows at once from it; False at a contradiction."""
        todo = [(cell, digit)]
        while todo:
            cell, digit = todo.pop()
            if filled[cell] == digit:
                continue
            if not free[cell] >> digit & 1 or filled[cell]:
                return False
            filled[cell] = digit
            free[cell] = 1 << digit
            for peer in peers(side)[cell]:
                if free[peer] >> digit & 1:
                    free[peer] &= ~(1 << digit)
                    if not free[peer]:
                        return False
                    if free[peer].bit_count() == 1:
                        todo.append((peer, free[peer].bit_length() - 1))
        return True

    def search(free: list[int]) -> None:
        nonlocal filled, guesses
        guesses += 1
        if most_guesses is not None and guesses > most_guesses:
            raise TooManyGuesses
        empty = [cell for cell in cells if not filled[cell]]
        if not empty:
            found.append(list(filled))
            return
        cell = min(empty, key=lambda cell: free[cell].bit_count())
        digits = [digit for digit in range(1, side + 1) if free[cell] >> digit & 1]
        if numbers:
            numbers.shuffle(digits)
        before = list(filled)
        for digit in digits:
            trial = list(free)
            if place(cell, digit, trial):
                search(trial)
            filled = list(before)
            if len(found) >= limit:
                return

    if all(place(cell, digit, free) for cell, digit in enumerate(grid) if digit):
        search(free)
    return found


MOST_GUESSES = {4: None, 9: None, 16: 2_000}  # by the side, a puzzle that needs more is not drawn
FEWEST_GIVENS = {4: 6, 9: 24, 16: 112}  # by the side; fewer have one solution too rarely to be drawn, or it takes too long to tell


def sudoku(count: int, givens: int, seed: int, split: str = "train", side: int = 9) -> Dataset:
    """Sudoku with `givens` digits given (24 to 80) and one solution, of 9 x 9 or `side` x `side` cells and as many digits.

    `digits` (cells): what is given, row by row, 0 for an empty cell; `labels` (cells): the solution's digits less one. Train and test differ by the solution,
    not only by the givens. A full grid is drawn, then digits are taken away in random order where the solution stays the only one; few givens cost more draws
    (about 0.015 s a puzzle at 30 givens, 0.06 s at 24). Of side 16 (112 to 255 givens) a draw takes 0.2 to 0.6 s, and the tests take one
    of eight; of side 4 there are 6 to 15 givens.
    """
    if side not in FEWEST_GIVENS:
        raise ValueError(f"side must be 4, 9 or 16, got {side}")
    if not FEWEST_GIVENS[side] <= givens < side**2:
        raise ValueError(
            f"givens must lie in {FEWEST_GIVENS[side]} to {side**2 - 1} (fewer have one solution too rarely to be drawn), got {givens}"
        )

    most = MOST_GUESSES[side]

    def is_unique(digits: Grid) -> bool:
        try:
            return len(solutions(digits, most_guesses=most)) == 1
        except TooManyGuesses:
            return False  # it cannot be told

    def draw(numbers: random.Random) -> dict[str, Any]:
        while True:
            try:
                (solution,) = solutions([0] * side**2, 1, numbers, most)
            except TooManyGuesses:
                continue
            digits, left = list(solution), side**2
            for cell in numbers.sample(range(side**2), side**2):
                if left == givens:
                    break
                digit, digits[cell] = digits[cell], 0
                if is_unique(digits):
                    left -= 1
                else:
                    digits[cell] = digit
            if left == givens:
                return {"given": bytes(solution), "digits": digits, "labels": [digit - 1 for digit in solution]}

    return _dataset(draw, count, seed, split)


def sudoku_file(path: str | Path, count: int, seed: int) -> Dataset:
    """Up to `count` Sudoku of a text file, drawn without repetition: the columns of `sudoku`.

    A line is a puzzle of 81 characters, row by row: digits, and `.` or `0` for an empty cell; after a space or comma anything may follow. Lines that begin
    with `#` and empty ones are skipped. Solutions are found here: 0.1 s for each of the hardest, up to a second for one of 17 givens.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no text, there is no puzzle, a line is none, or a puzzle drawn has no solution or more than one.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}; expected a text file with lines of 81 digits or dots")
    try:
        lines = enumerate(Path(path).read_text(encoding="utf-8-sig").splitlines(), 1)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text file ({error}); expected lines of 81 digits or dots") from error
    puzzles = [(number, re.split(r"[\s,]", line.strip())[0]) for number, line in lines if line.strip() and line.strip()[0] != "#"]
    if not puzzles:
        raise ValueError(f"{path} holds no puzzle; expected lines of 81 digits or dots")
    for number, puzzle in puzzles:
        if not re.fullmatch(r"[0-9.]{81}", puzzle):
            raise ValueError(f"{path}, line {number}: expected 81 digits or dots (a Sudoku row by row), got {puzzle[:90]!r}")
    rows = []
    for number, puzzle in random.Random(seed).sample(puzzles, min(count, len(puzzles))):
        digits = [int(character) for character in puzzle.replace(".", "0")]
        found = solutions(digits)
        if len(found) != 1:
            raise ValueError(f"{path}, line {number}: a Sudoku must have one solution, this has {'more' if found else 'none'}: {puzzle}")
        rows.append({"digits": digits, "labels": [digit - 1 for digit in found[0]]})
    return Dataset.from_list(rows)


def guises(puzzles: Dataset, copies: int, seed: int) -> Dataset:
    """Each puzzle in so many guises: digits renamed, rows and columns permuted within their bands, bands permuted, half of them transposed."""
    numbers = np.random.default_rng(seed)

    def order() -> np.ndarray:
        return np.concatenate([3 * band + numbers.permutation(3) for band in numbers.permutation(3)])

    def disguised(row: dict[str, Any]) -> dict[str, Any]:
        names = np.concatenate([[0], numbers.permutation(9) + 1])
        cells = np.arange(81).reshape(9, 9)[order()][:, order()]
        cells = (cells.T if numbers.integers(2) else cells).reshape(-1)
        digits, labels = np.array(row["digits"]), np.array(row["labels"])
        return {"digits": names[digits[cells]].tolist(), "labels": (names[labels[cells] + 1] - 1).tolist()}

    rows = list(puzzles)
    if any(len(row["digits"]) != 81 for row in rows):
        raise ValueError(f"guises are those of 9 x 9 puzzles, got one of {len(rows[0]['digits'])} cells")
    return Dataset.from_list([disguised(row) for _ in range(copies) for row in rows])


def collate_digits(rows: list[dict[str, Any]]) -> Batch:
    """A batch for `SudokuNetwork`: `input_ids`, the digits given, 0 for an empty cell, and `labels`, (puzzles, cells) each."""
    return {"input_ids": torch.tensor([row["digits"] for row in rows]), "labels": torch.tensor([row["labels"] for row in rows])}


def collate_sudoku(rows: list[dict[str, Any]]) -> Batch:
    """A batch for `RevDEQForTokenClassification` with `is_causal=False`, `vocab_size=810` and `num_labels=9`, of 81 tokens each.

    `input_ids`: 10 * cell + digit, so that a token knows its place; `attention_mask` (puzzles, 1, 81, 81): a cell sees itself and its 20 peers, which is all
    the model is told about the rules; `position_ids`: 0, since distances along the 81 mean nothing; `labels`.
    """
    digits = torch.tensor([row["digits"] for row in rows])
    sees = torch.eye(81, dtype=torch.bool)
    for cell, others in enumerate(peers()):
        sees[cell, list(others)] = True
    return {
        "input_ids": 10 * torch.arange(81) + digits,
        "attention_mask": sees.repeat(len(rows), 1, 1, 1),  # a view could not be pinned
        "position_ids": torch.zeros_like(digits),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def contradicting(puzzles: Dataset, seed: int) -> Dataset:
    """The puzzles with one given more (a full one with one changed), of which none has a solution any more; the labels are those of the puzzles."""
    numbers = random.Random(seed)
    rows = []
    for row in puzzles:
        digits = list(row["digits"])
        cell = numbers.choice([cell for cell, digit in enumerate(digits) if not digit] or range(len(digits)))  # or one given otherwise
        digits[cell] = numbers.choice([digit for digit in range(1, math.isqrt(len(digits)) + 1) if digit != row["labels"][cell] + 1])
        rows.append({"digits": digits, "labels": row["labels"]})
    return Dataset.from_list(rows)
