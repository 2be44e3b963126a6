"""Sampling is checked as a distribution, and its randomness as a function of counters alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from deltal_jax.rollout.sampling import keep, sample, stream_keys, uniforms


def keys_of(step=0, round_=0, positions=(0, 1, 2), samples=4, seed=0):
    key = jax.random.key(seed, impl="threefry2x32")
    counters = jnp.asarray(step), jnp.asarray(round_), jnp.asarray(positions)
    return np.asarray(stream_keys(key, *counters, samples))


#: Vocabularies of one block and of several.
VOCABULARIES = (11, 300)
KNOBS = {
    "cold": {"temperature": 0.5},
    "plain": {"temperature": 1.0},
    "hot": {"temperature": 1.7},
    "top-k": {"temperature": 1.0, "top_k": 4},
    "top-p": {"temperature": 1.0, "top_p": 0.6},
    "min-p": {"temperature": 1.0, "min_p": 0.3},
    "all": {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "min_p": 0.02},
}


def exact_distribution(logits, temperature, top_k=None, top_p=1.0, min_p=0.0):
    """The definition, in float64, one row."""
    scores = np.asarray(logits, np.float64) / temperature
    mass = np.exp(scores - scores.max())
    order = np.argsort(-mass, kind="stable")
    if top_k is not None:
        mass[order[top_k:]] = 0.0
    mass /= mass.sum()
    if top_p < 1.0:
        count = 1 + np.searchsorted(np.cumsum(mass[order]), top_p)
        mass[order[count:]] = 0.0
    mass[mass < min_p * mass.max()] = 0.0
    return mass / mass.sum()


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("knobs", KNOBS.values(), ids=KNOBS)
def test_draws_follow_the_distribution(knobs, vocabulary):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=vocabulary) * 2, jnp.float32)
    count = 40_000
    keys = jnp.asarray(keys_of(positions=range(count), samples=1))
    drawn, logprob = sample(
        jnp.broadcast_to(logits, (count, vocabulary)),
        uniforms(keys, jnp.zeros(count, int)),
        **knobs,
    )
    exact = exact_distribution(logits, **knobs)
    observed = np.bincount(np.asarray(drawn), minlength=vocabulary)
    assert not observed[exact == 0].any()
    rare = (exact * count < 10) & (exact > 0)  # too few for a chi-squared test: all together
    groups = [(observed[i], exact[i]) for i in np.flatnonzero(exact * count >= 10)]
    groups += [(observed[rare].sum(), exact[rare].sum())] * bool(exact[rare].sum() * count >= 10)
    seen, expected = np.asarray(groups).T
    share = seen.sum() / expected.sum()
    assert scipy.stats.chisquare(seen, expected * share).pvalue > 1e-3
    np.testing.assert_allclose(np.exp(logprob), exact[np.asarray(drawn)], rtol=2e-5)


@given(st.integers(0, 10**6), st.integers(1, 400), st.floats(0.1, 40.0))
def test_two_steps_of_inversion_find_what_one_running_sum_finds(seed, vocabulary, spread):
    """In float64 by NumPy; where the two are apart, the number lies on the edge to rounding."""
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(3, vocabulary)) * spread).astype(np.float32)
    uniform = rng.random(3).astype(np.float32)
    drawn, _ = sample(jnp.asarray(logits), jnp.asarray(uniform), temperature=1.0)
    mass = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    edges = np.cumsum(mass, axis=1) / mass.sum(axis=1, keepdims=True)
    for row, token in enumerate(np.asarray(drawn)):
        low, high = (edges[row, token - 1] if token else 0.0), edges[row, token]
        assert low - 1e-6 <= uniform[row] <= high + 1e-6
        assert mass[row, token] > 0


@pytest.mark.parametrize("top_k", [1, 20, 50])
def test_rounding_of_running_sums_draws_no_token_without_mass(top_k):
    """Few tokens of many have mass, and the numbers lie on the edges between them."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(8, 20_001)).astype(np.float32) * 2
    scores = np.asarray(keep(jnp.asarray(logits), top_k=top_k, top_p=1.0, min_p=0.0), np.float64)
    mass = np.exp(scores - scores.max(axis=1, keepdims=True))
    edges = np.cumsum(mass, axis=1)[mass > 0].reshape(8, top_k) / mass.sum(axis=1, keepdims=True)
    draw = jax.jit(lambda x, u: sample(x, u, temperature=1.0, top_k=top_k))
    for edge in edges.T:
        for ulp in range(-3, 4):
            uniform = np.clip(np.floor(edge * 2**24) + ulp, 0, 2**24 - 1) / 2**24
            drawn, logprob = draw(logits, uniform.astype(np.float32))
            assert (mass[np.arange(8), np.asarray(drawn)] > 0).all()
            assert np.isfinite(logprob).all()


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-9, 1e-5])
def test_a_temperature_near_zero_is_as_zero(temperature):
    logits = jnp.asarray([[0.0, 3.0, 1.0], [2.0, -1.0, 1.9]])
    drawn, logprob = sample(logits, jnp.asarray([0.5, 0.5]), temperature=temperature)
    assert drawn.tolist() == [1, 0] and logprob.tolist() == [0.0, 0.0]


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
