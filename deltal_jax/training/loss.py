"""The loss of one micro-batch, and what is measured of its tokens on the way."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from deltal_jax.objective.aggregation import policy_gradient_loss
from deltal_jax.objective.divergence import kl_k3
from deltal_jax.objective.logprobs import chunked_logprobs
from deltal_jax.objective.surrogate import reinforce
from deltal_jax.parallel.sharding import by_device
from deltal_jax.types import Bucket

#: Per-token losses from (logprobs, advantages of the tokens' responses, bucket).
TokenLoss = Callable[[Array, Array, Bucket], Array]
#: Per-token indicators from the same arguments, for metrics.
TokenMeter = Callable[[Array, Array, Bucket], dict[str, Array]]


@dataclasses.dataclass(frozen=True)
class LossTerms:
    """What is minimised: Σ w_i Σ ℓ_it + Σ u_i Σ (kl_coefficient · KL_it − entropy_coefficient ·
    H_it), of the policy at `temperature`."""

    token_loss: TokenLoss
    token_meter: TokenMeter | None = None
    #: Estimator of the KL to the reference model; None: no such term.
    divergence: Callable[[Array, Array], Array] | None = None
    kl_coefficient: float = 0.0
    entropy_coefficient: float = 0.0
    temperature: float = 1.0


def _negative_logprob(logprobs: Array, advantages: Array, bucket: Bucket) -> Array:
    return reinforce(logprobs, bucket.old_logprobs, advantages)


#: Supervised learning: −log π of every token, where the advantages are 1.
SUPERVISED = LossTerms(_negative_logprob)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Meters:
    """Metrics that merge: sums and counts add, maxima take the larger."""

    sums: dict[str, tuple[Float[Array, ""], Float[Array, ""]]]
    maxima: dict[str, Float[Array, ""]]

    def merge(self, other: "Meters") -> "Meters":
        """The metrics of both micro-batches together."""
        return Meters(
            jax.tree.map(jnp.add, self.sums, other.sums),
            jax.tree.map(jnp.maximum, self.maxima, other.maxima),
        )

    def values(self) -> dict[str, float]:
        """Means and maxima as plain numbers."""
        means = {k: float(s) / max(float(n), 1.0) for k, (s, n) in self.sums.items()}
        return means | {k: float(v) for k, v in self.maxima.items()}

    def plain(self) -> dict[str, Any]:
        """As JSON has it; `from_plain` gives the same bits back."""
        return jax.tree.map(float, {"sums": self.sums, "maxima": self.maxima})

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "Meters":
        """The metrics that `plain` took apart."""
        sums = {k: (jnp.float32(s), jnp.float32(n)) for k, (s, n) in plain["sums"].items()}
        return cls(sums, {k: jnp.float32(v) for k, v in plain["maxima"].items()})


def bucket_logprobs(
    graphdef: nnx.GraphDef, params: Any, bucket: Bucket, terms: LossTerms
) -> tuple[Float[Array, "N T"], Float[Array, "N T"]]:
    """Log-probability of each trained token given those before it, and the entropy there; 0 for
    the others, whose logits are not computed."""
    model = nnx.merge(graphdef, params)
    hidden = model.hidden(bucket.tokens, bucket.positions, bucket.segment_ids)
    # Column t predicts the token of column t + 1, if that is one of the same response.
    inside = bucket.segment_ids == jnp.roll(bucket.segment_ids, -1, axis=1)
    wanted = (jnp.roll(bucket.loss_mask, -1, axis=1) & inside).at[:, -1].set(False)
    head, parameters = model.head_function()

    def of_device(axes: tuple[str, ...], parameters: Any, *tokens: Array) -> tuple[Array, Array]:
        return chunked_logprobs(
            head,
            parameters,
            *tokens,
            temperature=terms.temperature,
            entropy_gradient=terms.entropy_coefficient != 0,
            axis_name=axes,
        )

    found = by_device(of_device, parameters, hidden, jnp.roll(bucket.tokens, -1, axis=1), wanted)
    logprobs, entropy = (jnp.roll(x, 1, axis=1) for x in found)
    return logprobs, entropy


def microbatch_loss(
    graphdef: nnx.GraphDef, params: Any, bucket: Bucket, terms: LossTerms
) -> tuple[Float[Array, ""], Meters]:
    """The terms summed over the responses of one bucket, and its metrics."""
    logprobs, entropy = bucket_logprobs(graphdef, params, bucket, terms)
    advantages = jnp.pad(bucket.advantages, (0, 1))[bucket.segment_ids]
    ids, mask = bucket.segment_ids, bucket.loss_mask
    arguments = (logprobs, advantages, bucket)
    loss, sums = policy_gradient_loss(terms.token_loss(*arguments), bucket.weights, ids, mask)
    count = jnp.sum(mask, dtype=loss.dtype)

    def total(values: Array) -> tuple[Array, Array]:
        return jnp.sum(jnp.where(mask, values, 0.0)), count

    if terms.entropy_coefficient:
        loss -= terms.entropy_coefficient * _auxiliary(entropy, bucket)
    if terms.divergence is not None:
        assert bucket.reference_logprobs is not None
        divergence = terms.divergence(logprobs, bucket.reference_logprobs)
        loss += terms.kl_coefficient * _auxiliary(divergence, bucket)
        sums |= {"policy/kl": total(kl_k3(logprobs, bucket.reference_logprobs))}
    drift = jnp.where(mask, logprobs - bucket.sampler_logprobs, 0.0)
    sums = sums | {
        "policy/entropy": total(entropy),
        "mismatch/logprob_diff_mean": total(jnp.abs(drift)),
        "mismatch/kl": total(jnp.exp(drift) - 1.0 - drift),
    }
    maxima = {"mismatch/logprob_diff_max": jnp.max(jnp.abs(drift))}
    if terms.token_meter is not None:
        meters = terms.token_meter(*arguments)
        ratio = meters.pop("ratio")
        sums |= {f"policy/{name}": total(values) for name, values in meters.items()}
        maxima["policy/ratio_max"] = jnp.max(jnp.where(mask, ratio, 0.0))
    return loss, jax.lax.stop_gradient(Meters(sums, maxima))


def _auxiliary(values: Array, bucket: Bucket) -> Float[Array, ""]:
    """Σ_i u_i Σ_t of a term that has its own aggregation."""
    return policy_gradient_loss(
        values, bucket.auxiliary_weights, bucket.segment_ids, bucket.loss_mask
    )[0]
