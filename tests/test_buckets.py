"""Bucketing moves tokens about and changes nothing else."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltal_jax.config import Config, RolloutConfig
from deltal_jax.training.buckets import (
    MICROBATCH_OVERHEAD,
    ROW_FRACTIONS,
    bucket_layout,
    bucket_rows,
    make_buckets,
    make_minibatches,
    pad_width,
    padding_fraction,
)
from tests import fakes

LONGEST = 30
EDGES = st.lists(st.integers(1, LONGEST - 1), max_size=4).map(
    lambda xs: tuple(sorted({*xs, LONGEST}))
)
LENGTHS = st.lists(st.integers(1, LONGEST), min_size=1, max_size=40)
BUDGETS = st.integers(1, 300)
MULTIPLES = st.sampled_from([1, 2, 3, 4, 8])


def shapes(edges, budget, multiple) -> set[tuple[int, int]]:
    """(rows, width) that a micro-batch may have: a full one or a fraction, in whole multiples."""
    allowed = set()
    for width in edges:
        full = max(budget // width // multiple * multiple, multiple)
        allowed |= {(max(full // n // multiple * multiple, multiple), width) for n in ROW_FRACTIONS}
    return allowed


def computed(layout) -> int:
    return sum(batch.rows * batch.width for batch in layout)


@given(LENGTHS, EDGES, BUDGETS, MULTIPLES, st.booleans())
def test_every_response_is_in_one_row_that_holds_it(lengths, edges, budget, multiple, pack):
    layout = bucket_layout(np.asarray(lengths), edges, budget, pack=pack, row_multiple=multiple)
    seen = [index for batch in layout for row in batch.members for index in row]
    assert sorted(seen) == list(range(len(lengths)))
    for batch in layout:
        assert (batch.rows, batch.width) in shapes(edges, budget, multiple)
        assert batch.rows % multiple == 0
        assert 1 <= len(batch.members) <= batch.rows
        for row in batch.members:
            assert row and sum(lengths[index] for index in row) <= batch.width
            assert pack or len(row) == 1
    fills = [
        sum(lengths[index] for index in row) for batch in reversed(layout) for row in batch.members
    ]
    assert fills == sorted(fills, reverse=True), "micro-batches are ordered, shortest first"


def partitions(items: list[int]):
    """Every way to part a list into groups."""
    if not items:
        yield []
        return
    first, *rest = items
    for groups in partitions(rest):
        yield [[first], *groups]
        for at in range(len(groups)):
            yield [*groups[:at], [first, *groups[at]], *groups[at + 1 :]]


@given(st.lists(st.integers(1, LONGEST), min_size=1, max_size=6), EDGES, BUDGETS, MULTIPLES)
@settings(max_examples=100)
def test_no_layout_at_all_costs_less(lengths, edges, budget, multiple):
    """Against brute force over every way to part the responses and every shape of each part."""
    allowed, overhead = shapes(edges, budget, multiple), MICROBATCH_OVERHEAD * budget

    def cheapest(part: list[int]) -> float:
        fitting = [r * w for r, w in allowed if r >= len(part) and w >= max(part)]
        return min(fitting, default=np.inf) + overhead

    best = min(sum(cheapest(part) for part in parts) for parts in partitions(lengths))
    layout = bucket_layout(np.asarray(lengths), edges, budget, row_multiple=multiple)
    assert computed(layout) + overhead * len(layout) == pytest.approx(best, rel=1e-12)


@given(LENGTHS, EDGES, BUDGETS, MULTIPLES)
@settings(max_examples=200)
def test_no_more_is_computed_than_with_full_microbatches_of_each_edge(
    lengths, edges, budget, multiple
):
    plain, low = 0, 0
    for width in edges:
        rows = bucket_rows(width, budget, multiple)
        here = sum(low < length <= width for length in lengths)
        plain += -(-here // rows) * rows * width
        low = width
    assert computed(bucket_layout(np.asarray(lengths), edges, budget, row_multiple=multiple)) <= (
        plain
    )


@given(LENGTHS, EDGES, BUDGETS, MULTIPLES)
@settings(max_examples=200)
def test_packed_rows_of_one_width_are_half_full_and_no_two_of_them_fit_into_one(
    lengths, edges, budget, multiple
):
    width = min(edge for edge in edges if edge >= max(lengths))
    edges = tuple(edge for edge in edges if edge >= width)
    layout = bucket_layout(np.asarray(lengths), edges, budget, pack=True, row_multiple=multiple)
    fills = sorted(sum(lengths[i] for i in row) for batch in layout for row in batch.members)
    assert fills[-1] <= width
    assert len(fills) == 1 or fills[0] + fills[1] > width
    # So at most one row is under half full, and only the last micro-batch has empty rows.
    assert computed(layout) <= 2 * sum(lengths) + width + max(budget, width * multiple)


@given(LENGTHS, EDGES, BUDGETS, MULTIPLES, st.sampled_from([0.0, 0.01, 1.0]))
@settings(max_examples=200)
def test_narrower_rows_are_taken_only_where_they_are_less_work(
    lengths, edges, budget, multiple, attention
):
    def work(edges):
        options = {"pack": True, "row_multiple": multiple, "attention": attention}
        layout = bucket_layout(np.asarray(lengths), edges, budget, **options)
        found = sum(b.rows * b.width * (1 + attention * b.width) for b in layout)
        return found + MICROBATCH_OVERHEAD * budget * len(layout)

    width = min(edge for edge in edges if edge >= max(lengths))
    assert work(edges) <= work(tuple(edge for edge in edges if edge >= width)) + 1e-9


def test_attention_makes_wide_rows_dear():
    lengths, edges = np.asarray([40] + [13] * 6), (20, 40)
    free = bucket_layout(lengths, edges, 40, pack=True)
    assert [(b.rows, b.width) for b in free] == [(1, 40)] * 3
    dear = bucket_layout(lengths, edges, 40, pack=True, attention=0.1)
    assert [(b.rows, b.width) for b in dear] == [(2, 20)] * 3 + [(1, 40)]


def test_packing_wastes_under_a_twelfth_of_a_batch_of_very_different_lengths():
    """Log-normal lengths in the default buckets, at many times the budget of a micro-batch."""
    rollout = RolloutConfig(max_prompt_length=128, max_response_length=896)
    edges = dataclasses.replace(Config(), rollout=rollout).bucket_edges
    for seed in range(5):
        draws = np.random.default_rng(seed).lognormal(np.log(170), 0.8, 512)
        lengths = np.clip(draws, 8, 1024).astype(int)
        waste = [
            1 - lengths.sum() / computed(bucket_layout(lengths, edges, 4096, pack=pack))
            for pack in (False, True)
        ]
        assert waste[0] < 0.15
        assert waste[1] < 0.03


@given(st.permutations(range(12)), st.integers(0, 5), EDGES, BUDGETS, st.booleans())
def test_the_order_of_the_responses_changes_nothing_but_ties(order, seed, edges, budget, pack):
    lengths = np.random.default_rng(seed).integers(1, LONGEST + 1, 12)

    def by_length(lengths):
        layout = bucket_layout(lengths, edges, budget, pack=pack)
        rows = [[[int(lengths[i]) for i in row] for row in batch.members] for batch in layout]
        return [(batch.rows, batch.width) for batch in layout], rows

    assert by_length(lengths) == by_length(lengths[list(order)])
    first, again = (bucket_layout(lengths, edges, budget, pack=pack) for _ in range(2))
    assert first == again


@pytest.mark.parametrize("pack", [False, True])
def test_layouts_of_one_response_of_equal_ones_and_of_a_giant_by_hand(pack):
    def layout(lengths, edges, budget, **options):
        found = bucket_layout(np.asarray(lengths), edges, budget, pack=pack, **options)
        return [(batch.rows, batch.width, batch.members) for batch in found]

    assert layout([], (8,), 64) == []
    assert layout([5], (8, 16), 64) == [(2, 8, [[0]])]  # a quarter of eight rows
    assert layout([5], (8, 16), 64, row_multiple=4) == [(4, 8, [[0]])]
    assert layout([16] * 5, (8, 16), 64) == [(4, 16, [[1], [2], [3], [4]]), (1, 16, [[0]])]
    assert layout([9, 9, 9], (8, 16), 1) == [(1, 16, [[2]]), (1, 16, [[1]]), (1, 16, [[0]])]
    # Packed or not: the short ones together would need a row of the giant's width.
    assert layout([2, 100, 2], (2, 100), 8) == [(2, 2, [[0], [2]]), (1, 100, [[1]])]


def bucketed(rollout, edges, budget, indices=None, **options):
    count = len(rollout.lengths)
    return make_buckets(
        rollout,
        np.arange(count) if indices is None else indices,
        advantages=np.arange(count, dtype=np.float32),
        weights=np.arange(1, count + 1, dtype=np.float32),
        auxiliary_weights=np.arange(2, count + 2, dtype=np.float32),
        old_logprobs=rollout.logprobs - 1.0,
        reference_logprobs=rollout.logprobs - 2.0,
        edges=edges,
        tokens_per_microbatch=budget,
        **options,
    )


@given(EDGES, BUDGETS, st.integers(1, 13), st.integers(0, 5), MULTIPLES, st.booleans(), st.data())
def test_every_token_is_where_its_segment_and_position_say(
    edges, budget, count, seed, multiple, pack, data
):
    rollout = fakes.rollout(count, seed=seed)
    chosen = data.draw(st.sets(st.integers(0, count - 1), min_size=1))
    chosen = np.asarray(sorted(chosen))
    per_token = {
        "tokens": rollout.tokens,
        "loss_mask": rollout.loss_mask,
        "sampler_logprobs": rollout.logprobs,
        "old_logprobs": rollout.logprobs - 1.0,
        "reference_logprobs": rollout.logprobs - 2.0,
    }
    found = np.zeros(rollout.tokens.shape, int)
    for bucket in bucketed(rollout, edges, budget, chosen, pack=pack, row_multiple=multiple):
        bucket = jax.tree.map(np.asarray, bucket)
        assert bucket.tokens.shape in shapes(edges, budget, multiple)
        real = bucket.segment_ids < count
        assert np.all(bucket.segment_ids[~real] == count)
        assert not np.any(bucket.loss_mask[~real])
        segments, positions = bucket.segment_ids[real], bucket.positions[real]
        found[segments, positions] += 1
        for name, values in per_token.items():
            np.testing.assert_array_equal(getattr(bucket, name)[real], values[segments, positions])
        # Each response is one run of consecutive positions from 0, in one row.
        columns = np.where(real)[1]
        np.testing.assert_array_equal(np.diff(columns)[positions[1:] > 0], 1)
        assert np.all(np.diff(segments)[positions[1:] > 0] == 0)
        # The arrays over responses are the rollout's own, whatever the bucket holds.
        np.testing.assert_array_equal(bucket.advantages, np.arange(count))
        np.testing.assert_array_equal(bucket.weights, np.arange(1, count + 1))
        np.testing.assert_array_equal(bucket.auxiliary_weights, np.arange(2, count + 2))
    want = np.arange(rollout.tokens.shape[1])[None, :] < rollout.lengths[:, None]
    want[np.setdiff1d(np.arange(count), chosen)] = False
    np.testing.assert_array_equal(found, want)


def test_what_is_not_given_has_its_default():
    rollout = fakes.rollout(3)
    (bucket,) = make_buckets(
        rollout,
        np.arange(3),
        advantages=np.ones(3, np.float32),
        weights=np.asarray([1.0, 2.0, 3.0], np.float32),
        edges=(30,),
        tokens_per_microbatch=90,
    )
    np.testing.assert_array_equal(bucket.auxiliary_weights, bucket.weights)
    np.testing.assert_array_equal(bucket.old_logprobs, bucket.sampler_logprobs)
    assert np.any(np.asarray(bucket.sampler_logprobs) != 0)
    assert bucket.reference_logprobs is None


@pytest.mark.parametrize(("pack", "fraction"), [(False, 1 - 17 / 24), (True, 1 - 17 / 20)])
def test_padding_fraction_by_hand(pack, fraction):
    """9 | 5 | 3 of 10, 10 and 4 tokens, a row each; or packed 9 | 5 + 3 of 10 each."""
    lengths = np.asarray([3, 9, 5], np.int32)
    rollout = dataclasses.replace(fakes.rollout(3), lengths=lengths)
    buckets = bucketed(rollout, (4, 10), 10, pack=pack)
    assert padding_fraction(buckets) == pytest.approx(fraction)


def test_padding_fraction_counts_tokens_of_no_response():
    rollout = fakes.rollout(9)
    buckets = bucketed(rollout, (8, 30), 60)
    total = sum(b.tokens.size for b in buckets)
    assert padding_fraction(buckets) == pytest.approx(1 - rollout.lengths.sum() / total)


def test_rows_of_a_full_microbatch():
    assert [bucket_rows(10, 64), bucket_rows(10, 9), bucket_rows(16, 64)] == [6, 1, 4]
    assert [bucket_rows(10, 64, 4), bucket_rows(10, 39, 4), bucket_rows(10, 1, 4)] == [4, 4, 4]


@pytest.mark.parametrize("pack", [False, True])
def test_a_row_that_fits_no_edge_is_refused(pack):
    with pytest.raises(ValueError, match=r"a row of \d+ tokens fits no bucket of \(4, 6\)"):
        bucketed(fakes.rollout(12), (4, 6), 100, pack=pack)


@pytest.mark.parametrize("pack", [False, True])
def test_minibatch_weights_carry_the_factor_of_the_batch(pack):
    rollout = fakes.rollout(12)
    ids = np.repeat([0, 1, 2], [6, 4, 2])
    weights = np.linspace(1, 2, 12, dtype=np.float32)
    minibatches = make_minibatches(
        rollout,
        ids,
        advantages=np.ones(12, np.float32),
        weights=weights,
        auxiliary_weights=3 * weights,
        edges=(30,),
        tokens_per_microbatch=90,
        pack=pack,
    )
    assert len(minibatches) == 3
    for number, buckets in enumerate(minibatches):
        for bucket in buckets:
            want = weights * 12 / (ids == number).sum()
            np.testing.assert_allclose(bucket.weights, want, rtol=1e-6)
            np.testing.assert_allclose(bucket.auxiliary_weights, 3 * want, rtol=1e-6)
        held = np.unique(np.concatenate([np.ravel(b.segment_ids) for b in buckets]))
        assert sorted({*held.tolist()} - {12}) == np.flatnonzero(ids == number).tolist()
    old = np.concatenate([np.asarray(b.old_logprobs).ravel() for bs in minibatches for b in bs])
    assert np.isclose(old.sum(), rollout.logprobs.sum(), atol=1e-4)


def test_padded_rows_have_the_same_tokens_and_more_padding():
    rollout = fakes.rollout(5)
    (bucket,) = bucketed(rollout, (30,), 150)
    assert pad_width(bucket, 6) is bucket
    wide = pad_width(bucket, 8)
    for field in dataclasses.fields(bucket):
        before, after = getattr(bucket, field.name), getattr(wide, field.name)
        if before is None or before.ndim == 1:
            assert after is before
            continue
        assert after.shape == (5, 32) and after.dtype == before.dtype
        np.testing.assert_array_equal(after[:, :30], before)
        np.testing.assert_array_equal(after[:, 30:], 5 if field.name == "segment_ids" else 0)
