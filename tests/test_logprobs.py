"""Token log-probabilities and entropy against float64 NumPy, at the sampler's temperature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltal_jax.objective.logprobs import token_logprobs

rng = np.random.default_rng(0)
LOGITS = rng.normal(size=(3, 5, 17)) * 4
TARGETS = rng.integers(0, 17, (3, 5))
TEMPERATURES = [0.3, 0.7, 1.0, 2.5]


def exact(logits, targets, temperature) -> tuple[np.ndarray, np.ndarray]:
    scaled = np.asarray(logits, np.float64) / temperature
    shifted = scaled - scaled.max(axis=-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    chosen = np.take_along_axis(log_p, np.asarray(targets)[..., None], axis=-1)[..., 0]
    return chosen, -np.sum(np.exp(log_p) * log_p, axis=-1)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_logprobs_and_entropy_are_those_of_the_tempered_softmax(temperature):
    reference = exact(LOGITS, TARGETS, temperature)
    with jax.enable_x64(True):
        found = token_logprobs(jnp.asarray(LOGITS), jnp.asarray(TARGETS), temperature=temperature)
        for mine, theirs in zip(found, reference, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=1e-13)
    single = np.float32(LOGITS)
    found = token_logprobs(jnp.asarray(single), jnp.asarray(TARGETS), temperature=temperature)
    # A few roundings of the largest scaled logit.
    rounding = 4 * np.spacing(np.float32(np.abs(single).max() / temperature))
    for mine, theirs in zip(found, exact(single, TARGETS, temperature), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=rounding)


def test_temperature_one_is_the_default():
    logits, targets = jnp.asarray(LOGITS, jnp.float32), jnp.asarray(TARGETS)
    for mine, theirs in zip(
        token_logprobs(logits, targets),
        token_logprobs(logits, targets, temperature=1.0),
        strict=True,
    ):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_probabilities_of_all_targets_sum_to_one_and_give_the_entropy(temperature):
    with jax.enable_x64(True):
        logits = jnp.asarray(np.broadcast_to(LOGITS[0, :1], (17, 17)))
        found = token_logprobs(logits, jnp.arange(17), temperature=temperature)
    logprobs, entropy = map(np.asarray, found)
    assert np.exp(logprobs).sum() == pytest.approx(1.0, rel=1e-12)
    assert -np.sum(np.exp(logprobs) * logprobs) == pytest.approx(entropy[0], rel=1e-12)


def test_a_flat_distribution_has_the_entropy_of_the_vocabulary_and_a_sharp_one_none():
    flat, sharp = jnp.zeros((1, 17)), jnp.zeros((1, 17)).at[0, 3].set(100.0)
    target = jnp.asarray([3])
    logprob, entropy = token_logprobs(flat, target)
    np.testing.assert_allclose([logprob[0], entropy[0]], [-np.log(17), np.log(17)], rtol=1e-6)
    logprob, entropy = token_logprobs(sharp, target)
    np.testing.assert_allclose([logprob[0], entropy[0]], [0.0, 0.0], atol=1e-6)


@pytest.mark.parametrize("shift", [-100.0, 50.0, 1000.0])
def test_a_constant_added_to_all_logits_changes_nothing_beyond_its_rounding(shift):
    logits = np.float32(np.round(LOGITS * 256) / 256)  # so that the sum is exact
    for mine, theirs in zip(
        token_logprobs(jnp.asarray(logits + np.float32(shift)), jnp.asarray(TARGETS)),
        token_logprobs(jnp.asarray(logits), jnp.asarray(TARGETS)),
        strict=True,
    ):
        np.testing.assert_allclose(mine, theirs, atol=4 * np.spacing(np.float32(abs(shift))))


def test_large_logits_do_not_overflow():
    logits, targets = jnp.asarray([[3e4, -3e4, 0.0]]), jnp.asarray([1])
    logprob, entropy = token_logprobs(logits, targets, temperature=0.01)
    assert float(logprob[0]) == pytest.approx(-6e6)
    assert float(entropy[0]) == 0.0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_logits_are_computed_in_float32(dtype):
    logits, targets = jnp.asarray(LOGITS, dtype), jnp.asarray(TARGETS)
    for mine, theirs in zip(
        token_logprobs(logits, targets, temperature=0.7),
        token_logprobs(logits.astype(jnp.float32), targets, temperature=0.7),
        strict=True,
    ):
        assert mine.dtype == jnp.float32
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_the_gradient_of_a_logprob_is_one_hot_minus_probabilities_over_temperature(temperature):
    def total(logits):
        return jnp.sum(token_logprobs(logits, jnp.asarray(TARGETS), temperature=temperature)[0])

    with jax.enable_x64(True):
        gradient = jax.jit(jax.grad(total))(jnp.asarray(LOGITS))
    every = np.broadcast_to(np.arange(17), (3, 5, 17))
    repeated = np.broadcast_to(LOGITS[:, :, None, :], (3, 5, 17, 17))
    probabilities = np.exp(exact(repeated, every, temperature)[0])
    one_hot = np.eye(17)[TARGETS]
    np.testing.assert_allclose(gradient, (one_hot - probabilities) / temperature, atol=1e-12)
