"""Logic: who lies, circuits, and grids with constraints."""

import re
from collections import Counter
from typing import Any

from deltal_jax.tasks.procedural.reading import (
    Kind,
    Wrong,
    choice,
    given,
    grid,
    integer,
    number_grid,
    shaped,
)

_CLAUSE = re.compile(r"([a-z]+) is an? ([a-z]+)")


def read_roles(text: str, facts: dict) -> list[bool]:
    """Whether each person tells the truth, from 'A is a knight, and B is a knave'."""
    roles = {facts["knight"].lower(): True, facts["knave"].lower(): False}
    names = [name.lower() for name in facts["names"]]
    found: dict[str, bool] = {}
    for part in re.split(r",|\.|\n|\band\b", text.lower()):
        clause = " ".join(part.split())
        if not clause:
            continue
        match = _CLAUSE.fullmatch(clause)
        if match is None or match[1] not in names or match[2] not in roles:
            raise Wrong("not of the form 'A is a …, and B is a …'")
        if found.setdefault(match[1], roles[match[2]]) != roles[match[2]]:
            raise Wrong(f"{match[1]} is said to be both")
    if len(found) < len(names):
        raise Wrong("somebody is missing")
    return [found[name] for name in names]


def consistent(truthful: list[bool], facts: dict) -> bool:
    """Whether exactly those who tell the truth say what is true."""
    said = [claims(statement, truthful) for statement in facts["statements"]]
    return said == truthful


def claims(statement: list, truthful: list[bool]) -> bool:
    """Whether a statement is true, given who tells the truth."""
    operator, *parts = statement
    if operator in ("telling-truth", "lying"):
        return truthful[parts[0]] == (operator == "telling-truth")
    values = [claims(part, truthful) for part in parts]
    if operator == "not":
        return not values[0]
    if operator == "->":
        return not values[0] or values[1]
    if operator == "<=>":
        return values[0] == values[1]
    return all(values) if operator == "and" else any(values)


def _people(entry: dict) -> dict[str, Any]:
    metadata = entry["metadata"]
    terms = {role: metadata["knight_knave_terms"][role] for role in ("knight", "knave")}
    return {"statements": metadata["statements"], "names": metadata["names"], **terms}


def read_futoshiki(text: str, facts: dict) -> list[list[int]]:
    """The digits of a board; its signs are the puzzle's and do not count."""
    cells = re.sub(r"[<>∧∨^vV]", " ", text)
    rows = [[int(c) for c in row] for row in grid(cells, "123456789")]
    shaped(rows, facts["puzzle"])
    return rows


def is_futoshiki(rows: list[list[int]], facts: dict) -> bool:
    """Whether a Latin square keeps the clues and the inequalities."""
    for a, b, c, d, sign in facts["constraints"]:
        low, high = (rows[a][b], rows[c][d]) if sign == "<" else (rows[c][d], rows[a][b])
        if low >= high:
            return False
    return is_latin(rows) and keeps_clues(rows, facts["puzzle"])


def is_latin(rows: list[list[int]]) -> bool:
    """Whether every row and column has each of 1 … n."""
    wanted = set(range(1, len(rows) + 1))
    return all(set(line) == wanted for line in (*rows, *zip(*rows, strict=True)))


def keeps_clues(rows: list[list[int]], puzzle: list[list[int]]) -> bool:
    """Whether every cell that the puzzle fills (not 0) is as it was."""
    pairs = zip(rows, puzzle, strict=True)
    return all(c in (0, v) for row, clues in pairs for v, c in zip(row, clues, strict=True))


def read_bits(text: str, facts: dict) -> list[list[int]]:
    """A grid of 0 and 1."""
    rows = [[int(c) for c in row] for row in grid(text, "01")]
    shaped(rows, [facts["col_sums"]] * len(facts["row_sums"]))
    return rows


def is_kakurasu(rows: list[list[int]], facts: dict) -> bool:
    """Whether the places of the ones, counted from 1, have the sums."""
    sums = [
        [sum(i * v for i, v in enumerate(line, start=1)) for line in lines]
        for lines in (rows, zip(*rows, strict=True))
    ]
    return sums == [facts["row_sums"], facts["col_sums"]]


def read_survo(text: str, facts: dict) -> list[list[int]]:
    """A grid of integers."""
    rows = number_grid(text, facts)
    shaped(rows, facts["puzzle"])
    return rows


def is_survo(rows: list[list[int]], facts: dict) -> bool:
    """Whether the candidates, each once, fill the cells so that the last ones are the sums."""
    puzzle = facts["puzzle"]
    placed = [
        value
        for row, clues in zip(rows, puzzle, strict=True)
        for value, clue in zip(row, clues, strict=True)
        if clue == 0
    ]
    if Counter(placed) != Counter(facts["candidate_numbers"]) or not keeps_clues(rows, puzzle):
        return False
    return all(sum(line[:-1]) == line[-1] for line in (*rows, *zip(*rows, strict=True)))


KINDS: dict[str, Kind] = {
    "knights_knaves": Kind(read_roles, consistent, _people),
    "circuit_logic": Kind(choice("0", "1"), facts=given("expression", "assignments")),
    "self_reference": Kind(integer),
    "futoshiki": Kind(
        read_futoshiki,
        is_futoshiki,
        given("puzzle", "constraints"),
        options={"max_board_size": 6},
    ),
    "kakurasu": Kind(read_bits, is_kakurasu, given("row_sums", "col_sums")),
    "survo": Kind(read_survo, is_survo, given("puzzle", "candidate_numbers")),
}
