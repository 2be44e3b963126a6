"""Runs compared in pairs: areas under curves, permutation tests, Holm's correction, intervals.

The unit of replication is a training run. S seeds (runs), P problems, E evaluations of a run.
Every function is deterministic: what is drawn is drawn from a fixed seed.
"""

import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from deltal_jax.analysis.statistics import BLOCK, RESAMPLES, resamples

#: Up to so many pairs all 2^n signs are tried; above, and for splits of two groups that are more,
#: so many at random.
EXACT_PAIRS, PERMUTATIONS = 14, 2**14
#: Simulated experiments of `detectable_effect`, and how many signs each is tested by.
EXPERIMENTS, TRIED = 2000, 2**11


def area(
    x: Float[np.ndarray, " E"], y: Float[np.ndarray, "E *P"], horizon: float, start: float = 0.0
) -> Float[np.ndarray, "*P"]:
    """The mean height of the curves y over x between `start` and `horizon`.

        1 / (h − s) ∫_s^h y(x) dx

    by the trapezoidal rule, with linear interpolation at both ends: of accuracy against generated
    tokens, the mean accuracy on the way to h tokens. x in any unit, not decreasing; the result has
    the unit of y. Raises ValueError where x does not reach from `start` to `horizon`.
    """
    if not (len(x) and x[0] <= start < horizon <= x[-1]):
        raise ValueError(f"no curve from {start} to {horizon}")
    inside = (x > start) & (x < horizon)
    at = np.concatenate([[start], x[inside], [horizon]])
    heights = interpolation(x, at)
    weights = np.diff(at) @ (heights[1:] + heights[:-1]) / 2 / (horizon - start)
    return np.tensordot(weights, y, axes=1)


def interpolation(
    x: Float[np.ndarray, " E"], at: Float[np.ndarray, " N"]
) -> Float[np.ndarray, "N E"]:
    """The matrix that interpolates curves over x linearly: their heights at `at` are its product
    with theirs at x."""
    return np.stack([np.interp(at, x, unit) for unit in np.eye(len(x))], axis=1)


def sign_flip_test(differences: Float[np.ndarray, " S"]) -> float:
    """Two-sided p-value of the paired permutation test that differences are symmetric about 0.

        p = share of the sign vectors ε ∈ {−1, 1}^S with |Σ ε_s d_s| ≥ |Σ d_s|

    Under the null hypothesis a pair's two methods could be exchanged, so every sign is as likely.
    All signs for S ≤ 14, else 2^14 random ones with the observed among them: p is never 0, and the
    test is valid for either (Fisher 1935, section 21; Phipson & Smyth 2010). See `smallest_p`.
    """
    sums = _signs(len(differences), PERMUTATIONS) @ differences
    return _share_as_far(sums, float(np.abs(differences).sum()))


def smallest_p(pairs: int) -> float:
    """The smallest p-value of `sign_flip_test`: 2 / 2^S, and 2^-14 where signs are drawn."""
    return 2.0 ** (1 - pairs) if pairs <= EXACT_PAIRS else 1 / PERMUTATIONS


def two_sample_test(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " m"]) -> float:
    """Two-sided p-value of the permutation test that two groups of runs are of one distribution.

        p = share of the splits of all n + m runs into n and m with |ā − b̄| as large as observed

    All splits where they are at most 2^14, else so many at random, the observed among them (Fisher
    1935; Phipson & Smyth 2010). See `smallest_two_sample_p`.
    """
    everything, n = np.concatenate([a, b]), len(a)
    total = len(everything)
    if math.comb(total, n) <= PERMUTATIONS:
        chosen = np.array(list(itertools.combinations(range(total), n)), int)
    else:
        rng = np.random.default_rng(0)
        chosen = rng.permuted(np.tile(np.arange(total), (PERMUTATIONS, 1)), axis=1)[:, :n]
        chosen[0] = np.arange(n)  # the observed; also the first of all combinations
    first = everything[chosen].sum(axis=1)
    means = first / n - (everything.sum() - first) / (total - n)
    return _share_as_far(means, float(np.abs(everything).max()))


def smallest_two_sample_p(n: int, m: int) -> float:
    """The smallest p-value of `two_sample_test`: 1 / C(n + m, n), twice that where n = m."""
    splits = math.comb(n + m, n)
    return (1 + (n == m)) / splits if splits <= PERMUTATIONS else 1 / PERMUTATIONS


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values: below α in a family where its error rate is ≤ α.

        p̃_(j) = min(1, max_{i ≤ j} (m − i + 1) p_(i)) for p_(1) ≤ … ≤ p_(m)

    Holm 1979, Scandinavian Journal of Statistics 6, 65-70. Valid under any dependence.
    """
    order = np.argsort(p, kind="stable")
    factors = np.arange(len(p), 0, -1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(factors * np.asarray(p)[order]), 1.0)
    return adjusted.tolist()


@functools.cache
def detectable_effect(pairs: int, level: float, power: float = 0.8) -> float:
    """The mean difference, in standard deviations of the differences, that `sign_flip_test` finds.

        the least δ with P(p(δ + z) < level) ≥ power,   z_s ~ N(0, 1) independent, s = 1 … S

    by simulation of the test itself (about 2 % of error): with few pairs p takes few values, and
    the usual (t_{1−level/2} + t_power) / √S is up to a fifth too small. Assumes normal differences.
    Infinite where no p-value of so many pairs is below `level`.
    """
    if smallest_p(pairs) >= level:
        return math.inf
    signs = _signs(pairs, TRIED)
    noise = np.random.default_rng(0).standard_normal((EXPERIMENTS, pairs))
    noise, shift = noise @ signs.T, signs.sum(axis=1)

    def found(effect: float) -> bool:
        sums = np.abs(noise + effect * shift)
        p = (sums >= sums[:, :1] * (1 - 1e-12)).mean(axis=1)
        return float((p < level).mean()) >= power

    low, high = 0.0, 16.0
    for _ in range(14):
        middle = (low + high) / 2
        low, high = (low, middle) if found(middle) else (middle, high)
    return high


def crossed_intervals(
    values: Float[np.ndarray, "M S P"], seed: int = 0
) -> Float[np.ndarray, "M 2"]:
    """95 % bootstrap intervals of the means of M figures, over seeds × problems.

        θ* = θ + c Σ_s (n_s / S) (v̄_s· − θ) + d Σ_p (n_p / P) (v̄_·p − θ)

    n: how often a seed, and apart from that a problem, is drawn, with replacement, as many as there
    are: the problems are the same for all seeds, so the two are crossed (Owen 2007, "The pigeonhole
    bootstrap", Annals of Applied Statistics 1). Plain resampling (c = d = 1, and a product term)
    counts the noise of single values three times, and the percentiles of few seeds are too narrow:

        c = √(S / (S−1)) t_{S−1} / z      Student's t (the correction of Hesterberg 2015, arXiv
                                          1411.5279, section 3.2.2, as a factor)
        d² = 1 − MS_e / (S var_p v̄_·p)    the problems' share of the variance of their means, by the
                                          analysis of variance, MS_e that of the residuals

    NaN where nobody knows: for one seed or problem, and for a figure whose values are all the same,
    which leaves nothing to resample.
    """
    _, seeds, problems = values.shape
    if min(seeds, problems) < 2:
        return np.full((len(values), 2), math.nan)
    mean = values.mean(axis=(1, 2))
    of_seed, of_problem = values.mean(axis=2).T - mean, values.mean(axis=1).T - mean
    residual = values - mean[:, None, None] - of_seed.T[:, :, None] - of_problem.T[:, None, :]
    noise = (residual**2).sum(axis=(1, 2)) / ((seeds - 1) * (problems - 1))
    spread = np.maximum(seeds * of_problem.var(axis=0, ddof=1), 1e-300)
    wide = math.sqrt(seeds / (seeds - 1)) * t_quantile(0.975, seeds - 1) / 1.959963984540054
    of_seed, of_problem = wide * of_seed, np.sqrt((1 - noise / spread).clip(0, 1)) * of_problem
    rng, found = np.random.default_rng(seed), []
    rows = max(1, BLOCK // problems)
    for first in range(0, RESAMPLES, rows):
        size = min(rows, RESAMPLES - first)
        drawn = resamples(rng, size, seeds) @ of_seed / seeds
        found.append(drawn + resamples(rng, size, problems) @ of_problem / problems)
    found = mean[:, None] + np.percentile(np.concatenate(found), [2.5, 97.5], axis=0).T
    found[np.ptp(values, axis=(1, 2)) < 1e-12] = math.nan
    return found


def t_quantile(p: float, degrees: int) -> float:
    """Quantile of Student's t: with t = √ν tan θ its density is ∝ cos^(ν−1) θ on (−π/2, π/2)."""
    angle = np.linspace(-math.pi / 2, math.pi / 2, 20_001)
    density = np.cos(angle).clip(0) ** (degrees - 1)
    share = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(degrees) * math.tan(np.interp(p, share / share[-1], angle))


def _signs(pairs: int, most: int) -> Float[np.ndarray, "R S"]:
    """Sign vectors, the observed (all +) first: one of each ±ε, or `most` random ones where these
    are more or the pairs over 14."""
    if pairs <= EXACT_PAIRS and 2**pairs <= 2 * most:
        bits = np.arange(2**pairs // 2 or 1)[:, None] >> np.arange(pairs)
        return 1.0 - 2.0 * (bits & 1)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(most, pairs))
    signs[0] = 1
    return signs


def _share_as_far(found: Float[np.ndarray, " R"], scale: float) -> float:
    """Share of the statistics as far from 0 as the first, but for rounding."""
    return float(np.mean(np.abs(found) >= abs(found[0]) - 1e-12 * scale))
