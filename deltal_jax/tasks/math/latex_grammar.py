"""The grammar of LaTeX expressions: a text to nested tuples, ("+", left, right) and such.

Numbers, letters, + - * / ^ !, products without a sign, roots, fractions, absolute values, binomials
and the common functions.
"""

import cmath
import re
from collections.abc import Callable
from fractions import Fraction

#: Longest text, in characters.
MAX_LENGTH = 1000
#: Deepest nesting of brackets, fractions, powers and signs.
MAX_DEPTH = 60

#: (kind, *parts), whose parts are nodes, a number or a name.
Node = tuple

_TOKEN = re.compile(
    r"(?P<number>\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\d,])|\d+(?:\.\d+)?|\.\d+)"
    r"|(?P<command>\\[A-Za-z]+)|(?P<letter>[A-Za-zα-ωΑ-Ω])|(?P<sign>\*\*|[-+*/^()\[\]{}|!_])",
    re.ASCII,
)
_SKIPPED = re.compile(
    r"(?:\s|\\[,;:! ]|\\left(?![A-Za-z])|\\right(?![A-Za-z])|\\displaystyle|[$~])+"
)
_SPELLED = {
    "×": r"\times ",
    "·": r"\cdot ",
    "⋅": r"\cdot ",
    "°": r"^\circ ",
    "÷": "/",
    "−": "-",
    "–": "-",
    "π": r"\pi ",
    "√": r"\sqrt ",
    "∞": r"\infty ",
}
_FRACTIONS = (r"\frac", r"\dfrac", r"\tfrac", r"\cfrac")
_BINOMIALS = (r"\binom", r"\dbinom", r"\tbinom")
_TIMES = ("*", r"\cdot", r"\times")
_CLOSING = {"(": ")", "[": "]", "{": "}"}
#: Commands of functions, and what they mean.
FUNCTIONS: dict[str, Callable[[complex], complex]] = {
    r"\sin": cmath.sin,
    r"\cos": cmath.cos,
    r"\tan": cmath.tan,
    r"\cot": lambda x: 1 / cmath.tan(x),
    r"\sec": lambda x: 1 / cmath.cos(x),
    r"\csc": lambda x: 1 / cmath.sin(x),
    r"\arcsin": cmath.asin,
    r"\arccos": cmath.acos,
    r"\arctan": cmath.atan,
    r"\sinh": cmath.sinh,
    r"\cosh": cmath.cosh,
    r"\tanh": cmath.tanh,
    r"\exp": cmath.exp,
    r"\ln": cmath.log,
    r"\log": cmath.log10,
    r"\lg": cmath.log10,
}
#: Commands that begin an atom.
_BEGINNING = {*_FRACTIONS, *_BINOMIALS, *FUNCTIONS, r"\sqrt", r"\pi"}


class ParseError(ValueError):
    """Not an expression of the grammar."""


def parse(text: str) -> Node:
    """The expression as nested tuples. Raises ParseError."""
    if len(text) > MAX_LENGTH:
        raise ParseError("too long")
    return _Parser(_tokens(text)).parse()


def letters(node: Node) -> set[str]:
    """The letters of an expression, π apart."""
    if node[0] == "letter":
        return set() if node[1] == r"\pi" else {node[1]}
    return set().union(*(letters(part) for part in node[1:] if isinstance(part, tuple)))


def spelled(text: str) -> str:
    """The text with commands of LaTeX for mathematical signs of Unicode."""
    for sign, command in _SPELLED.items():
        text = text.replace(sign, command)
    return text


def _tokens(text: str) -> list[str]:
    text = spelled(text).rstrip().removesuffix(".")
    tokens, at = [], 0
    while at < len(text):
        if skipped := _SKIPPED.match(text, at):
            at = skipped.end()
        elif found := _TOKEN.match(text, at):
            tokens.append(found.group())
            at = found.end()
        else:
            raise ParseError(f"unexpected {text[at]!r}")
    return tokens


class _Parser:
    """Recursive descent: sum = product {±product}; product = power {[*|/] power};
    power = atom [!] [^ power]."""

    def __init__(self, tokens: list[str]):
        self.tokens, self.at, self.depth, self.bars = tokens, 0, 0, 0

    def parse(self) -> Node:
        node = self.sum()
        if self.at < len(self.tokens):
            raise ParseError(f"unexpected {self.tokens[self.at]!r}")
        return node

    def nested(self, rule: Callable[[], Node]) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ParseError("nested too deep")
        node = rule()
        self.depth -= 1
        return node

    def sum(self) -> Node:
        terms = [self.signed()]
        while sign := self.take("+", "-"):
            right = self.product()
            terms.append(right if sign == "+" else ("-", right))
        return _flat("+", terms)

    def signed(self) -> Node:
        """A product after at most one sign."""
        sign = self.take("+", "-")
        return ("-", self.product()) if sign == "-" else self.product()

    def product(self) -> Node:
        factors = [self.power()]
        while True:
            if self.take(*_TIMES):
                factors.append(self.factor())
            elif self.take("/", r"\div"):
                factors.append(("/", self.factor()))
            elif self.begins():
                factors.append(self.power())
            else:
                return _flat("*", factors)

    def factor(self) -> Node:
        """A power that may have a sign of its own, as in 2 * -3."""
        return ("-", self.power()) if self.take("-") else self.power()

    def begins(self) -> bool:
        """Whether the next token begins an atom, which is then multiplied."""
        token = self.peek()
        if token is None or token == "|":
            return token is not None and self.bars == 0
        return token[0] in "({[." or token[0].isalnum() or token in _BEGINNING

    def power(self) -> Node:
        node = self.nested(self.atom)
        if self.take("!"):
            node = ("!", node)
        if self.take("^", "**"):
            node = ("^", node, self.group() if self.peek() == "{" else self.nested(self.factor))
        return node

    def atom(self) -> Node:
        token = self.peek()
        if token is None:
            raise ParseError("something is missing at the end")
        if token in _CLOSING:
            return self.group()
        self.at += 1
        if token[0].isdigit() or token[0] == ".":
            return ("number", _number(token))
        if token == "|":
            self.bars += 1
            node = ("abs", self.sum())
            self.bars -= 1
            self.expect("|")
            return node
        if token == r"\pi" or token[0].isalpha():
            return ("letter", token + self.subscript())
        return self.command(token)

    def command(self, name: str) -> Node:
        if name in _FRACTIONS:
            return ("*", self.argument(), ("/", self.argument()))
        if name in _BINOMIALS:
            return ("binomial", self.argument(), self.argument())
        if name == r"\sqrt":
            return self.root()
        if name in FUNCTIONS:
            return self.function(name)
        raise ParseError(f"unexpected {name!r}")

    def group(self) -> Node:
        opening = self.tokens[self.at]
        self.at += 1
        bars, self.bars = self.bars, 0
        node = self.sum()
        self.bars = bars
        self.expect(_CLOSING[opening])
        return node

    def argument(self) -> Node:
        r"""A group, or one digit as in \frac12."""
        token = self.peek()
        if token is not None and token.isdigit() and len(token) > 1:
            self.tokens[self.at : self.at + 1] = [token[0], token[1:]]
        return self.group() if self.peek() == "{" else self.nested(self.atom)

    def root(self) -> Node:
        degree: Node = ("number", Fraction(2))
        if self.peek() == "[":
            degree = self.group()
        return ("^", self.argument(), ("/", degree))

    def function(self, name: str) -> Node:
        base = None
        if name == r"\log" and self.take("_"):
            base = self.argument()
        exponent = None
        if self.take("^"):
            exponent = self.argument()
        if self.peek() in ("(", "{", "["):
            inner = self.group()
        else:
            factors = [self.power()]
            while self.begins() and self.peek() not in FUNCTIONS and self.peek() != "(":
                factors.append(self.power())
            inner = _flat("*", factors)
        node: Node = (name, inner)
        if base is not None:
            node = ("*", (r"\ln", inner), ("/", (r"\ln", base)))
        return node if exponent is None else ("^", node, exponent)

    def subscript(self) -> str:
        if not self.take("_"):
            return ""
        if not self.take("{"):
            self.at += 1
            return "_" + "".join(self.tokens[self.at - 1 : self.at])
        start = self.at
        while self.peek() not in ("}", None):
            self.at += 1
        name = "_" + "".join(self.tokens[start : self.at])
        self.expect("}")
        return name

    def peek(self) -> str | None:
        return self.tokens[self.at] if self.at < len(self.tokens) else None

    def take(self, *symbols: str) -> str | None:
        token = self.peek()
        if token is None or token not in symbols:
            return None
        self.at += 1
        return token

    def expect(self, symbol: str) -> None:
        if not self.take(symbol):
            raise ParseError(f"missing {symbol}")


def _flat(kind: str, parts: list[Node]) -> Node:
    """Many operands side by side, so that the tree is no deeper than the text is nested."""
    return parts[0] if len(parts) == 1 else (kind, *parts)


def _number(token: str) -> Fraction:
    text = token.replace(",", "")
    return Fraction(text if text[0] != "." else "0" + text)
