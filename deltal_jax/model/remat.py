"""Rematerialisation: what of a layer's forward pass its backward pass keeps, and what it computes
anew, by name.

From the least memory to the most, and from the most work to the least:

| name | kept of a layer | computed anew |
| --- | --- | --- |
| `offload` | its input, in the host's memory | all of it |
| `layer` | its input | all of it |
| `attention` | and what attention gave | the matrix products, and what is between them |
| `dots` | and the matrix products with its parameters | what is between them |
| `none` | everything that the backward pass reads | nothing |

The numbers are the same with each. "What attention gave" is its output and, of splash and cuDNN,
the sums of the softmax: then no kernel runs twice. By XLA, rows of up to `attention.WHOLE_ROW`
tokens compute their scores anew all the same: the gradient reads them.

Source: Chen et al., arXiv 1604.06174; Korthikanti et al., arXiv 2205.05198.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from deltal_jax.errors import UserError

Remat = Literal["none", "layer", "attention", "dots", "offload"]
#: Names of values that policies keep.
LAYER_INPUT, ATTENTION = "layer_input", "attention"
#: The host's memory that a device reads and writes by itself, as JAX calls it.
PINNED_HOST = "pinned_host"
#: cuDNN's kernel, as a primitive: its outputs bear no name that could be given.
CUDNN = "dot_product_attention_fwd_wrapper"

_policies = jax.checkpoint_policies
_named = _policies.save_only_these_names(ATTENTION)


def _keep_attention(primitive: Any, *avals: Any, **params: Any) -> bool:
    return primitive.name == CUDNN or _named(primitive, *avals, **params)


def _keep_products(primitive: Any, *avals: Any, **params: Any) -> bool:
    return _keep_attention(primitive, *avals, **params) or (
        _policies.dots_with_no_batch_dims_saveable(primitive, *avals, **params)
    )


#: What `jax.checkpoint` keeps of a layer beside its input; None: nothing.
POLICIES: dict[Remat, Callable[..., Any] | None] = {
    "layer": None,
    "attention": _keep_attention,
    "dots": _keep_products,
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device",
        offload_dst=PINNED_HOST,
    ),
}


def rematerialised(
    layer: Callable[[Array, Any], tuple[Array, None]], remat: Remat
) -> Callable[[Array, Any], tuple[Array, None]]:
    """The body of a scan over layers, of which the backward pass keeps what `remat` says."""
    if remat == "none":
        return layer

    def named(x: Array, parameters: Any) -> tuple[Array, None]:
        return layer(checkpoint_name(x, LAYER_INPUT), parameters)

    return jax.checkpoint(named, policy=POLICIES[remat])


def check_pinned_host(field: str, device: Any, instead: str) -> None:
    """Raises UserError, naming the `field` that asks for it, where a device reaches no memory of
    the host; `instead` is what the field could say."""
    kinds = [memory.kind for memory in device.addressable_memories()]
    if PINNED_HOST not in kinds:
        raise UserError(
            f"{field}: needs devices that reach the host's memory, and a {device.platform} here "
            f"has only {', '.join(kinds)}; set it to {instead}"
        )
