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
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from deltal_jax.errors import UserError
from deltal_jax.model.cache import resized
from deltal_jax.model.precision import ROUND_ALIKE
from deltal_jax.model.transformer import cast_weights, take_apart
from deltal_jax.parallel.sharding import (
    ROW_AXES,
    parameter_shardings,
    replicated_sharding,
    row_sharding,
    row_shards,
)
from deltal_jax.rollout.checks import check_memory, check_request
from deltal_jax.rollout.results import Results, assemble, stats
from deltal_jax.rollout.sampling import stream_keys
from deltal_jax.rollout.schedule import RolloutStats
from deltal_jax.rollout.slots import (
    Queue,
    SamplingOptions,
    Slots,
    Status,
    Store,
    compact,
    draw,
    empty_slots,
    resize,
    run,
    status_of,
    window_of,
)
from deltal_jax.types import Prompts, Rollout

#: Caches are as wide as the longest prompt and response may need, or three quarters of that, a
#: half, three eighths, …, but no narrower than this.
NARROWEST = 64
#: In the tail idle slots are given up, a quarter or a third of them at a time, down to so many.
FEWEST = 4
#: And only where there are at most so many responses a slot.
LONG_TAIL = 4
#: Prompts are prefilled in widths that double, from this on.
NARROWEST_PROMPT = 32
#: Pairs that a pool of prompts has for each slot: enough to be decoding most of the time.
POOL_PAIRS = 4
#: Prompt tokens that are prefilled at once.
PREFILL_TOKENS = 8192


class Engine:
    """Samples responses, on one device or on a mesh.

    On a mesh the prompts are split over the devices that split rows of tokens, each with its own
    slots and queue, so that none waits for another inside a compiled program; heads are split over
    "tensor". Parameters may lie as training keeps them: they are gathered over "fsdp" once a call.
    Several processes call `generate` with the same arguments, and all get the whole rollout.

    Programs are compiled once for each number of responses, window and width of prompts; the
    parameters are an argument.
    """

    def __init__(
        self, graphdef: nnx.GraphDef, options: SamplingOptions, *, mesh: Mesh | None = None
    ):
        self.options, self.mesh = options, mesh
        self.shards = 1 if mesh is None else row_shards(mesh)
        if options.slots % self.shards:
            raise UserError(
                f"rollout.slots: {options.slots} do not split over the mesh's {self.shards} devices"
            )
        self._graphdef = graphdef
        alike = functools.partial(jax.jit, compiler_options=ROUND_ALIKE)
        decode_queue = functools.partial(run, graphdef, options)
        if mesh is not None:
            rows, whole = PartitionSpec(ROW_AXES), PartitionSpec()
            decode_queue = jax.shard_map(
                decode_queue,
                mesh=mesh,
                in_specs=(whole, whole, rows, rows, rows, whole, whole),
                out_specs=rows,
                axis_names=set(ROW_AXES),
                check_vma=False,  # loops of different lengths on each device
            )

        def turn(
            params: Any,
            layers: Any,
            store: Store,
            queue: Queue,
            slots: Slots,
            narrow: Array,
            few: Array,
        ) -> tuple[Slots, Status]:
            slots = decode_queue(params, layers, store, queue, slots, narrow, few)
            status = status_of(queue, slots)
            return slots, status if mesh is None else self._whole(status)

        self._run = alike(turn, donate_argnums=4)
        self._prefill = alike(lambda params, tokens: nnx.merge(graphdef, params).prefill(tokens))
        self._resize = jax.jit(resize, static_argnums=1)
        self._compact = jax.jit(compact, static_argnums=1)
        self._join = jax.jit(functools.partial(_join, self.shards))
        self._empty = jax.jit(self._make_empty, static_argnums=(1, 2))
        self._weights = jax.jit(self._prepare)
        self._draw = jax.jit(functools.partial(draw, options))
        self._decode = alike(
            lambda params, layers, tokens, positions, cache: nnx.merge(graphdef, params).decode(
                tokens, positions, cache, layers
            ),
            donate_argnums=4,
        )

    def _prepare(self, params: Any) -> tuple[Any, Any]:
        """The parameters as sampling wants them, and those of each layer."""
        params = cast_weights(self._graphdef, params)
        if self.mesh is not None:
            shardings = parameter_shardings(self.mesh, params, gathered=("fsdp",))
            params = jax.lax.with_sharding_constraint(params, shardings)
        return params, take_apart(params["blocks"], jax.tree.leaves(params["blocks"])[0].shape[0])

    def _make_empty(self, params: Any, window: int, rows: int) -> Slots:
        model = nnx.merge(self._graphdef, params)
        slots = empty_slots(model, self.options, window, rows, self.shards)
        if self.mesh is None:
            return slots
        heads = "tensor" if model.arch.kv_heads % self.mesh.shape["tensor"] == 0 else None
        split = NamedSharding(self.mesh, PartitionSpec(ROW_AXES, heads))
        own = row_sharding(self.mesh)
        shardings = jax.tree.map(lambda _: own, slots)
        shardings = dataclasses.replace(shardings, cache=jax.tree.map(lambda _: split, slots.cache))
        return jax.lax.with_sharding_constraint(slots, shardings)

    def _whole(self, tree: Any) -> Any:
        """The same on every device, so that every process can read it."""
        assert self.mesh is not None
        return jax.lax.with_sharding_constraint(tree, replicated_sharding(self.mesh))

    def _place(self, array: np.ndarray) -> Array:
        """Rows on their devices."""
        if self.mesh is None:
            return jnp.asarray(array)
        sharding = row_sharding(self.mesh)
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
    ) -> tuple[Rollout, RolloutStats]:
        """`samples` responses to each prompt, in prompt order: row p·samples + s.

        Arrays of the returned rollout are in host memory. Raises UserError, before anything is
        compiled, for an empty or too long prompt, an unknown stop id, or slots whose cache would
        not fit into the device's memory.
        """
        arch = nnx.merge(self._graphdef, jax.eval_shape(lambda x: x, params)).arch
        check_request(self.options, arch, prompts, samples)
        check_memory(self.options, arch, prompts.tokens.shape[1], self.shards)
        counters = jnp.asarray(step), jnp.asarray(round_)
        keys = np.asarray(
            stream_keys(key, *counters, jnp.asarray(prompts.positions), samples), np.uint32
        )
        params, layers = self._weights(params)
        count, windows = len(prompts.lengths), self._windows(prompts)
        each = -(-count // self.shards)  # prompts of a device
        size = math.ceil(POOL_PAIRS * self.options.slots / self.shards / samples)
        size = min(each, max(1, size))
        longest = int(np.max(prompts.lengths))
        slots = self._empty(params, _fitting(windows, longest), self.shards * each * samples)
        for first in range(0, each, size):
            pool = _pool(count, self.shards, each, first, size)
            store = self._store(params, prompts, pool)
            queue = self._queue(pool, samples, keys, each, more=first + size < each)
            slots = dataclasses.replace(slots, taken=self._place(np.zeros(self.shards, np.int32)))
            slots = self._drain(params, layers, store, queue, slots, windows, longest)
        results = self._fetch(slots)
        groups = np.repeat(np.arange(count, dtype=np.int32), samples)
        lengths = results.lengths[: len(groups)]
        return assemble(prompts, groups, results), stats(results, lengths, self.options.slots)

    def _drain(
        self,
        params: Any,
        layers: Any,
        store: Store,
        queue: Queue,
        slots: Slots,
        windows: list[int],
        prompt: int,
    ) -> Slots:
        """Decode until the queue is empty and a slot is free, or all is done; the cache as wide as
        it needs to be, and never narrower than the longest prompt."""
        # On a mesh the devices run out at different times, and would wait for each other. And where
        # many responses share a slot the tail is too short to be worth more programs.
        giving_up = self.mesh is None and slots.lengths.shape[0] <= LONG_TAIL * self.options.slots
        sizes = _parts(self.options.slots, FEWEST) if giving_up else []
        while True:
            window = window_of(slots)
            # Two sizes down, or a response of a length in between would have it change to and fro.
            below = next((w for w in reversed(windows) if w <= window // 4), 0)
            # On a mesh one device alone must not stop for it: the longest is another's.
            narrower = self.mesh is None and below > prompt
            narrow = jnp.asarray(below if narrower else -1, jnp.int32)
            fewer = [n for n in sizes if n < slots.live.shape[0]]
            few = max(fewer, default=0)
            slots, status = self._run(
                params, layers, store, queue, slots, narrow, jnp.asarray(few, jnp.int32)
            )
            longest = int(status.longest)
            if status.drained and longest < window:
                return slots
            if few and status.last and status.live <= few:
                slots = self._compact(slots, min(n for n in fewer if n >= status.live))
            wanted = _fitting(windows, max(longest + 1, prompt))
            if wanted != window:
                slots = self._resize(slots, wanted)

    def _windows(self, prompts: Prompts) -> list[int]:
        """The widths that the cache may have, ascending."""
        widest = prompts.tokens.shape[1] + self.options.max_response_length
        return [*_parts(widest, NARROWEST), widest]

    def _store(self, params: Any, prompts: Prompts, pool: np.ndarray) -> Store:
        """Prefill the prompts of a pool, Int[devices size], −1 where there is none; a few at once,
        as wide as the widest of them needs."""
        there = pool >= 0
        lengths = np.where(there, np.asarray(prompts.lengths)[pool], 1).astype(np.int32)
        tokens = np.where(there[..., None], np.asarray(prompts.tokens)[pool], 0).astype(np.int32)
        width = doubled(int(lengths.max()), NARROWEST_PROMPT)
        size, given = tokens.shape[1:]
        tokens = np.pad(tokens, ((0, 0), (0, 0), (0, max(0, width - given))))[:, :, :width]
        rows = max(1, min(size, PREFILL_TOKENS // width))
        tokens = np.pad(tokens, ((0, 0), (0, -size % rows), (0, 0)))
        parts = [
            self._prefill(params, self._place(part.reshape(-1, width)))
            for part in np.split(tokens, tokens.shape[1] // rows, axis=1)
        ]
        cache = parts[0] if len(parts) == 1 else jax.tree.map(self._join, *parts)
        last = np.take_along_axis(tokens[:, :size], lengths[..., None] - 1, axis=2)[..., 0]
        extra = ((0, 0), (0, -size % rows))
        placed = (self._place(np.pad(x, extra).reshape(-1)) for x in (last, lengths))
        return Store(cache, *placed)

    def _queue(
        self, pool: np.ndarray, samples: int, keys: np.ndarray, each: int, *, more: bool
    ) -> Queue:
        """All samples of the prompts of a pool, prompts first. Rows of results are a device's
        own."""
        shards, size = pool.shape
        prompt = np.repeat(np.arange(size, dtype=np.int32), samples)
        pair = pool[:, prompt] * samples + np.tile(np.arange(samples), size)
        row = pair - np.arange(shards)[:, None] * each * samples
        counts = np.sum(pool >= 0, axis=1) * samples
        return Queue(
            prompt=self._place(np.tile(prompt, shards)),
            row=self._place(row.reshape(-1).astype(np.int32)),
            keys=self._place(keys[pair.reshape(-1)]),
            count=self._place(counts.astype(np.int32)),
            more=self._place(np.full(shards, more)),
        )

    def _fetch(self, slots: Slots) -> Results:
        """What was written, in host memory."""
        names = [field.name for field in dataclasses.fields(Results)]
        found = {name: getattr(slots, name) for name in names}
        if self.mesh is not None:
            found = jax.jit(self._whole)(found)
        return Results(**jax.tree.map(np.asarray, found))

    def stream(
        self,
        params: Any,
        prompts: Prompts,
        key: Array,
        *,
        step: int = 0,
        round_: int = 0,
        cache_length: int | None = None,
    ) -> Iterator[int]:
        """The tokens of one response as they are drawn: the same ones that `generate` gives.

        Prompts of several widths share one compiled decoding where `cache_length` is the same; None
        is what prompt and response may need.
        """
        keys = stream_keys(
            key, jnp.asarray(step), jnp.asarray(round_), jnp.asarray(prompts.positions), 1
        )
        length = int(prompts.lengths[0])
        params, layers = self._weights(params)
        cache = self._prefill(params, jnp.asarray(prompts.tokens))
        room = prompts.tokens.shape[1] + self.options.max_response_length
        cache = resized(cache, max(room, cache_length or 0))
        token = int(prompts.tokens[0, length - 1])
        for count in range(self.options.max_response_length):
            at = jnp.asarray([token]), jnp.asarray([length - 1 + count])
            logits, cache = self._decode(params, layers, *at, cache)
            token = int(self._draw(logits, keys, jnp.asarray([count]))[0][0])
            yield token
            if token in self.options.eos_ids:
                return


def _fitting(windows: list[int], tokens: int) -> int:
    """The narrowest that has room for one token more."""
    return windows[bisect.bisect_right(windows, tokens)]


def _parts(whole: int, least: int) -> list[int]:
    """Three quarters of it, a half, three eighths, …, down to `least`; ascending."""
    found = [whole * 3 // 4, whole // 2]
    while found[-1] >= least:
        found += [n // 2 for n in found[-2:]]
    return [n for n in reversed(found) if n >= least]


def _pool(count: int, shards: int, each: int, first: int, size: int) -> np.ndarray:
    """The prompts `first` … of each device, Int[shards size]; −1 where there is none."""
    own = np.arange(first, first + size)
    numbers = np.arange(shards)[:, None] * each + own[None, :]
    return np.where((own < each) & (numbers < count), numbers, -1)


def _join(shards: int, *parts: Array) -> Array:
    """Rows of each device behind its own rows."""
    apart = [x.reshape(shards, -1, *x.shape[1:]) for x in parts]
    return jnp.concatenate(apart, axis=1).reshape(-1, *parts[0].shape[1:])


def doubled(least: int, first: int) -> int:
    """The first of first, 2·first, 4·first, … that is no smaller than `least`."""
    while first < least:
        first *= 2
    return first
