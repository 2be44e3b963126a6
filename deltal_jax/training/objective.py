"""The objective of a config: which functions of `deltal_jax.objective` make the loss, with which
options.

    loss = Σ_i w_i Σ_t ρ_it ℓ_it  +  Σ_i u_i Σ_t (c_KL · KL_it − c_H · H_it)

`weigh` gives A_i, w_i and u_i from rewards and lengths, once per rollout batch; `make_loss` gives
the terms of each token, for the update.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deltal_jax.config import AdaptiveConfig, Aggregation, Config, ObjectiveConfig, RolloutConfig
from deltal_jax.errors import UserError
from deltal_jax.objective.advantages import ADVANTAGES
from deltal_jax.objective.aggregation import AGGREGATIONS
from deltal_jax.objective.correction import CORRECTIONS
from deltal_jax.objective.diagnostics import aggregation_diagnostics
from deltal_jax.objective.divergence import DIVERGENCES
from deltal_jax.objective.surrogate import SURROGATES, ratio_diagnostics
from deltal_jax.training.loss import LossTerms
from deltal_jax.types import Bucket, Rollout

#: Options of the surrogates that a config may set.
SURROGATE_OPTIONS = (
    "clip_low",
    "clip_high",
    "dual_clip",
    "threshold",
    "tau_positive",
    "tau_negative",
)
#: What `make_loss` reads of the objective, beside the temperature: what the program of an update
#: depends on. Advantages and weights are arguments of that program.
LOSS_FIELDS = (
    "surrogate",
    *SURROGATE_OPTIONS,
    "importance_correction",
    "correction_threshold",
    "kl_coefficient",
    "kl_estimator",
    "entropy_coefficient",
)


@dataclasses.dataclass(frozen=True)
class Weighted:
    """What multiplies the tokens' losses of one rollout batch, each Float[B], and its meters."""

    advantages: np.ndarray
    weights: np.ndarray
    auxiliary_weights: np.ndarray
    #: What multiplies the weights in the loss of a mini-batch; None: B / B_mb.
    minibatch_factor: float | None
    metrics: dict[str, float]
    #: Equal weights instead, of all responses that count, whatever the scope.
    unweighted: np.ndarray


def normalizer(config: Config) -> float:
    """The constant M of the aggregation."""
    given = config.objective.normalizer
    return float(config.rollout.max_response_length) if given is None else given


def minibatch_ids(config: Config, rollout: Rollout) -> np.ndarray:
    """Which optimizer update each response belongs to: whole prompts, in order."""
    prompts_each = config.rl.prompts_per_step // config.rl.updates_per_rollout
    return (np.asarray(rollout.group_ids) // prompts_each).astype(np.int32)


def microbatch_ids(config: Config, minibatches: np.ndarray) -> np.ndarray:
    """The micro-batches that `local_token_mean` speaks of: by this rule, not by the real split.

    `objective.microbatch_size` consecutive responses each, inside every mini-batch.
    """
    starts = np.searchsorted(minibatches, minibatches)  # they are ascending
    local = (np.arange(len(minibatches)) - starts) // config.objective.microbatch_size
    pairs = np.stack([minibatches, local])
    return np.unique(pairs, axis=1, return_inverse=True)[1].reshape(-1).astype(np.int32)


def first_exponent(config: Config) -> float:
    """The exponent of delta_l in the first step."""
    objective = config.objective
    if not isinstance(objective.alpha, str):
        return float(objective.alpha)
    low, high = objective.adaptive.range
    return min(max(1.0, low), high)


def weigh(
    config: Config, rollout: Rollout, rewards: np.ndarray, alpha: float | None = None
) -> Weighted:
    """Advantages and weights of a rollout batch, by the lengths that its loss mask leaves, with the
    exponent `alpha` of delta_l; None: that of the first step.

    A missing reward (NaN) is left out of its group's statistics. A response that the overlong
    filter takes (see `not_overlong`) is part of them. Both get weight 0, and leave the denominators
    unless `objective.count_masked` keeps them there. The auxiliary weights are 0 where no term uses
    them. Raises UserError where the rewards do not suit the advantage.
    """
    objective = config.objective
    if objective.advantage == "max_rl" and np.any(rewards < 0):
        raise UserError("objective.advantage: max_rl takes no negative rewards; choose another")
    kept = not_overlong(config, rollout)
    minibatches = minibatch_ids(config, rollout)
    advantages, *all_weights, meters = weigh_arrays(
        rewards,
        rollout.response_lengths,
        rollout.group_ids,
        minibatches,
        microbatch_ids(config, minibatches),
        kept,
        np.float32(first_exponent(config) if alpha is None else alpha),
        objective=dataclasses.replace(objective, alpha=1.0, adaptive=AdaptiveConfig()),
        normalizer=normalizer(config),
    )
    metrics = {f"aggregation/{name}": float(value) for name, value in meters.items()}
    for name, reduce in (("mean", np.mean), ("min", np.min), ("max", np.max)):
        metrics[f"advantage/{name}"] = float(reduce(np.asarray(advantages)))
    factor = None
    if objective.scope == "minibatch":  # the number of mini-batches that count for anything
        counted = rollout.response_lengths > 0
        if not objective.count_masked:
            counted &= ~np.isnan(rewards) & (True if kept is None else kept)
        factor = float(len(np.unique(minibatches[counted])))
    weights, auxiliary, unweighted = map(np.asarray, all_weights)
    return Weighted(np.asarray(advantages), weights, auxiliary, factor, metrics, unweighted)


def not_overlong(config: Config, rollout: Rollout) -> np.ndarray | None:
    """Bool[B], which responses the overlong filter leaves; None where there is no filter.

    `truncated` are those without an EOS. `at_limit` are also those whose EOS is the last token that
    the limit allows: the reference implementation of arXiv 2509.07558 asks for that place alone.
    """
    kind = config.objective.overlong_filter
    if kind == "none":
        return None
    if kind == "truncated":
        return ~np.asarray(rollout.truncated)
    return rollout.lengths - rollout.prompt_lengths < config.rollout.max_response_length


@functools.partial(jax.jit, static_argnames=("objective", "normalizer"))
def weigh_arrays(
    rewards: jax.Array,
    lengths: jax.Array,
    group_ids: jax.Array,
    minibatches: jax.Array,
    microbatches: jax.Array,
    kept: jax.Array | None,
    alpha: jax.Array,
    *,
    objective: ObjectiveConfig,
    normalizer: float,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, dict[str, jax.Array]]:
    """The two places where the method enters, side by side: advantages, weights, auxiliary weights,
    those of `constant_length`, each [B], and meters. The exponent is no part of `objective`: one
    that changes compiles nothing anew."""
    known = ~jnp.isnan(rewards)
    given = {"lengths": lengths} if objective.advantage == "length_weighted_baseline" else {}
    advantages = ADVANTAGES[objective.advantage](rewards, group_ids=group_ids, **given)
    offered = {
        "advantages": advantages,
        "alpha": alpha,
        "count_masked": objective.count_masked,
        "group_ids": group_ids,
        "microbatch_ids": microbatches,
        "normalizer": normalizer,
        "scope_ids": {"batch": None, "minibatch": minibatches, "group": group_ids}[objective.scope],
        "variance": {"rho": jnp.asarray(objective.rho)} if objective.rho else None,
        "where": known if kept is None else known & kept,
    }

    def weights_of(name: Aggregation, **other: Any) -> jax.Array:
        aggregation = AGGREGATIONS[name]
        return aggregation(lengths, **_taken(aggregation, offered | other))

    weights = weights_of(objective.aggregation)
    auxiliary = jnp.zeros_like(weights)
    if objective.kl_coefficient or objective.entropy_coefficient:
        auxiliary = weights_of(objective.auxiliary_aggregation)
    meters = aggregation_diagnostics(weights, lengths, advantages, normalizer=normalizer)
    unweighted = weights_of("constant_length", scope_ids=None)
    return advantages, weights, auxiliary, unweighted, meters


def surrogate_options(objective: ObjectiveConfig) -> dict[str, float | None]:
    """The surrogate's options: those that the config sets, and the defaults of the others.

    Raises UserError for one that the surrogate does not take.
    """
    parameters = inspect.signature(SURROGATES[objective.surrogate]).parameters
    options = {k: p.default for k, p in parameters.items() if k in SURROGATE_OPTIONS}
    given = {name: getattr(objective, name) for name in SURROGATE_OPTIONS}
    for name, value in given.items():
        if value is not None and name not in options:
            raise UserError(
                f"objective.{name}: {objective.surrogate} does not take it; its options are "
                f"{', '.join(options) or 'none'}"
            )
    return options | {name: value for name, value in given.items() if value is not None}


def loss_config(config: Config) -> Config:
    """All that `make_loss` sees of a config: equal for methods that differ in advantages and
    weights alone."""
    read = {name: getattr(config.objective, name) for name in LOSS_FIELDS}
    rollout = RolloutConfig(temperature=config.rollout.temperature)
    return Config(objective=ObjectiveConfig(**read), rollout=rollout)


def make_loss(config: Config) -> LossTerms:
    """The terms of each token, with the config's options bound."""
    objective = config.objective
    options = surrogate_options(objective)
    surrogate = functools.partial(SURROGATES[objective.surrogate], **options)
    correct = functools.partial(
        CORRECTIONS[objective.importance_correction], **correction_options(objective)
    )
    corrected = objective.importance_correction != "none"

    def token_loss(logprobs: jax.Array, advantages: jax.Array, bucket: Bucket) -> jax.Array:
        losses = surrogate(
            logprobs, bucket.old_logprobs, advantages, **_taken(surrogate, _segments(bucket))
        )
        if not corrected:
            return losses
        segments = _taken(correct, _segments(bucket))
        return losses * correct(bucket.old_logprobs, bucket.sampler_logprobs, **segments)

    measure = functools.partial(ratio_diagnostics, **options)

    def clip_meter(logprobs: jax.Array, advantages: jax.Array, bucket: Bucket) -> dict:
        return measure(logprobs, bucket.old_logprobs, advantages)

    return LossTerms(
        token_loss,
        token_meter=clip_meter if objective.surrogate == "clipped" else None,
        divergence=DIVERGENCES[objective.kl_estimator] if objective.kl_coefficient else None,
        kl_coefficient=objective.kl_coefficient,
        entropy_coefficient=objective.entropy_coefficient,
        temperature=config.rollout.temperature,
    )


def correction_options(objective: ObjectiveConfig) -> dict[str, float]:
    """The importance correction's options that the config sets."""
    offered = {"threshold": objective.correction_threshold}
    return _taken(CORRECTIONS[objective.importance_correction], offered)


def reject(
    objective: ObjectiveConfig, rollout: Rollout, old_logprobs: np.ndarray
) -> tuple[Rollout, dict[str, float]]:
    """The rollout without the tokens that the importance correction drops, and mismatch meters.

    Dropped tokens leave the loss mask, so they leave L_i and every denominator with it.
    """
    mask = rollout.loss_mask
    difference = np.where(mask, old_logprobs - rollout.logprobs, 0.0).astype(np.float64)
    ratio = np.where(mask, np.exp(np.clip(difference, -20.0, 20.0)), 0.0)
    count = max(int(mask.sum()), 1)
    correction = CORRECTIONS[objective.importance_correction]
    rows = np.broadcast_to(np.arange(len(mask), dtype=np.int32)[:, None], mask.shape)
    segments = {"segment_ids": jnp.asarray(rows), "mask": jnp.asarray(mask)}
    factors = correction(
        jnp.asarray(old_logprobs),
        jnp.asarray(rollout.logprobs),
        **_taken(correction, segments | {"num_segments": len(mask)}),
        **correction_options(objective),
    )
    kept = mask & (np.asarray(factors) > 0)
    metrics = {
        "mismatch/logprob_diff_mean": float(np.abs(difference).sum() / count),
        "mismatch/logprob_diff_max": float(np.abs(difference).max()),
        "mismatch/kl": float(np.where(mask, ratio - 1.0 - difference, 0.0).sum() / count),
        "mismatch/ess": float(ratio.sum() ** 2 / max(count * (ratio**2).sum(), 1e-30)),
        "mismatch/dropped_frac": float(1.0 - kept.sum() / count),
    }
    return dataclasses.replace(rollout, loss_mask=kept), metrics


def _segments(bucket: Bucket) -> dict[str, Any]:
    return {
        "segment_ids": bucket.segment_ids,
        "mask": bucket.loss_mask,
        "num_segments": bucket.weights.shape[0],
    }


def _taken(function: Callable[..., Any], offered: dict[str, Any]) -> dict[str, Any]:
    """What of `offered` the function has a parameter for."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in offered.items() if name in parameters}
