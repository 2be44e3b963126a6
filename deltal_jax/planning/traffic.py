"""Bytes that one instruction of a compiled program moves from and to HBM."""

from collections.abc import Iterable

from deltal_jax.planning.hlo import Computation, Instruction, Module, Shape

#: What moves nothing from or to HBM by itself, or is counted where it began.
FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all "
    "partition-id replica-id opt-barrier iota add-dependency".split()
)
#: Other names and layouts of an array, inside a fusion.
VIEWS = ("bitcast", "reshape", "copy")
#: Calls of the compiler's own that move nothing.
NOTES = ("AllocateBuffer", "ConcatBitcast", "AssumeGather", "PrepareAsync", "AsyncCollective")


def hbm_bytes(module: Module, computation: Computation, own: Instruction) -> float:
    """What one instruction reads and writes, without what stays near; a slice, or an update in
    place, counts as its part."""
    noted = own.operation == "custom-call" and any(x in own.attributes for x in NOTES)
    if noted or own.operation in FREE or own.operation.endswith(("-done", "-update")):
        return 0.0
    instructions = computation.instructions
    operands = [instructions[name] for name in own.operands if name in instructions]
    if own.operation == "fusion" and own.calls:
        inner = module.computations[own.calls[0]]
        read = sum(
            _read(module, inner, number, shape)
            for number, operand in enumerate(operands)
            for shape in operand.shapes[:1]
            if not shape.near
        )
        return read + _written(inner, own)
    if own.operation == "slice-start":  # of a tuple: what it is of, and the slice
        far = [x for x in (operands[0].shapes[0], own.shapes[1]) if not x.near]
        return own.shapes[1].bytes * len(far)
    if own.operation in ("dynamic-slice", "slice", "gather"):
        return sum(2 * shape.bytes for shape in own.shapes if not shape.near)
    if own.operation in ("dynamic-update-slice", "scatter"):
        return 2 * sum(x.shapes[0].bytes for x in operands[1:2])
    results = own.shapes[:1] if own.operation.endswith("-start") else own.shapes
    arrays = [*results, *(x.shapes[0] for x in operands if x.shapes)]
    return sum(shape.bytes for shape in arrays if not shape.near)


def _read(module: Module, inner: Computation, number: int, shape: Shape) -> float:
    """Bytes that a fusion reads of its argument."""
    parameter = inner.parameter(number)
    if parameter is None:
        return shape.bytes
    return min(shape.bytes, sum(_used(module, inner, parameter.name)) or 0.0)


def _used(module: Module, inner: Computation, name: str) -> Iterable[float]:
    for user in inner.users(name):
        first = user.operands[0] == name
        if user.operation in VIEWS:
            yield from _used(module, inner, user.name)
        elif user.operation in ("dynamic-slice", "slice", "gather") and first:
            yield user.shapes[0].bytes
        elif user.operation == "tuple" or (user.operation == "dynamic-update-slice" and first):
            yield 0.0
        elif user.operation == "fusion" and user.calls:
            part = module.computations[user.calls[0]]
            for number, operand in enumerate(user.operands):
                parameter = part.parameter(number)
                if operand == name and parameter is not None and _behind(part) is parameter:
                    yield from _used(module, inner, user.name)  # the same by another name
                elif operand == name:
                    yield _read(module, part, number, inner.instructions[name].shapes[0])
        else:
            yield inner.instructions[name].shapes[0].bytes


def _behind(part: Computation) -> Instruction:
    """What a computation gives, without changes of its shape alone."""
    found = part.root
    while found.operation in VIEWS and found.operands:
        found = part.instructions[found.operands[0]]
    return found


def _written(inner: Computation, own: Instruction) -> float:
    """Bytes that a fusion writes."""
    root = inner.root
    parts = [inner.instructions[x] for x in root.operands] if root.operation == "tuple" else [root]
    total = 0.0
    for part, shape in zip(parts, own.shapes, strict=False):
        while part.operation in VIEWS and part.operands:
            part = inner.instructions[part.operands[0]]
        if part.operation == "dynamic-update-slice":
            total += inner.instructions[part.operands[1]].shapes[0].bytes
        elif not shape.near and part.operation != "parameter":
            total += shape.bytes
    return total
