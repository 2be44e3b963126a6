"""A plan as text, and plans as one table of Markdown."""

from collections.abc import Iterable
from typing import Any

GIB = 2**30


def show(plan: dict[str, Any]) -> str:
    """For people, of one plan."""
    by = "the compiler" if plan["by"] == "compiler" else "arithmetic alone: an estimate"
    lines = [
        f"{plan['topology']}, {plan['chips']} chips of {_gib(plan['hbm'])} GiB; by {by}",
        f"{plan['model'] or 'new model'}: {plan['parameters']:,} parameters",
        f"training on {plan['mesh']}; sampling on {plan['sampling_mesh']}",
        "",
    ]
    if plan["by"] == "compiler":
        lines += [*_programs(plan["programs"]), "", *_held(plan["programs"]), ""]
        lines += [*_collectives(plan["programs"]), ""]
    else:
        lines += [f"{name:24}{_gib(size):>9} GiB" for name, size in plan["memory"].items()]
        lines.append("")
    if "update" in plan:
        lines += [*_bounds(plan), ""]
    if own := plan.get("full_microbatch"):
        shape = " × ".join(map(str, own["shape"]))
        lines += [
            f"full micro-batch {shape}: products alone take {own['seconds_bound']:.3g} s; MFU at "
            f"most {own['mfu_bound']:.0%}",
            f"useful products of a step's updates: {plan['seconds_useful']:.3g} s",
            "",
        ]
    for own in plan.get("stacks_outside_scan", ()):
        dims = "×".join(map(str, own["dims"]))
        lines.append(f"warning: a whole stack of parameters, {dims}, is gathered outside the scan")
    lines.append(verdict(plan))
    return "\n".join([*lines, *(f"  {way}" for way in plan["ways_out"])])


def verdict(plan: dict[str, Any]) -> str:
    """Whether it fits, in one line."""
    needed, hbm = _gib(plan["needed"]), _gib(plan["hbm"])
    if plan["fits"]:
        return (
            f"fits: {needed} of {hbm} GiB a chip in {plan['worst']}, {plan['spare']:.0%} to spare"
        )
    return f"does not fit: {plan['worst']} needs {needed} GiB a chip, and there are {hbm}; try"


def _programs(programs: Iterable[dict[str, Any]]) -> list[str]:
    lines = [
        f"{'GiB a chip':24}{'kept':>8}{'args':>8}{'outputs':>8}{'aliased':>8}{'temps':>8}"
        f"{'all':>8}{'spare':>7}{'compile':>9}"
    ]
    for own in programs:
        memory, name = own["memory"], _name(own)
        if own["refused"]:
            shown = f"{_gib(own['beside']):>8}   refused by the compiler".ljust(40)
        else:
            parts = ("arguments", "outputs", "aliased", "temporaries")
            shown = f"{_gib(own['beside']):>8}" + "".join(f"{_gib(memory[x]):>8}" for x in parts)
        tail = f"{_gib(own['needed']):>8}{own['spare']:>7.0%}{own['cpu_seconds']:>7.0f} s"
        lines.append(f"{name:24}{shown}{tail}")
    return lines


def _held(programs: list[dict[str, Any]]) -> list[str]:
    """Parts that live longer than a program."""
    parts: dict[str, int] = {}
    for own in programs:
        for name, size in own["held"].items():
            parts[name] = max(parts.get(name, 0), size)
    return [f"{name:24}{_gib(size):>8} GiB a chip" for name, size in parts.items() if size]


def _collectives(programs: Iterable[dict[str, Any]]) -> list[str]:
    """Bytes that a chip sends in each program, by kind and axes; FLOPs and bytes of HBM."""
    lines = [f"{'a chip':24}{'TFLOP':>9}{'HBM GB':>9}  GB sent: kind over axes"]
    for own in programs:
        if own["refused"]:
            continue
        sums: dict[str, float] = {}
        for one in own["collectives"]:
            key = f"{one['kind']} over {'+'.join(one['axes']) or 'one'}"
            sums[key] = sums.get(key, 0.0) + one["sent"]
        sent = ", ".join(f"{key} {size / 1e9:.3g}" for key, size in sums.items() if size > 1e5)
        counts = f"{own['flops'] / 1e12:>9.3g}{own['hbm_bytes'] / 1e9:>9.3g}"
        lines.append(f"{_name(own):24}{counts}  {sent or 'none'}")
    return lines


def _bounds(plan: dict[str, Any]) -> list[str]:
    own, step = plan["update"], plan["step"]
    shape = " × ".join(map(str, own["shape"]))
    lines = [
        f"full micro-batch {shape}: at least {own['seconds_bound']:.3g} s, limited by "
        f"{own['limited_by']}; MFU at most {own['mfu_bound']:.0%} (nothing overlapped: "
        f"{own['mfu_in_turn']:.0%})",
        f"step of {step['responses']} responses, mean {step['mean']:.0f} and p95 {step['p95']:.0f} "
        f"tokens: at least {step['seconds']:.3g} s, of which "
        + ", ".join(
            f"{name.removeprefix('seconds_')} {step[name]:.3g}"
            for name in step
            if name.startswith("seconds_") and name != "seconds_a_token"
        ),
        f"  MFU of the updates at most {step['mfu_update']:.0%}, of the step {step['mfu']:.0%}; "
        f"padding {step['padding']:.0%}",
    ]
    return lines


COLUMNS = (
    "experiment",
    "slice",
    "mesh",
    "GiB a chip (of)",
    "spare",
    "worst program",
    "largest micro-batch",
    "update MFU ≤",
    "limited by",
    "step ≥",
    "rollout / update",
    "slowest compile (CPU)",
)


def markdown(rows: Iterable[tuple[str, dict[str, Any]]]) -> str:
    """One row a plan: (name, plan)."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    for name, plan in rows:
        lines.append("| " + " | ".join(_cells(name, plan)) + " |")
    return "\n".join(lines) + "\n"


def _cells(name: str, plan: dict[str, Any]) -> list[str]:
    memory = f"{_gib(plan['needed'])} ({_gib(plan['hbm'])})"
    slowest = max((own["cpu_seconds"] for own in plan["programs"]), default=0.0)
    head = [name, plan["topology"], plan["mesh"].split(":")[0], memory]
    spare = f"{plan['spare']:.0%}" if plan["fits"] else "**does not fit**"
    head += [spare, plan["worst"]]
    if "update" not in plan:
        return [*head, "", "", "", "", "", f"{slowest:.0f} s"]
    own, step = plan["update"], plan["step"]
    sampling = step.get("seconds_decode", 0.0) + step.get("seconds_prefill", 0.0)
    return [
        *head,
        " × ".join(map(str, own["shape"])),
        f"{own['mfu_bound']:.0%}",
        own["limited_by"],
        f"{step['seconds']:.0f} s",
        f"{sampling:.0f} / {step['seconds'] - sampling:.0f} s",
        f"{slowest:.0f} s",
    ]


def _name(own: dict[str, Any]) -> str:
    rows, width = own["shape"]
    return f"{own['name']} {rows} × {width}" if rows else own["name"]


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"
