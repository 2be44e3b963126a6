"""The programs of sampling, and arguments for them that are only shapes: see `programs.py`."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from deltal_jax.parallel.sharding import MESH_AXES, parameter_shardings, slot_sharding
from deltal_jax.planning.programs import Parts, Planned, Program, on_chip, placed
from deltal_jax.rollout.engine import PREFILL_TOKENS
from deltal_jax.rollout.pools import NARROWEST_PROMPT, doubled, pool_prompts
from deltal_jax.rollout.slots import Queue, Store
from deltal_jax.training.describe import stored_params


def weights_program(planned: Planned, kept: Parts) -> Program:
    """The parameters of training as sampling reads them. `kept` is what training keeps on a chip
    meanwhile, where the devices are the same."""
    engine, params = _engine(planned), _params(planned)
    lower = functools.partial(engine.programs["weights"].lower, params)
    held = kept if planned.shared else {"parameters": on_chip(params)}
    beside = sum(held.values()) - on_chip(params)
    return Program("weights", "sampling", lower, (0, 0), held, beside, planned.sampling_mesh)


def decoding_programs(planned: Planned, kept: Parts, layout: Any) -> list[Program]:
    """Prefill of the widest prompts, and decoding with the widest cache. `layout` is that of the
    compiled `weights_program`'s results."""
    engine, config, params = _engine(planned), planned.config, _params(planned)
    mesh, devices = planned.sampling_mesh, planned.devices
    weights = jax.eval_shape(engine.programs["weights"], params)
    weights = jax.tree.map(
        lambda x, own: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own), weights, layout
    )
    window = config.rollout.max_prompt_length + config.rollout.max_response_length
    each, pool, width, rows = _sizes(planned)
    prompts = _rows(planned, jax.ShapeDtypeStruct((rows * engine.shards, width), jnp.int32))
    results = each * config.rl.samples_per_prompt * engine.shards
    slots = jax.eval_shape(lambda own: engine.programs["empty"](own, window, results), weights)
    one = engine.programs["prefill"].eval_shape(weights, prompts)
    count = math.ceil(pool / rows) * rows * engine.shards
    cache = jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype), one)
    number: Any = jax.ShapeDtypeStruct((count,), jnp.int32)
    store = Store(cache, number, number)
    if mesh is None:
        # What depends on no array of the device goes where the others are.
        store = dataclasses.replace(store, cache=placed(None, devices, cache))
    else:
        slots = placed(mesh, devices, slots, engine.layout(slots, planned.arch))
        store = placed(mesh, devices, store, engine.layout(store, planned.arch))
    queue = _rows(planned, _queue(pool * config.rl.samples_per_prompt, engine.shards))
    bounds = [jax.ShapeDtypeStruct((), jnp.int32)] * 3
    held = kept if planned.shared else {"parameters": on_chip(params)}
    beside = sum(held.values())
    held = held | {
        "sampling weights": on_chip(weights),
        "kv cache": on_chip(slots),
        "prompt cache": on_chip((store, queue)),
    }
    prefill = functools.partial(engine.programs["prefill"].lower, weights, prompts)
    others = beside + held["kv cache"] + held["prompt cache"]
    decode = functools.partial(
        engine.programs["decode"].lower, weights, store, queue, slots, *bounds
    )
    shape = config.rollout.slots, window
    return [
        Program("prefill", "sampling", prefill, prompts.shape, held, others, mesh),
        Program("decode", "sampling", decode, shape, held, beside, mesh),
    ]


def _engine(planned: Planned) -> Any:
    assert planned.engine is not None
    return planned.engine


def _params(planned: Planned) -> Any:
    """As training keeps them; where others sample, as `Engine.place` copies them."""
    params = stored_params(planned.config, planned.arch)
    if planned.shared or planned.sampling_mesh is None:
        return placed(planned.mesh, planned.devices, params)
    layout = parameter_shardings(planned.sampling_mesh, params, gathered=MESH_AXES["embed"])
    return placed(planned.sampling_mesh, planned.devices, params, layout)


def _sizes(planned: Planned) -> tuple[int, int, int, int]:
    """Of each device: prompts of a round, and of a pool; their width, and how many are prefilled at
    once. As `Engine.sample` makes them of the longest prompts."""
    config, shards = planned.config, _engine(planned).shards
    rollout, rl = config.rollout, config.rl
    each = math.ceil(math.ceil(rl.prompts_per_step * rollout.oversampling) / shards)
    pool = pool_prompts(each, rollout.slots // shards, rl.samples_per_prompt)
    width = doubled(rollout.max_prompt_length, NARROWEST_PROMPT)
    return each, pool, width, max(1, min(pool, PREFILL_TOKENS // width))


def _queue(pairs: int, shards: int) -> Queue:
    """So many pairs on each of the devices that split rows."""

    def array(*sizes: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct((shards * sizes[0], *sizes[1:]), dtype)

    return Queue(
        prompt=array(pairs),
        row=array(pairs),
        keys=array(pairs, 2, dtype=jnp.uint32),
        begun=array(pairs),
        count=array(1),
        needed=array(1),
        more=array(1, dtype=jnp.bool_),
    )


def _rows(planned: Planned, tree: Any) -> Any:
    """Split by their first axis."""
    mesh = planned.sampling_mesh
    if mesh is None:
        return tree  # from the host
    own = slot_sharding(mesh)
    return placed(mesh, planned.devices, tree, jax.tree.map(lambda _: own, tree))
