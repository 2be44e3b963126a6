"""The shape of a model, as data, and what follows from it alone."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from deltal_jax.model.attention import RopeScaling, scaled
from deltal_jax.model.kernels import Kernel
from deltal_jax.model.lora import LoRA
from deltal_jax.model.remat import Remat

#: Whether a layer is a local one: known beforehand, or traced in a scan over layers.
Local = bool | Bool[Array, ""]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The shape of the model, and all in which families differ. `head_dim` need not be
    d_model / heads."""

    vocab: int
    layers: int
    d_model: int
    heads: int
    kv_heads: int
    head_dim: int
    d_ff: int
    tied_embeddings: bool = False
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-6
    #: What the backward pass computes anew, for less memory: see `model.remat`.
    remat: Remat = "layer"
    #: Type of the activations, to which weights are cast where they are used; None: that of the
    #: weights. Norms, softmax and logits are in float32 or better all the same.
    compute_dtype: str | None = None
    #: Low-rank adapters beside the matrices, if any.
    lora: LoRA | None = None
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    #: RMSNorm of each head's queries and keys, before the rotation.
    qk_norm: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    #: Added to the scale of every norm; if not 0, the scale comes before the cast to the dtype.
    norm_offset: float = 0.0
    #: Norms of the outputs of attention and feed-forward, before they are added.
    post_norms: bool = False
    embed_scale: float = 1.0
    #: Factor on the attention scores; None: head_dim^-1/2.
    query_scale: float | None = None
    #: In local layers a token sees this many tokens, itself included.
    sliding_window: int | None = None
    local_layers: tuple[bool, ...] = ()
    #: Rotary base of the local layers; None: as the others.
    local_rope_theta: float | None = None
    #: The kernel of attention over whole rows: see `model.attention.attend_rows`.
    attention: Kernel = "xla"


def rope_frequencies(arch: Architecture, local: Local) -> Float[Array, " half"]:
    """Radians a position of each pair of a layer."""
    half = arch.head_dim // 2
    exponents = -jnp.arange(half, dtype=jnp.float32) / half
    found = scaled(arch.rope_theta**exponents, arch.rope_scaling)
    if arch.local_rope_theta is None or not any(arch.local_layers):
        return found
    return jnp.where(local, arch.local_rope_theta**exponents, found)


def window_of(arch: Architecture) -> int | None:
    """How many tokens a token of a local layer sees, itself included; None: no layer is local."""
    return arch.sliding_window if any(arch.local_layers) else None


def matrix_size(arch: Architecture) -> int:
    """Numbers in the matrices of one layer."""
    heads, kv_heads = (count * arch.head_dim for count in (arch.heads, arch.kv_heads))
    return arch.d_model * (2 * heads + 2 * kv_heads + 3 * arch.d_ff)


def attention_work(arch: Architecture) -> float:
    """What each column of a row adds to the work of a token, relative to that of its matrix
    products with the parameters of the layers."""
    return 2 * arch.heads * arch.head_dim / matrix_size(arch)
