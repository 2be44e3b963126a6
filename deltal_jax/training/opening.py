"""How a run begins or goes on: all of it is checked before anything in its folder changes."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etils import epath

from deltal_jax.checkpoints.disk import checksum, children, is_local
from deltal_jax.checkpoints.manifest import Position
from deltal_jax.checkpoints.retention import Keep
from deltal_jax.checkpoints.store import Checkpoints
from deltal_jax.config import Config, dump_config, load_config
from deltal_jax.errors import UserError
from deltal_jax.metrics import FILE_NAME, load_metrics, metrics_size
from deltal_jax.parallel.mesh import describe_mesh
from deltal_jax.parallel.processes import is_first, on_each, on_first
from deltal_jax.progress import ProgressDisplay
from deltal_jax.tasks.base import Task, files_of
from deltal_jax.tasks.files import load_rewards, pin_files
from deltal_jax.tasks.grading import Reward, as_rewards
from deltal_jax.trackers import check_trackers
from deltal_jax.training import run_folder
from deltal_jax.training.collect import OVERLONG
from deltal_jax.training.setup import (
    Setup,
    check_setup,
    make_setup,
    pin_checkpoint,
    save_model_files,
)

#: In `Run.running`: the mesh, in words.
MESH = "mesh"


def create_run(
    experiment: str | Path | None,
    overrides: dict[str, Any],
    rewards: Sequence[Reward | str] | None,
    profile: tuple[int, int] | None,
) -> tuple[Path, Setup]:
    """A new run: checked as a whole before its folder is made."""
    if experiment is None:
        raise UserError("config: name an experiment; `deltal configs` lists them")

    def check() -> Setup:
        config = pin_checkpoint(load_config(experiment, overrides))
        config = dataclasses.replace(config, task=pin_files(config.task))
        choose_rewards(config, rewards)
        check_profile(profile, config)
        check_trackers(config)
        if is_first():
            run_folder.check_run_folder(config)
        setup = make_setup(config)
        check_setup(setup)
        return setup

    setup = on_each(check)
    config = setup.config

    def create() -> str:
        folder, _ = run_folder.create_run_folder(config)
        save_model_files(setup, folder / run_folder.MODEL)
        return str(folder)

    folder = Path(on_first(create))  # its name has the time in it, by one clock
    on_each(lambda: run_folder.await_run_config(folder))
    named = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(folder)))
    return folder, dataclasses.replace(setup, config=named)


def reopen_run(
    name: str | None,
    overrides: dict[str, Any],
    rewards: Sequence[Reward | str] | None,
    display: ProgressDisplay,
) -> tuple[Path, Setup, dict[str, tuple[Any, Any]]]:
    """A run to go on with, and what `run_folder.changes` finds: checked before anything in its
    folder changes."""
    run_dir = overrides.get("run.dir") or on_first(lambda: str(run_folder.newest_run(name)))
    folder, setup, changes = on_each(lambda: _check_reopened(name, overrides, run_dir, rewards))
    config = setup.config
    if name is not None and (drift := run_folder.drifted_fields(name, config)):
        display.say(f"note: the run's own config holds, {name} differs in {', '.join(drift)}")

    def complete() -> None:
        if run_folder.model_files(folder) is None:  # it was ended before it had them
            save_model_files(setup, folder / run_folder.MODEL)

    on_first(complete)
    return folder, setup, changes


def keep_config(folder: Path, setup: Setup) -> None:
    """Have the folder of a run that goes on say how, once nothing refuses that any more."""
    on_first(lambda: run_folder.write_text(folder / run_folder.CONFIG, dump_config(setup.config)))


def _check_reopened(
    name: str | None,
    overrides: dict[str, Any],
    run_dir: str,
    rewards: Sequence[Reward | str] | None,
) -> tuple[Path, Setup, dict[str, tuple[Any, Any]]]:
    folder, config = run_folder.reopen_run_folder(name, overrides, run_dir)
    check_trackers(config)
    if is_first():
        run_folder.check_writable(folder)
    changes = run_folder.changes(run_folder.load_run_config(folder), config)
    changes.pop("run.dir", None)  # it may be moved, and is said anyway
    _check_rewards(folder, choose_rewards(config, rewards))
    if config.lora.rank:
        config = pin_checkpoint(config)
    setup = make_setup(config, run_folder.model_files(folder))
    check_setup(setup, weights=setup.architecture.lora is not None)
    _check_data(folder, setup.task)
    return folder, setup, changes


def open_checkpoints(
    folder: Path, setup: Setup, display: ProgressDisplay, *, resume: bool
) -> Checkpoints:
    """Those of a run, to be written. Raises UserError where a new run would write among others'."""
    config = setup.config.checkpoint
    where = run_folder.checkpoints_folder(folder, setup.config)
    if not resume and children(where):
        raise UserError(f"checkpoint.dir: {where} is not empty; name another folder")
    if resume and is_local(where) and not where.exists() and metrics_size(folder):
        raise UserError(
            f"checkpoint.dir: {where} is gone, and the run went on from there; bring it back (is "
            "it mounted?), or start a new run"
        )
    keep = Keep(
        config.keep_last,
        config.keep_every,
        config.keep_best,
        run_folder.best_metric(setup.config, setup.task.name),
    )
    model = folder / run_folder.MODEL
    origin = {
        "config": run_folder.fixed_fields(setup.config),
        "data": data_fingerprint(setup.task),
        "tokenizer": {
            path.name: f"{checksum(epath.Path(path))[1]:08x}" for path in sorted(model.iterdir())
        },
    }
    return Checkpoints(where, keep, origin=origin, say=display.say)


def check_progress(folder: Path, config: Config) -> None:
    """Raises UserError where a run has no checkpoint though it has come past one: line `every` + 1
    of RL is written after the checkpoint of step 0 was complete."""
    lines = load_metrics(folder / FILE_NAME) if metrics_size(folder) else []
    steps = [line["step"] for line in lines if line["phase"] == "rl"]
    if config.checkpoint.every and max(steps, default=0) > config.checkpoint.every:
        raise UserError(
            f"checkpoint.dir: {run_folder.checkpoints_folder(folder, config)} has no checkpoint, "
            f"though the run came to RL step {max(steps)}; bring them back (is it mounted?), or "
            "start a new run"
        )


def check_mesh(setup: Setup, position: Position) -> None:
    """Raises UserError where a run goes on on another mesh, and may not."""
    before, now = position.running.get(MESH), describe_mesh(setup.mesh)
    if setup.config.rollout.partial and before not in (None, now):
        raise UserError(
            f"mesh: the run was on {before}, which decides how far rollout.partial comes in a "
            f"step, and cannot go on on {now}; set the sizes of mesh as before"
        )


def choose_rewards(
    config: Config, rewards: Sequence[Reward | str] | None
) -> Sequence[Reward | str]:
    """Those that a caller gives, or else those that the config names.

    Raises UserError where there are both, where the config's cannot be loaded, or for a name that
    the metrics have already.
    """
    if rewards is None:
        rewards = as_rewards(load_rewards(config.task.rewards))
    elif config.task.rewards is not None:
        raise UserError("rewards: task.rewards names some, too; leave out one of the two")
    names = [reward.name for reward in rewards if isinstance(reward, Reward)]
    if config.task.overlong_buffer is not None and OVERLONG in names:
        raise UserError(f"rewards: {OVERLONG!r} is the punishment's own name; choose another")
    return rewards


def check_profile(profile: tuple[int, int] | None, config: Config) -> None:
    """Raises UserError for steps that the run does not have."""
    if profile is not None and profile[0] > config.rl.steps:
        raise UserError(f"--profile: starts at {profile[0]}, but rl.steps is {config.rl.steps}")


def data_fingerprint(task: Task) -> dict[str, str]:
    """What the stream of problems depends on beside the config; empty where it reads no file."""
    return {
        f"{name}: {what}": value
        for name, part in files_of(task).items()
        for what, value in part.fingerprint().items()
    }


def _check_data(folder: Path, task: Task) -> None:
    """A resumed run goes on with the data it was started with.

    Raises UserError where they are others by now.
    """
    if not (folder / run_folder.SUMMARY).is_file():
        return
    before = run_folder.load_summary(folder).get("data")
    if before is None:
        return
    now = data_fingerprint(task)
    changed = [name for name in sorted(before | now) if before.get(name) != now.get(name)]
    if changed:
        raise UserError(
            f"data: {', '.join(changed)} is not what the run was started with; bring that back, or "
            "start a new run"
        )


def reward_names(rewards: Sequence[Reward | str]) -> list[str]:
    """Names and weights, as they are kept with the run."""
    return [r if isinstance(r, str) else f"{r.weight:g} * {r.name}" for r in rewards]


def _check_rewards(folder: Path, rewards: Sequence[Reward | str]) -> None:
    """A resumed run maximises what it was started with."""
    if not (folder / run_folder.SUMMARY).is_file():
        return
    before = run_folder.load_summary(folder).get("rewards", ["task"])
    now = reward_names(rewards)
    if before != now:
        raise UserError(
            f"rewards: the run was started with {before} and cannot go on with {now}; "
            "resume it from Python with the same rewards"
        )
