"""Saves checkpoints while training goes on, and deletes old ones.

`save` returns as soon as the arrays may be given away; a thread does the rest. Of several processes
all call everything here; process 0 alone decides, and writes what is not an array.
"""

import contextlib
import dataclasses
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from deltal_jax.checkpoints.disk import children, files_under, is_local, sync, unused
from deltal_jax.checkpoints.manifest import (
    NAME,
    Damaged,
    Manifest,
    Newer,
    Position,
    exists,
    list_files,
    read_manifest,
    write_manifest,
)
from deltal_jax.checkpoints.quiet import quieten
from deltal_jax.checkpoints.reader import (
    ROLLOUTS,
    STATE,
    SavedSteps,
    shapes_of,
    tree_of,
)
from deltal_jax.checkpoints.retention import Keep, Saved, best, kept
from deltal_jax.checkpoints.snapshot import Snapshot
from deltal_jax.errors import UserError
from deltal_jax.guard.failpoints import fail_point
from deltal_jax.parallel.processes import is_first, on_first
from deltal_jax.types import TrainState

#: In the name of what Orbax has not finished.
UNFINISHED = ".orbax-checkpoint-tmp"
#: At the end of the name of what is kept though it is damaged.
ASIDE = ".damaged"
INCOMPLETE = ".incomplete"
#: Of checkpoints from before there were manifests: where they kept what is no array.
OLD_ITEM = "meta"


class SaveError(RuntimeError):
    """A checkpoint could not be saved; those before it are as they were."""


class Checkpoints(SavedSteps):
    """The checkpoints under `folder`, for the one run that writes them.

    To open them removes what killed saves and deletions have left. `origin` are facts of the run by
    section, which a checkpoint keeps and `choose` compares. Raises UserError where the folder
    cannot be written, or has checkpoints of an older kind.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        keep: Keep | int = Keep(),  # noqa: B008
        *,
        origin: dict[str, dict[str, Any]] | None = None,
        say: Callable[[str], None] = lambda line: None,
    ):
        super().__init__(folder)
        self._keep = Keep(last=keep) if isinstance(keep, int) else keep
        self._origin = origin or {}
        self._say = say
        self._manager: ocp.CheckpointManager | None = None
        self._snapshot = Snapshot()
        self._thread: threading.Thread | None = None
        self._failed: tuple[int, BaseException] | None = None
        self._doomed: dict[int, Saved] = {}  # those that the save under way deletes
        on_first(self._sweep)
        self._saved = {number: _judged(manifest) for number, manifest in self._readable()}

    def save(
        self,
        number: int,
        state: TrainState,
        position: Position,
        rollouts: dict[str, Any] | None = None,
        *,
        metrics: Mapping[str, float] | None = None,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        """Begin a checkpoint, as soon as the one before it is complete; the state may be given away
        when this returns. Of the parameters only the trained ones are in it.

        `rollouts`: nested dictionaries of NumPy arrays that go with it, if any. `metrics`: what an
        evaluation of this very state found. `before` is called in a thread before the checkpoint
        exists. One that exists already is left as it is.

        Raises SaveError where this save, or the one before it, failed.
        """
        self.wait()
        if number in self._saved:
            return
        tree = tree_of(state)
        draft = Manifest(
            position, 0.0, _finite(metrics or {}), self._origin, shapes_of(tree), {}, number
        )
        items: dict[str, Any] = {STATE: ocp.args.PyTreeSave(self._snapshot.take(tree))}
        if rollouts:
            items[ROLLOUTS] = ocp.args.StandardSave(rollouts)
        self._saved[number] = _judged(draft)
        stay = kept(self._saved, self._keep)
        self._doomed = {n: self._saved.pop(n) for n in set(self._saved) - stay}
        try:
            if self._manager is None:
                self._tidy()
                self._manager = _manager(self.folder)
            self._manager.save(number, args=ocp.args.Composite(**items), force=True)
        except Exception as error:
            self._fail(number, error)
            self.wait()
        self._thread = threading.Thread(
            target=self._finish, args=(number, draft, before), name="checkpoint"
        )
        self._thread.start()

    def add_metrics(self, number: int, metrics: Mapping[str, float]) -> None:
        """Keep with a checkpoint what an evaluation of its state found only later.

        Raises OSError where it cannot be written; the checkpoint is then as it was.
        """
        self.wait()
        manifest = dataclasses.replace(self.manifest(number), metrics=_finite(metrics))
        if is_first():
            write_manifest(self.path(number), manifest)
        self._whole[number], self._saved[number] = manifest, _judged(manifest)

    def wait(self) -> None:
        """Until the save under way is complete. Raises SaveError where it failed."""
        self._join()
        if self._failed is None:
            return
        (number, error), self._failed = self._failed, None
        raise SaveError(
            f"checkpoint {number} could not be saved in {self.folder}: {_reason(error)}"
        ) from error

    def close(self) -> None:
        """`wait`, and release all threads."""
        try:
            self.wait()
        finally:
            if self._manager is not None:
                self._manager.close()
                self._manager = None
            self._tidy()

    def all(self) -> list[int]:
        """The numbers of all that exist, in order, as soon as the save under way is complete."""
        self._join()
        return super().all()

    def manifest(self, number: int) -> Manifest:
        """That of one which is intact, as soon as the save under way is complete. Raises UserError
        for any other."""
        self._join()
        return super().manifest(number)

    def among_best(self, metrics: Mapping[str, float]) -> bool:
        """Whether a checkpoint with these metrics would be kept for them.

        Raises UserError where the metric that decides is not among them.
        """
        if not self._keep.best:
            return False
        if self._keep.metric not in metrics:
            raise UserError(
                f"checkpoint.best_metric: no evaluation has {self._keep.metric!r}, but "
                f"{', '.join(sorted(metrics))}"
            )
        candidate = max(self._saved, default=0) + 1
        return candidate in best(self._saved | {candidate: Saved(0, metrics)}, self._keep)

    def choose(self, metrics_bytes: int) -> int | None:
        """The newest that is intact, of those whose lines of metrics are all there; None where
        there are none at all. Says which ones after it are damaged, and sets them aside.

        Raises UserError where none is intact, or where it is of another run.
        """
        number = on_first(lambda: self._choose(metrics_bytes))
        self._saved = {n: _judged(manifest) for n, manifest in self._readable()}
        if number is not None and number not in self._whole:  # another process has verified it
            self._whole[number] = read_manifest(self.path(number))
        return number

    def _choose(self, metrics_bytes: int) -> int | None:
        def lacking(manifest: Manifest) -> str | None:
            wanted = manifest.position.metrics_bytes
            if metrics_bytes >= wanted:
                return None
            return f"metrics.jsonl has {metrics_bytes} of its {wanted} bytes"

        number, damaged = self.newest_intact(lacking)
        if number is not None:
            self.check_origin(number, self._origin)
        for other, what in damaged.items():
            name = unused(self.folder / f"{other}{ASIDE}")
            self.path(other).rename(name)
            self._say(f"checkpoint {other} is damaged: {what}; set aside as {name.name}")
        return number

    def _finish(self, number: int, draft: Manifest, before: Callable[[], None]) -> None:
        """The part of a save that nobody waits for."""
        try:
            assert self._manager is not None
            self._manager.wait_until_finished()  # for all processes
            if is_first():
                before()
                files = list_files(self.path(number))
                fail_point("save.commit")
                manifest = dataclasses.replace(draft, files=files, saved_at=time.time())
                write_manifest(self.path(number), manifest)
        except BaseException as error:
            self._fail(number, error)
            return
        if is_first():
            for old in sorted(self._doomed):
                with contextlib.suppress(OSError):  # the next to open them tries again
                    self._delete(old)
        self._doomed = {}

    def _fail(self, number: int, error: BaseException) -> None:
        """Leave things as they were before the save."""
        self._failed = number, error
        self._saved = {n: saved for n, saved in self._saved.items() if n != number} | self._doomed
        self._doomed = {}
        manager, self._manager = self._manager, None
        with contextlib.suppress(Exception):
            if manager is not None:
                manager.close()
        self._tidy()

    def _delete(self, number: int) -> None:
        """First it ceases to exist, then its files go."""
        step = self.path(number)
        files = [path for name, path in files_under(step) if name != NAME]
        (step / NAME).unlink()
        sync(step)
        fail_point("delete.begin")
        for path in files[:1]:
            path.unlink()
        fail_point("delete.files")
        step.rmtree()

    def _tidy(self) -> None:
        """Remove what failed saves left; threads of Orbax may still write for a moment."""
        if is_first():
            with contextlib.suppress(UserError):
                self._clean()

    def _sweep(self) -> None:
        try:
            self._set_aside()
        except OSError as error:
            raise self._unwritable(error) from error
        for number in self._clean():
            self._say(f"checkpoint {number} has no manifest, so it is not complete: removed")

    def _set_aside(self) -> None:
        """Where nothing has a manifest, nothing is removed for want of one: they may be lost."""
        for path in () if self.all() else children(self.folder):
            if path.name.isdecimal() and not (path / OLD_ITEM).is_dir():
                name = unused(self.folder / f"{path.name}{INCOMPLETE}")
                path.rename(name)
                self._say(
                    f"checkpoint {path.name} has no manifest, and no other is there: set aside as "
                    f"{name.name}"
                )

    def _clean(self) -> list[str]:
        """Remove what is no checkpoint; the numbers that it would have had."""
        removed = []
        try:
            if is_local(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            for path in children(self.folder):
                number, dot, rest = path.name.partition(".")
                half = not dot and not exists(path)
                if not number.isdecimal() or not (half or f".{rest}".startswith(UNFINISHED)):
                    continue
                if (path / OLD_ITEM).is_dir():
                    raise UserError(
                        f"checkpoint.dir: {path} is of an older version of deltal-jax, which alone "
                        "can go on with it; start a new run"
                    )
                path.rmtree()
                removed.append(number)
        except OSError as error:
            raise self._unwritable(error) from error
        return removed

    def _unwritable(self, error: OSError) -> UserError:
        what = error.strerror or error
        return UserError(f"checkpoint.dir: cannot write to {self.folder}: {what}")

    def _readable(self) -> Iterator[tuple[int, Manifest]]:
        for number in self.all():
            with contextlib.suppress(Damaged, Newer):  # `choose` judges them
                yield number, read_manifest(self.path(number))

    def _join(self) -> None:
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
            self._thread = None


def _manager(folder: epath.Path) -> ocp.CheckpointManager:
    """Writes arrays, and nothing else: what stays and what exists is decided here."""
    quieten()
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    # Compression takes four times as long, for a tenth of the size.
    arrays = ocp.PyTreeCheckpointHandler(use_compression=False)
    registry.add(STATE, ocp.args.PyTreeSave, arrays)
    options = ocp.CheckpointManagerOptions(
        create=False,
        max_to_keep=None,
        save_root_metadata=False,
        lightweight_initialize=True,
        async_options=ocp.options.AsyncOptions(
            # Where that failed in a thread, others would wait for the folders for five minutes.
            create_directories_asynchronously=False,
            post_finalization_callback=lambda: fail_point("save.arrays"),
        ),
    )
    return ocp.CheckpointManager(folder, options=options, handler_registry=registry)


def _judged(manifest: Manifest) -> Saved:
    position = manifest.position
    return Saved(position.step if position.phase == "rl" else None, manifest.metrics)


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}


def _reason(error: BaseException) -> str:
    """The cause in a line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if found := re.search(r"os_error_code='(\d+)'", str(error)):  # TensorStore's
        return os.strerror(int(found[1]))
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
