"""Which methods weigh a batch alike: the cosine of their coefficients, not of their gradients.

An update is Σ_i w_i A_i g_i over the responses of a batch, g_i = Σ_t ∇ log π(o_it): methods whose
vectors (w_i A_i) are parallel take steps in one direction, and then differ only through clipping,
Adam's eps, and how batches of other lengths weigh in its moments.
"""

import itertools
import math
from typing import Any

import numpy as np

from deltal_jax.compare.pairs import Cells

#: From this cosine on, two methods share a direction.
SAME = 0.9999
#: What is left where they do.
SAME_BUT = "differ through clipping, Adam's eps and how batches weigh"


def directions(methods: dict[str, Cells]) -> dict[str, Any]:
    """The mean coefficient cosine of each two methods, and the groups that share a direction.

        cos(a, b) = mean over seeds of ⟨c_a, c_b⟩ / (‖c_a‖ ‖c_b‖),   c_i = w_i A_i

    of the first batch, whose responses are the same for all methods of a seed; seeds where they are
    not, or where no response has an advantage, are left out, and None is of no seed. A group is
    what cosines of at least 0.9999 connect; a method whose exponent moves on the way is in none.
    """
    pairs = [
        {"methods": [a, b], "cosine": _cosine(methods[a], methods[b])}
        for a, b in itertools.combinations(methods, 2)
    ]
    groups = {name: {name} for name in methods}
    for pair in pairs:
        a, b = pair["methods"]
        if _moves(methods[a]) or _moves(methods[b]):
            continue
        if pair["cosine"] is not None and pair["cosine"] >= SAME:
            joined = groups[a] | groups[b]
            groups |= dict.fromkeys(joined, joined)
    shared = [sorted(groups[name]) for name in methods if len(groups[name]) > 1]
    return {"coefficient_cosines": pairs, "groups": sorted({tuple(one) for one in shared})}


def share_direction(found: dict[str, Any], a: str, b: str) -> bool:
    """Whether two methods are in one group of what `directions` found."""
    return any(a in group and b in group for group in found["groups"])


def _moves(cells: Cells) -> bool:
    """Whether a method's exponent is another one in later steps."""
    return any(len(set(cell["train"].get("aggregation/alpha", ()))) > 1 for cell in cells.values())


def _cosine(ours: Cells, theirs: Cells) -> float | None:
    found = []
    for seed in sorted(set(ours) & set(theirs)):
        a, b = ours[seed]["first_batch"], theirs[seed]["first_batch"]
        if a["lengths"] == b["lengths"]:
            x, y = (np.array(one["weights"]) * np.array(one["advantages"]) for one in (a, b))
            scale = math.sqrt(float(x @ x) * float(y @ y))
            found += [float(x @ y) / scale] if scale > 0 else []
    return float(np.mean(found)) if found else None
