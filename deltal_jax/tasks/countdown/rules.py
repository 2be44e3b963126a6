"""CountDown's two grammars of an answer, and its verdict by each. Nothing is ever executed.

strict      + - * / and parentheses over whole numbers, in exact fractions
reference   what the paper's code gives to Python's `eval`: digits, + - * / ( ) . and white space,
            so that `**`, `//`, signs and `1.5` have Python's meaning; within 1e-5 of the target
"""

import operator
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import NamedTuple

from deltal_jax.tasks.base import Verdict

#: Longest answer that is parsed strictly, in characters. The real ones have under 40.
MAX_ANSWER_LENGTH = 400
#: Deepest nesting of parentheses that is parsed strictly.
MAX_DEPTH = 50
#: Deepest nesting that Python takes.
PYTHON_DEPTH = 200
#: Most digits of a whole number that Python reads.
PYTHON_DIGITS = 4300
#: Most symbols of an answer that are evaluated as Python would. Its own limit is a few thousand.
MAX_SYMBOLS = 2000
#: Largest whole number on the way to a value, in bits: Python would go on until memory ends.
MAX_BITS = 1 << 16
#: How near to the target a value has to be for the reference.
NEAR = 1e-5

#: What begins the part of a transcript that the reference judges.
TURN = "Assistant:"
OPEN, CLOSE = "<answer>", "</answer>"

_Value = int | float | complex
_STRICT = re.compile(r"\s*(?:(\d+)|([-+*/()]))", re.ASCII)
_ALLOWED = re.compile(r"[\d+\-*/().\s]+")
_PYTHON = re.compile(r"[ \t\f]*(\d+\.\d*|\.\d+|\d+|\*\*|//|[-+*/()]|[\r\n])", re.ASCII)


class ParseError(ValueError):
    """The answer is not an arithmetic expression, or has no value."""


class Grammar(NamedTuple):
    """Where an answer stands in a response (None where there is none), and the verdict on it."""

    find: Callable[[str], str | None]
    judge: Callable[[str, list[int], int], Verdict]


def find_last(response: str, tag: str = "answer") -> str | None:
    """What stands in the last pair of tags, on however many lines; the innermost if they nest."""
    found = re.findall(f"<{tag}>((?:(?!</?{tag}>).)*)</{tag}>", response, re.DOTALL)
    return found[-1] if found else None


def find_on_last_line(transcript: str) -> str | None:
    """What stands in the last tags of the last line, after the first `Assistant:`.

    Tags are paired from the left, as the reference's regular expression does.
    """
    text = transcript.partition(TURN)[2] if TURN in transcript else transcript
    line, at, found = text.rpartition("\n")[2], 0, None
    while (begin := line.find(OPEN, at)) >= 0:
        begin += len(OPEN)
        end = line.find(CLOSE, begin)
        if end < 0:
            break
        found, at = line[begin:end].strip(), end + len(CLOSE)
    return found


def judge_strict(text: str, numbers: list[int], target: int) -> Verdict:
    """Right when it is an expression of exactly the target with every number once."""
    try:
        value, used = parse(text)
    except ParseError as error:
        return _wrong(str(error), text)
    if sorted(used) != sorted(numbers):
        return _wrong("does not use each number once", text)
    if value != target:
        return _wrong(f"gives {_shown(value)}, not {target}", text)
    return Verdict(1.0, True, "correct", _shortened(text))


def judge_reference(text: str, numbers: list[int], target: int) -> Verdict:
    """Right when its runs of digits are the numbers and Python's value is near the target; what
    is an error there is wrong here."""
    digits = re.findall(r"\d+", text)
    if any(len(run) > PYTHON_DIGITS for run in digits) or sorted(map(int, digits)) != sorted(
        numbers
    ):
        return _wrong("does not use each number once", text)
    if not _ALLOWED.fullmatch(text):
        return _wrong("has a character that is not of arithmetic", text)
    try:
        value = evaluate(text)
        if not abs(value - target) < NEAR:
            return _wrong(f"gives {_shown(value)}, not {target}", text)
    except ParseError as error:
        return _wrong(str(error), text)
    except OverflowError:
        return _wrong("too large", text)
    return Verdict(1.0, True, "correct", _shortened(text))


#: What `task.countdown.grammar` may name.
GRAMMARS = {
    "strict": Grammar(find_last, judge_strict),
    "reference": Grammar(find_on_last_line, judge_reference),
}


def _wrong(reason: str, text: str) -> Verdict:
    return Verdict(0.0, False, reason, _shortened(text))


def _shortened(text: str) -> str:
    return " ".join(text[:MAX_ANSWER_LENGTH].split())


def _shown(value: _Value | Fraction) -> str:
    """A value for people; Python refuses to write whole numbers of thousands of digits."""
    if isinstance(value, (int, Fraction)) and abs(value) > 10**50:
        return "a huge number"
    return str(value)


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
        match = _STRICT.match(text, at)
        if match is None:
            raise ParseError(f"unexpected {text[at]!r}")
        tokens.append(match.group(1) or match.group(2))
        at = match.end()
    return tokens


def evaluate(text: str) -> _Value:
    """The value that Python's `eval` has for an expression of numbers, + - * / // ** ( ) and white
    space, by precedence climbing on two stacks.

    Raises ParseError where Python raises, where a whole number would pass MAX_BITS, and for over
    MAX_SYMBOLS symbols.
    """
    values: list[_Value] = []
    waiting: list[str] = []
    opened, operand = 0, True  # operand: one has to come next
    for symbol in _symbols(text):
        if symbol in "\r\n":
            if not opened:
                raise ParseError("is more than one line")
        elif symbol == "(":
            opened += 1
            if not operand or opened > PYTHON_DEPTH:
                raise ParseError("nested too deep" if operand else "unexpected '('")
            waiting.append(symbol)
        elif operand and symbol in ("+", "-"):
            waiting.append(f"sign {symbol}")
        elif operand == (symbol[-1] not in ".0123456789"):
            raise ParseError("missing number" if operand else f"unexpected {symbol!r}")
        elif operand:
            values.append(_number(symbol))
            operand = False
        elif symbol == ")":
            opened -= 1
            _apply_while(lambda last: last != "(", waiting, values)
            if not waiting:
                raise ParseError("unexpected ')'")
            waiting.pop()
        else:
            _apply_while(lambda last, new=symbol: _binds_first(last, new), waiting, values)
            waiting.append(symbol)
            operand = True
    if operand or opened:
        raise ParseError("missing number" if operand else "missing )")
    _apply_while(lambda _: True, waiting, values)
    return values[0]


#: A sign binds more than a product and less than a power, whose right side may have one.
_BINDING = {"(": 0, "+": 1, "-": 1, "*": 2, "/": 2, "//": 2, "sign +": 3, "sign -": 3, "**": 4}


def _binds_first(last: str, new: str) -> bool:
    """Whether the operator that waits is applied before a new one; powers join from the right."""
    return _BINDING[last] > _BINDING[new] or (_BINDING[last] == _BINDING[new] and new != "**")


def _apply_while(
    condition: Callable[[str], bool], waiting: list[str], values: list[_Value]
) -> None:
    while waiting and condition(waiting[-1]):
        name = waiting.pop()
        right = values.pop()
        try:
            values.append(
                _SIGNS[name](right) if name in _SIGNS else _BINARY[name](values.pop(), right)
            )
        except ZeroDivisionError as error:
            raise ParseError("division by zero") from error
        except OverflowError as error:
            raise ParseError("too large") from error
        except TypeError as error:  # a complex number does not divide to a whole one
            raise ParseError("has no value") from error


def _symbols(text: str) -> Iterator[str]:
    text, at, count = text.strip(" \t\r\n\f"), 0, 0
    while at < len(text):
        match = _PYTHON.match(text, at)
        if match is None:
            raise ParseError(f"unexpected {text[at:].lstrip(' ')[0]!r}")
        count += 1
        if count > MAX_SYMBOLS:
            raise ParseError("answer too long")
        yield match.group(1)
        at = match.end()


def _number(digits: str) -> int | float:
    if "." in digits:
        return float(digits)
    if len(digits) > PYTHON_DIGITS or (digits[0] == "0" and digits.strip("0")):
        raise ParseError(f"unexpected {digits[:20]!r}")
    return int(digits)


def _times(left: _Value, right: _Value) -> _Value:
    if isinstance(left, int) and isinstance(right, int):
        _bound(left.bit_length() + right.bit_length())
    return left * right


def _power(left: _Value, right: _Value) -> _Value:
    if isinstance(left, int) and isinstance(right, int) and right > 0 and abs(left) > 1:
        _bound(left.bit_length() * right)
    return left**right


def _bound(bits: int) -> None:
    if bits > MAX_BITS:
        raise ParseError("too large")


_SIGNS: dict[str, Callable[[_Value], _Value]] = {"sign +": operator.pos, "sign -": operator.neg}
_BINARY: dict[str, Callable[..., _Value]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": _times,
    "/": operator.truediv,
    "//": operator.floordiv,
    "**": _power,
}
