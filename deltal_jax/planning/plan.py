"""Whether an experiment fits on a slice, and how fast it can be there."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from deltal_jax.config import Config
from deltal_jax.model import huggingface
from deltal_jax.model.architecture import Architecture, attention_work
from deltal_jax.model.hub import find_checkpoint, is_here
from deltal_jax.model.published import PUBLISHED
from deltal_jax.model.transformer import parameter_count
from deltal_jax.parallel.mesh import describe_mesh
from deltal_jax.parallel.sharding import ROW_AXES
from deltal_jax.planning import arithmetic
from deltal_jax.planning.compiling import Cache, Compiled, compile_program
from deltal_jax.planning.lengths import Lengths
from deltal_jax.planning.programs import (
    SOME_EOS,
    Planned,
    bucket_shapes,
    make_planned,
    update_programs,
)
from deltal_jax.planning.roofline import Times, Work, mfu, times
from deltal_jax.planning.sampling import decoding_programs, weights_program
from deltal_jax.planning.topology import Topology, tpu_devices
from deltal_jax.training.buckets import bucket_layout
from deltal_jax.training.setup import check_config, make_architecture, make_setup

#: Part of the memory that should be left: what the plan does not see (metrics, fragments).
SPARE = 0.08


def architecture_for(config: Config, platform: str) -> tuple[Architecture, tuple[int, ...]]:
    """The model as it runs on this platform, and the ids that end a response where they are known;
    nothing is fetched. Raises UserError for what a run would refuse."""
    model = config.model
    if model.path is None:
        setup = make_setup(dataclasses.replace(config, mesh=type(config.mesh)()))
        arch = make_architecture(config, setup.tokenizer.vocab_size, None, platform)
        return arch, setup.tokenizer.eos_ids
    away = not is_here(model.path, model.revision)
    published = PUBLISHED.get(model.path) if away else None
    if published is None:
        published = huggingface.read_config(find_checkpoint(model.path, model.revision))
    check_config(config, published)
    return make_architecture(config, 0, published, platform), SOME_EOS


def make_plan(
    config: Config,
    topology: Topology,
    lengths: Lengths,
    *,
    every: bool = False,
    cache: Cache | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Compile the programs of a run for a slice, and say what they take: plain JSON.

    `every`: all shapes of micro-batches, not the widest and the narrowest alone. Raises UserError
    for what a run would refuse, and where the slice's compiler is not here.
    """
    arch, eos_ids = architecture_for(config, topology.chip.platform)
    planned = make_planned(config, arch, tpu_devices(topology), eos_ids)
    programs = compile_all(planned, every=every, cache=cache or Cache(), say=say)
    return report(planned, topology, programs, lengths)


def compile_all(
    planned: Planned, *, every: bool, cache: Cache, say: Callable[[str], None]
) -> list[Compiled]:
    """Every program of a run, in the order of a step; sampling where this process samples. What
    decodes is left out where its weights alone do not fit."""
    shapes = bucket_shapes(planned.config, planned.update.row_multiple, every=every)
    updates = update_programs(planned, shapes)
    found = [compile_program(planned, program, cache, say)[0] for program in updates]
    if planned.engine is None:
        return found
    kept = updates[0].held | {"gradients": 0}
    program = weights_program(planned, kept)
    first, layout = compile_program(planned, program, cache, say, layout=True)
    if first.refused:
        return [*found, first]
    sampling = decoding_programs(planned, kept, layout)
    return [*found, first, *(compile_program(planned, own, cache, say)[0] for own in sampling)]


def report(
    planned: Planned, topology: Topology, programs: list[Compiled], lengths: Lengths
) -> dict[str, Any]:
    """What the compiled programs say of a run."""
    chip, arch = topology.chip, planned.arch
    worst = max(programs, key=lambda own: own.needed)
    rows = [_row(planned, topology, own) for own in programs]
    refused = any(own.refused for own in programs)
    fits = not refused and worst.needed <= chip.hbm
    found: dict[str, Any] = {
        "topology": topology.name,
        "chips": topology.size,
        "by": "compiler",
        "model": planned.config.model.path,
        "parameters": parameter_count(arch),
        "mesh": describe_mesh(planned.mesh),
        "sampling_mesh": describe_mesh(planned.sampling_mesh),
        "hbm": int(chip.hbm),
        "fits": fits,
        "needed": worst.needed,
        "worst": worst.name,
        "spare": 1 - worst.needed / chip.hbm,
        "programs": rows,
        # The sampler's weights are gathered at once, on purpose.
        "stacks_outside_scan": [
            stack for own in programs if own.name in ("add", "logprobs") for stack in own.stacks
        ],
        "ways_out": [] if fits else ways_out(planned, worst),
    }
    if not refused:
        found["update"] = _largest(planned, topology, programs)
        found["step"] = step(planned, topology, programs, lengths)
    return found


def _work(planned: Planned, own: Compiled) -> Work:
    """Counted in the compiled program, kernels of attention from the architecture."""
    flops, arch = own.flops, planned.arch
    if own.name in ("add", "logprobs", "prefill") and arch.attention != "xla":
        rows, width = own.shape
        products = arithmetic.FORWARD
        if own.name == "add":
            products *= 1 + arithmetic.attention_anew(arch)
            products += arithmetic.BACKWARD_DONE[arch.attention]
        mesh = planned.sampling_mesh if own.name == "prefill" else planned.mesh
        chips = 1 if mesh is None else mesh.size
        flops += products * rows * arithmetic.product_flops(arch, [width]) / chips
    return Work(flops, own.hbm_bytes, own.sent)


def _times(planned: Planned, topology: Topology, own: Compiled, work: Work | None = None) -> Times:
    mesh = planned.sampling_mesh if own.phase == "sampling" else planned.mesh
    return times(work or _work(planned, own), topology, mesh)


def _row(planned: Planned, topology: Topology, own: Compiled) -> dict[str, Any]:
    row = dataclasses.asdict(own) | {
        "needed": own.needed,
        "spare": 1 - own.needed / topology.chip.hbm,
    }
    row["sent"] = {"+".join(axes) or "one": size for axes, size in own.sent.items()}
    if not own.refused:
        found = _times(planned, topology, own)
        row["flops"] = _work(planned, own).flops
        row |= {"seconds_bound": found.bound, "limited_by": found.limit, "times": vars(found)}
    return row


def _chips(planned: Planned) -> int:
    """Those that train."""
    return 1 if planned.mesh is None else planned.mesh.size


def _largest(planned: Planned, topology: Topology, programs: list[Compiled]) -> dict[str, Any]:
    """The gradient of a full micro-batch of the widest bucket, without padding."""
    own = next(x for x in programs if x.name == "add")
    rows, width = own.shape
    limit = planned.config.rollout.max_response_length
    useful = arithmetic.useful_flops(planned.arch, [width] * rows, rows * min(limit, width))
    found = _times(planned, topology, own)
    chips = _chips(planned)
    done = arithmetic.gradient_flops(planned.arch, rows, width, rows * width) / chips
    return {
        "shape": own.shape,
        "seconds_bound": found.bound,
        "seconds_in_turn": found.in_turn,
        "limited_by": found.limit,
        "mfu_bound": mfu(useful, found.bound, topology, chips),
        "mfu_in_turn": mfu(useful, found.in_turn, topology, chips),
        "flops_by_architecture": done,
        "flops_counted": _work(planned, own).flops,
    }


def step(
    planned: Planned, topology: Topology, programs: list[Compiled], lengths: Lengths
) -> dict[str, Any]:
    """Bounds of the time of one RL step with responses of these lengths: programs one after the
    other, each as fast as its slowest resource."""
    config, arch, chips = planned.config, planned.arch, _chips(planned)
    rollout, rl = config.rollout, config.rl
    count = rl.prompts_per_step * rl.samples_per_prompt
    drawn = lengths.drawn(count, rollout.max_response_length)
    whole = drawn + max(1, rollout.max_prompt_length // 2)
    shapes = [
        shape
        for part in range(rl.updates_per_rollout)
        for shape in _layout(planned, whole[part :: rl.updates_per_rollout])
    ]
    named = {own.name: own for own in programs}
    adds = [own for own in programs if own.name == "add"]
    gradient = sum(_scaled(planned, topology, _nearest(adds, s), s).bound for s in shapes)
    seconds = gradient * rl.epochs_per_rollout
    updates = rl.updates_per_rollout * rl.epochs_per_rollout
    seconds += updates * _times(planned, topology, named["apply"]).bound
    useful = rl.epochs_per_rollout * arithmetic.useful_flops(arch, whole, int(drawn.sum()))
    found = {
        "responses": count,
        "mean": float(drawn.mean()),
        "p95": float(np.quantile(drawn, 0.95)),
        "microbatches": len(shapes),
        "padding": 1 - whole.sum() / sum(rows * width for rows, width in shapes),
        "seconds_update": seconds,
        "mfu_update": mfu(useful, seconds, topology, chips),
    }
    if own := named.get("logprobs"):
        found["seconds_logprobs"] = sum(
            _scaled(planned, topology, own, shape).bound for shape in _layout(planned, whole)
        )
    if "decode" in named:
        found |= _rollout(planned, topology, named, drawn)
    total = sum(value for name, value in found.items() if name.startswith("seconds_"))
    return found | {"seconds": total, "mfu": mfu(useful, total, topology)}


def _rollout(
    planned: Planned, topology: Topology, named: dict[str, Compiled], drawn: np.ndarray
) -> dict[str, Any]:
    """Slots that are always full, with the widest cache; the longest response is waited for."""
    config, slots = planned.config, planned.config.rollout.slots
    tokens = max(math.ceil(int(drawn.sum()) / slots), int(drawn.max()))
    each = _times(planned, topology, named["decode"]).bound
    calls = math.ceil(config.rl.prompts_per_step / named["prefill"].shape[0])
    first = calls * _times(planned, topology, named["prefill"]).bound
    first += _times(planned, topology, named["weights"]).bound
    return {
        "decoding_steps": tokens,
        "seconds_a_token": each,
        "seconds_prefill": first,
        "seconds_decode": tokens * each,
    }


def _layout(planned: Planned, whole: np.ndarray) -> list[tuple[int, int]]:
    """Micro-batches of responses of these lengths, prompts included."""
    config = planned.config
    found = bucket_layout(
        whole,
        config.bucket_edges,
        config.rl.tokens_per_microbatch,
        pack=config.rl.pack,
        row_multiple=planned.update.row_multiple,
        attention=attention_work(planned.arch),
    )
    return [(own.rows, own.width) for own in found]


def _nearest(found: list[Compiled], shape: tuple[int, int]) -> Compiled:
    """The program of the most alike width."""
    return min(found, key=lambda own: abs(own.shape[1] - shape[1]))


def _scaled(planned: Planned, topology: Topology, own: Compiled, shape: tuple[int, int]) -> Times:
    """Of another shape than the compiled one: FLOPs as the architecture says, memory as tokens;
    collectives over the axes that split rows carry parameters, and those over others tokens."""
    arch = planned.arch

    def flops(rows: int, width: int) -> float:
        count = arithmetic.gradient_flops if own.name == "add" else arithmetic.forward_flops
        return count(arch, rows, width, rows * width)

    tokens = math.prod(shape) / math.prod(own.shape)
    work = _work(planned, own)
    sent = {
        axes: size * (1.0 if set(axes) <= set(ROW_AXES) else tokens)
        for axes, size in own.sent.items()
    }
    work = Work(work.flops * flops(*shape) / flops(*own.shape), work.hbm_bytes * tokens, sent)
    return _times(planned, topology, own, work)


def ways_out(planned: Planned, worst: Compiled) -> list[str]:
    """What would make room, the most likely first."""
    config, mesh = planned.config, planned.mesh
    held, rows = worst.held, worst.shape[0]
    fsdp = 1 if mesh is None else mesh.shape["fsdp"]
    said = []
    if worst.phase == "sampling":
        cache, weights = held.get("kv cache", 0), held.get("sampling weights", 0)
        if weights > cache:
            tensor = 1 if planned.sampling_mesh is None else planned.sampling_mesh.shape["tensor"]
            said.append(
                f"mesh.tensor={2 * tensor}: the sampler's weights are split over it alone, and "
                f"take {weights / 2**30:.1f} GiB a chip"
            )
        said.append(f"rollout.slots={config.rollout.slots // 2}: half the cache")
    else:
        per_chip = 1 if mesh is None else planned.update.row_multiple
        if rows > per_chip:
            fewer = max(per_chip, rows // 2) * worst.shape[1]
            said.append(f"rl.tokens_per_microbatch={fewer}: half the activations")
        if planned.arch.remat not in ("layer", "offload"):
            said.append("model.remat=layer: one layer's activations at a time")
        if config.rl.optimizer.moment_dtype == "float32":
            half = held["optimizer"] / 2**31
            said.append(
                f"rl.optimizer.moment_dtype=bfloat16: {half:.1f} GiB less of Adam's moments"
            )
    state = held.get("parameters", 0) + held.get("optimizer", 0)
    said.append(
        f"mesh.fsdp={2 * fsdp} on a slice of twice the chips: half of the {state / 2**30:.1f} GiB "
        "of parameters and moments"
    )
    return said
