"""Which groups teach anything, which of them are chosen, and metrics by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltal_jax.training.groups import choose, informative, reward_metrics, rows_of


def test_a_group_is_informative_where_what_is_known_of_it_differs():
    nan = float("nan")
    rewards = np.asarray([[0, 0, 0], [0, 1, 0], [nan, 1, 1], [nan, 0, 1], [nan] * 3], np.float32)
    rewards = rewards.reshape(-1)
    good = informative(rewards, ~np.isnan(rewards), 3)
    assert good.tolist() == [False, True, False, True, False]
    correct = np.asarray([[1, 0, 0], [0, 0, 0], [1, 0, 0], [0, 0, 1], [1, 0, 1]], bool)
    good = informative(correct, ~np.isnan(rewards), 3)  # those without a reward are not trained
    assert good.tolist() == [True, False, False, True, False]


@given(st.lists(st.booleans(), min_size=1, max_size=12), st.integers(1, 12))
def test_chosen_are_the_first_good_ones_and_then_the_first_others(good, wanted):
    wanted = min(wanted, len(good))
    order = sorted(range(len(good)), key=lambda i: (not good[i], i))
    chosen = choose(np.asarray(good), wanted)
    assert chosen.tolist() == sorted(order[:wanted])
    np.testing.assert_array_equal(
        rows_of(chosen, 2).reshape(-1, 2), np.stack([chosen * 2, chosen * 2 + 1], axis=1)
    )


def test_reward_metrics_by_hand():
    rewards = np.asarray([0, 0, 1, 1, 0, 1, np.nan, 0], np.float32)
    correct = np.nan_to_num(rewards) > 0
    metrics = reward_metrics(rewards, correct, {"task": rewards}, np.repeat(np.arange(4), 2))
    assert metrics["reward/mean"] == pytest.approx(3 / 7)
    assert metrics["accuracy/mean"] == pytest.approx(3 / 8)
    assert metrics["reward/frac_zero_std"] == pytest.approx(3 / 4)
    assert metrics["reward/frac_all_zero"] == pytest.approx(2 / 4)
    assert metrics["reward/frac_all_one"] == pytest.approx(1 / 4)
