"""Intervals of 95 %."""

import math

import numpy as np
from jaxtyping import Float, Int

#: Resamples of a bootstrap, and how many of their numbers are held at once.
RESAMPLES, BLOCK = 2000, 2**20


def wilson_interval(share: float, count: float) -> tuple[float, float]:
    """Return the 95% Wilson score interval of a share among `count` independent trials.

    Both ends are NaN where the share is not in [0, 1] or the count is not positive.
    """
    if not (0 <= share <= 1 and count > 0):
        return math.nan, math.nan
    z2 = 1.959963984540054**2 / count
    centre, half = share + z2 / 2, math.sqrt(z2 * (share * (1 - share) + z2 / 4))
    return max(0.0, (centre - half) / (1 + z2)), min(1.0, (centre + half) / (1 + z2))


def resamples(rng: np.random.Generator, size: int, count: int) -> Int[np.ndarray, "R N"]:
    """How often each of `count` things is drawn, in `size` draws of so many with replacement."""
    drawn = rng.integers(count, size=(size, count)) + count * np.arange(size)[:, None]
    return np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count)


def bootstrap_intervals(
    values: Float[np.ndarray, "P M"], clusters: Int[np.ndarray, " P"], seed: int = 0
) -> Float[np.ndarray, "M 2"]:
    """Percentile bootstrap of the means of M figures over P problems, all shares in [0, 1].

    Whole clusters are drawn, as many as there are, with replacement: responses to one problem, or
    to copies of it, are no independent trials, and an interval that takes them so is too narrow.
    `clusters` numbers them from 0 on. Efron & Tibshirani 1993, chapters 6 and 13.

    Clusters that all have the same mean leave nothing to resample: then it is the Wilson interval
    of one trial a cluster. NaN where there is one cluster only: nobody knows then.
    """
    sizes = np.bincount(clusters).astype(np.float64)
    sums = np.stack([np.bincount(clusters, weights=column) for column in values.T], axis=1)
    count = len(sizes)
    if count < 2:
        return np.full((values.shape[1], 2), math.nan)
    rng, means = np.random.default_rng(seed), []
    rows = max(1, BLOCK // count)
    for first in range(0, RESAMPLES, rows):
        times = resamples(rng, min(rows, RESAMPLES - first), count)
        means.append((times @ sums) / (times @ sizes)[:, None])
    found = np.percentile(np.concatenate(means), [2.5, 97.5], axis=0).T
    same = np.ptp(sums / sizes[:, None], axis=0) < 1e-12
    shares = sums.sum(axis=0) / sizes.sum()
    for at in np.flatnonzero(same):
        found[at] = wilson_interval(float(shares[at].clip(0, 1)), count)
    return found.clip(0, 1)
