"""Laws of the update: gradients add, whatever the split, and an update does what it says."""

import dataclasses
import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltal_jax.config import SCOPED
from deltal_jax.objective.advantages import group_standardize
from deltal_jax.objective.aggregation import AGGREGATIONS
from deltal_jax.objective.divergence import kl_k2
from deltal_jax.objective.logprobs import token_logprobs
from deltal_jax.objective.surrogate import SURROGATES, clipped, ratio_diagnostics
from deltal_jax.training.buckets import make_buckets, make_minibatches
from deltal_jax.training.loss import SUPERVISED, LossTerms, microbatch_loss
from deltal_jax.training.step import Update
from tests import fakes

COUNT = 24
CLIPS = {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": 3.0}
#: (edges, tokens of a micro-batch, packed)
LAYOUTS = [((30,), 720, False), ((12, 30), 36, False), ((30,), 60, True), ((30,), 30, True)]


def _clipped(logprobs, advantages, bucket):
    return clipped(logprobs, bucket.old_logprobs, advantages, **CLIPS)


def _clip_meter(logprobs, advantages, bucket):
    return ratio_diagnostics(logprobs, bucket.old_logprobs, advantages, **CLIPS)


TERMS = LossTerms(_clipped, _clip_meter)


@pytest.fixture(scope="module")
def update():
    return Update(fakes.model(fakes.PLAIN)[0], optax.sgd(0.1), TERMS)


@functools.cache
def batch(seed=0):
    rollout = fakes.rollout(COUNT, seed=seed)
    rewards = np.random.default_rng(seed).random(COUNT) < 0.5
    advantages = group_standardize(
        jnp.asarray(rewards, jnp.float32), jnp.asarray(rollout.group_ids)
    )
    return rollout, np.asarray(advantages)


def buckets_of(layout, weights, seed=0):
    rollout, advantages = batch(seed)
    edges, budget, pack = layout
    return make_buckets(
        rollout,
        np.arange(COUNT),
        advantages=advantages,
        weights=weights,
        edges=edges,
        tokens_per_microbatch=budget,
        pack=pack,
    )


def weights_of(name, scope=None, seed=0, dtype=None):
    rollout, advantages = batch(seed)
    groups = jnp.asarray(rollout.group_ids)
    offered = {
        "scope_ids": {None: None, "group": groups, "minibatch": groups // 3}[scope],
        "group_ids": groups,
        "microbatch_ids": jnp.arange(COUNT) // 4,
        "advantages": jnp.asarray(advantages, dtype),
        "variance": {"rho": jnp.asarray([0.3, 0.1])},
    }
    taken = inspect.signature(AGGREGATIONS[name]).parameters
    lengths = jnp.asarray(rollout.response_lengths, dtype)
    options = {k: v for k, v in offered.items() if k in taken}
    return np.asarray(AGGREGATIONS[name](lengths, **options))


def plain_loss(params, weights, seed=0):
    """The same loss without buckets or segments: a loop over responses."""
    rollout, advantages = batch(seed)
    logits = jnp.asarray(fakes.forward(fakes.PLAIN, params, rollout.tokens))
    logprobs = np.asarray(token_logprobs(logits[:, :-1], jnp.asarray(rollout.tokens[:, 1:]))[0])
    total, size = 0.0, 0.0
    for i in range(COUNT):
        mask = rollout.loss_mask[i, 1:]
        new, old = logprobs[i][mask].astype(float), rollout.logprobs[i, 1:][mask]
        ratio = np.exp(new - old)
        loss = np.maximum(-advantages[i] * ratio, -advantages[i] * np.clip(ratio, 0.8, 1.3))
        if advantages[i] < 0:
            loss = np.minimum(loss, -advantages[i] * 3.0)
        total += weights[i] * loss.sum()
        size += abs(weights[i] * loss).sum()
    return total, size


def test_the_loss_is_the_sum_over_responses_in_every_layout(update):
    params = fakes.model(fakes.PLAIN)[1]
    weights = weights_of("delta_l")
    want, size = plain_loss(params, weights)
    for layout in LAYOUTS:
        got = update.accumulate(params, buckets_of(layout, weights))
        assert float(got.loss) == pytest.approx(want, abs=2e-6 * size)


@functools.cache
def any_surrogate(dtype):
    """The parameters, and of a bucket under the surrogate of a given number the loss with its
    gradient, and Σ |w ℓ|: one program for all surrogates.

    KL and entropy terms take part, so that the auxiliary weights are under the same law.
    """
    graphdef, params = fakes.model(fakes.SHALLOW)
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)

    def branch(surrogate, logprobs, advantages, bucket):
        options = {}
        if "segment_ids" in inspect.signature(surrogate).parameters:
            options = {"segment_ids": bucket.segment_ids, "mask": bucket.loss_mask}
            options["num_segments"] = COUNT
        return surrogate(logprobs, bucket.old_logprobs, advantages, **options)

    branches = [functools.partial(branch, surrogate) for surrogate in SURROGATES.values()]

    def loss(params, bucket, number, absolute=False):
        def token_loss(*arguments):
            values = jax.lax.switch(number, branches, *arguments)
            return jnp.abs(values) if absolute else values

        terms = LossTerms(
            token_loss,
            divergence=kl_k2,
            kl_coefficient=0.3,
            entropy_coefficient=-0.2 if absolute else 0.2,
        )
        return microbatch_loss(graphdef, params, bucket, terms)[0]

    size = jax.jit(functools.partial(loss, absolute=True))
    return params, jax.jit(jax.value_and_grad(loss)), size


def first_half(layout, name, scope, seed, dtype):
    """The micro-batches of the first of two mini-batches."""
    rollout, advantages = batch(seed)
    edges, budget, pack = layout
    rollout = dataclasses.replace(rollout, logprobs=rollout.logprobs.astype(dtype))
    return make_minibatches(
        rollout,
        rollout.group_ids // 3,
        advantages=advantages.astype(dtype),
        weights=weights_of(name, scope, seed, dtype),
        auxiliary_weights=weights_of("token_mean", None, seed, dtype),
        reference_logprobs=rollout.logprobs + dtype(0.1),
        edges=edges,
        tokens_per_microbatch=budget,
        pack=pack,
    )[0]


def summed(buckets, number, dtype):
    """Loss and gradient, added up in float64."""
    params, gradient, _ = any_surrogate(dtype)
    losses, grads = zip(*(gradient(params, bucket, number) for bucket in buckets), strict=True)
    flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in grads]
    return np.sum(losses, dtype=np.float64), np.sum(flat, axis=0, dtype=np.float64)


def agree(layout, name, scope, number, seed, dtype, loss_tolerance, tolerance):
    scope = scope if name in SCOPED else None
    (whole,) = first_half(LAYOUTS[0], name, scope, seed, dtype)
    params, _, size_of = any_surrogate(dtype)
    size = float(size_of(params, whole, number))
    want, gradient = summed([whole], number, dtype)
    loss, other = summed(first_half(layout, name, scope, seed, dtype), number, dtype)
    assert abs(loss - want) <= loss_tolerance * size
    assert np.linalg.norm(other - gradient) <= tolerance * np.linalg.norm(gradient)
    assert np.linalg.norm(gradient) > 0


COMBINATIONS = (
    st.sampled_from(LAYOUTS[1:]),
    st.sampled_from(sorted(AGGREGATIONS)),
    st.sampled_from([None, "minibatch", "group"]),
    st.integers(0, len(SURROGATES) - 1),
    st.integers(0, 3),
)


@given(*COMBINATIONS)
@settings(max_examples=40)
def test_loss_and_gradient_depend_on_no_layout_in_float32(layout, name, scope, number, seed):
    agree(layout, name, scope, number, seed, np.float32, 1e-6, 1e-5)


@given(*COMBINATIONS)
@settings(max_examples=40)
def test_loss_and_gradient_depend_on_no_layout_in_float64(layout, name, scope, number, seed):
    with jax.enable_x64(True):
        agree(layout, name, scope, number, seed, np.float64, 1e-12, 1e-12)


def test_metrics_depend_on_no_layout(update):
    params = fakes.model(fakes.PLAIN)[1]
    weights = weights_of("delta_l")
    first, *others = (
        update.accumulate(params, buckets_of(layout, weights)).meters.values() for layout in LAYOUTS
    )
    assert first["policy/clip_frac_low"] > 0 and first["policy/clip_frac_high"] > 0
    for other in others:
        assert other == pytest.approx(first, rel=2e-5, abs=1e-6)


def test_packed_logprobs_are_those_of_a_response_alone_and_nothing_later_changes_them(update):
    params = fakes.model(fakes.PLAIN)[1]
    rollout, _ = batch()
    logits = jnp.asarray(fakes.forward(fakes.PLAIN, params, rollout.tokens))
    alone = token_logprobs(logits[:, :-1], jnp.asarray(rollout.tokens[:, 1:]))[0]
    shared = 0
    for bucket in buckets_of(LAYOUTS[2], weights_of("delta_l")):
        shared += max(len(np.unique(row)) for row in np.asarray(bucket.segment_ids)) > 2
        mask = np.asarray(bucket.loss_mask)
        rows, columns = np.asarray(bucket.segment_ids)[mask], np.asarray(bucket.positions)[mask]
        found = np.asarray(update.logprobs(params, bucket))
        np.testing.assert_allclose(found[mask], np.asarray(alone)[rows, columns - 1], atol=1e-5)
        middle = bucket.tokens.shape[1] // 2
        edited = np.array(bucket.tokens)
        edited[:, middle:] = (edited[:, middle:] + 1) % 20 + 3
        again = np.asarray(update.logprobs(params, dataclasses.replace(bucket, tokens=edited)))
        np.testing.assert_array_equal(again[:, :middle], found[:, :middle])
        assert np.any(again[:, middle:] != found[:, middle:])
    assert shared


def test_the_loss_mask_has_holes_and_they_carry_no_gradient(update):
    """A two-turn response: the environment's tokens are attended to, never trained."""
    params = fakes.model(fakes.PLAIN)[1]
    rollout, _ = batch()
    row = int(np.argmax(rollout.lengths))
    start, end = rollout.prompt_lengths[row], rollout.lengths[row]
    holes = np.zeros_like(rollout.loss_mask)
    holes[row, start:end] = True
    holes[row, start + 3 : start + 8] = False
    two_turns = dataclasses.replace(rollout, loss_mask=holes)
    assert two_turns.response_lengths[row] == end - start - 5

    def gradient(tokens, old):
        turns = dataclasses.replace(two_turns, tokens=tokens, logprobs=old)
        (bucket,) = make_buckets(
            turns,
            np.asarray([row]),
            advantages=np.ones(COUNT, np.float32),
            weights=np.ones(COUNT, np.float32),
            edges=(30,),
            tokens_per_microbatch=30,
        )
        return update.accumulate(params, [bucket])

    base = gradient(rollout.tokens, rollout.logprobs)
    noise = rollout.logprobs.copy()
    noise[row, start + 3 : start + 8] = 77.0  # what the environment said has no log-probability
    same = gradient(rollout.tokens, noise)
    chex.assert_trees_all_close(same.grads, base.grads, atol=0, rtol=0)
    assert float(same.meters.sums["policy/entropy"][1]) == end - start - 5
    changed = rollout.tokens.copy()
    changed[row, start + 4] = (changed[row, start + 4] + 1) % 20 + 3
    other = gradient(changed, rollout.logprobs)
    assert abs(float(other.loss) - float(base.loss)) > 1e-4  # but it is attended to


def test_responses_without_advantage_move_nothing(update):
    params = fakes.model(fakes.PLAIN)[1]
    rollout, _ = batch()
    buckets = make_buckets(
        rollout,
        np.arange(4),
        advantages=np.zeros(COUNT, np.float32),
        weights=np.ones(COUNT, np.float32),
        edges=(30,),
        tokens_per_microbatch=60,
        pack=True,
    )
    gradient = update.accumulate(params, buckets)
    assert all(float(jnp.abs(x).max()) == 0.0 for x in jax.tree.leaves(gradient.grads))


def test_an_update_raises_the_logprob_of_rewarded_responses(update):
    advantages = batch()[1]
    weights = weights_of("delta_l")
    buckets = buckets_of(LAYOUTS[0], weights)
    state = update.init(jax.tree.map(jnp.copy, fakes.model(fakes.PLAIN)[1]), jax.random.key(0))
    # On-policy: the old log-probabilities are the model's own.
    (bucket,) = buckets
    old = update.logprobs(state.params, bucket)
    bucket = dataclasses.replace(bucket, old_logprobs=old)
    state, report = update(state, [bucket])
    new = update.logprobs(state.params, bucket)
    sums = jax.ops.segment_sum((new - old).ravel(), bucket.segment_ids.ravel(), COUNT)
    gain = np.asarray(sums)
    assert gain @ (weights * advantages) > 0
    assert np.mean(gain[advantages > 0]) > 1e-4
    assert np.mean(gain[advantages < 0]) < -1e-4
    assert int(state.updates) == 1
    assert report.meters.values()["policy/ratio_max"] == pytest.approx(1.0, abs=1e-6)


def test_an_sgd_step_is_the_gradient_times_the_rate(update):
    params = fakes.model(fakes.PLAIN)[1]
    buckets = buckets_of(LAYOUTS[0], weights_of("token_mean"))
    gradient = update.accumulate(params, buckets).grads
    state, report = update(update.init(jax.tree.map(jnp.copy, params), jax.random.key(0)), buckets)
    want = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
    chex.assert_trees_all_close(state.params, want, atol=1e-7)
    norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(gradient)))
    assert report.norms["optim/grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert report.norms["optim/update_norm"] == pytest.approx(0.1 * norm, rel=1e-5)


def test_one_fused_step_equals_gradient_and_step(update):
    params = fakes.model(fakes.PLAIN)[1]
    (bucket,) = buckets_of(LAYOUTS[0], weights_of("token_mean"))
    states = [update.init(jax.tree.map(jnp.copy, params), jax.random.key(0)) for _ in range(2)]
    fused, metrics = update.single(states[0], bucket)
    apart, report = update(states[1], [bucket])
    chex.assert_trees_all_close(fused.params, apart.params, atol=1e-7)
    assert float(metrics["loss"]) == pytest.approx(report.loss, rel=1e-5)


def test_a_nan_names_its_bucket_and_changes_nothing(update):
    buckets = buckets_of(LAYOUTS[1], weights_of("delta_l"))
    bad = dataclasses.replace(buckets[1], weights=buckets[1].weights * jnp.nan)
    buckets = [buckets[0], bad, *buckets[2:]]
    rows, width = bad.tokens.shape
    params = jax.tree.map(jnp.copy, fakes.model(fakes.PLAIN)[1])
    state, report = update(update.init(params, jax.random.key(0)), buckets)
    assert f"loss nan, gradient norm nan in bucket 1 ({rows} rows of {width} tokens), " in (
        report.skipped
    )
    assert "gradients not finite of blocks/attention/k/kernel (512 numbers), " in report.skipped
    chex.assert_trees_all_equal(state.params, fakes.model(fakes.PLAIN)[1])
    assert int(state.updates) == 0


def test_a_gradient_that_is_not_finite_leaves_parameters_and_moments(update):
    params = jax.tree.map(jnp.copy, fakes.model(fakes.PLAIN)[1])
    (bucket,) = buckets_of(LAYOUTS[0], weights_of("delta_l"))
    bucket = dataclasses.replace(bucket, weights=bucket.weights * jnp.inf)
    state, metrics = update.single(update.init(params, jax.random.key(0)), bucket)
    assert not np.isfinite(float(metrics["optim/grad_norm"]))
    chex.assert_trees_all_equal(state.params, fakes.model(fakes.PLAIN)[1])
    assert int(state.updates) == 0


def test_micro_batches_of_bfloat16_parameters_are_added_in_float32(update):
    """A sum of bfloat16 gradients would be off by the parts' last digits."""
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), fakes.model(fakes.PLAIN)[1])
    buckets = buckets_of(LAYOUTS[3], weights_of("delta_l"))
    parts = [update.accumulate(low, [bucket]).grads for bucket in buckets]
    total = update.accumulate(low, buckets).grads
    assert len(parts) > 3 and {str(x.dtype) for x in jax.tree.leaves(total)} == {"float32"}
    want = jax.tree.map(lambda *xs: sum(np.asarray(x, np.float64) for x in xs), *parts)
    chex.assert_trees_all_close(total, want, rtol=1e-6, atol=1e-7)
    assert any(np.any(np.asarray(jnp.bfloat16(x)) != x) for x in jax.tree.leaves(total))


def test_one_compile_a_bucket_shape_and_no_more():
    graphdef, params = fakes.model(fakes.SHALLOW)
    counting = Update(graphdef, optax.sgd(0.1), SUPERVISED)
    shapes = set()
    for seed in range(4):
        buckets = buckets_of(LAYOUTS[2], weights_of("delta_l", None, seed), seed)
        shapes |= {bucket.tokens.shape for bucket in buckets}
        counting.accumulate(params, buckets)
    assert counting.add._cache_size() == len(shapes) <= 3
