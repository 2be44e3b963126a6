"""Advantages: rewards of a rollout batch in, one number per response out.

Conventions: `rewards` Float[B], NaN where the reward is missing (a verifier that failed is not a
zero): such a response is left out of its group's statistics and gets advantage 0. `group_ids`
Int[B] in [0, B), the prompt that each response answers. `where` leaves further responses out in the
same way. A group whose rewards are all equal has exactly zero advantage, in any float format.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

from deltal_jax.objective.checks import at_hand, check_ids, check_number
from deltal_jax.objective.names import Catalogue


def group_standardize(
    rewards: Float[Array, " B"],
    group_ids: Int[Array, " B"],
    *,
    where: Bool[Array, " B"] | None = None,
    epsilon: float = 1e-6,
) -> Float[Array, " B"]:
    """GRPO's advantage: A_i = (r_i − mean_group) / (std_group + ε), with the n−1 standard
    deviation.

    A group of one has no spread: its advantage is 0. Raises ValueError for an ε that is not
    positive.

    Source: Shao et al., arXiv 2402.03300.
    """
    check_number("epsilon", epsilon, above=0.0)
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


def leave_one_out(
    rewards: Float[Array, " B"],
    group_ids: Int[Array, " B"],
    *,
    where: Bool[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    """RLOO's advantage: A_i = r_i − mean of the others in its group, n/(n−1) · (r_i − mean_group).

    A group of one has no others: its advantage is 0.

    Source: Ahmadian et al., arXiv 2402.14740.
    """
    centered, _, count = _centered(rewards, group_ids, where)
    return centered * count / jnp.maximum(count - 1.0, 1.0)


def batch_standardize(
    rewards: Float[Array, " B"],
    group_ids: Int[Array, " B"] | None = None,
    *,
    where: Bool[Array, " B"] | None = None,
    epsilon: float = 1e-6,
) -> Float[Array, " B"]:
    """REINFORCE++'s advantage: A_i = (r_i − mean_batch) / (std_batch + ε), with n−1.

    Groups do not matter.

    Source: Hu et al., arXiv 2501.03262.
    """
    del group_ids
    check_number("epsilon", epsilon, above=0.0)
    rewards, known = _known(rewards, where)
    # Not a group of B: a segment sum adds one value after another, imprecise at 10^6 in float32.
    above = rewards - jnp.min(rewards, initial=jnp.inf, where=known)
    count = jnp.sum(known)
    centered = above - jnp.sum(above, where=known) / jnp.maximum(count, 1)
    squares = jnp.sum(centered**2, where=known)
    std = jnp.sqrt(squares / jnp.maximum(count - 1, 1))
    return jnp.where(known, centered / (std + epsilon), 0.0)


def length_weighted_baseline(
    rewards: Float[Array, " B"],
    lengths: Num[Array, " B"],
    group_ids: Int[Array, " B"],
    *,
    where: Bool[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    """OPO's advantage: A_i = r_i − Σ_j L_j r_j / Σ_j L_j over its group.

    The baseline of least variance when the squared score of a response grows with its length. Mind
    the order of the arguments: the lengths come second.

    Source: Hao et al., arXiv 2505.23585.
    """
    above, known, _ = _above_lowest(rewards, group_ids, where)
    mass = jnp.where(known, jnp.asarray(lengths).astype(above.dtype), 0.0)
    total = _group_sum(mass, group_ids)
    baseline = _group_sum(mass * above, group_ids) / jnp.where(total > 0, total, 1.0)
    return jnp.where(known, above - baseline, 0.0)


def max_rl(
    rewards: Float[Array, " B"],
    group_ids: Int[Array, " B"],
    *,
    where: Bool[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    """MaxRL's advantage: A_i = (r_i − mean_group) / mean_group, 0 where the mean is not positive.

    Raises ValueError for a negative reward (when the values are at hand, not under jit).

    Source: arXiv 2602.02710.
    """
    counted = True if where is None else where
    if at_hand(rewards) and at_hand(counted) and np.any((np.asarray(rewards) < 0) & counted):
        raise ValueError("max_rl: rewards must not be negative")
    centered, _, count = _centered(rewards, group_ids, where)
    mean = _group_sum(_known(rewards, where)[0], group_ids) / jnp.maximum(count, 1.0)
    return jnp.where(mean > 0, centered / jnp.where(mean > 0, mean, 1.0), 0.0)


#: Every advantage estimator by name.
ADVANTAGES: Catalogue[Callable[..., Float[Array, " B"]]] = Catalogue(
    "advantage",
    {
        "group_standardize": group_standardize,
        "group_center": group_center,
        "leave_one_out": leave_one_out,
        "batch_standardize": batch_standardize,
        "length_weighted_baseline": length_weighted_baseline,
        "max_rl": max_rl,
    },
)


def _group_sum(values: Float[Array, " B"], group_ids: Int[Array, " B"]) -> Float[Array, " B"]:
    return jax.ops.segment_sum(values, group_ids, values.shape[0])[group_ids]


def _centered(
    rewards: Float[Array, " B"], group_ids: Int[Array, " B"], where: Bool[Array, " B"] | None
) -> tuple[Float[Array, " B"], Bool[Array, " B"], Float[Array, " B"]]:
    """r − mean_group (0 where unknown), which rewards are known, and the known count per group."""
    above, known, count = _above_lowest(rewards, group_ids, where)
    mean = _group_sum(above, group_ids) / jnp.maximum(count, 1.0)
    return jnp.where(known, above - mean, 0.0), known, count


def _above_lowest(
    rewards: Float[Array, " B"], group_ids: Int[Array, " B"], where: Bool[Array, " B"] | None
) -> tuple[Float[Array, " B"], Bool[Array, " B"], Float[Array, " B"]]:
    """r − min_group (0 where unknown), which rewards are known, and the known count per group.

    The minimum is exact: so a constant group centres to exactly 0, where a rounded mean of, say,
    0.35 would not. Raises ValueError for ids outside [0, B), which JAX would drop in silence.
    """
    rewards, known = _known(rewards, where)
    check_ids("group_ids", group_ids, rewards.shape[0])
    lowest = jax.ops.segment_min(jnp.where(known, rewards, jnp.inf), group_ids, rewards.shape[0])
    above = jnp.where(known, rewards - jnp.where(known, lowest[group_ids], 0.0), 0.0)
    return above, known, _group_sum(known.astype(rewards.dtype), group_ids)


def _known(
    rewards: Float[Array, " B"], where: Bool[Array, " B"] | None
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """Rewards in float32 or better, 0 where unknown, and which are known."""
    rewards = jnp.asarray(rewards)
    known = ~jnp.isnan(rewards)
    if where is not None:
        known &= where
    dtype = jnp.promote_types(jnp.result_type(rewards, float), jnp.float32)
    return jnp.where(known, rewards, 0.0).astype(dtype), known
