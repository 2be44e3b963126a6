"""Overlap: the next rollout batch is sampled while the update on this one runs."""

import dataclasses
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deltal_jax.guard import signals
from deltal_jax.model.lora import overlay, trained
from deltal_jax.tasks.grading import Reward
from deltal_jax.training.collect import (
    Collected,
    RolloutStream,
    arrays_of,
    load_carried,
    load_collected,
)
from deltal_jax.training.journal import VerdictJournal
from deltal_jax.training.setup import Setup, make_engine


def open_batches(
    setup: Setup,
    key: jax.Array,
    rewards: Sequence[Reward | str],
    *,
    next_prompt: int,
    rollouts: dict[str, Any],
    journal: VerdictJournal | None = None,
) -> "AbstractContextManager[RolloutStream | Ahead]":
    """The batches of RL, from a position of the training stream on. `rollouts`: what `saved` gave
    at that position; empty where it gave nothing."""
    config = setup.config
    engine = make_engine(setup, temperature=config.rollout.temperature, training=True)
    carried = load_carried(rollouts["carried"]) if "carried" in rollouts else None
    where: dict[str, Any] = {"next_prompt": next_prompt, "carried": carried}
    stream = RolloutStream(setup, engine, key, rewards, **where, journal=journal)
    pending = load_collected(rollouts["pending"]) if "pending" in rollouts else None
    if not config.rollout.ahead:
        stream.pending = pending
        return nullcontext(stream)
    updates = config.rl.updates_per_rollout * config.rl.epochs_per_rollout
    return Ahead(
        stream,
        steps=config.rl.steps,
        updates_per_step=updates,
        pending=pending,
        behind=rollouts.get("behind"),
    )


class Ahead:
    """The batches of a stream, each sampled by the parameters of one step ago.

    `next` gives the batch of a step and begins, in a thread, the one of the step after it, with a
    copy of the parameters as they are before this step's update. What is sampled depends on no
    clock. The first batch, which no step came before, is sampled by the step's own parameters; the
    last step begins none. An error in the thread is raised by the next call that needs its batch.
    """

    def __init__(
        self,
        stream: RolloutStream,
        *,
        steps: int,
        updates_per_step: int,
        pending: Collected | None = None,
        behind: dict[str, Any] | None = None,
    ):
        self._stream, self._steps, self._updates = stream, steps, updates_per_step
        #: Saved parameters that the first batch is sampled by; None: the step's own.
        self._before = behind
        #: Those of the batch that is being sampled, or failed, and how many updates old they are.
        self._behind: tuple[Any, int] | None = None
        #: Those of before the last step, as they are saved.
        self._left: dict[str, Any] = {}
        self._thread: threading.Thread | None = None
        self._pending: Future[Collected] | None = None
        self._began = self._ended = time.perf_counter()  # the last period; the last rollout
        self._waited = 0.0  # seconds of this period
        if pending is not None:
            self._pending = Future()
            self._pending.set_result(pending)

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Leave no thread behind: wait for what it samples, unless who waits has had enough."""
        impatient = kind is not None and issubclass(kind, KeyboardInterrupt)
        if self._thread is not None and not impatient:
            self._thread.join()

    @property
    def next_prompt(self) -> int:
        """The first position of the stream that has not begun."""
        self._settled()
        return self._stream.next_prompt

    def next(self, params: Any, step: int) -> Collected:
        """The batch of an RL step, counted from 0."""
        if self._pending is None and self._before is not None:
            older, self._before = _load_behind(self._before, params), None
            self._submit(older, step, staleness=self._updates)
        elif self._pending is None:
            self._submit(params, step, staleness=0)
        batch = self._wait()
        assert batch is not None
        signals.check_update()  # it waits where the run has to stop, and no other begins
        now = time.perf_counter()
        idle = idle_shares(self._began, self._ended, now, self._waited)
        self._began, self._waited, self._pending = now, 0.0, None
        if step + 1 < self._steps:
            self._submit(params, step + 1, staleness=self._updates)
        else:  # for a run that goes on with more steps
            self._left = _save_behind(params)
        return dataclasses.replace(batch, metrics=batch.metrics | idle)

    def saved(self) -> dict[str, Any]:
        """Arrays that a checkpoint needs beside `next_prompt`: the batch that comes next, and what
        it leaves to those after it. Of a batch that failed or was given up, and after the last step
        of the first that it does not have, what it is sampled by: the parameters of one step
        ago."""
        batch = self._settled()
        if batch is not None:
            return {"pending": arrays_of(batch)} | self._stream.saved()
        behind = self._left
        if self._behind is not None and self._behind[1]:
            behind = _save_behind(self._behind[0])
        return behind | self._stream.saved()

    def _submit(self, params: Any, step: int, *, staleness: int) -> None:
        """Begin a batch. The parameters are copied here, as the update takes their memory."""
        placed = self._stream.engine.place(params)
        if placed is params:
            placed = jax.tree.map(jnp.copy, params)
        self._pending = pending = Future[Collected]()
        self._behind = placed, staleness

        def sample() -> None:
            try:
                batch = self._stream.sample(placed, step)
            except BaseException as error:
                pending.set_exception(error)
                return
            batch.metrics["rollout/staleness"] = float(staleness)
            self._behind = None
            self._ended = time.perf_counter()
            pending.set_result(batch)

        self._thread = threading.Thread(target=sample, name="rollout", daemon=True)
        self._thread.start()

    def _settled(self) -> Collected | None:
        """The batch that comes next, as soon as it is there; None where none was begun, or it
        failed, which the call that needs it will say."""
        try:
            return self._wait()
        except Exception:
            return None

    def _wait(self) -> Collected | None:
        """The batch that comes next, as soon as it is there; None where none was begun."""
        if self._pending is None:
            return None
        started = time.perf_counter()
        try:
            if self._thread is not None:
                self._thread.join()  # its result is there a moment before it ends
            return self._pending.result()
        finally:
            self._waited += time.perf_counter() - started


def _save_behind(params: Any) -> dict[str, Any]:
    """The trained parameters by number; nothing where other processes hold a part of them."""
    leaves = jax.tree.leaves(trained(params))
    if not all(leaf.is_fully_addressable for leaf in leaves):
        return {}
    return {"behind": {str(number): np.array(leaf) for number, leaf in enumerate(leaves)}}


def _load_behind(saved: dict[str, Any], params: Any) -> Any:
    """`params` with the saved values, where they lie."""
    leaves, tree = jax.tree.flatten(trained(params))
    older = [
        jax.device_put(np.asarray(saved[str(number)]), leaf.sharding)
        for number, leaf in enumerate(leaves)
    ]
    return overlay(params, jax.tree.unflatten(tree, older))


def idle_shares(began: float, ended: float, now: float, waited: float) -> dict[str, float]:
    """The shares of the time from `began` to `now` in which the update waited for a rollout, and
    the sampler, whose rollout was there at `ended`, for the update; all in seconds."""
    period = max(now - began, 1e-9)
    return {
        "overlap/update_idle": waited / period,
        "overlap/rollout_idle": (now - max(ended, began)) / period,
    }
