"""How the gradient of one response depends on its length: bins, moments, and β of Var = V·L^β.

Everything is a function of the Gram matrix K_ij = ⟨g_i, g_j⟩ of the responses' gradients, so it
costs the same for any number of parameters. Responses to one prompt are not independent: means are
estimated from pairs of different groups alone, and intervals resample whole groups.
"""

import dataclasses
import math
from statistics import NormalDist
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from deltal_jax.analysis.paired import t_quantile

#: Resamples of an interval.
RESAMPLES = 1000
#: Where β is looked for, and how often the range is halved.
RANGE, HALVINGS = (-4.0, 6.0), 40


@dataclasses.dataclass(frozen=True)
class Power:
    """Var(g | L) = scale · L^beta with the 95 % interval of beta, NaN where the resamples do not
    tell; r2 is of the logarithms of the bins' variances, NaN where one of them is not positive or
    all are equal."""

    beta: float
    low: float
    high: float
    scale: float
    r2: float


def length_bins(lengths: Int[np.ndarray, " N"], count: int) -> Int[np.ndarray, " N"]:
    """The bin of each response, counted from the shortest: as equal in number as can be while equal
    lengths share a bin, so there may be fewer than `count`."""
    _, inverse, counts = np.unique(lengths, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - counts / 2
    bins = np.minimum((middle * count / len(lengths)).astype(int), count - 1)
    return np.unique(bins, return_inverse=True)[1][inverse]


def bin_moments(
    gram: Float[np.ndarray, "N N"],
    lengths: Int[np.ndarray, " N"],
    groups: Int[np.ndarray, " N"],
    bins: Int[np.ndarray, " N"],
) -> list[dict[str, Any]]:
    """Of each bin: lengths, E‖g‖², ‖E g‖ (None where its square is not above 0), and the variance,
    which is the difference of the two squares."""
    own = np.diag(gram)
    means = _mean_squares(_cross(gram, groups, bins), np.ones((1, groups.max() + 1)))[0]
    found = []
    for number in range(bins.max() + 1):
        inside = bins == number
        square, second = float(means[number]), float(own[inside].mean())
        found.append(
            {
                "length": float(lengths[inside].mean()),
                "low": int(lengths[inside].min()),
                "high": int(lengths[inside].max()),
                "count": int(inside.sum()),
                "second_moment": second,
                "variance": second - square,
                "mean_norm": math.sqrt(square) if square > 0 else None,
            }
        )
    return found


def fit_power(
    gram: Float[np.ndarray, "N N"],
    lengths: Int[np.ndarray, " N"],
    groups: Int[np.ndarray, " N"],
    bins: Int[np.ndarray, " N"],
    resamples: int = RESAMPLES,
) -> Power | None:
    """β of Var(g | L) = V·L^β; None where the responses do not tell (one length, no gradient).

    With Q_b = Σ_{i in b} (‖g_i‖² − ‖E g‖²) and S_b(β) = Σ_{i in b} L_i^β of each bin, β solves

        Σ_b Q_b / S_b(β) · Σ_{i in b} (log L_i − mean log L) = 0.

    It only asks that E Q_b = V·S_b(β): no logarithm of a noisy number is taken, so it is consistent
    however small the bins and however heavy the tails are. It is the score of the gamma likelihood
    (McCullagh & Nelder 1989, chapter 8) with each bin's relative error ∝ its size^-½, and bins keep
    a few lengths whose estimate is negative from deciding. Percentile interval over whole groups,
    widened for few of them as in Hesterberg 2015 (The American Statistician 69:371, "expanded
    percentile").
    """
    count = int(groups.max()) + 1
    drawn = np.random.default_rng(0).multinomial(count, [1 / count] * count, size=resamples)
    times = np.concatenate([np.ones((1, count)), drawn])
    values, inverse = np.unique(lengths, return_inverse=True)
    bin_of = np.zeros(len(values), int)
    bin_of[inverse] = bins
    each = np.zeros((count, len(values)))
    np.add.at(each, (groups, inverse), 1.0)
    squares = np.zeros((count, bins.max() + 1))
    np.add.at(squares, (groups, bins), np.diag(gram))
    numbers, starts = times @ each, np.flatnonzero(np.diff(bin_of, prepend=-1))
    means = _mean_squares(_cross(gram, groups, bins), times)
    excess = times @ squares - np.add.reduceat(numbers, starts, axis=1) * means
    betas = _solve(excess, numbers, np.log(values), starts)
    beta = float(betas[0])
    if not np.isfinite(beta):
        return None
    powers = numbers[0] * values**beta
    scale = float(excess[0].sum() / powers.sum())
    if scale <= 0:
        return None
    low = high = math.nan
    known = betas[1:][np.isfinite(betas[1:])]
    if count > 2 and len(known) > 0.9 * resamples:
        outer = NormalDist().cdf(-math.sqrt(count / (count - 1)) * t_quantile(0.975, count - 1))
        low, high = (float(x) for x in np.quantile(known, [outer, 1 - outer]))
    r2 = _r2(excess[0], *(np.add.reduceat(x, starts) for x in (scale * powers, numbers[0])))
    return Power(beta, low, high, scale, r2)


def _cross(
    gram: Float[np.ndarray, "N N"], groups: Int[np.ndarray, " N"], bins: Int[np.ndarray, " N"]
) -> tuple[Float[np.ndarray, "b G G"], Float[np.ndarray, "b G G"]]:
    """By bin and pair of different groups: the sum of K_ij, and how many there are."""
    shape = (int(bins.max()) + 1, int(groups.max()) + 1)
    sums, numbers = np.zeros((shape[0], shape[1], shape[1])), np.zeros((shape[0], *shape[1:] * 2))
    for number in range(shape[0]):
        inside = np.flatnonzero(bins == number)
        member = np.eye(shape[1])[groups[inside]]
        sums[number] = member.T @ gram[np.ix_(inside, inside)] @ member
        numbers[number] = np.outer(member.sum(0), member.sum(0))
        np.fill_diagonal(sums[number], 0.0)
        np.fill_diagonal(numbers[number], 0.0)
    return sums, numbers


def _mean_squares(
    cross: tuple[np.ndarray, np.ndarray], times: Float[np.ndarray, "R G"]
) -> Float[np.ndarray, "R b"]:
    """‖E g‖² of each bin, unbiased, where group g is taken `times` often; 0 where a bin has but one
    group."""
    sums, numbers = (np.einsum("rg,bgh,rh->rb", times, x, times, optimize=True) for x in cross)
    return np.where(numbers > 0, sums / np.maximum(numbers, 1), 0.0)


def _solve(
    excess: Float[np.ndarray, "R b"],
    numbers: Float[np.ndarray, "R U"],
    logs: Float[np.ndarray, " U"],
    starts: Int[np.ndarray, " b"],
) -> Float[np.ndarray, " R"]:
    """β by bisection, of the U different lengths, in order, that so many responses have, cut into
    bins; NaN where the equation has no root that its sum falls through."""

    def by_bin(x: np.ndarray) -> np.ndarray:
        return np.add.reduceat(x, starts, axis=1)

    centred = logs - (numbers @ logs / numbers.sum(1))[:, None]
    leverage = by_bin(numbers * centred)
    # A resample may leave a bin empty: no excess, and no leverage.
    empty = by_bin(numbers) == 0

    def score(beta: np.ndarray) -> np.ndarray:
        powers = by_bin(numbers * np.exp(beta[:, None] * centred))
        return (leverage * excess / np.where(empty, 1.0, powers)).sum(1)

    low, high = (np.full(len(excess), end) for end in RANGE)
    found = (score(low) > 0) & (score(high) < 0)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        above = score(middle) > 0
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return np.where(found, (low + high) / 2, np.nan)


def _r2(found: np.ndarray, predicted: np.ndarray, numbers: np.ndarray) -> float:
    if (found <= 0).any() or len(found) < 3:
        return math.nan
    seen, told = np.log(found / numbers), np.log(predicted / numbers)
    spread = np.average((seen - np.average(seen, weights=numbers)) ** 2, weights=numbers)
    if spread == 0:
        return math.nan
    return float(1 - np.average((seen - told) ** 2, weights=numbers) / spread)
