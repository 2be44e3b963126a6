"""Low-rank adapters: beside a frozen matrix W, a trained product A B of rank r.

    y = x W + b + (α / r) · x A B,    A ~ U(−1/√d, 1/√d), B = 0 at the start

Source: Hu et al., arXiv 2106.09685; the initial values are those of PEFT. Adapters live in the
parameter pytree beside their matrix (`…/q/lora/lora_a`), so the model, the sampler and the mesh
know nothing of them; an update trains what `trained` selects.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jaxtyping import Array, Float

#: The matrices of a block that may have adapters, by their names on disk → their paths here.
TARGETS = {
    "q_proj": "attention/q",
    "k_proj": "attention/k",
    "v_proj": "attention/v",
    "o_proj": "attention/o",
    "gate_proj": "mlp/gate",
    "up_proj": "mlp/up",
    "down_proj": "mlp/down",
}


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Which matrices have adapters, their rank r and the α of their factor α / r."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = tuple(TARGETS)

    @property
    def scale(self) -> float:
        """The factor on A B."""
        return self.alpha / self.rank


class LoRALinear(nnx.Linear):
    """A linear layer with an adapter."""

    def __init__(
        self, size: int, to: int, lora: LoRA, *, dtype: Any, rngs: nnx.Rngs, **options: Any
    ):
        super().__init__(size, to, dtype=dtype, rngs=rngs, **options)
        uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        self.lora = nnx.LoRA(size, lora.rank, to, dtype=dtype, a_initializer=uniform, rngs=rngs)
        self.scale = lora.scale

    def __call__(self, inputs: Float[Array, "*shape D"], out_sharding: Any = None) -> Array:
        return super().__call__(inputs, out_sharding) + self.scale * self.lora(inputs)


def trained(params: Any) -> Any:
    """The part of the parameters that an update changes: the adapters, or all if there are
    none."""
    flat = _flat(params)
    adapters = {path: x for path, x in flat.items() if "lora" in path}
    return traverse_util.unflatten_dict(adapters or flat)


def overlay(params: Any, part: Any) -> Any:
    """The parameters with the ones in `part` instead of their own."""
    flat = _flat(params)
    return traverse_util.unflatten_dict(flat | _flat(part))


def merge_adapters(params: Any, lora: LoRA, dtype: Any = jnp.float32) -> Any:
    """The parameters of a model without adapters that computes the same: W + (α / r) A B, added in
    float32, a layer at a time, and then of the type `dtype`."""
    flat = _flat(params)
    merged = {path: x.astype(dtype) for path, x in flat.items() if "lora" not in path}

    def one(matrices: tuple[Array, Array, Array]) -> Array:
        kernel, a, b = (x.astype(jnp.float32) for x in matrices)
        product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        return (kernel + lora.scale * product).astype(dtype)

    for (*layer, _, name), a in flat.items():
        if name == "lora_a":
            kernel = (*layer, "kernel")
            merged[kernel] = jax.lax.map(one, (flat[kernel], a, flat[(*layer, "lora", "lora_b")]))
    return traverse_util.unflatten_dict(merged)


def _flat(params: Any) -> dict[tuple[str, ...], Any]:
    """Every parameter by its path."""
    return dict(traverse_util.flatten_dict(params))
