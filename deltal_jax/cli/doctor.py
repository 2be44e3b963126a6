"""Examine a run rung by rung, from files to curves, and say where to begin."""

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltal_jax.cli.options import add_base, add_step, moved_base, parse_steps

if TYPE_CHECKING:
    from deltal_jax.guard.ladder import Figure, Rung

WORDS = {"n/a": "not applicable", "ok": "ok", "look": "look here", "failed": "FAILED"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder")
    add_step(parser)
    add_base(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")


def run(arguments: argparse.Namespace) -> int:
    """Examine; the exit code, which is 1 where a rung fails."""
    from deltal_jax.guard.doctor import examine
    from deltal_jax.guard.ladder import begin_with

    steps = parse_steps(arguments.step, several=False)
    rungs, trained = examine(arguments.run, moved_base(arguments.base), steps)
    worst = begin_with(rungs)
    position = None if trained is None else trained.position
    if arguments.json:
        found = {
            "run": str(arguments.run),
            "phase": position and position.phase,
            "step": position and position.step,
            "begin_with": worst and worst.name,
            "rungs": [_plain(rung) for rung in rungs],
        }
        print(json.dumps(found))
        return int(worst is not None)
    where = f", {position.phase} step {position.step}" if position else ""
    print(f"{arguments.run}{where}")
    for number, rung in enumerate(rungs, start=1):
        print("\n".join(_shown(number, rung)))
    print(f"\n{_conclusion(rungs, worst)}")
    return int(worst is not None)


def _shown(number: int, rung: "Rung") -> list[str]:
    """A rung in lines."""
    why = rung.reason or rung.asks
    lines = [f"\n{number}  {rung.name}: {WORDS[rung.verdict]}{f' ({why})' if why else ''}"]
    for figure in rung.figures:
        value = _number(figure.value)
        verdict = WORDS[figure.verdict]
        lines.append(f"   {figure.name:58} {value:>12}  {figure.bound:9} {verdict}".rstrip())
        if figure.remedy:
            lines.append(f"      → {figure.remedy}")
    return lines + [f"   {note}" for note in rung.notes]


def _number(value: float | str | None) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _conclusion(rungs: list["Rung"], worst: "Rung | None") -> str:
    if worst is not None:
        return f"begin with rung {rungs.index(worst) + 1}, {worst.name}: those after it stand on it"
    look = [rung.name for rung in rungs if rung.verdict == "look"]
    return f"nothing failed; worth a look: {', '.join(look)}" if look else "all is ok"


def _plain(rung: "Rung") -> dict[str, Any]:
    return {
        "name": rung.name,
        "asks": rung.asks,
        "verdict": rung.verdict,
        "reason": rung.reason,
        "figures": [_figure(figure) for figure in rung.figures],
        "notes": list(rung.notes),
    }


def _figure(figure: "Figure") -> dict[str, Any]:
    """Plain JSON; what is not finite is text."""
    value = figure.value
    if isinstance(value, float) and not math.isfinite(value):
        value = str(value)
    return vars(figure) | {"value": value}
