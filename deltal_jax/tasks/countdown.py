"""CountDown: reach a target from given numbers, each used exactly once.

    prompt    7 1 5 -> 40 :
    response  5 + 7 = 12 , 12 * 1 = 12 < 1 + 7 = 8 , 5 * 8 = 40 ok <a> 5 * ( 1 + 7 ) </a>

A response is a trace of tries and then an answer. After each try the trace says how its value
compares with the target: `<` too low, `>` too high, `ok` a hit. The verifier looks at the answer
alone.
"""

import dataclasses
import random
import re
import zlib
from collections.abc import Iterator
from fractions import Fraction
from itertools import islice

from deltal_jax.errors import UserError
from deltal_jax.tasks.base import Problem, Verdict

#: Longest answer that is parsed, in characters. The real ones have under 40.
MAX_ANSWER_LENGTH = 400
#: Deepest nesting of parentheses that is parsed.
MAX_DEPTH = 50
#: Most problems that are drawn for one that is held out.
MAX_DRAWS = 1000
#: Every tenth class of problems is held out.
HELD_OUT_CLASSES = 10

_ANSWER = re.compile(r"<a>((?:(?!<a>|</a>).)*)</a>", re.DOTALL)
_TOKEN = re.compile(r"\s*(?:(\d+)|([-+*/()]))", re.ASCII)

#: (value, text, steps): steps are the binary operations that the text performs, in order.
_Expression = tuple[int, str, tuple[str, ...]]


class ParseError(ValueError):
    """The answer is not an arithmetic expression."""


@dataclasses.dataclass(frozen=True)
class CountDown:
    """Problems of `numbers` numbers in 1..`max_number`, made from a random expression.

    Intermediate values stay in 0..`max_value`; the target is in 1..`max_value` and is not one of
    the numbers. A problem is held out when crc32 of (sorted numbers, target) is 0 modulo 10.
    """

    numbers: int = 3
    max_number: int = 9
    max_value: int = 60
    operators: str = "+-*"
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

    def vocabulary(self) -> list[str]:
        words = [str(value) for value in range(self.max_value + 1)]
        return [*words, *self.operators, *"-> : = , < > ok <a> </a> ( )".split()]

    def problem(self, seed: int, position: int) -> Problem:
        rng = random.Random(f"countdown/train/{seed}/{position}")
        return next(p for p, _ in self._problems(rng) if not self.is_held_out(p))

    def held_out(self, count: int) -> list[Problem]:
        stream = self._problems(random.Random("countdown/held-out"))
        draws = (problem for problem, _ in islice(stream, MAX_DRAWS * count))
        kept = list(islice(filter(self.is_held_out, draws), count))
        if len(kept) < count:
            raise UserError(
                f"task: too few of the problems with {self.numbers} numbers up to "
                f"{self.max_number} are held out; raise task.countdown.max_number or "
                "task.countdown.numbers"
            )
        return kept

    def demonstrations(self, seed: int) -> Iterator[tuple[str, str]]:
        rng = random.Random(f"countdown/demonstrations/{seed}")
        for problem, solution in self._problems(rng):
            if not self.is_held_out(problem):
                yield problem.prompt, self._trace(rng, problem, solution)

    def parse_problem(self, text: str) -> Problem:
        match = re.fullmatch(
            r"\s*(\d{1,9}(?:\s+\d{1,9})+)\s*->\s*(\d{1,9})\s*:?\s*", text, re.ASCII
        )
        if match is None:
            raise UserError(f"problem: {text!r} is not of the form '7 1 5 -> 40'")
        numbers, target = [int(n) for n in match.group(1).split()], int(match.group(2))
        for value in (*numbers, target):
            if value > self.max_value:
                raise UserError(
                    f"problem: {value} is over task.countdown.max_value={self.max_value}"
                )
        return _problem(numbers, target)

    def verify(self, response: str, answer: dict) -> Verdict:
        """Reward 1 when the last `<a> … </a>` is an expression of the target with every number
        once.

        Parsed by recursive descent with exact rational arithmetic; nothing is ever evaluated by
        Python.
        """
        answers = _ANSWER.findall(response)
        if not answers:
            return Verdict(0.0, False, "no answer")
        final = " ".join(answers[-1][:MAX_ANSWER_LENGTH].split())
        try:
            value, used = parse(answers[-1])
        except ParseError as error:
            return Verdict(0.0, False, str(error), final)
        if sorted(used) != sorted(answer["numbers"]):
            return Verdict(0.0, False, "does not use each number once", final)
        if value != answer["target"]:
            return Verdict(0.0, False, f"gives {value}, not {answer['target']}", final)
        return Verdict(1.0, True, "correct", final)

    @staticmethod
    def is_held_out(problem: Problem) -> bool:
        """Whether the problem is kept from training: a property of its numbers and target alone."""
        identity = (sorted(problem.answer["numbers"]), problem.answer["target"])
        return zlib.crc32(repr(identity).encode()) % HELD_OUT_CLASSES == 0

    def _problems(self, rng: random.Random) -> Iterator[tuple[Problem, _Expression]]:
        while True:
            numbers = [rng.randint(1, self.max_number) for _ in range(self.numbers)]
            solution = self._random_expression(rng, numbers)
            target = solution[0]
            if target >= 1 and target not in numbers:
                yield _problem(numbers, target), solution

    def _random_expression(self, rng: random.Random, numbers: list[int]) -> _Expression:
        """A random expression of all the numbers whose intermediate values stay in range."""
        parts: list[_Expression] = [(n, str(n), ()) for n in numbers]
        while len(parts) > 1:
            i, j = rng.sample(range(len(parts)), 2)
            left, right, operator = parts[i], parts[j], rng.choice(self.operators)
            value = _apply(operator, left[0], right[0])
            if 0 <= value <= self.max_value:
                steps = (*left[2], *right[2], f"{left[0]} {operator} {right[0]} = {value}")
                text = f"{_bracketed(left)} {operator} {_bracketed(right)}"
                parts = [p for k, p in enumerate(parts) if k not in (i, j)]
                parts.append((value, text, steps))
        return parts[0]

    def _trace(self, rng: random.Random, problem: Problem, solution: _Expression) -> str:
        numbers, target = problem.answer["numbers"], problem.answer["target"]
        if rng.random() < self.direct:
            return f"<a> {self._random_expression(rng, numbers)[1]} </a>"
        insight, give_up = self.insight, self.give_up
        if rng.random() < self.patient:
            insight, give_up = self.patient_insight, self.patient_give_up
        said = []
        while True:
            known = rng.random() < insight
            attempt = solution if known else self._random_expression(rng, numbers)
            value, text, steps = attempt
            verdict = "ok" if value == target else "<" if value < target else ">"
            said.append(f"{' , '.join(steps)} {verdict}")
            if value == target or rng.random() < give_up:
                return f"{' '.join(said)} <a> {text} </a>"


def _problem(numbers: list[int], target: int) -> Problem:
    prompt = f"{' '.join(map(str, numbers))} -> {target} :"
    return Problem(prompt, {"numbers": numbers, "target": target})


def parse(text: str) -> tuple[Fraction, list[int]]:
    """The exact value of an arithmetic expression over + - * / ( ), and the integers in it.

    Raises ParseError for anything else: a stray character, a missing operand, a division by zero,
    over MAX_ANSWER_LENGTH characters, or over MAX_DEPTH parentheses.
    """
    return _Parser(text).parse()


class _Parser:
    """Recursive descent: sum = product {(+|-) product}; product = atom {(*|/) atom}."""

    def __init__(self, text: str):
        if len(text) > MAX_ANSWER_LENGTH:
            raise ParseError("answer too long")
        self.tokens = _tokenize(text)
        self.at = 0
        self.depth = 0
        self.used: list[int] = []

    def parse(self) -> tuple[Fraction, list[int]]:
        value = self.sum()
        if self.at < len(self.tokens):
            raise ParseError(f"unexpected {self.tokens[self.at]!r}")
        return value, self.used

    def sum(self) -> Fraction:
        value = self.product()
        while (operator := self.take("+", "-")) is not None:
            right = self.product()
            value = value + right if operator == "+" else value - right
        return value

    def product(self) -> Fraction:
        value = self.atom()
        while (operator := self.take("*", "/")) is not None:
            right = self.atom()
            if operator == "/" and right == 0:
                raise ParseError("division by zero")
            value = value * right if operator == "*" else value / right
        return value

    def atom(self) -> Fraction:
        if self.take("(") is not None:
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise ParseError("nested too deep")
            value = self.sum()
            if self.take(")") is None:
                raise ParseError("missing )")
            self.depth -= 1
            return value
        if self.at < len(self.tokens) and self.tokens[self.at].isdigit():
            number = int(self.tokens[self.at])
            self.at += 1
            self.used.append(number)
            return Fraction(number)
        raise ParseError("missing number")

    def take(self, *symbols: str) -> str | None:
        if self.at < len(self.tokens) and self.tokens[self.at] in symbols:
            self.at += 1
            return self.tokens[self.at - 1]
        return None


def _tokenize(text: str) -> list[str]:
    tokens, at, text = [], 0, text.rstrip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise ParseError(f"unexpected {text[at]!r}")
        tokens.append(match.group(1) or match.group(2))
        at = match.end()
    return tokens


def _apply(operator: str, left: int, right: int) -> int:
    return {"+": left + right, "-": left - right, "*": left * right}[operator]


def _bracketed(part: _Expression) -> str:
    return f"( {part[1]} )" if part[2] else part[1]
