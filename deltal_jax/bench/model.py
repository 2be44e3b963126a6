"""Forward and backward of a slice of a model, against the machine's own matrix product."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deltal_jax.bench.measure import Timing, in_turn, ratio
from deltal_jax.model.architecture import Architecture, matrix_size
from deltal_jax.model.attention import MASKED, attend_rows
from deltal_jax.model.transformer import init_model, make_graphdef, split_model

#: Layers of Qwen2.5-0.5B's kind, without a head: it would be a plain product.
ARCHITECTURE = Architecture(
    vocab=1024,
    layers=4,
    d_model=1024,
    heads=16,
    kv_heads=4,
    head_dim=64,
    d_ff=2816,
    tied_embeddings=True,
    remat="none",
)
ROWS, TOKENS = 4, 512


def benchmark_model(
    rounds: int,
    arch: Architecture = ARCHITECTURE,
    rows: int = ROWS,
    tokens: int = TOKENS,
    square: int | None = None,
) -> dict[str, Any]:
    """Every figure of `deltal bench model`, by the type of the numbers.

    `share_of_peak` is useful floating-point operations a second over those of a plain product of
    two matrices of `square` rows and columns. Useful are the products alone, forward once, backward
    twice: with the weights of the layers, and of attention only what a causal mask leaves, (T+1)/2
    of T columns. `share_with_masked` counts all T, as some do; on CPU, `share_by_cpu_time` sets
    operations by CPU seconds, which a machine that others use too moves less.
    """
    on_cpu = jax.default_backend() == "cpu"
    types = [jnp.float32] if on_cpu else [jnp.float32, jnp.bfloat16]
    square = square or (2048 if on_cpu else 8192)
    return {jnp.dtype(t).name: _measure(rounds, arch, (rows, tokens), square, t) for t in types}


def layer_flops(arch: Architecture, rows: int, tokens: int, *, masked: bool) -> dict[str, float]:
    """Floating-point operations of one forward pass: products with the weights of all layers, and
    attention's two products, `masked`: those that the causal mask throws away too."""
    columns = tokens if masked else (tokens + 1) / 2
    count = rows * tokens * arch.layers
    wide = arch.heads * arch.head_dim
    return {"weights": 2.0 * count * matrix_size(arch), "attention": 4.0 * count * wide * columns}


def _measure(
    rounds: int, arch: Architecture, shape: tuple[int, int], square: int, dtype: Any
) -> dict[str, Any]:
    useful = layer_flops(arch, *shape, masked=False)
    whole = layer_flops(arch, *shape, masked=True)
    forward, backward = _model_sides(arch, shape, dtype)
    heads = {"attention": attend_rows, "attention, plain": plain_attention}
    sides = {"matmul": _matmul(square, dtype), "forward": forward, "forward, backward": backward}
    sides |= {name: _attention_side(f, arch, shape, dtype) for name, f in heads.items()}
    timings = in_turn(sides, rounds)
    peak = 2 * square**3 / timings["matmul"].summary()["wall_s"]
    # Forward once; backward twice, with respect to both factors.
    parts = {
        "forward": (1, ("weights", "attention")),
        "forward, backward": (3, ("weights", "attention")),
        "attention": (3 / arch.layers, ("attention",)),
        "attention, plain": (3 / arch.layers, ("attention",)),
    }
    figures: dict[str, Any] = {
        "matmul": timings["matmul"].summary() | {"square": square, "gflops": peak / 1e9}
    }
    for name, (times, kinds) in parts.items():
        done, with_masked = (times * sum(x[kind] for kind in kinds) for x in (useful, whole))
        shares = _shares(done / (2 * square**3), timings[name], timings["matmul"])
        figures[name] = timings[name].summary() | shares
        figures[name]["gflops"] = done / figures[name]["wall_s"] / 1e9
        figures[name]["share_with_masked"] = shares["share_of_peak"] * with_masked / done
    return figures


def _shares(products: float, timing: Timing, matmul: Timing) -> dict[str, float]:
    """What the operations of so many of the machine's products take, over what they took."""
    shares = {"share_of_peak": products * ratio(matmul, timing)}
    if jax.default_backend() == "cpu":
        seconds = matmul.summary()["cpu_s"] / timing.summary()["cpu_s"]
        shares["share_by_cpu_time"] = products * seconds
    return shares


def _matmul(square: int, dtype: Any) -> Callable[[], Any]:
    a = jax.random.normal(jax.random.key(0), (square, square)).astype(dtype)
    product = jax.jit(lambda a, b: a @ b)
    return lambda: product(a, a)


def _model_sides(
    arch: Architecture, shape: tuple[int, int], dtype: Any
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Hidden states of whole rows; and the gradient of their product with a fixed direction with
    respect to all parameters, the embedding's too."""
    graphdef = make_graphdef(arch)
    params = split_model(init_model(arch, jax.random.key(0)))[1]
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, arch.vocab)
    positions = jnp.broadcast_to(jnp.arange(shape[1]), shape)
    direction = jax.random.normal(jax.random.key(2), (*shape, arch.d_model)).astype(dtype)

    def hidden(params: Any) -> jax.Array:
        return nnx.merge(graphdef, params).hidden(tokens, positions, jnp.zeros_like(tokens))

    forward = jax.jit(hidden)
    backward = jax.jit(jax.grad(lambda p: jnp.vdot(hidden(p), direction).astype(jnp.float32)))
    return lambda: forward(params), lambda: backward(params)


def _attention_side(
    attend: Callable[..., jax.Array], arch: Architecture, shape: tuple[int, int], dtype: Any
) -> Callable[[], Any]:
    """Attention of one layer, forward and backward."""
    keys, d = jax.random.split(jax.random.key(3), 4), arch.head_dim
    counts = (arch.heads, arch.kv_heads, arch.kv_heads, arch.heads)
    q, k, v, direction = (
        jax.random.normal(key, (*shape, n, d)).astype(dtype)
        for key, n in zip(keys, counts, strict=True)
    )
    segments = jnp.zeros(shape, jnp.int32)

    def product(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.vdot(attend(q * d**-0.5, k, v, segments), direction).astype(jnp.float32)

    gradient = jax.jit(jax.grad(product, argnums=(0, 1, 2)))
    return lambda: gradient(q, k, v)


def plain_attention(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """`attend_rows` as one writes it down: keys and values repeated for every head, all scores,
    the softmax normalised before the product with the values."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("nqhd,nthd->nhqt", q, k).astype(jnp.float32)
    own = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    scores = jnp.where(
        own & jnp.tril(jnp.ones(scores.shape[-2:], bool))[None, None], scores, MASKED
    )
    return jnp.einsum("nhqt,nthd->nqhd", jax.nn.softmax(scores).astype(v.dtype), v)
