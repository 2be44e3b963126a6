"""Attention over rows whose tokens are split over devices, inside `jax.shard_map`.

Two ways, both exact for segments and windows, forward and backward:

- `exchanged`: each device gives away heads and gets tokens, so that a kernel of whole rows sees
  whole rows of a part of the heads; then back. Needs heads that the devices divide.
- `ring_attention`: queries stay, keys and values go round the devices, and the softmax is put
  together as they come. Serves any number of heads.

Tokens are numbered along the row: device i of C holds those from i · T/C on.

Sources: Jacobs et al., arXiv 2309.14509 (exchange of heads); Liu et al., arXiv 2310.01889 (ring).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

#: Attention over whole rows, from (q, k, v, segment ids).
Attend = Callable[[Array, Array, Array, Array], Array]
#: A score that is not seen: finite, so that no difference of two is NaN.
UNSEEN = -1e30
#: Queries of a block, whose scores with all keys of a device are in memory at once.
QUERY_BLOCK = 256


def exchanged(
    attend: Attend,
    q: Float[Array, "N t H d"],
    k: Float[Array, "N t K d"],
    v: Float[Array, "N t K d"],
    segment_ids: Int[Array, "N t"],
    axis: str,
) -> Float[Array, "N t H d"]:
    """`attend` on whole rows and the heads of this device of `axis`, whose devices must divide H;
    key-value heads are repeated as often as that needs."""
    devices = jax.lax.axis_size(axis)
    copies = fewest_copies(q.shape[2], k.shape[2], devices)
    k, v = (jnp.repeat(x, copies, axis=2) for x in (k, v))
    swap = functools.partial(jax.lax.all_to_all, axis_name=axis, tiled=True)
    q, k, v = (swap(x, split_axis=2, concat_axis=1) for x in (q, k, v))
    whole = jax.lax.all_gather(segment_ids, axis, axis=1, tiled=True)
    return swap(attend(q, k, v, whole), split_axis=1, concat_axis=2)


def fewest_copies(heads: int, kv_heads: int, parts: int) -> int:
    """The fewest copies of each key-value head, so that `parts` divides them; it divides
    `heads`."""
    group = heads // kv_heads
    return next(
        copies
        for copies in range(1, group + 1)
        if group % copies == 0 and kv_heads * copies % parts == 0
    )


def ring_attention(
    q: Float[Array, "N t H d"],
    k: Float[Array, "N t K d"],
    v: Float[Array, "N t K d"],
    segment_ids: Int[Array, "N t"],
    reach: Int[Array, ""],
    axis: str,
) -> Float[Array, "N t H d"]:
    """Causal attention inside the segments of each row, of which a token sees the last `reach`,
    itself included. The scale is in `q`; the softmax is in float32 or better.

    Scores are computed a block of queries at a time and anew in the backward pass; a device's keys
    that none of its queries sees are passed on unread.
    """
    N, t, H, d = q.shape
    blocks = -(-t // QUERY_BLOCK)
    extra = (0, -t % blocks)
    own = jnp.pad(segment_ids, ((0, 0), extra), constant_values=-1)
    q = jnp.pad(q, ((0, 0), extra, (0, 0), (0, 0)))
    grouped = q.reshape(N, -1, k.shape[2], H // k.shape[2], d).transpose(0, 2, 3, 1, 4)
    k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
    found: Array = _ring((axis, blocks), grouped, k, v, own, segment_ids, reach)
    return found.transpose(0, 3, 1, 2, 4).reshape(N, -1, H, d)[:, :t]


#: The mesh axis, and how many blocks of queries there are.
Ring = tuple[str, int]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(
    ring: Ring,
    q: Float[Array, "N K G Q d"],
    k: Float[Array, "N K t d"],
    v: Float[Array, "N K t d"],
    own: Int[Array, "N Q"],
    segment_ids: Int[Array, "N t"],
    reach: Int[Array, ""],
) -> Float[Array, "N K G Q d"]:
    """`own` are the segments of the queries, which are padded to whole blocks."""
    return _forward(ring, q, k, v, own, segment_ids, reach)[0]


def _forward(ring: Ring, *arguments: Array) -> tuple[Array, tuple]:
    q, k, v, own, segment_ids, reach = arguments
    wide = jnp.promote_types(q.dtype, jnp.float32)
    none = jnp.zeros(q.shape[:-1], wide)
    start = none + UNSEEN, none, jnp.zeros(q.shape, wide)

    def visit(device: Array, held: tuple, state: tuple) -> tuple[tuple, tuple]:
        k, v, theirs = held

        def block(
            _: None, at: Array, q: Array, own: Array, best: Array, mass: Array, out: Array
        ) -> tuple[None, tuple]:
            scores = _scores(ring, device, at, q, k, own, theirs, reach)
            higher = jnp.maximum(best, jnp.max(scores, axis=-1))
            parts = jnp.exp(scores - higher[..., None])
            kept = jnp.exp(best - higher)
            added = jnp.einsum(
                "nkgqt,nktd->nkgqd", parts.astype(v.dtype), v, preferred_element_type=wide
            )
            mass = mass * kept + jnp.sum(parts, axis=-1)
            return None, (higher, mass, out * kept[..., None] + added)

        return held, _by_blocks(ring, block, None, (q, own, *state))[1]

    # The first keys are the device's own, of which each token sees one at least, itself.
    best, mass, out = _around(ring, reach, visit, (k, v, segment_ids), start)[1]
    out = (out / mass[..., None]).astype(q.dtype)
    return out, (*arguments, out, best + jnp.log(mass))


def _backward(ring: Ring, saved: tuple, cotangent: Array) -> tuple:
    q, k, v, own, segment_ids, reach, out, log_mass = saved
    wide = log_mass.dtype
    product = functools.partial(jnp.einsum, preferred_element_type=wide)
    # What the softmax takes off again: Σ_j p_j ∂/∂p_j = Σ out · ∂/∂out.
    shared = jnp.sum(cotangent.astype(wide) * out.astype(wide), axis=-1)

    def visit(device: Array, held: tuple, of_q: Array) -> tuple[tuple, Array]:
        k, v, theirs, *sums = held

        def block(
            sums: tuple, at: Array, q: Array, own: Array, log_mass: Array, given: Array, off: Array
        ) -> tuple[tuple, Array]:
            scores = _scores(ring, device, at, q, k, own, theirs, reach)
            parts = jnp.exp(scores - log_mass[..., None])
            of_v = product("nkgqt,nkgqd->nktd", parts.astype(v.dtype), given)
            slopes = parts * (product("nkgqd,nktd->nkgqt", given, v) - off[..., None])
            slopes = slopes.astype(k.dtype)
            of_k = product("nkgqt,nkgqd->nktd", slopes, q)
            return (sums[0] + of_k, sums[1] + of_v), product("nkgqt,nktd->nkgqd", slopes, k)

        rows = (q, own, log_mass, cotangent, shared)
        sums, added = _by_blocks(ring, block, tuple(sums), rows)
        return (k, v, theirs, *sums), of_q + added

    none = tuple(jnp.zeros(x.shape, wide) for x in (k, v))
    start = jnp.zeros(q.shape, wide)
    held, of_q = _around(ring, reach, visit, (k, v, segment_ids, *none), start)
    of_k, of_v = _passed_on(ring, held[3:])  # home again
    return of_q.astype(q.dtype), of_k.astype(k.dtype), of_v.astype(v.dtype), None, None, None


_ring.defvjp(_forward, _backward)


def _around(
    ring: Ring,
    reach: Array,
    visit: Callable[[Array, tuple, Any], tuple[tuple, Any]],
    held: tuple,
    state: Any,
) -> tuple[tuple, Any]:
    """What is `held`, keys first, visits all devices of the ring, its own first; returns it as the
    last of them leaves it."""
    axis, t = ring[0], held[0].shape[2]
    devices, here = jax.lax.axis_size(axis), jax.lax.axis_index(axis)

    def turn(carry: tuple, step: Array) -> tuple[tuple, None]:
        held, state = carry
        held = _passed_on(ring, held)
        device = (here - step) % devices
        near = (device < here) & ((here - device - 1) * t + 1 < reach)
        return jax.lax.cond(near, visit, lambda _, *same: same, device, held, state), None

    carry = visit(here, held, state)
    return jax.lax.scan(turn, carry, jnp.arange(1, devices, dtype=here.dtype))[0]


def _passed_on(ring: Ring, tree: Any) -> Any:
    devices = jax.lax.axis_size(ring[0])
    pairs = [(i, (i + 1) % devices) for i in range(devices)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, ring[0], pairs), tree)


def _scores(
    ring: Ring,
    device: Array,
    at: Array,
    q: Float[Array, "N K G Q d"],
    k: Float[Array, "N K t d"],
    own: Int[Array, "N Q"],
    theirs: Int[Array, "N t"],
    reach: Array,
) -> Float[Array, "N K G Q t"]:
    """Scores of the queries from the device's own token `at` on with the keys of `device`."""
    wide, t = jnp.promote_types(q.dtype, jnp.float32), k.shape[2]
    scores = jnp.einsum("nkgqd,nktd->nkgqt", q, k, preferred_element_type=wide)
    columns = (jax.lax.axis_index(ring[0]) - device) * t + at + jnp.arange(q.shape[3])
    back = columns[:, None] - jnp.arange(t)[None, :]
    near = (back >= 0) & (back < reach)
    visible = near[None] & (own[:, :, None] == theirs[:, None, :])
    return jnp.where(visible[:, None, None], scores, UNSEEN)


def _by_blocks(
    ring: Ring, block: Callable[..., tuple[Any, Any]], sums: Any, rows: tuple[Array, ...]
) -> tuple[Any, Any]:
    """`block` on the queries of one block after the other, from arrays [N K G Q …] or [N Q]; with
    sums that go from block to block."""
    blocks = ring[1]
    if blocks == 1:
        return block(sums, jnp.zeros((), jnp.int32), *rows)

    def apart(x: Array) -> Array:
        at = 1 if x.ndim == 2 else 3
        parts = x.reshape(*x.shape[:at], blocks, -1, *x.shape[at + 1 :])
        return jnp.moveaxis(parts, at, 0)

    def together(x: Array) -> Array:
        parts = jnp.moveaxis(x, 0, 3)
        return parts.reshape(*parts.shape[:3], -1, *parts.shape[5:])

    def body(sums: Any, own: tuple[Array, ...]) -> tuple[Any, Any]:
        return block(sums, *own)

    starts = jnp.arange(blocks, dtype=jnp.int32) * (rows[0].shape[3] // blocks)
    sums, found = jax.lax.scan(body, sums, (starts, *map(apart, rows)))
    return sums, jax.tree.map(together, found)
