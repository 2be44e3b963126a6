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
from jaxtyping import Array, UInt32

from deltal_jax.errors import UserError
from deltal_jax.model.cache import cache_bytes
from deltal_jax.model.precision import ROUND_ALIKE
from deltal_jax.model.transformer import Architecture, cast_weights, take_apart
from deltal_jax.rollout.sampling import sample, stream_keys, uniforms
from deltal_jax.rollout.schedule import RolloutStats, ideal_steps
from deltal_jax.rollout.slots import (
    Queue,
    SamplingOptions,
    Slots,
    Store,
    empty_slots,
    resize,
    run,
    window_of,
)
from deltal_jax.types import Prompts, Rollout

#: Caches are as wide as the longest prompt and response may need, or a half of that, a quarter, …,
#: but no narrower than this.
NARROWEST = 128
#: Prompts are prefilled in widths that double, from this on.
NARROWEST_PROMPT = 32
#: Pairs that a pool of prompts has for each slot: enough to be decoding most of the time.
POOL_PAIRS = 4
#: Prompt tokens that are prefilled at once.
PREFILL_TOKENS = 8192


def check_request(
    options: SamplingOptions, arch: Architecture, prompts: Prompts, samples: int
) -> None:
    """Raises UserError, naming the field, for what cannot be sampled."""
    if options.slots < 1 or samples < 1:
        raise UserError("rollout.slots: needs at least one slot and one sample a prompt")
    if options.max_response_length < 1:
        raise UserError(
            f"rollout.max_response_length: must be at least 1, got {options.max_response_length}"
        )
    unknown = [i for i in options.eos_ids if not 0 <= i < arch.vocab]
    if unknown:
        raise UserError(f"eos_ids: {unknown[0]} is no id of a vocabulary of {arch.vocab}")
    lengths, width = np.asarray(prompts.lengths), prompts.tokens.shape[1]
    if len(lengths) == 0 or lengths.min() < 1:
        which = "there is none" if len(lengths) == 0 else f"number {int(lengths.argmin())} is empty"
        raise UserError(f"prompts: {which}; a response needs a token to begin from")
    if lengths.max() > width:
        raise UserError(f"rollout.max_prompt_length: {width}, but a prompt takes {lengths.max()}")


def check_memory(options: SamplingOptions, arch: Architecture, prompt_width: int) -> None:
    """Raises UserError where the widest cache would take more than the device has free."""
    free = free_memory()
    itemsize = jnp.dtype(arch.compute_dtype or "float32").itemsize
    time = prompt_width + options.max_response_length
    one = cache_bytes(arch.layers, 1, arch.kv_heads, time, arch.head_dim, itemsize)
    if free is not None and one * options.slots > free:
        raise UserError(
            f"rollout.slots: the cache of {options.slots} slots of {time} tokens takes "
            f"{one * options.slots / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free; "
            f"{max(free // one, 0)} slots would fit"
        )


def free_memory() -> int | None:
    """Bytes that the default device has free; None where it does not say, as CPUs."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)


class Engine:
    """Samples responses on one device.

    Programs are compiled once for each number of responses, window and width of prompts; the
    parameters are an argument.
    """

    def __init__(self, graphdef: nnx.GraphDef, options: SamplingOptions):
        self.options = options
        self._graphdef = graphdef
        self._cast = jax.jit(functools.partial(cast_weights, graphdef))
        alike = functools.partial(jax.jit, compiler_options=ROUND_ALIKE)
        self._run = alike(functools.partial(run, graphdef, options), donate_argnums=4)
        self._prefill = alike(lambda params, tokens: nnx.merge(graphdef, params).prefill(tokens))
        self._resize = jax.jit(resize, static_argnums=1)
        self._empty = jax.jit(self._make_empty, static_argnums=(1, 2))
        self._apart = jax.jit(
            lambda blocks: take_apart(blocks, jax.tree.leaves(blocks)[0].shape[0])
        )
        self._draw = jax.jit(functools.partial(_draw_one, options))
        self._decode = alike(
            lambda params, layers, tokens, positions, cache: nnx.merge(graphdef, params).decode(
                tokens, positions, cache, layers
            ),
            donate_argnums=4,
        )

    def _make_empty(self, params: Any, window: int, rows: int) -> Slots:
        return empty_slots(nnx.merge(self._graphdef, params), self.options, window, rows)

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
        arch = nnx.merge(self._graphdef, params).arch
        check_request(self.options, arch, prompts, samples)
        check_memory(self.options, arch, prompts.tokens.shape[1])
        counters = jnp.asarray(step), jnp.asarray(round_)
        keys = stream_keys(key, *counters, jnp.asarray(prompts.positions), samples)
        params = self._cast(params)
        layers = self._apart(params["blocks"])
        count, windows = len(prompts.lengths), self._windows(prompts)
        size = min(count, max(1, math.ceil(POOL_PAIRS * self.options.slots / samples)))
        slots = None
        for first in range(0, count, size):
            pool = range(first, min(first + size, count))
            store = self._store(params, prompts, pool, size)
            more = pool.stop < count
            queue = _queue(pool, samples, size, np.asarray(keys), more=more)
            if slots is None:
                window = _fitting(windows, int(np.max(prompts.lengths)))
                slots = self._empty(params, window, count * samples)
            slots = dataclasses.replace(slots, taken=jnp.zeros((), jnp.int32))
            longest = int(np.max(prompts.lengths))
            slots = self._drain(params, layers, store, queue, slots, windows, longest)
        assert slots is not None
        groups = np.repeat(np.arange(count, dtype=np.int32), samples)
        return _assemble(prompts, groups, slots), self._stats(slots)

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
        while True:
            window = window_of(slots)
            # Two sizes down, or a response of a length in between would have it change to and fro.
            below = next((w for w in reversed(windows) if w <= window // 4), 0)
            narrow = jnp.asarray(below if below > prompt else -1, jnp.int32)
            slots = self._run(params, layers, store, queue, slots, narrow)
            live, position, taken = jax.device_get((slots.live, slots.position, slots.taken))
            end = int(np.max(position[live], initial=-1))
            free = not live.all() if queue.more else not live.any()
            if taken == queue.count and free and end < window:
                return slots
            slots = self._resize(slots, _fitting(windows, max(end + 1, prompt)))

    def _windows(self, prompts: Prompts) -> list[int]:
        """The widths that the cache may have, ascending."""
        widths = [prompts.tokens.shape[1] + self.options.max_response_length]
        while widths[-1] // 2 >= NARROWEST:
            widths.append(widths[-1] // 2)
        return widths[::-1]

    def _store(self, params: Any, prompts: Prompts, pool: range, size: int) -> Store:
        """Prefill the prompts of a pool, narrow ones beside narrow ones."""
        lengths = np.asarray(prompts.lengths)[pool]
        width = _doubled(int(np.max(prompts.lengths)), NARROWEST_PROMPT)
        padded = np.zeros((size, width), np.int32)
        own = np.asarray(prompts.tokens)[pool][:, :width]
        padded[: len(pool), : own.shape[1]] = own
        rows = max(1, min(size, PREFILL_TOKENS // width))
        parts = []
        for start in range(0, size, rows):
            some = np.zeros((rows, width), np.int32)
            chunk = padded[start : start + rows]
            some[: len(chunk)] = chunk
            parts.append(self._prefill(params, jnp.asarray(some)))
        cache = parts[0] if len(parts) == 1 else jax.tree.map(_join, *parts)
        last, full = np.zeros(size, np.int32), np.ones(size, np.int32)
        full[: len(pool)] = lengths
        last[: len(pool)] = padded[np.arange(len(pool)), lengths - 1]
        return Store(cache, jnp.asarray(last), jnp.asarray(full))

    def _stats(self, slots: Slots) -> RolloutStats:
        counts = jax.tree.map(int, slots.counts)
        ideal = ideal_steps(np.asarray(slots.lengths), self.options.slots)
        return RolloutStats(
            slot_steps=counts.slot_steps,
            useful_steps=counts.useful,
            slot_steps_queued=counts.slot_steps_queued,
            useful_steps_queued=counts.useful_queued,
            ideal_slot_steps=ideal * self.options.slots,
        )

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
        (raw_key,) = stream_keys(
            key, jnp.asarray(step), jnp.asarray(round_), jnp.asarray(prompts.positions), 1
        )
        length, params = int(prompts.lengths[0]), self._cast(params)
        layers = self._apart(params["blocks"])
        cache = self._prefill(params, jnp.asarray(prompts.tokens))
        room = prompts.tokens.shape[1] + self.options.max_response_length
        extra = max(room, cache_length or 0) - prompts.tokens.shape[1]
        cache = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, extra), (0, 0))), cache)
        token = jnp.asarray(prompts.tokens[:, length - 1])
        for count in range(self.options.max_response_length):
            position = jnp.asarray([length - 1 + count])
            logits, cache = self._decode(params, layers, token, position, cache)
            token = self._draw(logits, raw_key, jnp.asarray(count))
            yield int(token[0])
            if int(token[0]) in self.options.eos_ids:
                return


def _fitting(windows: list[int], tokens: int) -> int:
    """The narrowest that has room for one token more."""
    return windows[bisect.bisect_right(windows, tokens)]


def _join(*parts: Array) -> Array:
    return jnp.concatenate(parts)


def _doubled(least: int, first: int) -> int:
    """The first of first, 2·first, 4·first, … that is no smaller than `least`."""
    while first < least:
        first *= 2
    return first


def _queue(pool: range, samples: int, size: int, keys: np.ndarray, *, more: bool) -> Queue:
    """All samples of the prompts of a pool, prompts first."""
    pairs = np.arange(pool.start * samples, pool.stop * samples, dtype=np.int32)
    extra = (0, size * samples - len(pairs))
    return Queue(
        prompt=jnp.asarray(np.pad(pairs // samples - pool.start, extra)),
        row=jnp.asarray(np.pad(pairs, extra)),
        keys=jnp.asarray(np.pad(keys[pairs], (extra, (0, 0)))),
        count=jnp.asarray(len(pairs), jnp.int32),
        more=jnp.asarray(more),
    )


def _draw_one(
    options: SamplingOptions, logits: Array, key: UInt32[Array, " 2"], count: Array
) -> Array:
    """The next token of one response."""
    return sample(
        logits,
        uniforms(key[None], count[None]),
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
    )[0]


def _assemble(prompts: Prompts, groups: np.ndarray, out: Slots) -> Rollout:
    """Join prompts and responses into rows without padding between them."""
    response, counts = np.asarray(out.tokens), np.asarray(out.lengths)
    prompt_lengths = np.asarray(prompts.lengths)[groups]
    B, R = response.shape
    width = prompts.tokens.shape[1] + R
    at = np.arange(width)[None, :] - prompt_lengths[:, None]
    mask = (at >= 0) & (at < counts[:, None])
    index = np.clip(at, 0, R - 1)

    def placed(values: Array | None) -> np.ndarray | None:
        if values is None:
            return None
        return np.where(mask, np.take_along_axis(np.asarray(values), index, axis=1), np.float32(0))

    tokens = np.zeros((B, width), np.int32)
    tokens[:, : prompts.tokens.shape[1]] = np.asarray(prompts.tokens)[groups]
    tokens = np.where(at >= 0, np.take_along_axis(response, index, axis=1), tokens)
    logprobs = placed(out.logprobs)
    assert logprobs is not None
    return Rollout(
        tokens=np.where(at < counts[:, None], tokens, 0),
        prompt_lengths=prompt_lengths,
        lengths=(prompt_lengths + counts).astype(np.int32),
        loss_mask=mask,
        logprobs=logprobs,
        truncated=~np.asarray(out.ended),
        group_ids=groups,
        raw_logprobs=placed(out.raw_logprobs),
    )
