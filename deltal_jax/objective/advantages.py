"""Advantages: rewards of a rollout batch in, one number per response out.

Conventions: `rewards` Float[B], NaN where the reward is missing (a verifier that failed is not a
zero): such a response is left out of its group's statistics and gets advantage 0. `group_ids`
Int[B] in [0, B), the prompt that each response answers. `where` leaves further responses out in the
same way. A group whose rewards are all equal has exactly zero advantage, in any float format.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def group_standardize(
    rewards: Float[Array, " B"],
    group_ids: Int[Array, " B"],
    *,
    where: Bool[Array, " B"] | None = None,
    epsilon: float = 1e-6,
) -> Float[Array, " B"]:
    """GRPO's advantage: A_i = (r_i − mean_group) / (std_group + ε), with the n−1 standard
    deviation.

    A group of one has no spread: its advantage is 0.

    Source: Shao et al., arXiv 2402.03300.
    """
    centered, known, count = _centered(rewards, group_ids, where)
    squares = _group_sum(centered**2, group_ids)
    std = jnp.sqrt(squares / jnp.maximum(count - 1.0, 1.0))
    return jnp.where(known, centered / (std + epsilon), 0.0)


def group_center(
    rewards: Float[Array, " B"],
    group_ids: Int[Array, " B"],
    *,
    where: Bool[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    """Dr. GRPO's advantage: A_i = r_i − mean_group.

    Source: Liu et al., arXiv 2503.20783.
    """
    return _centered(rewards, group_ids, where)[0]


#: What `objective.advantage` may name.
ADVANTAGES: dict[str, Callable[..., Float[Array, " B"]]] = {
    "group_standardize": group_standardize,
    "group_center": group_center,
}


def _group_sum(values: Float[Array, " B"], group_ids: Int[Array, " B"]) -> Float[Array, " B"]:
    return jax.ops.segment_sum(values, group_ids, values.shape[0])[group_ids]


def _centered(
    rewards: Float[Array, " B"], group_ids: Int[Array, " B"], where: Bool[Array, " B"] | None
) -> tuple[Float[Array, " B"], Bool[Array, " B"], Float[Array, " B"]]:
    """r − mean_group (0 where unknown), which rewards are known, and the known count per group.

    Rewards are taken relative to their group's minimum first, and the minimum is exact: so a
    constant group centres to exactly 0, where a rounded mean of, say, 0.35 would not.
    """
    rewards = jnp.asarray(rewards)
    rewards = rewards.astype(jnp.promote_types(jnp.result_type(rewards, float), jnp.float32))
    known = ~jnp.isnan(rewards)
    if where is not None:
        known &= where
    lowest = jax.ops.segment_min(jnp.where(known, rewards, jnp.inf), group_ids, rewards.shape[0])[
        group_ids
    ]
    above = jnp.where(known, jnp.where(known, rewards, 0.0) - jnp.where(known, lowest, 0.0), 0.0)
    count = _group_sum(known.astype(rewards.dtype), group_ids)
    mean = _group_sum(above, group_ids) / jnp.maximum(count, 1.0)
    return jnp.where(known, above - mean, 0.0), known, count
