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
    shards: int = 1,
) -> tuple[Float[Array, "N T"], Float[Array, "N T"]]:
    """`token_logprobs` of `head(parameters, hidden)` where `mask` is True, 0 elsewhere.

    The masked positions are gathered and taken a chunk at a time, in a loop of as many rounds as
    they need; the backward pass computes the logits of each chunk anew. So [tokens × vocabulary]
    never exists at once, and positions that no loss needs (prompts, padding) cost nothing and reach
    neither values nor gradients, NaN included. Differentiable once, in reverse mode, by
    `parameters` and `hidden`; `entropy_gradient=False` leaves the entropy out. `shards` is the
    number of devices that rows are split over: each gathers among its own.
    """
    vocabulary = jax.eval_shape(head, parameters, hidden[0, :1]).shape[-1]
    size = chunk_size(mask.size // shards, vocabulary)
    hidden, targets = hidden.reshape(shards, -1, hidden.shape[-1]), targets.reshape(shards, -1)
    found: Any = _chunked(
        head,
        temperature,
        entropy_gradient,
        size,
        parameters,
        hidden,
        targets,
        mask.reshape(shards, -1),
    )
    return found[0].reshape(mask.shape), found[1].reshape(mask.shape)


def chunk_size(tokens: int, vocabulary: int) -> int:
    """How many of `tokens` tokens have their logits at the same time."""
    affordable = max(1, CHUNK_LOGITS // vocabulary)
    return min(tokens, max(CHUNK_TOKENS, tokens // CHUNK_FRACTION), affordable)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _chunked(
    head: Head,
    temperature: float,
    entropy_gradient: bool,
    size: int,
    parameters: Any,
    hidden: Float[Array, "S N D"],
    targets: Int[Array, "S N"],
    mask: Bool[Array, "S N"],
) -> tuple[Float[Array, "S N"], Float[Array, "S N"]]:
    del entropy_gradient
    order, rounds = _order(mask, size)
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)

    def body(i: Array, found: Pair) -> Pair:
        at = _chunk(order, i, size)
        new = token_logprobs(
            head(parameters, _gather(hidden, at)), _gather(targets, at), temperature=temperature
        )
        return _place(found[0], new[0], i, size), _place(found[1], new[1], i, size)

    empty = jnp.zeros(order.shape, dtype)
    logprobs, entropies = jax.lax.fori_loop(0, rounds, body, (empty, empty))

    def spread(x: Array) -> Array:
        return jnp.where(mask, _spread(x, order, mask.shape[1]), 0.0)

    return spread(logprobs), spread(entropies)


def _forward(
    head: Head, temperature: float, entropy_gradient: bool, size: int, *arguments: Any
) -> tuple[Pair, tuple]:
    return _chunked(head, temperature, entropy_gradient, size, *arguments), arguments


def _backward(
    head: Head,
    temperature: float,
    entropy_gradient: bool,
    size: int,
    saved: tuple,
    cotangents: Pair,
) -> tuple:
    parameters, hidden, targets, mask = saved
    order, rounds = _order(mask, size)

    def body(i: Array, gradients: tuple[Any, Array]) -> tuple[Any, Array]:
        at = _chunk(order, i, size)
        wanted = _gather(targets, at)

        def chunk(parameters: Any, hidden: Array) -> Pair:
            logprobs, entropies = token_logprobs(
                head(parameters, hidden), wanted, temperature=temperature
            )
            return logprobs, entropies if entropy_gradient else jax.lax.stop_gradient(entropies)

        own = i * size + jnp.arange(size) < mask.shape[1]  # not what pads the last chunk
        live = own[None, :] & _gather(mask, at)
        states = jnp.where(live[..., None], _gather(hidden, at), 0.0)  # a NaN times 0 is NaN
        pullback = jax.vjp(chunk, parameters, states)[1]
        of_parameters, of_hidden = pullback(
            (
                jnp.where(live, _gather(cotangents[0], at), 0.0),
                jnp.where(live, _gather(cotangents[1], at), 0.0),
            )
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
    of_hidden = jnp.where(mask[..., None], _spread(of_hidden, order, mask.shape[1]), 0.0)
    return of_parameters, of_hidden, None, None


_chunked.defvjp(_forward, _backward)


def _order(mask: Bool[Array, "S N"], size: int) -> tuple[Int[Array, "S Nc"], Array]:
    """Each shard's tokens, the masked ones first, padded to whole chunks; and how many chunks the
    fullest shard takes."""
    order = jnp.argsort(~mask, axis=1, stable=True)
    order = jnp.pad(order, ((0, 0), (0, -mask.shape[1] % size)))
    fullest = jnp.max(jnp.sum(mask, axis=1, dtype=jnp.int32))
    return order, (fullest + size - 1) // size


def _chunk(order: Int[Array, "S Nc"], i: Array, size: int) -> Int[Array, "S c"]:
    return jax.lax.dynamic_slice_in_dim(order, i * size, size, axis=1)


def _gather(values: Array, at: Int[Array, "S c"]) -> Array:
    at = at.reshape(*at.shape, *(1,) * (values.ndim - 2))
    return jnp.take_along_axis(values, at, axis=1)


def _place(whole: Array, part: Array, i: Array, size: int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(whole, part.astype(whole.dtype), i * size, axis=1)


def _spread(packed: Array, order: Int[Array, "S Nc"], width: int) -> Array:
    """The inverse of gathering by `order`."""
    return _gather(packed, jnp.argsort(order[:, :width], axis=1))
