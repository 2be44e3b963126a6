"""Which devices train and which sample, from a config."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from deltal_jax.config import Config, MeshConfig
from deltal_jax.errors import UserError
from deltal_jax.model.architecture import Architecture
from deltal_jax.parallel.layouts import Layout, choose_layout
from deltal_jax.parallel.mesh import AXES, make_mesh
from deltal_jax.parallel.sharding import slot_shards
from deltal_jax.rollout.checks import free_memory
from deltal_jax.training.describe import memory_estimate


def choose_training_mesh(
    config: Config,
    arch: Architecture,
    devices: Sequence[Any] | None = None,
    memory: int | None = None,
) -> tuple[Config, Mesh | None, str]:
    """The mesh that `choose_sizes` finds, why, and the config with its slots; `mesh.auto` stays,
    and chooses anew where a run goes on."""
    sized, said = choose_sizes(config, arch, devices, memory)
    slots = dataclasses.replace(config, rollout=sized.rollout)
    return slots, make_training_mesh(sized, devices), said


def choose_sizes(
    config: Config,
    arch: Architecture,
    devices: Sequence[Any] | None = None,
    memory: int | None = None,
) -> tuple[Config, str]:
    """The config with sizes instead of `mesh.auto`, and slots that these split; and why, in one
    line. `devices`: those that train and sample, None: all; `memory`: bytes of each, None: what
    they say.

    Raises UserError where no sizes fit into the memory.
    """
    devices = _training_devices(config, devices)
    memory = _memory(devices) if memory is None else memory
    needed = functools.partial(_needed, config, arch)
    layout, said = choose_layout(len(devices), memory, arch.heads, needed)
    sized = _sized(config, layout)
    if sized.rollout.slots != config.rollout.slots:
        said = f"{said}; rollout.slots: {config.rollout.slots} → {sized.rollout.slots}"
    return sized, said


def _memory(devices: Sequence[Any]) -> int | None:
    """Bytes of each device. The same in all processes, so not what is free of it at the moment; of
    CPU devices that is all that there is, and processes must not differ: None for several."""
    if devices[0].platform == "cpu":
        return free_memory(devices) if jax.process_count() == 1 else None
    here = [device for device in devices if device.process_index == jax.process_index()]
    stats = [device.memory_stats() or {} for device in here]
    known = all("bytes_limit" in own for own in stats)
    return min(own["bytes_limit"] for own in stats) if known else None


def _needed(config: Config, arch: Architecture, layout: Layout) -> int:
    """Bytes that a run takes on each device."""
    mesh = AbstractMesh(tuple(getattr(layout, axis) for axis in AXES), AXES)
    return memory_estimate(_sized(config, layout), arch, mesh)["total"]


def _sized(config: Config, layout: Layout) -> Config:
    """The config with the sizes of a layout, and slots up to the next number that these split."""
    unit = layout.data * layout.fsdp * layout.context
    unit = math.lcm(unit, config.rollout.devices or 1)
    slots = math.ceil(config.rollout.slots / unit) * unit
    return dataclasses.replace(
        config,
        mesh=MeshConfig(**dataclasses.asdict(layout)),
        rollout=dataclasses.replace(config.rollout, slots=slots),
    )


def _training_devices(config: Config, devices: Sequence[Any] | None) -> Sequence[Any]:
    """Of these, or all of all processes, those that do not only sample."""
    devices = jax.devices() if devices is None else devices
    make_sampling_mesh(config, devices)  # leaves some
    return devices[: len(devices) - (config.rollout.devices or 0)]


def make_training_mesh(config: Config, devices: Sequence[Any] | None = None) -> Mesh | None:
    """The devices that train, of these (None: all of all processes); None: one device of one
    process.

    Where the config names no sizes, several processes split everything over fsdp: nothing of the
    model's size is held twice, and rows are split as they would be over data. Raises UserError
    where the sizes don't multiply to the devices, or slots don't split over them.
    """
    devices = jax.devices() if devices is None else devices
    several = len({device.process_index for device in devices}) > 1
    if several and config.rollout.devices:
        raise UserError("rollout.devices: on several processes all devices train; leave it out")
    if several and config.rollout.ahead:
        raise UserError("rollout.ahead: on several processes sampling waits its turn; set it to 0")
    if config.mesh == MeshConfig() and not several:
        return None
    sizes = {"data": 1, "fsdp": -1} if config.mesh == MeshConfig() else _sizes(config)
    found = make_mesh(**sizes, devices=_training_devices(config, devices))
    _check_slots(config, found)
    return found if several or found.size > 1 else None


def lacking_devices(config: Config) -> int:
    """How many devices a run needs, where there are fewer here; otherwise 0."""
    sizes = _sizes(config).values()
    needed = math.prod(abs(size) for size in sizes) + (config.rollout.devices or 0)
    return needed if needed > jax.device_count() else 0


def shape_of_mesh(config: Config) -> AbstractMesh | None:
    """What `make_training_mesh` finds on a machine with just the devices that are needed."""
    sizes = _sizes(config)
    mesh = AbstractMesh(tuple(abs(sizes[axis]) for axis in AXES), AXES)
    _check_slots(config, mesh)
    return mesh if mesh.size > 1 else None


def _sizes(config: Config) -> dict[str, int]:
    return {name: size or 1 for name, size in config.mesh.sizes.items()}


def _check_slots(config: Config, mesh: Mesh | AbstractMesh) -> None:
    if config.rollout.slots % slot_shards(mesh):
        raise UserError(
            f"rollout.slots: {config.rollout.slots} do not split over the mesh's "
            f"{slot_shards(mesh)} devices of data × fsdp × context"
        )


def make_sampling_mesh(config: Config, devices: Sequence[Any] | None = None) -> Mesh | None:
    """The devices that sample only, of these (None: all), each with the whole model; None: those
    that train sample, too.

    Raises UserError where none is left to train.
    """
    wanted, devices = config.rollout.devices, jax.devices() if devices is None else devices
    if wanted is None:
        return None
    if wanted >= len(devices):
        raise UserError(
            f"rollout.devices: {wanted} of {len(devices)} devices leaves none to train; set it to "
            + ("null" if len(devices) == 1 else f"at most {len(devices) - 1}")
        )
    return make_mesh(devices=devices[-wanted:])
