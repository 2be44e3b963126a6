"""Diagnostics: what the meters say of each aggregation, against the closed forms of the paper."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltal_jax.config import Aggregation
from deltal_jax.objective.aggregation import AGGREGATIONS, delta_l
from deltal_jax.objective.diagnostics import aggregation_diagnostics

SIZE, M = 12, 512.0
METER = jax.jit(aggregation_diagnostics, static_argnames=("normalizer", "beta"))
LENGTHS = np.random.default_rng(3).integers(1, 500, SIZE)


def meters(weights, lengths, advantages=None, *, normalizer=M, beta=1.0) -> dict[str, float]:
    if advantages is None:
        advantages = np.ones(len(weights))
    arrays = (jnp.asarray(weights, float), jnp.asarray(lengths), jnp.asarray(advantages, float))
    return {k: float(v) for k, v in METER(*arrays, normalizer=normalizer, beta=beta).items()}


def weigh(method: str, lengths=LENGTHS, **options) -> jax.Array:
    if method in ("delta_l", "constant_length"):
        options["normalizer"] = M
    return AGGREGATIONS[method](jnp.asarray(lengths), **options)


@given(
    st.lists(st.floats(0, 1), min_size=SIZE, max_size=SIZE).filter(lambda w: sum(w) > 1e-3),
    st.lists(st.integers(0, 8192), min_size=SIZE, max_size=SIZE),
    st.lists(st.sampled_from([0.0, 1.0, -0.5]), min_size=SIZE, max_size=SIZE),
    st.sampled_from([0.0, 1.0, 1.6]),
)
def test_every_meter_is_its_formula(weights, lengths, advantages, beta):
    w, L = np.asarray(weights), np.asarray(lengths, float)
    powers = np.where(L > 0, np.maximum(L, 1) ** beta, 0.0)
    formulas = {
        "bias_factor": M * w.sum(),
        "predicted_cv": np.sqrt(np.sum(w**2 * powers)) / w.sum(),
        "ess": w.sum() ** 2 / np.sum(w**2),
        "zero_advantage_weight": w[np.asarray(advantages) == 0].sum() / w.sum(),
        "weight_min": w.min(),
        "weight_max": w.max(),
    }
    with jax.enable_x64(True):
        found = meters(weights, lengths, advantages, beta=beta)
    assert found == pytest.approx(formulas, rel=1e-12)
    assert meters(weights, lengths, advantages, beta=beta) == pytest.approx(formulas, rel=1e-5)


def test_the_bias_factor_is_one_for_unbiased_methods_and_the_papers_for_the_others():
    for alpha in (0.0, 0.75, 1.0, 2.0):
        factor = meters(weigh("delta_l", alpha=alpha), LENGTHS)["bias_factor"]
        assert factor == pytest.approx(1.0, rel=1e-5)
    unbiased = meters(weigh("constant_length"), LENGTHS)
    assert unbiased["bias_factor"] == pytest.approx(1.0, rel=1e-5)
    assert meters(weigh("token_mean"), LENGTHS)["bias_factor"] == pytest.approx(
        SIZE * M / LENGTHS.sum(), rel=1e-5
    )
    assert meters(weigh("sequence_mean"), LENGTHS)["bias_factor"] == pytest.approx(
        M * np.mean(1 / LENGTHS), rel=1e-5
    )


def test_predicted_variation_of_every_method_is_its_closed_form():
    cv = {name: meters(weigh(name), LENGTHS)["predicted_cv"] for name in get_args(Aggregation)}
    long = np.sqrt(LENGTHS.sum()) / SIZE
    assert cv["sequence_mean"] == pytest.approx(np.sum(1 / LENGTHS) ** -0.5, rel=1e-5)
    assert cv["token_mean"] == pytest.approx(long, rel=1e-5)
    assert cv["constant_length"] == pytest.approx(long, rel=1e-5)
    assert cv["delta_l"] == pytest.approx(cv["sequence_mean"], rel=1e-5)
    for alpha in (0.25, 0.75, 1.6):
        closed = np.sqrt(np.sum(LENGTHS ** (1 - 2 * alpha))) / np.sum(LENGTHS**-alpha)
        found = meters(weigh("delta_l", alpha=alpha), LENGTHS)["predicted_cv"]
        assert found == pytest.approx(closed, rel=1e-5)


@pytest.mark.parametrize("beta", [0.5, 1.0, 1.6])
def test_predicted_variation_is_least_at_the_exponent_beta(beta):
    cv = {
        alpha: meters(weigh("delta_l", alpha=alpha), LENGTHS, beta=beta)["predicted_cv"]
        for alpha in (beta, beta - 0.2, beta + 0.2, 0.0)
    }
    assert min(cv, key=cv.get) == beta


def test_effective_sample_size_is_b_for_equal_weights_and_one_for_a_single_weight():
    assert meters(np.full(SIZE, 0.01), LENGTHS)["ess"] == pytest.approx(SIZE, rel=1e-6)
    assert meters(np.eye(SIZE)[3] * 0.01, LENGTHS)["ess"] == pytest.approx(1.0, rel=1e-6)
    for alpha in (0.0, 1.0):
        ess = meters(weigh("delta_l", alpha=alpha), LENGTHS)["ess"]
        assert ess < SIZE - 1 if alpha else ess == pytest.approx(SIZE, rel=1e-6)


def test_weight_on_idle_responses_is_counted_by_weight_and_not_by_number():
    advantages = np.where(np.median(LENGTHS) > LENGTHS, 0.0, 1.0)
    share = meters(weigh("delta_l"), LENGTHS, advantages)["zero_advantage_weight"]
    assert share == pytest.approx(np.sum((1 / LENGTHS)[advantages == 0]) / np.sum(1 / LENGTHS))
    assert meters(weigh("delta_l"), LENGTHS, np.zeros(SIZE))["zero_advantage_weight"] == 1.0
    assert meters(weigh("delta_l"), LENGTHS)["zero_advantage_weight"] == 0.0


def test_all_meters_are_finite_where_there_is_nothing_to_train():
    for lengths in (np.zeros(SIZE, int), LENGTHS):
        found = meters(np.zeros(SIZE), lengths, np.zeros(SIZE))
        assert found == dict.fromkeys(found, 0.0)


@pytest.mark.parametrize("lengths", [[1] * SIZE, [10**6] * SIZE, [1, 10**6] * (SIZE // 2)])
@pytest.mark.parametrize("alpha", [-1.0, 0.0, 1.0, 3.0])
def test_all_meters_are_finite_at_the_extremes(lengths, alpha):
    weights = delta_l(jnp.asarray(lengths), alpha, normalizer=1e6)
    found = meters(weights, lengths, normalizer=1e6)
    assert np.isfinite(list(found.values())).all()
    assert found["bias_factor"] == pytest.approx(1.0, rel=1e-5)
    assert 1.0 - 1e-5 <= found["ess"] <= SIZE + 1e-4
