"""Token log-probabilities and entropy from logits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def token_logprobs(
    logits: Float[Array, "*shape V"],
    targets: Int[Array, "*shape"],
    *,
    temperature: float = 1.0,
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """log π(target) and the entropy (nats) of π = softmax(logits / temperature), in float32 or
    better.

    The temperature is the sampler's: the policy that is trained is the one that was sampled from.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32)) / temperature
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    entropy = log_normalizer - jnp.sum(jax.nn.softmax(logits, axis=-1) * logits, axis=-1)
    return chosen - log_normalizer, entropy
