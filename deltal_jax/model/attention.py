"""Rotary positions, attention over whole rows and over a cache.

A window is the number of tokens that a token of a local layer sees, itself included; `local` says
whether this layer is one, known beforehand or traced in a scan over layers.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from deltal_jax.model import kernels
from deltal_jax.parallel.sharding import tokens_are_split

#: Added to the scores that a query may not see; finite, so that a row that sees nothing stays
#: finite.
MASKED = -1e30
#: Cosine and sine of the angles by which the pairs of every head are turned.
Turns = tuple[Float[Array, "*shape 1 half"], Float[Array, "*shape 1 half"]]
#: Rows of up to so many tokens see their scores at once; longer ones are taken in blocks of
#: queries, so that memory grows with the length and not with its square.
WHOLE_ROW = 1024
#: Queries of a block. At 4,096 tokens on CPU, blocks of 1,024 take a third more time and 2.7 times
#: the memory.
QUERY_BLOCK = 256


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Slower rotations for longer contexts: all by `factor` (linear) or, where the other fields are
    given, only the slow ones (llama3)."""

    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_length: int | None = None


def rotations(positions: Int[Array, "*shape"], frequencies: Float[Array, " half"]) -> Turns:
    """Cosine and sine of position · frequency."""
    positions = positions[..., None, None].astype(jnp.float32)
    angles = positions * frequencies.reshape((1,) * (positions.ndim - 1) + (-1,))
    return jnp.cos(angles), jnp.sin(angles)


def rope(x: Float[Array, "*shape H d"], turns: Turns) -> Float[Array, "*shape H d"]:
    """Rotary position embedding, half-split: pairs are (x_j, x_{j + d/2}), turned by position ·
    frequency_j.

    Source: Su et al., arXiv 2104.09864.
    """
    cos, sin = turns
    low, high = jnp.split(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 2, axis=-1)
    turned = jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
    return turned.astype(x.dtype)


def scaled(frequencies: Float[Array, " half"], scaling: RopeScaling | None) -> Array:
    """Linear scaling, or llama3's: slow rotations by the factor, fast ones not, between them a
    blend."""
    if scaling is None:
        return frequencies
    slowed = frequencies / scaling.factor
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    if low is None or high is None or scaling.original_length is None:
        return slowed
    turns = frequencies * scaling.original_length / (2 * jnp.pi)
    smooth = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return smooth * frequencies + (1.0 - smooth) * slowed


def attend_rows(
    q: Float[Array, "N T H d"],
    k: Float[Array, "N T K d"],
    v: Float[Array, "N T K d"],
    segment_ids: Int[Array, "N T"],
    window: int | None = None,
    local: bool | Bool[Array, ""] = True,
    *,
    kernel: kernels.Kernel = "xla",
) -> Float[Array, "N T H d"]:
    """Causal attention inside the segments of each row: token i sees j ≤ i of its own segment, and
    in a local layer only those with i − j < window. The scale is in `q`.

    `kernel`: "xla" runs anywhere, "cudnn" on GPUs and without segments (`kernels.attend_cudnn`),
    "splash" on TPUs. Memory grows with T and not with T² in all three. Raises UserError where the
    kernel cannot serve the call.
    """
    if window is not None and window >= q.shape[1]:
        window = None  # it reaches over the whole row

    def attend(window: int | None) -> Callable[..., Array]:
        return lambda *rows: kernels.attend(kernel, *rows, window=window)

    rows = (q, k, v, segment_ids)
    if kernel == "xla":
        reach = _reach(window, local)
        attend_xla = functools.partial(_attend_xla, window=reach)
        # A scan over blocks makes the compiler gather the rows of all devices: for six layers of a
        # 3B model on 32 v5e, 16.7 GiB of temporaries where 1.9 do.
        if q.shape[1] > WHOLE_ROW or tokens_are_split():
            return kernels.over_mesh(attend_xla, *rows, reach)
        return attend_xla(*rows)
    if window is None or isinstance(local, bool):
        return attend(window if local is True else None)(*rows)
    # Both kernels take only a window that is known beforehand.
    return jax.lax.cond(local, attend(window), attend(None), *rows)


def _reach(window: int | None, local: bool | Bool[Array, ""]) -> Int[Array, ""] | None:
    """How many tokens a token of this layer sees, itself included; None: all before it."""
    return None if window is None else jnp.where(local, window, jnp.iinfo(jnp.int32).max)


def _attend_xla(
    q: Float[Array, "N T H d"],
    k: Float[Array, "N T K d"],
    v: Float[Array, "N T K d"],
    segment_ids: Int[Array, "N T"],
    window: Int[Array, ""] | None,
) -> Float[Array, "N T H d"]:
    """`attend_rows` by XLA alone: matrix products, and a softmax between them."""
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    N, T, H, d = q.shape
    if T <= WHOLE_ROW:
        return _attend_block(q, k, v, segment_ids, segment_ids, jnp.asarray(0), window)
    blocks = -(-T // QUERY_BLOCK)
    extra = blocks * QUERY_BLOCK - T
    queries = jnp.pad(q, ((0, 0), (0, extra), (0, 0), (0, 0)))
    owners = jnp.pad(segment_ids, ((0, 0), (0, extra)), constant_values=-1)

    # One block after the other, and its scores anew in the backward pass: unrolled, they would all
    # be in memory together.
    @jax.checkpoint
    def body(start: Array, block: tuple[Array, Array]) -> tuple[Array, Array]:
        found = _attend_block(block[0], k, v, block[1], segment_ids, start, window)
        return start + QUERY_BLOCK, found

    split = (
        queries.reshape(N, blocks, QUERY_BLOCK, H, d).swapaxes(0, 1),
        owners.reshape(N, blocks, QUERY_BLOCK).swapaxes(0, 1),
    )
    found = jax.lax.scan(body, jnp.asarray(0), split)[1]
    return found.swapaxes(0, 1).reshape(N, -1, H, d)[:, :T]


def _attend_block(
    q: Float[Array, "N Q H d"],
    k: Float[Array, "N K T d"],
    v: Float[Array, "N K T d"],
    owners: Int[Array, "N Q"],
    segment_ids: Int[Array, "N T"],
    start: Int[Array, ""],
    window: Int[Array, ""] | None,
) -> Float[Array, "N Q H d"]:
    """`attend_rows` for the queries of the columns from `start` on, whose segments are `owners`."""
    back = start + jnp.arange(q.shape[1])[:, None] - jnp.arange(k.shape[2])[None, :]
    near = back >= 0 if window is None else (back >= 0) & (back < window)
    own = owners[:, :, None] == segment_ids[:, None, :]
    return _grouped_attention(q, k, v, near[None] & own)


def attend_cache(
    q: Float[Array, "N 1 H d"],
    k: Float[Array, "N K d T"],
    v: Float[Array, "N K T d"],
    positions: Int[Array, "N 1"],
    window: int | None = None,
    local: bool | Bool[Array, ""] = True,
) -> Float[Array, "N 1 H d"]:
    """Attention of one new token a row over its cache, whose first `position + 1` entries are
    valid. The scale is in `q`."""
    back = positions[:, :, None] - jnp.arange(v.shape[2])[None, None, :]
    reach = _reach(window, local)
    visible = back >= 0 if reach is None else (back >= 0) & (back < reach)
    return _grouped_attention(q, k.swapaxes(2, 3), v, visible)  # turned inside the product


def _grouped_attention(
    q: Float[Array, "N Q H d"],
    k: Float[Array, "N K T d"],
    v: Float[Array, "N K T d"],
    visible: Bool[Array, "N Q T"],
) -> Float[Array, "N Q H d"]:
    """Softmax attention; query head h reads key-value head h // (H / K). Softmax in float32 or
    better.

    The softmax is normalised after the product with the values, on d numbers a query, not T: on
    CPU forward and backward take little more than half the time.
    """
    N, Q, H, d = q.shape
    K = k.shape[1]
    grouped = q.reshape(N, Q, K, H // K, d).transpose(0, 2, 3, 1, 4)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("nkgqd,nktd->nkgqt", grouped, k, preferred_element_type=wide)
    scores = jnp.where(visible[:, None, None], scores, MASKED)
    # The result does not depend on the shift, so no gradient needs to go through it.
    shift = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    mass = jnp.exp(scores - shift)
    out = jnp.einsum("nkgqt,nktd->nkgqd", mass.astype(v.dtype), v, preferred_element_type=wide)
    out = (out / jnp.sum(mass, axis=-1, keepdims=True)).astype(v.dtype)
    return out.transpose(0, 3, 1, 2, 4).reshape(N, Q, H, d)
