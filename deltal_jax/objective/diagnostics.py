"""What a set of aggregation weights means: bias, predicted variance, effective sample size."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Num


def aggregation_diagnostics(
    weights: Float[Array, " B"],
    lengths: Num[Array, " B"],
    advantages: Float[Array, " B"],
    *,
    normalizer: float | int,
    beta: float = 1.0,
) -> dict[str, Float[Array, ""]]:
    """Meters of one rollout batch; finite for any weights.

    - `bias_factor`: M·Σ_i w_i, the factor on the gradient against the unbiased one (1 for ΔL).
    - `predicted_cv`: √(Σ w_i² L_i^β) / Σ w_i, the coefficient of variation in units of √V/‖∇J‖ if
      Var(g_i) = V·L_i^β and the responses are independent.
    - `ess`: (Σ w_i)² / Σ w_i², the effective number of responses, of B.
    - `zero_advantage_weight`: the share of the weight on responses that move nothing.
    - `weight_min`, `weight_max`.
    """
    lengths = jnp.asarray(lengths).astype(weights.dtype)
    total = jnp.sum(weights)
    safe_total = jnp.where(total > 0, total, 1.0)
    squares = jnp.sum(weights**2)
    powers = jnp.where(lengths > 0, jnp.maximum(lengths, 1.0) ** beta, 0.0)
    idle = jnp.sum(jnp.where(advantages == 0, weights, 0.0))
    return {
        "bias_factor": normalizer * total,
        "predicted_cv": jnp.sqrt(jnp.sum(weights**2 * powers)) / safe_total,
        "ess": total**2 / jnp.where(squares > 0, squares, 1.0),
        "zero_advantage_weight": idle / safe_total,
        "weight_min": jnp.min(weights),
        "weight_max": jnp.max(weights),
    }
