"""The folder of a run: created once, never overwritten, found again for resume."""

import contextlib
import dataclasses
import datetime
import fcntl
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import yaml
from etils import epath

from deltal_jax.checkpoints.disk import unused
from deltal_jax.config import Config, dump_config, load_config
from deltal_jax.errors import UserError
from deltal_jax.metrics import FILE_NAME as METRICS

CONFIG = "config.yaml"
LOCK = ".lock"
#: How many seconds a start waits for another process to leave the folder: set by launchers.
LOCK_WAIT = "DELTAL_LOCK_WAIT"
#: Seconds between two looks at what others do to it.
LOOK = 0.25
#: Seconds within which all hosts see what one has written: NFS remembers what was not there.
SEEN_WITHIN = 120.0
MODEL = "model"
CHECKPOINTS = "checkpoints"
SAMPLES = "samples"
ROLLOUTS = "rollouts"
VERDICTS = "verdicts"
SUMMARY = "summary.json"
RUNS = "runs"

#: Fields that the config of an older run has, and that nothing depends on any more.
GONE = ("run.tensorboard",)

#: Fields, and with a dot at the end sections, that a resumed run may change, and why that is safe:
#: they alter how far it goes, how it is watched, or in which order numbers are added.
CHANGEABLE = {
    "run.": "where results go, and how long a stop may take",
    "task.math.train": "where it lies; a fingerprint says that its problems are the same",
    "task.math.eval": "likewise",
    "task.math.template": "likewise",
    "task.math.workers": "how many judge, not how; time limits are of CPU time",
    "task.countdown.train": "where it lies; a fingerprint says that its problems are the same",
    "task.countdown.eval": "likewise",
    "model.path": "where it lies; only adapters read it again, and compare a fingerprint",
    "model.revision": "likewise",
    "model.attention": "another order of the same sums: equal to rounding",
    "model.remat": "the same numbers, some of them computed twice",
    "rl.optimizer.offload": "where moments lie between updates",
    "sft.optimizer.offload": "likewise",
    "rl.steps": "how far; refused where the learning rate depends on it",
    "rl.tokens_per_microbatch": "another order of the same sums: equal to rounding",
    "rl.pack": "likewise",
    "sft.log_every": "which steps a line of metrics is of",
    "rollout.slots": "the same random numbers; equal to rounding. Refused with rollout.partial",
    "rollout.devices": "likewise",
    "rollout.server.": "which server; it is given the run's weights",
    "evaluate.": "what is measured, in random numbers of its own",
    "checkpoint.": "what is kept; not where, as that is where the run is",
    "guard.": "when it warns or stops; what is left out is not finite, whatever they say",
    "meters.": "what is measured, and in which order halves are added: equal to rounding",
    "mesh.": "what the devices add is added in another order; a run says so",
    "watchdog.": "what notices that nothing moves",
}


def create_run_folder(config: Config) -> tuple[Path, Config]:
    """A new folder that holds the resolved config. Raises UserError if a named one is in use."""
    if config.run.dir is None:
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        folder = unused(Path(RUNS) / f"{config.run.name}-{stamp}")
    else:
        check_run_folder(config)
        folder = Path(config.run.dir)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(folder)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / CONFIG, dump_config(config))
    except OSError as error:
        raise UserError(f"run.dir: cannot write to {folder}: {error.strerror}") from error
    return folder, config


def check_run_folder(config: Config) -> None:
    """Raises UserError if the named run folder is in use. Writes nothing."""
    if config.run.dir is None:
        return
    folder = Path(config.run.dir)
    try:
        folder.exists()
    except OSError as error:
        raise UserError(f"run.dir: {error.strerror}; name a shorter folder") from error
    if folder.exists() and not folder.is_dir():
        raise UserError(f"run.dir: {folder} is a file; name a folder")
    left = f".{CONFIG}."  # by a run that was killed while it wrote its first file
    if folder.is_dir() and any(not path.name.startswith(left) for path in folder.iterdir()):
        raise UserError(
            f"run.dir: {folder} exists already; add --resume to go on with it, or name another"
        )


def reopen_run_folder(
    name: str | None, overrides: dict[str, Any], run_dir: str | None
) -> tuple[Path, Config]:
    """The folder to resume and its own config with the overrides on top. Writes nothing.

    Without `run_dir`, the newest run under runs/ of the experiment `name`. Raises UserError if
    there is none, or if an override changes what the run computes.
    """
    folder = Path(run_dir) if run_dir is not None else newest_run(name)
    stored = load_run_config(folder)
    config = load_run_config(folder, {**overrides, "run.dir": str(folder)})
    changes(stored, config)
    return folder, config


def changes(stored: Config, config: Config) -> dict[str, tuple[Any, Any]]:
    """Fields that a run changes as it goes on, with their values before and after.

    Raises UserError for one that changes what it computes.
    """
    before, after = _flat(stored), _flat(config)
    fixed = ["checkpoint.dir"]
    if stored.rl.optimizer.schedule != "constant":
        fixed.append("rl.steps")
    if stored.model.path is None or config.model.path is None:
        fixed.append("model.path")
    if stored.rollout.partial:  # how far a response comes in a step depends on them
        fixed += ["rollout.slots", "rollout.devices"]
    free = _free(stored)
    found = {key: (before[key], after[key]) for key in before if before[key] != after[key]}
    for key, (old, new) in found.items():
        if key in fixed or not (key in free or _changeable(key)):
            raise UserError(
                f"{key}: the run was started with {old!r} and cannot go on with {new!r}; start a "
                "new run instead"
            )
    return found


def _changeable(key: str) -> bool:
    return key in CHANGEABLE or key.startswith(_SECTIONS)


_SECTIONS = tuple(name for name in CHANGEABLE if name.endswith("."))


def _free(config: Config) -> tuple[str, ...]:
    """Fields that a run with this config may change beside: one that stopped for want of groups has
    no other way on."""
    return () if config.rollout.fill_up else ("rollout.fill_up", "rollout.max_rounds")


def fixed_fields(config: Config) -> dict[str, Any]:
    """The fields that a resumed run may not change, by name."""
    free = _free(config)
    return {k: v for k, v in _flat(config).items() if k not in free and not _changeable(k)}


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep the folder for this process, until it ends or leaves this.

    Raises UserError where another one has it, for `DELTAL_LOCK_WAIT` seconds (0): two that write
    would cut each other's metrics. A host that died holds it on NFS until its lease is over.
    """
    with (folder / LOCK).open("a+") as file:
        try:
            _lock(file, float(os.environ.get(LOCK_WAIT) or 0))
        except BlockingIOError as error:
            file.seek(0)
            raise UserError(
                f"run.dir: {folder} is in use by {file.read() or 'another process'}; wait until "
                "that has ended, or name another"
            ) from error
        except OSError:  # a file system that knows no locks
            yield
            return
        file.truncate(0)
        file.write(f"process {os.getpid()} of {platform.node()}")
        file.flush()
        yield


def _lock(file: IO[str], seconds: float) -> None:
    """Raises BlockingIOError where another process has the lock for so long."""
    until = time.monotonic() + seconds
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                raise
        time.sleep(LOOK)


def checkpoints_folder(folder: Path, config: Config) -> epath.Path:
    """Where the checkpoints of a run are, which may be remote."""
    return epath.Path(config.checkpoint.dir or folder / CHECKPOINTS)


def best_metric(config: Config, task: str) -> str:
    """What the best checkpoints have most of; `task` is its own name."""
    return config.checkpoint.best_metric or f"eval/{task}/avg_at_k"


def model_files(folder: Path) -> Path | None:
    """Where the run keeps its tokenizer and the config of its model; None before it has them."""
    return folder / MODEL if (folder / MODEL).is_dir() else None


def await_run_config(folder: Path) -> Config:
    """The resolved config of a run whose folder another host has made just now. Raises UserError
    where this host does not see it."""
    until = time.monotonic() + SEEN_WITHIN
    while not (folder / CONFIG).is_file():
        if time.monotonic() >= until:
            raise UserError(
                f"run.dir: {folder} was made by another host and is not here; name a folder on "
                "storage that all hosts see"
            )
        time.sleep(LOOK)
    return load_run_config(folder)


def load_run_config(folder: Path, overrides: dict[str, Any] | None = None) -> Config:
    """The resolved config of a run, with dotted overrides. Raises UserError where the folder is not
    a run."""
    if not (folder / CONFIG).is_file():
        raise UserError(f"run.dir: {folder} is not a run folder (it has no {CONFIG})")
    if not (folder / CONFIG).read_bytes().strip():
        raise UserError(f"run.dir: {folder / CONFIG} is empty or damaged; bring it back")
    return load_config(folder / CONFIG, overrides, gone=GONE)


def load_summary(folder: Path) -> dict[str, Any]:
    """What a run keeps about itself; empty where it has kept nothing yet."""
    path = folder / SUMMARY
    return load_json(path, "delete it, or bring it back") if path.is_file() else {}


def load_json(path: Path, fix: str) -> dict[str, Any]:
    """An object that a run wrote. Raises UserError, with the fix, where it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path}: empty or damaged; {fix}")
    return found


def check_writable(folder: Path) -> None:
    """Raises UserError where a run could not go on in its folder. Leaves nothing behind."""
    try:
        if (folder / METRICS).exists():
            (folder / METRICS).open("ab").close()
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"run.dir: cannot write to {folder}: {error.strerror}") from error


def drifted_fields(name: str, stored: Config) -> list[str]:
    """Fields in which the experiment file `name` differs by now from the run's own config."""
    before, after = _flat(stored), _flat(load_config(name))
    return [k for k in before if before[k] != after[k] and not _changeable(k)]


def write_text(path: Path, text: str) -> None:
    """Replace a file as a whole: a reader sees the old text or the new one, also after a power
    failure."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def newest_run(name: str | None) -> Path:
    """The run under runs/ that was last written to, of the experiment `name` or of any.

    Raises UserError where there is none.
    """
    stem = Path(name).name.removesuffix(".yaml") if name else ""
    found = [path for path in Path(RUNS).glob(f"*/{CONFIG}") if stem in ("", _run_name(path))]
    found.sort(key=_last_touched)
    if not found:
        raise UserError(
            f"--resume: no run of {name or 'any experiment'} under {RUNS}/; name run.dir"
        )
    return found[-1].parent


def _last_touched(path: Path) -> float:
    """When the run last wrote a line of metrics, or its config before the first."""
    metrics = path.with_name("metrics.jsonl")
    return (metrics if metrics.exists() else path).stat().st_mtime


def _run_name(path: Path) -> str:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return ""
    return tree.get("run", {}).get("name", "") if isinstance(tree, dict) else ""


def _flat(section: Any, prefix: str = "") -> dict[str, Any]:
    """Every field by its whole name; one whose value is a dictionary is one field."""
    flat: dict[str, Any] = {}
    for declared in dataclasses.fields(section):
        name, value = prefix + declared.name, getattr(section, declared.name)
        flat |= _flat(value, f"{name}.") if dataclasses.is_dataclass(value) else {name: value}
    return flat
