"""The key-value cache of decoding: one pair of arrays a layer.

Separate arrays a layer are updated in place; one array stacked over the layers was three times
slower on CPU. Keys have time last, as the product with a query reads them: on CPU it takes half the
time. No other module knows which axis is time.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

LayerCache = tuple[Float[Array, "S K d T"], Float[Array, "S K T d"]]
Cache = tuple[LayerCache, ...]


def init_cache(
    layers: int, slots: int, kv_heads: int, time: int, head_dim: int, dtype: jnp.dtype
) -> Cache:
    """An empty cache."""

    def zeros(*shape: int) -> Array:
        return jnp.zeros((slots, kv_heads, *shape), dtype)

    return tuple((zeros(head_dim, time), zeros(time, head_dim)) for _ in range(layers))


def layer_cache(k: Float[Array, "N T K d"], v: Float[Array, "N T K d"]) -> LayerCache:
    """The cache of a layer that holds these keys and values."""
    return k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)


def time_of(cache: Any) -> int:
    """Tokens that the cache has room for."""
    return cache[0][1].shape[2]


def resized(cache: Any, time: int) -> Cache:
    """With room for so many tokens: the first ones stay."""

    def one(x: Array, axis: int) -> Array:
        if x.shape[axis] >= time:
            return jax.lax.slice_in_dim(x, 0, time, axis=axis)
        extra = [(0, 0)] * x.ndim
        extra[axis] = 0, time - x.shape[axis]
        return jnp.pad(x, extra)

    return tuple((one(k, 3), one(v, 2)) for k, v in cache)


def write_token(
    layer: LayerCache,
    k: Float[Array, "S 1 K d"],
    v: Float[Array, "S 1 K d"],
    positions: Int[Array, "S 1"],
) -> LayerCache:
    """Store the keys and values of one new token a slot at that slot's position."""

    @jax.vmap
    def put(layer: tuple[Array, Array], k: Array, v: Array, at: Array) -> tuple[Array, Array]:
        keys = jax.lax.dynamic_update_slice(layer[0], k.transpose(1, 2, 0), (0, 0, at))
        return keys, jax.lax.dynamic_update_slice(layer[1], v.transpose(1, 0, 2), (0, at, 0))

    return put(layer, k, v, positions[:, 0])


def write_row(cache: Cache, slot: Int[Array, ""], stored: Any, row: Int[Array, ""]) -> Cache:
    """Slot `slot` gets what row `row` of `stored`, another cache, holds, as far as there is
    room."""
    fitting = resized(stored, min(time_of(stored), time_of(cache)))

    def one(mine: Array, other: Array) -> Array:
        found = jax.lax.dynamic_index_in_dim(other, row, keepdims=True)
        return jax.lax.dynamic_update_slice(mine, found, (slot, 0, 0, 0))

    return jax.tree.map(one, cache, fitting)


def cache_bytes(
    layers: int, slots: int, kv_heads: int, time: int, head_dim: int, itemsize: int
) -> int:
    """Bytes that `init_cache` allocates."""
    return 2 * layers * slots * kv_heads * time * head_dim * itemsize
