"""Sampling by slots that are kept full: the host's part.

Prompts are prefilled in pools, a pool's pairs (prompt, sample) are queued, and `slots.run` decodes
until there is something to do here: the next pool, a wider cache because a response grew, a
narrower one because long ones ended. A prompt's prefill is computed once and serves all its
samples. Log-probabilities and masks come from the sampler, never from a guess afterwards.
"""

import bisect
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from deltal_jax.errors import UserError
from deltal_jax.guard.pulse import pulse
from deltal_jax.guard.signals import check
from deltal_jax.model.architecture import Architecture
from deltal_jax.model.precision import ROUND_ALIKE
from deltal_jax.model.transformer import cast_weights, take_apart
from deltal_jax.parallel.on_mesh import OnMesh
from deltal_jax.parallel.processes import on_each
from deltal_jax.parallel.sharding import (
    MESH_AXES,
    SLOT_AXES,
    parameter_shardings,
    replicated_sharding,
    slot_sharding,
    slot_shards,
)
from deltal_jax.rollout import checks, pools
from deltal_jax.rollout.base import Finished
from deltal_jax.rollout.pools import Plan, Pool, doubled, make_plan
from deltal_jax.rollout.results import Teller, Written, assemble, begin, merge, stats, take
from deltal_jax.rollout.schedule import RolloutStats
from deltal_jax.rollout.slots import (
    Queue,
    SamplingOptions,
    Slots,
    Status,
    Store,
    Weights,
    compact,
    empty_slots,
    finished_rows,
    prefill,
    resize,
    run,
    status_of,
    window_of,
)
from deltal_jax.types import Prompts, Responses, Rollout

#: Caches are as wide as the longest prompt and response may need, or a half of that, a quarter, …,
#: but no narrower than this.
NARROWEST = 64
#: Below this width they are also of three quarters, three eighths, …: longer ones belong to models
#: whose programs take long to compile.
FINE = 512
#: In the tail idle slots are given up, a quarter or a third of them at a time, down to so many.
FEWEST = 4
#: And only where there are at most so many responses a slot.
LONG_TAIL = 4
#: Steps between two looks at what has ended, where someone is told of it, and on a mesh at whether
#: all that is needed is there.
CHUNK = 64
#: Steps between two signs of life where nobody is told of anything; a run that is asked to stop
#: does not have to wait for longer.
PACE = 256
#: Prompt tokens that are prefilled at once.
PREFILL_TOKENS = 8192


class Engine:
    """Samples responses, on one device or on a mesh.

    On a mesh the prompts are dealt out to its devices, but for those of "tensor", which split
    heads: each of the others has its own slots and queue, so that none waits for another inside a
    compiled program. Parameters may lie as training keeps them: they are gathered once a call, but
    for what "tensor" splits, and copied from device to device where they lie on others.
    Several processes call `generate` with the same arguments, and all get the whole rollout.

    Programs are compiled once for each number of responses, window and width of prompts; the
    parameters are an argument.
    """

    def __init__(
        self, graphdef: nnx.GraphDef, options: SamplingOptions, *, mesh: Mesh | None = None
    ):
        self.options, self.mesh = options, mesh
        self.shards = 1 if mesh is None else slot_shards(mesh)
        if options.slots % self.shards:
            raise UserError(
                f"rollout.slots: {options.slots} do not split over the mesh's {self.shards} devices"
            )
        self._graphdef = graphdef
        self._arch: Architecture | None = None
        #: By the arguments of `_check`.
        self._memory: dict[Any, dict[str, int]] = {}
        alike = functools.partial(jax.jit, compiler_options=ROUND_ALIKE)
        decode_queue = functools.partial(
            run,
            graphdef,
            options,
            alone=mesh is None or self.shards == 1,
            split=mesh is not None and mesh.shape["tensor"] > 1,
        )
        prefill_rows = functools.partial(prefill, graphdef)
        if mesh is not None:
            rows, whole = PartitionSpec(SLOT_AXES), PartitionSpec()
            prefill_rows = jax.shard_map(  # each its own: not every kernel is split by itself
                prefill_rows,
                mesh=mesh,
                in_specs=(whole, rows),
                out_specs=rows,
                axis_names=set(SLOT_AXES),
                check_vma=False,
            )
            decode_queue = jax.shard_map(
                decode_queue,
                mesh=mesh,
                in_specs=(whole, rows, rows, rows, whole, whole, whole),
                out_specs=rows,
                axis_names=set(SLOT_AXES),
                check_vma=False,  # loops of different lengths on each device
            )

        def turn(
            weights: Weights, store: Store, queue: Queue, slots: Slots, *bounds: Array
        ) -> tuple[Slots, Status]:
            before = slots.counts.slot_steps
            slots = decode_queue(weights, store, queue, slots, *bounds)
            status = status_of(queue, slots, before, bounds[-1])
            return slots, self._whole(status)

        self._run = alike(turn, donate_argnums=3)
        self._look = jax.jit(lambda slots: self._whole(finished_rows(options, slots)))
        self._read = jax.jit(self._read_rows)
        if mesh is None:
            self._prefill: Any = alike(prefill_rows)
        else:  # whose kernel of attention splits by the rest of the mesh
            self._prefill = OnMesh(prefill_rows, mesh, compiler_options=ROUND_ALIKE)
        self._resize = jax.jit(resize, static_argnums=1)
        self._compact = jax.jit(compact, static_argnums=1)
        self._join = jax.jit(functools.partial(_join, self.shards))
        self._empty = jax.jit(self._make_empty, static_argnums=(1, 2))
        self._weights = jax.jit(self._prepare)
        self._replicate = jax.jit(self._whole)

    def place(self, params: Any) -> Any:
        """The parameters on the devices of the mesh, copied from device to device; themselves where
        they are there already."""
        own = jax.tree.leaves(params)[0].sharding.device_set
        if self.mesh is None or own == set(self.mesh.devices.flat):
            return params
        return jax.device_put(
            params, parameter_shardings(self.mesh, params, gathered=MESH_AXES["embed"])
        )

    def _prepare(self, params: Any) -> Weights:
        dtype = nnx.merge(self._graphdef, params).arch.compute_dtype
        params = cast_weights(params, dtype)
        if self.mesh is not None:
            shardings = parameter_shardings(self.mesh, params, gathered=MESH_AXES["embed"])
            params = jax.lax.with_sharding_constraint(params, shardings)
        return Weights(*take_apart(params))

    def _make_empty(self, weights: Weights, window: int, rows: int) -> Slots:
        model = nnx.merge(self._graphdef, weights.params)
        slots = empty_slots(model, self.options, window, rows, self.shards)
        if self.mesh is None:
            return slots
        return jax.lax.with_sharding_constraint(slots, self.layout(slots, model.arch))

    def layout(self, slots: Any, arch: Architecture) -> Any:
        """Where slots, or a store of prompts, lie on the mesh: split by their first axis, the cache
        by heads too."""
        assert self.mesh is not None
        heads = "tensor" if arch.kv_heads % self.mesh.shape["tensor"] == 0 else None
        split = NamedSharding(self.mesh, PartitionSpec(SLOT_AXES, heads))
        own = slot_sharding(self.mesh)
        shardings = jax.tree.map(lambda _: own, slots)
        return dataclasses.replace(shardings, cache=jax.tree.map(lambda _: split, slots.cache))

    @property
    def programs(self) -> dict[str, Any]:
        """What is compiled of the model: its parameters as sampling reads them, free slots, the
        cache of prompts, and the decoding of slots until the host has something to do."""
        return {
            "weights": self._weights,
            "empty": self._empty,
            "prefill": self._prefill,
            "decode": self._run,
        }

    def _whole(self, tree: Any) -> Any:
        """The same on every device, so that every process can read it."""
        if self.mesh is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, replicated_sharding(self.mesh))

    def _place(self, array: np.ndarray) -> Array:
        """Rows on their devices."""
        if self.mesh is None:
            return jnp.asarray(array)
        sharding = slot_sharding(self.mesh)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    def generate(
        self,
        params: Any,
        prompts: Prompts,
        key: Array,
        *,
        samples: int,
        step: int = 0,
        round_: int = 0,
        own_prompts: bool = False,
    ) -> tuple[Rollout, RolloutStats]:
        """`samples` responses to each prompt, in prompt order: row p·samples + s.

        Arrays of the returned rollout are in host memory. With `own_prompts` each process gives
        other prompts, as many as the others do, and gets the responses to them. Raises UserError,
        before anything is compiled, for an empty or too long prompt, an unknown stop id, or slots
        whose cache would not fit into the device's memory.
        """
        self._check(params, prompts, samples)
        count = len(prompts.lengths)
        everyone = _gathered(prompts) if own_prompts else prompts
        responses = begin(self.options, everyone, key, samples=samples, step=step, round_=round_)
        responses, stats = self.sample(params, responses)
        if own_prompts:
            responses = take(responses, np.arange(count) + jax.process_index() * count)
        return assemble(responses), stats

    def sample(
        self,
        params: Any,
        responses: Responses,
        *,
        needed: int | None = None,
        room: int = 0,
        finished: Finished | None = None,
    ) -> tuple[Responses, RolloutStats]:
        """Go on with every response until those to the first `needed` prompts are finished; None:
        all. Others may be unfinished then.

        Each begins in its turn, those that were begun before first. What was sampled before stays
        as it is, log-probabilities included; the cache is computed anew, by `params`. Calls with
        any number of prompts up to `room` share their compiled programs. `finished` is told of
        responses that ended at least every `CHUNK` steps. Raises UserError as `generate` does.
        """
        prompts = responses.prompts
        samples = math.ceil(len(responses.lengths) / len(prompts.lengths))
        self._check(params, prompts, samples, carried=bool(responses.lengths.any()))
        wanted = len(prompts.lengths) if needed is None else needed
        slots_each = self.options.slots // self.shards
        plan = make_plan(responses, wanted, self.shards, slots_each, room)
        longest = [int(pool.lengths.max()) for pool in plan.pools]
        windows = self._windows(prompts)
        weights = self._weights(self.place(params))
        slots = self._empty(weights, _fitting(windows, max(longest, default=1)), plan.rows.size)
        slots = dataclasses.replace(slots, owed=self._place(plan.needed))
        # On a mesh none stops by itself: others may have long ones to finish.
        steps = CHUNK if self.shards > 1 and wanted < len(prompts.lengths) else 0
        tell = finished and Teller(
            finished, responses, plan.rows.reshape(-1), self._look, self._read
        )
        for number, pool in enumerate(plan.pools if plan.needed.any() else ()):
            queue = self._queue(pool, plan, more=pool is not plan.pools[-1])
            slots = dataclasses.replace(slots, taken=self._place(np.zeros(self.shards, np.int32)))
            store = self._store(weights, pool)
            slots, over = self._drain(
                weights, store, queue, slots, windows, max(longest[number:]), steps, tell
            )
            del store  # or it would be there while the next one is computed
            if over:
                break
        written = self._fetch(slots)
        after = merge(responses, plan.rows.reshape(-1), written)
        return after, stats(written, after.lengths - responses.lengths, self.options.slots)

    def _check(self, params: Any, prompts: Prompts, samples: int, *, carried: bool = False) -> None:
        """Raises UserError for what cannot be sampled, or not in the memory that is free to each
        process."""
        check_here = functools.partial(self._check_here, params, prompts, samples, carried=carried)
        if self.mesh is not None and self.mesh.is_multi_process:
            on_each(check_here)
        else:
            check_here()

    def _check_here(self, params: Any, prompts: Prompts, samples: int, *, carried: bool) -> None:
        arch = self._arch or nnx.merge(self._graphdef, jax.eval_shape(lambda x: x, params)).arch
        self._arch = arch
        checks.check_request(self.options, arch, prompts, samples)
        tensor, devices = 1, None
        if self.mesh is not None:
            tensor, devices = self.mesh.shape["tensor"], self.mesh.local_devices
        given = prompts.tokens.shape, samples, carried
        if given not in self._memory:
            self._memory[given] = checks.sampling_memory(
                self.options,
                arch,
                params,
                prompts.tokens.shape,
                samples,
                carried=carried,
                shards=self.shards,
                tensor=tensor,
            )
        checks.check_memory(self.options.slots, self._memory[given], checks.free_memory(devices))

    def _drain(
        self,
        weights: Weights,
        store: Store,
        queue: Queue,
        slots: Slots,
        windows: list[int],
        longest: int,
        steps: int,
        tell: Teller | None,
    ) -> tuple[Slots, bool]:
        """Decode until the queue is empty and a slot is free, or nothing is owed any more: then
        also True. The cache is as wide as it needs to be, and never narrower than the longest
        sequence of this or a later pool; `steps`: see `slots.run`. Of what ended `tell` is told in
        between, which changes nothing of it: slots that only paused for it stay as they are."""
        # On a mesh the devices run out at different times, and would wait for each other. And where
        # many responses share a slot the tail is too short to be worth more programs.
        giving_up = self.mesh is None and slots.lengths.shape[0] <= LONG_TAIL * self.options.slots
        limit = jnp.asarray(steps or (PACE if tell is None else CHUNK), jnp.int32)
        sizes = _parts(self.options.slots, FEWEST) if giving_up else []
        while True:
            window = window_of(slots)
            # To a quarter, or a response of a length in between would have it change to and fro.
            below = next((w for w in reversed(windows) if w <= window // 4), 0)
            # On a mesh one device alone must not stop for it: the longest is another's.
            narrower = self.mesh is None and below > longest
            narrow = jnp.asarray(below if narrower else -1, jnp.int32)
            fewer = [n for n in sizes if n < slots.live.shape[0]]
            few = max(fewer, default=0)
            slots, status = self._run(
                weights, store, queue, slots, narrow, jnp.asarray(few, jnp.int32), limit
            )
            pulse()
            check()
            if status.owed == 0:
                return slots, True
            end = int(status.longest)
            if status.drained and end < window:
                return slots, False
            if tell is not None:
                tell(slots)
            if status.paused and not steps:
                continue
            if few and status.last and status.live <= few:
                slots = self._compact(slots, min(n for n in fewer if n >= status.live))
            wanted = _fitting(windows, max(end + 1, longest))
            if wanted != window:
                slots = self._resize(slots, wanted)

    def _windows(self, prompts: Prompts) -> list[int]:
        """The widths that the cache may have, ascending."""
        widest = prompts.tokens.shape[1] + self.options.max_response_length
        coarse = [widest]
        while coarse[-1] > FINE:
            coarse.append(coarse[-1] // 2)
        return [*_parts(coarse[-1], NARROWEST), *reversed(coarse)]

    def _store(self, weights: Weights, pool: Pool) -> Store:
        """Prefill the sequences of a pool, a few at once, as wide as the longest of them needs."""
        size, longest = pool.tokens.shape[1:]
        width = doubled(longest, pools.NARROWEST_PROMPT)
        rows = max(1, min(size, PREFILL_TOKENS // width))
        extra = (0, -size % rows)
        tokens = np.pad(pool.tokens, ((0, 0), extra, (0, width - longest)))
        parts = [
            self._prefill(weights, self._place(part.reshape(-1, width)))
            for part in np.split(tokens, tokens.shape[1] // rows, axis=1)
        ]
        cache = parts[0] if len(parts) == 1 else jax.tree.map(self._join, *parts)
        last = np.take_along_axis(pool.tokens, pool.lengths[..., None] - 1, axis=2)[..., 0]
        placed = (self._place(np.pad(x, ((0, 0), extra)).reshape(-1)) for x in (last, pool.lengths))
        return Store(cache, *placed)

    def _queue(self, pool: Pool, plan: Plan, *, more: bool) -> Queue:
        """The responses that continue the sequences of a pool, on their devices."""
        return Queue(
            prompt=self._place(pool.sequence.reshape(-1)),
            row=self._place(pool.row.reshape(-1)),
            keys=self._place(pool.keys.reshape(-1, 2)),
            begun=self._place(pool.begun.reshape(-1)),
            count=self._place(pool.counts),
            needed=self._place(plan.needed),
            more=self._place(np.full(self.shards, more)),
        )

    def _read_rows(self, slots: Slots, rows: Array) -> tuple[Array, Array]:
        """Tokens and lengths of some rows of the results."""
        return self._whole((slots.tokens[rows], slots.lengths[rows]))

    def _fetch(self, slots: Slots) -> Written:
        """What was written, in host memory."""
        names = [field.name for field in dataclasses.fields(Written)]
        found = {name: getattr(slots, name) for name in names}
        if self.mesh is not None:
            found = self._replicate(found)
        return Written(**jax.tree.map(np.asarray, found))


def _gathered(prompts: Prompts) -> Prompts:
    """The prompts of all processes, in their order. Raises UserError where they are not as many
    and as wide in each."""
    shapes = multihost_utils.process_allgather(np.asarray(prompts.tokens.shape))
    if np.any(shapes != shapes.reshape(-1, 2)[0]):
        raise UserError(
            f"prompts: processes have {shapes.tolist()} (prompts, width), which must be the same"
        )
    return multihost_utils.process_allgather(prompts, tiled=True)


def _fitting(windows: list[int], tokens: int) -> int:
    """The narrowest that has room for one token more."""
    return windows[bisect.bisect_right(windows, tokens)]


def _parts(whole: int, least: int) -> list[int]:
    """Three quarters of it, a half, three eighths, …, down to `least`; ascending."""
    found = [whole * 3 // 4, whole // 2]
    while found[-1] >= least:
        found += [n // 2 for n in found[-2:]]
    return [n for n in reversed(found) if n >= least]


def _join(shards: int, *parts: Array) -> Array:
    """Rows of each device behind its own rows."""
    apart = [x.reshape(shards, -1, *x.shape[1:]) for x in parts]
    return jnp.concatenate(apart, axis=1).reshape(-1, *parts[0].shape[1:])
