"""Checks of arguments whose values are at hand.

A Python number is static under jit, so a wrong one raises while the program is traced. An array may
be a tracer without a value, or on a device: numbers given as arrays are taken as they are.
"""

import math
import sys
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int


def check_number(
    name: str,
    value: Any,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    most: float = sys.float_info.max,
) -> None:
    """Raise ValueError unless `value` is a number > above, ≥ least and ≤ most, or an array."""
    if isinstance(value, jax.Array) or (isinstance(value, np.ndarray) and value.ndim):
        return
    if isinstance(value, np.ndarray):
        value = value.item()
    number = value.item() if isinstance(value, np.number) else value
    is_number = isinstance(number, int | float) and not isinstance(number, bool)
    # By comparison, since a huge int has no float; NaN fails them all.
    if is_number and above < number and least <= number <= most and number > -math.inf:
        return
    bounds = [f"above {above:g}"] if above > -math.inf else []
    bounds += [f"of at least {least:g}"] if least > -math.inf else []
    kind = "a number" if most == math.inf else "a finite number"
    raise ValueError(f"{name}: expected {' '.join([kind, *bounds])}, got {value!r}")


def at_hand(array: Any) -> bool:
    """Whether the values can be read here and now."""
    if isinstance(array, Tracer):
        return False
    return not isinstance(array, jax.Array) or array.is_fully_addressable


def check_ids(name: str, ids: Int[Array, " B"], count: int) -> None:
    """Raise ValueError for ids outside [0, count), which JAX would drop in silence.

    Nothing is checked where the values are not at hand: under jit, or on other processes' devices.
    """
    if not at_hand(ids) or np.size(ids) == 0:
        return
    low, high = int(np.min(np.asarray(ids))), int(np.max(np.asarray(ids)))
    if low < 0 or high >= count:
        raise ValueError(f"{name}: expected ids in [0, {count}), got {low} … {high}")
