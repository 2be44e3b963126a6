"""Policy-gradient surrogates: per-token losses to minimise.

All arguments have the shape of the tokens: `logprobs` of the policy that is trained, `old_logprobs`
of the policy before this rollout's updates, `advantages` of each token's response. Nothing is
reduced here: `aggregation.policy_gradient_loss` weighs and sums.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def reinforce(
    logprobs: Float[Array, "*shape"],
    old_logprobs: Float[Array, "*shape"],
    advantages: Float[Array, "*shape"],
) -> Float[Array, "*shape"]:
    """ℓ_t = −A · log π(o_t). `old_logprobs` is not used.

    Source: Williams, 1992.
    """
    del old_logprobs
    return -advantages * logprobs


def clipped(
    logprobs: Float[Array, "*shape"],
    old_logprobs: Float[Array, "*shape"],
    advantages: Float[Array, "*shape"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> Float[Array, "*shape"]:
    """PPO's clipped surrogate with an asymmetric range, and optionally the dual clip for A < 0.

        r   = exp(clip(log π − log π_old, −20, 20))
        ℓ_t = max(−A·r, −A·clip(r, 1 − ε_low, 1 + ε_high))
        ℓ_t = min(ℓ_t, −A·c)  where A < 0, with dual_clip c > 1

    Source: Schulman et al., arXiv 1707.06347; Yu et al., arXiv 2503.14476 (ε_high); Ye et al.,
    arXiv 1912.09729 (dual clip).
    """
    ratio = _ratio(logprobs, old_logprobs)
    inside = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    losses = jnp.maximum(-advantages * ratio, -advantages * inside)
    if dual_clip is not None:
        losses = jnp.where(advantages < 0, jnp.minimum(losses, -advantages * dual_clip), losses)
    return losses


#: What `objective.surrogate` may name.
SURROGATES: dict[str, Callable[..., Float[Array, "*shape"]]] = {
    "reinforce": reinforce,
    "clipped": clipped,
}


def ratio_diagnostics(
    logprobs: Float[Array, "*shape"],
    old_logprobs: Float[Array, "*shape"],
    advantages: Float[Array, "*shape"],
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> dict[str, Float[Array, "*shape"]]:
    """Per-token indicators of which branch of `clipped` was taken, the ratio, and k1 = old − new.

    `clip_high`: A > 0 and r above the range; `clip_low`: A < 0 and r below it; `clip_dual`: A < 0
    and r above c.
    """
    ratio = jax.lax.stop_gradient(_ratio(logprobs, old_logprobs))
    positive, negative = advantages > 0, advantages < 0
    dual = negative & (ratio > dual_clip) if dual_clip is not None else jnp.zeros_like(negative)
    return {
        "clip_frac_high": (positive & (ratio > 1.0 + clip_high)).astype(ratio.dtype),
        "clip_frac_low": (negative & (ratio < 1.0 - clip_low)).astype(ratio.dtype),
        "clip_frac_dual": dual.astype(ratio.dtype),
        "approx_kl": jax.lax.stop_gradient(old_logprobs - logprobs),
        "ratio": ratio,
    }


def _ratio(
    logprobs: Float[Array, "*shape"], old_logprobs: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    return jnp.exp(jnp.clip(logprobs - old_logprobs, -20.0, 20.0))
