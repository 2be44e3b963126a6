"""The compiled part of sampling: slots that decode in lock step and are refilled as responses end.

A pure function of its state: `run` admits (prompt, sample) pairs from a queue into free slots,
decodes until the host has something to do, and returns. A response begins with the last token of
its prompt, whose other tokens are in the prompt's prefilled cache, so that each of its tokens comes
from one decoding step. One that was begun before has its first tokens there too.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt32

from deltal_jax.model.cache import Cache, resized, time_of, write_row
from deltal_jax.model.transformer import Layers
from deltal_jax.rollout.sampling import sample, uniforms


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How responses are drawn; static for the compiled program."""

    slots: int
    max_response_length: int
    eos_ids: tuple[int, ...]
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    #: Also keep log-probabilities under softmax(logits), whatever temperature and filters are.
    raw_logprobs: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """The parameters as sampling reads them: see `transformer.take_apart`."""

    params: Any
    layers: Layers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Store:
    """Prefilled prompts."""

    cache: Cache  # time is the width of the widest
    last: Int[Array, " Q"]  # last token of each
    lengths: Int[Array, " Q"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Queue:
    """(Prompt, sample) pairs in the order in which they begin."""

    prompt: Int[Array, " N"]  # row of the store
    row: Int[Array, " N"]  # row of the results
    keys: UInt32[Array, "N 2"]
    begun: Int[Array, " N"]  # response tokens that are in the store already
    count: Int[Array, " 1"]  # pairs; what follows them is padding
    needed: Int[Array, " 1"]  # rows of the results, from the first on, that must be finished
    more: Bool[Array, " 1"]  # whether another queue comes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counts:
    """Decoded slot-steps and those that gave a token; of all, and while pairs were waiting."""

    slot_steps: Int[Array, " 1"]
    useful: Int[Array, " 1"]
    slot_steps_queued: Int[Array, " 1"]
    useful_queued: Int[Array, " 1"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """What each slot holds, and what has been written. A slot is free where it is not live.

    Every array has a first axis that devices may split, counters one of length 1 a device.
    """

    row: Int[Array, " S"]  # of the results
    keys: UInt32[Array, "S 2"]
    token: Int[Array, " S"]  # last token, not yet in the cache
    position: Int[Array, " S"]  # its position in the sequence
    count: Int[Array, " S"]  # response tokens so far
    live: Bool[Array, " S"]
    cache: Cache
    taken: Int[Array, " 1"]  # pairs of the queue that have begun
    owed: Int[Array, " 1"]  # responses that must be finished and are not
    counts: Counts
    tokens: Int[Array, "B R"]
    logprobs: Float[Array, "B R"]
    raw_logprobs: Float[Array, "B R"] | None
    lengths: Int[Array, " B"]
    ended: Bool[Array, " B"]


def empty_slots(
    model: Any, options: SamplingOptions, window: int, rows: int, shards: int = 1
) -> Slots:
    """All slots free, with room for `window` tokens each; results of `rows` responses. `shards` is
    the number of devices that slots and results are split over."""
    S, R = options.slots, options.max_response_length
    zeros, zero = jnp.zeros(S, jnp.int32), jnp.zeros(shards, jnp.int32)
    results = jnp.zeros((rows, R), jnp.float32)
    return Slots(
        row=zeros,
        keys=jnp.zeros((S, 2), jnp.uint32),
        token=zeros,
        position=zeros,
        count=zeros,
        live=jnp.zeros(S, bool),
        cache=model.empty_cache(S, window),
        taken=zero,
        owed=zero,
        counts=Counts(zero, zero, zero, zero),
        tokens=jnp.zeros((rows, R), jnp.int32),
        logprobs=results,
        raw_logprobs=results if options.raw_logprobs else None,
        lengths=jnp.zeros(rows, jnp.int32),
        ended=jnp.zeros(rows, bool),
    )


def prefill(graphdef: nnx.GraphDef, weights: Weights, tokens: Int[Array, "Q T"]) -> Cache:
    """The cache of prompts, padded on the right."""
    return nnx.merge(graphdef, weights.params).prefill(tokens, weights.layers)


def window_of(slots: Slots) -> int:
    """Tokens that the cache of a slot has room for."""
    return time_of(slots.cache)


def resize(slots: Slots, window: int) -> Slots:
    """The slots with room for `window` tokens each: at least those of the longest live one."""
    return dataclasses.replace(slots, cache=resized(slots.cache, window))


def compact(slots: Slots, size: int) -> Slots:
    """The live slots, at most `size`, among so many: those that will not be used again are left
    out."""
    kept = jnp.argsort(~slots.live, stable=True)[:size]
    own = ("row", "keys", "token", "position", "count", "live", "cache")
    parts = {name: jax.tree.map(lambda x: x[kept], getattr(slots, name)) for name in own}
    return dataclasses.replace(slots, **parts)


def run(
    graphdef: nnx.GraphDef,
    options: SamplingOptions,
    weights: Weights,
    store: Store,
    queue: Queue,
    slots: Slots,
    narrow: Int[Array, ""],
    few: Int[Array, ""],
    steps: Int[Array, ""],
    *,
    alone: bool = True,
    split: bool = False,
) -> Slots:
    """Decode until the host has something to do: a live slot has no room for its next token; all
    live ones would fit in `narrow` tokens; a slot is free, the queue is empty and more comes; no
    more comes and at most `few` slots are live; all is done; or so many `steps` are, if that is not
    0. A device that is `alone` also ends where nothing is owed; on a mesh others may owe more.

    Where the vocabulary is `split` over devices, logits are gathered before a token is drawn: what
    the compiler would make of a draw from parts has ten collectives a token, one of which waits for
    all devices on CPU, also for those whose loop has ended."""
    model = nnx.merge(graphdef, weights.params)
    window = window_of(slots)
    before = slots.counts.slot_steps[0] // slots.live.shape[0]
    turns = model.turns(window)

    def waiting(slots: Slots) -> Array:
        return slots.taken[0] < queue.count[0]

    def fits(slots: Slots) -> Array:
        end = _longest(slots)
        last = ~(waiting(slots) | queue.more[0])
        many = ~last | (jnp.sum(slots.live) > few)
        done = slots.counts.slot_steps[0] // slots.live.shape[0] - before
        on = (steps == 0) | (done < steps)
        if alone:
            on &= slots.owed[0] > 0
        return on & (end < window) & (((end >= narrow) & many) | ~jnp.any(slots.live))

    def decodable(slots: Slots) -> Array:
        """Whether to decode once more: no slot is free, or nothing is there to fill it with."""
        full = jnp.all(slots.live)
        return jnp.any(slots.live) & (full | ~(waiting(slots) | queue.more[0])) & fits(slots)

    def step(slots: Slots) -> Slots:
        logits, cache = model.decode(
            slots.token, slots.position, slots.cache, weights.layers, turns
        )
        if split:
            logits = jax.lax.with_sharding_constraint(logits, PartitionSpec())
        slots = dataclasses.replace(slots, cache=cache)
        return _record(options, queue, slots, logits, waiting(slots))

    def turn(slots: Slots) -> Slots:
        return jax.lax.while_loop(decodable, step, _admit(store, queue, slots))

    def goes_on(slots: Slots) -> Array:
        free = ~jnp.all(slots.live)
        return fits(slots) & ((waiting(slots) & free) | decodable(slots))

    return jax.lax.while_loop(goes_on, turn, slots)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Status:
    """What the host needs to know: how long the longest live response is, and whether all that can
    be done with this queue is."""

    longest: Int[Array, ""]  # position of its next token; -1 where none is live
    live: Int[Array, ""]  # of the device that has most
    last: Bool[Array, ""]  # whether nothing is left to begin
    owed: Int[Array, ""]  # responses that must be finished and are not
    drained: Bool[Array, ""]
    paused: Bool[Array, ""]  # whether a device may have ended for the limit of steps alone


def status_of(
    queue: Queue, slots: Slots, before: Int[Array, " D"], steps: Int[Array, ""]
) -> Status:
    """Of the slots of all D devices together, after a run of at most so many steps; `before`: their
    slot-steps when it began."""
    shards = slots.taken.shape[0]
    live = slots.live.reshape(shards, -1)
    taken = slots.taken >= queue.count
    done = jnp.where(queue.more, ~jnp.all(live, axis=1), ~jnp.any(live, axis=1))
    return Status(
        longest=_longest(slots),
        live=jnp.max(jnp.sum(live, axis=1)),
        last=jnp.all(taken & ~queue.more),
        owed=jnp.sum(slots.owed),
        drained=jnp.all(taken & done),
        paused=(steps > 0) & jnp.any(slots.counts.slot_steps - before == steps * live.shape[1]),
    )


def finished_rows(options: SamplingOptions, slots: Slots) -> Bool[Array, " B"]:
    """Which rows of the results are complete responses."""
    return slots.ended | (slots.lengths >= options.max_response_length)


def _longest(slots: Slots) -> Int[Array, ""]:
    """Position of the next token of the longest live response; -1 where none is live."""
    return jnp.max(jnp.where(slots.live, slots.position, -1))


def _admit(store: Store, queue: Queue, slots: Slots) -> Slots:
    """Each free slot takes the next pair of the queue, with its prompt's cache."""
    candidate = slots.taken[0] + jnp.cumsum(~slots.live) - 1
    fresh = ~slots.live & (candidate < queue.count[0])
    pair = jnp.where(fresh, candidate, 0)
    prompt = queue.prompt[pair]
    first = jnp.argsort(~fresh, stable=True)  # the fresh slots, then the others
    count = jnp.sum(fresh, dtype=jnp.int32)

    def copy(i: Array, cache: Cache) -> Cache:
        return write_row(cache, first[i], store.cache, prompt[first[i]])

    def take(new: Array, old: Array) -> Array:
        return jnp.where(fresh[:, None] if old.ndim > 1 else fresh, new, old)

    return dataclasses.replace(
        slots,
        row=take(queue.row[pair], slots.row),
        keys=take(queue.keys[pair], slots.keys),
        token=take(store.last[prompt], slots.token),
        position=take(store.lengths[prompt] - 1, slots.position),
        count=take(queue.begun[pair], slots.count),
        live=slots.live | fresh,
        cache=jax.lax.fori_loop(0, count, copy, slots.cache),
        taken=slots.taken + count,
    )


def _record(
    options: SamplingOptions,
    queue: Queue,
    slots: Slots,
    logits: Float[Array, "S V"],
    queued: Bool[Array, ""],
) -> Slots:
    """Draw a token for each live slot and write it down; a slot that ends becomes free."""
    drawn, logprob = draw(options, logits, slots.keys, slots.count)
    rows = jnp.where(slots.live, slots.row, slots.tokens.shape[0])  # out of range: dropped
    at = (rows, slots.count)
    is_end = jnp.isin(drawn, jnp.asarray(options.eos_ids, jnp.int32))
    count = jnp.where(slots.live, slots.count + 1, slots.count)
    raw = slots.raw_logprobs
    if raw is not None:
        chosen = jnp.take_along_axis(logits, drawn[:, None], axis=-1)[:, 0]
        raw = raw.at[at].set(chosen - jax.nn.logsumexp(logits, axis=-1), mode="drop")
    live = slots.live & ~is_end & (count < options.max_response_length)
    paid = slots.live & ~live & (slots.row < queue.needed[0])
    return dataclasses.replace(
        slots,
        token=jnp.where(slots.live, drawn, slots.token),
        position=jnp.where(slots.live, slots.position + 1, slots.position),
        count=count,
        live=live,
        owed=slots.owed - jnp.sum(paid, dtype=jnp.int32),
        counts=_counted(slots, queued),
        tokens=slots.tokens.at[at].set(drawn, mode="drop"),
        logprobs=slots.logprobs.at[at].set(logprob, mode="drop"),
        raw_logprobs=raw,
        lengths=slots.lengths.at[rows].set(count, mode="drop"),
        ended=slots.ended.at[rows].set(is_end, mode="drop"),
    )


def draw(
    options: SamplingOptions,
    logits: Float[Array, "S V"],
    keys: UInt32[Array, "S 2"],
    counts: Int[Array, " S"],
) -> tuple[Int[Array, " S"], Float[Array, " S"]]:
    """The next token of each response, of which it has so many, and its log-probability."""
    return sample(
        logits,
        uniforms(keys, counts),
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
    )


def _counted(slots: Slots, queued: Bool[Array, ""]) -> Counts:
    counts, useful = slots.counts, jnp.sum(slots.live, dtype=jnp.int32)
    steps = jnp.asarray(slots.live.shape[0], jnp.int32)
    return Counts(
        counts.slot_steps + steps,
        counts.useful + useful,
        counts.slot_steps_queued + jnp.where(queued, steps, 0),
        counts.useful_queued + jnp.where(queued, useful, 0),
    )
