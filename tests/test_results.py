"""Responses apart and together, and as a rollout."""

import jax
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from deltal_jax.rollout.results import Written, assemble, join, merge, take
from deltal_jax.rollout.slots import Counts
from tests import fakes
from tests.test_pools import responses


@given(
    count=st.integers(2, 6),
    samples=st.integers(1, 3),
    cut=st.integers(0, 6),
    seed=st.integers(0, 20),
)
def test_what_is_taken_apart_joins_to_the_same(count, samples, cut, seed):
    whole = responses(count, samples, seed)
    numbers = np.arange(count)
    parts = take(whole, numbers[:cut]), take(whole, numbers[cut:])
    assert all((part.group_ids[:1] == 0).all() for part in parts)
    jax.tree.map(np.testing.assert_array_equal, join(*parts), whole)


def test_groups_are_taken_in_the_order_that_is_asked_for():
    whole = responses(4, 2, seed=1)
    part = take(whole, np.asarray([2, 0]))
    np.testing.assert_array_equal(part.group_ids, [0, 0, 1, 1])
    np.testing.assert_array_equal(part.keys, whole.keys[[4, 5, 0, 1]])
    np.testing.assert_array_equal(part.prompts.positions, [2, 0])


def test_new_tokens_follow_the_old_ones_and_change_nothing_else():
    before = responses(3, 2, seed=5)
    open_ = np.flatnonzero(~before.finished)
    rows = np.asarray([open_[1], -1, open_[0]])
    grown = before.lengths[rows[0]] + 1
    written = Written(
        tokens=np.full((3, 7), 9, np.int32),
        logprobs=np.full((3, 7), -0.5, np.float32),
        raw_logprobs=None,
        lengths=np.asarray([grown, 4, 0], np.int32),
        ended=np.asarray([True, True, True]),
        counts=Counts(*np.zeros((4, 1), np.int32)),
    )
    after = merge(before, rows, written)
    changed = np.zeros_like(before.tokens, bool)
    changed[rows[0], grown - 1 :] = True
    np.testing.assert_array_equal(after.tokens, np.where(changed, 9, before.tokens))
    np.testing.assert_array_equal(after.logprobs[~changed], before.logprobs[~changed])
    assert after.lengths[rows[0]] == grown and after.ended[rows[0]]
    others = np.arange(6) != rows[0]
    np.testing.assert_array_equal(after.lengths[others], before.lengths[others])
    np.testing.assert_array_equal(after.ended[others], before.ended[others])


def test_a_rollout_has_prompt_and_response_side_by_side():
    given_ = responses(5, 2, seed=2)
    rollout = assemble(given_)
    for row in range(10):
        prompt = given_.group_ids[row]
        length, count = given_.prompts.lengths[prompt], given_.lengths[row]
        want = [*given_.prompts.tokens[prompt, :length], *given_.tokens[row, :count]]
        assert rollout.lengths[row] == len(want) == length + count
        assert rollout.tokens[row, : len(want)].tolist() == want
        assert not rollout.tokens[row, len(want) :].any()
        assert rollout.loss_mask[row].nonzero()[0].tolist() == list(range(length, len(want)))
        np.testing.assert_array_equal(
            rollout.logprobs[row][rollout.loss_mask[row]], given_.logprobs[row, :count]
        )
    assert fakes.prompts(5, seed=2).lengths.tolist() == given_.prompts.lengths.tolist()
