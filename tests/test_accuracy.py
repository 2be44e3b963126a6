"""Figures of accuracy: by hand, against counting all draws, and their laws."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltal_jax.analysis.accuracy import (
    avg_at_n,
    best_at_k_bootstrap,
    distinct,
    majority_at_n,
    monotonicity,
    pass_at_k,
    powers_of_two,
    rank_correlation,
)

#: Problems with 0, 1, 3 and 4 of 4 responses correct.
CORRECT = np.array([[0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 1], [1, 1, 1, 1]], bool)
outcomes = st.lists(st.booleans(), min_size=1, max_size=7).map(lambda row: np.array([row]))


def test_avg_and_pass_by_hand():
    np.testing.assert_allclose(avg_at_n(CORRECT), [0, 1 / 4, 3 / 4, 1])
    # Of the six pairs of four responses, three hold the one that is correct.
    np.testing.assert_allclose(pass_at_k(CORRECT, 2), [0, 3 / 6, 1, 1])
    np.testing.assert_allclose(pass_at_k(CORRECT, 3), [0, 3 / 4, 1, 1])


@given(outcomes)
def test_pass_at_k_counts_all_ways_to_draw_k(correct):
    n = correct.shape[1]
    for k in range(1, n + 1):
        draws = [any(draw) for draw in itertools.combinations(correct[0], k)]
        assert pass_at_k(correct, k)[0] == pytest.approx(np.mean(draws), abs=1e-12)


@given(st.integers(1, 200), st.data())
def test_pass_at_k_rises_from_the_average_to_any(n, data):
    c = data.draw(st.integers(0, n))
    correct = np.arange(n)[None] < c
    found = [pass_at_k(correct, k)[0] for k in range(1, n + 1)]
    assert found[0] == pytest.approx(c / n, abs=1e-12)
    assert found[-1] == float(c > 0)
    assert np.all(np.diff(found) >= -1e-12)
    exact = [1 - math.comb(n - c, k) / math.comb(n, k) for k in range(1, n + 1)]
    np.testing.assert_allclose(found, exact, atol=1e-12)


def test_pass_at_k_stays_exact_where_binomials_overflow():
    """C(5000, 2500) has 1,500 digits."""
    correct = np.arange(5000)[None] < 3
    exact = 1 - math.prod((2500 - i) / (5000 - i) for i in range(3))
    assert pass_at_k(correct, 2500)[0] == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("k", [0, 5])
def test_a_k_beyond_the_samples_has_no_figure(k):
    with pytest.raises(ValueError, match=rf"k = {k} is not in 1 … 4"):
        pass_at_k(CORRECT, k)


def test_the_bootstrap_by_hand_counts_one_of_eight_as_two_thirds():
    correct = np.arange(8)[None] < 1
    assert best_at_k_bootstrap(correct, 8)[0] == pytest.approx(0.656, abs=5e-4)
    assert pass_at_k(correct, 8)[0] == 1


@given(outcomes.filter(lambda correct: correct.size <= 4))
def test_the_bootstrap_counts_all_draws_with_replacement(correct):
    for k in range(1, 5):
        draws = [any(draw) for draw in itertools.product(correct[0], repeat=k)]
        assert best_at_k_bootstrap(correct, k)[0] == pytest.approx(np.mean(draws), abs=1e-12)
        if k <= correct.shape[1]:
            assert best_at_k_bootstrap(correct, k)[0] <= pass_at_k(correct, k)[0] + 1e-12


def test_the_majority_by_hand():
    rows = [
        ("abbc", "1000", 0.0),  # the most frequent is wrong
        ("aabc", "1100", 1.0),
        ("aabb", "1100", 0.5),  # a tie
        ("abcd", "0010", 0.25),
        ("a   ", "1000", 1.0),  # who does not answer does not vote
        ("    ", "0000", 0.0),  # nobody votes
    ]
    answers = [answer.strip() for text, _, _ in rows for answer in text]
    correct = np.array([[digit == "1" for digit in right] for _, right, _ in rows])
    np.testing.assert_allclose(majority_at_n(answers, correct), [share for *_, share in rows])


def test_the_k_that_are_told():
    assert [powers_of_two(n) for n in (1, 2, 8, 10)] == [
        [1],
        [1, 2],
        [1, 2, 4, 8],
        [1, 2, 4, 8, 10],
    ]


def test_rank_correlation_by_hand():
    """1 - 6 Σ d² / (n (n² - 1)) without ties; ties share their mean rank."""
    assert rank_correlation([0, 20, 40, 60], [0.1, 0.2, 0.21, 0.9]) == pytest.approx(1.0)
    assert rank_correlation([0, 20, 40, 60], [0.9, 0.5, 0.4, 0.1]) == pytest.approx(-1.0)
    assert rank_correlation([1, 2, 3, 4, 5], [1, 3, 2, 5, 4]) == pytest.approx(1 - 6 * 4 / 120)
    # Ranks 1, 2.5, 2.5 of 1, 2, 3: covariance 1.5 / sqrt(2 · 1.5).
    assert rank_correlation([1, 2, 3], [0, 7, 7]) == pytest.approx(1.5 / math.sqrt(3))


@given(st.lists(st.integers(-9, 9), min_size=3, max_size=8).filter(lambda y: len(set(y)) > 1))
def test_rank_correlation_sees_only_the_order(values):
    steps = np.arange(len(values))
    found = rank_correlation(steps, values)
    assert found is not None and -1 <= found <= 1
    assert rank_correlation(steps, np.exp(values)) == pytest.approx(found)
    assert rank_correlation(steps, -np.array(values)) == pytest.approx(-found)


@pytest.mark.parametrize(
    ("x", "y"), [([], []), ([0, 1], [0, 1]), ([0, 1, 2], [3, 3, 3]), ([0, 1, 2], [1, math.nan, 2])]
)
def test_too_few_or_constant_values_have_no_order(x, y):
    assert rank_correlation(x, y) is None


def test_monotonicity_is_told_of_each_set_over_the_evaluations_of_a_run():
    accuracies = {"math": [0.1, 0.3, 0.2], "math/aime24": [0.0, 0.0, 0.0], "b": [0.1, None, 0.3]}
    lines = [
        {"step": 20 * i, "phase": "eval"}
        | {f"eval/{k}/avg_at_k": v[i] for k, v in accuracies.items()}
        for i in range(3)
    ]
    lines += [{"step": 1, "phase": "rl", "eval/b/avg_at_k": 1}, lines[-1] | {"eval/b/k": 1}]
    assert monotonicity(lines) == {"b": None, "math": pytest.approx(0.5), "math/aime24": None}


def test_copies_have_one_number():
    np.testing.assert_array_equal(distinct(["x", "a", "x", "b"]), [2, 0, 2, 1])
