"""A plan by arithmetic alone, for devices whose compiler is not at hand."""

from typing import Any

from jax.sharding import AbstractMesh

from deltal_jax.config import Config
from deltal_jax.errors import UserError
from deltal_jax.model.transformer import parameter_count
from deltal_jax.parallel.mesh import describe_mesh
from deltal_jax.parallel.sharding import row_shards
from deltal_jax.planning import arithmetic
from deltal_jax.planning.lengths import Lengths
from deltal_jax.planning.plan import architecture_for
from deltal_jax.planning.roofline import mfu
from deltal_jax.planning.topology import Topology
from deltal_jax.training.buckets import bucket_rows
from deltal_jax.training.describe import memory_estimate
from deltal_jax.training.devices import shape_of_mesh


def make_estimate(config: Config, topology: Topology, lengths: Lengths) -> dict[str, Any]:
    """The memory of `deltal train --dry-run` against that of these devices, and the time of a full
    micro-batch and of a step's updates if products were all they took; plain JSON.

    Raises UserError for what a run would refuse, and for a mesh of more devices.
    """
    arch, _ = architecture_for(config, topology.chip.platform)
    mesh: AbstractMesh | None = shape_of_mesh(config)
    size = 1 if mesh is None else mesh.size
    needed = size + (config.rollout.devices or 0)
    if needed > topology.size:
        raise UserError(f"--mesh: takes {needed} devices, and {topology.name} has {topology.size}")
    memory = memory_estimate(config, arch, mesh)
    total = memory.pop("total")
    found: dict[str, Any] = {
        "topology": topology.name,
        "chips": topology.size,
        "by": "arithmetic",
        "model": config.model.path,
        "parameters": parameter_count(arch),
        "mesh": describe_mesh(mesh),
        "sampling_mesh": describe_mesh(mesh),
        "hbm": int(topology.chip.hbm),
        "fits": total <= topology.chip.hbm,
        "needed": total,
        "worst": "all parts",
        "spare": 1 - total / topology.chip.hbm,
        "memory": memory,
        "programs": [],
        "ways_out": [],
    }
    if not found["fits"]:
        largest = max(memory, key=lambda name: memory[name])
        found["ways_out"] = [WAYS.get(largest, WAYS["parameters"])]
    width = config.bucket_edges[-1]
    shards = 1 if mesh is None else row_shards(mesh)
    rows = bucket_rows(width, config.rl.tokens_per_microbatch, shards)
    done = arithmetic.gradient_flops(arch, rows, width, rows * width)
    useful = arithmetic.useful_flops(
        arch, [width] * rows, rows * min(config.rollout.max_response_length, width)
    )
    seconds = done / (size * topology.chip.flops)
    count = config.rl.prompts_per_step * config.rl.samples_per_prompt
    drawn = lengths.drawn(count, config.rollout.max_response_length)
    whole = drawn + max(1, config.rollout.max_prompt_length // 2)
    of_step = arithmetic.useful_flops(arch, whole, int(drawn.sum()))
    return found | {
        "full_microbatch": {
            "shape": (rows, width),
            "seconds_bound": seconds,
            "mfu_bound": mfu(useful, seconds, topology, size),
        },
        "useful_flops_a_step": of_step,
        "seconds_useful": of_step / (size * topology.chip.flops),
    }


#: What to do about the largest part.
WAYS = {
    "parameters": "mesh.fsdp: split parameters, moments and gradients over more devices",
    "optimizer": "rl.optimizer.moment_dtype=bfloat16, or more of mesh.fsdp",
    "gradients": "mesh.fsdp: split parameters, moments and gradients over more devices",
    "activations": "rl.tokens_per_microbatch: smaller; model.remat=layer",
    "sampling_weights": "mesh.tensor: the sampler's weights are split over it alone",
    "kv_cache": "rollout.slots: fewer",
    "prompt_cache": "rollout.slots: fewer",
}
