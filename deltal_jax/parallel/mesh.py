"""The device mesh and the start of several processes.

The mesh has four axes. Rows of tokens are split over "data" and "fsdp", the tokens of a row over
"context"; parameters over "fsdp" and "context" (their wide dimensions, gathered when used) and
"tensor" (heads, feed-forward, vocabulary). "data" holds whole copies of what the others split.
"""

import importlib
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from deltal_jax.errors import UserError

#: From the devices that say least to each other to those that say most, which are neighbours.
AXES = ("data", "fsdp", "context", "tensor")
#: Numbers of processes, as launchers that jax knows set them.
LAUNCHED = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
#: Number of processes on this host, as Open MPI sets it.
LOCAL_SIZE = "OMPI_COMM_WORLD_LOCAL_SIZE"
#: Which GPUs of its host a process uses, as jax has it.
VISIBLE = ("jax_cuda_visible_devices", "jax_rocm_visible_devices")


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    context: int = 1,
    *,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh of `devices` (None: all of all processes) with the axes `AXES`.

    At most one size may be -1: the rest of the devices. Axis types are Auto: the compiler decides
    what happens between the shardings that are given, as jit over a named mesh is meant here;
    `jax.make_mesh` by itself now makes explicit axes. Raises UserError (a ValueError) where the
    sizes don't multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = (data, fsdp, context, tensor)
    said = ", ".join(f"{name}={size}" for name, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"mesh: sizes are 1 or more and at most one is -1 (the rest), got {said}")
    known = int(np.prod([size for size in sizes if size != -1]))
    rest = len(devices) // known
    if known * (rest if -1 in sizes else 1) != len(devices):
        raise UserError(
            f"mesh: {said} does not multiply to the {len(devices)} devices; "
            "set one of them to -1, the rest"
        )
    shape = tuple(rest if size == -1 else size for size in sizes)
    types = (AxisType.Auto,) * len(AXES)
    if not _is_box(devices):
        return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=types)
    try:
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    except NotImplementedError as error:
        raise UserError(
            f"mesh: {said} does not follow the sides of this slice of TPUs; make each size a "
            "product of some of them, such as fsdp=8, tensor=4 on 4x8"
        ) from error


def _is_box(devices: Sequence[Any]) -> bool:
    """Whether these are all chips of a slice of TPUs from its first corner on, as
    `rollout.devices` need not leave; jax lays out no others. True elsewhere."""
    coords = [getattr(device, "coords", None) for device in devices]
    if not all(coords):
        return True
    sides = np.max(np.asarray(coords), axis=0) + 1
    return int(np.prod(sides)) == len({tuple(own) for own in coords if own is not None})


def describe_mesh(mesh: Mesh | AbstractMesh | None) -> str:
    """The sizes, such as `data 2 × fsdp 4: 8 devices in 2 processes`; None: one device."""
    if mesh is None:
        return "one device"
    sizes = " × ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    devices = mesh.devices.flat if isinstance(mesh, Mesh) else ()
    processes = len({device.process_index for device in devices})
    where = f" in {processes} processes" if processes > 1 else ""
    return f"{sizes or 'data 1'}: {mesh.size} devices{where}"


def start_distributed(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_timeout: int | None = None,
) -> None:
    """Join the processes of a run into one; call it in each of them before anything else of JAX.

    `coordinator` is host:port of process 0, `processes` how many there are, `process_id` which of
    them this is. What is None is taken from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID, and then from what jax detects: on TPU pods, SLURM and Open MPI nothing need be
    set. Where nothing is set and nothing detected this is a single process: does nothing. A second
    call does nothing either. Under Pathways (JAX_PLATFORMS=proxy) one process has all devices, and
    only their proxy is made known to jax.

    `heartbeat_timeout`, in seconds (None: DELTAL_HEARTBEAT, or else 100): a process that dies
    inside a collective takes the others down at once; one that dies (or whose host hangs) outside
    of any is missed after this time, and then the others abort and can be restarted from a
    checkpoint.

    Raises ValueError where some values are set and others are missing, RuntimeError where several
    processes are meant and JAX already runs in this one, UserError where Pathways' own package is
    missing.
    """
    if jax.distributed.is_initialized():
        return
    if "proxy" in os.environ.get("JAX_PLATFORMS", "").split(","):
        _start_pathways()
        return
    if heartbeat_timeout is None:
        heartbeat_timeout = _integer("DELTAL_HEARTBEAT") or 100
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    processes = processes if processes is not None else _integer("JAX_NUM_PROCESSES")
    process_id = process_id if process_id is not None else _integer("JAX_PROCESS_ID")
    alone = (coordinator, processes, process_id) == (None, None, None)
    visible = {name: jax.config.read(name) for name in VISIBLE} if has_host() else {}
    try:
        jax.distributed.initialize(
            coordinator, processes, process_id, heartbeat_timeout_seconds=heartbeat_timeout
        )
    except ValueError as error:
        # What jax says where it detects no cluster; it has no way to ask beforehand.
        if not (alone and "coordinator_address should be defined" in str(error)):
            raise
    except RuntimeError:
        # A backend runs already, so jax refuses before it looks for a cluster: that is harmless
        # only where there is none. A TPU backend knows its pod by itself.
        launched = any((_integer(name) or 1) > 1 for name in LAUNCHED)
        if not alone or launched or jax.process_count() > 1:
            raise
    for name, devices in visible.items():
        jax.config.update(name, devices)


def _start_pathways() -> None:
    try:
        pathways = importlib.import_module("pathwaysutils")
    except ImportError as error:
        raise UserError(
            "JAX_PLATFORMS: proxy is Pathways', which needs pip install pathwaysutils"
        ) from error
    pathways.initialize()


def has_host() -> bool:
    """Whether this process is the only one on its host, so that all GPUs there are its own: jax
    gives each task of SLURM and Open MPI a single one, however many tasks a host has."""
    if os.environ.get("JAX_LOCAL_DEVICE_IDS"):
        return False
    slurm = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")  # such as 1(x4)
    return bool(re.fullmatch(r"1(\(x\d+\))?", slurm)) or os.environ.get(LOCAL_SIZE) == "1"


def _integer(name: str) -> int | None:
    return int(os.environ[name]) if os.environ.get(name) else None
