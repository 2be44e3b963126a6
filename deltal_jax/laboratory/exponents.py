"""Does it pay to give each layer, or each matrix, an exponent of its own? Measured on other groups
than the exponents were fitted on."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from deltal_jax.laboratory.aggregations import (
    REFERENCE,
    UNWEIGHTED,
    Pairs,
    Pool,
    batch_weights,
    draw_batches,
    figures,
)
from deltal_jax.laboratory.gradients import OUTSIDE, Block
from deltal_jax.laboratory.moments import fit_power, length_bins
from deltal_jax.objective.aggregation import constant_length, delta_l

#: Fitted exponents are kept in this range: β of one small matrix may be anything.
EXPONENTS = (0.0, 2.0)
#: What the gain is against: one exponent, fitted too.
ONE = "one β"
#: Figures with an interval.
NAMES = ("relative_variance", "cv", "bias_cosine", "true_cosine", "gain")


def compare_exponents(
    grams: Mapping[Block, np.ndarray], pool: Pool, size: int, bins: int
) -> dict[str, Any] | None:
    """ΔL with one exponent and with one for each part, cross-fitted: β from one half of the groups,
    figures from batches of the other half, and the mean of both ways. `size` groups a batch, or a
    quarter of the pool if that is fewer. None where a half is too small for either.

    `gain` is the true cosine over that of one fitted exponent.
    """
    size = min(size, pool.groups // 4)
    if size < 1 or pool.groups < 8:
        return None
    halves = np.array_split(np.arange(pool.groups // 2 * 2), 2)
    found = []
    for own, other in (halves, halves[::-1]):
        fitted = _fit(*_part(grams, pool, own), bins)
        if fitted is None:
            return None
        found.append(_apply(*_part(grams, pool, other), size, fitted))
    rows = []
    for name in found[0]:
        first, second = (half[name] for half in found)
        rows.append({"name": name} | _mean_of(first, second))
    return {"batch_groups": size, "held_out_groups": len(halves[0]), "rows": rows}


def _part(
    grams: Mapping[Block, np.ndarray], pool: Pool, groups: np.ndarray
) -> tuple[dict[Block, np.ndarray], Pool]:
    rows = (groups[:, None] * pool.samples + np.arange(pool.samples)).reshape(-1)
    part = Pool(pool.lengths[rows], pool.advantages[rows], pool.kept[rows], len(groups))
    return {block: gram[np.ix_(rows, rows)] for block, gram in grams.items()}, part


def _fit(
    grams: Mapping[Block, np.ndarray], pool: Pool, bins: int
) -> dict[str, dict[Block, float]] | None:
    """The exponent of each block, by what is allowed to have one of its own."""

    def beta(gram: np.ndarray) -> float | None:
        kept = np.flatnonzero(pool.kept)
        if not kept.size:
            return None
        ids = np.unique(kept // pool.samples, return_inverse=True)[1]
        lengths = pool.lengths[kept]
        part = gram[np.ix_(kept, kept)]
        power = fit_power(part, lengths, ids, length_bins(lengths, bins), resamples=0)
        return None if power is None else float(np.clip(power.beta, *EXPONENTS))

    one = beta(np.sum(list(grams.values()), axis=0))
    if one is None:
        return None

    def own(blocks: list[Block]) -> float:
        found = beta(np.sum([grams[block] for block in blocks], axis=0))
        return one if found is None else found

    def shared(part: int) -> dict[Block, float]:
        """One for each layer (part 0) or kind (1); blocks outside of layers have their own."""
        names = {block: block[part] if block[0] != OUTSIDE else block for block in grams}
        of = {n: own([b for b in grams if names[b] == n]) for n in dict.fromkeys(names.values())}
        return {block: of[name] for block, name in names.items()}

    return {
        ONE: dict.fromkeys(grams, one),
        "β per layer": shared(0),
        "β per kind": shared(1),
        "β per layer and kind": {block: own([block]) for block in grams},
    }


def _apply(
    grams: Mapping[Block, np.ndarray],
    pool: Pool,
    size: int,
    fitted: dict[str, dict[Block, float]],
) -> dict[str, dict[str, float | None]]:
    """The figures of each choice of exponents."""
    batches = draw_batches(pool.groups, size)
    flat = batch_weights(pool, batches, lambda x, adv, ids, w: constant_length(x, where=w))
    cache: dict[float, np.ndarray] = {}

    def weights(alpha: float) -> np.ndarray:
        if alpha not in cache:
            cache[alpha] = batch_weights(
                pool, batches, lambda x, adv, ids, w: delta_l(x, alpha, where=w)
            )
        return cache[alpha]

    def pairs(exponents: Mapping[Block, float]) -> Pairs:
        own = [weights(exponents[block]) for block in grams]
        return Pairs.of(list(grams.values()), own, [flat] * len(own), batches, pool.groups)

    choices = {REFERENCE: dict.fromkeys(grams, 1.0)} | fitted
    found = {name: pairs(exponents) for name, exponents in choices.items()}
    found[UNWEIGHTED] = pairs(dict.fromkeys(grams, 0.0))
    return {name: figures(found, name, UNWEIGHTED, ONE) for name in choices}


def _mean_of(
    first: dict[str, float | None], second: dict[str, float | None]
) -> dict[str, float | None]:
    """The mean of two halves' figures; each interval is a half's own error, and both add."""
    found: dict[str, float | None] = {}
    for name in NAMES:
        values = [half[name] for half in (first, second)]
        lows = [half[f"{name}_low"] for half in (first, second)]
        found |= dict.fromkeys((name, f"{name}_low", f"{name}_high"))
        if None in values:
            continue
        middle = float(np.mean(np.asarray(values, float)))
        found[name] = middle
        if None not in lows:
            half = np.asarray(values, float) - np.asarray(lows, float)
            width = float(np.sqrt((half**2).sum())) / 2
            found |= {f"{name}_low": middle - width, f"{name}_high": middle + width}
    return found
