"""Games: number places, queens, the Tower of Hanoi, 24 and Sokoban."""

import re

from deltal_jax.tasks.countdown.rules import ParseError, parse
from deltal_jax.tasks.procedural.logic import is_latin, keeps_clues
from deltal_jax.tasks.procedural.reading import Kind, Wrong, given, grid, shaped

_HANOI = re.compile(r"move disk (\d{1,2}) from peg (\d{1,2}) to peg (\d{1,2})", re.ASCII)
_MINUS = re.compile(r"(^|\()\s*-")
_STEPS = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}


def read_sudoku(text: str, facts: dict) -> list[list[int]]:
    """A square of digits."""
    rows = [[int(c) for c in row] for row in grid(text, "123456789")]
    shaped(rows, facts["puzzle"])
    return rows


def is_sudoku(rows: list[list[int]], facts: dict) -> bool:
    """Whether rows, columns and boxes have each number once, and the clues are kept."""
    size = round(len(rows) ** 0.5)
    starts = range(0, len(rows), size)
    boxes = [
        [rows[a + i][b + j] for i in range(size) for j in range(size)]
        for a in starts
        for b in starts
    ]
    whole = all(len(set(box)) == len(rows) for box in boxes)
    return whole and is_latin(rows) and keeps_clues(rows, facts["puzzle"])


def read_queens(text: str, facts: dict) -> list[list[str]]:
    """A board of _ and Q."""
    rows = grid(text, "_Q")
    shaped(rows, facts["puzzle"])
    return rows


def is_peaceful(rows: list[list[str]], facts: dict) -> bool:
    """Whether there are n queens, none attacks another, and those of the puzzle stand."""
    queens = [(r, c) for r, row in enumerate(rows) for c, cell in enumerate(row) if cell == "Q"]
    lines = ([r for r, _ in queens], [c for _, c in queens])
    lines += ([r + c for r, c in queens], [r - c for r, c in queens])
    if any(len(set(line)) < len(rows) for line in lines) or len(queens) != len(rows):
        return False
    clues = enumerate(facts["puzzle"])
    return all(rows[r][c] == "Q" for r, row in clues for c, cell in enumerate(row) if cell == "Q")


def read_hanoi(text: str, facts: dict) -> list[list[int]]:
    """(disk, from, to), one move a line."""
    del facts
    moves = []
    for line in filter(None, map(str.strip, text.lower().splitlines())):
        match = _HANOI.fullmatch(" ".join(line.split()).rstrip("."))
        if match is None:
            raise Wrong("not lines of 'Move disk 1 from Peg 1 to Peg 2'")
        moves.append([int(number) for number in match.groups()])
    return moves


def moves_tower(moves: list[list[int]], facts: dict) -> bool:
    """Whether every move is allowed and the whole tower stands on the target in the end."""
    pegs: dict[int, list[int]] = {peg: [] for peg in range(1, facts["num_pegs"] + 1)}
    pegs[facts["start_peg"]] = list(range(facts["num_disks"], 0, -1))
    for disk, source, sink in moves:
        if source not in pegs or sink not in pegs or pegs[source][-1:] != [disk]:
            return False
        if pegs[sink] and pegs[sink][-1] < disk:
            return False
        pegs[sink].append(pegs[source].pop())
    return len(pegs[facts["target_peg"]]) == facts["num_disks"]


def read_expression(text: str, facts: dict) -> list:
    """The expression, its exact value as text, and its numbers in order.

    The generator's own may begin with a minus: -a is read as 0 - a.
    """
    del facts
    signed, zeros = _MINUS.subn(r"\g<1>0-", text)
    try:
        value, used = parse(signed)
    except ParseError as error:
        raise Wrong(str(error)) from error
    for _ in range(zeros):
        used.remove(0)
    return [" ".join(text.split()), str(value), sorted(used)]


def makes_24(read: list, facts: dict) -> bool:
    """Whether it is 24 and has each number once."""
    return read[1:] == ["24", sorted(facts["numbers"])]


def read_keys(text: str, facts: dict) -> str:
    """Letters of L, R, U and D; spaces do not count."""
    del facts
    keys = "".join(text.split()).upper()
    if not keys or set(keys) - set(_STEPS):
        raise Wrong("not a string of L, D, U and R")
    return keys


def solves_sokoban(keys: str, facts: dict) -> bool:
    """Whether every box stands on a goal in the end; a key that is blocked does nothing."""
    board = [line.split() for line in facts["gamestr"].splitlines() if line.strip()]
    cells = {(r, c): cell for r, row in enumerate(board) for c, cell in enumerate(row)}
    walls = {at for at, cell in cells.items() if cell == "+"}
    goals = {at for at, cell in cells.items() if cell in "X$%"}
    boxes = {at for at, cell in cells.items() if cell in "@$"}
    (player,) = (at for at, cell in cells.items() if cell in "*%")
    for key in keys:
        down, right = _STEPS[key]
        ahead = (player[0] + down, player[1] + right)
        beyond = (ahead[0] + down, ahead[1] + right)
        if ahead in walls or ahead not in cells:
            continue
        if ahead in boxes:
            if beyond in walls or beyond in boxes or beyond not in cells:
                continue
            boxes = boxes - {ahead} | {beyond}
        player = ahead
    return boxes <= goals


KINDS: dict[str, Kind] = {
    "mini_sudoku": Kind(read_sudoku, is_sudoku, given("puzzle")),
    "sudoku": Kind(read_sudoku, is_sudoku, given("puzzle")),
    "n_queens": Kind(read_queens, is_peaceful, given("puzzle")),
    "tower_of_hanoi": Kind(
        read_hanoi, moves_tower, given("num_disks", "num_pegs", "start_peg", "target_peg")
    ),
    "puzzle24": Kind(read_expression, makes_24, given("numbers")),
    "sokoban": Kind(read_keys, solves_sokoban, given("gamestr"), options={"max_w": 7, "max_h": 7}),
}
