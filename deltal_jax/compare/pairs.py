"""Two methods compared seed by seed, and a verdict in fixed words.

A family is the methods that are compared with one reference: Holm's correction is over all of it,
also over those that have no cell yet, so that a verdict cannot come from leaving some out.
"""

from typing import Any

import numpy as np

from deltal_jax.analysis.paired import (
    crossed_intervals,
    detectable_effect,
    holm,
    sign_flip_test,
    smallest_p,
)
from deltal_jax.compare.endpoints import ENDPOINTS, PRIMARY, Cell, Spans, endpoints

#: Level of the tests, after correction, and the power at which a difference counts as detectable.
ALPHA, POWER = 0.05, 0.8
Cells = dict[int, Cell]  # of one method, by seed


def compare(ours: Cells, theirs: Cells, spans: Spans) -> dict[str, Any]:
    """The paired differences ours − theirs of all endpoints over the seeds that both have.

    `mismatched`: seeds whose two runs do not start from the same checkpoint with the same
    responses, so that the pair shares less than it should.
    """
    seeds = sorted(set(ours) & set(theirs))
    found: dict[str, Any] = {
        "pairs": len(seeds),
        "seeds": seeds,
        "mismatched": [s for s in seeds if not _starts_alike(ours[s], theirs[s])],
        "smallest_p": smallest_p(len(seeds)) if seeds else 1.0,
    }
    if not seeds:
        return found | {"endpoints": {}}
    left, right = (endpoints([cells[s] for s in seeds], spans) for cells in (ours, theirs))
    differences = np.stack([left[name] - right[name] for name in ENDPOINTS])
    intervals = crossed_intervals(differences)
    found["endpoints"] = {
        name: {
            "ours": float(left[name].mean()),
            "theirs": float(right[name].mean()),
            "difference": float(values.mean()),
            "low": float(low),
            "high": float(high),
            "deviation": float(values.mean(axis=1).std(ddof=1)) if len(seeds) > 1 else None,
            "p": sign_flip_test(values.mean(axis=1)),
        }
        for name, values, (low, high) in zip(ENDPOINTS, differences, intervals, strict=True)
    }
    return found


def _starts_alike(ours: Cell, theirs: Cell) -> bool:
    return (
        ours["warmup"] == theirs["warmup"]
        and ours["first_batch"]["lengths"] == theirs["first_batch"]["lengths"]
    )


def judge(family: dict[str, dict[str, Any]]) -> None:
    """Add to the comparisons of a family the adjusted p-values, what can be detected, and the
    verdict on the primary endpoint: "better", "worse", "no difference shown" or "no pair yet".

    `detectable` assumes normal differences that vary as those seen; None where no difference can
    be detected at Holm's first step. `reachable`: whether any outcome of so many pairs would be
    significant. `pairs_needed`: from how many pairs on it would, whatever the others show.
    """
    level = ALPHA / max(len(family), 1)
    for name in ENDPOINTS:
        known = [one["endpoints"].get(name) for one in family.values()]
        adjusted = holm([1.0 if one is None else one["p"] for one in known])
        for one, p in zip(known, adjusted, strict=True):
            if one is not None:
                one["p_holm"] = p
    least = holm([one["smallest_p"] for one in family.values()])
    for one, p in zip(family.values(), least, strict=True):
        one["smallest_p_holm"], one["reachable"] = p, p < ALPHA
        one["pairs_needed"] = next((n for n in range(1, 15) if smallest_p(n) < level), None)
        one["detectable"] = _detectable(one, level)
        one["verdict"] = _verdict(one)


def _detectable(one: dict[str, Any], level: float) -> float | None:
    if one["pairs"] < 2 or smallest_p(one["pairs"]) >= level:
        return None
    effect = detectable_effect(one["pairs"], level, POWER)
    return effect * one["endpoints"][PRIMARY]["deviation"]


def _verdict(one: dict[str, Any]) -> str:
    if not one["pairs"]:
        return "no pair yet"
    primary = one["endpoints"][PRIMARY]
    if primary["p_holm"] < ALPHA:
        return "better" if primary["difference"] > 0 else "worse"
    return "no difference shown"
