"""Options that several commands have."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from deltal_jax.config import parse_overrides
from deltal_jax.errors import UserError

if TYPE_CHECKING:
    from deltal_jax.training.trained import Steps


def add_config(parser: argparse.ArgumentParser) -> None:
    """The experiment, and fields over it: see `split_items`."""
    parser.add_argument(
        "items",
        nargs="*",
        metavar="CONFIG|key.sub=value",
        help="a YAML file or the name of a config of the package, then any field to set",
    )


def split_items(items: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The names among them, and the fields that the others set."""
    names = [item for item in items if "=" not in item]
    return names, parse_overrides([item for item in items if "=" in item])


def check_seed(seed: int) -> None:
    """Raises UserError for a --seed that a random key does not take."""
    if not 0 <= seed < 2**31:
        raise UserError(f"--seed: must be in 0 … 2147483647, got {seed}")


def add_base(parser: argparse.ArgumentParser) -> None:
    """--base, for runs whose adapters need the model that they were trained beside."""
    parser.add_argument(
        "--base",
        metavar="FOLDER",
        help="of a run with adapters: where the model beside them is now",
    )


def add_step(parser: argparse.ArgumentParser) -> None:
    """--step, for one checkpoint of a run."""
    parser.add_argument(
        "--step",
        metavar="N|best",
        help="the checkpoint after this RL step of the run, or the best by its own evaluations; "
        "default: the newest",
    )


def parse_steps(text: str | None, *, several: bool = True) -> "Steps":
    """The steps that --step means. Raises UserError for what are none, or not one."""
    if text is None or text == "best" or (text == "all" and several):
        return text
    steps = [int(part) if part.isascii() and part.isdigit() else -1 for part in text.split(",")]
    if min(steps) < 0 or len(set(steps)) < len(steps) or (len(steps) > 1 and not several):
        wanted = "neither all, best nor RL steps such as 50,100"
        raise UserError(
            f"--step: {text!r} is {wanted if several else 'neither best nor an RL step'}"
        )
    return steps


def moved_base(base: str | None) -> dict[str, Any]:
    """The overrides of a run's config that --base means."""
    return {} if base is None else {"model.path": base, "model.revision": None}
