"""List the checkpoints of a run."""

import argparse
import contextlib
import dataclasses
import json
from pathlib import Path

from deltal_jax.training import run_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")


def run(arguments: argparse.Namespace) -> int:
    """List them; the exit code."""
    from deltal_jax.training.checkpoint import Checkpoints

    run_folder.load_run_config(arguments.run)
    with contextlib.closing(Checkpoints(arguments.run / run_folder.CHECKPOINTS)) as found:
        positions = {number: found.read_position(number) for number in found.all()}
    if arguments.json:
        print(json.dumps({n: dataclasses.asdict(position) for n, position in positions.items()}))
        return 0
    for number, position in positions.items():
        print(f"{number:>8}  after step {position.step} of {position.phase}")
    return 0
