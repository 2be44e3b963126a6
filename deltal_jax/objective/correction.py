"""Importance correction: the sampler is not exactly the policy that the trainer computes.

Other kernels, precisions or stale parameters make the sampler's log-probabilities μ differ from
those that the trainer gives the same tokens under the same parameters, π_old. Multiplying a token's
loss by ρ_t = π_old / μ makes its expectation that under π_old again; truncating or masking bounds
the variance. Nothing flows back through the weights.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from deltal_jax.objective.aggregation import segment_means
from deltal_jax.objective.checks import check_number
from deltal_jax.objective.names import Catalogue
from deltal_jax.objective.surrogate import importance_ratio


def none(
    old_logprobs: Float[Array, "*shape"], sampler_logprobs: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """No correction: 1."""
    del sampler_logprobs
    return jnp.ones_like(old_logprobs)


def token_truncate(
    old_logprobs: Float[Array, "*shape"],
    sampler_logprobs: Float[Array, "*shape"],
    *,
    threshold: float = 2.0,
) -> Float[Array, "*shape"]:
    """min(ρ_t, C): truncated importance sampling.

    Source: Ionides, "Truncated Importance Sampling", 2008.
    """
    check_number("threshold", threshold, least=1.0)
    ratio = jnp.minimum(importance_ratio(old_logprobs, sampler_logprobs), threshold)
    return jax.lax.stop_gradient(ratio)


def token_mask(
    old_logprobs: Float[Array, "*shape"],
    sampler_logprobs: Float[Array, "*shape"],
    *,
    threshold: float = 2.0,
) -> Float[Array, "*shape"]:
    """ρ_t where 1/C ≤ ρ_t ≤ C, else 0: tokens on which the two disagree are not trained.

    Their loss is 0. A caller that takes them out of its loss mask before it counts the lengths
    takes them out of L_i and of every denominator too, as `deltal train` does.
    """
    check_number("threshold", threshold, least=1.0)
    ratio = importance_ratio(old_logprobs, sampler_logprobs)
    return jax.lax.stop_gradient(jnp.where(_within(ratio, threshold), ratio, 0.0))


def sequence_mask(
    old_logprobs: Float[Array, "*shape"],
    sampler_logprobs: Float[Array, "*shape"],
    *,
    segment_ids: Int[Array, "*shape"],
    mask: Bool[Array, "*shape"],
    num_segments: int | None = None,
    axis_name: str | None = None,
    threshold: float = 2.0,
) -> Float[Array, "*shape"]:
    """ρ_t for responses whose geometric mean of ρ is in [1/C, C], else 0 for all their tokens."""
    check_number("threshold", threshold, least=1.0)
    difference = jnp.clip(old_logprobs - sampler_logprobs, -20.0, 20.0)
    mean = segment_means(difference, segment_ids, mask, num_segments, axis_name)
    kept = _within(jnp.exp(mean), threshold)
    return jax.lax.stop_gradient(jnp.where(kept, jnp.exp(difference), 0.0))


def _within(ratio: Float[Array, "*shape"], threshold: float) -> Bool[Array, "*shape"]:
    return (ratio >= 1.0 / threshold) & (ratio <= threshold)


#: Every importance correction by name.
CORRECTIONS: Catalogue[Callable[..., Float[Array, "*shape"]]] = Catalogue(
    "importance correction",
    {
        "none": none,
        "token_truncate": token_truncate,
        "token_mask": token_mask,
        "sequence_mask": sequence_mask,
    },
)
