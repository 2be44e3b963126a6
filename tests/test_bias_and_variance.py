"""The statistics of synthetic gradients: what every aggregation does to their mean and variance.

g_i is drawn with E[g_i] = g for every length and Var(g_i) = V·L_i^β; the estimate is Σ_i w_i g_i.
"""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from deltal_jax.objective.aggregation import AGGREGATIONS
from deltal_jax.objective.diagnostics import aggregation_diagnostics

M, V, DRAWS = 600.0, 0.004, 30_000
MEAN = np.asarray([0.6, -0.3, 0.2])
LENGTHS = np.asarray([3, 8, 15, 20, 44, 70, 120, 130, 210, 333, 480, 600])
B, NORM = len(LENGTHS), float(np.linalg.norm(MEAN))
TOLERANCE = 0.02

#: The paper's table: Σ w_i·M, and the coefficient of variation in units of √V/‖g‖ at β = 1.
CLOSED_FORMS = {
    "sequence_mean": (M * np.mean(1 / LENGTHS), np.sum(1 / LENGTHS) ** -0.5),
    "token_mean": (B * M / LENGTHS.sum(), np.sqrt(LENGTHS.sum()) / B),
    "constant_length": (1.0, np.sqrt(LENGTHS.sum()) / B),
} | {
    f"delta_l {alpha}": (
        1.0,
        np.sqrt(np.sum(LENGTHS ** (1 - 2 * alpha))) / np.sum(LENGTHS**-alpha),
    )
    for alpha in (0.0, 0.5, 1.0, 1.6)
}


@functools.cache
def noise() -> np.ndarray:
    """Unit total variance: E‖z‖² = 1."""
    return np.random.default_rng(0).normal(size=(DRAWS, B, 3)).astype(np.float32) / np.sqrt(3)


def weigh(method: str) -> np.ndarray:
    name, _, alpha = method.partition(" ")
    options = {"alpha": float(alpha)} if alpha else {}
    if name in ("delta_l", "constant_length"):
        options["normalizer"] = M
    return np.asarray(AGGREGATIONS[name](jnp.asarray(LENGTHS), **options), np.float64)


def measure(weights: np.ndarray, beta: float) -> tuple[float, float]:
    """(bias factor, coefficient of variation) of the estimate over the draws."""
    spread = weights * np.sqrt(V * LENGTHS**beta)
    estimates = weights.sum() * MEAN + np.einsum("i,nid->nd", spread, noise())
    mean = estimates.mean(axis=0)
    deviation = np.sqrt(np.mean(np.sum((estimates - mean) ** 2, axis=1)))
    return M * float(mean @ MEAN) / NORM**2, float(deviation / np.linalg.norm(mean))


def predict(weights: np.ndarray, beta: float) -> tuple[float, float]:
    arrays = jnp.asarray(weights, jnp.float32), jnp.asarray(LENGTHS), jnp.ones(B)
    found = aggregation_diagnostics(*arrays, normalizer=M, beta=beta)
    return float(found["bias_factor"]), float(found["predicted_cv"]) * np.sqrt(V) / NORM


@pytest.mark.parametrize("method", CLOSED_FORMS)
def test_measured_bias_and_variation_are_the_papers_closed_forms(method):
    bias, variation = measure(weigh(method), beta=1.0)
    closed_bias, closed_variation = CLOSED_FORMS[method]
    assert bias == pytest.approx(closed_bias, rel=TOLERANCE)
    assert variation == pytest.approx(closed_variation * np.sqrt(V) / NORM, rel=TOLERANCE)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 1.6])
@pytest.mark.parametrize("method", CLOSED_FORMS)
def test_the_diagnostics_predict_what_is_measured_for_any_growth_of_the_variance(method, beta):
    weights = weigh(method)
    assert measure(weights, beta) == pytest.approx(predict(weights, beta), rel=TOLERANCE)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 1.6])
def test_measured_variation_is_least_where_the_exponent_is_that_of_the_variance(beta):
    measured = {a: measure(weigh(f"delta_l {a}"), beta)[1] for a in (0.0, 0.5, 1.0, 1.6)}
    assert min(measured, key=measured.get) == beta


def test_delta_l_is_unbiased_and_varies_less_than_every_other_unbiased_method():
    (unbiased, ours), (also, constant) = (
        measure(weigh(method), beta=1.0) for method in ("delta_l 1.0", "constant_length")
    )
    assert (unbiased, also) == pytest.approx((1.0, 1.0), rel=TOLERANCE)
    assert ours < 0.6 * constant


def test_means_that_depend_on_length_make_every_weighting_but_the_constant_biased():
    """`unbiased` needs E[g_i | L_i] to be the same for all lengths; here it is not."""
    means = np.where(LENGTHS[:, None] > 100, [1.0, 0.0], [0.0, 1.0])
    target = means.mean(axis=0)

    def cosine(method):
        estimate = weigh(method) @ means
        return estimate @ target / np.linalg.norm(estimate) / np.linalg.norm(target)

    assert cosine("constant_length") == pytest.approx(1.0, abs=1e-6)
    assert cosine("delta_l 1.0") < 0.8
