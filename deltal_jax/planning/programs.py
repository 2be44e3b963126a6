"""The programs that a run compiles, and arguments for them that are only shapes.

The functions are those that training and sampling call (`training.step.Update`,
`rollout.engine.Engine`); their arguments say what lies where on devices that need not be here.
Nothing of the model's size is allocated.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding

from deltal_jax.config import Config
from deltal_jax.model.architecture import Architecture
from deltal_jax.model.remat import PINNED_HOST
from deltal_jax.model.transformer import make_graphdef
from deltal_jax.parallel.on_mesh import OnMesh
from deltal_jax.parallel.sharding import replicated_sharding, state_shardings, token_sharding
from deltal_jax.rollout.engine import Engine
from deltal_jax.training.buckets import ROW_FRACTIONS, bucket_rows
from deltal_jax.training.describe import stored_params
from deltal_jax.training.devices import make_sampling_mesh, make_training_mesh
from deltal_jax.training.setup import engine_of, sampling_options, update_of
from deltal_jax.training.step import Gradient, Update
from deltal_jax.types import Bucket

#: Where no tokenizer is at hand: which id ends a response changes one constant of a program.
SOME_EOS = (0,)
#: Bytes of each part of what a chip holds.
Parts = dict[str, int]


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program of a run."""

    name: str
    #: "update" or "sampling": its devices.
    phase: str
    lower: Callable[[], jax.stages.Lowered]
    #: Of a micro-batch: rows and width; of decoding: slots and window. Over all devices.
    shape: tuple[int, int]
    #: What a chip holds meanwhile, by part: arguments, and what the run keeps beside them.
    held: Parts
    #: The part of `held` that is no argument.
    beside: int
    mesh: Mesh | None


@dataclasses.dataclass(frozen=True)
class Planned:
    """The parts of a run on devices that need not be here."""

    config: Config
    arch: Architecture
    devices: Sequence[Any]
    mesh: Mesh | None
    sampling_mesh: Mesh | None
    update: Update
    engine: Engine | None

    @property
    def shared(self) -> bool:
        """Whether the devices that train sample, too."""
        return self.config.rollout.devices is None


def make_planned(
    config: Config,
    arch: Architecture,
    devices: Sequence[Any],
    eos_ids: tuple[int, ...] = SOME_EOS,
) -> Planned:
    """The update and the sampler of a run on these devices. Raises UserError for a mesh or slots
    that do not split over them."""
    mesh = make_training_mesh(config, devices)
    sampling = make_sampling_mesh(config, devices) or mesh
    graphdef = make_graphdef(arch)
    update = update_of(config, graphdef, mesh, "rl")
    engine = None
    if config.rollout.engine == "jax":
        options = sampling_options(config, eos_ids, config.rollout.temperature, training=True)
        engine = engine_of(graphdef, options, sampling)
    return Planned(config, arch, devices, mesh, sampling, update, engine)


def bucket_shapes(config: Config, row_multiple: int, *, every: bool = False) -> list[tuple]:
    """Rows and widths of micro-batches, the most work first: that of the widest and that of the
    narrowest bucket when full; or of every one that `training.buckets` may choose."""
    edges, budget = config.bucket_edges, config.rl.tokens_per_microbatch
    chosen = edges if every else (edges[-1], edges[0])
    full = {edge: bucket_rows(edge, budget, row_multiple) for edge in chosen}
    shapes = {
        (bucket_rows(1, rows // part, row_multiple), edge)
        for edge, rows in full.items()
        for part in (ROW_FRACTIONS if every else (1,))
    }
    return sorted(shapes, key=lambda shape: (shape[1], shape[0]), reverse=True)


def update_programs(planned: Planned, shapes: Sequence[tuple[int, int]]) -> list[Program]:
    """The gradient of each shape of micro-batch, the log-probabilities of the largest where they
    are computed anew, and the optimizer's step."""
    config, update, arch = planned.config, planned.update, planned.arch
    params = placed(planned.mesh, planned.devices, stored_params(config, arch))
    reference = config.objective.kl_coefficient > 0
    state = jax.eval_shape(
        functools.partial(update.fresh, reference=reference), params, jax.random.key(0)
    )
    state = placed(planned.mesh, planned.devices, state, update.layout(state))
    first = abstract_bucket(planned, shapes[0])
    running = _running(planned, params, first)
    parts = {
        "parameters": on_chip(params),
        "optimizer": on_chip(state.opt_state),
        "reference": on_chip((state.reference, state.direction)),
        "gradients": on_chip(running.grads),
    }
    if config.rollout.ahead and planned.shared:
        parts["sampling"] = on_chip(params)
    programs = []
    for shape in shapes:
        bucket = abstract_bucket(planned, shape)
        lower = functools.partial(update.add.lower, params, running, bucket)
        beside = sum(parts.values()) - parts["parameters"] - parts["gradients"]
        programs.append(Program("add", "update", lower, shape, parts, beside, planned.mesh))
    without = parts | {"gradients": 0}
    if config.objective.old_logprobs == "recompute" or reference:
        lower = functools.partial(update.logprobs.lower, params, first)
        beside = sum(without.values()) - parts["parameters"]
        programs.append(
            Program("logprobs", "update", lower, shapes[0], without, beside, planned.mesh)
        )
    lower = functools.partial(update.apply.lower, state, running)
    beside = parts.get("sampling", 0)
    programs.append(Program("apply", "update", lower, (0, 0), parts, beside, planned.mesh))
    return programs


def abstract_bucket(planned: Planned, shape: tuple[int, int]) -> Bucket:
    """A micro-batch as `Update.place` puts it on the devices."""
    rl, objective = planned.config.rl, planned.config.objective
    responses = (rl.prompts_per_step * rl.samples_per_prompt,)

    mesh = planned.mesh
    if mesh is not None:  # as `pad_width`
        shape = shape[0], -(-shape[1] // mesh.shape["context"]) * mesh.shape["context"]

    def array(sizes: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype)

    bucket = Bucket(
        tokens=array(shape, jnp.int32),
        positions=array(shape, jnp.int32),
        segment_ids=array(shape, jnp.int32),
        loss_mask=array(shape, jnp.bool_),
        sampler_logprobs=array(shape, jnp.float32),
        old_logprobs=array(shape, jnp.float32),
        advantages=array(responses, jnp.float32),
        weights=array(responses, jnp.float32),
        auxiliary_weights=array(responses, jnp.float32),
        reference_logprobs=array(shape, jnp.float32) if objective.kl_coefficient else None,
    )
    if mesh is None:
        return bucket  # from the host, to where the parameters are
    rows, whole = token_sharding(mesh), replicated_sharding(mesh)
    layout = jax.tree.map(lambda x: rows if x.ndim == 2 else whole, bucket)
    return placed(mesh, planned.devices, bucket, layout)


def placed(mesh: Mesh | None, devices: Sequence[Any], tree: Any, layout: Any = None) -> Any:
    """Shapes that lie on the mesh as `layout` says, by default as `sharding.state_shardings` does
    of a state or of parameters; where there is no mesh on the first device."""
    if mesh is None:
        one = SingleDeviceSharding(devices[0])
        layout = jax.tree.map(lambda _: one, tree)
    elif layout is None:
        layout = state_shardings(mesh, tree)
    return jax.tree.map(
        lambda x, own: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own), tree, layout
    )


def on_chip(tree: Any) -> int:
    """Bytes that one chip holds of shapes that say where they lie; none of what lies in the host's
    memory."""

    def size(x: Any) -> int:
        if x.sharding is not None and x.sharding.memory_kind == PINNED_HOST:
            return 0
        own = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        return math.prod(own) * x.dtype.itemsize

    return sum(map(size, jax.tree.leaves(tree)))


def _running(planned: Planned, params: Any, bucket: Bucket) -> Gradient:
    """The sum of gradients, as `Update.accumulate` has it."""
    update, mesh = planned.update, planned.mesh
    found = OnMesh(update.gradient, mesh).eval_shape(params, bucket)
    if mesh is None:
        return placed(None, planned.devices, found)
    whole = replicated_sharding(mesh)
    layout = jax.tree.map(lambda _: whole, found)
    layout = dataclasses.replace(layout, grads=state_shardings(mesh, found.grads))
    return placed(mesh, planned.devices, found, layout)
