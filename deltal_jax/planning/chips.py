"""Facts of chips, as their makers publish them: nominal, so every time made of them is a bound."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator, as a program of JAX sees it: a device."""

    platform: Literal["tpu", "gpu"]
    #: Bytes of memory that programs may use: what the compiler says that it has (TPU), or all.
    hbm: float
    #: Multiplications and additions of bfloat16 products a second.
    flops: float
    #: Bytes a second from and to this memory.
    hbm_bandwidth: float
    #: Bytes a second of one link to a neighbour, one way (TPU); of all links, one way (GPU).
    link: float
    #: Bytes a second over the network between slices or nodes, one way.
    network: float
    #: Dimensions of the torus that the chips of a slice are in; 0: each reaches each.
    dimensions: int
    #: A dimension of so many chips, or of a multiple of it, is a ring; others are lines.
    ring: int = 1


#: Sources: the pages "TPU v4", "v5e", "v5p", "v6e" of Cloud TPU's documentation (v4: 2,400 Gb/s
#: over six links, v5p 4,800; v5e 400 GB/s both ways over four, v6e 800), memory as the compiler
#: has it; NVIDIA's data sheets, SXM, dense.
CHIPS: dict[str, Chip] = {
    "v4": Chip("tpu", 30.75 * 2**30, 275e12, 1228e9, 50e9, 6.25e9, 3, 4),
    "v5e": Chip("tpu", 15.75 * 2**30, 197e12, 819e9, 50e9, 3.125e9, 2, 16),
    "v5p": Chip("tpu", 95.74 * 2**30, 459e12, 2765e9, 100e9, 6.25e9, 3, 4),
    "v6e": Chip("tpu", 31.25 * 2**30, 918e12, 1640e9, 100e9, 12.5e9, 2, 16),
    "a100": Chip("gpu", 80e9, 312e12, 2039e9, 300e9, 25e9, 0),
    "h100": Chip("gpu", 80e9, 989e12, 3350e9, 450e9, 50e9, 0),
    "h200": Chip("gpu", 141e9, 989e12, 4800e9, 450e9, 50e9, 0),
}
