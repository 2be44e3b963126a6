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
    if not config.rollout.ahead:
        return nullcontext(stream)
    pending = load_collected(rollouts["pending"]) if "pending" in rollouts else None
    updates = config.rl.updates_per_rollout * config.rl.epochs_per_rollout
    return Ahead(stream, steps=config.rl.steps, updates_per_step=updates, pending=pending)


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
    ):
        self._stream, self._steps, self._updates = stream, steps, updates_per_step
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
        if self._pending is None:
            self._submit(params, step, staleness=0)
        batch = self._wait()
        assert batch is not None
        now = time.perf_counter()
        idle = idle_shares(self._began, self._ended, now, self._waited)
        self._began, self._waited, self._pending = now, 0.0, None
        if step + 1 < self._steps:
            self._submit(params, step + 1, staleness=self._updates)
        return dataclasses.replace(batch, metrics=batch.metrics | idle)

    def saved(self) -> dict[str, Any]:
        """Arrays that a checkpoint needs beside `next_prompt`: the batch that comes next, and what
        it leaves to those after it. None of a batch that failed: it is sampled anew."""
        batch = self._settled()
        pending = {} if batch is None else {"pending": arrays_of(batch)}
        return pending | self._stream.saved()

    def _submit(self, params: Any, step: int, *, staleness: int) -> None:
        """Begin a batch. The parameters are copied here, as the update takes their memory."""
        placed = self._stream.engine.place(params)
        if placed is params:
            placed = jax.tree.map(jnp.copy, params)
        self._pending = pending = Future[Collected]()

        def sample() -> None:
            try:
                batch = self._stream.next(placed, step)
            except BaseException as error:
                pending.set_exception(error)
                return
            batch.metrics["rollout/staleness"] = float(staleness)
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


def idle_shares(began: float, ended: float, now: float, waited: float) -> dict[str, float]:
    """The shares of the time from `began` to `now` in which the update waited for a rollout, and
    the sampler, whose rollout was there at `ended`, for the update; all in seconds."""
    period = max(now - began, 1e-9)
    return {
        "overlap/update_idle": waited / period,
        "overlap/rollout_idle": (now - max(ended, began)) / period,
    }
