"""Options that several commands have."""

import argparse
from typing import Any

from deltal_jax.errors import UserError


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


def moved_base(base: str | None) -> dict[str, Any]:
    """The overrides of a run's config that --base means."""
    return {} if base is None else {"model.path": base, "model.revision": None}
