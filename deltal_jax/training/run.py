"""A run that is open: its folder, files and switches, and what it says. Nothing here decides
numerics."""

import copy
import dataclasses
import json
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import jax
from etils import epath

from deltal_jax.checkpoints.disk import files_under
from deltal_jax.checkpoints.manifest import Position
from deltal_jax.checkpoints.reader import SavedSteps
from deltal_jax.checkpoints.store import Checkpoints, SaveError
from deltal_jax.guard.pulse import phase
from deltal_jax.guard.signals import Abandoned, Stop
from deltal_jax.guard.watchdog import watching
from deltal_jax.metrics import MetricsWriter
from deltal_jax.parallel.mesh import describe_mesh
from deltal_jax.parallel.processes import is_first
from deltal_jax.progress import ProgressDisplay
from deltal_jax.rollout.base import RolloutEngine
from deltal_jax.tasks.grading import Reward
from deltal_jax.training import run_folder
from deltal_jax.training.ahead import Ahead
from deltal_jax.training.collect import RolloutStream
from deltal_jax.training.describe import describe_model, describe_sampling, describe_task, formula
from deltal_jax.training.evaluate import evaluate, samples_name, write_samples
from deltal_jax.training.journal import VerdictJournal
from deltal_jax.training.opening import MESH, data_fingerprint, reward_names
from deltal_jax.training.setup import Setup
from deltal_jax.types import TrainState

#: Of a run, that are kept.
MOST_WARNINGS = 100
#: Among what is kept with a checkpoint: the step's evaluation is still to be done.
OWED = "evaluation owed"


class TrainingError(ArithmeticError):
    """The run cannot go on; the message says where it stopped and how to resume."""


@dataclasses.dataclass
class Run:
    """The open files and switches of a run."""

    folder: Path
    setup: Setup
    rewards: Sequence[Reward | str]
    writer: MetricsWriter
    checkpoints: Checkpoints
    display: ProgressDisplay
    profile: tuple[int, int] | None
    stop: Stop
    #: None where verdicts are this process's own, and the same again.
    journal: VerdictJournal | None = None
    #: Counters and running statistics that a resumed run needs, by name; plain JSON.
    running: dict[str, Any] = dataclasses.field(default_factory=dict)
    #: What the last evaluation found, and after which RL step.
    evaluated: tuple[int, dict[str, float]] = (-1, {})
    #: Where in the metrics a line stands that a run with more steps would not have.
    cut: dict[int, int] = dataclasses.field(default_factory=dict)
    tracing: bool = False

    def save(
        self,
        state: TrainState,
        phase: str,
        step: int,
        batches: RolloutStream | Ahead | None = None,
    ) -> float:
        """Begin a checkpoint after `step` finished steps of a phase, with where the source of
        batches is, if there is one yet; returns the seconds it took until training may go on.

        Raises TrainingError where it, or the one before it, cannot be saved.
        """
        started = time.perf_counter()
        number = step + (self.setup.config.sft.steps if phase == "rl" else 0)
        next_prompt = 0 if batches is None else batches.next_prompt
        written = self.cut.get(step, self.writer.bytes_written)
        position = Position(phase, step, next_prompt, written, copy.deepcopy(self.running))
        rollouts = None if batches is None else batches.saved()
        if self.journal is not None and (complete := self.checkpoints.all()):
            # From the last but one on: the last may turn out to be damaged.
            self.journal.drop(complete[-2:][0] - self.setup.config.sft.steps)
        try:
            with stage("save", phase, step):
                self.checkpoints.save(
                    number,
                    state,
                    position,
                    rollouts,
                    metrics=self._found(step) if phase == "rl" else {},
                    before=self.writer.sync,
                )
        except SaveError as error:
            raise self.stopped({"sft": "warm-up", "rl": "RL"}[phase], step, error) from error
        return time.perf_counter() - started

    @contextmanager
    def writing(self, phase: str, step: int) -> Iterator[None]:
        """Raises TrainingError where what is written in here has no room, or no disk."""
        try:
            yield
        except OSError as error:
            raise self.stopped(phase, step, f"{self.folder}: {error.strerror or error}") from error

    def settle(self, step: int) -> None:
        """Wait for the last checkpoint. Raises TrainingError where it could not be saved."""
        try:
            self.checkpoints.wait()
        except SaveError as error:
            raise self.stopped("RL", step, error) from error

    def improved(self, step: int) -> bool:
        """Whether the evaluation after this RL step, if there was one, is among the best so far of
        those to be kept."""
        found = self._found(step)
        return bool(found) and self.checkpoints.among_best(found)

    def evaluate_saved(self, engine: RolloutEngine, state: TrainState, step: int) -> None:
        """The evaluation that a signal left to the resumed run, or that of the end, whose line was
        cut off: it goes with the checkpoint after that RL step, which may be one of the best."""
        self.evaluate(engine, state, step)
        if found := self._found(step):
            with self.writing("RL", step):
                self.checkpoints.add_metrics(step + self.setup.config.sft.steps, found)

    def _found(self, step: int) -> dict[str, float]:
        """What an evaluation after this RL step found; empty where there was none."""
        return self.evaluated[1] if self.evaluated[0] == step else {}

    def scheduled(self, step: int) -> bool:
        """Whether there is an evaluation after this RL step however many follow."""
        every = self.setup.config.evaluate.every
        return not step or (every > 0 and step % every == 0)

    def evaluates(self, step: int) -> bool:
        """Whether there is an evaluation after this RL step: a scheduled one, or that of the end,
        which is not there any more for a run that goes on."""
        return self.scheduled(step) or step >= self.setup.config.rl.steps

    def evaluate(self, engine: RolloutEngine, state: TrainState, step: int) -> float:
        """Evaluate on the held-out problems, write and say what was found; returns the accuracy.
        NaN where the run has to stop: then it is owed, to be done on resume."""
        clock = time.perf_counter()
        journal = None if self.journal is None else self.journal.of("eval", step)
        self.running[OWED] = True
        if self.stop.asked():
            return float("nan")
        try:
            with stage("evaluation", "rl", step):
                result = evaluate(self.setup, engine, state.params, state.key, journal)
        except Abandoned:
            return float("nan")
        del self.running[OWED]
        seconds = {"time/evaluate": time.perf_counter() - clock}
        if not self.scheduled(step):
            self.cut = {step: self.writer.bytes_written}
        self.evaluated = step, result.metrics
        config = self.setup.config.evaluate
        with self.writing("RL", step):
            self.writer.write(step, "eval", result.metrics | seconds)
            if is_first():
                folder = self.folder / run_folder.SAMPLES
                write_samples(folder, samples_name(step), result, config.rows)
        prefix = f"eval/{self.setup.task.name}/"
        found = {k.removeprefix(prefix): v for k, v in result.metrics.items()}
        missing = found["missing_frac"]
        ends = "/avg_at_k"
        apart = [
            f", {name[len('eval/') : -len(ends)]} {value:.3f}"
            for name, value in result.metrics.items()
            if name.endswith(ends) and name != f"{prefix}avg_at_k"
        ]
        self.display.say(
            f"step {step}: accuracy {found['avg_at_k']:.3f} on {found['problems']:.0f} held-out "
            f"problems ({found['distinct']:.0f} distinct), length {found['length']:.1f}, truncated "
            f"{found['truncated_frac']:.3f}"
            + (f", no verdict {missing:.3f}" if missing else "")
            + "".join(apart)
        )
        return found["avg_at_k"]

    def announce(
        self, newest: int | None, position: Position, changes: dict[str, tuple[Any, Any]]
    ) -> None:
        """Say and keep what this run does, where it goes on, and which fields change there."""
        config = self.setup.config
        at = {"phase": position.phase, "step": position.step}
        changed = [
            at | {"field": name, "before": before, "after": after}
            for name, (before, after) in changes.items()
        ]
        said = formula(config)
        facts = {
            "formula": said,
            "rewards": reward_names(self.rewards),
            "data": data_fingerprint(self.setup.task),
            "warnings": self.running.get("warnings", []),
            "changes": self._known_facts().get("changes", []) + changed,
            "environment": {
                "jax": jax.__version__,
                "backend": f"{jax.default_backend()} × {jax.device_count()}",
                "mesh": describe_mesh(self.setup.mesh),
                "python": platform.python_version(),
                "machine": platform.machine(),
            },
        }
        self._summarise(facts)
        self.display.say(f"run folder: {self.folder}")
        self.display.say(describe_model(config, self.setup.architecture, self.setup.mesh))
        if self.setup.chosen is not None:
            self.display.say(self.setup.chosen)
        if found := describe_task(self.setup.task):
            self.display.say(found)
        self.display.say(said)
        if sampling := describe_sampling(config):
            self.display.say(sampling)
        if newest is not None:
            self.display.say(f"resumed after {position.step} steps of {position.phase}")
            before, now = position.running.get(MESH), describe_mesh(self.setup.mesh)
            if before not in (None, now):
                self.display.say(f"mesh: {now}, before {before}; equal to rounding, not to the bit")
        for name, (before, after) in changes.items():
            self.display.say(f"{name}: {before} → {after}")
        if newest is not None and position.phase == "rl" and position.step >= config.rl.steps:
            self.display.say(
                f"rl.steps: all {position.step} steps are done; resume with more to go on"
            )

    def conclude(self, order: dict[str, float | None]) -> None:
        """Keep the monotonicity of each evaluation set beside what `announce` kept."""
        self._add_facts({"monotonicity": order})

    def warn(self, phase: str, step: int, text: str) -> None:
        """Say one line about a step, and keep it in the summary: it goes with the checkpoints, so
        that a resumed run has each warning once. The first ones are kept: they tell the cause."""
        line = f"{phase} step {step}: {text}"
        self.display.say(f"warning: {line}")
        kept = self.running.setdefault("warnings", [])
        if len(kept) < MOST_WARNINGS:
            kept.append(line)
            self._add_facts({"warnings": kept})

    def _add_facts(self, facts: dict[str, Any]) -> None:
        if is_first():
            self._summarise(self._known_facts() | facts)

    def _known_facts(self) -> dict[str, Any]:
        return run_folder.load_summary(self.folder)

    def _summarise(self, facts: dict[str, Any]) -> None:
        if not is_first():
            return
        run_folder.write_text(self.folder / run_folder.SUMMARY, json.dumps(facts, indent=1) + "\n")

    def stopped(self, phase: str, step: int, what: object) -> TrainingError:
        """The error that ends the run in a step of a phase."""
        newest = self.checkpoints.newest()
        if newest is None:
            saved = f"no checkpoint yet in {self.folder}"
        else:
            saved = (
                f"last good checkpoint: {newest} (after {self._step_of(newest)}); go on with: "
                f"{self.resume_command()}"
            )
        return TrainingError(f"{phase} step {step}: {what}; {saved}")

    def watched(self) -> AbstractContextManager[None]:
        """Look after it, as the config says."""
        config = self.setup.config.watchdog
        return watching(
            self.folder,
            config.seconds,
            stop=config.action == "stop",
            say=self.display.say,
            kept=self.kept,
            written=lambda: _size(self.checkpoints.folder),
        )

    def kept(self) -> tuple[str, bool]:
        """What there is to go on from, in words, and whether there is anything; waits for no save
        that is under way."""
        try:
            newest = SavedSteps(self.checkpoints.folder).newest()
        except OSError as error:  # who asks has to end the run all the same
            return f"{error}; go on, once that is mended, with: {self.resume_command()}", False
        if newest is None:
            return f"nothing was saved yet; start again with: {self.resume_command()}", False
        after = f"{self._step_of(newest)} (checkpoint {newest})"
        return f"saved after {after}; go on with: {self.resume_command()}", True

    def _step_of(self, number: int) -> str:
        """The step that a checkpoint is after, in words."""
        warm_up = self.setup.config.sft.steps
        return step_name("rl", number - warm_up) if number >= warm_up else step_name("sft", number)

    def resume_command(self) -> str:
        """What to type to go on; a run with its own rewards goes on from Python."""
        if list(self.rewards) == ["task"] or self.setup.config.task.rewards is not None:
            return f"deltal train run.dir={self.folder} --resume"
        overrides = {"run.dir": str(self.folder)}
        return f"deltal_jax.train(None, {overrides}, rewards=…the same…, resume=True)"

    @contextmanager
    def profiled(self, step: int) -> Iterator[None]:
        """Trace this step if it is among the wanted ones (both ends inclusive)."""
        first, last = self.profile or (0, -1)
        if not first <= step <= last:
            yield
            return
        if not self.tracing:
            jax.profiler.start_trace(str(self.folder / "profile"))
            self.tracing = True
        done = False
        try:
            yield
            done = True
        finally:
            ends = step == min(last, self.setup.config.rl.steps)
            if ends or self.stop.asked_by is not None or not done:
                jax.profiler.stop_trace()
                self.tracing = False


def step_name(phase: str, step: int) -> str:
    """A step of a phase, in words."""
    return f"{'RL' if phase == 'rl' else 'warm-up'} step {step}"


def stage(name: str, phase_: str, step: int) -> AbstractContextManager[None]:
    """What the run does from here on, for those who watch it."""
    return phase(name, step_name(phase_, step))


def _size(folder: epath.Path) -> int:
    """Bytes below a folder; -1 where files come and go."""
    try:
        return sum(path.stat().length for _, path in files_under(folder))
    except OSError:
        return -1
