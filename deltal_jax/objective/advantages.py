"""Advantages: rewards of a rollout batch in, one number per response out.

Conventions: `rewards` Float[B], NaN where the reward is missing (a verifier that failed is not a
zero): such a response is left out of its group's statistics and gets advantage 0. `group_ids`
Int[B] in [0, B), the prompt that each response answers. `where` leaves further responses out in the
same way. A group whose rewards are all equal has exactly zero advantage, in any float format.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Num


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
    whole = jnp.zeros(jnp.shape(rewards), jnp.int32)
    return group_standardize(rewards, whole, where=where, epsilon=epsilon)


def length_weighted_baseline(
    rewards: Float[Array, " B"],
    group_ids: Int[Array, " B"],
    lengths: Num[Array, " B"],
    *,
    where: Bool[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    """OPO's advantage: A_i = r_i − Σ_j L_j r_j / Σ_j L_j over its group.

    The baseline of least variance when the squared score of a response grows with its length.

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
    """MaxRL's advantage: A_i = (r_i − mean_group) / mean_group, 0 where the mean is 0.

    Raises ValueError for a negative reward (when the values are at hand, not under jit).
    """
    if not isinstance(rewards, Tracer) and bool(jnp.any(jnp.asarray(rewards) < 0)):
        raise ValueError("max_rl: rewards must not be negative")
    centered, known, count = _centered(rewards, group_ids, where)
    values = jnp.where(known, jnp.where(known, rewards, 0.0), 0.0).astype(centered.dtype)
    mean = _group_sum(values, group_ids) / jnp.maximum(count, 1.0)
    return jnp.where(mean > 0, centered / jnp.where(mean > 0, mean, 1.0), 0.0)


#: Every advantage estimator by name.
ADVANTAGES: dict[str, Callable[..., Float[Array, " B"]]] = {
    "group_standardize": group_standardize,
    "group_center": group_center,
    "leave_one_out": leave_one_out,
    "batch_standardize": batch_standardize,
    "length_weighted_baseline": length_weighted_baseline,
    "max_rl": max_rl,
}


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
    rewards = jnp.asarray(rewards)
    rewards = rewards.astype(jnp.promote_types(jnp.result_type(rewards, float), jnp.float32))
    _check_ids(group_ids, rewards.shape[0])
    known = ~jnp.isnan(rewards)
    if where is not None:
        known &= where
    lowest = jax.ops.segment_min(jnp.where(known, rewards, jnp.inf), group_ids, rewards.shape[0])[
        group_ids
    ]
    above = jnp.where(known, jnp.where(known, rewards, 0.0) - jnp.where(known, lowest, 0.0), 0.0)
    return above, known, _group_sum(known.astype(rewards.dtype), group_ids)


def _check_ids(group_ids: Int[Array, " B"], count: int) -> None:
    """Under jit the values are not at hand: then nothing is checked."""
    if isinstance(group_ids, Tracer) or count == 0:
        return
    low, high = int(jnp.min(group_ids)), int(jnp.max(group_ids))
    if low < 0 or high >= count:
        raise ValueError(f"group_ids: expected ids in [0, {count}), got {low} … {high}")
