"""A decoder-only transformer: RMSNorm, rotary positions, grouped-query attention, gated
feed-forward.

The layers are stacked along a leading axis and scanned, so that compile time and the number of
leaves do not grow with depth; sampling takes them apart. `split_model` is called once; everything
after is a pure function of `params`:

    graphdef, params = split_model(init_model(config, key))
    hidden = nnx.merge(graphdef, params).hidden(tokens, positions, segment_ids)
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from deltal_jax.model.architecture import Architecture, Local, rope_frequencies, window_of
from deltal_jax.model.attention import (
    Turns,
    attend_cache,
    attend_rows,
    rope,
    rotations,
)
from deltal_jax.model.cache import Cache, LayerCache, init_cache, layer_cache, time_of, write_token
from deltal_jax.model.lora import LoRALinear
from deltal_jax.model.precision import look_up, wide_product
from deltal_jax.model.remat import ATTENTION, rematerialised
from deltal_jax.parallel.sharding import constrain, tokens_are_split

#: The parameters of each layer.
Layers = list[Any]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}

#: Up to this depth the scan over layers is unrolled: a quarter faster on CPU, and it still compiles
#: soon.
UNROLLED_LAYERS = 4


class RMSNorm(nnx.Module):
    """x / rms(x) · (offset + scale), the root mean square in float32 or better."""

    def __init__(self, size: int, arch: Architecture, rngs: nnx.Rngs):
        rngs.params()  # a key for each parameter, drawn or not: a new norm moves no others
        self.scale = nnx.Param(jnp.full((size,), 1.0 - arch.norm_offset, jnp.float32))
        self.offset = arch.norm_offset
        self.epsilon = arch.norm_epsilon

    def __call__(self, x: Float[Array, "*shape D"]) -> Float[Array, "*shape D"]:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        inverse = jax.lax.rsqrt(mean_square + self.epsilon)
        scale = self.scale[...].reshape((1,) * (x.ndim - 1) + (-1,))
        if self.offset or x.dtype == wide.dtype:
            return (wide * (inverse * (self.offset + scale.astype(wide.dtype)))).astype(x.dtype)
        return scale.astype(x.dtype) * (wide * inverse).astype(x.dtype)


class Attention(nnx.Module):
    """Causal self-attention with grouped key-value heads."""

    def __init__(self, arch: Architecture, rngs: nnx.Rngs):
        init = nnx.initializers.normal(arch.d_model**-0.5)
        out_init = nnx.initializers.normal((arch.heads * arch.head_dim * 2 * arch.layers) ** -0.5)
        wide, narrow = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
        inputs = {"use_bias": arch.qkv_bias, "kernel_init": init, "rngs": rngs}
        self.q = make_linear(arch, "q_proj", arch.d_model, wide, **inputs)
        self.k = make_linear(arch, "k_proj", arch.d_model, narrow, **inputs)
        self.v = make_linear(arch, "v_proj", arch.d_model, narrow, **inputs)
        output = {"use_bias": arch.output_bias, "kernel_init": out_init, "rngs": rngs}
        self.o = make_linear(arch, "o_proj", wide, arch.d_model, **output)
        if arch.qk_norm:
            self.q_norm = RMSNorm(arch.head_dim, arch, rngs)
            self.k_norm = RMSNorm(arch.head_dim, arch, rngs)
        self.arch = arch

    def project(
        self, x: Float[Array, "N T D"], turns: Turns
    ) -> tuple[Float[Array, "N T H d"], Float[Array, "N T K d"], Float[Array, "N T K d"]]:
        """Queries, keys and values, rotated; queries times the attention scale."""
        arch = self.arch
        split = (*x.shape[:2], -1, arch.head_dim)
        flat = _by_token(x)
        q, k, v = (layer(flat).reshape(split) for layer in (self.q, self.k, self.v))
        if arch.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        scale = arch.head_dim**-0.5 if arch.query_scale is None else arch.query_scale
        return rope(q, turns) * scale, rope(k, turns), v

    def merge(self, heads: Float[Array, "N T H d"]) -> Float[Array, "N T D"]:
        """Join the heads and project back."""
        N, T, H, d = heads.shape
        return self.o(_by_token(heads.reshape(N, T, H * d))).reshape(N, T, -1)


class GatedMLP(nnx.Module):
    """Gated feed-forward: down(activation(gate(x)) · up(x)); SwiGLU with silu."""

    def __init__(self, arch: Architecture, rngs: nnx.Rngs):
        init = nnx.initializers.normal(arch.d_model**-0.5)
        out_init = nnx.initializers.normal((arch.d_ff * 2 * arch.layers) ** -0.5)
        options = {"use_bias": arch.mlp_bias, "rngs": rngs}
        wide = {"kernel_init": init, **options}
        self.gate = make_linear(arch, "gate_proj", arch.d_model, arch.d_ff, **wide)
        self.up = make_linear(arch, "up_proj", arch.d_model, arch.d_ff, **wide)
        self.down = make_linear(
            arch, "down_proj", arch.d_ff, arch.d_model, kernel_init=out_init, **options
        )
        self.activation = ACTIVATIONS[arch.activation]

    def __call__(self, x: Float[Array, "N T D"]) -> Float[Array, "N T D"]:
        flat = _by_token(x)
        return self.down(self.activation(self.gate(flat)) * self.up(flat)).reshape(x.shape)


class Block(nnx.Module):
    """Pre-norm attention and feed-forward with residuals."""

    def __init__(self, arch: Architecture, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(arch.d_model, arch, rngs)
        self.attention = Attention(arch, rngs)
        self.mlp_norm = RMSNorm(arch.d_model, arch, rngs)
        self.mlp = GatedMLP(arch, rngs)
        if arch.post_norms:
            self.attention_post_norm = RMSNorm(arch.d_model, arch, rngs)
            self.mlp_post_norm = RMSNorm(arch.d_model, arch, rngs)
        self.arch = arch

    def rows(
        self,
        x: Float[Array, "N T D"],
        turns: Turns,
        segment_ids: Int[Array, "N T"],
        local: Local,
    ) -> tuple[Float[Array, "N T D"], tuple[Array, Array]]:
        """Whole rows at once; also returns the layer's keys and values."""
        q, k, v = self.attention.project(self.attention_norm(x), turns)
        kernel = self.arch.attention
        found = attend_rows(q, k, v, segment_ids, window_of(self.arch), local, kernel=kernel)
        if kernel == "xla":  # the others name what their gradients need
            found = checkpoint_name(found, ATTENTION)
        return self._add(x, found), (k, v)

    def step(
        self,
        x: Float[Array, "S 1 D"],
        positions: Int[Array, "S 1"],
        turns: Turns,
        layer: LayerCache,
        local: Local,
    ) -> tuple[Float[Array, "S 1 D"], LayerCache]:
        """One new token a slot against the cache."""
        q, k, v = self.attention.project(self.attention_norm(x), turns)
        layer = write_token(layer, k, v, positions)
        found = attend_cache(q, *layer, positions, window_of(self.arch), local)
        return self._add(x, found), layer

    def _add(self, x: Float[Array, "N T D"], heads: Float[Array, "N T H d"]) -> Array:
        """The residuals: attention's output, then the feed-forward's."""
        found = self.attention.merge(heads)
        x = x + (self.attention_post_norm(found) if self.arch.post_norms else found)
        found = self.mlp(self.mlp_norm(x))
        return x + (self.mlp_post_norm(found) if self.arch.post_norms else found)


class Transformer(nnx.Module):
    """Embedding, stacked blocks, final norm, head."""

    def __init__(self, arch: Architecture, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=arch.layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(arch, rngs)

        init = nnx.initializers.normal(arch.d_model**-0.5 if arch.tied_embeddings else 1.0)
        self.embed = nnx.Embed(arch.vocab, arch.d_model, embedding_init=init, rngs=rngs)
        self.blocks = stack(rngs)
        self.norm = RMSNorm(arch.d_model, arch, rngs)
        if not arch.tied_embeddings:
            head_init = nnx.initializers.normal(arch.d_model**-0.5)
            self.head = nnx.Linear(
                arch.d_model, arch.vocab, use_bias=False, kernel_init=head_init, rngs=rngs
            )
        self.arch = arch

    def logits(self, hidden: Float[Array, "*shape D"]) -> Float[Array, "*shape V"]:
        """Scores over the vocabulary from normed hidden states."""
        head, matrix = self.head_function()
        return head(matrix, hidden)

    def head_function(self) -> tuple[Callable[[Any, Array], Array], Any]:
        """`logits` as a pure function of the head's matrix, in the type of the activations, and
        this."""
        dtype = self._compute_dtype()
        if self.arch.tied_embeddings:
            return lambda matrix, x: wide_product(x, matrix.T), self.embed.embedding[...].astype(
                dtype
            )
        return lambda matrix, x: wide_product(x, matrix), self.head.kernel[...].astype(dtype)

    def _compute_dtype(self) -> Any:
        return self.arch.compute_dtype or self.embed.embedding.dtype

    def hidden(
        self,
        tokens: Int[Array, "N T"],
        positions: Int[Array, "N T"],
        segment_ids: Int[Array, "N T"],
    ) -> Float[Array, "N T D"]:
        """Normed hidden states of whole rows."""
        graphdef, stacked = nnx.split(self.blocks)

        def body(x: Array, layer: tuple[Any, Local]) -> tuple[Array, None]:
            parameters, local = layer
            block = nnx.merge(graphdef, parameters)
            turns = rotations(positions, rope_frequencies(self.arch, local))
            x = constrain(x, "rows", "tokens", "act_embed")
            return block.rows(x, turns, segment_ids, local)[0], None

        layers = stacked, jnp.asarray(self._local())
        unroll = self.arch.layers <= UNROLLED_LAYERS and self.arch.remat == "none"
        layer = rematerialised(body, self.arch.remat)
        x, _ = jax.lax.scan(layer, self.embedded(tokens), layers, unroll=unroll)
        return self.norm(x)

    def embedded(self, tokens: Int[Array, "*shape"]) -> Float[Array, "*shape D"]:
        """Embeddings, scaled as the family does."""
        matrix = self.embed.embedding[...]
        if tokens_are_split():
            # Left to itself the compiler would have parts of the rows of all tokens everywhere.
            matrix = constrain(matrix, "vocab", "act_embed")
        x = look_up(matrix, tokens)
        x = x.astype(self.arch.compute_dtype or x.dtype)
        return (
            x if self.arch.embed_scale == 1.0 else x * jnp.asarray(self.arch.embed_scale, x.dtype)
        )

    def _local(self) -> tuple[bool, ...]:
        """Which layers are local."""
        return self.arch.local_layers or (False,) * self.arch.layers

    def prefill(self, tokens: Int[Array, "P Tp"], layers: Layers | None = None) -> Cache:
        """The cache of prompts, padded on the right; what it holds of the padding is never seen
        before decoding writes over it. `layers`: see `decode`."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        turns = jax.tree.map(lambda x: x[positions], self.turns(tokens.shape[1]))
        x, cache = self.embedded(tokens), []
        for block, local in self._blocks(layers):
            x, (k, v) = block.rows(x, turns[local], jnp.zeros_like(tokens), local)
            cache.append(layer_cache(k, v))
        return tuple(cache)

    def _blocks(self, layers: Layers | None) -> Iterator[tuple[Block, bool]]:
        """Each layer, and whether it is local."""
        graphdef, stacked = nnx.split(self.blocks)
        for own, local in zip(layers or _unstacked(stacked), self._local(), strict=True):
            yield nnx.merge(graphdef, own), local

    def decode(
        self,
        tokens: Int[Array, " S"],
        positions: Int[Array, " S"],
        cache: Cache,
        layers: Layers | None = None,
        turns: dict[bool, Turns] | None = None,
    ) -> tuple[Float[Array, "S V"], Cache]:
        """Logits after one new token a slot; layers are unrolled: the cache updates in place.

        `layers`: the parameters of each layer, where `take_apart` has been called before: a program
        of one step would copy them all out of the stack. `turns`: those of all positions, from
        outside a loop of steps: in it they would be computed anew for each head and layer.
        """
        x, at, after = self.embedded(tokens[:, None]), positions[:, None], []
        if turns is None:
            turns = self.turns(time_of(cache))
        own_turns = jax.tree.map(lambda x: x[at], turns)
        for (block, local), layer in zip(self._blocks(layers), cache, strict=True):
            x, layer = block.step(x, at, own_turns[local], layer, local)
            after.append(layer)
        return self.logits(self.norm(x[:, 0])), tuple(after)

    def turns(self, time: int) -> dict[bool, Turns]:
        """How positions below `time` turn queries and keys, in layers that are local and others."""
        kinds = set(self._local())
        at = jnp.arange(time)
        return {x: rotations(at, rope_frequencies(self.arch, x)) for x in kinds}

    def empty_cache(self, slots: int, time: int) -> Cache:
        """A cache for `slots` sequences of up to `time` tokens."""
        arch = self.arch
        dtype = jnp.dtype(self._compute_dtype())
        return init_cache(arch.layers, slots, arch.kv_heads, time, arch.head_dim, dtype)


def _by_token(x: Float[Array, "N T D"]) -> Float[Array, "*tokens D"]:
    """Rows of tokens as one list, unless devices share a row: then as they are."""
    return x if tokens_are_split() else x.reshape(-1, x.shape[-1])


def take_apart(params: Any) -> tuple[Any, Layers]:
    """The parameters with an empty stack of layers, and those of each layer, for `prefill` and
    `decode`: so none is held twice."""
    blocks = params["blocks"]
    return params | {"blocks": jax.tree.map(lambda x: x[:0], blocks)}, _unstacked(blocks)


def _unstacked(stacked: Any) -> Layers:
    count = jax.tree.leaves(stacked)[0].shape[0]
    return [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(count)]


def make_linear(arch: Architecture, name: str, size: int, to: int, **options: Any) -> nnx.Linear:
    """A matrix of a block, with adapters where it is a target of theirs."""
    if arch.lora is not None and name in arch.lora.targets:
        return LoRALinear(size, to, arch.lora, dtype=arch.compute_dtype, **options)
    return nnx.Linear(size, to, dtype=arch.compute_dtype, **options)


def init_model(arch: Architecture, key: Array) -> Transformer:
    """A freshly initialised model."""
    return Transformer(arch, nnx.Rngs(key))


def split_model(model: Transformer) -> tuple[nnx.GraphDef, Any]:
    """The static definition and the parameter pytree, split once at start."""
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def cast_weights(params: Any, dtype: str | None) -> Any:
    """Parameters for sampling: all that the model would cast each time that it uses them, cast
    once. Scales of norms, which it does not, stay as they are."""

    def cast(path: Any, x: Array) -> Array:
        return x if dtype is None or path[-1].key == "scale" else x.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def make_graphdef(arch: Architecture) -> nnx.GraphDef:
    """The static definition of the model, without allocating it."""
    return nnx.split(nnx.eval_shape(lambda: init_model(arch, jax.random.key(0))))[0]


def abstract_params(arch: Architecture) -> Any:
    """Shapes of all parameters, without allocating them."""
    return jax.eval_shape(lambda: split_model(init_model(arch, jax.random.key(0)))[1])


def parameter_count(arch: Architecture) -> int:
    """Number of parameters, without allocating them."""
    return sum(x.size for x in jax.tree.leaves(abstract_params(arch)))
