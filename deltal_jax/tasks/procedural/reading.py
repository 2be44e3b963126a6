"""Final answers as plain values. Every reader is bounded, executes nothing, and raises Wrong for
what it cannot read; its text has at most `MAX_ANSWER` characters."""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from deltal_jax.errors import UserError

#: Longest final answer that is read, in characters: a Tower of Hanoi of seven disks takes 4,300.
MAX_ANSWER = 8000
#: Most brackets of an answer in JSON.
MAX_BRACKETS = 400

_INTEGER = re.compile(r"[-+]?\d{1,30}", re.ASCII)
_DECIMAL = re.compile(r"[-+]?\d{1,30}(?:\.\d{1,30})?", re.ASCII)
_FRACTION = re.compile(
    r"\$?\s*(?:([-+]?\d{1,30})\s*/\s*(\d{1,30})|\\[dt]?frac\{(-?\d{1,30})\}\{(\d{1,30})\})\s*\$?",
    re.ASCII,
)


class Wrong(ValueError):
    """The answer cannot be right; the message says why."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """How one of reasoning-gym's data sets is verified.

    `facts` is what of an entry defines the problem, as plain data; `read` turns the text of a final
    answer into a value, or raises Wrong; `holds` says whether a value solves the problem. Without
    `holds` the answer is unique: the value of `example`, the generator's own answer.
    """

    read: Callable[[str, dict], Any]
    holds: Callable[[Any, dict], bool] | None = None
    facts: Callable[[dict], dict] = lambda entry: {"question": entry["question"]}
    example: Callable[[dict], str] = lambda entry: str(entry["answer"])
    #: For the generator, where its own defaults take long.
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def given(*names: str) -> Callable[[dict], dict]:
    """The facts that an entry's metadata has under these names."""
    return lambda entry: {name: entry["metadata"][name] for name in names}


def integer(text: str, facts: dict) -> int:
    """One integer."""
    del facts
    if _INTEGER.fullmatch(text.strip()) is None:
        raise Wrong("not an integer")
    return int(text)


def integers(text: str, facts: dict) -> list[int]:
    """Integers, separated by spaces or commas."""
    return [integer(word, facts) for word in text.replace(",", " ").split()]


def decimals(text: str, facts: dict) -> list[Fraction]:
    """Decimal numbers, separated by commas, with or without brackets and quotes."""
    del facts
    parts = [part.strip() for part in re.sub(r"[\[\]'\"]", " ", text).split(",")]
    if not all(_DECIMAL.fullmatch(part) for part in parts):
        raise Wrong("not a list of numbers")
    return [Fraction(part) for part in parts]


def fraction(text: str, facts: dict) -> tuple[int, int]:
    """Numerator and denominator as they are written: a/b, or \\frac{a}{b}."""
    del facts
    match = _FRACTION.fullmatch(text.strip())
    if match is None:
        raise Wrong("not a fraction")
    above, below = (int(group) for group in match.groups() if group is not None)
    return above, below


def choice(*options: str) -> Callable[[str, dict], str]:
    """One of a few words, in any case, perhaps with a full stop."""

    def read(text: str, facts: dict) -> str:
        del facts
        word = text.strip().rstrip(".").lower()
        if word not in options:
            raise Wrong(f"not one of {', '.join(options)}")
        return word

    return read


def phrase(text: str, facts: dict) -> str:
    """A text whose case and spaces do not matter."""
    del facts
    return " ".join(text.lower().split())


def listed(text: str, facts: dict) -> list[str]:
    """Words that are separated by commas; their case matters."""
    del facts
    return [" ".join(word.split()) for word in text.split(",")]


def grid(text: str, symbols: str) -> list[list[str]]:
    """Lines of single symbols, separated by spaces; empty lines do not count."""
    rows = [line.split() for line in text.splitlines() if line.strip()]
    for row in rows:
        for cell in row:
            if cell not in symbols or len(cell) != 1:
                raise Wrong(f"not a grid of {symbols}")
    return rows


def number_grid(text: str, facts: dict) -> list[list[int]]:
    """Lines of integers."""
    return [integers(line, facts) for line in text.splitlines() if line.strip()]


def shaped(rows: list, like: Sequence[Sequence]) -> None:
    """Raise Wrong unless `rows` has as many rows and columns."""
    if [len(row) for row in rows] != [len(row) for row in like]:
        raise Wrong("not of the puzzle's size")


def plain(text: str) -> Any:
    """JSON without a key that appears twice."""
    if text.count("[") + text.count("{") > MAX_BRACKETS:
        raise Wrong("too many brackets")
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise Wrong("not valid JSON") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise Wrong("a key appears twice")
    return dict(pairs)


def reasoning_gym() -> Any:
    """The package, imported late: it is optional and takes two seconds."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise UserError(
            "task.name: this task needs reasoning-gym; install deltal-jax[procedural]"
        ) from error
    return reasoning_gym
