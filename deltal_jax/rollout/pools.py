"""Which responses each device samples, and in which order: pools of sequences to prefill.

A response that has not begun continues its prompt, and shares the prefilled cache of that with the
others of its group. One that was begun before continues a sequence of its own, prompt and tokens so
far. NumPy alone.
"""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int, UInt32

from deltal_jax.types import Responses

#: Responses that a pool has for each slot: enough to be decoding most of the time.
POOL_PAIRS = 4
#: Sequences are prefilled in widths that double, from this on.
NARROWEST_PROMPT = 32


@dataclasses.dataclass(frozen=True)
class Pool:
    """Sequences that are prefilled together, and the responses that continue them, for each of D
    devices. Those that are not there have length 1 and token 0."""

    tokens: Int[np.ndarray, "D Q T"]
    lengths: Int[np.ndarray, "D Q"]
    #: Of each response: its sequence, its row among the device's results, its tokens so far.
    sequence: Int[np.ndarray, "D N"]
    row: Int[np.ndarray, "D N"]
    begun: Int[np.ndarray, "D N"]
    keys: UInt32[np.ndarray, "D N 2"]
    #: How many responses there are; what follows them is padding.
    counts: Int[np.ndarray, " D"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The unfinished responses of a batch, dealt out to devices."""

    #: Response of each row of a device's results, in prompt order; -1: none.
    rows: Int[np.ndarray, "D n"]
    #: How many of them, from the first on, must be finished before sampling may end.
    needed: Int[np.ndarray, " D"]
    pools: list[Pool]


def make_plan(responses: Responses, needed: int, devices: int, slots: int, room: int = 0) -> Plan:
    """Deal the prompts out in turn, to devices with so many slots each. `needed` is how many
    prompts, from the first on, must be answered. Arrays are as large as for `room` prompts, if
    these are more."""
    count = len(responses.prompts.lengths)
    each = math.ceil(max(count, room) / devices)
    samples = int(np.max(np.bincount(responses.group_ids, minlength=count)))
    owner, unfinished = responses.group_ids % devices, ~responses.finished
    owned = [np.flatnonzero(unfinished & (owner == device)) for device in range(devices)]
    rows = np.full((devices, each * samples), -1, np.int32)  # one shape, whatever is finished
    for device, own in enumerate(owned):
        rows[device, : len(own)] = own
    must = [int(np.sum(responses.group_ids[own] < needed)) for own in owned]
    begun = responses.lengths > 0
    carried = [list(own[begun[own], None]) for own in owned]
    fresh = [_grouped(own[~begun[own]], responses.group_ids) for own in owned]
    most = max(1, int(POOL_PAIRS * slots))
    some = doubled(max(len(sequences) for sequences in carried), 1)
    pools = [
        *_pools(responses, rows, carried, min(some, most), 1),
        *_pools(responses, rows, fresh, pool_prompts(each, slots, samples), samples),
    ]
    return Plan(rows, np.asarray(must, np.int32), pools)


def _grouped(own: np.ndarray, group_ids: np.ndarray) -> list[np.ndarray]:
    """Rows apart by group."""
    parts = np.split(own, np.flatnonzero(np.diff(group_ids[own])) + 1)
    return [part for part in parts if len(part)]  # of no rows, split makes one part


def _pools(
    responses: Responses,
    rows: Int[np.ndarray, "D n"],
    sequences: list[list[np.ndarray]],
    size: int,
    samples: int,
) -> Iterator[Pool]:
    """Pools of `size` sequences with up to `samples` responses each; `sequences` has, for each
    device, the responses that continue one."""
    longest = max(len(own) for own in sequences)
    for first in range(0, longest, size):
        parts = [own[first : first + size] for own in sequences]
        yield _pool(responses, rows, parts, size, samples)


def _pool(
    responses: Responses,
    rows: Int[np.ndarray, "D n"],
    parts: list[list[np.ndarray]],
    size: int,
    samples: int,
) -> Pool:
    prompts, D = responses.prompts, len(parts)
    lengths = np.ones((D, size), np.int32)
    tokens = np.zeros((D, size, responses.tokens.shape[1] + prompts.tokens.shape[1]), np.int32)
    chosen, sequence = (np.zeros((D, size * samples), np.int32) for _ in range(2))
    counts = np.zeros(D, np.int32)
    for device, own in enumerate(parts):
        for number, continuing in enumerate(own):
            row = continuing[0]
            prompt = responses.group_ids[row]
            length, begun = int(prompts.lengths[prompt]), int(responses.lengths[row])
            tokens[device, number, :length] = prompts.tokens[prompt, :length]
            tokens[device, number, length : length + begun] = responses.tokens[row, :begun]
            lengths[device, number] = length + begun
            at = slice(counts[device], counts[device] + len(continuing))
            chosen[device, at], sequence[device, at] = continuing, number
            counts[device] += len(continuing)
    local = np.stack(
        [np.searchsorted(own[own >= 0], pick) for own, pick in zip(rows, chosen, strict=True)]
    )
    return Pool(
        tokens=tokens[:, :, : lengths.max()],
        lengths=lengths,
        sequence=sequence,
        row=local.astype(np.int32),
        begun=responses.lengths[chosen],
        keys=responses.keys[chosen],
        counts=counts,
    )


def pool_prompts(prompts: int, slots: int, samples: int) -> int:
    """How many of a device's prompts are prefilled together, for so many samples each."""
    return min(prompts, math.ceil(POOL_PAIRS * slots / samples))


def doubled(least: int, first: int) -> int:
    """The first of first, 2·first, 4·first, … that is no smaller than `least`."""
    while first < least:
        first *= 2
    return first
