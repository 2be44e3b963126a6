r"""Loss aggregation: lengths in, one weight per response out.

Every aggregation of the field is linear in the token losses ℓ_it, so it is one weight per response,

    loss = Σ_i w_i · S_i,      S_i = Σ_t ℓ_it  over the trained tokens of response i,

and the weights depend on the lengths L_i (trained tokens, EOS included) alone. They are computed
once per rollout batch, before any split; nothing else ever divides a loss. So micro-batches,
buckets, packed rows, devices and hosts only add.

Conventions shared by all functions here:

- `lengths`: Int[B]. A response with L_i = 0 has no token to train: weight 0, and it counts nowhere.
- `where`: Bool[B], filters responses: weight 0 where False. By default they leave the denominators
  too;
  `count_masked=True` keeps them there (the reference implementation does).
- `scope_ids`: Int[B] in [0, B): the scope that each response is normalised in (mini-batch or group
  ids; None: the whole batch). With K scopes that hold a counted response, w_i is 1/K times the
  formula inside i's scope, so that Σ_i w_i S_i is always the estimate of the whole batch. An
  optimizer step on a mini-batch of B_mb of the B responses uses the loss Σ_{i in mini-batch} (B /
  B_mb) w_i S_i; this is where B/B_mb enters, for every scope.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num


def delta_l(
    lengths: Num[Array, " B"],
    alpha: float | Float[Array, ""] = 1.0,
    *,
    normalizer: float | int | None = None,
    where: Bool[Array, " B"] | None = None,
    count_masked: bool = False,
    scope_ids: Int[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    r"""ΔL Normalization (also VL Norm): unbiased up to 1/M, of least variance when Var(g_i) ∝
    L_i^α.

        w_i = (1/M) · L_i^-α / Σ_j L_j^-α

    α = 0 is `constant_length` (Dr. GRPO). α = 1 points in the direction of `sequence_mean` (GRPO)
    within a batch: it is GRPO's weight times (harmonic mean length)/M, so batches of different
    lengths are weighed differently, but a response's share inside one batch is the same.

    `normalizer` is the paper's M (the maximum response length), a constant that never follows
    padding; None takes M = 1: the weights sum to 1.

    Source: arXiv 2509.07558, equation for ΔL Norm.
    """
    lengths, counted = _counted(lengths, where, count_masked)
    powers = jnp.where(counted, jnp.where(counted, lengths, 1.0) ** -alpha, 0.0)
    weights = powers / _scope_total(powers, scope_ids)
    return _finish(weights, where, counted, scope_ids) / (1.0 if normalizer is None else normalizer)


def constant_length(
    lengths: Num[Array, " B"],
    *,
    normalizer: float | int | None = None,
    where: Bool[Array, " B"] | None = None,
    count_masked: bool = False,
    scope_ids: Int[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    """Dr. GRPO's aggregation: w_i = 1/(B·M). Unbiased; its variance grows with the long responses.

    `normalizer` is M; None takes M = 1.

    Source: Liu et al., arXiv 2503.20783.
    """
    _, counted = _counted(lengths, where, count_masked)
    ones = counted.astype(_float_dtype(lengths))
    weights = ones / _scope_total(ones, scope_ids)
    return _finish(weights, where, counted, scope_ids) / (1.0 if normalizer is None else normalizer)


def sequence_mean(
    lengths: Num[Array, " B"],
    *,
    where: Bool[Array, " B"] | None = None,
    count_masked: bool = False,
    scope_ids: Int[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    """GRPO's aggregation, the mean over responses of token means: w_i = 1/(B·L_i). Biased by
    length.

    Source: Shao et al., arXiv 2402.03300.
    """
    lengths, counted = _counted(lengths, where, count_masked)
    ones = counted.astype(lengths.dtype)
    weights = ones / (jnp.where(counted, lengths, 1.0) * _scope_total(ones, scope_ids))
    return _finish(weights, where, counted, scope_ids)


def token_mean(
    lengths: Num[Array, " B"],
    *,
    where: Bool[Array, " B"] | None = None,
    count_masked: bool = False,
    scope_ids: Int[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    """DAPO's aggregation, the mean over all tokens: w_i = 1/Σ_j L_j. Biased by length.

    Source: Yu et al., arXiv 2503.14476.
    """
    lengths, counted = _counted(lengths, where, count_masked)
    kept = jnp.where(counted, lengths, 0.0)
    weights = jnp.where(counted, 1.0 / _scope_total(kept, scope_ids), 0.0)
    return _finish(weights, where, counted, scope_ids)


#: What `objective.aggregation` may name.
AGGREGATIONS: dict[str, Callable[..., Float[Array, " B"]]] = {
    "delta_l": delta_l,
    "sequence_mean": sequence_mean,
    "token_mean": token_mean,
    "constant_length": constant_length,
}


def segment_sums(
    token_values: Float[Array, "*shape"],
    segment_ids: Int[Array, "*shape"],
    num_segments: int,
    mask: Bool[Array, "*shape"],
) -> Float[Array, " S"]:
    """S_i = Σ_t values over the masked tokens of segment i, for padded or packed rows of any shape.

    Tokens whose mask is False contribute nothing to the value or the gradient, NaN included; ids
    outside [0, num_segments) are dropped. Raises AssertionError where the three shapes differ,
    which would broadcast in silence.
    """
    chex.assert_equal_shape((token_values, segment_ids, mask))
    values = jnp.where(mask, token_values, 0.0)
    return jax.ops.segment_sum(values.ravel(), segment_ids.ravel(), num_segments)


def policy_gradient_loss(
    token_losses: Float[Array, "*shape"],
    weights: Float[Array, " S"],
    segment_ids: Int[Array, "*shape"],
    mask: Bool[Array, "*shape"],
) -> tuple[Float[Array, ""], dict[str, tuple[Float[Array, ""], Float[Array, ""]]]]:
    """loss = Σ_i w_i Σ_t ℓ_it of one micro-batch, to be added to those of the others.

    Returns the loss and metrics as (sum, count) pairs, which add over micro-batches too.
    """
    sums = segment_sums(token_losses, segment_ids, weights.shape[0], mask)
    loss = jnp.sum(weights * sums)
    count = jnp.sum(mask, dtype=sums.dtype)
    return loss, {"policy/token_loss": (jnp.sum(sums), count)}


def _float_dtype(lengths: Num[Array, " B"]) -> jnp.dtype:
    return jnp.promote_types(jnp.result_type(lengths, float), jnp.float32)


def _counted(
    lengths: Num[Array, " B"], where: Bool[Array, " B"] | None, count_masked: bool
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """Lengths as floats, and which responses enter the denominators."""
    lengths = jnp.asarray(lengths)
    counted = lengths > 0
    if where is not None and not count_masked:
        counted &= where
    return lengths.astype(_float_dtype(lengths)), counted


def _scope_total(values: Float[Array, " B"], scope_ids: Int[Array, " B"] | None) -> Array:
    """The sum of `values` over each response's scope; 1 where that is 0, to be divided by."""
    if scope_ids is None:
        total = jnp.sum(values)
    else:
        total = jax.ops.segment_sum(values, scope_ids, values.shape[0])[scope_ids]
    return jnp.where(total > 0, total, 1.0)


def _finish(
    weights: Float[Array, " B"],
    where: Bool[Array, " B"] | None,
    counted: Bool[Array, " B"],
    scope_ids: Int[Array, " B"] | None,
) -> Float[Array, " B"]:
    """Average over the scopes and silence what is filtered."""
    if scope_ids is not None:
        occupied = jax.ops.segment_max(counted.astype(jnp.int32), scope_ids, weights.shape[0]) > 0
        weights = weights / jnp.maximum(jnp.sum(occupied), 1)
    return weights if where is None else jnp.where(where, weights, 0.0)
