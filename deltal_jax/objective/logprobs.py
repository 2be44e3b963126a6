"""Token log-probabilities and entropy: from logits, or from hidden states in chunks."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

#: Logits that exist at once, as a number of floats: 256 MiB, whatever the vocabulary.
CHUNK_LOGITS = 2**26
#: Tokens of a chunk: at least so many, for the sake of matrix products; and at most this part of
#: all, so that little of what the mask leaves out is computed.
CHUNK_TOKENS, CHUNK_FRACTION = 128, 8

#: Logits of the vocabulary from the head's parameters and hidden states.
Head = Callable[[Any, Float[Array, "*shape D"]], Float[Array, "*shape V"]]
Pair = tuple[Float[Array, "*shape"], Float[Array, "*shape"]]


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
    # Shifted first, exact for large logits; neither result depends on the shift.
    shifted = logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    mass = jnp.exp(shifted)
    total = jnp.sum(mass, axis=-1)
    chosen = jnp.take_along_axis(shifted, targets[..., None], axis=-1)[..., 0]
    surprise = jnp.sum(jnp.where(mass > 0, mass * shifted, 0.0), axis=-1)
    return chosen - jnp.log(total), jnp.log(total) - surprise / total


def chunked_logprobs(
    head: Head,
    parameters: Any,
    hidden: Float[Array, "N T D"],
    targets: Int[Array, "N T"],
    mask: Bool[Array, "N T"],
    *,
    temperature: float = 1.0,
    entropy_gradient: bool = True,
    axis_name: str | tuple[str, ...] = (),
) -> tuple[Float[Array, "N T"], Float[Array, "N T"]]:
    """`token_logprobs` of `head(parameters, hidden)` where `mask` is True, 0 elsewhere.

    The masked positions are gathered and taken a chunk at a time, in a loop of as many rounds as
    they need; the backward pass computes the logits of each chunk anew. So [tokens × vocabulary]
    never exists at once, and positions that no loss needs (prompts, padding) cost nothing and reach
    neither values nor gradients, NaN included. Differentiable once, in reverse mode, by
    `parameters` and `hidden`; `entropy_gradient=False` leaves the entropy out.

    Inside `jax.shard_map`, `axis_name` names the mesh axes that the tokens are split over: all
    devices take as many rounds, since what else splits the head may be waited for in each. Take
    gradients outside of the shard_map, as with `aggregation.segment_sums`.
    """
    vocabulary = jax.eval_shape(head, parameters, hidden[0, :1]).shape[-1]
    options = head, temperature, entropy_gradient, chunk_size(mask.size, vocabulary), axis_name
    tokens = hidden.reshape(-1, hidden.shape[-1]), targets.ravel(), mask.ravel()
    found: Any = _chunked(options, parameters, *tokens)
    return found[0].reshape(mask.shape), found[1].reshape(mask.shape)


def chunk_size(tokens: int, vocabulary: int) -> int:
    """How many of `tokens` tokens have their logits at the same time."""
    affordable = max(1, CHUNK_LOGITS // vocabulary)
    return min(tokens, max(CHUNK_TOKENS, tokens // CHUNK_FRACTION), affordable)


#: The head, the temperature, whether the entropy has a gradient, tokens of a chunk, axis names.
Options = tuple[Head, float, bool, int, str | tuple[str, ...]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(
    options: Options,
    parameters: Any,
    hidden: Float[Array, "N D"],
    targets: Int[Array, " N"],
    mask: Bool[Array, " N"],
) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    head, temperature, _, size, axis_name = options
    order, rounds = _order(mask, size, axis_name)
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)

    def body(i: Array, found: Pair) -> Pair:
        at = _chunk(order, i, size)
        new = token_logprobs(head(parameters, hidden[at]), targets[at], temperature=temperature)
        return _place(found[0], new[0], i, size), _place(found[1], new[1], i, size)

    empty = jnp.zeros(order.shape, dtype)
    logprobs, entropies = jax.lax.fori_loop(0, rounds, body, (empty, empty))

    def spread(x: Array) -> Array:
        return jnp.where(mask, x[_places(order, mask.size)], 0.0)

    return spread(logprobs), spread(entropies)


def _forward(options: Options, *arguments: Any) -> tuple[Pair, tuple]:
    return _chunked(options, *arguments), arguments


def _backward(options: Options, saved: tuple, cotangents: Pair) -> tuple:
    head, temperature, entropy_gradient, size, axis_name = options
    parameters, hidden, targets, mask = saved
    order, rounds = _order(mask, size, axis_name)

    def body(i: Array, gradients: tuple[Any, Array]) -> tuple[Any, Array]:
        at = _chunk(order, i, size)
        wanted = targets[at]

        def chunk(parameters: Any, hidden: Array) -> Pair:
            logprobs, entropies = token_logprobs(
                head(parameters, hidden), wanted, temperature=temperature
            )
            return logprobs, entropies if entropy_gradient else jax.lax.stop_gradient(entropies)

        live = (i * size + jnp.arange(size) < mask.size) & mask[at]  # not what pads the last chunk
        states = jnp.where(live[:, None], hidden[at], 0.0)  # a NaN times 0 is NaN
        pullback = jax.vjp(chunk, parameters, states)[1]
        of_parameters, of_hidden = pullback(
            (jnp.where(live, cotangents[0][at], 0.0), jnp.where(live, cotangents[1][at], 0.0))
        )
        total = jax.tree.map(lambda a, b: a + b.astype(a.dtype), gradients[0], of_parameters)
        return total, _place(gradients[1], of_hidden, i, size)

    def wide(x: Array) -> Array:
        return jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))

    start = (
        jax.tree.map(wide, parameters),
        jnp.zeros((*order.shape, hidden.shape[-1]), hidden.dtype),
    )
    of_parameters, of_hidden = jax.lax.fori_loop(0, rounds, body, start)
    of_parameters = jax.tree.map(lambda g, x: g.astype(x.dtype), of_parameters, parameters)
    of_hidden = jnp.where(mask[:, None], of_hidden[_places(order, mask.size)], 0.0)
    return of_parameters, of_hidden, None, None


_chunked.defvjp(_forward, _backward)


def _order(
    mask: Bool[Array, " N"], size: int, axis_name: str | tuple[str, ...]
) -> tuple[Int[Array, " Nc"], Array]:
    """The tokens, the masked ones first, padded to whole chunks; and how many chunks these take, on
    the device that has most."""
    order = jnp.pad(jnp.argsort(~mask, stable=True), (0, -mask.size % size))
    masked = jnp.sum(mask, dtype=jnp.int32)
    most = jax.lax.pmax(masked, axis_name) if axis_name else masked
    return order, (most + size - 1) // size


def _chunk(order: Int[Array, " Nc"], i: Array, size: int) -> Int[Array, " c"]:
    return jax.lax.dynamic_slice_in_dim(order, i * size, size)


def _place(whole: Array, part: Array, i: Array, size: int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(whole, part.astype(whole.dtype), i * size, axis=0)


def _places(order: Int[Array, " Nc"], tokens: int) -> Int[Array, " N"]:
    """Where each token stands in `order`."""
    return jnp.argsort(order[:tokens])
