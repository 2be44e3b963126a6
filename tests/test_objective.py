"""A config's objective is the pure functions of `deltal_jax.objective`, with its options."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltal_jax.config import SCOPED, ObjectiveConfig, load_config
from deltal_jax.errors import UserError
from deltal_jax.objective import advantages as advantage
from deltal_jax.objective import aggregation, correction, surrogate
from deltal_jax.objective.advantages import ADVANTAGES
from deltal_jax.objective.aggregation import AGGREGATIONS
from deltal_jax.objective.correction import CORRECTIONS
from deltal_jax.objective.diagnostics import aggregation_diagnostics
from deltal_jax.objective.divergence import DIVERGENCES
from deltal_jax.objective.surrogate import SURROGATES
from deltal_jax.training import objective as module
from deltal_jax.training.buckets import make_buckets
from deltal_jax.training.objective import (
    SURROGATE_OPTIONS,
    make_loss,
    microbatch_ids,
    minibatch_ids,
    reject,
    surrogate_options,
    weigh,
)
from deltal_jax.types import Rollout
from tests import fakes

COUNT = 24
OPTIONS = {
    "rl.prompts_per_step": 6,
    "rl.samples_per_prompt": 4,
    "rl.updates_per_rollout": 2,
    "objective.alpha": 0.75,
    "objective.rho": [0.3, 0.1],
    "objective.microbatch_size": 5,
    "objective.normalizer": 37.0,
}
TRUNCATED, MISSING = (2, 9, 21), (5, 9, 12)
FILTERS = [("none", False), ("truncated", False), ("none", True), ("truncated", True)]


def config(**objective):
    return load_config(
        "countdown-tiny", OPTIONS | {f"objective.{name}": x for name, x in objective.items()}
    )


@pytest.fixture
def uncompiled(monkeypatch):
    """`weigh` operation by operation: a program for each of so many configs would take minutes."""

    plain = module.weigh_arrays.__wrapped__

    def weigh(*arrays, **options):
        arrays = (None if array is None else jnp.asarray(array) for array in arrays)
        return plain(*arrays, **options)

    monkeypatch.setattr(module, "weigh_arrays", weigh)


@pytest.fixture(scope="module")
def rollout():
    truncated = np.isin(np.arange(COUNT), TRUNCATED)
    return dataclasses.replace(fakes.rollout(COUNT), truncated=truncated)


@pytest.fixture(scope="module")
def rewards():
    draws = np.random.default_rng(0).integers(0, 3, COUNT).astype(np.float32)
    draws[list(MISSING)] = np.nan
    return draws


def direct_weights(name, lengths, advantages, scope, where, count_masked):
    """The aggregation called by hand with the numbers of OPTIONS."""
    groups = jnp.arange(COUNT) // 4
    micro = jnp.asarray([*[0] * 5, *[1] * 5, *[2] * 2, *[3] * 5, *[4] * 5, *[5] * 2])
    ids = {"batch": None, "minibatch": jnp.arange(COUNT) // 12, "group": groups}[scope]
    kept = {"where": where, "count_masked": count_masked}
    scoped = kept | {"scope_ids": ids}
    rho = {"rho": jnp.asarray([0.3, 0.1])}
    return {
        "delta_l": lambda: aggregation.delta_l(lengths, 0.75, normalizer=37.0, **scoped),
        "sequence_mean": lambda: aggregation.sequence_mean(lengths, **scoped),
        "token_mean": lambda: aggregation.token_mean(lengths, **scoped),
        "constant_length": lambda: aggregation.constant_length(lengths, normalizer=37.0, **scoped),
        "prompt_mean": lambda: aggregation.prompt_mean(lengths, groups, **kept),
        "token_sum": lambda: aggregation.token_sum(lengths, where=where),
        "sequence_sum": lambda: aggregation.sequence_sum(lengths, **scoped),
        "local_token_mean": lambda: aggregation.local_token_mean(lengths, micro, **kept),
        "balanced": lambda: aggregation.balanced(lengths, advantages, where=where),
        "inverse_variance": lambda: aggregation.inverse_variance(
            lengths, rho, normalizer=37.0, **scoped
        ),
    }[name]()


COMBINATIONS = [(name, scope) for name in SCOPED for scope in ("batch", "minibatch", "group")]
COMBINATIONS += [(name, "batch") for name in AGGREGATIONS if name not in SCOPED]


@pytest.mark.parametrize(("name", "scope"), COMBINATIONS)
@pytest.mark.usefixtures("uncompiled")
def test_weights_are_those_of_the_aggregation_in_its_scope(name, scope, rollout, rewards):
    """Under each filter; the auxiliary weights are those of the next aggregation in the scope."""
    alike = [other for other, its in COMBINATIONS if its == scope]
    auxiliary = alike[(alike.index(name) + 1) % len(alike)]
    lengths = jnp.asarray(rollout.response_lengths)
    advantages = advantage.group_standardize(jnp.asarray(rewards), jnp.arange(COUNT) // 4)
    for overlong_filter, count_masked in FILTERS:
        if count_masked and {name, auxiliary} & {"token_sum", "balanced"}:
            continue  # refused by the config
        found = weigh(
            config(
                aggregation=name,
                auxiliary_aggregation=auxiliary,
                scope=scope,
                overlong_filter=overlong_filter,
                count_masked=count_masked,
                entropy_coefficient=0.1,
            ),
            rollout,
            rewards,
        )
        out = {*MISSING, *(TRUNCATED if overlong_filter == "truncated" else ())}
        where = jnp.asarray([i not in out for i in range(COUNT)])
        for method, weights in ((name, found.weights), (auxiliary, found.auxiliary_weights)):
            want = direct_weights(method, lengths, advantages, scope, where, count_masked)
            np.testing.assert_allclose(weights, want, rtol=2e-6)
            assert np.all(weights[list(out)] == 0) and np.sum(weights) > 0
        np.testing.assert_allclose(found.advantages, advantages, rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("uncompiled")
def test_filters_change_the_denominators_by_hand(rollout, rewards):
    """token_mean: 1 over the tokens that count."""
    lengths, known = rollout.response_lengths, ~np.isnan(rewards)
    for overlong_filter, count_masked in FILTERS:
        given = config(
            aggregation="token_mean", overlong_filter=overlong_filter, count_masked=count_masked
        )
        trained = known & ~rollout.truncated if overlong_filter == "truncated" else known
        total = lengths.sum() if count_masked else lengths[trained].sum()
        found = weigh(given, rollout, rewards).weights
        np.testing.assert_allclose(found, np.where(trained, 1 / total, 0), rtol=1e-6)


def small_batch(lengths, ended, limit):
    """A rollout of responses of these lengths to prompts of one token, two a group."""
    count, width = len(lengths), limit + 1
    at = np.arange(width)[None]
    lengths = np.asarray(lengths, np.int32)
    zeros = np.zeros((count, width), np.int32)
    return Rollout(
        tokens=zeros,
        prompt_lengths=np.ones(count, np.int32),
        lengths=lengths + 1,
        loss_mask=(at >= 1) & (at <= lengths[:, None]),
        logprobs=zeros.astype(np.float32),
        truncated=~np.asarray(ended),
        group_ids=(np.arange(count) // 2).astype(np.int32),
    )


#: M = 6, B = 8 in four groups of two and two mini-batches. The third response ends with an EOS
#: exactly at M, the sixth is cut off there. ΣL = 32.
LENGTHS, ENDED = (2, 4, 6, 4, 3, 6, 5, 2), (1, 1, 1, 1, 1, 0, 1, 1)
REWARDS = np.asarray([1, 0, 1, 0, 0, 1, 1, 0], np.float32)


def paper_weights(**objective):
    options = {
        "rollout.max_response_length": 6,
        "rl.prompts_per_step": 4,
        "rl.samples_per_prompt": 2,
        "rl.updates_per_rollout": 2,
    }
    options |= {f"objective.{name}": value for name, value in objective.items()}
    rollout = small_batch(LENGTHS, np.asarray(ENDED, bool), 6)
    return weigh(load_config("countdown-tiny", options), rollout, REWARDS)


@pytest.mark.usefixtures("uncompiled")
def test_the_papers_norms_by_hand():
    """M = 6, B = 8; all Σ_i w_i are 1/M but those of GRPO and of DAPO."""
    lengths = np.asarray(LENGTHS)
    inverse = 1 / 2 + 1 / 4 + 1 / 6 + 1 / 4 + 1 / 3 + 1 / 6 + 1 / 5 + 1 / 2  # Σ_j 1/L_j
    # Micro-batches of 4 responses: 2 + 4 + 6 + 4 = 16 tokens and 3 + 6 + 5 + 2 = 16; K = 2.
    cases = {
        "sequence_mean": 1 / (8 * lengths),
        "token_mean": np.full(8, 1 / 32),
        "local_token_mean": np.full(8, 1 / (2 * 16)),
        "constant_length": np.full(8, 1 / 48),
        "delta_l": 1 / lengths / inverse / 6,
    }
    for name, expected in cases.items():
        found = paper_weights(aggregation=name).weights
        np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=name)
    # Of two: 2 + 4, 6 + 4, 3 + 6 and 5 + 2 tokens; K = 4.
    found = paper_weights(aggregation="local_token_mean", microbatch_size=2).weights
    expected = 1 / (4 * np.repeat([6, 10, 9, 7], 2))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    found = paper_weights(alpha=0.75).weights
    expected = lengths**-0.75 / (lengths**-0.75).sum() / 6
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.usefixtures("uncompiled")
def test_the_references_overlong_filter_takes_every_response_of_the_limit_by_hand():
    """No loss where the last place has a token, even an EOS; group statistics and denominators are
    those of all: Σ_j L_j stays 32, and every advantage is (r − 1/2) / (√(1/2) + 1e-6)."""
    reference = {"overlong_filter": "at_limit", "count_masked": True, "aggregation": "token_mean"}
    found = paper_weights(**reference)
    np.testing.assert_allclose(found.weights, np.asarray([1, 1, 0, 1, 1, 0, 1, 1]) / 32, rtol=1e-6)
    expected = (REWARDS - 0.5) / (0.5**0.5 + 1e-6)
    np.testing.assert_allclose(found.advantages, expected, rtol=1e-6)
    cut_off = paper_weights(**reference | {"overlong_filter": "truncated"}).weights
    np.testing.assert_allclose(cut_off, np.asarray([1, 1, 1, 1, 1, 0, 1, 1]) / 32, rtol=1e-6)
    left = paper_weights(**reference | {"count_masked": False}).weights
    np.testing.assert_allclose(left, np.asarray([1, 1, 0, 1, 1, 0, 1, 1]) / 20, rtol=1e-6)
    # Micro-batches of 4 still have 16 tokens each, and K stays 2.
    local = paper_weights(**reference | {"aggregation": "local_token_mean"}).weights
    np.testing.assert_allclose(local, np.asarray([1, 1, 0, 1, 1, 0, 1, 1]) / 32, rtol=1e-6)


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.usefixtures("uncompiled")
def test_advantages_are_those_of_the_estimator_and_leave_missing_rewards_out(
    name, rollout, rewards
):
    groups, given = jnp.arange(COUNT) // 4, jnp.asarray(rewards)
    lengths = jnp.asarray(rollout.response_lengths)
    want = {
        "group_standardize": lambda: advantage.group_standardize(given, groups),
        "group_center": lambda: advantage.group_center(given, groups),
        "leave_one_out": lambda: advantage.leave_one_out(given, groups),
        "batch_standardize": lambda: advantage.batch_standardize(given),
        "length_weighted_baseline": lambda: advantage.length_weighted_baseline(
            given, lengths, groups
        ),
        "max_rl": lambda: advantage.max_rl(given, groups),
    }[name]()
    plain, filtered = (
        weigh(config(advantage=name, overlong_filter=filter_), rollout, rewards)
        for filter_ in ("none", "truncated")
    )
    np.testing.assert_allclose(plain.advantages, want, rtol=1e-6, atol=1e-7)
    assert np.all(plain.advantages[list(MISSING)] == 0) and np.any(plain.advantages != 0)
    # A truncated response has a reward: it stays in its group's statistics.
    np.testing.assert_array_equal(filtered.advantages, plain.advantages)


def test_the_meters_are_those_of_the_weights_and_advantages(rollout, rewards):
    found = weigh(config(), rollout, rewards)
    want = aggregation_diagnostics(
        jnp.asarray(found.weights),
        jnp.asarray(rollout.response_lengths),
        jnp.asarray(found.advantages),
        normalizer=37.0,
    )
    for name, value in want.items():
        assert found.metrics[f"aggregation/{name}"] == pytest.approx(float(value), rel=1e-5)
    assert found.metrics["aggregation/bias_factor"] == pytest.approx(1.0, rel=1e-6)
    for name in ("mean", "min", "max"):
        want = getattr(np, name)(found.advantages)
        assert found.metrics[f"advantage/{name}"] == pytest.approx(float(want), rel=1e-6, abs=1e-7)
    # M defaults to the longest response: the weights sum to 1/192.
    longest = weigh(config(normalizer=None), rollout, rewards)
    assert np.sum(longest.weights) == pytest.approx(1 / 192, rel=1e-6)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("scope", ["batch", "minibatch", "group"])
@pytest.mark.parametrize(("overlong_filter", "count_masked"), FILTERS)
def test_what_is_unweighted_has_equal_weights_of_all_that_count(
    scope, overlong_filter, count_masked, rollout, rewards
):
    given = config(scope=scope, overlong_filter=overlong_filter, count_masked=count_masked)
    found = weigh(given, rollout, rewards)
    np.testing.assert_array_equal(found.unweighted > 0, found.weights > 0)
    assert np.ptp(found.unweighted[found.unweighted > 0]) == 0


@pytest.mark.usefixtures("uncompiled")
def test_auxiliary_weights_that_no_term_uses_are_zero_and_need_no_options(rollout, rewards):
    given = config(auxiliary_aggregation="inverse_variance", rho=None)
    np.testing.assert_array_equal(weigh(given, rollout, rewards).auxiliary_weights, 0.0)
    on = weigh(config(auxiliary_aggregation="token_sum", kl_coefficient=0.1), rollout, rewards)
    assert on.auxiliary_weights.sum() == COUNT - len(MISSING)


@pytest.mark.usefixtures("uncompiled")
def test_max_rl_refuses_negative_rewards_in_one_line(rollout, rewards):
    given = config(advantage="max_rl")
    negative = rewards.copy()
    negative[0] = -0.5
    with pytest.raises(UserError) as refused:
        weigh(given, rollout, negative)
    assert str(refused.value) == (
        "objective.advantage: max_rl takes no negative rewards; choose another"
    )
    weigh(given, rollout, rewards)  # a missing one is not negative


def test_minibatches_are_whole_prompts_in_order(rollout):
    np.testing.assert_array_equal(minibatch_ids(config(), rollout), np.arange(COUNT) // 12)


@pytest.mark.parametrize(
    ("minibatches", "size", "want"),
    [
        ([0, 0, 0, 0, 0, 1, 1, 1], 2, [0, 0, 1, 1, 2, 3, 3, 4]),
        ([0, 0, 0, 0, 0, 1, 1, 1], 3, [0, 0, 0, 1, 1, 2, 2, 2]),
        ([0, 0, 0, 0, 0, 1, 1, 1], 9, [0, 0, 0, 0, 0, 1, 1, 1]),
        ([0, 0, 1, 2, 2, 2], 1, [0, 1, 2, 3, 4, 5]),
        ([0], 4, [0]),
    ],
)
def test_microbatches_are_consecutive_responses_inside_every_minibatch(minibatches, size, want):
    found = microbatch_ids(config(microbatch_size=size), np.asarray(minibatches))
    np.testing.assert_array_equal(found, want)


def mismatched(rollout):
    """Recomputed log-probabilities: off by far in response 1, in single tokens elsewhere."""
    rng = np.random.default_rng(3)
    shift = rng.normal(0, 0.2, rollout.logprobs.shape)
    shift[1] = 3.0
    shift[::4] = np.where(rng.random(shift[::4].shape) < 0.5, shift[::4], -2.0)
    return np.where(rollout.loss_mask, rollout.logprobs + shift, 0.0).astype(np.float32)


def ratios_of(rollout, old):
    """A list of each response's ratios over its trained tokens."""
    return [
        np.exp((old[i] - rollout.logprobs[i]).astype(float)[rollout.loss_mask[i]])
        for i in range(COUNT)
    ]


@pytest.mark.parametrize("name", CORRECTIONS)
@pytest.mark.usefixtures("uncompiled")
def test_dropped_tokens_leave_the_loss_mask_and_so_the_lengths_and_every_weight(
    name, rollout, rewards
):
    old = mismatched(rollout)
    given = config(
        importance_correction=name,
        correction_threshold=1.5,
        old_logprobs="recompute",
        aggregation="token_mean",
    )
    kept, metrics = reject(given.objective, rollout, old)
    inside = [(r >= 1 / 1.5) & (r <= 1.5) for r in ratios_of(rollout, old)]
    means = np.asarray([np.exp(np.mean(np.log(r))) for r in ratios_of(rollout, old)])
    want = {
        "none": rollout.response_lengths,
        "token_truncate": rollout.response_lengths,
        "token_mask": np.asarray([x.sum() for x in inside]),
        "sequence_mask": rollout.response_lengths * ((means >= 1 / 1.5) & (means <= 1.5)),
    }[name]
    np.testing.assert_array_equal(kept.response_lengths, want)
    assert not np.any(kept.loss_mask & ~rollout.loss_mask)
    total = rollout.loss_mask.sum()
    assert metrics["mismatch/dropped_frac"] == pytest.approx(1 - want.sum() / total)
    if name.endswith("mask"):
        assert 0 < want.sum() < total and want[1] == 0
    weights = weigh(given, kept, rewards).weights
    known = ~np.isnan(rewards)
    alive = known & (want > 0)
    np.testing.assert_allclose(weights, np.where(alive, 1 / want[known].sum(), 0), rtol=1e-6)
    for field in dataclasses.fields(rollout):
        if field.name != "loss_mask":
            assert getattr(kept, field.name) is getattr(rollout, field.name)


@pytest.mark.parametrize(("name", "scope"), COMBINATIONS)
@pytest.mark.usefixtures("uncompiled")
def test_a_response_without_trained_tokens_counts_nowhere(name, scope, rollout):
    """The weights of the others are those of a batch without it (with whole groups gone, so that
    the advantages stay)."""
    gone = np.isin(np.arange(COUNT), [*range(4, 8), *range(20, 24)])
    emptied = dataclasses.replace(rollout, loss_mask=rollout.loss_mask & ~gone[:, None])
    draws = np.random.default_rng(1).integers(0, 2, COUNT).astype(np.float32)
    given = config(aggregation=name, scope=scope)
    missing = np.where(gone, np.nan, draws).astype(np.float32)
    with_empty, without = weigh(given, emptied, draws), weigh(given, rollout, missing)
    np.testing.assert_allclose(with_empty.weights, without.weights, rtol=1e-6)
    assert np.all(with_empty.weights[gone] == 0) and np.all(np.isfinite(with_empty.weights))


@pytest.mark.usefixtures("uncompiled")
def test_a_batch_that_is_rejected_as_a_whole_has_no_weight_and_nothing_infinite(rollout, rewards):
    given = config(importance_correction="token_mask", old_logprobs="recompute")
    kept, metrics = reject(given.objective, rollout, rollout.logprobs + np.float32(5.0))
    assert metrics["mismatch/dropped_frac"] == 1.0 and not kept.loss_mask.any()
    found = weigh(given, kept, rewards)
    np.testing.assert_array_equal(found.weights, 0.0)
    assert all(np.isfinite(x) for x in found.metrics.values())


def test_mismatch_meters_by_hand(rollout):
    """Two responses of two and one trained tokens; ratios 2, 1/2 and 1."""
    small = dataclasses.replace(
        rollout,
        loss_mask=np.asarray([[False, True, True], [False, True, False]]),
        logprobs=np.full((2, 3), -2.0, np.float32),
    )
    old = np.asarray([[77.0, -2 + np.log(2), -2 - np.log(2)], [77.0, -2.0, 77.0]], np.float32)
    kept, metrics = reject(config().objective, small, old)
    log2 = np.log(2)
    assert metrics == pytest.approx(
        {
            "mismatch/logprob_diff_mean": 2 * log2 / 3,
            "mismatch/logprob_diff_max": log2,
            "mismatch/kl": ((2 - 1 - log2) + (0.5 - 1 + log2) + 0) / 3,
            "mismatch/ess": 3.5**2 / (3 * (4 + 0.25 + 1)),
            "mismatch/dropped_frac": 0.0,
        },
        rel=1e-5,
    )
    np.testing.assert_array_equal(kept.loss_mask, small.loss_mask)
    same = reject(config().objective, small, small.logprobs)[1]
    assert same.pop("mismatch/ess") == 1.0
    assert set(same.values()) == {0.0}


#: Options of every surrogate, none of them at its default.
SET = {
    "reinforce": {},
    "clipped": {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 1.2},
    "gspo": {"clip_low": 0.01, "clip_high": 0.02},
    "gspo_token": {"clip_low": 0.02, "clip_high": 0.01},
    "cispo": {"clip_low": 0.2, "clip_high": 0.1},
    "gmpo": {"clip_low": 0.1, "clip_high": 0.2},
    "sapo": {"tau_positive": 2.0, "tau_negative": 3.0},
    "dppo": {"threshold": 0.01},
}
SEQUENCE_LEVEL = {"gspo", "gspo_token", "gmpo"}


@pytest.fixture(scope="module")
def bucket(rollout):
    """A packed bucket, the log-probabilities of a policy that has moved, and token advantages."""
    packed = make_buckets(
        rollout,
        np.arange(COUNT),
        advantages=np.random.default_rng(5).normal(size=COUNT).astype(np.float32),
        weights=np.ones(COUNT, np.float32),
        old_logprobs=mismatched(rollout),
        edges=(30,),
        tokens_per_microbatch=300,
        pack=True,
    )[0]
    packed = jax.tree.map(jnp.asarray, packed)
    noise = np.random.default_rng(6).normal(0, 0.3, packed.tokens.shape)
    logprobs = jnp.where(packed.loss_mask, packed.old_logprobs + noise, 0.0)
    advantages = jnp.pad(packed.advantages, (0, 1))[packed.segment_ids]
    return packed, logprobs, advantages


@pytest.mark.parametrize("correction_name", CORRECTIONS)
@pytest.mark.parametrize("name", SURROGATES)
def test_token_losses_are_those_of_the_surrogate_times_the_correction(
    name, correction_name, bucket
):
    packed, logprobs, advantages = bucket
    segments = {
        "segment_ids": packed.segment_ids,
        "mask": packed.loss_mask,
        "num_segments": COUNT,
    }
    old, sampler = packed.old_logprobs, packed.sampler_logprobs
    factor = {
        "none": lambda: 1.0,
        "token_truncate": lambda: correction.token_truncate(old, sampler, threshold=1.3),
        "token_mask": lambda: correction.token_mask(old, sampler, threshold=1.3),
        "sequence_mask": lambda: correction.sequence_mask(old, sampler, threshold=1.3, **segments),
    }[correction_name]()
    mask = np.asarray(packed.loss_mask)
    common = {"importance_correction": correction_name, "correction_threshold": 1.3}
    results = []
    for options in ({}, SET[name]):
        wanted = config(surrogate=name, old_logprobs="recompute", **common, **options)
        found = make_loss(wanted).token_loss(logprobs, advantages, packed)
        plain = getattr(surrogate, name)(
            logprobs, old, advantages, **options, **(segments if name in SEQUENCE_LEVEL else {})
        )
        np.testing.assert_allclose(
            np.asarray(found)[mask], np.asarray(plain * factor)[mask], rtol=1e-6, atol=1e-7
        )
        results.append(np.asarray(found)[mask])
    assert np.any(results[0] != 0)
    assert (name == "reinforce") == np.array_equal(*results), "the options are really used"


def test_terms_carry_the_configs_auxiliary_terms_and_temperature(bucket):
    packed, logprobs, advantages = bucket
    plain = make_loss(config())
    assert (plain.divergence, plain.kl_coefficient, plain.entropy_coefficient) == (None, 0.0, 0.0)
    for name in ("kl_k2", "kl_k3", "kl_k3_straight_through"):
        terms = make_loss(config(kl_coefficient=0.5, kl_estimator=name, entropy_coefficient=0.25))
        assert terms.divergence is DIVERGENCES[name]
        assert (terms.kl_coefficient, terms.entropy_coefficient) == (0.5, 0.25)
    warm = load_config("countdown-tiny", {"rollout.temperature": 0.7})
    assert make_loss(warm).temperature == 0.7
    meter = make_loss(config(clip_low=0.1, clip_high=0.3)).token_meter(logprobs, advantages, packed)
    want = surrogate.ratio_diagnostics(
        logprobs, packed.old_logprobs, advantages, clip_low=0.1, clip_high=0.3
    )
    for key, value in want.items():
        np.testing.assert_array_equal(meter[key], value)
    for name in set(SURROGATES) - {"clipped"}:
        assert make_loss(config(surrogate=name)).token_meter is None


@pytest.mark.parametrize("option", SURROGATE_OPTIONS)
@pytest.mark.parametrize("name", SURROGATES)
def test_options_are_the_surrogates_own_and_those_of_others_are_refused_in_one_line(name, option):
    defaults = surrogate_options(ObjectiveConfig(surrogate=name))
    assert set(defaults) == set(SET[name])
    objective = dataclasses.replace(ObjectiveConfig(surrogate=name), **{option: 0.5})
    if option in SET[name]:
        assert surrogate_options(objective) == defaults | {option: 0.5}
        return
    with pytest.raises(UserError) as refused:
        surrogate_options(objective)
    options = ", ".join(SET[name]) or "none"
    assert str(refused.value) == (
        f"objective.{option}: {name} does not take it; its options are {options}"
    )


def test_every_option_of_a_surrogate_is_a_field_that_is_unset_by_default():
    fields = {field.name: field for field in dataclasses.fields(ObjectiveConfig)}
    assert all(fields[option].default is None for option in SURROGATE_OPTIONS)
    assert set(SURROGATE_OPTIONS) == {option for options in SET.values() for option in options}


@pytest.mark.parametrize("method", ["delta_l", "sequence_mean", "token_mean", "constant_length"])
@pytest.mark.parametrize("empty", [False, True])
def test_in_minibatch_scope_a_minibatchs_loss_is_the_formula_inside_it(method, empty):
    """Also where another mini-batch has nothing to train: PAPER's B → B_mb."""
    config = load_config(
        "countdown-tiny",
        {
            "objective.aggregation": method,
            "objective.scope": "minibatch",
            "rl.prompts_per_step": 6,
            "rl.samples_per_prompt": 4,
            "rl.updates_per_rollout": 2,
        },
    )
    rollout = fakes.rollout(24)
    rewards = np.random.default_rng(0).random(24).astype(np.float32)
    if empty:
        rewards[12:] = np.nan
    weighted = weigh(config, rollout, rewards)
    assert weighted.minibatch_factor == (1.0 if empty else 2.0)
    lengths = jnp.asarray(rollout.response_lengths[:12])
    options = {} if method in ("sequence_mean", "token_mean") else {"normalizer": 192.0}
    want = AGGREGATIONS[method](lengths, **options)
    found = weighted.weights[:12] * weighted.minibatch_factor
    np.testing.assert_allclose(found, want, rtol=1e-5)
