"""What configs make of the same responses: figures as those of `aggregations.py`, with the
advantages and weights that training would give them.

Where the ratio is 1, the gradient of a response's loss is −A_i times that of its score, whatever
the surrogate. So the gradient of a batch is Σ_i w_i A_i g_i with the scores' gradients g_i, and
configs differ by their coefficients w_i A_i alone. KL and entropy terms are left out, as are the
factors of an importance correction, which are 1 for what the policy itself has sampled.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from deltal_jax.config import AdaptiveConfig, Config
from deltal_jax.laboratory.aggregations import (
    Batches,
    Pairs,
    Pool,
    batch_cosine,
    batch_weights,
    draw_batches,
    figures,
    scatter,
)
from deltal_jax.objective.aggregation import constant_length, delta_l
from deltal_jax.training.collect import Collected
from deltal_jax.training.objective import (
    first_exponent,
    microbatch_ids,
    minibatch_ids,
    normalizer,
    not_overlong,
    weigh_arrays,
)

Row = dict[str, Any]


def compare_configs(
    gram: Float[np.ndarray, "N N"],
    batch: Collected,
    configs: Mapping[str, Config],
    shared: Config,
    counted: Bool[np.ndarray, " N"],
    beta: float | None,
) -> list[Row]:
    """The figures of each config, of batches as `shared` has them; `gram` is of the scores.

    Bias, relative variance, cosine and gain are of the weights: they compare with the unweighted
    gradient, and with ΔL α=1, of the config's own advantages. The exponent of `alpha: beta` and
    `mse` is β, which was fitted to these responses. A config that these responses say nothing of
    has a `reason` in place of figures.
    """
    found = []
    for name, config in configs.items():
        reason = unmeasured(config, shared, beta)
        row = None if reason else _row(gram, batch, config, counted, beta)
        if row is None:
            reason = reason or "all rewards of each group are equal, so every advantage is 0"
        found.append({"name": name} | ({"reason": reason} if row is None else row))
    return found


def unmeasured(config: Config, shared: Config, beta: float | None) -> str | None:
    """Why the responses of `shared` say nothing of a config; None where they do."""
    if (config.rollout, config.task) != (shared.rollout, shared.task):
        return "its responses are sampled, chosen or rewarded otherwise"
    ours, theirs = ((x.rl.prompts_per_step, x.rl.samples_per_prompt) for x in (config, shared))
    if ours != theirs:
        return "its batches have another size"
    if adaptive(config) and beta is None:
        return "its exponent is β, and none could be fitted"
    return None


def adaptive(config: Config) -> bool:
    """Whether the exponent is measured in training, so that a checkpoint alone has none."""
    return config.objective.aggregation == "delta_l" and isinstance(config.objective.alpha, str)


def label(config: Config, beta: float | None) -> str:
    """The aggregation with its exponent, its scope, and the advantage that it is measured with."""
    objective = config.objective
    said = objective.aggregation
    if adaptive(config):
        said = f"1/Var, β={beta:.2f}"
    elif said == "delta_l":
        said = f"ΔL α={objective.alpha:g}"
    scope = "" if objective.scope == "batch" else f", by {objective.scope}"
    return f"{said}{scope}; {objective.advantage}"


def _row(
    gram: np.ndarray,
    batch: Collected,
    config: Config,
    counted: np.ndarray,
    beta: float | None,
) -> Row | None:
    """Figures of a config; None where no response has an advantage."""
    overlong, lengths = not_overlong(config, batch.rollout), batch.rollout.response_lengths
    kept = counted if overlong is None else counted & overlong
    samples = config.rl.samples_per_prompt
    pool = Pool(lengths, batch.rewards, kept & ~np.isnan(batch.rewards), len(lengths) // samples)
    batches = draw_batches(pool.groups, config.rl.prompts_per_step)
    alpha = beta if adaptive(config) and beta is not None else first_exponent(config)
    advantages, weights = _coefficients(config, batch, pool, kept, batches, alpha)
    if not (advantages * weights).any():
        return None
    unweighted = batch_weights(pool, batches, lambda x, adv, ids, w: constant_length(x, where=w))
    reference = batch_weights(pool, batches, lambda x, adv, ids, w: delta_l(x, 1.0, where=w))
    every = {"own": weights, "unweighted": unweighted, "reference": reference}
    every = {name: own * advantages for name, own in every.items()}
    pairs = {
        name: Pairs.of([gram], [own], [every["unweighted"]], batches, pool.groups)
        for name, own in every.items()
    }
    # The mean over batches, which differ only where an advantage knows more than its own group.
    often = np.maximum((unweighted > 0).sum(axis=0), 1)
    target = pool.kept * advantages.sum(axis=0) / often
    row: Row = {"row": label(config, beta)}
    row |= figures(pairs, "own", "unweighted", "reference")
    row["cosine"] = batch_cosine(gram, batches.rows(samples), every["own"], target)
    return row


def _coefficients(
    config: Config,
    batch: Collected,
    pool: Pool,
    kept: Bool[np.ndarray, " N"],
    batches: Batches,
    alpha: float,
) -> tuple[Float[np.ndarray, "M N"], Float[np.ndarray, "M N"]]:
    """Advantages and weights of each batch, 0 outside of it; weights are 1 in sum, on average over
    the batches."""
    rows, count = batches.rows(pool.samples), len(pool.lengths)
    first = jax.tree.map(lambda x: x[: rows.shape[1]], batch.rollout)
    minibatches = minibatch_ids(config, first)
    places = (first.group_ids, minibatches, microbatch_ids(config, minibatches))
    objective = dataclasses.replace(config.objective, alpha=1.0, adaptive=AdaptiveConfig())

    def of_batch(rewards: jax.Array, lengths: jax.Array, kept: jax.Array) -> Any:
        return weigh_arrays(
            rewards,
            lengths,
            *places,
            kept,
            np.float32(alpha),
            objective=objective,
            normalizer=normalizer(config),
        )[:2]

    given = (jnp.asarray(x[rows]) for x in (batch.rewards, pool.lengths, kept))
    advantages, weights = (np.asarray(x, float) for x in jax.vmap(of_batch)(*given))
    weights = scatter(weights, rows, count) / (weights.sum(1).mean() or 1.0)
    return scatter(advantages, rows, count), weights
