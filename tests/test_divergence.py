"""KL estimators: exact expectations over a small vocabulary, of values and of gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from deltal_jax.objective.divergence import (
    DIVERGENCES,
    entropy,
    kl_k1,
    kl_k2,
    kl_k3,
    kl_k3_straight_through,
)

LOGITS = jnp.asarray([0.3, -1.0, 0.8, 0.0])
REFERENCE = jax.nn.log_softmax(jnp.asarray([0.0, 0.5, 0.2, -0.7]))


def kl(logits):
    logprobs = jax.nn.log_softmax(logits)
    return jnp.sum(jnp.exp(logprobs) * (logprobs - REFERENCE))


def expected_gradient(estimator):
    """E over tokens drawn from π of ∇ estimator, the tokens held fixed: what a loss follows."""
    mass = jax.lax.stop_gradient(jax.nn.softmax(LOGITS))

    def mean(logits):
        return jnp.sum(mass * estimator(jax.nn.log_softmax(logits), REFERENCE))

    return np.asarray(jax.grad(mean)(LOGITS))


@pytest.mark.parametrize("estimator", [kl_k1, kl_k3, kl_k3_straight_through])
def test_k1_and_k3_are_unbiased(estimator):
    logprobs = jax.nn.log_softmax(LOGITS)
    values = estimator(logprobs, REFERENCE)
    assert float(jnp.sum(jnp.exp(logprobs) * values)) == pytest.approx(float(kl(LOGITS)), rel=1e-5)


@pytest.mark.parametrize("estimator", [kl_k2, kl_k3, kl_k3_straight_through])
def test_k2_and_k3_are_never_negative_and_zero_at_equality(estimator):
    x = jnp.linspace(-3, 3, 31)
    assert float(jnp.min(estimator(x, jnp.zeros(31)))) >= 0.0
    assert float(estimator(x[:1], x[:1])[0]) == 0.0


@pytest.mark.parametrize("estimator", [kl_k2, kl_k3_straight_through])
def test_the_gradient_of_k2_and_of_straight_through_k3_is_the_kls(estimator):
    np.testing.assert_allclose(expected_gradient(estimator), jax.grad(kl)(LOGITS), atol=1e-6)


def test_k1_as_a_loss_has_no_expected_gradient():
    np.testing.assert_allclose(expected_gradient(kl_k1), 0.0, atol=1e-6)


def test_k3_as_a_loss_follows_the_other_direction():
    def reverse(logits):
        return jnp.sum(jnp.exp(REFERENCE) * (REFERENCE - jax.nn.log_softmax(logits)))

    np.testing.assert_allclose(expected_gradient(kl_k3), jax.grad(reverse)(LOGITS), atol=1e-6)
    assert np.abs(expected_gradient(kl_k3) - np.asarray(jax.grad(kl)(LOGITS))).max() > 0.01


def test_k3_stays_finite_far_away():
    far = jnp.asarray([-500.0, 500.0])
    assert np.isfinite(np.asarray(kl_k3(far, jnp.zeros(2)))).all()


def test_entropy_is_that_of_the_softmax_and_takes_masked_logits():
    logits = np.asarray([[0.1, 2.0, -1.0, 0.4], [5.0, 5.0, -np.inf, -np.inf]], np.float32)
    want = scipy.stats.entropy(np.exp(logits).T)
    np.testing.assert_allclose(entropy(jnp.asarray(logits)), want, rtol=1e-5)


@pytest.mark.parametrize("function", [kl_k1, kl_k2, kl_k3, kl_k3_straight_through])
def test_names_are_those_of_the_functions(function):
    assert DIVERGENCES[function.__name__] is function
