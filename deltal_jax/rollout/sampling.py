"""The next token: counter-based uniform numbers and the inverse distribution function."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32


def stream_keys(
    key: Array,
    step: Int[Array, ""],
    round_: Int[Array, ""],
    positions: Int[Array, " P"],
    samples: int,
) -> UInt32[Array, "B 2"]:
    """One raw key for each (prompt, sample) pair, prompts first: B = P·samples.

    A key depends on the root key, the step in which the response begins, the round, the prompt's
    position in the data stream and the sample's number: never on slots, queue order or devices.
    """
    root = jax.random.fold_in(jax.random.fold_in(key, step), round_)

    def one(position: Array, sample: Array) -> Array:
        return jax.random.key_data(jax.random.fold_in(jax.random.fold_in(root, position), sample))

    numbers = jnp.arange(samples)
    keys = jax.vmap(lambda p: jax.vmap(lambda s: one(p, s))(numbers))(positions)
    return keys.reshape(-1, 2)


def uniforms(keys: UInt32[Array, "S 2"], counters: Int[Array, " S"]) -> Float[Array, " S"]:
    """One number in [0, 1) a slot, the `counter`-th of its key: a hash, so nothing is carried
    along."""

    def one(key: Array, counter: Array) -> Array:
        mixed = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), counter)
        return jax.random.key_data(mixed)[0]

    bits = jax.vmap(one)(keys, counters)
    return (bits >> 8).astype(jnp.float32) * 2.0**-24


def sample(
    logits: Float[Array, "S V"], uniform: Float[Array, " S"], *, temperature: float
) -> tuple[Int[Array, " S"], Float[Array, " S"]]:
    """Draw one token a row by the inverse distribution function; also its log-probability.

    The log-probability is that of softmax(logits / temperature), the distribution drawn from.
    Temperature 0 takes the most likely token, with log-probability 0.
    """
    logits = logits.astype(jnp.float32)
    if temperature == 0.0:
        return jnp.argmax(logits, axis=-1), jnp.zeros(logits.shape[0], jnp.float32)
    logits = logits / temperature
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    cumulative = jnp.cumsum(jnp.exp(shifted), axis=-1)
    total = cumulative[:, -1:]
    # Strictly below the total, so that the first entry above the threshold exists and has mass.
    threshold = jnp.minimum(uniform[:, None] * total, jnp.nextafter(total, 0.0))
    tokens = jnp.sum(cumulative <= threshold, axis=-1)
    chosen = jnp.take_along_axis(shifted, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - jax.nn.logsumexp(shifted, axis=-1)
