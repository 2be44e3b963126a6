"""Responses: before anything is sampled, between two times of sampling, and as a rollout."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from deltal_jax.rollout.base import Finished
from deltal_jax.rollout.sampling import stream_keys
from deltal_jax.rollout.schedule import RolloutStats, ideal_steps
from deltal_jax.rollout.slots import Counts, SamplingOptions, Slots
from deltal_jax.types import Prompts, Responses, Rollout

_keys = jax.jit(stream_keys, static_argnums=4)
#: Rows that are read at once, while others are sampled: of one number, for one compiled program.
READ_ROWS = 16
#: Fields of `Responses` that sampling adds to.
SAMPLED = ("tokens", "logprobs", "raw_logprobs", "lengths", "ended")


@dataclasses.dataclass(frozen=True)
class Written:
    """What the slots have written, in host memory: fields of `Slots`."""

    tokens: np.ndarray
    logprobs: np.ndarray
    raw_logprobs: np.ndarray | None
    lengths: np.ndarray
    ended: np.ndarray
    counts: Counts


class Teller:
    """Tells `finished` of each response that has ended, once.

    Row i of the results is the response rows[i], or nobody's where that is -1. `ended(slots)` says
    which rows have ended, `read(slots, rows)` gives the tokens and lengths of some.
    """

    def __init__(
        self,
        finished: Finished,
        responses: Responses,
        rows: Int[np.ndarray, " n"],
        ended: Callable[[Slots], Array],
        read: Callable[[Slots, np.ndarray], tuple[Array, Array]],
    ):
        self._finished, self._responses, self._rows = finished, responses, rows
        self._ended, self._read, self._open = ended, read, rows >= 0

    def __call__(self, slots: Slots) -> None:
        """Tell of those that have ended since the last call."""
        ended = np.flatnonzero(self._open & np.asarray(self._ended(slots)))
        self._open[ended] = False
        for first in range(0, len(ended), READ_ROWS):
            some = ended[first : first + READ_ROWS]
            padded = np.resize(some, READ_ROWS)
            tokens, lengths = (np.asarray(x) for x in self._read(slots, padded))
            for row, new, length in zip(self._rows[some], tokens, lengths, strict=False):
                before = self._responses.tokens[row, : self._responses.lengths[row]]
                self._finished(int(row), np.concatenate([before, new[len(before) : length]]))


def begin(
    options: SamplingOptions,
    prompts: Prompts,
    key: Array,
    *,
    samples: int,
    step: int = 0,
    round_: int = 0,
) -> Responses:
    """`samples` responses to each prompt, in prompt order, of which nothing is sampled yet."""
    groups = np.repeat(np.arange(len(prompts.lengths), dtype=np.int32), samples)
    counters = jnp.asarray(step), jnp.asarray(round_), jnp.asarray(prompts.positions)
    zeros = np.zeros((len(groups), options.max_response_length), np.float32)
    return Responses(
        prompts=prompts,
        group_ids=groups,
        keys=np.asarray(_keys(key, *counters, samples), np.uint32),
        tokens=zeros.astype(np.int32),
        logprobs=zeros,
        lengths=np.zeros(len(groups), np.int32),
        ended=np.zeros(len(groups), bool),
        raw_logprobs=zeros if options.raw_logprobs else None,
    )


def take(responses: Responses, groups: Int[np.ndarray, " n"]) -> Responses:
    """Those to the prompts of these rows, in this order."""
    rows = [np.flatnonzero(responses.group_ids == group) for group in groups]
    kept = np.concatenate([np.zeros(0, int), *rows])
    ids = [np.full(len(of_group), i, np.int32) for i, of_group in enumerate(rows)]
    prompts = jax.tree.map(lambda x: np.asarray(x)[groups], responses.prompts)
    part = jax.tree.map(lambda x: x[kept], dataclasses.replace(responses, prompts=None))
    return dataclasses.replace(
        part, prompts=prompts, group_ids=np.concatenate([np.zeros(0, np.int32), *ids])
    )


def join(first: Responses, second: Responses) -> Responses:
    """Those of both, the first's before the second's."""
    count = np.int32(len(first.prompts.lengths))
    after = dataclasses.replace(second, group_ids=second.group_ids + count)
    return jax.tree.map(lambda a, b: np.concatenate([a, b]), first, after)


def merge(responses: Responses, rows: Int[np.ndarray, " n"], written: Written) -> Responses:
    """The responses with the tokens that were sampled now: row i of `written` has those of the
    response rows[i], each in its place; a length of 0 means that it did not begin. A row of -1 is
    nobody's."""
    there = np.flatnonzero((rows >= 0) & (written.lengths > 0))
    rows = rows[there]
    sampled = np.arange(responses.tokens.shape[1]) >= responses.lengths[rows, None]
    changed = {}
    for name in SAMPLED:
        old, new = getattr(responses, name), getattr(written, name)
        if old is None:
            continue
        values = new[there]
        changed[name] = old.copy()
        changed[name][rows] = np.where(sampled, values, old[rows]) if old.ndim > 1 else values
    return dataclasses.replace(responses, **changed)


def stats(written: Written, new_tokens: Int[np.ndarray, " n"], slots: int) -> RolloutStats:
    """How full so many slots were for responses that grew by so many tokens."""
    counts = jax.tree.map(lambda x: int(np.sum(x)), written.counts)
    return RolloutStats(
        slot_steps=counts.slot_steps,
        useful_steps=counts.useful,
        slot_steps_queued=counts.slot_steps_queued,
        useful_steps_queued=counts.useful_queued,
        ideal_slot_steps=ideal_steps(new_tokens, slots) * slots,
    )


def assemble(responses: Responses) -> Rollout:
    """Join prompts and responses into rows without padding between them."""
    prompts, groups, counts = responses.prompts, responses.group_ids, responses.lengths
    prompt_lengths = np.asarray(prompts.lengths)[groups]
    R = responses.tokens.shape[1]
    width = prompts.tokens.shape[1] + R
    at = np.arange(width)[None, :] - prompt_lengths[:, None]
    mask = (at >= 0) & (at < counts[:, None])
    index = np.clip(at, 0, R - 1)

    def placed(values: np.ndarray) -> np.ndarray:
        return np.where(mask, np.take_along_axis(values, index, axis=1), np.float32(0))

    tokens = np.zeros((len(groups), width), np.int32)
    tokens[:, : prompts.tokens.shape[1]] = np.asarray(prompts.tokens)[groups]
    tokens = np.where(at >= 0, np.take_along_axis(responses.tokens, index, axis=1), tokens)
    raw = responses.raw_logprobs
    return Rollout(
        tokens=np.where(at < counts[:, None], tokens, 0),
        prompt_lengths=prompt_lengths,
        lengths=(prompt_lengths + counts).astype(np.int32),
        loss_mask=mask,
        logprobs=placed(responses.logprobs),
        truncated=~responses.ended,
        group_ids=groups,
        raw_logprobs=None if raw is None else placed(raw),
    )
