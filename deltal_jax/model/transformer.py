"""A decoder-only transformer: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

The layers are stacked along a leading axis and scanned, so that compile time and the number of
leaves do not grow with depth. `split_model` is called once; everything after is a pure function of
`params`:

    graphdef, params = split_model(init_model(config, key))
    hidden = nnx.merge(graphdef, params).hidden(tokens, positions, segment_ids)
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from deltal_jax.model.attention import attend_cache, attend_rows, rope
from deltal_jax.model.cache import Cache, LayerCache, init_cache, write_token

#: Up to this depth the scan over layers is unrolled: a quarter faster on CPU, and it still compiles
#: soon.
UNROLLED_LAYERS = 4


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The shape of the model. `head_dim` need not be d_model / heads."""

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
    #: Recompute each layer in the backward pass: less memory, a third more work, the same numbers.
    remat: bool = True


class Attention(nnx.Module):
    """Causal self-attention with grouped key-value heads."""

    def __init__(self, arch: Architecture, rngs: nnx.Rngs):
        init = nnx.initializers.normal(arch.d_model**-0.5)
        out_init = nnx.initializers.normal((arch.heads * arch.head_dim * 2 * arch.layers) ** -0.5)
        linear = nnx.Linear
        self.q = linear(
            arch.d_model, arch.heads * arch.head_dim, use_bias=False, kernel_init=init, rngs=rngs
        )
        self.k = linear(
            arch.d_model, arch.kv_heads * arch.head_dim, use_bias=False, kernel_init=init, rngs=rngs
        )
        self.v = linear(
            arch.d_model, arch.kv_heads * arch.head_dim, use_bias=False, kernel_init=init, rngs=rngs
        )
        self.o = linear(
            arch.heads * arch.head_dim,
            arch.d_model,
            use_bias=False,
            kernel_init=out_init,
            rngs=rngs,
        )
        self.head_dim = arch.head_dim
        self.theta = arch.rope_theta

    def project(
        self, x: Float[Array, "N T D"], positions: Int[Array, "N T"]
    ) -> tuple[Float[Array, "N T H d"], Float[Array, "N T K d"], Float[Array, "N T K d"]]:
        """Queries, keys and values, rotated."""
        split = (*x.shape[:2], -1, self.head_dim)
        flat = x.reshape(-1, x.shape[-1])
        q, k, v = (layer(flat).reshape(split) for layer in (self.q, self.k, self.v))
        return rope(q, positions, self.theta), rope(k, positions, self.theta), v

    def merge(self, heads: Float[Array, "N T H d"]) -> Float[Array, "N T D"]:
        """Join the heads and project back."""
        N, T, H, d = heads.shape
        return self.o(heads.reshape(N * T, H * d)).reshape(N, T, -1)


class SwiGLU(nnx.Module):
    """Gated feed-forward: down(silu(gate(x)) · up(x))."""

    def __init__(self, arch: Architecture, rngs: nnx.Rngs):
        init = nnx.initializers.normal(arch.d_model**-0.5)
        out_init = nnx.initializers.normal((arch.d_ff * 2 * arch.layers) ** -0.5)
        self.gate = nnx.Linear(arch.d_model, arch.d_ff, use_bias=False, kernel_init=init, rngs=rngs)
        self.up = nnx.Linear(arch.d_model, arch.d_ff, use_bias=False, kernel_init=init, rngs=rngs)
        self.down = nnx.Linear(
            arch.d_ff, arch.d_model, use_bias=False, kernel_init=out_init, rngs=rngs
        )

    def __call__(self, x: Float[Array, "N T D"]) -> Float[Array, "N T D"]:
        flat = x.reshape(-1, x.shape[-1])
        return self.down(jax.nn.silu(self.gate(flat)) * self.up(flat)).reshape(x.shape)


class Block(nnx.Module):
    """Pre-norm attention and feed-forward with residuals."""

    def __init__(self, arch: Architecture, rngs: nnx.Rngs):
        norm = {"epsilon": arch.norm_epsilon, "rngs": rngs}
        self.attention_norm = nnx.RMSNorm(arch.d_model, **norm)
        self.attention = Attention(arch, rngs)
        self.mlp_norm = nnx.RMSNorm(arch.d_model, **norm)
        self.mlp = SwiGLU(arch, rngs)

    def rows(
        self,
        x: Float[Array, "N T D"],
        positions: Int[Array, "N T"],
        segment_ids: Int[Array, "N T"],
    ) -> tuple[Float[Array, "N T D"], tuple[Array, Array]]:
        """Whole rows at once; also returns the layer's keys and values."""
        q, k, v = self.attention.project(self.attention_norm(x), positions)
        x = x + self.attention.merge(attend_rows(q, k, v, segment_ids))
        return x + self.mlp(self.mlp_norm(x)), (k, v)

    def step(
        self, x: Float[Array, "S 1 D"], positions: Int[Array, "S 1"], layer: LayerCache
    ) -> tuple[Float[Array, "S 1 D"], LayerCache]:
        """One new token a slot against the cache."""
        q, k, v = self.attention.project(self.attention_norm(x), positions)
        layer = write_token(layer, k, v, positions)
        x = x + self.attention.merge(attend_cache(q, *layer, positions))
        return x + self.mlp(self.mlp_norm(x)), layer


class Transformer(nnx.Module):
    """Embedding, stacked blocks, final norm, head."""

    def __init__(self, arch: Architecture, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=arch.layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(arch, rngs)

        init = nnx.initializers.normal(arch.d_model**-0.5 if arch.tied_embeddings else 1.0)
        self.embed = nnx.Embed(arch.vocab, arch.d_model, embedding_init=init, rngs=rngs)
        self.embed.dtype = None  # compute in the type of the parameters, whatever they become
        self.blocks = stack(rngs)
        self.norm = nnx.RMSNorm(arch.d_model, epsilon=arch.norm_epsilon, rngs=rngs)
        if not arch.tied_embeddings:
            head_init = nnx.initializers.normal(arch.d_model**-0.5)
            self.head = nnx.Linear(
                arch.d_model, arch.vocab, use_bias=False, kernel_init=head_init, rngs=rngs
            )
        self.arch = arch

    def logits(self, hidden: Float[Array, "*shape D"]) -> Float[Array, "*shape V"]:
        """Scores over the vocabulary from normed hidden states."""
        return self.embed.attend(hidden) if self.arch.tied_embeddings else self.head(hidden)

    def head_function(self) -> tuple[Callable[[Any, Array], Array], Any]:
        """`logits` as a pure function of the head's own parameters, and these."""
        if self.arch.tied_embeddings:
            embed, parameters = nnx.split(self.embed)
            return lambda parameters, x: nnx.merge(embed, parameters).attend(x), parameters
        linear, parameters = nnx.split(self.head)
        return lambda parameters, x: nnx.merge(linear, parameters)(x), parameters

    def hidden(
        self,
        tokens: Int[Array, "N T"],
        positions: Int[Array, "N T"],
        segment_ids: Int[Array, "N T"],
    ) -> Float[Array, "N T D"]:
        """Normed hidden states of whole rows."""
        graphdef, stacked = nnx.split(self.blocks)

        def body(x: Array, layer: Any) -> tuple[Array, None]:
            return nnx.merge(graphdef, layer).rows(x, positions, segment_ids)[0], None

        if self.arch.remat:
            body = jax.checkpoint(body)
        x, _ = jax.lax.scan(
            body, self.embed(tokens), stacked, unroll=self.arch.layers <= UNROLLED_LAYERS
        )
        return self.norm(x)

    def prefill(
        self, tokens: Int[Array, "P Tp"], lengths: Int[Array, " P"]
    ) -> tuple[Float[Array, "P V"], Cache]:
        """Logits after the last token of each right-padded prompt, and the prompts' cache."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x, layers = self.embed(tokens), []
        for block in self._unstacked():
            x, (k, v) = block.rows(x, positions, jnp.zeros_like(tokens))
            layers.append((k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)))
        last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return self.logits(self.norm(last)), tuple(layers)

    def decode(
        self, tokens: Int[Array, " S"], positions: Int[Array, " S"], cache: Cache
    ) -> tuple[Float[Array, "S V"], Cache]:
        """Logits after one new token a slot; layers are unrolled: the cache updates in place."""
        x, layers = self.embed(tokens[:, None]), []
        for block, layer in zip(self._unstacked(), cache, strict=True):
            x, layer = block.step(x, positions[:, None], layer)
            layers.append(layer)
        return self.logits(self.norm(x[:, 0])), tuple(layers)

    def empty_cache(self, slots: int, time: int) -> Cache:
        """A cache for `slots` sequences of up to `time` tokens."""
        arch = self.arch
        dtype = self.embed.embedding.dtype
        return init_cache(arch.layers, slots, arch.kv_heads, time, arch.head_dim, dtype)

    def _unstacked(self) -> list[Block]:
        graphdef, stacked = nnx.split(self.blocks)
        return [
            nnx.merge(graphdef, jax.tree.map(lambda x, i=i: x[i], stacked))
            for i in range(self.arch.layers)
        ]


def init_model(arch: Architecture, key: Array) -> Transformer:
    """A freshly initialised model."""
    return Transformer(arch, nnx.Rngs(key))


def split_model(model: Transformer) -> tuple[nnx.GraphDef, Any]:
    """The static definition and the parameter pytree, split once at start."""
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def attention_work(arch: Architecture) -> float:
    """What each column of a row adds to the work of a token, relative to that of its matrix
    products with the parameters of the layers."""
    heads, kv_heads = (count * arch.head_dim for count in (arch.heads, arch.kv_heads))
    linear = arch.d_model * (2 * heads + 2 * kv_heads + 3 * arch.d_ff)
    return 2 * heads / linear


def parameter_count(arch: Architecture) -> int:
    """Number of parameters, without allocating them."""
    abstract = nnx.eval_shape(lambda: init_model(arch, jax.random.key(0)))
    return sum(x.size for x in jax.tree.leaves(nnx.state(abstract)))
