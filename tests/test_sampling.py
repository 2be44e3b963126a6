"""Sampling is checked as a distribution, and its randomness as a function of counters alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from deltal_jax.rollout.sampling import sample, stream_keys, uniforms


def keys_of(step=0, round_=0, positions=(0, 1, 2), samples=4, seed=0):
    key = jax.random.key(seed, impl="threefry2x32")
    counters = jnp.asarray(step), jnp.asarray(round_), jnp.asarray(positions)
    return np.asarray(stream_keys(key, *counters, samples))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_draws_follow_the_softmax(temperature):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=11) * 2, jnp.float32)
    count = 40_000
    keys = jnp.asarray(keys_of(positions=range(count), samples=1))
    drawn, logprob = sample(
        jnp.broadcast_to(logits, (count, 11)),
        uniforms(keys, jnp.zeros(count, int)),
        temperature=temperature,
    )
    exact = np.asarray(jax.nn.softmax(logits / temperature), np.float64)
    observed = np.bincount(np.asarray(drawn), minlength=11)
    assert scipy.stats.chisquare(observed, exact / exact.sum() * count).pvalue > 1e-3
    np.testing.assert_allclose(np.exp(logprob), exact[np.asarray(drawn)], rtol=1e-5)


def test_a_token_without_mass_is_never_drawn():
    logits = jnp.asarray([[-jnp.inf, 0.0, -jnp.inf, 1.0, -jnp.inf]] * 3)
    drawn, _ = sample(logits, jnp.asarray([0.0, 0.5, 1.0 - 2.0**-24]), temperature=1.0)
    assert drawn.tolist() == [1, 3, 3]


def test_temperature_zero_takes_the_most_likely_token():
    logits = jnp.asarray([[0.0, 3.0, 1.0], [2.0, -1.0, 1.9]])
    drawn, logprob = sample(logits, jnp.asarray([0.99, 0.99]), temperature=0.0)
    assert drawn.tolist() == [1, 0]
    assert logprob.tolist() == [0.0, 0.0]


def test_uniforms_are_uniform_over_every_counter():
    keys = keys_of(positions=range(500), samples=2)
    many = np.concatenate([uniforms(jnp.asarray(keys), jnp.full(1000, c)) for c in range(20)])
    assert scipy.stats.kstest(many, "uniform").pvalue > 1e-3
    assert many.min() >= 0.0 and many.max() < 1.0
    assert len(np.unique(many)) > 0.998 * len(many)
    per_counter = many.reshape(20, 1000)
    correlations = np.corrcoef(per_counter) - np.eye(20)
    assert np.abs(correlations).max() < 0.15


def test_a_pair_keeps_its_key_whatever_is_sampled_beside_it():
    alone = keys_of(positions=[7], samples=2)
    among = keys_of(positions=[3, 7, 9], samples=5)
    np.testing.assert_array_equal(alone, among[5:7])


@pytest.mark.parametrize(
    "change", [{"step": 1}, {"round_": 1}, {"seed": 1}, {"positions": [5, 6, 7]}]
)
def test_every_counter_changes_every_key(change):
    base, other = keys_of(), keys_of(**change)
    assert not (base[:, None] == other[None, :]).all(-1).any()
    assert len(np.unique(base, axis=0)) == len(base)
