"""Surrogates: every branch against a scalar transcription of the papers, values and gradients."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltal_jax.objective.surrogate import (
    SURROGATES,
    cispo,
    clipped,
    dppo,
    gmpo,
    gspo,
    gspo_token,
    ratio_diagnostics,
    reinforce,
    sapo,
)

LOW, HIGH = 0.2, 0.3
DUALS = [None, 3.0, 10.0]


def ppo(logprob: float, old: float, advantage: float, dual: float | None) -> tuple:
    """(loss, its derivative by logprob, branch) of one token, by cases."""
    moving = abs(logprob - old) < 20
    ratio = math.exp(min(max(logprob - old, -20.0), 20.0))
    slope = -advantage * ratio if moving else 0.0
    if advantage > 0 and ratio > 1 + HIGH:
        return -advantage * (1 + HIGH), 0.0, "high"
    if advantage < 0 and ratio < 1 - LOW:
        return -advantage * (1 - LOW), 0.0, "low"
    if advantage < 0 and dual is not None and ratio > dual:
        return -advantage * dual, 0.0, "dual"
    return -advantage * ratio, slope, "inside"


#: Log-ratios on both sides of every edge, none within rounding of one.
LOG_RATIOS = [math.log(r) for r in (1e-3, 0.5, 0.79, 0.81, 0.95, 1, 1.2, 1.29, 1.31, 2, 2.9, 3.1)]
LOG_RATIOS += [math.log(r) for r in (9.9, 10.1, 100.0)] + [-30.0, -19.0, 19.0, 21.0]
ADVANTAGES = [-2.0, -0.3, 0.0, 0.7, 1.5]
OLD = -1.7


@functools.cache
def compiled(dual: float | None):
    def loss(logprobs, old, advantages):
        losses = clipped(logprobs, old, advantages, clip_low=LOW, clip_high=HIGH, dual_clip=dual)
        return jnp.sum(losses), losses

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def grid() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    cases = np.asarray(list(itertools.product(LOG_RATIOS, ADVANTAGES)))
    return OLD + cases[:, 0], np.full(len(cases), OLD), cases[:, 1]


@pytest.mark.parametrize("dual", DUALS)
@pytest.mark.parametrize("x64", [True, False])
def test_every_branch_has_the_value_and_the_gradient_of_the_scalar_form(dual, x64):
    by_hand = [ppo(*case, dual) for case in zip(*grid(), strict=True)]
    branches = {branch for *_, branch in by_hand}
    assert branches == {"inside", "high", "low"} | ({"dual"} if dual else set())
    with jax.enable_x64(x64):
        arrays = (jnp.asarray(x, float) for x in grid())
        (_, losses), gradient = compiled(dual)(*arrays)
    # A float32 log-ratio of 20 is rounded by 1e-6, and so is the ratio's logarithm.
    rtol = 1e-12 if x64 else 4e-6
    np.testing.assert_allclose(losses, [loss for loss, *_ in by_hand], rtol=rtol)
    np.testing.assert_allclose(gradient, [slope for _, slope, _ in by_hand], rtol=rtol)


@pytest.mark.parametrize("dual", DUALS)
def test_the_gradient_is_exactly_zero_wherever_the_ratio_is_clipped(dual):
    _, gradient = compiled(dual)(*(jnp.asarray(x, jnp.float32) for x in grid()))
    branches = [ppo(*case, dual)[2] for case in zip(*grid(), strict=True)]
    out = np.asarray([branch != "inside" for branch in branches])
    np.testing.assert_array_equal(np.asarray(gradient)[out], 0.0)


@given(
    st.floats(-3, 3).filter(lambda x: min(abs(math.exp(x) - e) for e in (0.8, 1.3, 3, 10)) > 1e-3),
    st.floats(-5, 5),
    st.sampled_from(DUALS),
)
def test_any_token_has_the_scalar_form(log_ratio, advantage, dual):
    loss, slope, _ = ppo(OLD + log_ratio, OLD, advantage, dual)
    with jax.enable_x64(True):
        arrays = (jnp.asarray([x], float) for x in (OLD + log_ratio, OLD, advantage))
        (_, losses), gradient = compiled(dual)(*arrays)
    assert float(losses[0]) == pytest.approx(loss, rel=1e-12)
    assert float(gradient[0]) == pytest.approx(slope, rel=1e-12)


@pytest.mark.parametrize("dual", DUALS)
def test_at_ratio_one_the_gradient_is_reinforces_and_the_loss_is_minus_the_advantage(dual):
    logprobs = jnp.asarray([-0.1, -2.0, -7.5, -0.0])
    advantages = jnp.asarray([1.5, -2.0, 0.0, 0.3])
    (_, losses), gradient = compiled(dual)(logprobs, logprobs, advantages)
    of_reinforce = jax.grad(lambda x: jnp.sum(reinforce(x, x, advantages)))(logprobs)
    np.testing.assert_array_equal(losses, -advantages)
    np.testing.assert_array_equal(gradient, of_reinforce)
    np.testing.assert_array_equal(gradient, -advantages)


def test_reinforce_is_minus_advantage_times_logprob_whatever_the_old_ones_are():
    logprobs, advantages = jnp.asarray([-0.5, -2.0, -4.0]), jnp.asarray([2.0, -3.0, 0.0])
    for old in (jnp.zeros(3), jnp.full(3, -50.0), jnp.full(3, jnp.nan)):
        loss = reinforce(logprobs, old, advantages)
        np.testing.assert_array_equal(loss, [1.0, -6.0, 0.0])
    gradient = jax.grad(lambda x: jnp.sum(reinforce(x, logprobs, advantages)))(logprobs)
    np.testing.assert_array_equal(gradient, [-2.0, 3.0, 0.0])


def test_the_clip_range_is_asymmetric():
    ratio = jnp.asarray([0.5, 0.95, 1.4, 5.0])
    losses = clipped(jnp.log(ratio), jnp.zeros(4), jnp.ones(4), clip_low=0.1, clip_high=0.5)
    np.testing.assert_allclose(losses, [-0.5, -0.95, -1.4, -1.5], rtol=1e-6)
    losses = clipped(jnp.log(ratio), jnp.zeros(4), -jnp.ones(4), clip_low=0.1, clip_high=0.5)
    np.testing.assert_allclose(losses, [0.9, 0.95, 1.4, 5.0], rtol=1e-6)


@pytest.mark.parametrize(("dual", "capped"), [(3.0, [3.0, 3.0]), (10.0, [4.0, 10.0])])
def test_the_papers_clips_by_hand(dual, capped):
    """Ranges 0.2 and 0.3; dual clip 3 in its experiments on aggregation, 10 in those with DAPO."""
    ratio, clips = jnp.asarray([0.5, 1.25, 1.4, 4.0, 12.0]), {"clip_low": 0.2, "clip_high": 0.3}
    losses = clipped(jnp.log(ratio), jnp.zeros(5), jnp.ones(5), **clips, dual_clip=dual)
    np.testing.assert_allclose(losses, [-0.5, -1.25, -1.3, -1.3, -1.3], rtol=1e-6)
    losses = clipped(jnp.log(ratio), jnp.zeros(5), -jnp.ones(5), **clips, dual_clip=dual)
    np.testing.assert_allclose(losses, [0.8, 1.25, 1.4, *capped], rtol=1e-6)


def test_without_a_dual_clip_a_negative_advantage_has_no_upper_bound():
    far = jnp.asarray([math.log(1000.0)])
    bound = dict(clip_low=LOW, clip_high=HIGH)
    free = clipped(far, jnp.zeros(1), -jnp.ones(1), **bound)
    held = clipped(far, jnp.zeros(1), -jnp.ones(1), **bound, dual_clip=3.0)
    np.testing.assert_allclose([free[0], held[0]], [1000.0, 3.0], rtol=1e-6)


def test_the_ratio_stays_finite_for_any_logprobs():
    logprobs, old = jnp.asarray([-1e4, 0.0, -3e38]), jnp.asarray([0.0, -1e4, 0.0])
    for sign in (1.0, -1.0):
        (_, losses), gradient = compiled(None)(logprobs, old, jnp.full(3, sign))
        assert np.isfinite(losses).all()
        np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("dual", DUALS)
def test_the_loss_is_positively_homogeneous_in_the_advantage(dual):
    """So weighting the token loss equals weighting the advantage, as the reference does."""
    logprobs, old, advantages = (jnp.asarray(x, jnp.float32) for x in grid())
    (_, losses), _ = compiled(dual)(logprobs, old, advantages)
    (_, scaled), _ = compiled(dual)(logprobs, old, advantages * 0.125)
    np.testing.assert_array_equal(scaled, losses * 0.125)


@pytest.mark.parametrize("dual", DUALS)
def test_diagnostics_name_the_branch_that_was_taken(dual):
    logprobs, old, advantages = grid()
    arrays = (jnp.asarray(x, jnp.float32) for x in (logprobs, old, advantages))
    meters = ratio_diagnostics(*arrays, clip_low=LOW, clip_high=HIGH, dual_clip=dual)
    branches = [ppo(*case, dual)[2] for case in zip(logprobs, old, advantages, strict=True)]
    for name in ("high", "low", "dual"):
        taken = [float(branch == name) for branch in branches]
        np.testing.assert_array_equal(meters[f"clip_frac_{name}"], taken)
    np.testing.assert_allclose(meters["approx_kl"], old - logprobs, rtol=1e-6, atol=1e-6)
    ratio = np.exp(np.clip(logprobs - old, -20, 20))
    np.testing.assert_allclose(meters["ratio"], ratio, rtol=4e-6)


def test_diagnostics_carry_no_gradient():
    logprobs, old, advantages = (jnp.asarray(x, jnp.float32) for x in grid())

    def total(logprobs):
        meters = ratio_diagnostics(logprobs, old, advantages, clip_low=LOW, clip_high=HIGH)
        return sum(jnp.sum(values) for values in meters.values())

    np.testing.assert_array_equal(jax.grad(total)(logprobs), 0.0)


@pytest.mark.parametrize("function", [clipped, reinforce])
def test_the_table_names_every_function_by_its_own_name(function):
    assert SURROGATES[function.__name__] is function


#: Two responses of 3 and 2 tokens and one padded position, in one packed row.
SEGMENTS = jnp.asarray([0, 0, 0, 1, 1, 2])
MASK = jnp.asarray([True, True, True, True, True, False])
AFTER = jnp.asarray([-1.0, -0.5, -2.0, -0.3, -1.2, 7.0])
BEFORE = jnp.asarray([-1.2, -0.9, -1.8, -0.2, -1.0, -7.0])
SIGNS = jnp.asarray([1.5, 1.5, 1.5, -2.0, -2.0, 0.0])
PACKED = {"segment_ids": SEGMENTS, "mask": MASK, "num_segments": 2}


def packed_gradient(function, **options):
    """d(sum of the masked losses) / d logprobs."""

    def total(logprobs):
        return jnp.sum(jnp.where(MASK, function(logprobs, BEFORE, SIGNS, **options), 0.0))

    return np.asarray(jax.grad(total)(AFTER))


def test_gspo_is_the_clip_of_the_geometric_mean_ratio():
    means = np.asarray([(0.2 + 0.4 - 0.2) / 3, (-0.1 - 0.2) / 2])
    ratios = np.exp(means)
    want = np.asarray([-1.5 * min(ratios[0], 1.05), 2.0 * max(ratios[1], 0.9)])
    options = PACKED | {"clip_low": 0.1, "clip_high": 0.05}
    for function in (gspo, gspo_token):
        got = function(AFTER, BEFORE, SIGNS, **options)
        np.testing.assert_allclose(got[:5], want[[0, 0, 0, 1, 1]], rtol=1e-5)
    # Response 0 is clipped; response 1 (ratio 0.86) is clipped from below too.
    np.testing.assert_array_equal(packed_gradient(gspo, **options), 0.0)


def test_gspo_spreads_a_tokens_gradient_and_gspo_token_keeps_it():
    """Summed over a response both are A·s, in equal parts; GSPO-token can weigh tokens apart."""
    options = PACKED | {"clip_low": 0.9, "clip_high": 0.9}
    ratios = np.exp([0.4 / 3, -0.15])
    want = np.asarray([*[-1.5 * ratios[0]] * 3, *[2.0 * ratios[1]] * 2, 0.0])
    for function in (gspo, gspo_token):
        np.testing.assert_allclose(packed_gradient(function, **options), want, rtol=1e-5)


def test_cispo_never_loses_a_gradient():
    got = packed_gradient(cispo, clip_low=0.1, clip_high=0.2)
    ratios = np.exp(np.asarray(AFTER - BEFORE)[:5])
    want = -np.clip(ratios, 0.9, 1.2) * np.asarray(SIGNS)[:5]
    np.testing.assert_allclose(got[:5], want, rtol=1e-5)
    assert np.abs(got[:5]).min() > 0 and got[5] == 0


def test_gmpo_clips_tokens_in_log_space_before_the_mean():
    options = PACKED | {"clip_low": 0.15, "clip_high": 0.3}
    kept = [(0.2 + 0.3 - 0.2) / 3, (-0.1 - 0.15) / 2]
    want = np.asarray([-1.5 * np.exp(kept[0])] * 3 + [2.0 * np.exp(kept[1])] * 2)
    np.testing.assert_allclose(gmpo(AFTER, BEFORE, SIGNS, **options)[:5], want, rtol=1e-5)
    slopes = packed_gradient(gmpo, **options)
    assert (slopes[:5] != 0).tolist() == [True, False, True, True, False]


def test_sapo_has_slope_one_on_policy_and_fades_on_both_sides():
    at = jnp.asarray([0.0])
    for sign in (1.0, -1.0):
        slope = jax.grad(lambda x, a=sign: sapo(x, at, jnp.asarray([a]))[0])
        assert float(slope(at)[0]) == pytest.approx(-sign, rel=1e-6)
        assert abs(float(slope(at + 1.5)[0])) / np.exp(1.5) < 0.5
    value = float(sapo(jnp.log(jnp.asarray([1.5])), at, jnp.asarray([2.0]), tau_positive=2.0)[0])
    assert value == pytest.approx(-2.0 * (4 / 2) / (1 + np.exp(-2 * 0.5)), rel=1e-6)


def test_dppo_drops_tokens_that_moved_too_far_and_move_on():
    old = jnp.log(jnp.asarray([0.3, 0.3, 0.3, 0.3, 0.001]))
    new = jnp.log(jnp.asarray([0.6, 0.6, 0.05, 0.4, 0.01]))
    signs = jnp.asarray([1.0, -1.0, -1.0, 1.0, 1.0])
    got = np.asarray(dppo(new, old, signs, threshold=0.2))
    # Up by 0.3 with A > 0: dropped. With A < 0 it may come back. Down with A < 0: dropped. The
    # small step stays; so does a rare token at ten times its probability, which a clip of the
    # ratio would drop.
    np.testing.assert_allclose(got, [0.0, 2.0, 0.0, -4 / 3, -10.0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", sorted(SURROGATES))
def test_every_surrogate_has_the_policy_gradient_on_policy(name):
    options = PACKED if name in ("gspo", "gspo_token", "gmpo") else {}

    def total(logprobs):
        losses = SURROGATES[name](logprobs, AFTER, SIGNS, **options)
        return jnp.sum(jnp.where(MASK, losses, 0.0))

    np.testing.assert_allclose(jax.grad(total)(AFTER)[:5], -SIGNS[:5], rtol=1e-5)
