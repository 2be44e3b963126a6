"""What a set of aggregation weights means: bias, predicted variance, who carries the weight."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from deltal_jax.objective.checks import check_number


def aggregation_diagnostics(
    weights: Float[Array, " B"],
    lengths: Num[Array, " B"],
    advantages: Float[Array, " B"],
    *,
    normalizer: float | int,
    beta: float | int = 1.0,
) -> dict[str, Float[Array, ""]]:
    """Meters of one rollout batch; finite for any weights, none depends on the order of responses.

    - `bias_factor`: M·Σ_i w_i, the factor on the gradient against the unbiased one (1 for ΔL).
    - `predicted_cv`: √(Σ w_i² L_i^β) / Σ w_i, the coefficient of variation in units of √V/‖∇J‖ if
      Var(g_i) = V·L_i^β and the responses are independent.
    - `ess`: (Σ w_i)² / Σ w_i², the effective number of responses, of B.
    - `weight_shortest_decile`, `weight_longest_decile`: the share of the weight on the shortest and
      the longest tenth of the n responses that carry weight (a filtered or empty one does not):
      0.1 where the weights are equal. A tenth is n/10 responses, a fraction of one if need be, and
      responses of equal length share their place in it equally. So of n < 10 responses it is n/10
      of the mean weight of the shortest (longest) ones.
    - `zero_advantage_weight`: the share of the weight on responses that move nothing.
    - `weight_min`, `weight_max`.

    All are 0 where no response carries weight. Raises ValueError for a `normalizer` that is not
    positive or a `beta` that is not finite.
    """
    check_number("normalizer", normalizer, above=0.0)
    check_number("beta", beta)
    lengths = jnp.asarray(lengths).astype(weights.dtype)
    largest = jnp.max(weights, initial=0.0)
    # Relative to the largest weight, so that squares stay within float32's range.
    shares = weights / jnp.where(largest > 0, largest, 1.0)
    total = jnp.sum(shares)
    safe_total = jnp.where(total > 0, total, 1.0)
    squares = jnp.sum(shares**2)
    powers = jnp.where(lengths > 0, jnp.maximum(lengths, 1.0) ** beta, 0.0)
    idle = jnp.sum(jnp.where(advantages == 0, shares, 0.0))
    shares_by_side = _decile_shares(shares, lengths)
    return {
        "bias_factor": normalizer * jnp.sum(weights),
        "predicted_cv": jnp.sqrt(jnp.sum(shares**2 * powers)) / safe_total,
        "ess": total**2 / jnp.where(squares > 0, squares, 1.0),
        "weight_shortest_decile": shares_by_side[0] / safe_total,
        "weight_longest_decile": shares_by_side[1] / safe_total,
        "zero_advantage_weight": idle / safe_total,
        "weight_min": jnp.min(weights) if weights.size else largest,
        "weight_max": largest,
    }


def _decile_shares(
    weights: Float[Array, " B"], lengths: Float[Array, " B"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The weight on the shortest and on the longest n/10 of the n responses with weight."""
    counted = (weights > 0) & (lengths > 0)
    count = jnp.sum(counted)
    whole = (count + 9) // 10  # the decile ends inside the whole-th response
    ordered = jnp.sort(jnp.where(counted, lengths, jnp.inf))
    last = weights.shape[0] - 1

    def side(edge: Float[Array, ""], inside: Array) -> Float[Array, ""]:
        """All weight inside the edge, and of those at the edge what the tenth has left."""
        inside, tied = counted & inside, counted & (lengths == edge)
        left = count / 10 - jnp.sum(inside)
        at_edge = jnp.sum(weights, where=tied) / jnp.maximum(jnp.sum(tied), 1)
        return jnp.sum(weights, where=inside) + left * at_edge

    short = ordered[jnp.clip(whole - 1, 0, last)]
    long = ordered[jnp.clip(count - whole, 0, last)]
    return side(short, lengths < short), side(long, lengths > long)
