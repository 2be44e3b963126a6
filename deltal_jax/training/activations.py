"""Memory that the gradient of a micro-batch takes beside parameters and gradients, from shapes and
types alone.

What the forward pass keeps for the backward pass is what JAX says that it keeps, by tracing one
layer and two; no program is compiled. To it comes the layer that the backward pass is at, of which
it has computed everything anew, or the logits of a chunk with the head's matrix, whichever is more.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deltal_jax.model.architecture import Architecture
from deltal_jax.model.attention import WHOLE_ROW
from deltal_jax.model.lora import overlay, trained
from deltal_jax.model.transformer import UNROLLED_LAYERS, abstract_params, make_graphdef
from deltal_jax.objective.logprobs import chunk_size

#: Of logits, and of what is added up.
FLOAT_BYTES = 4


def activation_bytes(arch: Architecture, rows: int, width: int) -> int:
    """Bytes of a device for one micro-batch of `rows` rows of `width` tokens."""
    kept, once = _kept(arch, rows, width)
    whole = dataclasses.replace(arch, remat="none")
    unrolled = arch.remat == "none" and arch.layers <= UNROLLED_LAYERS
    working = 0 if unrolled else _kept(whole, rows, width)[0]
    chunk = chunk_size(rows * width, arch.vocab)
    head = arch.vocab * (chunk * FLOAT_BYTES + arch.d_model * _itemsize(arch))
    return once + arch.layers * kept + max(working, head)


def offloaded_bytes(arch: Architecture, rows: int, width: int) -> int:
    """Bytes of the host's memory for the same."""
    if arch.remat != "offload":
        return 0
    return arch.layers * rows * width * arch.d_model * _itemsize(arch)


def _kept(arch: Architecture, rows: int, width: int) -> tuple[int, int]:
    """Bytes that the backward pass keeps of each layer, and of all else."""
    if arch.attention != "xla":  # as XLA does it in blocks: no kernel keeps scores
        rows, width = max(1, rows * width // (2 * WHOLE_ROW)), 2 * WHOLE_ROW
        arch = dataclasses.replace(arch, attention="xla")
    one, two = (rows * _residuals(arch, layers, width) for layers in (1, 2))
    kept = two - one
    if arch.remat == "offload":  # but for the input of the layer that the backward pass is at
        kept -= rows * width * arch.d_model * _itemsize(arch)
    return kept, one - kept


@functools.lru_cache(maxsize=64)
def _residuals(arch: Architecture, layers: int, width: int) -> int:
    """Bytes that are kept of one row by a model of so many layers and a small vocabulary."""
    local = arch.local_layers[:layers]
    arch = dataclasses.replace(arch, layers=layers, vocab=1, local_layers=local)
    graphdef, params = make_graphdef(arch), abstract_params(arch)
    tokens = jax.ShapeDtypeStruct((1, width), jnp.int32)

    def saved(params: Any, tokens: Any) -> list[Any]:
        def hidden(part: Any) -> Any:
            model = nnx.merge(graphdef, overlay(params, part))
            return model.hidden(tokens, tokens, tokens)

        pullback = jax.vjp(hidden, trained(params))[1]
        given = {id(x) for x in jax.tree.leaves((params, tokens))}
        return [x for x in jax.tree.leaves(pullback) if id(x) not in given]

    return sum(x.size * x.dtype.itemsize for x in jax.eval_shape(saved, params, tokens))


def _itemsize(arch: Architecture) -> int:
    return jnp.dtype(arch.compute_dtype or jnp.float32).itemsize
