"""The least time that a program can take on a slice: what the slowest of its parts takes."""

import dataclasses
from collections.abc import Mapping

from jax.sharding import Mesh

from deltal_jax.planning.topology import Topology, axis_links


@dataclasses.dataclass(frozen=True)
class Work:
    """What a program does on one chip. Collective bytes are those that a chip sends, by the mesh
    axes that they go over."""

    flops: float
    hbm_bytes: float
    sent_bytes: Mapping[tuple[str, ...], float]


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds by resource, each as if it alone limited the program."""

    compute: float
    hbm: float
    collectives: float

    @property
    def bound(self) -> float:
        """No run is faster: all three at once, without a gap."""
        return max(self.compute, self.hbm, self.collectives)

    @property
    def in_turn(self) -> float:
        """One after the other: nothing overlaps."""
        return self.compute + self.hbm + self.collectives

    @property
    def limit(self) -> str:
        """What takes longest."""
        return max(vars(self), key=lambda name: vars(self)[name])


def times(work: Work, topology: Topology, mesh: Mesh | None) -> Times:
    """Of a program on the chips of a slice, whose mesh axes are along some of its dimensions.

    A collective sends over all links along the dimensions in which its groups extend; collectives
    wait for one another. Peak rates: nothing measured enters.
    """
    chip = topology.chip
    seconds = 0.0
    for axes, size in work.sent_bytes.items():
        links = 1 if mesh is None else axis_links(topology, mesh, axes)
        seconds += size / (links * chip.link)
    return Times(work.flops / chip.flops, work.hbm_bytes / chip.hbm_bandwidth, seconds)


def sent_by_one(kind: str, size: float, members: int) -> float:
    """Bytes that a chip sends in a collective among so many, whose largest buffer (what is
    gathered, or reduced) has `size` bytes: the least of all algorithms.

    Source: Thakur, Rabenseifner, Gropp, 2005: rings are optimal in bandwidth.
    """
    share = (members - 1) / members if members > 1 else 0.0
    return size * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share)


def mfu(useful: float, seconds: float, topology: Topology, chips: int | None = None) -> float:
    """Useful FLOPs of all chips by what they could do in this time."""
    return useful / (seconds * topology.chip.flops * (chips or topology.size))
