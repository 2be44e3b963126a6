"""Exponents along the methods' own runs: the one that training measured, and the one it used."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from deltal_jax.compare.endpoints import Cell

#: Steps that are averaged, the last ones.
LAST = 10


def exponents(cells: Sequence[Cell]) -> dict[str, Any] | None:
    """β̂ and α of the cells of a method over the last steps: mean, and the range over runs; of α
    also its first value. None where neither was measured nor changed."""
    beta = [_last(cell, "variance/beta") for cell in cells]
    alpha = [_last(cell, "aggregation/alpha") for cell in cells]
    moved = any(len(set(cell["train"].get("aggregation/alpha", ()))) > 1 for cell in cells)
    measured = any(one is not None for one in beta)
    if not (measured or moved):
        return None
    found = {"beta": _spread(beta), "alpha": _spread(alpha)}
    if found["alpha"] is not None:
        firsts = [cell["train"]["aggregation/alpha"][0] for cell in cells]
        found["alpha"]["first"] = float(np.mean(firsts))
    return found


def _last(cell: Cell, key: str) -> float | None:
    """The mean of the last steps in which there is one."""
    known = [x for x in cell["train"].get(key, ())[-LAST:] if x is not None]
    return float(np.mean(known)) if known else None


def _spread(values: Sequence[float | None]) -> dict[str, float] | None:
    known = [x for x in values if x is not None]
    if not known:
        return None
    return {"mean": float(np.mean(known)), "least": min(known), "most": max(known)}
