"""Say what a metric means: one line each, of those that a run may write."""

import argparse
import dataclasses
import difflib
import json

from deltal_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "name",
        nargs="?",
        default="",
        metavar="NAME",
        help="a metric, or a part of its name; default: all",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON list, nothing else")


def run(arguments: argparse.Namespace) -> int:
    """Print the lines; the exit code."""
    from deltal_jax.analysis.guide import load_guide, matching

    found = matching(arguments.name)
    if not found:
        near = difflib.get_close_matches(
            arguments.name, [entry.name for entry in load_guide()], n=1, cutoff=0.5
        )
        hint = f"did you mean {near[0]!r}?" if near else "`deltal debug metrics` prints all"
        raise UserError(f"NAME: no metric has {arguments.name!r} in its name; {hint}")
    if arguments.json:
        print(json.dumps([dataclasses.asdict(entry) for entry in found]))
    else:
        print("\n".join(entry.line for entry in found))
    return 0
