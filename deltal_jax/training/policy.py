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
from deltal_jax.parallel.processes import check_alike
from deltal_jax.parallel.sharding import row_shards
from deltal_jax.training.buckets import (
    make_buckets,
    make_minibatches,
    minibatch_share,
    padding_fraction,
)
from deltal_jax.training.collect import Collected
from deltal_jax.training.loss import Meters
from deltal_jax.training.meters import LiveMeters
from deltal_jax.training.objective import Weighted, first_exponent, minibatch_ids, reject, weigh
from deltal_jax.training.optimizer import learning_rate
from deltal_jax.training.setup import Setup
from deltal_jax.training.step import Update, UpdateReport
from deltal_jax.types import Bucket, Rollout, TrainState

Transform = Callable[[Weighted], Weighted]


def update_policy(
    setup: Setup,
    update: Update,
    state: TrainState,
    batch: Collected,
    watch: StepWatch | None = None,
    live: LiveMeters | None = None,
    transform: Transform | None = None,
) -> tuple[TrainState, dict[str, float]]:
    """All optimizer updates on one rollout batch: epochs × mini-batches. `watch` is shown every
    one, and may end the run; `live` gives the exponent and measures the gradients. `transform` is
    that of `make_updates`."""
    clock = time.perf_counter()
    batch = with_logprobs(setup, update, state, batch)
    recomputed = time.perf_counter()
    alpha = first_exponent(setup.config) if live is None else live.alpha
    plan = make_updates(setup, batch, alpha, transform)
    weighted = plan.weighted
    check_alike(
        "lengths, advantages and weights of a rollout batch",
        *(batch.rollout.response_lengths, weighted.advantages),
        *(weighted.weights, weighted.auxiliary_weights),
    )
    if watch is not None:
        watch.begin(state, batch, plan.weighted, alpha)
    unweighted = plan.unweighted() if live is not None and live.compares else []
    schedule = learning_rate(setup.config.rl.optimizer, setup.config.rl.updates)
    rate = float(np.asarray(schedule(int(state.updates))))
    if live is not None:
        live.look(update, state, plan.minibatches[0])
    reports: list[UpdateReport] = []
    for buckets in plan.minibatches * setup.config.rl.epochs_per_rollout:
        state, report = update(state, buckets, () if reports else unweighted)
        fail_point("update")
        reports.append(report)
        if watch is not None:
            watch.updated(state, reports)
    measured = {} if live is None else live.observe(plan.minibatches, reports)
    return state, {
        **step_metrics(setup.config, plan.metrics, reports),
        **measured,
        "optim/lr": rate,
        "throughput/padding_frac": padding_fraction([b for bs in plan.minibatches for b in bs]),
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


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """The micro-batches of each update of one epoch, the weights in them, and the metrics that no
    update changes."""

    minibatches: list[list[Bucket]]
    weighted: Weighted
    metrics: dict[str, float]
    #: The weights of the first mini-batch's responses if lengths did not matter, Float[B].
    constant: np.ndarray

    def unweighted(self) -> list[Bucket]:
        """The first mini-batch under these weights: the same shapes, so the same programs."""
        return [dataclasses.replace(x, weights=self.constant) for x in self.minibatches[0]]


def make_updates(
    setup: Setup, batch: Collected, alpha: float, transform: Transform | None = None
) -> StepPlan:
    """What the updates on a rollout batch take, with this exponent of delta_l. `transform` puts
    others in the place of the method's weights, for an experiment with them."""
    config, rollout, old, mismatch = setup.config, batch.rollout, batch.old_logprobs, {}
    if old is not None:
        rollout, mismatch = reject(config.objective, rollout, old)
    weighted = weigh(config, rollout, batch.rewards, alpha)
    if transform is not None:
        weighted = transform(weighted)
    ids = minibatch_ids(config, rollout)
    minibatches = make_minibatches(
        rollout,
        ids,
        advantages=weighted.advantages,
        weights=weighted.weights,
        auxiliary_weights=weighted.auxiliary_weights,
        factor=weighted.minibatch_factor,
        old_logprobs=old,
        reference_logprobs=batch.reference_logprobs,
        **_layout(setup),
    )
    share = minibatch_share(ids, ids[0], weighted.minibatch_factor)
    constant = weighted.unweighted * np.float32(share)
    return StepPlan(minibatches, weighted, weighted.metrics | mismatch, constant)


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
    config, shards = setup.config, 1 if setup.mesh is None else row_shards(setup.mesh)
    return dict(
        edges=config.bucket_edges,
        tokens_per_microbatch=config.rl.tokens_per_microbatch,
        row_multiple=shards * (2 if config.halves else 1),
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
        values = np.asarray(update.logprobs(params, update.place(bucket)))[:, : mask.shape[1]]
        found[np.asarray(bucket.segment_ids)[mask], columns] = values[mask]
    return found


def mean_of(values: Sequence[float]) -> float:
    """Their mean; NaN where there are none."""
    return float(np.mean(values)) if values else float("nan")
