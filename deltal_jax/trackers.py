"""Who is shown the metrics beside metrics.jsonl: TensorBoard always, others by `run.trackers`.

A tracker's package is an optional extra of its own name, and imported late. Its run is one run
whatever ends in between: its id is kept in the run folder.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from deltal_jax.config import Config, Tracker
from deltal_jax.errors import UserError
from deltal_jax.metrics import Sink
from deltal_jax.training.run_folder import load_json, write_text

#: In the run folder: what is kept of each tracker.
FOLDER = "trackers"
#: Hands over metrics at a step; ends the tracker's run.
Opened = tuple[Callable[[dict[str, float], int], object], Callable[[], object]]


class TensorBoard:
    """Events in `tensorboard/` of the run folder, written anew as a run is opened: no step is there
    twice, and none lacks of those that were still in memory when the run died."""

    def __init__(self, folder: Path):
        from tensorboardX import FileWriter

        events = folder / "tensorboard"
        shutil.rmtree(events, ignore_errors=True)
        self._writer = FileWriter(str(events))

    def show(self, step: int, phase: str, values: dict[str, float | None]) -> None:
        """Take one line."""
        from tensorboardX.proto import summary_pb2

        proto: Any = summary_pb2  # made as it is imported
        # All of a line at once: `add_scalar` takes five times as long, at each resume.
        known = tagged(phase, values).items()
        scalars = [proto.Summary.Value(tag=tag, simple_value=value) for tag, value in known]
        self._writer.add_summary(proto.Summary(value=scalars), step)

    def close(self) -> None:
        """Flush, and end."""
        self._writer.close()


class Tracked:
    """A run of a tracker. Its steps count those of the warm-up and of RL together.

    A line is handed over at most once: which was the last is kept before it is, and a resumed run
    repeats none up to there. What a tracker still had in memory as the run died, it lacks. One that
    fails gets no more, and the run goes on.
    """

    def __init__(self, name: Tracker, folder: Path, config: Config, say: Callable[[str], object]):
        self._name, self._say, self._warm_up = name, say, config.sft.steps
        self._path = folder / FOLDER / f"{name}.json"
        self._kept = {"id": uuid.uuid4().hex[:8], "last": []}
        if self._path.exists():
            self._kept = load_json(self._path, "delete it for a new run there, or bring it back")
        self._path.parent.mkdir(exist_ok=True)
        self._keep()
        try:
            with contextlib.redirect_stdout(sys.stderr):
                self._log, self._finish = OPENERS[name](folder, self._kept["id"], config)
        except Exception as error:
            raise UserError(f"run.trackers: {name}: {_one_line(error)}; {FIXES[name]}") from error

    def show(self, step: int, phase: str, values: dict[str, float | None]) -> None:
        """Take one line."""
        place = [int(phase != "sft"), step, int(phase == "eval")]
        if self._log is None or place <= self._kept["last"]:
            return
        self._kept["last"] = place
        self._keep()
        total = step if phase == "sft" else self._warm_up + step
        with self._forgiven():
            self._log(tagged(phase, values), total)

    def close(self) -> None:
        """Flush, and end."""
        with contextlib.redirect_stdout(sys.stderr), self._forgiven():
            self._finish()

    def _keep(self) -> None:
        write_text(self._path, json.dumps(self._kept) + "\n")

    @contextlib.contextmanager
    def _forgiven(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # metrics.jsonl has it all
            self._log = None
            self._say(f"warning: run.trackers: {self._name} gets no more: {_one_line(error)}")


def tagged(phase: str, values: dict[str, float | None]) -> dict[str, float]:
    """The finite values of a line, by names that the phases do not share."""
    before = "warm-up/" if phase == "sft" else ""
    return {before + name: value for name, value in values.items() if value is not None}


def open_sinks(folder: Path, config: Config, say: Callable[[str], object]) -> list[Sink]:
    """All that a run has. Raises UserError for a tracker that does not open."""
    trackers = dict.fromkeys(config.run.trackers)
    return [TensorBoard(folder), *(Tracked(name, folder, config, say) for name in trackers)]


def check_trackers(config: Config) -> None:
    """Raises UserError where the package of a tracker is missing."""
    for name in config.run.trackers:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # a folder of that name is no package
            raise UserError(
                f"run.trackers: {name} is not installed; pip install deltal-jax[{name}]"
            )


def _open_wandb(folder: Path, run_id: str, config: Config) -> Opened:
    wandb: Any = importlib.import_module("wandb")  # types are checked without it
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", config.run.name),
        id=run_id,
        name=folder.resolve().name,
        dir=folder,
        config=dataclasses.asdict(config),
        resume="allow",
        settings=wandb.Settings(console="off"),
    )
    return lambda values, step: run.log(values, step=step), run.finish


def _open_trackio(folder: Path, run_id: str, config: Config) -> Opened:
    trackio: Any = importlib.import_module("trackio")
    run = trackio.init(
        project=os.environ.get("TRACKIO_PROJECT", config.run.name),
        name=f"{folder.resolve().name}-{run_id}",
        config=dataclasses.asdict(config),
        resume="allow",
        embed=False,
        auto_log_gpu=False,
        auto_log_cpu=False,
    )
    return lambda values, step: run.log(values, step=step), trackio.finish


OPENERS: dict[Tracker, Callable[[Path, str, Config], Opened]] = {
    "wandb": _open_wandb,
    "trackio": _open_trackio,
}
FIXES: dict[Tracker, str] = {
    "wandb": "see `wandb login`, or set WANDB_MODE=offline",
    "trackio": "see its message, or leave it out",
}


def _one_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
