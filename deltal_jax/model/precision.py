"""What keeps bfloat16 honest: programs that round alike; and the model's two ends in float32
whatever the type of its weights, logits forward and the gradient of the embedding backward."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

#: `compiler_options` of every program that runs the model. By default the compiler leaves out
#: rounding to bfloat16 between operations that it fuses, otherwise in each program: then the
#: policy that is sampled, the one that is recomputed and the one whose gradient is taken differ by
#: 1e-2 in a token's log-probability, and the ratio is not 1 on policy.
ROUND_ALIKE: dict[str, Any] = {"xla_allow_excess_precision": False}


@jax.custom_vjp
def look_up(matrix: Float[Array, "V D"], tokens: Int[Array, "*shape"]) -> Float[Array, "*shape D"]:
    """Rows of the matrix. Their gradients are added in float32 or better: of a token that stands in
    a thousand places, bf16 would lose most."""
    return jnp.take(matrix, tokens, axis=0)


def _look_up_forward(matrix: Array, tokens: Array) -> tuple[Array, tuple[Array, Array]]:
    return look_up(matrix, tokens), (matrix, tokens)


def _look_up_backward(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, None]:
    matrix, tokens = saved
    total = jnp.zeros(matrix.shape, jnp.promote_types(matrix.dtype, jnp.float32))
    return total.at[tokens].add(cotangent.astype(total.dtype)).astype(matrix.dtype), None


look_up.defvjp(_look_up_forward, _look_up_backward)


@jax.custom_vjp
def wide_product(x: Float[Array, "*shape D"], matrix: Float[Array, "D V"]) -> Array:
    """x · matrix in float32 or better, without rounding to the type of the factors: bf16 logits
    would be off by up to 0.06 at 20. The backward products stay in that type."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.matmul(x, matrix, preferred_element_type=wide)


def _wide_forward(x: Array, matrix: Array) -> tuple[Array, tuple[Array, Array]]:
    return wide_product(x, matrix), (x, matrix)


def _wide_backward(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    return jax.vjp(jnp.matmul, *saved)[1](cotangent.astype(saved[0].dtype))


wide_product.defvjp(_wide_forward, _wide_backward)
