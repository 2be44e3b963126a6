"""Ragged responses into a few padded shapes.

A bucket is a micro-batch of a fixed shape, so that each shape compiles once. Which bucket a
response falls into changes nothing but the padding: its weight was fixed before, and gradients add.
"""

import bisect

import jax.numpy as jnp
import numpy as np

from deltal_jax.types import Bucket, Rollout


def bucket_rows(edge: int, tokens_per_microbatch: int) -> int:
    """Rows of a micro-batch of width `edge`: the token budget, but at least one row."""
    return max(1, tokens_per_microbatch // edge)


def make_buckets(
    rollout: Rollout,
    indices: np.ndarray,
    *,
    advantages: np.ndarray,
    weights: np.ndarray,
    old_logprobs: np.ndarray,
    edges: tuple[int, ...],
    tokens_per_microbatch: int,
) -> list[Bucket]:
    """The responses `indices` of a rollout as micro-batches, shortest bucket first.

    A response goes to the smallest edge that holds prompt and response; rows keep the rollout's
    order. Raises ValueError if one fits no edge.
    """
    lengths = np.asarray(rollout.lengths)
    by_edge: dict[int, list[int]] = {}
    for index in indices:
        at = bisect.bisect_left(edges, lengths[index])
        if at == len(edges):
            raise ValueError(f"a row of {lengths[index]} tokens fits no bucket of {edges}")
        by_edge.setdefault(edges[at], []).append(int(index))
    buckets = []
    for edge, members in sorted(by_edge.items()):
        rows = bucket_rows(edge, tokens_per_microbatch)
        for start in range(0, len(members), rows):
            chosen = np.asarray(members[start : start + rows])
            buckets.append(_pad(rollout, chosen, (rows, edge), advantages, weights, old_logprobs))
    return buckets


def make_minibatches(
    rollout: Rollout,
    minibatch_ids: np.ndarray,
    *,
    advantages: np.ndarray,
    weights: np.ndarray,
    edges: tuple[int, ...],
    tokens_per_microbatch: int,
) -> list[list[Bucket]]:
    """The micro-batches of each optimizer update, in order.

    The weights of a mini-batch are multiplied by B / B_mb, so that its loss estimates that of the
    whole batch (the scaling that objective/aggregation.py states). `old_logprobs` are the
    sampler's.
    """
    count = len(minibatch_ids)
    minibatches = []
    for number in np.unique(minibatch_ids):
        indices = np.flatnonzero(minibatch_ids == number)
        minibatches.append(
            make_buckets(
                rollout,
                indices,
                advantages=advantages,
                weights=weights * np.float32(count / len(indices)),
                old_logprobs=rollout.logprobs,
                edges=edges,
                tokens_per_microbatch=tokens_per_microbatch,
            )
        )
    return minibatches


def padding_fraction(buckets: list[Bucket]) -> float:
    """The share of computed tokens that belong to no response."""
    computed = sum(bucket.tokens.size for bucket in buckets)
    real = sum(int(np.sum(bucket.segment_ids < len(bucket.weights))) for bucket in buckets)
    return 1.0 - real / max(computed, 1)


def _pad(
    rollout: Rollout,
    chosen: np.ndarray,
    shape: tuple[int, int],
    advantages: np.ndarray,
    weights: np.ndarray,
    old_logprobs: np.ndarray,
) -> Bucket:
    rows, width = shape

    def fit(values: np.ndarray) -> np.ndarray:
        values = np.asarray(values)
        out = np.zeros((rows, *values.shape[1:]), values.dtype)
        out[: len(chosen)] = values[chosen]
        if values.ndim == 1:
            return out
        if values.shape[1] < width:
            return np.pad(out, ((0, 0), (0, width - values.shape[1])))
        return out[:, :width]

    at = np.arange(width, dtype=np.int32)[None, :]
    real = at < fit(rollout.lengths)[:, None]
    rows_of = np.arange(rows, dtype=np.int32)[:, None]
    arrays = dict(
        tokens=np.where(real, fit(rollout.tokens), 0).astype(np.int32),
        positions=np.broadcast_to(at, shape),
        segment_ids=np.where(real, rows_of, rows).astype(np.int32),
        loss_mask=fit(rollout.loss_mask) & real,
        sampler_logprobs=fit(rollout.logprobs),
        old_logprobs=fit(old_logprobs),
        advantages=fit(advantages),
        weights=fit(weights),
    )
    return Bucket(**{name: jnp.asarray(array) for name, array in arrays.items()})
