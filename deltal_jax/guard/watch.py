"""What a run does about a step that goes wrong: leaves updates out, keeps them, warns, stops."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deltal_jax.guard.dumps import DUMPS, Record, save_dump, save_record
from deltal_jax.guard.health import judge, must_stop
from deltal_jax.parallel.processes import agree
from deltal_jax.training.collect import Collected
from deltal_jax.training.objective import Weighted
from deltal_jax.training.run import Run
from deltal_jax.training.step import UpdateReport
from deltal_jax.types import TrainState

#: Of `Run.running`: updates left out in a row, dumps of them so far, statistics of `health`.
IN_A_ROW, DUMPED, HEALTH = "skipped_in_a_row", "dumped", "health"


class StepWatch:
    """One RL step. Everything that later steps depend on is in the run's `running`."""

    def __init__(self, run: Run, step: int):
        self._run, self._step = run, step
        self.batch: Collected | None = None  # as all updates take it
        self.weighted: Weighted | None = None  # what its tokens' losses are multiplied by
        self._alpha = 1.0
        self._reports: Sequence[UpdateReport] = []
        self._dumps: dict[Path, int] = {}  # of this step, with the update that each begins at

    def begin(self, state: TrainState, batch: Collected, weighted: Weighted, alpha: float) -> None:
        """Before the first update, with the batch as all updates take it, its weights and the
        exponent that they have."""
        self.batch, self.weighted, self._alpha = batch, weighted, alpha
        if self._step in (self._run.setup.config.guard.dump_steps or ()):
            self._dump(state, 0)

    def updated(self, state: TrainState, reports: Sequence[UpdateReport]) -> None:
        """After each update, with the reports of the step so far.

        Raises TrainingError where too many in a row were left out.
        """
        self._reports, running, why = reports, self._run.running, reports[-1].skipped
        guard = self._run.setup.config.guard
        if why is None:
            running[IN_A_ROW] = 0
            return
        running[IN_A_ROW] = running.get(IN_A_ROW, 0) + 1
        said, number = f"update {len(reports)}: {why}", len(reports) - 1
        kept = ""  # the rest of a step can be replayed from its first dump
        if not self._dumps and running.get(DUMPED, 0) < guard.dumps:
            running[DUMPED] = running.get(DUMPED, 0) + 1
            kept = self._dump(state, number)
        if running[IN_A_ROW] <= guard.max_skipped:
            self._run.warn("RL", self._step, f"{said}; skipped{kept}")
            return
        self._record(None)
        raise self._run.stopped("RL", self._step, f"{said}{too_many(self._run)}{kept}")

    def finish(self, metrics: dict[str, Any]) -> str | None:
        """After the step, with all its metrics: warns, and says why the run must stop, if it
        must."""
        self._record(metrics)
        config, running = self._run.setup.config, self._run.running
        running[HEALTH], warnings = judge(config, metrics, running.get(HEALTH, {}))
        for line in warnings:
            self._run.warn("RL", self._step, line)
        return must_stop(config, metrics)

    def _dump(self, state: TrainState, first: int) -> str:
        """Keep the step from an update on; says where. A dump that fails is no reason to stop."""
        assert self.batch is not None
        folder = self._run.folder / DUMPS / f"step-{self._step:06d}-update-{first + 1}"
        record = Record(self._step, first, self._reports, alpha=self._alpha)
        self._run.settle(self._step)  # two saves at once meet at the same barriers of Orbax
        failure: Exception | None = None
        try:
            save_dump(folder, self._run.setup, state, self.batch, record)
        except (OSError, ValueError, RuntimeError) as error:  # no room on disk, or in memory
            failure = error
        if agree(failure is not None):
            return f"; not kept for replay: {failure or 'another process could not'}"
        self._dumps[folder] = first
        return f"; see it with: deltal debug replay {folder}"

    def _record(self, metrics: dict[str, Any] | None) -> None:
        for folder, first in self._dumps.items():
            with contextlib.suppress(OSError):  # the record that is there is of fewer updates
                record = Record(self._step, first, self._reports, metrics, self._alpha)
                save_record(folder, record)


def finite_updates(
    run: Run, pending: Sequence[tuple[int, tuple[int, int], dict[str, Any]]]
) -> list[tuple[float, float]]:
    """(loss, gradient norm) of those updates of the warm-up that were made, of the (step, shape of
    the bucket, metrics) of all since the last time. One line says of which that is not true.

    Nothing of them is kept for replay: the batch is that of the step in the config's demonstrations
    and the state may be that of a later step by now. Raises TrainingError as `StepWatch` does.
    """
    good, skipped, running = [], [], run.running
    for step, (rows, width), metrics in pending:
        figures = {name.split("/")[-1]: float(value) for name, value in metrics.items()}
        if np.isfinite(list(figures.values())).all():
            good.append((figures["loss"], figures["grad_norm"]))
            running[IN_A_ROW] = 0
            continue
        running[IN_A_ROW] = running.get(IN_A_ROW, 0) + 1
        named = ", ".join(f"{name} {value}" for name, value in figures.items())
        what = f"{named} in a bucket of {rows} rows of {width} tokens"
        if running[IN_A_ROW] > run.setup.config.guard.max_skipped:
            raise run.stopped("warm-up", step, what + too_many(run))
        skipped.append((step, what))
    if skipped:
        more = f"; so were {len(skipped) - 1} more" if len(skipped) > 1 else ""
        run.warn("warm-up", skipped[0][0], f"{skipped[0][1]}; skipped{more}")
    return good


def too_many(run: Run) -> str:
    """Why an update that was left out is the last."""
    count, most = run.running[IN_A_ROW], run.setup.config.guard.max_skipped
    return f"; {count} in a row, guard.max_skipped={most}" if most else ""
