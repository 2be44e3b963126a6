"""Advantages: group statistics against plain float64 loops, exact zeros, and missing rewards."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltal_jax.objective.advantages import (
    ADVANTAGES,
    batch_standardize,
    group_center,
    group_standardize,
    leave_one_out,
    length_weighted_baseline,
    max_rl,
)

METHODS = ["group_standardize", "group_center"]
EPSILON = 1e-6
COMPILED = {name: jax.jit(fn) for name, fn in ADVANTAGES.items() if name in METHODS}


def expected(method: str, rewards, groups, where=None) -> np.ndarray:
    """r − mean, over std + ε for the standardised kind, group by group; 0 where unknown."""
    rewards, out = np.asarray(rewards, np.float64), np.zeros(len(rewards))
    for group in set(groups):
        known = [
            i
            for i in range(len(rewards))
            if groups[i] == group
            and not math.isnan(rewards[i])
            and (where is None or bool(where[i]))
        ]
        if not known:
            continue
        centered = rewards[known] - rewards[known].mean()
        if np.all(rewards[known] == rewards[known][0]):
            centered = np.zeros(len(known))
        spread = math.sqrt(np.sum(centered**2) / max(len(known) - 1, 1))
        out[known] = centered if method == "group_center" else centered / (spread + EPSILON)
    return out


def advantages(method: str, rewards, groups, where=None) -> np.ndarray:
    where = None if where is None else jnp.asarray(where, bool)
    arguments = jnp.asarray(rewards, float), jnp.asarray(groups, jnp.int32)
    return np.asarray(COMPILED[method](*arguments, where=where))


SIZE = 11
plain = st.sampled_from([0.0, 1.0, 0.35, -0.5, 2.0]) | st.integers(-64, 64).map(lambda n: n / 8)
batches = st.tuples(
    st.lists(plain | st.just(math.nan), min_size=SIZE, max_size=SIZE),
    st.lists(st.integers(0, 4), min_size=SIZE, max_size=SIZE),
    st.none() | st.lists(st.booleans(), min_size=SIZE, max_size=SIZE),
)


@pytest.mark.parametrize("method", METHODS)
@given(batch=batches)
def test_every_advantage_is_its_formula_over_ragged_groups_with_missing_rewards(method, batch):
    reference = expected(method, *batch)
    with jax.enable_x64(True):
        np.testing.assert_allclose(advantages(method, *batch), reference, rtol=1e-12, atol=1e-14)
    rounded = expected(method, np.float32(batch[0]), *batch[1:])
    np.testing.assert_allclose(advantages(method, *batch), rounded, rtol=2e-5, atol=2e-6)


def test_the_standard_deviation_divides_by_n_minus_one():
    found = advantages("group_standardize", [1, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 1])
    std4, std2 = math.sqrt(0.75 / 3), math.sqrt(0.5)
    four = np.asarray([0.75, -0.25, -0.25, -0.25]) / (std4 + EPSILON)
    two = np.asarray([0.5, -0.5]) / (std2 + EPSILON)
    np.testing.assert_allclose(found, [*four, *two], rtol=1e-6)


def test_epsilon_is_added_to_the_standard_deviation():
    rewards, groups = jnp.asarray([1.0, 0.0]), jnp.asarray([0, 0])
    found = group_standardize(rewards, groups, epsilon=0.5)
    np.testing.assert_allclose(found, np.asarray([0.5, -0.5]) / (math.sqrt(0.5) + 0.5), rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reward", [0.35, 0.1, 1 / 3, -0.7, 1e-30, 1e8 + 8, 0.0, 1.0, 7.3e-5])
@pytest.mark.parametrize("size", [2, 3, 7, 10, 64])
def test_a_group_of_equal_rewards_has_exactly_zero_advantage(method, reward, size):
    groups = np.arange(2 * size) % 2
    rewards = np.where(groups == 0, reward, np.arange(2 * size))
    found = advantages(method, rewards, groups)
    np.testing.assert_array_equal(found[groups == 0], 0.0)
    assert np.abs(found[groups == 1]).min() > 0 or size % 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_equal_rewards_give_exact_zeros_in_any_float_format_with_and_without_jit(method, dtype):
    rewards, groups = jnp.full(10, 0.35, dtype), jnp.zeros(10, jnp.int32)
    for function in (ADVANTAGES[method], COMPILED[method]):
        found = function(rewards, groups)
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(found, np.zeros(10))


@pytest.mark.parametrize("method", METHODS)
def test_equal_rewards_give_exact_zeros_beside_missing_ones(method):
    rewards = [0.35, math.nan, 0.35, 0.35, math.nan, 0.35]
    np.testing.assert_array_equal(advantages(method, rewards, [0] * 6), np.zeros(6))


@pytest.mark.parametrize("method", METHODS)
def test_a_missing_reward_is_not_a_zero_and_changes_nothing_for_its_group(method):
    rewards, groups = [1.0, math.nan, 0.5, 2.0, 1.0, math.nan], [0, 0, 0, 1, 1, 2]
    found = advantages(method, rewards, groups)
    alone = advantages(method, [1.0, 0.5, 2.0, 1.0], [0, 0, 1, 1])
    np.testing.assert_allclose(found[[0, 2, 3, 4]], alone, rtol=1e-6)
    np.testing.assert_array_equal(found[[1, 5]], 0.0)
    as_zero = advantages(method, np.nan_to_num(rewards), groups)
    assert np.abs(found[[0, 2]] - as_zero[[0, 2]]).min() > 0.1


@pytest.mark.parametrize("method", METHODS)
def test_a_filtered_response_is_left_out_like_a_missing_one(method):
    rewards, groups = np.asarray([1.0, 5.0, 0.5, 2.0, 1.0, 9.0]), [0, 0, 0, 1, 1, 1]
    where = np.asarray([True, False, True, True, True, False])
    np.testing.assert_array_equal(
        advantages(method, rewards, groups, where),
        advantages(method, np.where(where, rewards, np.nan), groups, np.full(6, True)),
    )


@pytest.mark.parametrize("method", METHODS)
def test_nothing_known_gives_zeros_and_never_nan(method):
    for rewards, where in (([math.nan] * 4, None), ([1.0, 2.0, 3.0, 4.0], [False] * 4)):
        found = advantages(method, rewards, [0, 0, 1, 1], where)
        np.testing.assert_array_equal(found, np.zeros(4))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.35, -3e5])
def test_a_group_of_one_has_no_spread_and_zero_advantage(method, reward):
    found = advantages(method, [reward, math.nan, 0.0, 1.0], [0, 0, 1, 1])
    assert found[0] == 0.0


@pytest.mark.parametrize("method", METHODS)
@given(batch=batches, order=st.permutations(range(SIZE)))
def test_advantages_follow_their_responses_under_permutation(method, batch, order):
    rewards, groups, where = batch
    shuffled = [[row[i] for i in order] if row is not None else None for row in batch]
    np.testing.assert_allclose(
        advantages(method, *shuffled),
        advantages(method, rewards, groups, where)[list(order)],
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("method", METHODS)
def test_renaming_the_groups_changes_nothing(method):
    rewards, groups = [1.0, 0.0, 3.0, 0.5, 2.0, 2.5], np.asarray([0, 1, 0, 1, 2, 2])
    renamed = np.asarray([5, 0, 2])[groups]
    np.testing.assert_array_equal(
        advantages(method, rewards, groups), advantages(method, rewards, renamed)
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shift", [0.25, -8.0, 1e6])
def test_a_constant_added_to_all_rewards_changes_nothing(method, shift):
    rewards, groups = np.asarray([1.0, 0.0, 3.0, 0.5, 2.0, 2.5]), [0, 0, 0, 1, 1, 1]
    np.testing.assert_allclose(
        advantages(method, rewards + shift, groups),
        advantages(method, rewards, groups),
        rtol=1e-6,
    )


@pytest.mark.parametrize("factor", [0.5, 4.0, 1024.0])
def test_the_unit_of_reward_cancels_in_standardised_advantages_alone(factor):
    rewards, groups = np.asarray([1.0, 0.0, 3.0, 0.5, 2.0, 2.5]), [0, 0, 0, 1, 1, 1]
    np.testing.assert_allclose(
        advantages("group_standardize", rewards * factor, groups),
        advantages("group_standardize", rewards, groups),
        rtol=3e-6,  # what ε adds to a standard deviation of 0.5
    )
    np.testing.assert_allclose(
        advantages("group_center", rewards * factor, groups),
        advantages("group_center", rewards, groups) * factor,
        rtol=1e-6,
    )


@pytest.mark.parametrize("method", METHODS)
@given(batch=batches)
def test_the_known_advantages_of_a_group_sum_to_zero(method, batch):
    rewards, groups, _ = batch
    found = advantages(method, rewards, groups)
    for group in set(groups):
        inside = found[np.asarray(groups) == group]
        assert abs(inside.sum()) <= 1e-5 * max(np.abs(inside).max(), 1.0)


def test_small_differences_are_standardised_to_size_one_and_no_further():
    step = 2.0**-20
    found = advantages("group_standardize", [0.35, 0.35 + step, 0.35, 0.35], [0] * 4)
    assert 0 < np.abs(found).max() < 1.5


@pytest.mark.parametrize("function", [group_standardize, group_center])
def test_the_table_names_every_function_by_its_own_name(function):
    assert ADVANTAGES[function.__name__] is function


REWARDS = [1.0, 0.0, 0.5, 0.25, 1.0, 1.0, np.nan, 0.75]
RAGGED = [0, 0, 0, 1, 2, 2, 2, 0]


def both(function, *extra, rewards=REWARDS, ids=RAGGED):
    """The function's value, checked to be the same under jit."""
    arguments = (jnp.asarray(rewards, jnp.float32), jnp.asarray(ids), *extra)
    value = np.asarray(function(*arguments))
    np.testing.assert_allclose(jax.jit(function)(*arguments), value, atol=1e-7)
    return value


def test_leave_one_out_compares_with_the_mean_of_the_others():
    want = [1 - 1.25 / 3, 0 - 2.25 / 3, 0.5 - 1.75 / 3, 0, 0, 0, 0, 0.75 - 1.5 / 3]
    np.testing.assert_allclose(both(leave_one_out), want, atol=1e-6)


def test_batch_standardize_ignores_groups():
    known = np.asarray([r for r in REWARDS if not np.isnan(r)])
    want = (np.asarray(REWARDS) - known.mean()) / (known.std(ddof=1) + 1e-6)
    np.testing.assert_allclose(both(batch_standardize), np.nan_to_num(want), atol=1e-6)


def test_the_length_weighted_baseline_by_hand():
    def opo(rewards, ids, lengths):
        return length_weighted_baseline(rewards, lengths, ids)

    lengths = jnp.asarray([10, 30, 20, 5, 7, 9, 11, 40])
    baseline = (10 * 1.0 + 20 * 0.5 + 40 * 0.75) / 100
    want = [1 - baseline, -baseline, 0.5 - baseline, 0, 0, 0, 0, 0.75 - baseline]
    np.testing.assert_allclose(both(opo, lengths), want, atol=1e-6)
    equal = both(opo, jnp.full(8, 6))
    np.testing.assert_allclose(equal, both(group_center), atol=1e-6)


def test_max_rl_divides_by_the_mean_and_is_zero_where_that_is_zero():
    mean = 2.25 / 4
    want = [(r - mean) / mean if g == 0 else 0.0 for r, g in zip(REWARDS, RAGGED, strict=True)]
    np.testing.assert_allclose(both(max_rl), want, atol=1e-6)
    assert both(max_rl, rewards=[0.0] * 8).tolist() == [0.0] * 8
    with pytest.raises(ValueError, match="must not be negative"):
        max_rl(jnp.asarray([1.0, -0.1]), jnp.asarray([0, 0]))
    traced = jax.jit(max_rl)(jnp.asarray([1.0, -3.0, 1.0, 3.0]), jnp.asarray([0, 0, 1, 1]))
    np.testing.assert_allclose(traced, [0.0, 0.0, -0.5, 0.5], rtol=1e-6)  # means −1 and 2


def estimator(name: str):
    """By rewards and group ids alone; OPO's lengths follow the rewards."""

    def opo(rewards, ids, **options):
        lengths = 2.0 + jnp.nan_to_num(rewards)
        return length_weighted_baseline(rewards, lengths, ids, **options)

    return opo if name == "length_weighted_baseline" else ADVANTAGES[name]


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
def test_every_estimator_gives_exactly_zero_to_constant_groups(name):
    value = both(estimator(name), rewards=[0.35] * 6, ids=[0, 0, 0, 1, 1, 1])
    assert value.tolist() == [0.0] * 6


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
def test_every_estimator_leaves_missing_and_filtered_rewards_out(name):
    function = estimator(name)
    rewards, ids = np.asarray([1.0, 9, 0.5, 2, 1, 9, 0]), np.asarray([0, 0, 0, 1, 1, 1, 2])
    known = np.asarray([True, False, True, True, True, False, True])
    alone = np.asarray(function(jnp.asarray(rewards[known]), jnp.asarray(ids[known])))
    for given_, where in ((np.where(known, rewards, np.nan), None), (rewards, jnp.asarray(known))):
        found = np.asarray(function(jnp.asarray(given_), jnp.asarray(ids), where=where))
        np.testing.assert_allclose(found[known], alone, rtol=1e-6, atol=1e-7)
        np.testing.assert_array_equal(found[~known], 0.0)


@pytest.mark.parametrize("name", sorted(set(ADVANTAGES) - {"batch_standardize"}))
def test_every_estimator_gives_zero_to_a_group_of_one(name):
    found = both(estimator(name), rewards=[0.35, 7.0, 1.0, 3.0], ids=[0, 3, 1, 1])
    assert found[:2].tolist() == [0.0, 0.0]
    assert np.abs(found[2:]).min() > 0


def test_the_only_known_reward_of_a_batch_has_zero_advantage():
    assert both(batch_standardize, rewards=[np.nan, 0.35], ids=[0, 0]).tolist() == [0.0, 0.0]
    assert both(batch_standardize, rewards=[np.nan] * 2, ids=[0, 0]).tolist() == [0.0, 0.0]


def test_the_batch_standardisation_of_a_million_rewards_is_right_in_float32():
    rewards = np.random.default_rng(0).random(10**6).astype(np.float32)
    found = np.asarray(batch_standardize(jnp.asarray(rewards)))
    exact = rewards.astype(np.float64)
    want = (exact - exact.mean()) / (exact.std(ddof=1) + EPSILON)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("ids", [[0, 2], [-1, 0]])
def test_ids_outside_the_batch_are_refused(ids):
    with pytest.raises(ValueError, match=r"group_ids: expected ids in \[0, 2\)"):
        group_center(jnp.asarray([1.0, 0.0]), jnp.asarray(ids))
    at_hand = jnp.asarray(ids)
    closed_over = jax.jit(lambda rewards: group_center(rewards, at_hand))
    with pytest.raises(ValueError, match=r"group_ids: expected ids in \[0, 2\)"):
        closed_over(jnp.asarray([1.0, 0.0]))
