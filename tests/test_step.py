"""Laws of the update: gradients add, whatever the split, and an update does what it says."""

import dataclasses
import functools
from typing import get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deltal_jax.config import Aggregation
from deltal_jax.objective.advantages import group_standardize
from deltal_jax.objective.aggregation import AGGREGATIONS
from deltal_jax.objective.logprobs import token_logprobs
from deltal_jax.objective.surrogate import clipped, ratio_diagnostics, reinforce
from deltal_jax.training.buckets import make_buckets
from deltal_jax.training.step import NonFiniteLoss, Update
from tests import fakes

COUNT = 24
CLIPS = {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": 3.0}
LAYOUTS = [((30,), 720), ((8, 16, 30), 60), ((12, 30), 97)]


@pytest.fixture(scope="module")
def update():
    graphdef, _ = fakes.model(fakes.PLAIN)
    return Update(
        graphdef,
        optax.sgd(0.1),
        functools.partial(clipped, **CLIPS),
        token_meter=functools.partial(ratio_diagnostics, **CLIPS),
    )


@functools.cache
def batch(seed=0):
    rollout = fakes.rollout(COUNT, seed=seed)
    rewards = np.random.default_rng(seed).random(COUNT) < 0.5
    advantages = group_standardize(
        jnp.asarray(rewards, jnp.float32), jnp.asarray(rollout.group_ids)
    )
    return rollout, np.asarray(advantages)


def buckets_of(edges, budget, weights, seed=0):
    rollout, advantages = batch(seed)
    return make_buckets(
        rollout,
        np.arange(COUNT),
        advantages=advantages,
        weights=weights,
        old_logprobs=rollout.logprobs,
        edges=edges,
        tokens_per_microbatch=budget,
    )


def weights_of(name, seed=0):
    return np.asarray(AGGREGATIONS[name](jnp.asarray(batch(seed)[0].response_lengths)))


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


@pytest.mark.parametrize("name", get_args(Aggregation))
def test_loss_and_gradient_do_not_depend_on_buckets_or_microbatches(update, name):
    params = fakes.model(fakes.PLAIN)[1]
    weights = weights_of(name)
    want, size = plain_loss(params, weights)
    reference = None
    for edges, budget in LAYOUTS:
        got = update.accumulate(params, buckets_of(edges, budget, weights))
        assert float(got.loss) == pytest.approx(want, abs=2e-6 * size)
        reference = got.grads if reference is None else reference
        difference = jax.tree.map(jnp.subtract, got.grads, reference)
        assert optax.tree.norm(difference) <= 1e-5 * optax.tree.norm(reference)
    assert optax.tree.norm(reference) > 1e-3


def test_metrics_do_not_depend_on_buckets_or_microbatches(update):
    params = fakes.model(fakes.PLAIN)[1]
    weights = weights_of("delta_l")
    first, *others = (
        update.accumulate(params, buckets_of(*layout, weights)).meters.values()
        for layout in LAYOUTS
    )
    assert first["policy/clip_frac_low"] > 0 and first["policy/clip_frac_high"] > 0
    for other in others:
        assert other == pytest.approx(first, rel=2e-5, abs=1e-6)


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
            old_logprobs=old,
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
    (bucket,) = make_buckets(
        rollout,
        np.arange(4),
        advantages=np.zeros(COUNT, np.float32),
        weights=np.ones(COUNT, np.float32),
        old_logprobs=rollout.logprobs,
        edges=(30,),
        tokens_per_microbatch=120,
    )
    gradient = update.accumulate(params, [bucket])
    assert all(float(jnp.abs(x).max()) == 0.0 for x in jax.tree.leaves(gradient.grads))


def test_an_update_raises_the_logprob_of_rewarded_responses(update):
    advantages = batch()[1]
    weights = weights_of("delta_l")
    buckets = buckets_of((30,), 720, weights)
    state = update.init(jax.tree.map(jnp.copy, fakes.model(fakes.PLAIN)[1]), jax.random.key(0))
    # On-policy: the old log-probabilities are the model's own.
    (bucket,) = buckets
    old = update.logprobs(state.params, bucket)
    bucket = dataclasses.replace(bucket, old_logprobs=old)
    state, report = update(state, [bucket])
    new = update.logprobs(state.params, bucket)
    gain = np.asarray(jnp.where(bucket.loss_mask, new - old, 0.0).sum(axis=1))
    assert gain @ (weights * advantages) > 0
    assert np.mean(gain[advantages > 0]) > 1e-4
    assert np.mean(gain[advantages < 0]) < -1e-4
    assert int(state.updates) == 1
    assert report.meters.values()["policy/ratio_max"] == pytest.approx(1.0, abs=1e-6)


def test_an_sgd_step_is_the_gradient_times_the_rate(update):
    params = fakes.model(fakes.PLAIN)[1]
    buckets = buckets_of((30,), 720, weights_of("token_mean"))
    gradient = update.accumulate(params, buckets).grads
    state, report = update(update.init(jax.tree.map(jnp.copy, params), jax.random.key(0)), buckets)
    want = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
    chex.assert_trees_all_close(state.params, want, atol=1e-7)
    norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(gradient)))
    assert report.norms["optim/grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert report.norms["optim/update_norm"] == pytest.approx(0.1 * norm, rel=1e-5)


def test_one_fused_step_equals_gradient_and_step(update):
    params = fakes.model(fakes.PLAIN)[1]
    (bucket,) = buckets_of((30,), 720, weights_of("token_mean"))
    states = [update.init(jax.tree.map(jnp.copy, params), jax.random.key(0)) for _ in range(2)]
    fused, metrics = update.single(states[0], bucket)
    apart, report = update(states[1], [bucket])
    chex.assert_trees_all_close(fused.params, apart.params, atol=1e-7)
    assert float(metrics["loss"]) == pytest.approx(report.loss, rel=1e-5)


def test_a_nan_names_its_bucket_and_changes_nothing(update):
    buckets = buckets_of((8, 16, 30), 60, weights_of("delta_l"))
    bad = dataclasses.replace(buckets[1], weights=buckets[1].weights * jnp.nan)
    buckets = [buckets[0], bad, *buckets[2:]]
    rows, width = bad.tokens.shape
    params = jax.tree.map(jnp.copy, fakes.model(fakes.PLAIN)[1])
    state = update.init(params, jax.random.key(0))
    with pytest.raises(NonFiniteLoss, match=rf"bucket 1 \({rows} rows of {width} tokens\)"):
        update(state, buckets)
    chex.assert_trees_all_close(state.params, fakes.model(fakes.PLAIN)[1], atol=0, rtol=0)


def test_a_gradient_that_is_not_finite_leaves_parameters_and_moments(update):
    params = jax.tree.map(jnp.copy, fakes.model(fakes.PLAIN)[1])
    (bucket,) = buckets_of((30,), 720, weights_of("delta_l"))
    bucket = dataclasses.replace(bucket, weights=bucket.weights * jnp.inf)
    state, metrics = update.single(update.init(params, jax.random.key(0)), bucket)
    assert not np.isfinite(float(metrics["optim/grad_norm"]))
    chex.assert_trees_all_close(state.params, fakes.model(fakes.PLAIN)[1], atol=0, rtol=0)


def test_one_compile_a_bucket_shape_and_no_more():
    graphdef, params = fakes.model(fakes.PLAIN)
    counting = Update(graphdef, optax.sgd(0.1), reinforce)
    edges = (8, 16, 30)
    for seed in range(4):
        weights = weights_of("delta_l", seed)
        counting.accumulate(params, buckets_of(edges, 60, weights, seed))
    assert counting.add._cache_size() == len(edges)
