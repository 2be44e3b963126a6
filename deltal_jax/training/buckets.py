"""Ragged responses into a few padded shapes.

A bucket is a micro-batch of a fixed shape, so that each shape compiles once. Which row a response
falls into changes nothing but the padding: its weight was fixed before, segments are numbered over
the whole rollout, and gradients add. So the layout is free, and is the one that computes the fewest
tokens.
"""

import bisect
import dataclasses
from typing import Any

import numpy as np

from deltal_jax.types import Bucket, Rollout

#: A micro-batch may also have this part of the full number of rows: the last ones are rarely full.
ROW_FRACTIONS = (1, 2, 4)
#: What one more micro-batch costs beside its tokens, as a part of the token budget.
MICROBATCH_OVERHEAD = 1 / 16


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """The shape of a bucket, and the responses in each of its rows (fewer lists than rows: the rest
    is empty)."""

    rows: int
    width: int
    members: list[list[int]]


def bucket_rows(edge: int, tokens_per_microbatch: int, row_multiple: int = 1) -> int:
    """Rows of a full micro-batch of width `edge`: the token budget, but at least `row_multiple`."""
    rows = tokens_per_microbatch // edge
    return max(rows - rows % row_multiple, row_multiple)


def bucket_layout(
    lengths: np.ndarray,
    edges: tuple[int, ...],
    tokens_per_microbatch: int,
    *,
    pack: bool = False,
    row_multiple: int = 1,
    attention: float = 0.0,
) -> list[MicroBatch]:
    """The micro-batches that hold rows of these lengths with the least work.

    Rows are ordered by length and cut into micro-batches by dynamic programming over their shapes:
    a width, and a number of rows (a full micro-batch, or a fraction in ROW_FRACTIONS), which is a
    multiple of `row_multiple`, the devices that they are split over. The work of a micro-batch is
    rows · width · (1 + attention · width), and MICROBATCH_OVERHEAD of the budget; `attention` is
    what each column of a row adds to a token's work (`model.architecture.attention_work`). The sum
    is the least of all ways to put the rows into such shapes.

    `pack` puts several responses into a row, longest first, each into the fullest row that still
    has room; how wide the rows of all but the longest responses are is what costs least. Raises
    ValueError if a length fits no edge.
    """
    if len(lengths) == 0:
        return []
    width = _edge(int(np.max(lengths)), edges)
    order = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    if pack:
        narrow = [edge for edge in edges if edge <= width]
        choices = [_pack(lengths, order, width, edge) for edge in reversed(narrow)]
    else:
        choices = [[[index] for index in order]]
    options = (lengths, edges, tokens_per_microbatch, row_multiple, attention)
    return min((_cut(rows, *options) for rows in choices), key=lambda found: found[0])[1]


def _cut(
    packed: list[list[int]],
    lengths: np.ndarray,
    edges: tuple[int, ...],
    tokens_per_microbatch: int,
    row_multiple: int,
    attention: float,
) -> tuple[float, list[MicroBatch]]:
    """The cheapest micro-batches of these rows, with their cost."""
    fills = [int(sum(lengths[index] for index in row)) for row in packed]
    order = sorted(range(len(packed)), key=lambda row: -fills[row])
    packed, fills = [packed[row] for row in order], [fills[row] for row in order]
    # A wider edge than need be is tried too: its fractions may hold the rest in fewer tokens. With
    # every shape open and rows in order, part-filled micro-batches before the last gain nothing.
    full = {edge: bucket_rows(edge, tokens_per_microbatch, row_multiple) for edge in edges}
    shapes = {
        (bucket_rows(1, rows // part, row_multiple), edge)
        for edge, rows in full.items()
        for part in ROW_FRACTIONS
    }
    shapes = sorted(shapes, key=lambda shape: (shape[1], shape[0]))
    overhead = tokens_per_microbatch * MICROBATCH_OVERHEAD
    cost, back = [0.0] + [np.inf] * len(packed), [(0, 0, 0)] * (len(packed) + 1)
    for start, fill in enumerate(fills):
        for rows, edge in shapes:
            end = min(start + rows, len(packed))
            total = cost[start] + rows * edge * (1 + attention * edge) + overhead
            if edge >= fill and total < cost[end]:
                cost[end], back[end] = total, (start, rows, edge)
    batches, end = [], len(packed)
    while end > 0:
        start, rows, edge = back[end]
        batches.append(MicroBatch(rows, edge, packed[start:end]))
        end = start
    return cost[-1], batches


def make_buckets(
    rollout: Rollout,
    indices: np.ndarray,
    *,
    advantages: np.ndarray,
    weights: np.ndarray,
    auxiliary_weights: np.ndarray | None = None,
    old_logprobs: np.ndarray | None = None,
    reference_logprobs: np.ndarray | None = None,
    edges: tuple[int, ...],
    tokens_per_microbatch: int,
    pack: bool = False,
    row_multiple: int = 1,
    attention: float = 0.0,
) -> list[Bucket]:
    """The responses `indices` of a rollout as micro-batches in host memory, shortest first.

    Weights and advantages, Float[B], and log-probabilities, Float[B T], are those of the whole
    rollout; `old_logprobs` are the sampler's by default. The other options are those of
    `bucket_layout`. Raises ValueError if a row fits no edge.
    """
    indices = np.asarray(indices)
    layout = bucket_layout(
        np.asarray(rollout.lengths)[indices],
        edges,
        tokens_per_microbatch,
        pack=pack,
        row_multiple=row_multiple,
        attention=attention,
    )
    per_response: dict[str, Any] = dict(
        advantages=advantages,
        weights=weights,
        auxiliary_weights=weights if auxiliary_weights is None else auxiliary_weights,
    )
    per_token = dict(
        tokens=rollout.tokens,
        loss_mask=rollout.loss_mask,
        sampler_logprobs=rollout.logprobs,
        old_logprobs=rollout.logprobs if old_logprobs is None else old_logprobs,
    )
    if reference_logprobs is not None:
        per_token["reference_logprobs"] = reference_logprobs
    buckets = []
    for batch in layout:
        members = [[int(indices[i]) for i in row] for row in batch.members]
        batch = dataclasses.replace(batch, members=members)
        arrays: dict[str, Any] = _fill(rollout.lengths, batch, per_token)
        buckets.append(Bucket(**arrays, **per_response))
    return buckets


def make_minibatches(
    rollout: Rollout,
    minibatch_ids: np.ndarray,
    *,
    advantages: np.ndarray,
    weights: np.ndarray,
    auxiliary_weights: np.ndarray,
    factor: float | None = None,
    **options: Any,
) -> list[list[Bucket]]:
    """The micro-batches of each optimizer update, in order.

    The weights of a mini-batch are multiplied by `factor`, by default B / B_mb, so that its loss
    estimates that of the whole batch (the scaling that objective/aggregation.py states). `options`
    are those of `make_buckets`.
    """
    minibatches = []
    for number in np.unique(minibatch_ids):
        indices = np.flatnonzero(minibatch_ids == number)
        share = minibatch_share(minibatch_ids, number, factor)
        minibatches.append(
            make_buckets(
                rollout,
                indices,
                advantages=advantages,
                weights=weights * np.float32(share),
                auxiliary_weights=auxiliary_weights * np.float32(share),
                **options,
            )
        )
    return minibatches


def pad_width(bucket: Bucket, multiple: int) -> Bucket:
    """The bucket with its rows padded to a multiple of so many tokens: what devices that share the
    tokens of a row need. Padding belongs to segment B, as all of it."""
    extra = -bucket.tokens.shape[1] % multiple
    if not extra:
        return bucket

    def pad(name: str, values: Any) -> Any:
        filled = len(bucket.weights) if name == "segment_ids" else 0
        return np.pad(values, ((0, 0), (0, extra)), constant_values=filled)

    fields = {field.name: getattr(bucket, field.name) for field in dataclasses.fields(bucket)}
    rows = {name: x for name, x in fields.items() if x is not None and x.ndim == 2}
    return dataclasses.replace(bucket, **{name: pad(name, x) for name, x in rows.items()})


def minibatch_share(minibatch_ids: np.ndarray, number: int, factor: float | None) -> float:
    """What multiplies the weights of the responses of a mini-batch: `factor`, or B / B_mb."""
    if factor is not None:
        return factor
    return len(minibatch_ids) / int(np.sum(minibatch_ids == number))


def padding_fraction(buckets: list[Bucket]) -> float:
    """The share of computed tokens that belong to no response."""
    computed = sum(bucket.tokens.size for bucket in buckets)
    real = sum(int(np.sum(bucket.segment_ids < len(bucket.weights))) for bucket in buckets)
    return 1.0 - real / max(computed, 1)


def _edge(length: int, edges: tuple[int, ...]) -> int:
    at = bisect.bisect_left(edges, length)
    if at == len(edges):
        raise ValueError(f"a row of {length} tokens fits no bucket of {edges}")
    return edges[at]


def _pack(lengths: np.ndarray, order: list[int], width: int, narrow: int) -> list[list[int]]:
    """Best-fit decreasing: rows of responses, of at most `narrow` tokens or, if they begin with a
    longer response, `width`."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), ascending
    for index in order:
        need = int(lengths[index])
        at = bisect.bisect_left(room, (need, -1))
        if at == len(room):
            free, row = width if need > narrow else narrow, len(rows)
            rows.append([])
        else:
            free, row = room.pop(at)
        rows[row].append(index)
        bisect.insort(room, (free - need, row))
    return rows


def _fill(
    lengths: np.ndarray, batch: MicroBatch, per_token: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The arrays of one micro-batch; padding belongs to segment B, which does not exist."""
    shape = (batch.rows, batch.width)
    arrays = {name: np.zeros(shape, values.dtype) for name, values in per_token.items()}
    arrays["positions"] = np.zeros(shape, np.int32)
    arrays["segment_ids"] = np.full(shape, len(lengths), np.int32)
    for row, members in enumerate(batch.members):
        start = 0
        for index in members:
            length = int(lengths[index])
            there = (row, slice(start, start + length))
            for name, values in per_token.items():
                arrays[name][there] = values[index, :length]
            arrays["positions"][there] = np.arange(length)
            arrays["segment_ids"][there] = index
            start += length
    return arrays
