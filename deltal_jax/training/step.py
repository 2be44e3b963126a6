"""The update: add the gradients of all micro-batches, then take one optimizer step.

Pure functions of the parameters; jit-compiled once per bucket shape, accumulators donated. Weights
were fixed for the whole rollout batch before (objective/aggregation.py), so nothing here divides.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from deltal_jax.objective.aggregation import policy_gradient_loss
from deltal_jax.objective.logprobs import token_logprobs
from deltal_jax.types import Bucket, TrainState

#: Per-token losses from (logprobs, old_logprobs, advantages).
TokenLoss = Callable[[Array, Array, Array], Array]
#: Per-token indicators from the same arguments, for metrics.
TokenMeter = Callable[[Array, Array, Array], dict[str, Array]]


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gradient:
    """A running sum over micro-batches."""

    grads: Any
    loss: Float[Array, ""]
    meters: Meters


@dataclasses.dataclass(frozen=True)
class UpdateReport:
    """What one optimizer step did."""

    loss: float
    meters: Meters
    norms: dict[str, float]


class NonFiniteLoss(ArithmeticError):
    """The loss or the gradient of an update was not finite; the parameters were left as they
    were."""


class Update:
    """One kind of update: the model, the token loss and the optimizer, compiled per bucket
    shape."""

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        optimizer: optax.GradientTransformation,
        token_loss: TokenLoss,
        *,
        token_meter: TokenMeter | None = None,
        temperature: float = 1.0,
    ):
        self.optimizer = optimizer

        def bucket_loss(params: Any, bucket: Bucket) -> tuple[Array, Meters]:
            return microbatch_loss(
                graphdef, params, bucket, token_loss, token_meter, temperature=temperature
            )

        def gradient(params: Any, bucket: Bucket) -> Gradient:
            (loss, meters), grads = jax.value_and_grad(bucket_loss, has_aux=True)(params, bucket)
            return Gradient(grads, loss, meters)

        def add(params: Any, running: Gradient, bucket: Bucket) -> Gradient:
            new = gradient(params, bucket)
            return Gradient(
                jax.tree.map(jnp.add, running.grads, new.grads),
                running.loss + new.loss,
                running.meters.merge(new.meters),
            )

        def single(state: TrainState, bucket: Bucket) -> tuple[TrainState, dict[str, Array]]:
            new = gradient(state.params, bucket)
            state, norms = self._apply(state, new)
            return state, {"loss": new.loss, **norms}

        self.gradient = gradient
        self.add = jax.jit(add, donate_argnums=1)
        self.logprobs = jax.jit(
            lambda params, bucket: bucket_logprobs(graphdef, params, bucket, temperature)[0]
        )
        self._zero = jax.jit(
            lambda params, bucket: jax.tree.map(
                lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, params, bucket)
            )
        )
        self.apply = jax.jit(self._apply, donate_argnums=0)
        #: One micro-batch and its optimizer step in one program; the metrics stay on the device.
        self.single = jax.jit(single, donate_argnums=0)

    def init(self, params: Any, key: Array) -> TrainState:
        """A fresh state at update 0."""
        opt_state = jax.jit(self.optimizer.init)(params)
        return TrainState(params, opt_state, jnp.zeros((), jnp.int32), key)

    def accumulate(self, params: Any, buckets: Sequence[Bucket]) -> Gradient:
        """The gradient of the sum of the losses of all micro-batches."""
        running = self._zero(params, buckets[0])
        for bucket in buckets:
            running = self.add(params, running, bucket)
        return running

    def __call__(
        self, state: TrainState, buckets: Sequence[Bucket]
    ) -> tuple[TrainState, "UpdateReport"]:
        """One optimizer step on the sum of all micro-batches; `state` is donated.

        Raises NonFiniteLoss, naming the bucket, before anything changes if the loss is not finite.
        """
        gradient = self.accumulate(state.params, buckets)
        loss = float(gradient.loss)
        if not np.isfinite(loss):
            raise NonFiniteLoss(self._blame(state.params, buckets, loss))
        state, norms = self.apply(state, gradient)
        report = UpdateReport(loss, gradient.meters, {k: float(v) for k, v in norms.items()})
        if not np.isfinite(report.norms["optim/grad_norm"]):
            raise NonFiniteLoss(f"gradient norm {report.norms['optim/grad_norm']}, loss {loss}")
        return state, report

    def _apply(self, state: TrainState, gradient: Gradient) -> tuple[TrainState, dict[str, Array]]:
        """The optimizer's step; leaves the parameters alone where the gradient is not finite."""
        updates, opt_state = self.optimizer.update(gradient.grads, state.opt_state, state.params)
        norm = optax.tree.norm(gradient.grads)
        new = (optax.apply_updates(state.params, updates), opt_state)
        keep = jax.tree.map(
            lambda n, o: jnp.where(jnp.isfinite(norm), n, o), new, (state.params, state.opt_state)
        )
        norms = {"optim/grad_norm": norm, "optim/update_norm": optax.tree.norm(updates)}
        return dataclasses.replace(
            state, params=keep[0], opt_state=keep[1], updates=state.updates + 1
        ), norms

    def _blame(self, params: Any, buckets: Sequence[Bucket], loss: float) -> str:
        for number, bucket in enumerate(buckets):
            value = float(self.accumulate(params, [bucket]).loss)
            if not np.isfinite(value):
                rows, width = bucket.tokens.shape
                return f"loss {value} in bucket {number} ({rows} rows of {width} tokens)"
        return f"loss {loss} in the sum of {len(buckets)} finite buckets"


def bucket_logprobs(
    graphdef: nnx.GraphDef, params: Any, bucket: Bucket, temperature: float
) -> tuple[Float[Array, "N T"], Float[Array, "N T"]]:
    """Log-probability of each token given those before it, and the entropy there; 0 at column 0."""
    model = nnx.merge(graphdef, params)
    hidden = model.hidden(bucket.tokens, bucket.positions, bucket.segment_ids)
    logits = model.logits(hidden[:, :-1])
    shifted = token_logprobs(logits, bucket.tokens[:, 1:], temperature=temperature)
    logprobs, entropy = (jnp.pad(x, ((0, 0), (1, 0))) for x in shifted)
    return logprobs, entropy


def microbatch_loss(
    graphdef: nnx.GraphDef,
    params: Any,
    bucket: Bucket,
    token_loss: TokenLoss,
    token_meter: TokenMeter | None,
    *,
    temperature: float,
) -> tuple[Float[Array, ""], Meters]:
    """Σ_i w_i Σ_t ℓ_it over the responses of one bucket, and its metrics."""
    logprobs, entropy = bucket_logprobs(graphdef, params, bucket, temperature)
    of_response = jnp.pad(bucket.advantages, (0, 1))[bucket.segment_ids]
    arguments = (logprobs, bucket.old_logprobs, of_response)
    loss, sums = policy_gradient_loss(
        token_loss(*arguments), bucket.weights, bucket.segment_ids, bucket.loss_mask
    )
    mask = bucket.loss_mask
    count = jnp.sum(mask, dtype=loss.dtype)

    def total(values: Array) -> tuple[Array, Array]:
        return jnp.sum(jnp.where(mask, values, 0.0)), count

    drift = jnp.where(mask, logprobs - bucket.sampler_logprobs, 0.0)
    sums = sums | {
        "policy/entropy": total(entropy),
        "mismatch/logprob_diff_mean": total(jnp.abs(drift)),
        "mismatch/kl": total(jnp.exp(drift) - 1.0 - drift),
    }
    maxima = {"mismatch/logprob_diff_max": jnp.max(jnp.abs(drift))}
    if token_meter is not None:
        meters = token_meter(*arguments)
        ratio = meters.pop("ratio")
        sums |= {f"policy/{name}": total(values) for name, values in meters.items()}
        maxima["policy/ratio_max"] = jnp.max(jnp.where(mask, ratio, 0.0))
    return loss, jax.lax.stop_gradient(Meters(sums, maxima))
