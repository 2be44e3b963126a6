"""Accuracy of n responses to each problem: a value a problem, whose mean is a data set's figure.

P problems, n responses to each, c of which are correct.
"""

import collections
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike


def avg_at_n(correct: Bool[np.ndarray, "P n"]) -> Float[np.ndarray, " P"]:
    """Share of a problem's responses that is correct, c / n: unbiased of pass@1, whatever n is."""
    return correct.mean(axis=1)


def pass_at_k(correct: Bool[np.ndarray, "P n"], k: int) -> Float[np.ndarray, " P"]:
    """Chance that k of the n responses, drawn without replacement, have a correct one among them.

        pass@k = 1 - C(n - c, k) / C(n, k) = 1 - Π_(i < c) (n - k - i) / (n - i)

    Unbiased of 1 - (1 - p)^k where p is the chance of one response. The product has no large
    binomials. Chen et al. 2021, arXiv 2107.03374. Raises ValueError for a k that is not in 1 … n.
    """
    n = correct.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"k = {k} is not in 1 … {n}")
    i = np.arange(n)
    missed = np.cumprod([1.0, *(np.maximum(n - k - i, 0) / (n - i))])
    return 1.0 - missed[correct.sum(axis=1)]


def best_at_k_bootstrap(correct: Bool[np.ndarray, "P n"], k: int) -> Float[np.ndarray, " P"]:
    """Chance that k draws with replacement from the n responses have a correct one among them.

        best@k = 1 - (1 - c / n)^k

    The mean over all draws, so nothing is drawn; the paper's code (verl) estimates it by 1,000 of
    them. It is below pass@k: at n = k = 8 one correct response counts 0.656, not 1. For comparison
    with published numbers only.
    """
    return 1.0 - (1.0 - avg_at_n(correct)) ** k


def majority_at_n(
    answers: Sequence[str], correct: Bool[np.ndarray, "P n"]
) -> Float[np.ndarray, " P"]:
    """Whether the most frequent of a problem's n final answers is correct.

    `answers` are those of all problems in order, n each, in a normal form, so that equal ones vote
    together. Answers that tie count by the share of them that is correct. A response without an
    answer ("") does not vote, and a problem without a vote counts 0. Wang et al. 2022, arXiv
    2203.11171.
    """
    n = correct.shape[1]
    return np.asarray(
        [_vote(answers[at * n : (at + 1) * n], right) for at, right in enumerate(correct)]
    )


def _vote(answers: Sequence[str], correct: Bool[np.ndarray, " n"]) -> float:
    counts = collections.Counter(answer for answer in answers if answer)
    most = max(counts.values(), default=0)
    winners = [answer for answer, count in counts.items() if count == most]
    return float(np.mean([correct[answers.index(w)] for w in winners])) if winners else 0.0


def powers_of_two(n: int) -> list[int]:
    """1, 2, 4, … below n, and n: the k of which pass@k is told."""
    return [*(2**i for i in range((n - 1).bit_length())), n]


def rank_correlation(x: ArrayLike, y: ArrayLike) -> float | None:
    """Spearman's: the correlation of the ranks of two series, ties with their mean rank.

    None where there are fewer than three pairs of finite numbers, or where one of the series is
    constant: neither has an order.
    """
    pairs = np.stack([np.asarray(x, np.float64), np.asarray(y, np.float64)])
    pairs = pairs[:, np.isfinite(pairs).all(axis=0)]
    if pairs.shape[1] < 3 or np.any(np.ptp(pairs, axis=1) == 0):
        return None
    return float(np.corrcoef(_ranks(pairs[0]), _ranks(pairs[1]))[0, 1].clip(-1, 1))


def _ranks(values: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[group]


def monotonicity(lines: Iterable[dict[str, Any]]) -> dict[str, float | None]:
    """`rank_correlation` of step and accuracy over the evaluations of a run, by data set.

    `lines` are those of metrics.jsonl; of two of one step the later counts.
    """
    series: dict[str, dict[float, float]] = {}
    for line in lines:
        for key, value in line.items():
            match = re.fullmatch("eval/(.+)/avg_at_k", key)
            if match and line.get("phase") == "eval" and value is not None:
                series.setdefault(match[1], {})[line["step"]] = value
    return {k: rank_correlation(list(v), list(v.values())) for k, v in sorted(series.items())}


def distinct(identities: Sequence[str]) -> Int[np.ndarray, " P"]:
    """The same number, from 0 on, for each of the same problem."""
    return np.unique(np.asarray(identities), return_inverse=True)[1]
