"""For the tests of procedural tasks: for each its answers as values, how they are written, and who
judges a value. Mutations of a value are made at random."""

import dataclasses
import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from tests import procedural_judges as judges
from tests.procedural_judges import Facts


@dataclasses.dataclass(frozen=True)
class Case:
    """`parse` and `write` go between the text of an answer and a value that `mutated` can spoil."""

    parse: Callable[[str], Any]
    write: Callable[[Any], str]
    solves: Callable[[Any, Facts], bool]


def mutated(rng: random.Random, value: Any) -> Any:
    """The value with one or two changes; some of them change nothing."""
    for _ in range(rng.choice([1, 1, 2])):
        value = _CHANGES[type(value)](rng, value)
    return value


def _change_int(rng: random.Random, value: int) -> int:
    return rng.choice(
        [value + 1, value - 1, -value, value * 10, value, int(str(value)[::-1].strip("-"))]
    )


def _change_text(rng: random.Random, value: str) -> str:
    at, other = rng.randrange(len(value) + 1), rng.randrange(len(value) + 1)
    low, high = sorted((at, other))
    kept = value[:low] + value[low:high][::-1] + value[high:]
    return rng.choice(
        [value[:at] + value[at + 1 :], value[::-1], kept, value[:at] + value[-1:] + value[at:]]
    )


def _change_list(rng: random.Random, value: list) -> list:
    if not value:
        return value
    new, i, j = list(value), rng.randrange(len(value)), rng.randrange(len(value))
    change = rng.choice(["swap", "copy", "drop", "repeat", "inner", "inner", "all"])
    if change == "swap":
        new[i], new[j] = new[j], new[i]
    elif change == "copy":
        new[i] = new[j]
    elif change == "drop":
        del new[i]
    elif change == "repeat":
        new.insert(i, new[j])
    elif change == "inner":
        new[i] = mutated(rng, new[i])
    elif change == "all" and isinstance(new[i], list) and new[i]:
        a, b = rng.choice(new[i]), rng.choice(new[j] or new[i])
        new = [[{a: b, b: a}.get(x, x) for x in row] if _flat(row) else row for row in new]
    return new


def _flat(row: Any) -> bool:
    return isinstance(row, list) and not any(isinstance(x, list) for x in row)


def _change_dict(rng: random.Random, value: dict) -> dict:
    new, a, b = dict(value), rng.choice(list(value)), rng.choice(list(value))
    change = rng.choice(["swap", "inner", "inner", "drop"])
    if change == "swap":
        new[a], new[b] = new[b], new[a]
    elif change == "inner":
        new[a] = mutated(rng, new[a])
    elif len(new) > 1:
        del new[a]
    return new


_CHANGES: dict[type, Callable] = {
    int: _change_int,
    str: _change_text,
    list: _change_list,
    dict: _change_dict,
}


def number_rows(text: str) -> list[list[int]]:
    return [judges.integers(line) for line in text.splitlines() if re.search(r"\d", line)]


def lines(rows: list[list]) -> str:
    return "\n".join(" ".join(map(str, row)) for row in rows)


def spaced(items: list) -> str:
    return " ".join(map(str, items))


def whole(solution: Callable[[Facts], Any]) -> Case:
    """An integer that a formula gives."""
    return Case(int, str, lambda value, facts: value == solution(facts))


def read_knights(text: str) -> dict[str, str]:
    return dict(re.findall(r"(\w+) is an? (\w+)", text))


def write_hanoi(value: list[list[int]]) -> str:
    words = ["Move disk", "from Peg", "to Peg"]
    return "\n".join(
        " ".join(f"{word} {n}" for word, n in itertools.zip_longest(words, move, fillvalue=""))
        for move in value
    )


_BOARD = (number_rows, lines)
_OBJECT = (json.loads, json.dumps)
_WORDS = (str.split, spaced)
_COMMAS = (lambda text: text.split(","), ",".join)
_RATIO = (judges.integers, lambda value: "/".join(map(str, value)))
CASES: dict[str, Case] = {
    "knights_knaves": Case(
        read_knights,
        lambda v: ", and ".join(f"{a} is a {b}" for a, b in v.items()) + ".",
        judges.knights,
    ),
    "circuit_logic": whole(judges.circuit),
    "self_reference": whole(judges.self_reference),
    "futoshiki": Case(*_BOARD, judges.futoshiki),
    "kakurasu": Case(*_BOARD, judges.kakurasu),
    "survo": Case(*_BOARD, judges.survo),
    "spiral_matrix": Case(judges.integers, spaced, judges.spiral),
    "number_sorting": Case(lambda text: re.findall(r"-?\d+\.?\d*", text), str, judges.sorting),
    "group_anagrams": Case(*_OBJECT, judges.anagrams),
    "palindrome_generation": Case(
        str, str, lambda v, facts: [*v] == [*v][::-1] and Counter(v) == Counter(facts["letters"])
    ),
    "binary_alternation": whole(judges.alternation),
    "jugs": Case(*_OBJECT, judges.jugs),
    "word_ladder": Case(*_COMMAS, judges.ladder),
    "cryptarithm": Case(
        lambda text: {k: int(v) for k, v in re.findall(r"(\w)=(\d)", text)},
        lambda v: ",".join(f"{a}={b}" for a, b in v.items()),
        judges.cryptarithm,
    ),
    "mini_sudoku": Case(*_BOARD, judges.sudoku),
    "sudoku": Case(*_BOARD, judges.sudoku),
    "n_queens": Case(
        lambda text: [line.split() for line in text.splitlines()], lines, judges.queens
    ),
    "tower_of_hanoi": Case(number_rows, write_hanoi, judges.hanoi),
    "puzzle24": Case(lambda text: re.findall(r"\d+|\S", text), spaced, judges.twenty_four),
    "sokoban": Case(str, str, judges.sokoban),
    "shortest_path": Case(*_WORDS, judges.shortest),
    "graph_color": Case(*_OBJECT, judges.colouring),
    "largest_island": whole(judges.island),
    "course_schedule": Case(str, str, judges.schedule),
    "path_star": Case(judges.integers, spaced, judges.star),
    "rotten_oranges": whole(judges.oranges),
    "letter_counting": whole(lambda f: "".join(f["span"]).lower().count(f["target_letter"])),
    "needle_haystack": Case(str, str, judges.needle),
    "caesar_cipher": Case(str, str, judges.caesar),
    "word_sequence_reversal": Case(
        lambda text: text.split(", "), ", ".join, lambda v, facts: v[::-1] == facts["words"]
    ),
    "chain_sum": whole(judges.chain),
    "gcd": whole(lambda f: max(d for d in range(1, 1001) if not any(n % d for n in f["numbers"]))),
    "lcm": whole(
        lambda f: next(m for m in itertools.count(1) if not any(m % n for n in f["numbers"]))
    ),
    "prime_factorization": Case(judges.integers, lambda v: " × ".join(map(str, v)), judges.factors),
    "fraction_simplification": Case(
        *_RATIO,
        lambda v, facts: judges.lowest(v, Fraction(facts["numerator"], facts["denominator"])),
    ),
    "base_conversion": Case(str, str, judges.based),
    "dice": Case(*_RATIO, lambda v, facts: judges.lowest(v, judges.odds(facts))),
}
