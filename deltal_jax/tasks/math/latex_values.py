r"""Values of LaTeX expressions, by a small grammar of our own; nothing is evaluated by Python.

    same_value(r"\frac{2}{4}", "0.5")            True
    same_value(r"(x+1)^2", "x^2 + 2x + 1")       True

Rational numbers are exact; others are compared in floating point, and expressions with letters at
fixed points. `latex_grammar.py` has the grammar.
"""

import cmath
import math
from collections.abc import Callable, Mapping
from fractions import Fraction

from deltal_jax.tasks.math.latex_grammar import FUNCTIONS, Node, ParseError, letters, parse

#: Most bits of an exact number, and so of what a power or a factorial may give.
MAX_BITS = 20_000
#: Relative difference of two floating-point values that are the same.
TOLERANCE = 1e-10

_Number = Fraction | float | complex

#: Where expressions with letters are compared: rational, so that polynomials are exact.
_POINTS = [
    [Fraction(7 + 2 * letter + 5 * point, (3 + letter) * (-1) ** point) for letter in range(8)]
    for point in range(6)
]
#: At so many points both sides have to have a value.
_ENOUGH = 3


class TooLargeError(ValueError):
    """A value of more than MAX_BITS."""


def same_value(left: str, right: str) -> bool:
    """Whether two texts have the same value.

    Raises ParseError where one is no expression, and TooLargeError where one is out of bounds.
    """
    nodes = parse(left), parse(right)
    names = sorted(letters(nodes[0]) | letters(nodes[1]))
    if len(names) > len(_POINTS[0]):
        raise ParseError("too many letters")
    if not names:
        return _close(evaluate(nodes[0], {}), evaluate(nodes[1], {}))
    compared = 0
    for point in _POINTS:
        values = dict(zip(names, point, strict=False))
        try:
            pair = [evaluate(node, values) for node in nodes]
        except ParseError:  # a pole, for one
            continue
        if not _close(*pair):
            return False
        compared += 1
    return compared >= _ENOUGH


def evaluate(node: Node, letters: Mapping[str, Fraction]) -> _Number:
    """The value of an expression, exact where it is rational. Raises ParseError where there is
    none, TooLargeError where it is out of bounds."""
    kind, *parts = node
    if kind == "number":
        return parts[0]
    if kind == "letter":
        return math.pi if parts[0] == r"\pi" else letters[parts[0]]
    values = [evaluate(part, letters) for part in parts]
    try:
        return _bounded(_apply(kind, values))
    except OverflowError as error:
        raise TooLargeError from error
    except (ZeroDivisionError, TypeError) as error:  # an ordering of complex numbers is none
        raise ParseError("no value") from error
    except ValueError as error:
        if isinstance(error, (ParseError, TooLargeError)):
            raise
        raise ParseError("no value") from error


def _apply(kind: str, values: list[_Number]) -> _Number:
    if kind in "+*":
        total = values[0]
        for value in values[1:]:
            total = _bounded(total + value if kind == "+" else total * value)
        return total
    if kind in _OPERATIONS:
        return _OPERATIONS[kind](*values)
    return FUNCTIONS[kind](complex(values[0]))


def _power(base: _Number, exponent: _Number) -> _Number:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        if exponent.denominator == 1:
            size = max(base.numerator.bit_length(), base.denominator.bit_length())
            _bound(abs(exponent.numerator) * (size if abs(base) != 1 and base else 0))
            return base**exponent.numerator
        base, exponent = float(base), float(exponent)
        return base**exponent
    return complex(base) ** complex(exponent)


def _natural(value: _Number) -> int:
    if not isinstance(value, Fraction) or value.denominator != 1 or value < 0:
        raise ParseError("not a natural number")
    _bound(value.numerator * 8)  # of the factorial, roughly
    return value.numerator


def _absolute(value: _Number) -> _Number:
    return abs(value)


def _factorial(value: _Number) -> Fraction:
    return Fraction(math.factorial(_natural(value)))


def _binomial(above: _Number, below: _Number) -> Fraction:
    return Fraction(math.comb(_natural(above), _natural(below)))


_OPERATIONS: dict[str, Callable[..., _Number]] = {
    "-": lambda x: -x,
    "/": lambda x: 1 / x,
    "^": _power,
    "abs": _absolute,
    "!": _factorial,
    "binomial": _binomial,
}


def _bounded(value: _Number) -> _Number:
    if isinstance(value, Fraction):
        _bound(value.numerator.bit_length() + value.denominator.bit_length())
    elif not cmath.isfinite(value):
        raise ParseError("no finite value")
    return value


def _bound(bits: int) -> None:
    if bits > MAX_BITS:
        raise TooLargeError("too large")


def _close(left: _Number, right: _Number) -> bool:
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return left == right
    try:
        return cmath.isclose(complex(left), complex(right), rel_tol=TOLERANCE, abs_tol=1e-14)
    except OverflowError as error:
        raise TooLargeError from error
