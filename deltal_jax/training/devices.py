"""Which devices train and which sample, from a config."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from deltal_jax.config import Config, MeshConfig
from deltal_jax.errors import UserError
from deltal_jax.parallel.mesh import AXES, make_mesh
from deltal_jax.parallel.sharding import row_shards


def make_training_mesh(config: Config, devices: Sequence[Any] | None = None) -> Mesh | None:
    """The devices that train, of these (None: all of all processes); None: one device of one
    process.

    Where the config names no sizes, several processes split everything over fsdp: nothing of the
    model's size is held twice, and rows are split as they would be over data. Raises UserError
    where the sizes don't multiply to the devices, or slots don't split over them.
    """
    devices = jax.devices() if devices is None else devices
    sampling = config.rollout.devices or 0
    several = len({device.process_index for device in devices}) > 1
    if several and sampling:
        raise UserError("rollout.devices: on several processes all devices train; leave it out")
    if several and config.rollout.ahead:
        raise UserError("rollout.ahead: on several processes sampling waits its turn; set it to 0")
    if config.mesh == MeshConfig() and not several:
        return None
    make_sampling_mesh(config, devices)  # leaves some
    devices = devices[: len(devices) - sampling]
    sizes = (1, -1, 1) if config.mesh == MeshConfig() else _sizes(config)
    found = make_mesh(*sizes, devices=devices)
    _check_slots(config, found)
    return found if several or found.size > 1 else None


def lacking_devices(config: Config) -> int:
    """How many devices a run needs, where there are fewer here; otherwise 0."""
    needed = math.prod(abs(size) for size in _sizes(config)) + (config.rollout.devices or 0)
    return needed if needed > jax.device_count() else 0


def shape_of_mesh(config: Config) -> AbstractMesh | None:
    """What `make_training_mesh` finds on a machine with just the devices that are needed."""
    mesh = AbstractMesh(tuple(abs(size) for size in _sizes(config)), AXES)
    _check_slots(config, mesh)
    return mesh if mesh.size > 1 else None


def _sizes(config: Config) -> tuple[int, int, int]:
    return config.mesh.data or 1, config.mesh.fsdp or 1, config.mesh.tensor or 1


def _check_slots(config: Config, mesh: Mesh | AbstractMesh) -> None:
    if config.rollout.slots % row_shards(mesh):
        raise UserError(
            f"rollout.slots: {config.rollout.slots} do not split over the mesh's "
            f"{row_shards(mesh)} devices of data × fsdp"
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
