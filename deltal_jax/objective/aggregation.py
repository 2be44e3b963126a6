r"""Loss aggregation: lengths in, one weight per response out.

Every aggregation of the field is linear in the token losses ℓ_it, so it is one weight per response,

    loss = Σ_i w_i · S_i,      S_i = Σ_t ℓ_it  over the trained tokens of response i,

and the weights depend on the lengths L_i (trained tokens, EOS included) alone. They are computed
once per rollout batch, before any split; nothing else ever divides a loss. So micro-batches,
buckets, packed rows, devices and hosts only add.

Conventions shared by all functions here:

- `lengths`: Int[B]. A response with L_i = 0 has no token to train: weight 0, and it counts nowhere.
- `where`: Bool[B], filters responses: weight 0 where False. By default they leave the denominators
  too; `count_masked=True` keeps them there (the reference implementation does).
- `scope_ids`: Int[B] in [0, B): the scope that each response is normalised in (mini-batch or group
  ids; None: the whole batch). With K scopes that hold a counted response, w_i is 1/K times the
  formula inside i's scope, so that Σ_i w_i S_i is always the estimate of the whole batch. An
  optimizer step on a mini-batch of B_mb of the B responses uses the loss Σ_{i in mini-batch} (B /
  B_mb) w_i S_i; this is where B/B_mb enters. With the mini-batches themselves as scopes the factor
  is K instead, the same where they are equally large and none is empty: the loss is then the
  formula with B → B_mb. Ids outside [0, B) raise ValueError where their values are at hand; under
  jit JAX drops them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from deltal_jax.objective.checks import check_ids, check_number
from deltal_jax.objective.names import Catalogue


def delta_l(
    lengths: Num[Array, " B"],
    alpha: float | int | Float[Array, ""] = 1.0,
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
    padding; None takes M = 1: the weights sum to 1. Raises ValueError for an `alpha` or
    `normalizer` that is not a finite number, or a `normalizer` that is not positive.

    Source: arXiv 2509.07558, equation for ΔL Norm.
    """
    check_number("alpha", alpha)
    lengths, counted = _counted(lengths, where, count_masked)
    powers = jnp.where(counted, jnp.where(counted, lengths, 1.0) ** -alpha, 0.0)
    weights = powers / _scope_total(powers, scope_ids)
    return _finish(weights, where, counted, scope_ids) / _divisor(normalizer)


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
    lengths, counted = _counted(lengths, where, count_masked)
    ones = counted.astype(lengths.dtype)
    weights = ones / _scope_total(ones, scope_ids)
    return _finish(weights, where, counted, scope_ids) / _divisor(normalizer)


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


def prompt_mean(
    lengths: Num[Array, " B"],
    group_ids: Int[Array, " B"],
    *,
    where: Bool[Array, " B"] | None = None,
    count_masked: bool = False,
) -> Float[Array, " B"]:
    """The mean over prompts of token means: w_i = 1/(P · Σ_{j in group(i)} L_j).

    It is `token_mean` in group scope. Some libraries mean this by "DAPO" (see verl #2776).
    """
    check_ids("group_ids", group_ids, len(lengths))
    return token_mean(lengths, where=where, count_masked=count_masked, scope_ids=group_ids)


def local_token_mean(
    lengths: Num[Array, " B"],
    microbatch_ids: Int[Array, " B"],
    *,
    where: Bool[Array, " B"] | None = None,
    count_masked: bool = False,
) -> Float[Array, " B"]:
    """The mean over K micro-batches of their token means: w_i = 1/(K · Σ_{j in micro(i)} L_j).

    For reproduction only: the loss depends on how the batch was split. It is TRL's `bnpo` and what
    the reference implementation of arXiv 2509.07558 calls "DAPO Norm" (micro-batches of 4).
    """
    check_ids("microbatch_ids", microbatch_ids, len(lengths))
    return token_mean(lengths, where=where, count_masked=count_masked, scope_ids=microbatch_ids)


def token_sum(
    lengths: Num[Array, " B"], *, where: Bool[Array, " B"] | None = None
) -> Float[Array, " B"]:
    """No normalisation at all: w_i = 1. The loss grows with batch and lengths."""
    lengths, counted = _counted(lengths, where, count_masked=False)
    return counted.astype(lengths.dtype)


def sequence_sum(
    lengths: Num[Array, " B"],
    *,
    where: Bool[Array, " B"] | None = None,
    count_masked: bool = False,
    scope_ids: Int[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    """The mean over responses of token sums: w_i = 1/B, `constant_length` with M = 1.

    With `gspo`, whose ratio is the same for every token, this is LUSPO: its factor L_i is already
    in the token sum.
    """
    options = {"where": where, "count_masked": count_masked, "scope_ids": scope_ids}
    return constant_length(lengths, normalizer=None, **options)


def balanced(
    lengths: Num[Array, " B"],
    advantages: Float[Array, " B"],
    *,
    where: Bool[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    """A token mean for each sign of the advantage, mixed by response counts.

        w_i = (n_s / (n₊ + n₋)) / Σ_{j in s} L_j,   s = sign(A_i),   0 where A_i = 0

    Long wrong responses then cannot outweigh short right ones.
    """
    lengths, counted = _counted(lengths, where, count_masked=False)
    weights = jnp.zeros_like(lengths)
    moved = counted & (advantages != 0)
    total = jnp.maximum(jnp.sum(moved), 1).astype(lengths.dtype)
    for side in (advantages > 0, advantages < 0):
        side = side & counted
        tokens = _scope_total(jnp.where(side, lengths, 0.0), None)
        weights = jnp.where(side, jnp.sum(side) / total / tokens, weights)
    return weights


def inverse_variance(
    lengths: Num[Array, " B"],
    variance: Mapping[str, Any],
    *,
    normalizer: float | int | None = None,
    where: Bool[Array, " B"] | None = None,
    count_masked: bool = False,
    scope_ids: Int[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    """The unbiased weights of least variance for a given variance by length: w_i ∝ 1/v(L_i).

    `variance` is either {"beta": β}, v(L) = L^β, which is `delta_l` with α = β; or
    {"rho": Float[K]}, token gradients with autocorrelation ρ_h at distance h = 1 … K (0 beyond):

        v(L) = L + 2 Σ_h max(L − h, 0) ρ_h

    Raises ValueError for anything else. v is kept at L·1e-6 or above, so that weights stay finite
    for an autocorrelation that no process has.
    """
    options = {"where": where, "count_masked": count_masked, "scope_ids": scope_ids}
    if not isinstance(variance, Mapping) or set(variance) not in ({"beta"}, {"rho"}):
        found = sorted(map(str, variance)) if isinstance(variance, Mapping) else repr(variance)
        raise ValueError(f"variance: expected {{'beta': …}} or {{'rho': …}}, got {found}")
    if "beta" in variance:
        check_number("variance['beta']", variance["beta"])
        return delta_l(lengths, variance["beta"], normalizer=normalizer, **options)
    values, counted = _counted(lengths, where, count_masked)
    rho = jnp.asarray(variance["rho"], values.dtype)
    if rho.ndim != 1:
        raise ValueError(f"variance['rho']: expected one number a distance, got shape {rho.shape}")

    def lag(total: Array, term: tuple[Array, Array]) -> tuple[Array, None]:
        distance, correlation = term
        return total + 2.0 * correlation * jnp.maximum(values - distance, 0.0), None

    distances = jnp.arange(1, rho.shape[0] + 1, dtype=values.dtype)
    v = jax.lax.scan(lag, values, (distances, rho))[0]
    v = jnp.maximum(v, jnp.maximum(values, 1.0) * 1e-6)
    inverse = jnp.where(counted, 1.0 / v, 0.0)
    weights = inverse / _scope_total(inverse, scope_ids)
    return _finish(weights, where, counted, scope_ids) / _divisor(normalizer)


#: Every aggregation by name; the first four need lengths alone.
AGGREGATIONS: Catalogue[Callable[..., Float[Array, " B"]]] = Catalogue(
    "aggregation",
    {
        "delta_l": delta_l,
        "sequence_mean": sequence_mean,
        "token_mean": token_mean,
        "constant_length": constant_length,
        "prompt_mean": prompt_mean,
        "token_sum": token_sum,
        "sequence_sum": sequence_sum,
        "local_token_mean": local_token_mean,
        "balanced": balanced,
        "inverse_variance": inverse_variance,
    },
)


#: Tokens that are summed one after another, and partial sums at most.
SUM_BLOCK, MAX_PARTIAL_SUMS = 256, 2**20


def segment_sums(
    token_values: Float[Array, "*shape"],
    segment_ids: Int[Array, "*shape"],
    num_segments: int,
    mask: Bool[Array, "*shape"],
    *,
    axis_name: str | tuple[str, ...] | None = None,
) -> Float[Array, " S"]:
    """S_i = Σ_t values over the masked tokens of segment i, for padded or packed rows of any shape.

    Inside `jax.shard_map`, `axis_name` names the mesh axes that the tokens are split over: the sums
    add over them and are the same on each shard, so a response may straddle shards (ids count the
    segments of all shards). Take gradients outside the shard_map: inside, that of a replicated
    parameter is added over the shards already, and a `psum` of it multiplies it by their number.

    Tokens whose mask is False contribute nothing to the value or the gradient, NaN included; ids
    outside [0, num_segments) are dropped. The sums are in float32 or better. Raises AssertionError
    where the three shapes differ, which would broadcast in silence.
    """
    chex.assert_equal_shape((token_values, segment_ids, mask))
    wide = token_values.astype(jnp.promote_types(token_values.dtype, jnp.float32))
    values, ids = jnp.where(mask, wide, 0.0).ravel(), segment_ids.ravel()
    # One after another, 10^6 values would be off by 1 %: so by blocks, and then blocks in pairs.
    most = max(1, MAX_PARTIAL_SUMS // max(num_segments, 1))
    length = max(SUM_BLOCK, -(-values.size // most))
    blocks = max(1, -(-values.size // length))
    block = jnp.arange(values.size) // length
    inside = (ids >= 0) & (ids < num_segments)
    places = jnp.where(inside, block * num_segments + ids, blocks * num_segments)
    sums = jax.ops.segment_sum(values, places, blocks * num_segments).reshape(blocks, num_segments)
    while sums.shape[0] > 1:
        sums = jnp.pad(sums, ((0, sums.shape[0] % 2), (0, 0)))
        sums = sums[::2] + sums[1::2]
    sums = sums[0]
    return sums if axis_name is None else jax.lax.psum(sums, axis_name)


def segment_means(
    token_values: Float[Array, "*shape"],
    segment_ids: Int[Array, "*shape"],
    mask: Bool[Array, "*shape"],
    num_segments: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Float[Array, "*shape"]:
    """The mean over each segment's masked tokens, at each of its tokens; 0 outside of segments.

    Ids are in [0, num_segments), or any numbers where that is None. `axis_name` as in
    `segment_sums`; raises ValueError where it is given without `num_segments`.
    """
    count = num_segments
    if count is None:
        if axis_name is not None:
            raise ValueError("num_segments: must be given where devices share the tokens")
        count = segment_ids.size
        ranks = jnp.unique(segment_ids, return_inverse=True, size=count)[1]
        segment_ids = ranks.reshape(segment_ids.shape)
    sums = segment_sums(token_values, segment_ids, count, mask, axis_name=axis_name)
    ones = jnp.ones_like(token_values)
    tokens = segment_sums(ones, segment_ids, count, mask, axis_name=axis_name)
    inside = (segment_ids >= 0) & (segment_ids < count)
    means = jnp.pad(sums / jnp.maximum(tokens, 1.0), (0, 1))
    return means[jnp.where(inside, segment_ids, count)]


def policy_gradient_loss(
    token_losses: Float[Array, "*shape"],
    weights: Float[Array, " S"],
    segment_ids: Int[Array, "*shape"],
    mask: Bool[Array, "*shape"],
    *,
    axis_name: str | tuple[str, ...] | None = None,
) -> tuple[Float[Array, ""], dict[str, tuple[Float[Array, ""], Float[Array, ""]]]]:
    """loss = Σ_i w_i Σ_t ℓ_it of one micro-batch, to be added to those of the others.

    Returns the loss and metrics as (sum, count) pairs, which add over micro-batches too. With
    `axis_name`, see `segment_sums`, all of them are those of the tokens of all shards; `weights`
    are the same on each shard.
    """
    sums = segment_sums(token_losses, segment_ids, weights.shape[0], mask, axis_name=axis_name)
    loss = jnp.sum(weights * sums)  # of whole sums: a second psum would count it once a shard
    count = jnp.sum(mask, dtype=sums.dtype)
    if axis_name is not None:
        count = jax.lax.psum(count, axis_name)
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
        counted &= jnp.asarray(where)
    return lengths.astype(_float_dtype(lengths)), counted


def _divisor(normalizer: float | int | Float[Array, ""] | None) -> float | int | Array:
    """M, or 1 for None. Raises ValueError for a number that is not positive and finite."""
    if normalizer is None:
        return 1.0
    check_number("normalizer", normalizer, above=0.0)
    return normalizer


def _scope_total(values: Float[Array, " B"], scope_ids: Int[Array, " B"] | None) -> Array:
    """The sum of `values` ≥ 0 over each response's scope; 1 where that is 0, to be divided by."""
    if scope_ids is None:
        total = jnp.sum(values)
    else:
        check_ids("scope_ids", scope_ids, values.shape[0])
        total = _scope_sums(values, scope_ids)[scope_ids]
    return jnp.where(total > 0, total, 1.0)


def _scope_sums(values: Float[Array, " B"], scope_ids: Int[Array, " B"]) -> Float[Array, " B"]:
    """The sum of `values` ≥ 0 over each scope, to float32's precision at any size, in any order.

    A segment sum adds one value after another: in float32 the total of 10^6 is off by up to 2 %,
    and on a GPU it may differ from run to run. So each value is split into three integers of so
    many bits that no sum of them overflows, and integers add exactly.
    """
    size = values.shape[0]
    plain = jax.ops.segment_sum(values, scope_ids, size)
    if plain.dtype == jnp.float64:
        return plain
    largest = jax.ops.segment_max(values, scope_ids, size)
    largest = jnp.where(largest > 0, largest, 1.0)  # −inf where the scope is empty
    bits = 32 - size.bit_length()
    left, exact = values / largest[scope_ids], jnp.zeros_like(plain)
    for limb in (1, 2, 3):
        left = left * 2.0**bits
        whole = jnp.floor(left)
        left = left - whole
        part = jax.ops.segment_sum(whole.astype(jnp.uint32), scope_ids, size)
        exact = exact + part.astype(plain.dtype) * 2.0 ** (-bits * limb)
    # Integers have no gradient; that of the plain sum is right.
    return plain + jax.lax.stop_gradient(exact * largest - plain)


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
    return weights if where is None else jnp.where(jnp.asarray(where), weights, 0.0)
