"""A step of a run as a folder, with all that is needed to run it again: `deltal debug replay`.

RUN/dumps/step-000012-update-3/
    checkpoints/   the state before that update, and the graded batch with its log-probabilities
    config.yaml, model/
    record.json    what each update of the step came to, and the metrics; written last
"""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deltal_jax.checkpoints.manifest import Position
from deltal_jax.checkpoints.reader import SavedSteps
from deltal_jax.checkpoints.store import Checkpoints
from deltal_jax.config import dump_config, load_config
from deltal_jax.errors import UserError
from deltal_jax.parallel.mesh import describe_mesh
from deltal_jax.parallel.processes import is_first, on_first
from deltal_jax.training import run_folder
from deltal_jax.training.collect import Collected, arrays_of, load_collected
from deltal_jax.training.devices import lacking_devices
from deltal_jax.training.loss import Meters
from deltal_jax.training.opening import MESH
from deltal_jax.training.setup import Setup, make_setup, save_model_files
from deltal_jax.training.step import UpdateReport
from deltal_jax.training.trained import ONE_DEVICE, restore_state
from deltal_jax.types import TrainState

DUMPS = "dumps"
RECORD = "record.json"
#: Fields that a replay may change: where things lie, and how the same is computed. The latter
#: change roundings.
PLACES = ("run.", "task.", "model.path", "model.revision")
ROUNDINGS = (
    "model.compute_dtype",
    "model.attention",
    "model.remat",
    "rl.optimizer.offload",
    "length_buckets",
    "rl.tokens_per_microbatch",
    "rl.pack",
    "mesh.",
)


@dataclasses.dataclass(frozen=True)
class Record:
    """What a step came to: its updates so far, and its metrics once it is done."""

    step: int
    #: The update that the dump is taken before, counted from 0 within the step.
    first: int
    reports: Sequence[UpdateReport]
    metrics: dict[str, float] | None = None
    #: The exponent that weighed its batch; None in those from before it could change.
    alpha: float | None = None


@dataclasses.dataclass(frozen=True)
class Dump:
    """A dump that was read."""

    setup: Setup
    state: TrainState
    batch: Collected
    record: Record
    #: Why a replay need not give the same bits; empty: it must.
    inexact: str

    @property
    def exact(self) -> bool:
        """Whether a replay must give the same bits."""
        return not self.inexact


def save_dump(
    folder: Path, setup: Setup, state: TrainState, batch: Collected, record: Record
) -> None:
    """Write a dump; one that is there already, of a time before a resume, is replaced."""

    def begin() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        run_folder.write_text(folder / run_folder.CONFIG, dump_config(setup.config))
        save_model_files(setup, folder / run_folder.MODEL)

    on_first(begin)
    with contextlib.closing(Checkpoints(folder / run_folder.CHECKPOINTS, 1)) as checkpoints:
        running = {MESH: describe_mesh(setup.mesh)}
        position = Position("rl", record.step - 1, 0, 0, running)
        checkpoints.save(record.step, state, position, {"batch": arrays_of(batch)})
    save_record(folder, record)


def save_record(folder: Path, record: Record) -> None:
    """Write, or replace, what the step came to."""
    plain = {
        "step": record.step,
        "first": record.first,
        "reports": [
            {"loss": r.loss, "norms": r.norms, "skipped": r.skipped, "meters": r.meters.plain()}
            for r in record.reports
        ],
        "metrics": record.metrics,
        "alpha": record.alpha,
    }
    if is_first():
        run_folder.write_text(folder / RECORD, json.dumps(plain) + "\n")


def load_dump(folder: Path, overrides: dict[str, Any]) -> Dump:
    """Read a dump, under overrides of its config.

    A mesh for which there are too few devices here is left for one of them. Raises UserError where
    it is none, or not complete, or an override changes what is computed.
    """
    if not (folder / RECORD).is_file():
        raise UserError(
            f"{folder}: no dump, or not a complete one (it has no {RECORD}); they are in the "
            f"folder {DUMPS} of a run"
        )
    for name in overrides:
        if not name.startswith((*PLACES, *ROUNDINGS)):
            raise UserError(
                f"{name}: a replay computes what the step did; it takes {', '.join(ROUNDINGS)}"
            )
    record = _load_record(run_folder.load_json(folder / RECORD, "replay another dump"))
    config = load_config(folder / run_folder.CONFIG, overrides)
    if lacking_devices(config):
        config = load_config(folder / run_folder.CONFIG, ONE_DEVICE | overrides)
    setup = make_setup(config, folder / run_folder.MODEL)
    saved = SavedSteps(folder / run_folder.CHECKPOINTS)
    position = saved.read_position(record.step)
    state = restore_state(saved, record.step, setup, position)
    batch = load_collected(saved.read_rollouts(record.step)["batch"])
    before, now = position.running.get(MESH), describe_mesh(setup.mesh)
    inexact = "under these overrides" * any(name.startswith(ROUNDINGS) for name in overrides)
    if before not in (None, now):
        inexact = f"on {now}, and not on {before},"
    return Dump(setup, state, batch, record, inexact)


def _load_record(plain: dict[str, Any]) -> Record:
    reports = [
        UpdateReport(r["loss"], Meters.from_plain(r["meters"]), r["norms"], r["skipped"])
        for r in plain["reports"]
    ]
    return Record(plain["step"], plain["first"], reports, plain["metrics"], plain.get("alpha"))
