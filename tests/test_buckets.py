"""Bucketing moves tokens about and changes nothing else."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltal_jax.training.buckets import (
    bucket_rows,
    make_buckets,
    make_minibatches,
    padding_fraction,
)
from tests import fakes

EDGES = st.lists(st.integers(4, 29), max_size=4).map(lambda xs: tuple(sorted({*xs, 30})))


def bucketed(rollout, edges, budget, indices=None):
    count = len(rollout.lengths)
    return make_buckets(
        rollout,
        np.arange(count) if indices is None else indices,
        advantages=np.arange(count, dtype=np.float32),
        weights=np.arange(1, count + 1, dtype=np.float32),
        old_logprobs=rollout.logprobs - 1.0,
        edges=edges,
        tokens_per_microbatch=budget,
    )


@given(EDGES, st.integers(1, 200), st.integers(1, 13), st.integers(0, 5))
@settings(max_examples=15)
def test_every_response_is_in_exactly_one_row_as_it_was(edges, budget, count, seed):
    rollout = fakes.rollout(count, seed=seed)
    found = {}
    for bucket in bucketed(rollout, edges, budget):
        bucket = jax.tree.map(np.asarray, bucket)
        rows, width = bucket.tokens.shape
        assert width in edges and rows == bucket_rows(width, budget)
        for row in range(rows):
            index = round(float(bucket.weights[row])) - 1
            if index < 0:
                assert not np.any(bucket.loss_mask[row])
                assert np.all(bucket.segment_ids[row] == rows)
                continue
            assert index not in found
            found[index] = True
            length = rollout.lengths[index]
            assert length <= width
            smaller = [edge for edge in edges if edge < width]
            assert not smaller or length > smaller[-1]
            np.testing.assert_array_equal(
                bucket.tokens[row, :length], rollout.tokens[index, :length]
            )
            mask = np.asarray(bucket.loss_mask[row])
            np.testing.assert_array_equal(mask[:length], rollout.loss_mask[index, :length])
            assert not mask[length:].any()
            np.testing.assert_array_equal(
                np.asarray(bucket.sampler_logprobs[row])[mask],
                rollout.logprobs[index][rollout.loss_mask[index]],
            )
            np.testing.assert_array_equal(bucket.segment_ids[row, :length], row)
            assert np.all(bucket.segment_ids[row, length:] == rows)
            assert bucket.advantages[row] == index
    assert len(found) == count


def test_padding_fraction_counts_tokens_of_no_response():
    rollout = fakes.rollout(9)
    buckets = bucketed(rollout, (8, 30), 60)
    computed = sum(b.tokens.size for b in buckets)
    assert padding_fraction(buckets) == pytest.approx(1 - rollout.lengths.sum() / computed)


def test_a_row_that_fits_no_edge_is_refused():
    with pytest.raises(ValueError, match="fits no bucket"):
        bucketed(fakes.rollout(12), (4, 6), 100)


def test_minibatch_weights_carry_the_factor_of_the_batch():
    rollout = fakes.rollout(12)
    ids = np.repeat([0, 1, 2], [6, 4, 2])
    weights = np.linspace(1, 2, 12, dtype=np.float32)
    minibatches = make_minibatches(
        rollout,
        ids,
        advantages=np.ones(12, np.float32),
        weights=weights,
        edges=(30,),
        tokens_per_microbatch=90,
    )
    totals = [sum(float(b.weights.sum()) for b in buckets) for buckets in minibatches]
    want = [weights[ids == k].sum() * 12 / (ids == k).sum() for k in range(3)]
    np.testing.assert_allclose(totals, want, rtol=1e-6)
    old = np.concatenate([np.asarray(b.old_logprobs).ravel() for bs in minibatches for b in bs])
    assert np.isclose(old.sum(), rollout.logprobs.sum(), atol=1e-4)
