"""What a compiled program does on one chip: FLOPs, bytes from and to HBM, collectives.

The compiler's own `cost_analysis()` counts the body of a loop once, however often it goes round,
and kernels as nothing. Here a body counts as often as its loop goes round: as the program says, or,
of a loop whose rounds depend on data, as the caller says. Kernels are counted by `arithmetic.py`.
"""

import dataclasses
import math
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from deltal_jax.planning.hlo import Computation, Instruction, Module, Shape
from deltal_jax.planning.roofline import sent_by_one
from deltal_jax.planning.traffic import hbm_bytes

KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of collective over the same axes with the same buffer."""

    kind: str
    axes: tuple[str, ...]
    members: int
    #: Of the largest buffer: what is gathered, or reduced.
    bytes: float
    dims: tuple[int, ...]
    #: Loops around it.
    depth: int
    #: How often it is done, loops counted.
    count: float

    @property
    def sent(self) -> float:
        """Bytes that a chip sends, all together."""
        return self.count * sent_by_one(self.kind, self.bytes, self.members)


@dataclasses.dataclass
class Count:
    """Sums over a program."""

    flops: float = 0.0
    hbm_bytes: float = 0.0
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    #: Kernels by their target, with how often they are called.
    kernels: dict[str, float] = dataclasses.field(default_factory=dict)
    #: Loops whose rounds depend on data.
    dynamic: int = 0
    #: Collectives that were seen: one that is spread over several fusions, to overlap with what
    #: they compute, stands in each of them.
    channels: set[str] = dataclasses.field(default_factory=set)

    def sent(self) -> dict[tuple[str, ...], float]:
        """Bytes that a chip sends, by the axes that they go over."""
        found: dict[tuple[str, ...], float] = {}
        for own in self.collectives:
            found[own.axes] = found.get(own.axes, 0.0) + own.sent
        return found


def count(module: Module, axes: dict[str, int], rounds: float = 1.0) -> Count:
    """Of a program on a mesh with these axes, in order; {}: one device. `rounds` is how often loops
    go round whose number depends on data."""
    total = Count()
    _visit(module, module.computations[module.entry], 1.0, 0, axes, rounds, total)
    merged: dict[Any, Collective] = {}
    for own in total.collectives:
        key = own.kind, own.axes, own.dims, own.bytes, own.depth
        before = merged[key].count if key in merged else 0.0
        merged[key] = dataclasses.replace(own, count=before + own.count)
    total.collectives = sorted(merged.values(), key=lambda own: -own.sent)
    return total


def _visit(
    module: Module,
    computation: Computation,
    times: float,
    depth: int,
    axes: dict[str, int],
    rounds: float,
    total: Count,
    fused: bool = False,
) -> None:
    for own in computation.instructions.values():
        kind = own.operation.removesuffix("-start")
        if own.operation == "while":
            trips = module.trips(computation, own)
            total.dynamic += trips is None
            inner = times * (rounds if trips is None else trips)
            for name in own.calls:
                part = module.computations[name]
                _visit(module, part, inner, depth + 1, axes, rounds, total)
            continue
        if own.operation in ("dot", "convolution"):
            total.flops += times * _flops(computation, own)
        elif kind in KINDS and not own.operation.endswith("-done"):
            channel = re.search(r"channel_id=(\d+)", own.attributes)
            if channel is None or channel[1] not in total.channels:
                total.collectives += _collectives(computation, own, kind, depth, times, axes)
            if channel is not None:
                total.channels.add(channel[1])
        elif own.operation == "custom-call":
            target = re.search(r'custom_call_target="([^"]*)"', own.attributes)
            name = target[1] if target else "?"
            total.kernels[name] = total.kernels.get(name, 0.0) + times
        if not fused:
            total.hbm_bytes += times * hbm_bytes(module, computation, own)
        if kind in ("fusion", "call", "async", "conditional", "custom-call"):
            inside = fused or kind == "fusion"
            for name in [*own.calls, *own.branches]:
                part = module.computations[name]
                _visit(module, part, times, depth, axes, rounds, total, inside)


def _shape(computation: Computation, name: str) -> Shape:
    return computation.instructions[name].shapes[0]


def _flops(computation: Computation, own: Instruction) -> float:
    """Twice the multiplications."""
    left, right = (_shape(computation, name) for name in own.operands[:2])
    if own.operation == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", own.attributes)
        dims = [int(x) for x in (contracted[1] if contracted else "").split(",") if x]
        return 2.0 * own.shapes[0].size * math.prod(left.dims[at] for at in dims)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", own.attributes)
    assert labels is not None, own.attributes
    lhs, rhs, out = labels.groups()
    features = right.dims[rhs.index("i")] * own.shapes[0].dims[out.index("f")]
    batch = own.shapes[0].dims[out.index("b")]
    window = _window(own.attributes)
    pairs = 1
    for axis in sorted(set(out) - {"b", "f"}):
        at = int(axis)
        pairs *= _pairs(
            left.dims[lhs.index(axis)],
            right.dims[rhs.index(axis)],
            own.shapes[0].dims[out.index(axis)],
            {name: values[at] for name, values in window.items()},
        )
    return 2.0 * batch * features * pairs


def _window(attributes: str) -> dict[str, list[int]]:
    """Of each spatial dimension: stride, low padding and dilations, where they are not the usual
    ones."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(part.split("=") for part in found[1].split() if "=" in part) if found else {}
    count = len(fields.get("size", "").split("x")) if "size" in fields else 0

    def values(name: str, usual: int) -> list[int]:
        text = fields.get(name)
        if text is None:
            return [usual] * count
        return [int(x.split("_")[0]) for x in text.split("x")]

    return {
        "stride": values("stride", 1),
        "pad": values("pad", 0),
        "lhs_dilate": values("lhs_dilate", 1),
        "rhs_dilate": values("rhs_dilate", 1),
    }


def _pairs(size: int, kernel: int, out: int, window: dict[str, int]) -> int:
    """How many places of the kernel fall on a number of the input, over all outputs."""
    at = np.arange(out)[:, None] * window["stride"] - window["pad"]
    at = at + np.arange(kernel)[None, :] * window["rhs_dilate"]
    dilated = window["lhs_dilate"]
    inside = (at >= 0) & (at <= (size - 1) * dilated) & (at % dilated == 0)
    return int(inside.sum())


def _collectives(
    computation: Computation,
    own: Instruction,
    kind: str,
    depth: int,
    times: float,
    axes: dict[str, int],
) -> list[Collective]:
    """One for each array that it takes: several may be combined."""
    groups = replica_groups(own.attributes)
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", own.attributes)
        numbers = [int(x) for x in re.findall(r"\d+", pairs[1])] if pairs else []
        groups = np.asarray(numbers or [0, 0]).reshape(-1, 2)
    if groups is None:
        groups = np.arange(math.prod(axes.values()))[None]
    over, members = axes_of(groups, axes), groups.shape[1]
    operands = [_shape(computation, name) for name in own.operands]
    found = []
    for operand in operands:
        factor = members if kind == "all-gather" else 1
        size = operand.bytes * factor
        dims = operand.dims
        if kind == "all-gather":
            whole = [x for x in own.shapes if x.size == operand.size * members]
            dims = whole[0].dims if whole else dims
        found.append(Collective(kind, over, members, size, dims, depth, times))
    return found


def replica_groups(attributes: str) -> np.ndarray | None:
    """Numbers of the devices of each group, Int[groups members]; None: all in one."""
    listed = re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", attributes)
    if listed:
        rows = re.findall(r"\{([\d, ]*)\}", listed[1])
        return np.asarray([[int(x) for x in row.split(",")] for row in rows])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] ?(.*?)\{([^}]*)\}", attributes):
        return _named_groups(*named.groups())
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes)
    if iota is None:
        return None
    count = int(iota[1].split(",")[0])
    return _numbers(iota[2]).reshape(count, -1)


def _numbers(text: str) -> np.ndarray:
    """`[2,4]T(1,0)`: 0, 1, … in this shape, transposed."""
    dims, order = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()  # type: ignore
    dims = [int(x) for x in dims.split(",")]
    numbers = np.arange(math.prod(dims)).reshape(dims)
    return numbers.transpose([int(x) for x in order.split(",")]) if order else numbers


def _named_groups(sizes: str, devices: str, chosen: str) -> np.ndarray:
    """`mesh['a'=2,'b'=4] {'b'}`: groups along some axes of a mesh of the compiler's own, or along
    parts of them, `'b':(2)2`: what has 2 before it and the size 2. `devices` gives another order
    than 0, 1, …"""
    axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
    numbers = np.arange(math.prod(axes.values()))
    order = re.search(r"device_ids=\(?(?:\[[\d,]+\]<=)?(\[[\d,]+\](?:T\([\d,]+\))?)", devices)
    if order:
        numbers = _numbers(order[1]).reshape(-1)
    elif listed := re.search(r"device_ids=\(?([\d,]+)\)?", devices):
        numbers = np.asarray([int(x) for x in listed[1].split(",")])
    shape: list[int] = []
    picked: list[int] = []
    parts = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen)
    for name, size in axes.items():
        own = sorted(
            (int(before), int(span)) for axis, before, span in parts if axis == name and span
        )
        whole = any(axis == name and not span for axis, _, span in parts)
        done = 1
        for before, span in own:
            shape += [before // done, span]
            picked.append(len(shape) - 1)
            done = before * span
        shape.append(size // done)
        if whole:
            picked.append(len(shape) - 1)
    numbers = numbers.reshape(shape)
    rest = [at for at in range(len(shape)) if at not in picked]
    members = math.prod(shape[at] for at in picked)
    return numbers.transpose([*rest, *picked]).reshape(-1, members)


def axes_of(groups: np.ndarray, axes: dict[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ; devices are numbered in the order of
    the mesh, the last axis first."""
    if not axes:
        return ()
    places = np.unravel_index(groups, tuple(axes.values()))
    varied = [bool((place != place[:, :1]).any()) for place in places]
    return tuple(name for name, differs in zip(axes, varied, strict=True) if differs)


def gathered_stacks(
    found: Count, stacks: Iterable[tuple[int, ...]], layers: int
) -> list[Collective]:
    """All-gathers of a whole stack of parameters, outside of every loop over its layers. `stacks`
    are the dimensions of the stacked parameters."""
    sizes = {math.prod(dims) for dims in stacks if len(dims) > 2}
    return [
        own
        for own in found.collectives
        if own.kind == "all-gather"
        and own.depth == 0
        and (math.prod(own.dims) in sizes or (len(own.dims) > 2 and own.dims[0] == layers))
    ]
