"""Aggregation: weights against plain float64 formulas, their laws, and the sums that use them."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from hypothesis import given
from hypothesis import strategies as st

from deltal_jax.objective.aggregation import (
    AGGREGATIONS,
    balanced,
    constant_length,
    delta_l,
    inverse_variance,
    local_token_mean,
    policy_gradient_loss,
    prompt_mean,
    segment_means,
    segment_sums,
    sequence_mean,
    sequence_sum,
    token_mean,
    token_sum,
)
from deltal_jax.objective.surrogate import clipped

#: Those that need lengths alone and take every common option.
METHODS = ["delta_l", "sequence_mean", "token_mean", "constant_length"]
M = 512.0
#: Relative error of a float32 power, sum and division at the lengths and exponents used here.
FLOAT32 = 5e-6
FLOAT64 = 1e-12


def formula(method: str, lengths: np.ndarray, alpha: float) -> np.ndarray:
    """The paper's weight of each response, all of them in one scope."""
    L = np.asarray(lengths, np.float64)
    return {
        "delta_l": lambda: L**-alpha / np.sum(L**-alpha) / M,
        "constant_length": lambda: np.full(len(L), 1 / (len(L) * M)),
        "sequence_mean": lambda: 1 / (len(L) * L),
        "token_mean": lambda: np.full(len(L), 1 / np.sum(L)),
    }[method]()


def expected(method, lengths, *, alpha, where=None, count_masked=False, scopes=None):
    """The conventions of the module on top of `formula`, as loops."""
    B = len(lengths)
    kept = [True] * B if where is None else list(where)
    counted = [i for i in range(B) if lengths[i] > 0 and (kept[i] or count_masked)]
    of = [0] * B if scopes is None else list(scopes)
    occupied = {of[i] for i in counted}
    weights = np.zeros(B)
    for scope in occupied:
        members = [i for i in counted if of[i] == scope]
        inside = formula(method, np.asarray(lengths)[members], alpha)
        weights[members] = inside / len(occupied)
    return np.where(kept, weights, 0.0)


@functools.cache
def compiled(method: str, count_masked: bool):
    def weights(lengths, alpha, where, scope_ids):
        options = {"where": where, "count_masked": count_masked, "scope_ids": scope_ids}
        if method == "delta_l":
            options["alpha"] = alpha
        if method in ("delta_l", "constant_length"):
            options["normalizer"] = M
        return AGGREGATIONS[method](lengths, **options)

    return jax.jit(weights)


def weigh(method, lengths, *, alpha=1.0, where=None, count_masked=False, scopes=None):
    """The weights; no filter and no scopes are spelled out, so that few programs compile."""
    B = len(lengths)
    where = jnp.asarray(np.ones(B) if where is None else where, bool)
    scopes = jnp.asarray(np.zeros(B) if scopes is None else scopes, jnp.int32)
    arguments = jnp.asarray(lengths, jnp.int32), jnp.asarray(alpha, float), where, scopes
    return np.asarray(compiled(method, count_masked)(*arguments))


lengths_up_to_a_million = st.one_of(
    st.integers(0, 3), st.integers(1, 50), st.integers(1, 8192), st.integers(1, 10**6)
)


@st.composite
def batches(draw):
    """Ragged lengths with a filter and scopes; few sizes, so that few programs compile."""
    B = draw(st.sampled_from([1, 13]))

    def row(element):
        return np.asarray(draw(st.lists(element, min_size=B, max_size=B)))

    return {
        "lengths": row(lengths_up_to_a_million).astype(np.int32),
        "alpha": draw(st.sampled_from([-1.0, 0.0, 0.5, 0.75, 1.0, 2.0, 3.0]) | st.floats(-1, 3)),
        "where": row(st.booleans() | st.just(True)).astype(bool),
        "count_masked": draw(st.booleans()),
        "scopes": row(st.integers(0, draw(st.integers(0, B - 1)))).astype(np.int32),
    }


@pytest.mark.parametrize("method", METHODS)
@given(batch=batches())
def test_every_weight_is_its_formula_in_float64_and_in_float32(method, batch):
    reference = expected(method, **batch)
    np.testing.assert_allclose(weigh(method, **batch), reference, rtol=FLOAT32)
    with jax.enable_x64(True):
        np.testing.assert_allclose(weigh(method, **batch), reference, rtol=FLOAT64)


@pytest.mark.parametrize("method", METHODS)
def test_no_filter_is_a_filter_of_all_and_no_scope_is_one_scope_inside_jit_and_outside(method):
    lengths = jnp.asarray([3, 0, 7, 1, 12, 5])
    options = {"normalizer": M} if method in ("delta_l", "constant_length") else {}
    bare = AGGREGATIONS[method](lengths, **options)
    np.testing.assert_allclose(bare, weigh(method, lengths, scopes=[4] * 6), rtol=1e-6)


def ragged(seed: int, size: int = 24, longest: int = 500) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, longest, size)


def harmonic_mean(lengths: np.ndarray) -> float:
    return len(lengths) / np.sum(1.0 / lengths)


@pytest.mark.parametrize("seed", range(3))
def test_exponent_zero_is_dr_grpo(seed):
    lengths = ragged(seed)
    for scopes in (None, np.arange(24) // 8):
        np.testing.assert_allclose(
            weigh("delta_l", lengths, alpha=0.0, scopes=scopes),
            weigh("constant_length", lengths, scopes=scopes),
            rtol=1e-6,
        )


@pytest.mark.parametrize("seed", range(3))
def test_exponent_one_is_grpo_times_harmonic_mean_over_m_within_a_batch(seed):
    lengths = ragged(seed)
    np.testing.assert_allclose(
        weigh("delta_l", lengths, alpha=1.0),
        weigh("sequence_mean", lengths) * harmonic_mean(lengths) / M,
        rtol=1e-6,
    )


@pytest.mark.parametrize("seed", range(3))
def test_in_minibatch_scope_that_factor_is_each_minibatchs_own(seed):
    lengths = ragged(seed)
    minibatches = np.random.default_rng(seed).permutation(np.arange(24) // 8)
    ours = weigh("delta_l", lengths, alpha=1.0, scopes=minibatches)
    grpo = weigh("sequence_mean", lengths, scopes=minibatches)
    for number in range(3):
        inside = minibatches == number
        factor = harmonic_mean(lengths[inside]) / M
        np.testing.assert_allclose(ours[inside], grpo[inside] * factor, rtol=1e-6)


def test_exponent_one_is_not_in_grpos_direction_when_normalised_by_group():
    lengths, groups = np.asarray([1, 1, 100, 100]), np.asarray([0, 0, 1, 1])
    ours = weigh("delta_l", lengths, alpha=1.0, scopes=groups)
    grpo = weigh("sequence_mean", lengths, scopes=groups)
    np.testing.assert_allclose(ours * M, [0.25] * 4, rtol=1e-6)
    np.testing.assert_allclose(grpo, [0.25, 0.25, 0.0025, 0.0025], rtol=1e-6)
    cosine = ours @ grpo / np.linalg.norm(ours) / np.linalg.norm(grpo)
    assert cosine == pytest.approx(0.714, abs=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_token_mean_is_proportional_to_constant_length(seed):
    lengths = ragged(seed)
    np.testing.assert_allclose(
        weigh("token_mean", lengths),
        weigh("constant_length", lengths) * len(lengths) * M / lengths.sum(),
        rtol=1e-6,
    )


@pytest.mark.parametrize("seed", range(3))
def test_in_minibatch_scope_they_are_proportional_within_each_minibatch(seed):
    lengths, minibatches = ragged(seed), np.arange(24) % 3
    ours = weigh("token_mean", lengths, scopes=minibatches)
    constant = weigh("constant_length", lengths, scopes=minibatches)
    for number in range(3):
        inside = minibatches == number
        factor = 8 * M / lengths[inside].sum()
        np.testing.assert_allclose(ours[inside], constant[inside] * factor, rtol=1e-6)


@pytest.mark.parametrize("length", [1, 37, 10**6])
def test_equal_lengths_make_all_methods_equal_up_to_m(length):
    lengths = np.full(8, length)
    for method, factor in (
        ("delta_l", M),
        ("constant_length", M),
        ("sequence_mean", length),
        ("token_mean", length),
    ):
        weights = weigh(method, lengths, alpha=1.7)
        np.testing.assert_allclose(weights * factor, np.full(8, 1 / 8), rtol=1e-5)
    groups, signs = jnp.arange(8) // 2, jnp.asarray([1.0, -1, 1, -1, -1, -1, 1, 2])
    same = jnp.asarray(lengths)
    for weights, factor in (
        (sequence_sum(same), 1),
        (prompt_mean(same, groups), length),
        (local_token_mean(same, groups), length),
        (balanced(same, signs), length),
        (inverse_variance(same, {"beta": 1.7}, normalizer=M), M),
        (inverse_variance(same, {"rho": jnp.asarray([0.3, 0.1])}, normalizer=M), M),
    ):
        np.testing.assert_allclose(np.asarray(weights) * factor, np.full(8, 1 / 8), rtol=1e-5)


@given(batches())
def test_weights_of_delta_l_and_constant_length_sum_to_one_over_m(batch):
    batch["count_masked"] = False
    total = 1.0 if (batch["where"] & (batch["lengths"] > 0)).any() else 0.0
    for method in ("delta_l", "constant_length"):
        weights = weigh(method, **batch).astype(np.float64)
        assert weights.sum() * M == pytest.approx(total, rel=FLOAT32)


@pytest.mark.parametrize("method", ["delta_l", "constant_length"])
def test_without_a_normalizer_the_weights_sum_to_one(method):
    lengths = jnp.asarray(ragged(0))
    assert float(jnp.sum(AGGREGATIONS[method](lengths))) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("scale", [2, 7, 1000])
@pytest.mark.parametrize("alpha", [-1.0, 0.75, 1.0, 3.0])
def test_the_unit_of_length_cancels_in_unbiased_methods_and_divides_the_others(scale, alpha):
    lengths = ragged(4)
    for method, power in (
        ("delta_l", 0),
        ("constant_length", 0),
        ("sequence_mean", -1),
        ("token_mean", -1),
    ):
        np.testing.assert_allclose(
            weigh(method, lengths * scale, alpha=alpha),
            weigh(method, lengths, alpha=alpha) * float(scale) ** power,
            rtol=FLOAT32,
        )


@pytest.mark.parametrize("method", METHODS)
def test_weights_follow_their_responses_under_permutation(method):
    lengths, order = ragged(5), np.random.default_rng(0).permutation(24)
    groups = np.arange(24) // 6
    np.testing.assert_allclose(
        weigh(method, lengths[order], scopes=groups[order]),
        weigh(method, lengths, scopes=groups)[order],
        rtol=1e-6,
    )


@pytest.mark.parametrize("beta", [-0.5, 0.0, 0.75, 1.0, 1.6, 2.5])
def test_exponent_beta_minimises_the_variance_when_variance_grows_like_length_to_the_beta(beta):
    """Var = Σ w² L^β under Σ w = 1/M: every other weighting of the same sum is worse."""
    lengths, rng = ragged(6), np.random.default_rng(7)
    with jax.enable_x64(True):
        best = weigh("delta_l", lengths, alpha=beta)

    def variance(weights):
        return np.sum(weights**2 * lengths**beta)

    assert variance(best) == pytest.approx(1 / (M**2 * np.sum(lengths**-beta)), rel=1e-12)
    for size in (1e-4, 1e-2, 1.0):
        for _ in range(20):
            nudge = rng.normal(size=len(lengths))
            nudge = (nudge - nudge.mean()) * size * np.abs(best).mean()
            assert variance(best + nudge) > variance(best)
    for other in (beta - 0.3, beta + 0.3):
        assert variance(weigh("delta_l", lengths, alpha=other)) > variance(best)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 1.6])
def test_a_numerical_optimiser_finds_no_other_unbiased_weights_of_least_variance(beta):
    lengths = ragged(6, size=6, longest=60)
    costs = (lengths / lengths.mean()) ** beta
    found = scipy.optimize.minimize(
        lambda u: np.sum(u**2 * costs),  # u = w·M
        np.full(6, 1 / 6),
        jac=lambda u: 2 * u * costs,
        constraints={"type": "eq", "fun": lambda u: np.sum(u) - 1, "jac": np.ones_like},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    assert found.success
    np.testing.assert_allclose(weigh("delta_l", lengths, alpha=beta) * M, found.x, atol=2e-6)


@pytest.mark.parametrize("method", METHODS)
def test_group_scope_is_the_mean_over_prompts_of_the_formula_in_each_group(method):
    lengths = ragged(8)
    groups = np.random.default_rng(1).permutation(np.arange(24) // 4)
    weights = weigh(method, lengths, alpha=0.75, scopes=groups)
    for group in range(6):
        inside = groups == group
        alone = formula(method, lengths[inside], 0.75)
        np.testing.assert_allclose(weights[inside], alone / 6, rtol=FLOAT32)


@pytest.mark.parametrize("method", METHODS)
def test_minibatch_scope_times_b_over_b_mb_is_the_formula_over_the_minibatch(method):
    lengths, minibatches = ragged(9), np.arange(24) // 8
    weights = weigh(method, lengths, alpha=0.75, scopes=minibatches)
    for number in range(3):
        inside = minibatches == number
        alone = formula(method, lengths[inside], 0.75)
        np.testing.assert_allclose(weights[inside] * (24 / 8), alone, rtol=FLOAT32)


@pytest.mark.parametrize("method", METHODS)
def test_ids_of_empty_scopes_count_for_nothing(method):
    lengths = np.asarray([3, 9, 4, 0, 0, 7])
    sparse = weigh(method, lengths, scopes=[0, 0, 5, 2, 2, 5])
    dense = weigh(method, lengths, scopes=[0, 0, 1, 1, 1, 1])
    np.testing.assert_allclose(sparse, dense, rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_dropped_responses_leave_the_batch_as_if_never_sampled(method):
    lengths = np.asarray([3, 9, 4, 1, 50, 7])
    where = np.asarray([True, False, True, True, False, True])
    weights = weigh(method, lengths, where=where)
    alone = weigh(method, lengths[where])
    np.testing.assert_allclose(weights[where], alone, rtol=1e-6)
    np.testing.assert_array_equal(weights[~where], 0.0)


@pytest.mark.parametrize("method", METHODS)
def test_kept_responses_lose_their_weight_and_stay_in_the_denominator(method):
    lengths = np.asarray([3, 9, 4, 1, 50, 7])
    where = np.asarray([True, False, True, True, False, True])
    weights = weigh(method, lengths, where=where, count_masked=True)
    everyone = weigh(method, lengths)
    np.testing.assert_array_equal(weights, np.where(where, everyone, 0.0))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count_masked", [False, True])
def test_a_response_without_tokens_gets_no_weight_and_counts_nowhere(method, count_masked):
    lengths = np.asarray([3, 0, 4, 0, 50, 7])
    weights = weigh(method, lengths, count_masked=count_masked)
    np.testing.assert_array_equal(weights[[1, 3]], 0.0)
    alone = weigh(method, lengths[lengths > 0])
    np.testing.assert_allclose(weights[lengths > 0], alone, rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scopes", [None, [0, 0, 1, 1, 2, 2]])
@pytest.mark.parametrize("count_masked", [False, True])
def test_nothing_to_train_gives_zeros_and_never_nan(method, scopes, count_masked):
    given_ = {"scopes": scopes, "count_masked": count_masked}
    zeros = np.zeros(6)
    np.testing.assert_array_equal(weigh(method, [0] * 6, **given_), zeros)
    np.testing.assert_array_equal(weigh(method, [5] * 6, where=[False] * 6, **given_), zeros)


def test_one_response_has_the_weight_of_its_formula():
    for length in (1, 192, 10**6):
        assert weigh("delta_l", [length], alpha=0.7) == pytest.approx(1 / M)
        assert weigh("constant_length", [length]) == pytest.approx(1 / M)
        assert weigh("sequence_mean", [length]) == pytest.approx(1 / length)
        assert weigh("token_mean", [length]) == pytest.approx(1 / length)


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_lengths_are_computed_in_float32(method):
    lengths = np.asarray([3, 0, 4, 1, 250, 7])
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.int32, jnp.uint8):
        weights = AGGREGATIONS[method](jnp.asarray(lengths, dtype))
        assert weights.dtype == jnp.float32
        np.testing.assert_array_equal(weights, AGGREGATIONS[method](jnp.asarray(lengths)))


def test_the_exponent_may_be_traced_and_its_gradient_is_finite_also_at_length_zero():
    lengths = jnp.asarray([3, 0, 4, 1, 50, 7])
    sums = jnp.arange(6.0)

    def estimate(alpha):
        return jnp.sum(delta_l(lengths, alpha) * sums)

    slope = jax.jit(jax.grad(estimate))(jnp.asarray(0.75))
    L, S = np.delete(np.asarray(lengths), 1).astype(float), np.delete(np.arange(6.0), 1)
    w = formula("delta_l", L, 0.75) * M
    analytic = np.sum(w * S * (-np.log(L) + np.sum(w * np.log(L))))
    assert float(slope) == pytest.approx(analytic, rel=1e-5)


def test_that_gradient_is_right_in_scopes_too():
    lengths, sums, scopes = jnp.asarray(ragged(3)), jnp.arange(24.0), jnp.arange(24) % 3

    def estimate(alpha):
        return jnp.sum(delta_l(lengths, alpha, scope_ids=scopes) * sums)

    slope = jax.jit(jax.grad(estimate))(jnp.asarray(0.75))
    L, S, analytic = np.asarray(lengths, float), np.arange(24.0), 0.0
    for scope in range(3):
        w = formula("delta_l", L[scope::3], 0.75) * M
        logs = np.log(L[scope::3])
        analytic += np.sum(w * S[scope::3] * (np.sum(w * logs) - logs)) / 3
    assert float(slope) == pytest.approx(analytic, rel=1e-5)


MILLION = 10**6


def million_lengths(kind: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    return {
        "lognormal": lambda: np.clip(rng.lognormal(7, 1, MILLION), 1, MILLION).astype(np.int32),
        "one short": lambda: np.where(np.arange(MILLION) == 0, 1, MILLION).astype(np.int32),
        "short and long": lambda: np.where(rng.random(MILLION) < 0.5, 1, MILLION).astype(np.int32),
        "sorted": lambda: np.sort(rng.integers(1, MILLION + 1, MILLION)).astype(np.int32),
    }[kind]()


@pytest.mark.parametrize("kind", ["lognormal", "one short", "short and long", "sorted"])
def test_a_million_responses_are_weighed_to_float32s_precision_in_every_scope(kind):
    """A plain float32 sum of 10^6 in one scope would be off by up to 2 %."""
    lengths, index = million_lengths(kind), np.arange(MILLION)
    scopes_of = {"batch": None, "one": index * 0, "four": index // 250_000, "groups": index // 8}
    for alpha in (-1.0, 0.75, 1.0, 3.0):
        powers = lengths.astype(np.float64) ** -alpha
        for name, scopes in scopes_of.items():
            of = index * 0 if scopes is None else scopes
            reference = powers / np.bincount(of, powers)[of] / (of[-1] + 1)
            given_scopes = None if scopes is None else jnp.asarray(scopes)
            weights = million_weights()(jnp.asarray(lengths), alpha, given_scopes)
            weights = np.asarray(weights, np.float64)
            np.testing.assert_allclose(weights * M, reference, rtol=FLOAT32, err_msg=name)
            assert weights.sum() * M == pytest.approx(1.0, abs=1e-5)


@functools.cache
def million_weights():
    return jax.jit(lambda L, alpha, ids: delta_l(L, alpha, normalizer=M, scope_ids=ids))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["lognormal", "short and long"])
def test_other_methods_too_are_right_for_a_million_responses(method, kind):
    lengths = million_lengths(kind)
    options = {"normalizer": M} if method in ("delta_l", "constant_length") else {}
    weights = np.asarray(AGGREGATIONS[method](jnp.asarray(lengths), **options))
    np.testing.assert_allclose(weights, formula(method, lengths, 1.0), rtol=FLOAT32)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [24, 5000])
def test_in_scopes_the_order_of_the_responses_does_not_change_one_bit(method, size):
    rng = np.random.default_rng(size)
    lengths, scopes = ragged(5, size=size, longest=8192), rng.integers(0, 3, size)
    order = rng.permutation(size)
    np.testing.assert_array_equal(
        weigh(method, lengths[order], alpha=0.75, scopes=scopes[order]),
        weigh(method, lengths, alpha=0.75, scopes=scopes)[order],
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_from_logprobs_of_any_precision_the_gradient_is_the_weighted_advantage_or_exactly_zero(
    dtype,
):
    """Response 1 is filtered, 2 has no tokens, 3 no advantage; 0 and 4 are trained."""
    lengths = np.asarray([2, 3, 0, 1, 4])
    where = np.asarray([True, False, True, True, True])
    advantages = np.asarray([1.5, 1.0, 2.0, 0.0, -0.5])
    mask = np.arange(5)[None, :] < lengths[:, None]
    ids = jnp.broadcast_to(jnp.arange(5)[:, None], (5, 5))
    logprobs = jnp.asarray(-np.random.default_rng(0).random((5, 5)), dtype)
    weights = delta_l(jnp.asarray(lengths, dtype), 0.75, normalizer=M, where=jnp.asarray(where))

    def loss(values):
        spread = jnp.broadcast_to(jnp.asarray(advantages, dtype)[:, None], (5, 5))
        losses = clipped(values, logprobs, spread)
        return policy_gradient_loss(losses, weights, ids, jnp.asarray(mask))[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(logprobs)
    scaled = expected("delta_l", lengths, alpha=0.75, where=where) * advantages
    rtol = float(jnp.finfo(dtype).eps) * 4
    np.testing.assert_allclose(float(value), -np.sum(scaled * lengths), rtol=rtol)
    found = np.asarray(gradient, np.float64)
    np.testing.assert_allclose(found, -scaled[:, None] * mask, rtol=rtol)
    np.testing.assert_array_equal(found[[1, 2, 3]], 0.0)
    np.testing.assert_array_equal(found[~mask], 0.0)


@pytest.mark.parametrize("function", [delta_l, sequence_mean, token_mean, constant_length])
def test_the_table_names_every_function_by_its_own_name(function):
    assert AGGREGATIONS[function.__name__] is function


def test_segment_sums_equal_a_python_loop_and_drop_ids_out_of_range():
    rng = np.random.default_rng(0)
    for shape in ((40,), (5, 8), (2, 4, 5)):
        values = rng.normal(size=shape).astype(np.float32)
        ids = rng.integers(-2, 7, shape)
        mask = rng.random(shape) < 0.7
        sums = [0.0] * 5
        for value, segment, trained in zip(values.flat, ids.flat, mask.flat, strict=True):
            if trained and 0 <= segment < 5:
                sums[segment] += float(value)
        found = segment_sums(jnp.asarray(values), jnp.asarray(ids), 5, jnp.asarray(mask))
        np.testing.assert_allclose(found, sums, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_what_is_masked_never_reaches_the_value_or_the_gradient(poison):
    values = jnp.asarray([[1.0, poison, 2.0], [poison, 4.0, poison]])
    ids = jnp.asarray([[0, 0, 1], [1, 1, 2]])
    mask = jnp.asarray([[True, False, True], [False, True, False]])
    weights = jnp.asarray([0.5, 0.25, 8.0])

    def loss(values):
        return policy_gradient_loss(values, weights, ids, mask)[0]

    np.testing.assert_array_equal(segment_sums(values, ids, 3, mask), [1.0, 6.0, 0.0])
    value, gradient = jax.jit(jax.value_and_grad(loss))(values)
    assert float(value) == 0.5 * 1.0 + 0.25 * 6.0
    np.testing.assert_array_equal(gradient, [[0.5, 0.0, 0.25], [0.0, 0.25, 0.0]])


def test_padding_ids_receive_no_gradient():
    values, mask = jnp.ones((2, 3)), jnp.ones((2, 3), bool)
    ids = jnp.asarray([[0, 0, 2], [1, 2, 5]])
    gradient = jax.grad(lambda v: policy_gradient_loss(v, jnp.asarray([3.0, 4.0]), ids, mask)[0])(
        values
    )
    np.testing.assert_array_equal(gradient, [[3.0, 3.0, 0.0], [4.0, 0.0, 0.0]])


def test_a_wholly_masked_batch_has_zero_loss_zero_gradient_and_zero_count():
    values, mask = jnp.full((2, 3), jnp.nan), jnp.zeros((2, 3), bool)
    ids = jnp.asarray([[0, 0, 0], [1, 1, 1]])
    weights = delta_l(jnp.sum(mask, axis=1))

    def loss(values):
        return policy_gradient_loss(values, weights, ids, mask)

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(values)
    assert float(value) == 0.0
    np.testing.assert_array_equal(gradient, np.zeros((2, 3)))
    assert [float(x) for x in metrics["policy/token_loss"]] == [0.0, 0.0]


class Layout:
    """Responses of a batch placed into one micro-batch: whole rows or packed, in any padding."""

    def __init__(self, members, lengths, width, rows, *, packed):
        self.members, self.tokens = members, np.full((rows, width), -1)
        self.ids = np.full((rows, width), len(members))
        starts, row, column = np.cumsum([0, *lengths]), 0, 0
        for segment, i in enumerate(members):
            if not packed or column + lengths[i] > width:
                row, column = row + (segment > 0), 0
            at = slice(column, column + lengths[i])
            self.tokens[row, at] = np.arange(starts[i], starts[i + 1])
            self.ids[row, at] = segment
            column += lengths[i]


@functools.cache
def layout_loss():
    """Loss, gradient by token of the batch, and metrics of one micro-batch."""

    def loss(values, tokens, ids, mask, weights):
        padded = jnp.where(tokens < 0, jnp.nan, values[tokens])
        return policy_gradient_loss(jnp.sin(padded), weights, ids, mask)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


LENGTHS = np.asarray([5, 1, 9, 3, 7, 2, 4, 8])
rng_ = np.random.default_rng(11)
VALUES, TRAINED = rng_.normal(size=LENGTHS.sum()), rng_.random(LENGTHS.sum()) < 0.8


def whole_batch(method: str) -> tuple[np.ndarray, float, np.ndarray]:
    """Weights, loss and gradient of the batch without any layout, in NumPy."""
    segments = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    trained = np.bincount(segments, TRAINED, len(LENGTHS)).astype(int)
    weights = expected(method, trained, alpha=0.75)
    per_token = weights[segments] * TRAINED
    return weights, float(np.sum(per_token * np.sin(VALUES))), per_token * np.cos(VALUES)


SPLITS = {
    "whole": [[0, 1, 2, 3, 4, 5, 6, 7]],
    "singly": [[i] for i in range(8)],
    "halves": [[0, 1, 2, 3], [4, 5, 6, 7]],
    "uneven": [[2], [0, 1, 3, 4, 5, 6], [7]],
    "shuffled": [[7, 0, 3], [6, 1], [5, 2, 4]],
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("width", "packed"), [(9, False), (17, False), (17, True), (40, True)])
def test_loss_gradient_and_metrics_are_equal_for_any_split_padding_and_packing(
    method, split, width, packed
):
    weights, loss, gradient = whole_batch(method)
    total, slope, sums = 0.0, np.zeros(len(VALUES)), np.zeros(2)
    with jax.enable_x64(True):
        for members in SPLITS[split]:
            layout = Layout(members, LENGTHS, width, rows=8, packed=packed)
            padded = np.zeros(8)
            padded[: len(members)] = weights[members]
            mask = (layout.tokens >= 0) & TRAINED[layout.tokens]
            ids = np.where(layout.tokens >= 0, layout.ids, 8)
            arrays = map(jnp.asarray, (VALUES, layout.tokens, ids, mask, padded))
            (part, metrics), part_gradient = layout_loss()(*arrays)
            total += float(part)
            slope += np.asarray(part_gradient)
            sums += [float(x) for x in metrics["policy/token_loss"]]
    assert total == pytest.approx(loss, rel=FLOAT64)
    np.testing.assert_allclose(slope, gradient, rtol=FLOAT64)
    assert sums[0] == pytest.approx(np.sum(np.sin(VALUES) * TRAINED), rel=FLOAT64)
    assert sums[1] == TRAINED.sum()


def test_the_mean_of_microbatch_token_means_is_another_number():
    """The mistake that weights rule out: with ragged lengths it is far from the token mean."""
    wrong = [np.sin(VALUES[:15]).mean(), np.sin(VALUES[15:]).mean()]
    assert not math.isclose(np.mean(wrong), np.sin(VALUES).mean(), rel_tol=0.05)


MIXED = jnp.asarray([3, 9, 1, 0, 20, 5, 5, 12])
GROUPS = jnp.asarray([0, 0, 1, 1, 2, 2, 3, 3])


def test_prompt_and_local_token_means_are_means_of_token_means():
    values = np.random.default_rng(0).normal(size=8)
    lengths, groups = np.asarray(MIXED), np.asarray(GROUPS)
    sums = values * lengths  # every token of response i has the value values[i]
    want = np.mean([sums[groups == g].sum() / lengths[groups == g].sum() for g in range(4)])
    for function in (prompt_mean, local_token_mean):
        assert float(function(MIXED, GROUPS) @ jnp.asarray(sums)) == pytest.approx(want, rel=1e-5)


def test_sums_are_one_and_one_over_b():
    where = jnp.arange(8) != 4
    np.testing.assert_array_equal(token_sum(MIXED), [1, 1, 1, 0, 1, 1, 1, 1])
    np.testing.assert_array_equal(token_sum(MIXED, where=where), [1, 1, 1, 0, 0, 1, 1, 1])
    np.testing.assert_allclose(sequence_sum(MIXED), np.asarray(MIXED > 0) / 7, rtol=1e-6)
    np.testing.assert_allclose(sequence_sum(MIXED), constant_length(MIXED, normalizer=1), rtol=1e-6)


def test_balanced_is_a_token_mean_for_each_sign_mixed_by_counts():
    advantages = jnp.asarray([1.0, -1, -1, 2, 0, -3, 1, 0])
    got = np.asarray(balanced(MIXED, advantages))
    # Positive: responses 0 and 6 (3 is empty), 8 tokens; negative: 1, 2, 5, 15 tokens; 5 in all.
    want = np.where(np.asarray(advantages) > 0, 2 / 5 / 8, 3 / 5 / 15)
    want = np.where(np.isin(np.arange(8), [3, 4, 7]), 0.0, want)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert float(jnp.sum(balanced(MIXED, jnp.zeros(8)))) == 0.0


def test_balanced_with_one_sign_is_the_token_mean():
    np.testing.assert_allclose(balanced(MIXED, jnp.ones(8)), token_mean(MIXED), rtol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.75, 1.6])
def test_inverse_variance_of_a_power_law_is_delta_l(beta):
    got = inverse_variance(MIXED, {"beta": beta}, normalizer=30, scope_ids=GROUPS)
    want = delta_l(MIXED, beta, normalizer=30, scope_ids=GROUPS)
    np.testing.assert_array_equal(got, want)


def test_inverse_variance_of_correlated_tokens_is_the_variance_of_their_sum():
    """Against the covariance matrix of the tokens, summed."""
    rho = np.asarray([0.5, 0.2, 0.1])
    variances = []
    for length in np.asarray(MIXED):
        lag = np.abs(np.arange(length)[:, None] - np.arange(length)[None, :])
        variances.append(np.concatenate([[1.0], rho, np.zeros(30)])[lag].sum())
    inverse = np.asarray([0.0 if v == 0 else 1 / v for v in variances])
    got = inverse_variance(MIXED, {"rho": jnp.asarray(rho)}, normalizer=4)
    np.testing.assert_allclose(got, inverse / inverse.sum() / 4, rtol=1e-5)


def test_independent_tokens_have_beta_one_and_fully_correlated_ones_beta_two():
    zero, one = {"rho": jnp.zeros(3)}, {"rho": jnp.ones(40)}
    np.testing.assert_allclose(inverse_variance(MIXED, zero), delta_l(MIXED, 1.0), rtol=1e-6)
    np.testing.assert_allclose(inverse_variance(MIXED, one), delta_l(MIXED, 2.0), rtol=1e-5)


def test_an_unknown_variance_is_refused():
    with pytest.raises(ValueError, match=r"variance: expected .*beta.*rho.*got \['gamma'\]"):
        inverse_variance(MIXED, {"gamma": 1.0})


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_sums_of_many_tokens_are_exact_in_every_input_precision(dtype):
    """8,192 ones are 8,192, though bfloat16 cannot count beyond 256."""
    ids, mask = jnp.zeros((2, 4096), int), jnp.ones((2, 4096), bool)
    ones = jnp.ones((2, 4096), dtype)
    sums = segment_sums(ones, ids, 1, mask)
    assert sums.dtype == jnp.float32 and float(sums[0]) == 8192.0
    loss, metrics = policy_gradient_loss(ones, jnp.asarray([0.5]), ids, mask)
    assert float(loss) == 4096.0
    assert tuple(map(float, metrics["policy/token_loss"])) == (8192.0, 8192.0)


@pytest.mark.parametrize("segments", [1, 3, 1000])
def test_a_million_tokens_are_summed_to_float32_precision(segments):
    size = 10**6
    values = jnp.full((size,), 0.1, jnp.float32)
    ids = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, segments, size)))
    sums = segment_sums(values, ids, segments, jnp.ones(size, bool))
    want = np.bincount(np.asarray(ids), minlength=segments) * np.float64(np.float32(0.1))
    np.testing.assert_allclose(sums, want, rtol=2e-5)
    gradient = jax.grad(lambda v: segment_sums(v, ids, segments, jnp.ones(size, bool)).sum())
    assert np.all(np.asarray(gradient(values)) == 1.0)


def test_means_know_their_segments_by_any_numbers():
    values = jnp.asarray([1.0, 2.0, 4.0, 8.0, 16.0])
    ids = jnp.asarray([700, -1, 700, 40, -1])
    mask = jnp.asarray([True, False, True, True, False])
    found = jax.jit(segment_means)(values, ids, mask)
    np.testing.assert_allclose(found, [2.5, 0.0, 2.5, 8.0, 0.0])
    within = segment_means(values, jnp.asarray([0, -1, 0, 1, 9]), mask, 2)
    np.testing.assert_allclose(within, [2.5, 0.0, 2.5, 8.0, 0.0])
    with pytest.raises(ValueError, match="num_segments: must be given"):
        segment_means(values, ids, mask, axis_name="data")
