"""Compare methods: every one with the same seeds, cell by cell, and what that shows."""

import argparse
import json
import shlex
from pathlib import Path

from deltal_jax.cli.options import split_items
from deltal_jax.errors import UserError
from deltal_jax.guard import signals


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "items",
        nargs="*",
        metavar="PLAN|key.sub=value",
        help="a plan's file or the name of one of the package, then any field to set for all cells",
    )
    parser.add_argument(
        "--to",
        metavar="FOLDER",
        help="where cells and findings go, and where they are found again; default: runs/NAME",
    )
    parser.add_argument("--cells", type=int, metavar="N", help="stop after so many new cells")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the cells, run nothing"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")


def run(arguments: argparse.Namespace) -> int:
    """Run the cells that are missing; the exit code."""
    names, overrides = split_items(arguments.items)
    if len(names) != 1:
        raise UserError("plan: name one, such as compare-tiny; see `deltal configs`")
    if arguments.cells is not None and arguments.cells < 0:
        raise UserError(f"--cells: must be at least 0, got {arguments.cells}")
    with signals.listening(at_once=True):
        from deltal_jax.compare.findings import write_findings
        from deltal_jax.compare.plan import load_plan
        from deltal_jax.compare.runner import Comparison
        from deltal_jax.progress import ProgressDisplay
        from deltal_jax.training.run_folder import RUNS

        plan = load_plan(names[0], overrides)
        folder = Path(arguments.to or f"{RUNS}/{plan.name}")
        display = ProgressDisplay(quiet=arguments.json)
        comparison = Comparison(plan, folder, display, _command(arguments, folder))
        if arguments.dry_run:
            facts = comparison.describe()
            print(json.dumps(facts) if arguments.json else _described(facts))
            return 0
        progress = comparison.run(arguments.cells)
    if arguments.json:
        facts = {"folder": str(folder), "cells": progress.cells, "done": progress.done}
        print(json.dumps(facts | {"elsewhere": progress.elsewhere}))
    if progress.done:
        found = write_findings(folder)
        if not arguments.json:
            print(found)
    return 0


def _command(arguments: argparse.Namespace, folder: Path) -> str:
    given = ["deltal", "compare", *arguments.items, "--to", str(folder)]
    return shlex.join(given)


def _described(facts: dict) -> str:
    lines = []
    for method in facts["methods"]:
        fields = (
            ", ".join(f"{k}={json.dumps(v)}" for k, v in method["set"].items())
            or "as the experiment"
        )
        mark = " (control)" if method["control"] else ""
        lines.append(f"{method['name']}{mark}: {fields}")
        if method["weights"]:
            lines.append(f"    weights {method['weights']}")
        if method["expect"]:
            lines.append(f"    expect {method['expect']}")
        done = f", {method['done']} done" if method["done"] else ""
        lines.append(f"    seeds {', '.join(map(str, method['seeds']))}{done}")
    lines.append("")
    for key, value in facts["sizes"].items():
        lines.append(f"{key.replace('_', ' '):44}{value:>12,}")
    return "\n".join(lines)
