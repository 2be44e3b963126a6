"""Token log-probabilities and entropy from logits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from deltal_jax.objective.divergence import entropy


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
    logprobs = jax.nn.log_softmax(logits, axis=-1)  # shifted first: exact for large logits
    chosen = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
    return chosen, entropy(logits)
