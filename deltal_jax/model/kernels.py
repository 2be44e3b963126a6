"""Attention on accelerators: cuDNN's flash attention and, in Pallas, splash attention.

Both take whole rows and never build a T × T matrix. `attention.attend_rows` calls them.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, DTypeLike, Float, Int

from deltal_jax.errors import UserError
from deltal_jax.model.remat import ATTENTION
from deltal_jax.parallel.context import exchanged, fewest_copies, ring_attention
from deltal_jax.parallel.sharding import MESH_AXES, ROW_AXES

Kernel = Literal["xla", "cudnn", "splash"]
#: The kernels that take segment ids; with the others a row holds one response.
PACKS: tuple[Kernel, ...] = ("xla", "splash")
#: Platform → its own kernel; others have none.
OWN: dict[str, Kernel] = {"gpu": "cudnn", "tpu": "splash"}
#: Splash takes lengths in multiples of this: the lanes of a TPU's registers.
LANES = 128
#: The most queries, and keys, that splash takes at once: 512 × 512 scores in float32 are 1 MiB of
#: the 16 MiB that a kernel has on a v5e. Not tuned on a TPU.
SPLASH_BLOCK = 512


def default_attention(platform: str, dtype: DTypeLike, head_dim: int, packed: bool) -> Kernel:
    """The kernel for `platform` ("cpu", "gpu" or "tpu", as `jax.default_backend()` says): the
    platform's own where it serves the type and the head_dim and, if `packed`, takes segment
    ids."""
    own = OWN.get(platform, "xla")
    served = refusal(own, dtype, head_dim) is None and (own in PACKS or not packed)
    return own if served else "xla"


def refusal(kernel: Kernel, dtype: DTypeLike, head_dim: int) -> str | None:
    """Why `kernel` does not serve heads of this type and size, in one line; None: it does.

    cuDNN: float16 or bfloat16, head_dim a multiple of 8 up to 128, from Hopper on up to 256.
    Splash: bfloat16 or float32. Source: `check_layout` and `check_is_flash_attention` in
    jax/_src/cudnn/fused_attention_stablehlo.py; the types Mosaic multiplies.
    """
    name = jnp.dtype(dtype).name
    if kernel == "cudnn" and name not in ("bfloat16", "float16"):
        return f"cudnn computes in bfloat16 or float16, not {name}"
    if kernel == "cudnn" and (head_dim % 8 or head_dim > _cudnn_head_dim()):
        most = _cudnn_head_dim()
        return f"cudnn takes a head_dim that is a multiple of 8 up to {most} here, not {head_dim}"
    if kernel == "splash" and name not in ("bfloat16", "float32"):
        return f"splash computes in bfloat16 or float32, not {name}"
    return None


def check_kernel(kernel: Kernel, dtype: DTypeLike, head_dim: int) -> None:
    """Raises UserError where `refusal` says why not."""
    if said := refusal(kernel, dtype, head_dim):
        raise UserError(f"model.attention: {said}; set it to auto or xla")


def _cudnn_head_dim() -> int:
    """The largest head_dim that cuDNN takes on the GPU here."""
    if jax.default_backend() != "gpu":
        return 128
    capability = str(getattr(jax.local_devices()[0], "compute_capability", "0"))
    return 256 if float(capability) >= 9.0 else 128


def attend(
    kernel: Kernel,
    q: Float[Array, "N T H d"],
    k: Float[Array, "N T K d"],
    v: Float[Array, "N T K d"],
    segment_ids: Int[Array, "N T"],
    window: int | None = None,
) -> Float[Array, "N T H d"]:
    """`attention.attend_rows` by cuDNN or splash, each device its own rows and heads.

    The compiler does not partition these kernels: see `over_mesh`. Raises UserError where the
    kernel does not serve the type or the head_dim, or is not of this platform.
    """
    check_kernel(kernel, q.dtype, q.shape[-1])
    if kernel == "cudnn" and jax.default_backend() != "gpu":
        raise UserError(
            f"model.attention: cudnn needs a GPU, and JAX runs on {jax.default_backend()} here; "
            "set it to auto or xla"
        )

    def call(q: Array, k: Array, v: Array, segment_ids: Array) -> Array:
        if kernel == "cudnn":
            return attend_cudnn(q, k, v, window)
        return attend_splash(q, k, v, segment_ids, window)

    return over_mesh(call, q, k, v, segment_ids, window)


def over_mesh(
    call: Callable[[Array, Array, Array, Array], Array],
    q: Float[Array, "N T H d"],
    k: Float[Array, "N T K d"],
    v: Float[Array, "N T K d"],
    segment_ids: Int[Array, "N T"],
    reach: int | Int[Array, ""] | None = None,
) -> Float[Array, "N T H d"]:
    """`call`, which computes attention over whole rows, on the rows and heads of each device.

    Where the context has a mesh (`with jax.set_mesh(mesh):` around the call of the jitted
    function), rows are split over its axes "data" and "fsdp", heads over "tensor" and tokens over
    "context". Rows and heads that these do not divide stay whole, and key-value heads are repeated.
    Over "context" heads are exchanged for tokens where it divides a device's heads; where it does
    not, keys and values go round, and `ring_attention` takes the place of `call`: `reach` is how
    many tokens a token sees, None: all. Inside `jax.shard_map` this is about the axes that are not
    manual there. `call` as it is where there is no mesh or one device. Raises ValueError where
    "context" does not divide T.

    Compiled for a v5e-8, forward and backward of 32,768 tokens of 16 heads and 2 of keys, on
    context=4: the exchange with splash sends 160 MiB a device and needs 50 MiB of temporaries, the
    ring sends 120 and needs 571; on context=8, 96 and 1 against 140 and 127. The ring also computes
    what the mask leaves out of a device's own block, and its last device has most to do.
    """
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {axis: size for axis, size in mesh.shape.items() if axis not in mesh.manual_axes}
    if mesh.empty or math.prod(sizes.values()) == 1:
        return call(q, k, v, segment_ids)
    axes = tuple(axis for axis in ROW_AXES if axis in sizes)
    rows = axes if q.shape[0] % math.prod(sizes[axis] for axis in axes) == 0 else None
    (heads,), (tokens,) = MESH_AXES["act_heads"], MESH_AXES["tokens"]
    own_heads = q.shape[2]
    if sizes.get(heads, 1) == 1 or own_heads % sizes[heads]:
        heads = None
    else:
        own_heads //= sizes[heads]
        copies = fewest_copies(q.shape[2], k.shape[2], sizes[heads])
        k, v = (jnp.repeat(x, copies, axis=2) for x in (k, v))
    parts = sizes.get(tokens, 1)
    if parts == 1:
        tokens = None
    elif q.shape[1] % parts:
        raise ValueError(f"attention over rows of {q.shape[1]} tokens on context={parts}")
    elif own_heads % parts == 0:
        call = functools.partial(exchanged, call, axis=tokens)
    else:
        seen = jnp.asarray(jnp.iinfo(jnp.int32).max if reach is None else reach)
        call = functools.partial(ring_attention, reach=seen, axis=tokens)
    split = PartitionSpec(rows, tokens, heads, None)
    # What varies over the mesh is not checked: a Pallas kernel does not say it of its results.
    return jax.shard_map(
        call,
        in_specs=(split, split, split, PartitionSpec(rows, tokens)),
        out_specs=split,
        axis_names=set(sizes),
        check_vma=False,
    )(q, k, v, segment_ids)


def attend_cudnn(
    q: Float[Array, "N T H d"],
    k: Float[Array, "N T K d"],
    v: Float[Array, "N T K d"],
    window: int | None = None,
    *,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "N T H d"]:
    """Causal attention over whole rows by cuDNN, which takes no segment ids here.

    A row must hold one response, padded on the right. Causality alone is then exact for all its
    tokens; what the padding finds is finite, and no loss reads it. An odd length is padded by one
    more: the backward pass takes none. The scale is in `q`.

    Source: Dao et al., arXiv 2205.14135. `implementation="xla"` is the same call on any platform.
    """
    T = q.shape[1]
    found = jax.nn.dot_product_attention(
        *(_longer(x, T % 2) for x in (q, k, v)),
        scale=1.0,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )
    return found[:, :T]


def _longer(x: Float[Array, "N T H d"], extra: int) -> Float[Array, "N U H d"]:
    """`x` with so many more zeros at the end of its rows."""
    return jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0)))


def attend_splash(
    q: Float[Array, "N T H d"],
    k: Float[Array, "N T K d"],
    v: Float[Array, "N T K d"],
    segment_ids: Int[Array, "N T"],
    window: int | None = None,
) -> Float[Array, "N T H d"]:
    """Causal attention inside the segments of each row, by the splash kernel of Pallas; blocks that
    the mask leaves empty are skipped. The scale is in `q`.

    Off a TPU the kernel is interpreted: slow, for tests. Rows are padded to whole blocks by a
    segment of their own.

    Source: jax/experimental/pallas/ops/tpu/splash_attention.
    """
    T = q.shape[1]
    blocks = -(-T // SPLASH_BLOCK)
    block = LANES * -(-T // (LANES * blocks))
    extra = blocks * block - T
    nobody = jnp.iinfo(jnp.int32).min
    owners = jnp.pad(segment_ids.astype(jnp.int32), ((0, 0), (0, extra)), constant_values=nobody)

    compiled, interpreted = (
        functools.partial(_splash, window=window, block=block, interpret=interpret)
        for interpret in (False, True)
    )
    arguments = (*(_longer(x, extra).transpose(0, 2, 1, 3) for x in (q, k, v)), owners)
    found = jax.lax.platform_dependent(*arguments, tpu=compiled, default=interpreted)
    return found.transpose(0, 2, 1, 3)[:, :T]


def _splash(
    q: Float[Array, "N H T d"],
    k: Float[Array, "N K T d"],
    v: Float[Array, "N K T d"],
    segment_ids: Int[Array, "N T"],
    *,
    window: int | None,
    block: int,
    interpret: bool,
) -> Float[Array, "N H T d"]:
    """The kernel, row by row; T is a multiple of `block`, and that of `LANES`."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as splash,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    H, T = q.shape[1:3]
    if window is None:
        mask = masks.CausalMask((T, T))
    else:
        mask = masks.LocalMask((T, T), (window - 1, 0), 0)
    # Not the fused backward pass: it keeps a part of q's gradient for each block of keys, which
    # grows with the square of the length.
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    kernel = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * H),
        block_sizes=sizes,
        residual_checkpoint_name=ATTENTION,
        interpret=interpret,
    )

    def row(q: Array, k: Array, v: Array, owners: Array) -> Any:
        return kernel(q, k, v, splash.SegmentIds(owners, owners))

    return jax.vmap(row)(q, k, v, segment_ids)
