"""Importance corrections by hand, at, inside and outside their thresholds."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltal_jax.objective.correction import (
    CORRECTIONS,
    none,
    sequence_mask,
    token_mask,
    token_truncate,
)
from deltal_jax.training.buckets import make_buckets
from tests import fakes

#: Ratios of trainer to sampler, around the thresholds 1/2 and 2.
RATIOS = np.asarray([[0.1, 0.499, 0.501, 0.75, 1.0, 1.5, 1.999, 2.001, 8.0]])
TRUNCATED = [[0.1, 0.499, 0.501, 0.75, 1.0, 1.5, 1.999, 2.0, 2.0]]
MASKED = [[0.0, 0.0, 0.501, 0.75, 1.0, 1.5, 1.999, 0.0, 0.0]]


def one_row(mask):
    """Every token of one response."""
    ids = jnp.zeros(mask.shape, jnp.int32)
    return {"segment_ids": ids, "mask": jnp.asarray(mask), "num_segments": 1}


def by_ratio(correction, ratios, **options):
    """The correction of tokens whose sampler gave −2, in float64."""
    with jax.enable_x64(True):
        sampler = jnp.full(np.shape(ratios), -2.0)
        return np.asarray(correction(sampler + jnp.log(jnp.asarray(ratios)), sampler, **options))


def test_none_is_one_whatever_the_difference():
    np.testing.assert_array_equal(by_ratio(none, RATIOS), np.ones(RATIOS.shape))


@pytest.mark.parametrize(
    ("correction", "want"), [(token_truncate, TRUNCATED), (token_mask, MASKED)]
)
def test_token_corrections_by_hand(correction, want):
    np.testing.assert_allclose(by_ratio(correction, RATIOS), want, rtol=1e-12)
    np.testing.assert_allclose(by_ratio(correction, RATIOS, threshold=2.0), want, rtol=1e-12)
    wide = by_ratio(correction, RATIOS, threshold=10.5)
    np.testing.assert_allclose(wide, RATIOS, rtol=1e-12)


def test_a_ratio_at_the_threshold_passes_and_one_bit_beyond_does_not():
    with jax.enable_x64(True):
        old, sampler = jnp.asarray([[math.log(2.0)]]), jnp.zeros((1, 1))
        ratio = float(jnp.exp(old)[0, 0])
        assert float(token_mask(old, sampler, threshold=ratio)[0, 0]) == ratio
        below = math.nextafter(ratio, 0.0)
        assert float(token_mask(old, sampler, threshold=below)[0, 0]) == 0.0
        assert float(token_truncate(old, sampler, threshold=below)[0, 0]) == below


@pytest.mark.parametrize(
    ("ratios", "threshold", "kept"),
    [
        ([8.0, 0.5, 0.5], 2.0, True),  # geometric mean 2^(1/3)
        ([8.0, 4.0, 0.5], 2.0, False),  # 2^(4/3) = 2.52
        ([8.0, 4.0, 0.5], 2.6, True),
        ([0.125, 1.0, 0.5], 2.0, False),  # 1/2.52
        ([0.125, 1.0, 0.5], 2.6, True),
        ([1.99, 1.99, 1.99], 2.0, True),
        ([0.51, 0.51, 0.51], 2.0, True),
        ([2.01, 2.01, 2.01], 2.0, False),
        ([0.49, 0.49, 0.49], 2.0, False),
    ],
)
def test_sequence_mask_by_hand(ratios, threshold, kept):
    """All tokens of a response keep their own ratios, or none does."""
    response = one_row(np.ones((1, 3), bool))
    found = by_ratio(sequence_mask, [ratios], threshold=threshold, **response)
    np.testing.assert_allclose(found, [np.asarray(ratios) * kept], rtol=1e-12)
    if threshold == 2.0:
        np.testing.assert_array_equal(by_ratio(sequence_mask, [ratios], **response), found)


def test_sequence_mask_takes_its_mean_over_the_masked_tokens_alone():
    mask = np.asarray([[True, False, True, False]])
    ratios = [[1.5, 1e6, 0.75, np.nan]]
    found = by_ratio(sequence_mask, ratios, **one_row(mask))
    np.testing.assert_allclose(found[mask], [1.5, 0.75], rtol=1e-12)
    emptied = by_ratio(sequence_mask, ratios, **one_row(np.zeros((1, 4), bool)))
    assert np.all(np.isfinite(emptied[0, :3]))


def test_sequence_mask_decides_the_same_for_whole_responses_padded_or_packed():
    count = 24
    rollout = fakes.rollout(count)
    rng = np.random.default_rng(1)
    shift = rng.normal(0.0, 1.0, (count, 1)) + rng.normal(0.0, 0.5, rollout.logprobs.shape)
    old = np.where(rollout.loss_mask, rollout.logprobs + shift, 0.0).astype(np.float32)
    differences = [
        (old[i] - rollout.logprobs[i])[rollout.loss_mask[i]].astype(float) for i in range(count)
    ]
    means = np.exp([d.mean() for d in differences])
    assert np.all(np.abs(np.abs(np.log(means)) - np.log(2.0)) > 1e-4), "none is at the threshold"
    kept = (means >= 0.5) & (means <= 2.0)
    assert 4 < kept.sum() < count - 4
    apply = jax.jit(sequence_mask, static_argnames="num_segments")
    for pack in (False, True):
        found = np.zeros(rollout.loss_mask.shape)
        for bucket in make_buckets(
            rollout,
            np.arange(count),
            advantages=np.ones(count, np.float32),
            weights=np.ones(count, np.float32),
            old_logprobs=old,
            edges=(12, 30),
            tokens_per_microbatch=60,
            pack=pack,
        ):
            factors = apply(
                bucket.old_logprobs,
                bucket.sampler_logprobs,
                segment_ids=bucket.segment_ids,
                mask=bucket.loss_mask,
                num_segments=count,
            )
            mask = np.asarray(bucket.loss_mask)
            at = np.asarray(bucket.segment_ids)[mask], np.asarray(bucket.positions)[mask]
            found[at] = np.asarray(factors)[mask]
        for i in range(count):
            want = np.exp(differences[i]) * kept[i]
            np.testing.assert_allclose(found[i][rollout.loss_mask[i]], want, rtol=1e-5)


def bound(name, shape, threshold=2.0):
    """A correction with what it needs beside the two log-probabilities, one response a row."""
    if name == "none":
        return none
    options = {"threshold": threshold}
    if name == "sequence_mask":
        rows = jnp.broadcast_to(jnp.arange(shape[0])[:, None], shape)
        options |= {"segment_ids": rows, "mask": jnp.ones(shape, bool), "num_segments": shape[0]}
    return functools.partial(CORRECTIONS[name], **options)


@pytest.mark.parametrize("name", CORRECTIONS)
def test_nothing_flows_back_through_a_correction(name):
    draws = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 7)) * 0.5)

    def total(old, sampler):
        return jnp.sum(bound(name, (3, 7))(old, sampler))

    assert float(total(*draws)) > 0
    for gradient in jax.grad(total, argnums=(0, 1))(*draws):
        np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("name", CORRECTIONS)
@pytest.mark.parametrize("threshold", [1.0, 2.0])
def test_a_sampler_that_agrees_needs_no_correction_at_all(name, threshold):
    logprobs = jnp.asarray(np.random.default_rng(0).normal(-3, 2, (4, 9)), jnp.float32)
    found = bound(name, (4, 9), threshold)(logprobs, logprobs)
    np.testing.assert_array_equal(found, 1.0)


@pytest.mark.parametrize("name", CORRECTIONS)
@given(
    st.lists(st.floats(-100, 100, width=32), min_size=6, max_size=6),
    st.floats(1.0, 1e4, width=32),
)
def test_any_difference_gives_a_finite_factor_within_the_bound(name, differences, threshold):
    old = jnp.asarray(differences, jnp.float32).reshape(2, 3)
    found = np.asarray(bound(name, (2, 3), threshold)(old, jnp.zeros_like(old)))
    assert np.all(np.isfinite(found)) and np.all(found >= 0)
    assert name == "sequence_mask" or np.all(found <= threshold * (1 + 1e-6))
    if name == "sequence_mask":
        assert np.all(found <= np.exp(np.float32(20)) * (1 + 1e-6))
