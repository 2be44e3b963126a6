"""Estimators of KL(π ‖ π_ref) from sampled tokens, and the entropy of a distribution.

With x = log π_ref − log π on tokens drawn from π, each function gives one value a token:

| | value | as a metric | as a loss |
|---|---|---|---|
| `kl_k1` | −x | unbiased, high variance | its expected gradient is zero: never use it |
| `kl_k2` | x²/2 | biased, low variance | its expected gradient is that of the KL |
| `kl_k3` | eˣ − 1 − x | unbiased, never negative | its gradient is that of the reverse direction |
| `kl_k3_straight_through` | k3's value | as k3 | k2's gradient, so that of the KL |

Source: Schulman, "Approximating KL divergence", 2020.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from deltal_jax.objective.names import Catalogue


def kl_k1(
    logprobs: Float[Array, "*shape"], reference_logprobs: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """k1 = log π − log π_ref. A metric only: E[∇k1] = E[∇ log π] = 0."""
    return logprobs - reference_logprobs


def kl_k2(
    logprobs: Float[Array, "*shape"], reference_logprobs: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """k2 = (log π − log π_ref)² / 2, whose gradient (log π − log π_ref)·∇ log π is the KL's."""
    return 0.5 * (logprobs - reference_logprobs) ** 2


def kl_k3(
    logprobs: Float[Array, "*shape"], reference_logprobs: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """k3 = eˣ − 1 − x with x = log π_ref − log π, kept in [−20, 20]."""
    x = jnp.clip(reference_logprobs - logprobs, -20.0, 20.0)
    return jnp.expm1(x) - x


def kl_k3_straight_through(
    logprobs: Float[Array, "*shape"], reference_logprobs: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """k3's value with k2's gradient: a loss whose expected gradient is that of the KL."""
    k2 = kl_k2(logprobs, reference_logprobs)
    return k2 + jax.lax.stop_gradient(kl_k3(logprobs, reference_logprobs) - k2)


def entropy(logits: Float[Array, "*shape V"]) -> Float[Array, "*shape"]:
    """−Σ_v π(v) log π(v) in nats, of π = softmax(logits); a logit of −inf counts as no mass."""
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    mass = jnp.exp(logprobs)
    return -jnp.sum(jnp.where(mass > 0, mass * logprobs, 0.0), axis=-1)


#: Every KL estimator by name.
DIVERGENCES: Catalogue[Callable[..., Float[Array, "*shape"]]] = Catalogue(
    "divergence",
    {
        "kl_k1": kl_k1,
        "kl_k2": kl_k2,
        "kl_k3": kl_k3,
        "kl_k3_straight_through": kl_k3_straight_through,
    },
)
