"""The text of a compiled program, as instructions of named computations.

Only what counting needs is read: operation, shapes of results, operands, called computations, and
the attributes as text.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

#: Bytes of an element by type; others (tokens, opaque) have none.
SIZES = {"pred": 1, "s4": 0.5, "u4": 0.5} | {
    f"{kind}{bits}": bits // 8
    for kind, widths in (("s", (8, 16, 32, 64)), ("u", (8, 16, 32, 64)), ("f", (16, 32, 64)))
    for bits in widths
}
SIZES |= {"bf16": 2, "c64": 8, "c128": 16, "f8e4m3fn": 1, "f8e5m2": 1, "f8e4m3": 1}

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-~]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-~]+) = (.*)$")
_SHAPE = re.compile(r"([a-z]+\d*(?:e\dm\d\w*)?)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-~]+)")
_CALLS = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-~]+)")
_BRANCHES = re.compile(
    r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-~]+))"
)
_LOOP = re.compile(r"(body|condition)=%?([\w.\-~]+)")
_KNOWN = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array; `near`: in memory on the chip that is not HBM."""

    kind: str
    dims: tuple[int, ...]
    near: bool

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """Without padding of the layout."""
        return self.size * SIZES.get(self.kind, 0)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line."""

    name: str
    operation: str
    #: Of the result; several of a tuple, in order, nested ones flattened.
    shapes: tuple[Shape, ...]
    #: Of a parameter its number, of a constant its value.
    operands: tuple[str, ...]
    #: All that follows the operands.
    attributes: str
    root: bool

    @property
    def calls(self) -> list[str]:
        """Computations that it names, but for those of a `conditional`."""
        return _CALLS.findall(self.attributes)

    @property
    def branches(self) -> list[str]:
        """Computations of a `conditional`."""
        found = _BRANCHES.findall(self.attributes)
        return [name for several, one in found for name in [*_NAME.findall(several), one] if name]

    @property
    def number(self) -> int | None:
        """Of a constant, where it is one whole number."""
        text = self.operands[0] if self.operation == "constant" and self.operands else ""
        return int(text) if re.fullmatch(r"-?\d+", text) else None

    @property
    def index(self) -> int:
        """Of a `get-tuple-element`."""
        found = re.search(r"index=(\d+)", self.attributes)
        return int(found[1]) if found else 0


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in order."""

    name: str
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        """What it gives."""
        return next(x for x in self.instructions.values() if x.root)

    def parameter(self, number: int) -> Instruction | None:
        """Its argument of this number."""
        return next(
            (
                x
                for x in self.instructions.values()
                if x.operation == "parameter" and x.operands == (str(number),)
            ),
            None,
        )

    def users(self, name: str) -> Iterator[Instruction]:
        """Instructions that read what this one gives."""
        return (x for x in self.instructions.values() if name in x.operands)


@dataclasses.dataclass(frozen=True)
class Module:
    """A program."""

    entry: str
    computations: dict[str, Computation]

    def trips(self, around: Computation, own: Instruction) -> int | None:
        """How often a `while` goes round: as the compiler says, or by its counter, which begins at
        a constant, grows by one and is compared with another. None: that depends on data."""
        if known := _KNOWN.search(own.attributes):
            return int(known[1])
        parts = {kind: self.computations[name] for kind, name in _LOOP.findall(own.attributes)}
        condition, body = parts["condition"], parts["body"]
        start = around.instructions.get(own.operands[0])

        def begins(at: int) -> int | None:
            if start is None or start.operation != "tuple":
                return None
            return _constant(around, start.operands[at])

        def grows(at: int) -> int:
            if body.root.operation != "tuple":
                return 1
            added = body.instructions[body.root.operands[at]]
            steps = [_constant(body, name) for name in added.operands]
            found = [step for step in steps if step is not None]
            return found[0] if added.operation == "add" and found and found[0] > 0 else 1

        test = condition.root
        if test.operation != "compare" or "direction=LT" not in test.attributes:
            return None
        left, right = (condition.instructions[name] for name in test.operands)
        if left.operation != "get-tuple-element":
            return None
        limit = right.number
        if right.operation == "get-tuple-element":
            kept = body.root.operands[right.index] if body.root.operation == "tuple" else ""
            same = body.instructions.get(kept)
            if same is not None and same.operation == "get-tuple-element":
                limit = begins(right.index)
        if limit is None:
            return None
        return max(0, math.ceil((limit - (begins(left.index) or 0)) / grows(left.index)))


def _constant(around: Computation, name: str) -> int | None:
    """The number behind copies."""
    own = around.instructions.get(name)
    while own is not None and own.operation in ("copy", "convert", "bitcast"):
        own = around.instructions.get(own.operands[0])
    return None if own is None else own.number


def parse(text: str) -> Module:
    """The computations of `compiled.as_text()`. Raises ValueError where there is no entry."""
    entry, name, found = None, "", {}
    lines: dict[str, Instruction] = {}
    for line in text.splitlines():
        if line.startswith((" ", "\t")):
            instruction = _instruction(line)
            if instruction is not None:
                lines[instruction.name] = instruction
        elif head := _HEAD.match(line):
            lines, name = {}, head[2]
            found[name] = Computation(name, lines)
            entry = name if head[1] else entry
    if entry is None:
        raise ValueError("no ENTRY computation in the text of a program")
    return Module(entry, found)


def _instruction(line: str) -> Instruction | None:
    match = _LINE.match(line)
    if match is None:
        return None
    root, name, rest = match.groups()
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    kinds, rest = rest[:end], rest[end:].lstrip()
    opening = rest.find("(")
    if opening < 0:
        return None
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    operation = rest[:opening]
    literal = operation in ("parameter", "constant")
    operands = (inside,) if literal else tuple(_NAME.findall(inside))
    return Instruction(name, operation, shapes_of(kinds), operands, rest[closing + 1 :], bool(root))


def shapes_of(text: str) -> tuple[Shape, ...]:
    """The arrays of a type."""
    return tuple(
        Shape(
            kind,
            tuple(int(x.lstrip("<=")) for x in dims.split(",") if x),
            bool(re.search(r"S\([1-9]", layout)),
        )
        for kind, dims, layout in _SHAPE.findall(text)
    )


def _closing(text: str, opening: int) -> int:
    """Where the parenthesis that opens there closes; the end where none does."""
    depth = 0
    for at in range(opening, len(text)):
        if text[at] == "(":
            depth += 1
        elif text[at] == ")":
            depth -= 1
            if depth == 0:
                return at
    return len(text)
