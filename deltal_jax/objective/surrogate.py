"""Policy-gradient surrogates: per-token losses to minimise.

All arguments have the shape of the tokens: `logprobs` of the policy that is trained, `old_logprobs`
of the policy before this rollout's updates, `advantages` of each token's response. Nothing is
reduced here: `aggregation.policy_gradient_loss` weighs and sums. A negative clip range or
threshold, a dual clip of 1 or less and a τ that is not positive raise ValueError.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from deltal_jax.objective.aggregation import segment_means
from deltal_jax.objective.checks import check_number
from deltal_jax.objective.names import Catalogue


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
    _check_clip(clip_low, clip_high, dual_clip)
    losses = _clip(importance_ratio(logprobs, old_logprobs), advantages, clip_low, clip_high)
    if dual_clip is not None:
        losses = jnp.where(advantages < 0, jnp.minimum(losses, -advantages * dual_clip), losses)
    return losses


def gspo(
    logprobs: Float[Array, "*shape"],
    old_logprobs: Float[Array, "*shape"],
    advantages: Float[Array, "*shape"],
    *,
    segment_ids: Int[Array, "*shape"],
    mask: Bool[Array, "*shape"],
    num_segments: int | None = None,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    axis_name: str | tuple[str, ...] | None = None,
) -> Float[Array, "*shape"]:
    """GSPO: `clipped` with one ratio a response, the geometric mean of its tokens' ratios.

        s_i = exp(mean_t (log π − log π_old))
        ℓ_t = max(−A·s_i, −A·clip(s_i, 1 − ε_low, 1 + ε_high))

    The response's loss stands at each of its tokens: with `sequence_mean` weights the sum is GSPO's
    mean over responses, with `sequence_sum` LUSPO's.

    `axis_name`: the mesh axes that tokens are split over, inside `jax.shard_map`.

    Source: Zheng et al., arXiv 2507.18071.
    """
    _check_clip(clip_low, clip_high)
    ratio = _sequence_ratio(logprobs, old_logprobs, segment_ids, mask, num_segments, axis_name)
    return _clip(ratio, advantages, clip_low, clip_high)


def gspo_token(
    logprobs: Float[Array, "*shape"],
    old_logprobs: Float[Array, "*shape"],
    advantages: Float[Array, "*shape"],
    *,
    segment_ids: Int[Array, "*shape"],
    mask: Bool[Array, "*shape"],
    num_segments: int | None = None,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    axis_name: str | tuple[str, ...] | None = None,
) -> Float[Array, "*shape"]:
    """GSPO-token: GSPO's value and clipping, with a gradient for each token of its own.

        s_it = sg(s_i) · π / sg(π)

    `axis_name`: the mesh axes that tokens are split over, inside `jax.shard_map`.

    Source: Zheng et al., arXiv 2507.18071.
    """
    _check_clip(clip_low, clip_high)
    ratio = _sequence_ratio(logprobs, old_logprobs, segment_ids, mask, num_segments, axis_name)
    own = jnp.exp(logprobs - jax.lax.stop_gradient(logprobs))
    return _clip(jax.lax.stop_gradient(ratio) * own, advantages, clip_low, clip_high)


def cispo(
    logprobs: Float[Array, "*shape"],
    old_logprobs: Float[Array, "*shape"],
    advantages: Float[Array, "*shape"],
    *,
    clip_low: float = 1.0,
    clip_high: float = 0.28,
) -> Float[Array, "*shape"]:
    """CISPO: REINFORCE with a clipped, constant importance weight; no token loses its gradient.

        ℓ_t = −sg(clip(r, 1 − ε_low, 1 + ε_high)) · A · log π

    Source: MiniMax-M1, arXiv 2506.13585.
    """
    _check_clip(clip_low, clip_high)
    ratio = jax.lax.stop_gradient(importance_ratio(logprobs, old_logprobs))
    return -jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high) * advantages * logprobs


def gmpo(
    logprobs: Float[Array, "*shape"],
    old_logprobs: Float[Array, "*shape"],
    advantages: Float[Array, "*shape"],
    *,
    segment_ids: Int[Array, "*shape"],
    mask: Bool[Array, "*shape"],
    num_segments: int | None = None,
    clip_low: float = 0.4,
    clip_high: float = 0.4,
    axis_name: str | tuple[str, ...] | None = None,
) -> Float[Array, "*shape"]:
    """GMPO: the geometric mean of the tokens' clipped ratios; the clip is in log space, by token.

        d_t = log π − log π_old,   c_t = min(d_t, ε_high) if A > 0, max(d_t, −ε_low) if A < 0
        ℓ_t = −A · exp(mean_t c_t)

    `axis_name`: the mesh axes that tokens are split over, inside `jax.shard_map`.

    Source: Zhao et al., arXiv 2507.20673.
    """
    _check_clip(clip_low, clip_high)
    difference = jnp.clip(logprobs - old_logprobs, -20.0, 20.0)
    kept = jnp.where(
        advantages > 0, jnp.minimum(difference, clip_high), jnp.maximum(difference, -clip_low)
    )
    mean = segment_means(kept, segment_ids, mask, num_segments, axis_name)
    return -advantages * jnp.exp(mean)


def sapo(
    logprobs: Float[Array, "*shape"],
    old_logprobs: Float[Array, "*shape"],
    advantages: Float[Array, "*shape"],
    *,
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
) -> Float[Array, "*shape"]:
    """SAPO: a soft gate instead of a clip; its slope at r = 1 is 1.

        ℓ_t = −A · (4/τ) · σ(τ·(r − 1)),   τ by the sign of A

    Source: Gao et al., arXiv 2511.20347.
    """
    check_number("tau_positive", tau_positive, above=0.0)
    check_number("tau_negative", tau_negative, above=0.0)
    tau = jnp.where(advantages > 0, tau_positive, tau_negative)
    gate = jax.nn.sigmoid(tau * (importance_ratio(logprobs, old_logprobs) - 1.0)) * 4.0 / tau
    return -advantages * gate


def dppo(
    logprobs: Float[Array, "*shape"],
    old_logprobs: Float[Array, "*shape"],
    advantages: Float[Array, "*shape"],
    *,
    threshold: float = 0.2,
) -> Float[Array, "*shape"]:
    """DPPO (binary TV): a token is dropped when its probability has moved too far, and moves on.

        D = |π − π_old|;   ℓ_t = −A·r,  0 where D > δ and (A > 0, r > 1 or A < 0, r < 1)

    Source: arXiv 2602.04879.
    """
    check_number("threshold", threshold, least=0.0)
    ratio = importance_ratio(logprobs, old_logprobs)
    moved = jnp.abs(jnp.exp(logprobs) - jnp.exp(old_logprobs)) > threshold
    onward = jnp.where(advantages > 0, ratio > 1.0, ratio < 1.0)
    return jnp.where(jax.lax.stop_gradient(moved & onward), 0.0, -advantages * ratio)


#: Every surrogate by name.
SURROGATES: Catalogue[Callable[..., Float[Array, "*shape"]]] = Catalogue(
    "surrogate",
    {
        "reinforce": reinforce,
        "clipped": clipped,
        "gspo": gspo,
        "gspo_token": gspo_token,
        "cispo": cispo,
        "gmpo": gmpo,
        "sapo": sapo,
        "dppo": dppo,
    },
)


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
    _check_clip(clip_low, clip_high, dual_clip)
    ratio = jax.lax.stop_gradient(importance_ratio(logprobs, old_logprobs))
    positive, negative = advantages > 0, advantages < 0
    dual = negative & (ratio > dual_clip) if dual_clip is not None else jnp.zeros_like(negative)
    return {
        "clip_frac_high": (positive & (ratio > 1.0 + clip_high)).astype(ratio.dtype),
        "clip_frac_low": (negative & (ratio < 1.0 - clip_low)).astype(ratio.dtype),
        "clip_frac_dual": dual.astype(ratio.dtype),
        "approx_kl": jax.lax.stop_gradient(old_logprobs - logprobs),
        "ratio": ratio,
    }


def importance_ratio(
    logprobs: Float[Array, "*shape"], old_logprobs: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """exp(log π − log π_old), the difference kept in [−20, 20]."""
    return jnp.exp(jnp.clip(logprobs - old_logprobs, -20.0, 20.0))


def _check_clip(clip_low: float, clip_high: float, dual_clip: float | None = None) -> None:
    """An infinite range clips nothing; a dual clip of 1 or less would cut into the range itself."""
    check_number("clip_low", clip_low, least=0.0, most=math.inf)
    check_number("clip_high", clip_high, least=0.0, most=math.inf)
    if dual_clip is not None:
        check_number("dual_clip", dual_clip, above=1.0)


def _clip(
    ratio: Float[Array, "*shape"],
    advantages: Float[Array, "*shape"],
    clip_low: float,
    clip_high: float,
) -> Float[Array, "*shape"]:
    inside = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    return jnp.maximum(-advantages * ratio, -advantages * inside)


def _sequence_ratio(
    logprobs: Float[Array, "*shape"],
    old_logprobs: Float[Array, "*shape"],
    segment_ids: Int[Array, "*shape"],
    mask: Bool[Array, "*shape"],
    num_segments: int | None,
    axis_name: str | tuple[str, ...] | None,
) -> Float[Array, "*shape"]:
    """The geometric mean of each response's ratios, at each of its tokens."""
    difference = jnp.clip(logprobs - old_logprobs, -20.0, 20.0)
    return jnp.exp(segment_means(difference, segment_ids, mask, num_segments, axis_name))
