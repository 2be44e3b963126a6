"""Slices by name: `v5e:8x8`, `v5p:2x2x2`, `gpu:h100x8`; and devices of a slice that is not here."""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from deltal_jax.errors import UserError
from deltal_jax.planning.chips import CHIPS, Chip

#: What libtpu would ask a cloud that is not there, and complain of; and its lock, which is for
#: those that run something.
QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips of one kind and how they stand: the sides of a TPU slice, or a number of GPUs."""

    kind: str
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        """The facts of one."""
        return CHIPS[self.kind]

    @property
    def size(self) -> int:
        """How many chips."""
        return math.prod(self.shape)

    @property
    def name(self) -> str:
        """As it is written."""
        sides = "x".join(map(str, self.shape))
        return f"gpu:{self.kind}x{sides}" if self.chip.platform == "gpu" else f"{self.kind}:{sides}"

    def links(self, varied: Sequence[bool]) -> int:
        """Links one way that each chip has to those along these dimensions of the slice: two in a
        ring, one in a line, whose ends have no more."""
        rings = self.chip.ring
        pairs = [(side, far) for side, far in zip(self.shape, varied, strict=True) if side > 1]
        return sum(2 if side % rings == 0 else 1 for side, far in pairs if far)


def parse_topology(text: str) -> Topology:
    """Raises UserError for a name that is none, with those that are."""
    gpu = re.fullmatch(r"gpu:([a-z]+\d+)x([1-9]\d{0,4})", text)
    tpu = re.fullmatch(r"(v\d+[a-z]?):([1-9]\d{0,2}(?:x[1-9]\d{0,2})+)", text)
    kind = (gpu or tpu or [None, ""])[1]
    known = [name for name, chip in CHIPS.items() if (chip.platform == "gpu") == bool(gpu)]
    if not (gpu or tpu) or kind not in known:
        raise UserError(
            f"--topology: {text!r} is none; name a slice by its chips, such as v5e:8x8 or "
            f"v5p:2x2x2, or gpu:h100x8; there are {', '.join(CHIPS)}"
        )
    if gpu:
        return Topology(kind, (int(gpu[2]),))
    assert tpu is not None
    shape = tuple(map(int, tpu[2].split("x")))
    wanted = CHIPS[kind].dimensions
    if len(shape) != wanted:
        example = "x".join(["2"] * wanted)
        raise UserError(
            f"--topology: {text!r} has {len(shape)} sides, and a slice of {kind} has {wanted}, "
            f"such as {kind}:{example}; they count chips, not cores"
        )
    return Topology(kind, shape)


def tpu_devices(topology: Topology) -> list[Any]:
    """Its devices, for the compiler alone.

    Raises UserError where libtpu is not installed or does not know the slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "--topology: the compiler of TPUs is not installed; pip install 'deltal-jax[tpu]'"
        )
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    options = {}
    if topology.size < 4 or topology.shape == (2, 4):  # one host, or a part of it
        options["chips_per_host_bounds"] = [*topology.shape, *[1] * (3 - len(topology.shape))]
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options)
        devices = list(found.devices)
    except Exception as error:  # of its own kinds, and RuntimeError
        said = " ".join(str(error).split())[:200]
        raise UserError(f"--topology: libtpu does not give {topology.name}: {said}") from error
    if len(devices) != topology.size:  # v4: here each core is one, on the machine each chip
        raise UserError(
            f"--topology: libtpu gives {len(devices)} devices for the {topology.size} chips of "
            f"{topology.name}, as a run there would not have them; plan for v5p"
        )
    return devices


def axis_links(topology: Topology, mesh: Mesh, axes: Sequence[str]) -> int:
    """Links one way that each chip has for a collective over these axes of the mesh: those along
    the dimensions of the slice in which a group of it extends."""
    order = [mesh.axis_names.index(axis) for axis in axes]
    first = tuple(slice(None) if at in order else 0 for at in range(mesh.devices.ndim))
    coords = np.asarray([device.coords for device in np.ravel(mesh.devices[first])])
    varied = coords.min(axis=0) != coords.max(axis=0)
    return max(1, topology.links(varied[: len(topology.shape)].tolist()))
