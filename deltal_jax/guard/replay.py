"""Run the updates of a dumped step again, and look at what goes into one of them."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from deltal_jax.backend import enable_compile_cache
from deltal_jax.guard.dumps import Dump
from deltal_jax.training.policy import make_updates, step_metrics
from deltal_jax.training.setup import make_update
from deltal_jax.training.step import Health, Update, UpdateReport
from deltal_jax.types import Bucket


@dataclasses.dataclass(frozen=True)
class Looked:
    """A micro-batch: its shape and health, and of each response in it that is not finite what is
    not, with how many numbers."""

    rows: int
    width: int
    health: Health
    responses: dict[int, dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Replayed:
    """What a replay found. Reports are those of the replayed updates, the first of which is number
    `first` of its step, counted from 0."""

    first: int
    updates_per_epoch: int
    reports: Sequence[UpdateReport]
    #: The first update that the run left out, or else the first: its number, the health of all its
    #: micro-batches together, and each of them.
    looked_at: int
    health: Health
    buckets: Sequence[Looked]
    #: By name (recorded, replayed), without clocks; what was not recorded is None.
    figures: dict[str, tuple[float | None, float]]

    @property
    def differing(self) -> list[str]:
        """The recorded figures that the replay does not give, bit for bit."""
        return [
            k for k, (was, now) in self.figures.items() if was is not None and not _is(was, now)
        ]


def replay(dump: Dump) -> Replayed:
    """Run the step from the dumped update on, as far as the run came."""
    enable_compile_cache()
    config, record = dump.setup.config, dump.record
    update, state = make_update(dump.setup, "rl"), dump.state
    minibatches, _, fixed = make_updates(dump.setup, dump.batch)
    plan = minibatches * config.rl.epochs_per_rollout
    left_out = [at for at, report in enumerate(record.reports) if report.skipped]
    looked_at = next((at for at in left_out if at >= record.first), record.first)
    reports = list(record.reports[: record.first])
    for buckets in plan[record.first : looked_at]:
        state, report = update(state, buckets)
        reports.append(report)
    health = update.examine(state.params, plan[looked_at])
    looked = [_look(update, state.params, bucket) for bucket in plan[looked_at]]
    for buckets in plan[looked_at : len(record.reports) or None]:
        state, report = update(state, buckets)
        reports.append(report)
    figures: dict[str, tuple[float | None, float]] = {}
    for number in range(record.first, len(reports)):
        known = _figures(record.reports[number]) if number < len(record.reports) else {}
        for name, value in _figures(reports[number]).items():
            figures[f"update {number + 1}: {name}"] = known.get(name), value
    if len(reports) == len(plan):
        for name, value in step_metrics(config, fixed, reports).items():
            figures[name] = (record.metrics or {}).get(name), value
    done = reports[record.first :]
    return Replayed(record.first, len(minibatches), done, looked_at, health, looked, figures)


def _look(update: Update, params: Any, bucket: Bucket) -> Looked:
    """One micro-batch and, where it is not finite, each of its responses alone."""
    rows, width = bucket.tokens.shape
    health, responses = update.examine(params, [bucket]), {}
    if not health.finite:
        members = np.unique(np.asarray(bucket.segment_ids))
        for response in members[members < len(bucket.weights)].tolist():
            if bad := _not_finite(update, params, _only(bucket, response), response):
                responses[response] = bad
    return Looked(rows, width, health, responses)


def _only(bucket: Bucket, response: int) -> Bucket:
    """The same micro-batch with this response alone; the rest is padding."""
    own, chosen = bucket.segment_ids == response, np.arange(len(bucket.weights)) == response
    return dataclasses.replace(
        bucket,
        segment_ids=np.where(own, bucket.segment_ids, len(bucket.weights)),
        loss_mask=bucket.loss_mask & own,
        weights=np.where(chosen, bucket.weights, 0.0),
        auxiliary_weights=np.where(chosen, bucket.auxiliary_weights, 0.0),
    )


def _not_finite(update: Update, params: Any, bucket: Bucket, response: int) -> dict[str, float]:
    """What of a response is not finite: how many numbers of each input and of the
    log-probabilities, and of the gradient where the loss of it alone is not."""
    inputs = {
        "reward's advantage": np.asarray(bucket.advantages)[[response]],
        "weight": np.asarray(bucket.weights)[[response]],
        "sampler's log p": bucket.sampler_logprobs,
        "old log p": bucket.old_logprobs,
        "reference's log p": bucket.reference_logprobs,
        "log p": update.logprobs(params, update.place(bucket)),
    }
    counts = {}
    for name, values in inputs.items():
        if values is not None:
            values = np.asarray(values)
            values = values[np.asarray(bucket.loss_mask)] if values.ndim == 2 else values
            counts[name] = int(np.sum(~np.isfinite(values)))
    found = update.examine(params, [bucket])
    counts["gradient"] = sum(count for _, count in found.parameters.values())
    bad = {name: count for name, count in counts.items() if count}
    return bad if math.isfinite(found.loss) else {"loss": found.loss} | bad


def _figures(report: UpdateReport) -> dict[str, float]:
    return {"loss": report.loss} | report.norms | report.meters.values()


def _is(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))


def as_json(found: Replayed) -> dict[str, Any]:
    """Plain JSON; what is not finite is null, except where it is text."""
    plain = dataclasses.asdict(dataclasses.replace(found, reports=[]))
    plain["reports"] = [_figures(r) | {"skipped": r.skipped} for r in found.reports]
    plain["differing"] = found.differing
    return jax.tree.map(
        lambda x: None if isinstance(x, float) and not math.isfinite(x) else x, plain
    )
