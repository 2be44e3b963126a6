"""One RL step's updates: log-probabilities and weights once, then epochs × mini-batches."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from deltal_jax.config import Config
from deltal_jax.guard.failpoints import fail_point
from deltal_jax.guard.watch import StepWatch
from deltal_jax.model.architecture import attention_work
from deltal_jax.model.lora import overlay
from deltal_jax.parallel.sharding import row_shards
from deltal_jax.training.buckets import make_buckets, make_minibatches, padding_fraction
from deltal_jax.training.collect import Collected
from deltal_jax.training.objective import Weighted, minibatch_ids, reject, weigh
from deltal_jax.training.optimizer import learning_rate
from deltal_jax.training.setup import Setup
from deltal_jax.training.step import Meters, Update, UpdateReport
from deltal_jax.types import Bucket, Rollout, TrainState

Transform = Callable[[Weighted], Weighted]


def update_policy(
    setup: Setup,
    update: Update,
    state: TrainState,
    batch: Collected,
    watch: StepWatch | None = None,
    transform: Transform | None = None,
) -> tuple[TrainState, dict[str, float]]:
    """All optimizer updates on one rollout batch: epochs × mini-batches. `watch` is shown every
    one, and may end the run. `transform` is that of `make_updates`."""
    clock = time.perf_counter()
    batch = with_logprobs(setup, update, state, batch)
    recomputed = time.perf_counter()
    if watch is not None:
        watch.begin(state, batch)
    minibatches, weighted, metrics = make_updates(setup, batch, transform)
    if watch is not None:
        watch.weighted = weighted
    schedule = learning_rate(setup.config.rl.optimizer, setup.config.rl.updates)
    rate = float(np.asarray(schedule(int(state.updates))))
    reports: list[UpdateReport] = []
    for buckets in minibatches * setup.config.rl.epochs_per_rollout:
        state, report = update(state, buckets)
        fail_point("update")
        reports.append(report)
        if watch is not None:
            watch.updated(state, reports)
    return state, {
        **step_metrics(setup.config, metrics, reports),
        "optim/lr": rate,
        "throughput/padding_frac": padding_fraction([b for bs in minibatches for b in bs]),
        "time/old_logprob": recomputed - clock,
        "time/update": time.perf_counter() - recomputed,
    }


def with_logprobs(setup: Setup, update: Update, state: TrainState, batch: Collected) -> Collected:
    """The batch with the log-probabilities that the objective asks for, which are fixed before the
    first update changes the parameters."""
    old = reference = None
    if setup.config.objective.old_logprobs == "recompute":
        old = rollout_logprobs(update, state.params, batch.rollout, **_layout(setup))
    if state.reference is not None:
        anchor = overlay(state.params, state.reference)
        reference = rollout_logprobs(update, anchor, batch.rollout, **_layout(setup))
    return dataclasses.replace(batch, old_logprobs=old, reference_logprobs=reference)


def make_updates(
    setup: Setup, batch: Collected, transform: Transform | None = None
) -> tuple[list[list[Bucket]], Weighted, dict[str, float]]:
    """The micro-batches of each update of one epoch, the weights that are in them, and the metrics
    that no update changes. `transform` puts others in the place of the method's weights, for an
    experiment with them."""
    config, rollout, old, mismatch = setup.config, batch.rollout, batch.old_logprobs, {}
    if old is not None:
        rollout, mismatch = reject(config.objective, rollout, old)
    weighted = weigh(config, rollout, batch.rewards)
    if transform is not None:
        weighted = transform(weighted)
    minibatches = make_minibatches(
        rollout,
        minibatch_ids(config, rollout),
        advantages=weighted.advantages,
        weights=weighted.weights,
        auxiliary_weights=weighted.auxiliary_weights,
        factor=weighted.minibatch_factor,
        old_logprobs=old,
        reference_logprobs=batch.reference_logprobs,
        **_layout(setup),
    )
    return minibatches, weighted, weighted.metrics | mismatch


def step_metrics(
    config: Config, fixed: dict[str, float], reports: Sequence[UpdateReport]
) -> dict[str, float]:
    """Metrics of a step: means over the updates that were made, NaN where none was."""
    good = [report for report in reports if report.skipped is None]
    norms = {k: mean_of([r.norms[k] for r in good]) for k in reports[0].norms}
    if good:
        measured = functools.reduce(Meters.merge, [r.meters for r in good]).values()
    else:
        measured = dict.fromkeys(reports[0].meters.values(), float("nan"))
    measured = {"policy/loss": mean_of([r.loss for r in good])} | measured | fixed
    if config.rollout.filtered:  # the sampler's log-probabilities are of fewer tokens: no mismatch
        measured = {k: v for k, v in measured.items() if not k.startswith("mismatch/")}
    return measured | norms | {"optim/skipped": float(len(reports) - len(good))}


def _layout(setup: Setup) -> dict[str, Any]:
    """How rollouts are cut into micro-batches."""
    config = setup.config
    return dict(
        edges=config.bucket_edges,
        tokens_per_microbatch=config.rl.tokens_per_microbatch,
        row_multiple=1 if setup.mesh is None else row_shards(setup.mesh),
        pack=config.rl.pack,
        attention=attention_work(setup.architecture),
    )


def rollout_logprobs(update: Update, params: Any, rollout: Rollout, **layout: Any) -> np.ndarray:
    """log π of every trained token of a rollout under `params`, Float[B T]; 0 elsewhere."""
    found = np.zeros_like(rollout.logprobs)
    everything = np.arange(len(rollout.lengths))
    ones = np.ones(len(everything), np.float32)
    for bucket in make_buckets(rollout, everything, advantages=ones, weights=ones, **layout):
        mask = np.asarray(bucket.loss_mask)
        columns = np.asarray(bucket.positions)[mask]
        values = np.asarray(update.logprobs(params, update.place(bucket)))
        found[np.asarray(bucket.segment_ids)[mask], columns] = values[mask]
    return found


def mean_of(values: Sequence[float]) -> float:
    """Their mean; NaN where there are none."""
    return float(np.mean(values)) if values else float("nan")
