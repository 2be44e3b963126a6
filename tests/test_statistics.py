"""Intervals: by hand, by their equations, by how often they hold, and where there is nothing."""

import math

import numpy as np
import pytest

from deltal_jax.analysis.statistics import BLOCK, RESAMPLES, bootstrap_intervals, wilson_interval


@pytest.mark.parametrize(("share", "count"), [(0.125, 100), (0.5, 7), (0.999, 5000)])
def test_wilson_bounds_solve_the_score_equation(share, count):
    for bound in wilson_interval(share, count):
        deviation = 1.959963984540054 * math.sqrt(bound * (1 - bound) / count)
        assert abs(share - bound) == pytest.approx(deviation, rel=1e-9)


def test_wilson_interval_at_the_edges():
    assert wilson_interval(0.0, 10) == pytest.approx((0.0, 0.2775328), abs=1e-6)
    assert wilson_interval(1.0, 10) == pytest.approx((0.7224672, 1.0), abs=1e-6)
    for share, count in [(1.2, 10), (0.5, 0), (math.nan, 10), (0.5, math.nan)]:
        assert np.isnan(wilson_interval(share, count)).all()


def test_two_clusters_have_three_resamples():
    """0, 1/2 and 1 with chances 1/4, 1/2 and 1/4: the ends are the percentiles of these."""
    (found,) = bootstrap_intervals(np.array([[0.0], [1.0]]), np.arange(2))
    np.testing.assert_array_equal(found, [0.0, 1.0])
    # One cluster of three problems, one of one: means 0, 3/4 and 1.
    values, clusters = np.array([[1.0], [1.0], [1.0], [0.0]]), np.array([0, 0, 0, 1])
    np.testing.assert_array_equal(bootstrap_intervals(values, clusters), [[0.0, 1.0]])


def test_many_problems_give_the_normal_interval():
    """By the central limit theorem, of 4,000 independent problems, within the noise of resamples:
    the standard error of a 2.5% percentile is about 0.06 deviations with 2,000 of them."""
    values = np.random.default_rng(0).random((4000, 2))
    assert len(values) * RESAMPLES > BLOCK  # in several blocks
    found = bootstrap_intervals(values, np.arange(4000))
    error = values.std(axis=0) / math.sqrt(4000)
    expected = values.mean(axis=0) + np.array([[-1.96], [1.96]]) * error
    assert np.abs(found.T - expected).max() < 0.25 * error.min()


def test_copies_of_a_problem_add_nothing():
    """Each problem four times over: clustered, the interval is that of the problems themselves;
    taken as independent it is half as wide."""
    values = (np.random.default_rng(1).random((100, 1)) < 0.4).astype(float)
    once = bootstrap_intervals(values, np.arange(100))
    copies, clusters = np.repeat(values, 4, axis=0), np.repeat(np.arange(100), 4)
    np.testing.assert_array_equal(bootstrap_intervals(copies, clusters), once)
    wrong = bootstrap_intervals(copies, np.arange(400))
    assert np.ptp(wrong) == pytest.approx(np.ptp(once) / 2, rel=0.15)


def test_clusters_of_correlated_responses_are_covered_as_often_as_promised():
    """40 problems of differing difficulty, twice each: of 300 intervals 95% hold the truth, within
    four standard errors and what 40 clusters cost; without clusters far fewer do."""
    rng = np.random.default_rng(2)
    held, naive = 0, 0
    for _ in range(300):
        chances = np.repeat(rng.beta(0.5, 0.5, 40), 2)
        values, clusters = (rng.random((80, 1)) < chances[:, None]) * 1.0, np.repeat(range(40), 2)
        low, high = bootstrap_intervals(values, clusters)[0]
        held += low <= 0.5 <= high
        low, high = bootstrap_intervals(values, np.arange(80))[0]
        naive += low <= 0.5 <= high
    assert 0.89 < held / 300 < 1 and naive < held


def test_where_all_problems_agree_the_interval_is_wilsons_of_the_problems():
    """Resampling would say that nothing is uncertain."""
    for share in (0.0, 0.25, 1.0):
        values, clusters = np.full((12, 1), share), np.repeat(np.arange(6), 2)
        expected = wilson_interval(share, 6)
        assert tuple(bootstrap_intervals(values, clusters)[0]) == pytest.approx(expected)
    assert np.isnan(bootstrap_intervals(np.ones((3, 2)), np.zeros(3, int))).all()


def test_an_interval_follows_from_its_seed():
    values, clusters = np.random.default_rng(3).random((30, 1)), np.arange(30)
    first = bootstrap_intervals(values, clusters, seed=1)
    np.testing.assert_array_equal(first, bootstrap_intervals(values, clusters, seed=1))
    assert np.any(first != bootstrap_intervals(values, clusters, seed=2))
