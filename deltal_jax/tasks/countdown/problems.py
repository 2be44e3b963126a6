"""CountDown's problems, made from random expressions, and the searches that demonstrations show."""

import dataclasses
import functools
import random
import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice

from deltal_jax.errors import UserError
from deltal_jax.tasks.base import Problem

#: Most problems that are drawn for one that is held out.
MAX_DRAWS = 1000
#: Every tenth class of problems is held out.
HELD_OUT_CLASSES = 10

#: (value, text, steps): steps are the binary operations that the text performs, in order.
Expression = tuple[int, str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Generator:
    """Problems of `numbers` … `most_numbers` numbers in 1..`max_number`, each count as often.

    A problem is a random expression of all its numbers: two parts are joined by a random operator,
    again and again, where the value is a whole number that `allows` takes; it is dropped where its
    value is one of the numbers or not in 1..`max_value`. Of `operators` one is -, with which two
    parts can always be joined. A problem is held out when crc32 of
    (sorted numbers, target) is 0 modulo 10.
    """

    numbers: int = 3
    max_number: int = 9
    max_value: int = 60
    operators: str = "+-*"
    most_numbers: int | None = None
    #: Warm-up traces: share of direct answers, chance that a try is the solution, and to give up
    #: after a miss.
    direct: float = 0.1
    insight: float = 0.35
    give_up: float = 0.2
    #: A share of patient traces, so that long traces are seen at all: RL makes them common.
    patient: float = 0.1
    patient_insight: float = 0.1
    patient_give_up: float = 0.04

    name = "countdown"

    def allows(self, value: int) -> bool:
        """Whether a value may occur on the way to the target."""
        return 0 <= value <= self.max_value

    def make_problem(self, numbers: list[int], target: int) -> Problem:
        """The problem with its prompt."""
        raise NotImplementedError

    def problem(self, seed: int, position: int) -> Problem | None:
        rng = random.Random(f"countdown/train/{seed}/{position}")
        return next(p for p, _ in self.problems(rng) if not self.is_held_out(p))

    def held_out(self, count: int) -> list[Problem]:
        kept = _held_out(self, count)
        if len(kept) < count:
            raise UserError(
                f"task: too few of the problems with {self.numbers} numbers up to "
                f"{self.max_number} are held out; raise task.countdown.max_number or "
                "task.countdown.numbers"
            )
        return list(kept)

    def is_held_out(self, problem: Problem) -> bool:
        """Whether the problem is kept from training: a property of its numbers and target alone."""
        numbers, target = identity(problem.answer["numbers"], problem.answer["target"])
        return zlib.crc32(repr(([*numbers], target)).encode()) % HELD_OUT_CLASSES == 0

    def problems(self, rng: random.Random) -> Iterator[tuple[Problem, Expression]]:
        """Problems with their solutions, held out or not."""
        most = self.numbers if self.most_numbers is None else self.most_numbers
        while True:
            count = rng.randint(self.numbers, most) if most > self.numbers else self.numbers
            numbers, solution = self._solved(rng, count)
            yield self.make_problem(numbers, solution[0]), solution

    def _solved(self, rng: random.Random, count: int) -> tuple[list[int], Expression]:
        while True:
            numbers = [rng.randint(1, self.max_number) for _ in range(count)]
            solution = self._random_expression(rng, numbers)
            if 1 <= solution[0] <= self.max_value and solution[0] not in numbers:
                return numbers, solution

    def _random_expression(self, rng: random.Random, numbers: list[int]) -> Expression:
        """A random expression of all the numbers whose intermediate values are allowed."""
        parts: list[Expression] = [(n, str(n), ()) for n in numbers]
        while len(parts) > 1:
            i, j = rng.sample(range(len(parts)), 2)
            left, right, operator = parts[i], parts[j], rng.choice(self.operators)
            value = _apply(operator, left[0], right[0])
            if value is not None and self.allows(value):
                steps = (*left[2], *right[2], f"{left[0]} {operator} {right[0]} = {value}")
                text = f"{_bracketed(left)} {operator} {_bracketed(right)}"
                parts = [p for k, p in enumerate(parts) if k not in (i, j)]
                parts.append((value, text, steps))
        return parts[0]

    def _search(
        self, rng: random.Random, problem: Problem, solution: Expression
    ) -> list[Expression]:
        """Tries until a hit, or until giving up."""
        numbers, target = problem.answer["numbers"], problem.answer["target"]
        insight, give_up = self.insight, self.give_up
        if rng.random() < self.patient:
            insight, give_up = self.patient_insight, self.patient_give_up
        tries: list[Expression] = []
        while True:
            known = rng.random() < insight
            tries.append(solution if known else self._random_expression(rng, numbers))
            if tries[-1][0] == target or rng.random() < give_up:
                return tries


@functools.lru_cache(4)
def _held_out(generator: Generator, count: int) -> tuple[Problem, ...]:
    """At most `count`; every evaluation asks for the same."""
    stream = generator.problems(random.Random("countdown/held-out"))
    draws = (problem for problem, _ in islice(stream, MAX_DRAWS * count))
    return tuple(islice(filter(generator.is_held_out, draws), count))


def identity(numbers: Iterable[int], target: int) -> tuple[tuple[int, ...], int]:
    """What makes two problems the same: the numbers in any order, and the target."""
    return tuple(sorted(numbers)), target


def read_problem(text: str) -> tuple[list[int], int]:
    """The numbers and the target of a problem that a person typed. Raises UserError."""
    match = re.fullmatch(r"\s*(\d{1,9}(?:\s+\d{1,9})+)\s*->\s*(\d{1,9})\s*:?\s*", text, re.ASCII)
    if match is None:
        raise UserError(f"problem: {text!r} is not of the form '7 1 5 -> 40'")
    return [int(n) for n in match.group(1).split()], int(match.group(2))


def _apply(operator: str, left: int, right: int) -> int | None:
    """The value; None where a division leaves a remainder."""
    if operator == "/":
        return left // right if right and left % right == 0 else None
    return {"+": left + right, "-": left - right, "*": left * right}[operator]


def _bracketed(part: Expression) -> str:
    return f"( {part[1]} )" if part[2] else part[1]
