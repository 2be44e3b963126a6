"""Look into a run: is it sound, its checkpoints, steps kept for replay, what its metrics mean."""

import argparse

from deltal_jax.cli import checkpoints, doctor, metrics, replay

COMMANDS = {
    "doctor": doctor,
    "checkpoints": checkpoints,
    "replay": replay,
    "metrics": metrics,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own commands."""
    commands = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").strip().split("\n")[0]
        module.add_arguments(commands.add_parser(name, help=summary, description=module.__doc__))


def run(arguments: argparse.Namespace) -> int:
    """Run one of them; the exit code."""
    return COMMANDS[arguments.what].run(arguments)
