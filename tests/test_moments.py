"""Moments by length and the exponent of the variance, on gradients whose law is known."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from deltal_jax.laboratory.moments import bin_moments, fit_power, length_bins

BETAS = (0.5, 1.0, 1.6, 2.0)
MEAN = 2.0


def draw(seed, beta, groups=32, samples=8, size=6):
    """Gram, lengths and groups of gradients with a mean of norm MEAN and Var = L^β, a third of it
    shared by the group, as are the lengths in part."""
    rng = np.random.default_rng(seed)
    shares = rng.normal(3.4, 0.5, (groups, 1)) + rng.normal(0.0, 0.6, (groups, samples))
    lengths = np.clip(np.exp(np.round(shares * 4) / 4), 4, 240).astype(int)  # few different ones
    own, shared = rng.normal(size=(groups, samples, size)), rng.normal(size=(groups, 1, size))
    noise = np.sqrt(1 / 3) * shared + np.sqrt(2 / 3) * own
    spread = np.sqrt(lengths[..., None] ** beta / size)
    found = (MEAN / np.sqrt(size) + spread * noise).reshape(-1, size)
    return found @ found.T, lengths.reshape(-1), np.repeat(np.arange(groups), samples)


@pytest.mark.parametrize("beta", BETAS)
def test_the_interval_contains_the_truth(beta):
    gram, lengths, groups = draw(0, beta)
    power = fit_power(gram, lengths, groups, length_bins(lengths, 6))
    assert power is not None and power.low < beta < power.high
    assert power.low < power.beta < power.high and power.high - power.low < 0.5
    assert math.log(power.scale) == pytest.approx(0.0, abs=0.5 * math.log(lengths.mean()))
    assert power.r2 > 0.8


def test_intervals_cover_as_often_as_they_say():
    """160 draws at 95 %: within what a binomial does in 999 of 1000 cases, and no bias."""
    hits, misses = 0, []
    for seed in range(40):
        for beta in BETAS:
            gram, lengths, groups = draw(100 + seed, beta)
            power = fit_power(gram, lengths, groups, length_bins(lengths, 6), resamples=200)
            assert power is not None
            hits += power.low <= beta <= power.high
            misses.append(power.beta - beta)
    assert hits >= stats.binom.ppf(0.001, 160, 0.95)
    assert abs(np.mean(misses)) < 3 * np.std(misses) / np.sqrt(len(misses))


def test_small_bins_do_not_bias_the_exponent():
    """With 40 bins of six responses: a regression on logarithms would be off by far more."""
    found = []
    for seed in range(30):
        gram, lengths, groups = draw(300 + seed, 1.6)
        power = fit_power(gram, lengths, groups, length_bins(lengths, 40), resamples=0)
        assert power is not None
        found.append(power.beta)
    assert abs(np.mean(found) - 1.6) < 3 * np.std(found) / np.sqrt(len(found))


def test_moments_of_a_bin_are_unbiased_though_groups_correlate():
    """Over 200 draws of 6 groups: ‖E g‖² without the share of the variance that a group has in
    common, and the variance with it."""
    squares, variances = [], []
    for seed in range(200):
        gram, _, groups = draw(seed, 0.0, groups=6, samples=3)
        lengths = np.full(18, 10)
        (row,) = bin_moments(gram, lengths, groups, np.zeros(18, int))
        squares.append(row["second_moment"] - row["variance"])
        variances.append(row["variance"])
        assert row["mean_norm"] is None or row["mean_norm"] ** 2 == pytest.approx(squares[-1])
    for values, truth in ((squares, MEAN**2), (variances, 1.0)):
        assert abs(np.mean(values) - truth) < 3 * np.std(values) / np.sqrt(len(values))


def test_nothing_is_said_where_nothing_can_be_known():
    gram, lengths, groups = draw(0, 1.0)
    bins = length_bins(lengths, 6)
    assert fit_power(gram, np.full_like(lengths, 9), groups, np.zeros_like(bins)) is None
    assert fit_power(np.zeros_like(gram), lengths, groups, bins) is None
    alone = fit_power(gram[:16, :16], lengths[:16], groups[:16], length_bins(lengths[:16], 3))
    assert alone is None or math.isnan(alone.low)  # two groups: no interval


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 9), st.randoms())
def test_bins_are_in_order_and_keep_equal_lengths_together(lengths, count, rng):
    values = np.asarray(lengths)
    bins = length_bins(values, count)
    assert set(bins) == set(range(bins.max() + 1)) and bins.max() < count
    order = np.argsort(values, kind="stable")
    assert np.all(np.diff(bins[order]) >= 0)
    assert all(len(set(bins[values == value])) == 1 for value in values)
    mixed = np.asarray(rng.sample(range(len(values)), len(values)))
    np.testing.assert_array_equal(length_bins(values[mixed], count), bins[mixed])


@settings(max_examples=10, deadline=None)
@given(st.floats(0.01, 100.0), st.integers(0, 99))
def test_a_scale_of_gradients_is_no_matter_of_the_exponent(factor, seed):
    gram, lengths, groups = draw(seed, 1.0, groups=8)
    bins = length_bins(lengths, 4)
    own, scaled = (fit_power(x, lengths, groups, bins, 50) for x in (gram, factor**2 * gram))
    assert own is not None and scaled is not None
    assert scaled.beta == pytest.approx(own.beta) and scaled.low == pytest.approx(own.low)
    assert scaled.scale == pytest.approx(own.scale * factor**2)
