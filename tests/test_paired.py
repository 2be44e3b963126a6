"""Paired statistics: by hand, against brute force, and their laws on simulated runs."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltal_jax.analysis.paired import (
    area,
    crossed_intervals,
    detectable_effect,
    holm,
    sign_flip_test,
    smallest_p,
    smallest_two_sample_p,
    t_quantile,
    two_sample_test,
)

whole = st.lists(st.integers(-9, 9), min_size=1, max_size=10).map(lambda x: np.array(x, float))
shares = st.lists(st.floats(1e-4, 1), min_size=1, max_size=6)


def bound(level: float, count: int) -> float:
    """What the share of rejections among so many tests stays under but once in 700 times."""
    return level + 3 * math.sqrt(level * (1 - level) / count)


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=8),
    st.floats(-3, 3),
    st.floats(-3, 3),
    st.floats(0, 1),
)
def test_the_area_of_a_line_is_exact_to_any_horizon(gaps, height, slope, share):
    x = np.cumsum([0, *gaps]).astype(float)
    horizon = max(share * x[-1], 0.5)
    y = height + slope * x
    assert area(x, y, horizon) == pytest.approx(height + slope * horizon / 2, abs=1e-9)
    both = area(x, np.stack([y, -y], axis=1), horizon)
    np.testing.assert_allclose(both, [area(x, y, horizon), -area(x, y, horizon)], atol=1e-12)


def test_the_area_by_hand():
    """0 → 1 over [0, 2], then 1 → 0 over [2, 3]: to 2.5 it is 1 + (1 + 0.5) / 2 · 0.5."""
    x, y = np.array([0.0, 2, 3]), np.array([0.0, 1, 0])
    assert area(x, y, 2.5) == pytest.approx((1 + 0.375) / 2.5)
    assert area(x, y, 2.5, start=2.0) == pytest.approx(0.75)


@pytest.mark.parametrize(("start", "horizon"), [(0, 4), (-1, 2), (2, 2)])
def test_there_is_no_area_where_there_is_no_curve(start, horizon):
    with pytest.raises(ValueError, match="no curve"):
        area(np.array([0.0, 2, 3]), np.zeros(3), horizon, start)


def test_signs_by_hand():
    assert sign_flip_test(np.array([1.0, 2, 3])) == 2 / 8
    # Whatever the sign of 0: two of the four signs of 1 and 3 add up to 4 or −4.
    assert sign_flip_test(np.array([1.0, 3, 0])) == 4 / 8
    assert sign_flip_test(np.zeros(5)) == 1


@given(whole)
def test_signs_count_all_that_are_as_far_out(differences):
    seen = abs(differences.sum())
    signs = itertools.product([-1, 1], repeat=len(differences))
    sums = [abs(np.dot(one, differences)) for one in signs]
    p = sign_flip_test(differences)
    assert p == np.mean([total >= seen for total in sums])
    assert p >= smallest_p(len(differences))


@given(whole, st.randoms(use_true_random=False))
def test_signs_see_neither_the_order_nor_which_is_first(differences, random):
    p = sign_flip_test(differences)
    shuffled = random.sample(list(differences), len(differences))
    assert sign_flip_test(-differences) == p == sign_flip_test(np.array(shuffled))
    assert sign_flip_test(0.1 * differences) == p  # ties survive rounding


def test_random_signs_agree_with_all_of_them():
    """15 pairs, of which one is 0: p is that of the 14 others, to three standard errors."""
    differences = np.random.default_rng(3).normal(0.4, 1, 14)
    exact, drawn = sign_flip_test(differences), sign_flip_test(np.append(differences, 0.0))
    assert drawn == pytest.approx(exact, abs=3 * math.sqrt(exact / 2**14))
    assert sign_flip_test(np.ones(40)) == smallest_p(40) == 2**-14


@pytest.mark.parametrize(("pairs", "tests"), [(6, 1000), (8, 1000), (16, 200)])
def test_signs_seldom_reject_where_there_is_nothing(pairs, tests):
    noise = np.random.default_rng(pairs).standard_t(3, (tests, pairs))
    p = np.array([sign_flip_test(one) for one in noise])
    for level in (0.05, 0.2):
        assert (p <= level).mean() <= bound(level, tests)
    assert (p <= 0.2).mean() > 0.1  # and not because it never does


def test_two_samples_by_hand():
    """Three against three: 2 of 20 splits are as far apart."""
    a, b = np.array([1.0, 2, 3]), np.array([4.0, 5, 6])
    assert two_sample_test(a, b) == two_sample_test(b, a) == smallest_two_sample_p(3, 3) == 0.1
    assert two_sample_test(a[:2], b) == smallest_two_sample_p(2, 3) == 0.1
    assert two_sample_test(a, a) == 1
    far = np.random.default_rng(0).normal(0, 0.1, 12)
    assert two_sample_test(far, far + 9) == smallest_two_sample_p(12, 12) == 2**-14


def test_two_samples_seldom_differ_where_they_are_one():
    noise = np.random.default_rng(5).standard_t(3, (500, 8))
    p = np.array([two_sample_test(one[:4], one[4:]) for one in noise])
    assert (p <= 0.1).mean() <= bound(0.1, 500)
    assert (p <= 0.1).mean() > 0.05


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.6]) == [1, 1]
    assert holm([]) == []


@given(shares)
def test_holm_is_the_closed_test_of_bonferroni(p):
    """Rejected only if every set of hypotheses that it is in is, each at its size."""
    every = range(len(p))
    sets = [s for n in every for s in itertools.combinations(every, n + 1)]
    closed = [min(1, max(len(s) * min(p[j] for j in s) for s in sets if i in s)) for i in every]
    assert holm(p) == pytest.approx(closed)


@given(shares, st.randoms(use_true_random=False))
def test_holm_keeps_the_order_and_lowers_nothing(p, random):
    adjusted = holm(p)
    assert all(new >= old for new, old in zip(adjusted, p, strict=True))
    order = np.argsort(p)
    assert np.all(np.diff(np.array(adjusted)[order]) >= 0)
    shuffled = random.sample(range(len(p)), len(p))
    assert holm([p[i] for i in shuffled]) == [adjusted[i] for i in shuffled]


def test_a_family_seldom_has_any_rejection_where_there_is_nothing():
    """Four methods with the same reference, so that their differences depend on one another."""
    rng, found = np.random.default_rng(7), []
    for _ in range(500):
        runs = rng.normal(size=(5, 10))
        p = holm([sign_flip_test(one - runs[0]) for one in runs[1:]])
        found.append(min(p) < 0.05)
    assert 0 < np.mean(found) <= bound(0.05, 500)


@pytest.mark.parametrize(("pairs", "level"), [(6, 0.05), (8, 0.05 / 6), (16, 0.05 / 3)])
def test_a_detectable_effect_is_found_as_often_as_it_says(pairs, level):
    effect = detectable_effect(pairs, level, power=0.8)
    runs = effect + np.random.default_rng(1).standard_normal((400, pairs))
    power = np.mean([sign_flip_test(one) < level for one in runs])
    assert power == pytest.approx(0.8, abs=3 * math.sqrt(0.16 / 400 + 0.16 / 2000))


def test_what_cannot_be_detected_is_infinite():
    assert smallest_p(5) == 1 / 16
    assert detectable_effect(5, 0.05) == math.inf  # the smallest p is 0.0625
    assert detectable_effect(7, 0.05 / 6) == math.inf
    assert detectable_effect(12, 0.05) < detectable_effect(9, 0.05) < detectable_effect(6, 0.05)


def test_students_t_against_tables():
    for degrees, value in ((1, 12.7062), (2, 4.3027), (7, 2.3646), (30, 2.0423), (1000, 1.9623)):
        assert t_quantile(0.975, degrees) == pytest.approx(value, rel=5e-5)
    assert (
        t_quantile(0.2, 7) == pytest.approx(-t_quantile(0.8, 7)) == pytest.approx(-0.8960, abs=1e-4)
    )


@pytest.mark.parametrize(
    ("seeds", "of_seed", "of_problem", "of_both"),
    [(3, 0.1, 0.1, 0.1), (8, 0.1, 0.0, 0.02), (8, 0.0, 0.3, 0.02), (8, 0.02, 0.05, 0.2)],
)
def test_intervals_cover_the_truth_as_often_as_they_say(seeds, of_seed, of_problem, of_both):
    """v = seed's luck + problem's difficulty + noise; the truth is 0."""
    rng = np.random.default_rng(11)
    noise = rng.normal(0, of_both, (500, seeds, 40))
    noise += rng.normal(0, of_seed, (500, seeds, 1)) + rng.normal(0, of_problem, (500, 1, 40))
    low, high = crossed_intervals(noise).T
    covered = np.mean((low <= 0) & (high >= 0))
    assert covered == pytest.approx(0.95, abs=bound(0.05, 500) - 0.05)


def test_intervals_of_seeds_alone_would_be_too_narrow():
    """The same problems for all seeds: their luck does not average out over runs."""
    rng = np.random.default_rng(2)
    values = rng.normal(0, 0.3, (1, 1, 40)) + rng.normal(0, 0.01, (1, 8, 40))
    low, high = crossed_intervals(values)[0]
    assert high - low == pytest.approx(2 * 1.96 * 0.3 / math.sqrt(40), rel=0.25)


def test_intervals_move_with_the_values_and_are_the_same_twice():
    values = np.random.default_rng(4).normal(size=(2, 4, 9))
    found = crossed_intervals(values)
    np.testing.assert_array_equal(found, crossed_intervals(values))
    np.testing.assert_allclose(crossed_intervals(values + 5), found + 5)
    np.testing.assert_allclose(crossed_intervals(-values), -found[:, ::-1], atol=1e-9)
    # Problems are exchangeable, up to which of them a resample happens to draw.
    turned = crossed_intervals(values[:, :, ::-1])
    np.testing.assert_allclose(turned, found, atol=0.1 * np.ptp(found))


def test_one_run_or_one_problem_or_nothing_but_one_value_has_no_interval():
    for shape in ((1, 1, 9), (1, 4, 1)):
        assert np.isnan(crossed_intervals(np.random.default_rng(0).normal(size=shape))).all()
    mixed = np.stack([np.ones((3, 4)), np.arange(12.0).reshape(3, 4)])
    assert np.isnan(crossed_intervals(mixed)).all(axis=1).tolist() == [True, False]
