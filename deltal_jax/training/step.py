"""The update: add the gradients of all micro-batches, then take one optimizer step.

Pure functions of the parameters; jit-compiled once per bucket shape, accumulators donated. Weights
were fixed for the whole rollout batch before (objective/aggregation.py), so nothing here divides,
and on a mesh the devices only add: rows are split over its data and fsdp axes, the tokens of a row
over context.

Where the model has adapters these alone are trained: gradients, optimizer and reference know no
others. Gradients are added and the optimizer computes in float32 or better, whatever the types that
parameters and moments are stored in.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from deltal_jax.guard.pulse import pulse
from deltal_jax.model.lora import overlay, trained
from deltal_jax.model.precision import ROUND_ALIKE
from deltal_jax.parallel.on_mesh import OnMesh
from deltal_jax.parallel.sharding import (
    half_sharding,
    replicated_sharding,
    row_shards,
    shard_bucket,
    state_shardings,
)
from deltal_jax.training.buckets import pad_width
from deltal_jax.training.loss import LossTerms, Meters, bucket_logprobs, microbatch_loss
from deltal_jax.training.optimizer import ROUNDING_STREAM, on_host, round_like, widen
from deltal_jax.types import Bucket, TrainState

#: Share that the running mean of past gradients keeps of itself in each update.
MEMORY = 0.9
#: Metrics of an optimizer step from (norm of the gradient, state of the optimizer after it).
OptimizerMeter = Callable[[Array, Any], dict[str, Array]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gradient:
    """A running sum over micro-batches."""

    grads: Any
    loss: Float[Array, ""]
    meters: Meters

    def plus(self, other: "Gradient") -> "Gradient":
        """That of both together."""
        grads = jax.tree.map(jnp.add, self.grads, other.grads)
        return Gradient(grads, self.loss + other.loss, self.meters.merge(other.meters))


@dataclasses.dataclass(frozen=True)
class UpdateReport:
    """What one optimizer step did."""

    loss: float
    meters: Meters
    norms: dict[str, float]
    #: What was not finite, and where; the state is then, bit for bit, as it was before. None: the
    #: step was taken.
    skipped: str | None = None
    #: ‖g_a − g_b‖² of the two halves of each bucket; NaN where it was not halved.
    spreads: Sequence[float] = ()
    #: Of the gradient and that of the same buckets under other weights, where they were given: the
    #: cosine between them, and the norm of the first by that of the second.
    likeness: tuple[float, float] | None = None


class Update:
    """One kind of update: the model, the token loss and the optimizer, compiled per bucket
    shape."""

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        optimizer: optax.GradientTransformation,
        terms: LossTerms,
        *,
        mesh: Mesh | None = None,
        moment_dtype: str = "float32",
        offload: bool = False,
        halves: bool = False,
        remembers: bool = False,
        meter: OptimizerMeter | None = None,
    ):
        self.optimizer = optimizer
        self.mesh = mesh
        self.moment_dtype = moment_dtype
        #: Whether moments lie in the host's memory between steps.
        self.offload = offload
        self.meter = meter
        #: Whether the state has a running mean of past gradients.
        self.remembers = remembers
        self._inits: dict[Any, Callable[..., TrainState]] = {}
        #: Rows of a bucket are a multiple of this.
        self.row_multiple = (1 if mesh is None else row_shards(mesh)) * (2 if halves else 1)
        # Said of all that is made here, as it is of what is restored: to JAX these are programs of
        # their own, and a resumed run would compile all of them anew.
        self._device = None if mesh else jax.sharding.SingleDeviceSharding(jax.devices()[0])

        def gradient(params: Any, bucket: Bucket) -> Gradient:
            def loss(part: Any) -> tuple[Array, Meters]:
                return microbatch_loss(graphdef, overlay(params, part), bucket, terms)

            (value, meters), grads = jax.value_and_grad(loss, has_aux=True)(trained(params))
            return Gradient(self._pin(widen(grads)), value, meters)

        def measured(params: Any, bucket: Bucket) -> tuple[Gradient, Array]:
            """The gradient, and ‖g_a − g_b‖² of the halves of its rows."""
            if not halves or bucket.tokens.shape[0] % self.row_multiple:
                return gradient(params, bucket), jnp.full((), jnp.nan)
            both = jax.lax.map(lambda half: gradient(params, half), halve(bucket, mesh))
            one, other = (jax.tree.map(lambda x, at=at: x[at], both) for at in (0, 1))
            apart = jax.tree.map(jnp.subtract, one.grads, other.grads)
            return one.plus(other), optax.tree.norm(apart, squared=True)

        def add(params: Any, running: Gradient, bucket: Bucket) -> tuple[Gradient, Array]:
            new, spread = measured(params, bucket)
            return running.plus(new), spread

        def single(state: TrainState, bucket: Bucket) -> tuple[TrainState, dict[str, Array]]:
            new = gradient(state.params, bucket)
            state, norms = self._apply(state, new)
            return state, {"loss": new.loss, **norms}

        def zero(params: Any, bucket: Bucket) -> Gradient:
            shapes = jax.eval_shape(gradient, params, bucket)
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        self.gradient = gradient
        self.add = self._jit(add, self._as_sum, donate_argnums=1)
        #: log π of each token of a bucket, Float[N T], at the temperature of the terms; whole on
        #: every device.
        self.logprobs = self._jit(
            lambda params, bucket: bucket_logprobs(graphdef, params, bucket, terms)[0],
            out_shardings=None if mesh is None else replicated_sharding(mesh),
        )
        if mesh is None:
            self._zero = jax.jit(zero, out_shardings=self._device)
        else:
            self._zero = self._jit(zero, self._as_gradient)
        self.apply = self._jit(self._apply, self._as_state, donate_argnums=0)
        #: One micro-batch and its optimizer step in one program; the metrics stay on the device.
        self.single = self._jit(single, self._as_state, donate_argnums=0)

    def _jit(
        self,
        function: Callable[..., Any],
        layout: Callable[[Any], Any] | None = None,
        **options: Any,
    ) -> Any:
        """Compiled; on a mesh, and where moments are offloaded, such that what it gives lies as
        `layout` says of its first argument."""
        if self.mesh is None and (layout is None or not self.offload):
            return jax.jit(function, compiler_options=ROUND_ALIKE, **options)
        return OnMesh(function, self.mesh, layout, compiler_options=ROUND_ALIKE, **options)

    def layout(self, state: TrainState) -> TrainState:
        """The sharding of each array of a state, of arrays or shapes: on the mesh or the device,
        and of moments that are offloaded in the host's memory there."""
        if self.mesh is not None:
            found = state_shardings(self.mesh, state)
        else:
            found = jax.tree.map(lambda _: self._device, state)
        if not self.offload:
            return found
        moments = on_host(found.opt_state, state.opt_state)
        return dataclasses.replace(found, opt_state=moments)

    def _as_state(self, state: TrainState) -> Any:
        """The layout of a state, like this one, and metrics."""
        return self.layout(state), None if self.mesh is None else replicated_sharding(self.mesh)

    def _as_sum(self, params: Any) -> Any:
        """The layout of a gradient by these parameters, and of a number."""
        if self.mesh is None:
            return None
        return self._as_gradient(params), replicated_sharding(self.mesh)

    def _as_gradient(self, params: Any) -> Gradient:
        """The layout of a gradient by these parameters."""
        assert self.mesh is not None
        whole: Any = replicated_sharding(self.mesh)
        return Gradient(state_shardings(self.mesh, trained(params)), whole, whole)

    def init(
        self, params: Any, key: Array, *, reference: bool = False, donate: bool = False
    ) -> TrainState:
        """A fresh state at update 0, laid out over the mesh if there is one. `reference` keeps the
        trained parameters as those of the reference model; `donate` gives the memory of `params` to
        the state."""

        init = functools.partial(self.fresh, reference=reference)
        kind = jax.tree.structure(params), reference, donate
        if kind not in self._inits:
            shardings = self.layout(jax.eval_shape(init, params, key))
            donated = (0,) if donate else ()
            self._inits[kind] = jax.jit(init, donate_argnums=donated, out_shardings=shardings)
        return self._inits[kind](params, key)

    def fresh(self, params: Any, key: Array, *, reference: bool = False) -> TrainState:
        """What `init` compiles."""
        part = trained(params)
        kept = jax.tree.map(jnp.copy, part) if reference else None
        opt_state = self._store(self.optimizer.init(widen(part)))
        none_yet = jax.tree.map(jnp.zeros_like, widen(part)) if self.remembers else None
        return TrainState(params, opt_state, jnp.zeros((), jnp.int32), key, kept, none_yet)

    def place(self, bucket: Bucket) -> Bucket:
        """The bucket on the device, or on those of the mesh, its rows split over them, and the
        tokens of rows, which are padded to be as many on each."""
        if self.mesh is None:
            return jax.device_put(bucket)
        return shard_bucket(self.mesh, pad_width(bucket, self.mesh.shape["context"]))

    def accumulate(self, params: Any, buckets: Sequence[Bucket]) -> Gradient:
        """The gradient of the sum of the losses of all micro-batches."""
        return self._measure(params, buckets)[0]

    def _measure(self, params: Any, buckets: Sequence[Bucket]) -> tuple[Gradient, list[Array]]:
        """The same, and what the halves of each micro-batch are apart."""
        running, spreads = None, []
        for bucket in buckets:
            placed = self.place(bucket)
            if running is None:
                running = self._zero(params, placed)
            running, spread = self.add(params, running, placed)
            spreads.append(spread)
            pulse()
        assert running is not None
        return running, spreads

    def __call__(
        self, state: TrainState, buckets: Sequence[Bucket], others: Sequence[Bucket] = ()
    ) -> tuple[TrainState, "UpdateReport"]:
        """One optimizer step on the sum of all micro-batches; `state` is donated. The gradient is
        compared with that of `others`, where there are any.

        It is left out where the loss, the gradient or the step itself is not finite, and the report
        says so.
        """
        gradient, spreads = self._measure(state.params, buckets)
        likeness = None
        if others:
            likeness = _likeness(gradient.grads, self.accumulate(state.params, others).grads)
        state, norms = self.apply(state, gradient)
        loss, norms = float(gradient.loss), {k: float(v) for k, v in norms.items()}
        skipped = None
        if not np.isfinite([loss, *norms.values()]).all():
            skipped = self._blame(state.params, buckets, loss, norms)
        apart = [float(spread) for spread in spreads]
        if likeness is not None:
            likeness = float(likeness[0]), float(likeness[1])
        return state, UpdateReport(loss, gradient.meters, norms, skipped, apart, likeness)

    def _apply(self, state: TrainState, gradient: Gradient) -> tuple[TrainState, dict[str, Array]]:
        """The optimizer's step; none where the loss, the gradient or the step is not finite: then
        the state stays bit for bit, and with it the place in the schedule."""
        moments = state.opt_state
        if self.offload:
            moments = jax.device_put(moments, jax.memory.Space.Device)
        stored = trained(state.params), moments
        params, opt_state = widen(stored)
        updates, new_state = self.optimizer.update(gradient.grads, opt_state, params)
        norms = {
            "optim/grad_norm": optax.tree.norm(gradient.grads),
            "optim/update_norm": optax.tree.norm(updates),
        }
        good = jnp.isfinite(jnp.stack([gradient.loss, *norms.values()])).all()
        new = (optax.apply_updates(params, updates), new_state)
        kept = jax.tree.map(lambda n, o: jnp.where(good, n, o), new, (params, opt_state))
        draws = jax.random.fold_in(jax.random.fold_in(state.key, ROUNDING_STREAM), state.updates)
        part, opt_state = round_like(kept, stored, draws)
        if self.meter is not None:
            norms |= self.meter(norms["optim/grad_norm"], new_state)
        return dataclasses.replace(
            state,
            params=overlay(state.params, part),
            opt_state=opt_state,
            updates=state.updates + good,
            direction=self._remember(state.direction, gradient.grads, good),
        ), norms

    def _remember(self, direction: Any, grads: Any, good: Array) -> Any:
        """The running mean of gradients with another one, unless that is left out."""
        if direction is None:
            return None

        def mean(old: Array, new: Array) -> Array:
            return jnp.where(good, MEMORY * old + (1.0 - MEMORY) * new, old)

        return jax.tree.map(mean, direction, grads)

    def inner_products(
        self, state: TrainState, buckets: Sequence[Bucket], classes: np.ndarray, count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """⟨G_j, G_k⟩ and ⟨G_j, R⟩ / ‖R‖, Float[J J] and Float[J], of the gradients of the responses
        of each of `count` classes, Int[B], under weights of 1, and the state's direction R. Zeros
        for the latter where there is none yet; all classes' gradients are held at once."""
        found = []
        for number in range(count):
            chosen = (classes == number).astype(np.float32)
            none = np.zeros_like(chosen)
            some = [x for x in buckets if chosen[np.unique(x.segment_ids[x.loss_mask])].any()]
            some = [dataclasses.replace(x, weights=chosen, auxiliary_weights=none) for x in some]
            found.append(self.accumulate(state.params, some).grads)
        inner, toward = _inner_products(found, state.direction)
        return np.asarray(inner, np.float64), np.asarray(toward, np.float64)

    def _store(self, opt_state: Any) -> Any:
        """Fresh moments in the type that they are stored in."""

        def store(x: Array) -> Array:
            return x.astype(self.moment_dtype) if x.dtype == jnp.float32 and x.ndim else x

        return jax.tree.map(store, opt_state)

    def _pin(self, grads: Any) -> Any:
        """Gradients laid out as their parameters are."""
        if self.mesh is None:
            return grads
        return jax.lax.with_sharding_constraint(grads, state_shardings(self.mesh, grads))

    def examine(self, params: Any, buckets: Sequence[Bucket]) -> "Health":
        """The loss of some micro-batches and, by parameter, what their gradient is like."""
        gradient = self.accumulate(params, buckets)
        leaves = jax.tree_util.tree_flatten_with_path(_norms_and_counts(gradient.grads))[0]
        found: dict[str, list[float]] = {}
        for (*path, _), value in leaves:
            name = jax.tree_util.keystr(tuple(path), simple=True, separator="/")
            found.setdefault(name, []).append(float(value))
        parameters = {name: (norm, int(count)) for name, (norm, count) in found.items()}
        return Health(float(gradient.loss), parameters)

    def _blame(
        self, params: Any, buckets: Sequence[Bucket], loss: float, norms: dict[str, float]
    ) -> str:
        """What is not finite, in words: the first such bucket, and the first of its parameters."""
        said = f"loss {loss}, gradient norm {norms['optim/grad_norm']}"
        for number, bucket in enumerate(buckets):
            found = self.examine(params, [bucket])
            if found.finite:
                continue
            rows, width = bucket.tokens.shape
            said += f" in bucket {number} ({rows} rows of {width} tokens)"
            bad = [f"{name} ({n} numbers)" for name, (_, n) in found.parameters.items() if n]
            if bad:
                more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
                said += f", gradients not finite of {', '.join(bad[:3])}{more}"
            return said
        if np.isfinite([loss, norms["optim/grad_norm"]]).all():
            return f"{said}, but the norm of the optimizer's step is {norms['optim/update_norm']}"
        return f"{said} in the sum of {len(buckets)} finite buckets"


@dataclasses.dataclass(frozen=True)
class Health:
    """A loss, and of each parameter's gradient by its path the norm and how many numbers are not
    finite."""

    loss: float
    parameters: dict[str, tuple[float, int]]

    @property
    def finite(self) -> bool:
        """Whether all of it is."""
        return bool(np.isfinite([self.loss, *(norm for norm, _ in self.parameters.values())]).all())


@jax.jit
def _likeness(one: Any, other: Any) -> tuple[Array, Array]:
    """The cosine between two gradients, and the norm of the first by that of the second."""
    norms = optax.tree.norm(one), optax.tree.norm(other)
    inner = jnp.asarray(optax.tree.vdot(one, other))
    return inner / (norms[0] * norms[1]), norms[0] / norms[1]


@jax.jit
def _inner_products(grads: list[Any], direction: Any) -> tuple[Array, Array]:
    """⟨G_j, G_k⟩ and ⟨G_j, R⟩ / ‖R‖."""
    inner = [[jnp.asarray(optax.tree.vdot(one, other)) for other in grads] for one in grads]
    norm = optax.tree.norm(direction)
    toward = jnp.stack([jnp.asarray(optax.tree.vdot(one, direction)) for one in grads])
    return jnp.stack([jnp.stack(row) for row in inner]), toward / jnp.where(norm > 0, norm, 1.0)


@jax.jit
def _norms_and_counts(grads: Any) -> Any:
    return jax.tree.map(lambda x: (optax.tree.norm(x), jnp.sum(~jnp.isfinite(x))), grads)


def halve(bucket: Bucket, mesh: Mesh | None = None) -> Bucket:
    """Both halves of a bucket's rows side by side, in a first axis of 2: every second row, since
    rows are in order of length. On a mesh each device keeps its own rows.

    Fields of responses are the same in both, and stand twice.
    """
    count = bucket.tokens.shape[0] // 2

    def of_rows(x: Array) -> Array:
        if x.ndim == 1:
            return jnp.broadcast_to(x, (2, *x.shape))
        pairs = jnp.swapaxes(x.reshape(count, 2, -1), 0, 1)
        if mesh is None:
            return pairs
        return jax.lax.with_sharding_constraint(pairs, half_sharding(mesh))

    return jax.tree.map(of_rows, bucket)
