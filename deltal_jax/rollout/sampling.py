"""The next token: counter-based uniform numbers and the inverse distribution function."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

#: Tokens whose masses are summed before the running sum: the lanes of a TPU.
BLOCK = 128
#: Temperatures below this one are 0: a division by them would overflow.
COLDEST = 1e-6


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
    logits: Float[Array, "S V"],
    uniform: Float[Array, " S"],
    *,
    temperature: float,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> tuple[Int[Array, " S"], Float[Array, " S"]]:
    """Draw one token a row by the inverse distribution function; also its log-probability.

    The distribution is softmax(logits / temperature) over the tokens that `keep` leaves, and the
    log-probability is that of this distribution. Temperature 0, and what is below `COLDEST`, takes
    the most likely token, with log-probability 0.
    """
    logits = logits.astype(jnp.float32)
    if temperature < COLDEST:
        return jnp.argmax(logits, axis=-1), jnp.zeros(logits.shape[0], jnp.float32)
    scores = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
    scores = keep(scores, top_k=top_k, top_p=top_p, min_p=min_p)
    tokens, total = _inverse(scores, uniform)
    chosen = jnp.take_along_axis(scores, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - jnp.log(total)


def keep(
    scores: Float[Array, "S V"], *, top_k: int | None, top_p: float, min_p: float
) -> Float[Array, "S V"]:
    """Scores with −∞ for the tokens that are not to be drawn. In this order, each on what the one
    before left: the `top_k` best; the fewest of the best whose probabilities add to `top_p` or
    more; those of at least `min_p` times the highest probability. Equals stay together.

    Source: Holtzman et al., arXiv 1904.09751 (top-p); Nguyen et al., arXiv 2407.01082 (min-p).
    """
    if top_k is not None and top_k < scores.shape[-1]:
        worst = jax.lax.top_k(scores, top_k)[0][:, -1:]
        scores = jnp.where(scores >= worst, scores, -jnp.inf)
    if top_p < 1.0:
        ordered = jnp.sort(scores, axis=-1, descending=True)
        mass = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(mass, axis=-1) - mass
        worst = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        scores = jnp.where(scores >= worst, scores, -jnp.inf)
    if min_p > 0.0:
        worst = jnp.max(scores, axis=-1, keepdims=True) + jnp.log(min_p)
        scores = jnp.where(scores >= worst, scores, -jnp.inf)
    return scores


def _inverse(
    scores: Float[Array, "S V"], uniform: Float[Array, " S"]
) -> tuple[Int[Array, " S"], Float[Array, " S"]]:
    """The first token at which the sum of exp(scores) exceeds `uniform` of the total; and the
    total.

    In two steps, over blocks and inside the one that is hit: a running sum over a whole vocabulary
    costs as much as the head's matrix product on CPU.
    """
    S, V = scores.shape
    blocks = -(-V // BLOCK)
    padded = jnp.pad(scores, ((0, 0), (0, blocks * BLOCK - V)), constant_values=-jnp.inf)
    padded = padded.reshape(S, blocks, BLOCK)
    masses = jnp.sum(jnp.exp(padded), axis=-1)
    sums = jnp.cumsum(masses, axis=-1)
    total = sums[:, -1]
    # Strictly below the total, so that a block above the threshold exists.
    threshold = jnp.minimum(uniform * total, jnp.nextafter(total, 0.0))
    block = _with_mass(masses, jnp.sum(sums <= threshold[:, None], axis=-1))
    before = jnp.take_along_axis(jnp.pad(sums, ((0, 0), (1, 0))), block[:, None], axis=-1)
    own = jnp.exp(jnp.take_along_axis(padded, block[:, None, None], axis=1)[:, 0])
    running = before + jnp.cumsum(own, axis=-1)
    inside = _with_mass(own, jnp.sum(running <= threshold[:, None], axis=-1))
    return block * BLOCK + inside, total


def _with_mass(masses: Float[Array, "S n"], index: Int[Array, " S"]) -> Int[Array, " S"]:
    """The last one with mass up to `index`, or else the first one with mass.

    A running sum in floating point, as a tree, rises and falls by a rounding error where nothing is
    added, and may end below the threshold: so what it points at may have no mass.
    """
    at = jnp.arange(masses.shape[1])[None, :]
    last = jnp.max(jnp.where((masses > 0) & (at <= index[:, None]), at, -1), axis=-1)
    return jnp.where(last < 0, jnp.argmax(masses > 0, axis=-1), last)
