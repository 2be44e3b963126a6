"""Reads checkpoints by path, of a run that may be going on: nothing is locked, changed or removed.

What is read has been compared with its manifest before, every byte.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from deltal_jax.checkpoints.disk import children, is_local
from deltal_jax.checkpoints.manifest import (
    Damaged,
    Manifest,
    Newer,
    Position,
    check_files,
    exists,
    read_manifest,
)
from deltal_jax.errors import UserError
from deltal_jax.model.lora import trained
from deltal_jax.types import TrainState

#: Names of the arrays in a checkpoint: the state, and those beside it.
STATE, ROLLOUTS = "state", "rollouts"


class SavedSteps:
    """The checkpoints under `folder`, numbered by the steps of both phases together."""

    def __init__(self, folder: epath.PathLike):
        self.folder = epath.Path(folder)
        if is_local(self.folder):
            self.folder = self.folder.absolute()
        self._whole: dict[int, Manifest] = {}  # those whose contents were verified

    def all(self) -> list[int]:
        """The numbers of all that exist, in order; some may be damaged."""
        names = (path.name for path in children(self.folder))
        numbers = sorted(int(name) for name in names if name.isdecimal())
        return [number for number in numbers if exists(self.path(number))]

    def path(self, number: int) -> epath.Path:
        """Where one lies."""
        return self.folder / str(number)

    def newest(self) -> int | None:
        """The number of the newest."""
        return max(self.all(), default=None)

    def damage(self, number: int, *, contents: bool = True) -> str | None:
        """What is wrong with one, of which all files are read, or only the sizes asked for; None
        where it is intact. Raises UserError for one in a newer format."""
        try:
            manifest = read_manifest(self.path(number))
            if manifest.number not in (None, number):
                return f"it was saved as checkpoint {manifest.number}"
            check_files(self.path(number), manifest, contents=contents)
        except Damaged as error:
            return str(error)
        except Newer as error:
            raise UserError(
                f"checkpoint {number} in {self.folder}: {error}; update deltal-jax"
            ) from error
        if contents:
            self._whole[number] = manifest
        return None

    def newest_intact(
        self, usable: Callable[[Manifest], str | None] = lambda _: None
    ) -> tuple[int | None, dict[int, str]]:
        """The number of the newest that is intact, None where there are none at all; and what is
        wrong with those after it, among which are those that are not `usable`.

        Raises UserError where none is intact.
        """
        damaged: dict[int, str] = {}
        for number in reversed(self.all()):
            what = self.damage(number) or usable(self._whole[number])
            if what is None:
                return number, damaged
            if not exists(self.path(number)):  # deleted meanwhile by its run, which has newer ones
                return self.newest_intact(usable)
            damaged[number] = what
        if damaged:
            said = "; ".join(f"{number}: {what}" for number, what in list(damaged.items())[:3])
            more = f"; and {len(damaged) - 3} more" if len(damaged) > 3 else ""
            raise UserError(
                f"checkpoints: none in {self.folder} is intact ({said}{more}); bring one back, or "
                "start a new run"
            )
        return None, damaged

    def manifest(self, number: int) -> Manifest:
        """That of one which is intact. Raises UserError for any other."""
        if number not in self._whole and (what := self.damage(number)):
            if not exists(self.path(number)):
                raise UserError(self._gone(number))
            raise UserError(f"checkpoint {number} in {self.folder} is damaged: {what}; use another")
        return self._whole[number]

    def check_origin(self, number: int, origin: dict[str, dict[str, Any]]) -> None:
        """Raises UserError where a fact of the run was another one as it was saved."""
        for section, before in self.manifest(number).origin.items():
            now = json.loads(json.dumps(origin.get(section, {})))  # as what was read
            for name in before.keys() & now.keys():
                if before[name] != now[name]:
                    raise UserError(
                        f"{name}: checkpoint {number} in {self.folder} was saved with "
                        f"{before[name]!r} ({section}), and this run has {now[name]!r}; bring that "
                        "back, or start a new run"
                    )

    def read_position(self, number: int) -> Position:
        """Where the run was."""
        return self.manifest(number).position

    def read_rollouts(self, number: int) -> dict[str, Any]:
        """The arrays that were saved beside the state; empty where there were none."""
        if not any(name.startswith(f"{ROLLOUTS}/") for name in self.manifest(number).files):
            return {}
        return self._restore(number, ROLLOUTS, None)

    def read_state(self, number: int, abstract: TrainState) -> TrainState:
        """The state, in the shapes, types and shardings of `abstract`, which need not be those that
        it was saved in; of its parameters the trained ones.

        Raises UserError where the checkpoint is of another model or optimizer.
        """
        wanted = tree_of(abstract)
        self._check_same(number, shapes_of(wanted))
        restored = self._restore(number, STATE, wanted)
        return dataclasses.replace(abstract, **restored)

    def _restore(self, number: int, item: str, target: Any) -> Any:
        handler = ocp.StandardCheckpointHandler()
        try:
            with contextlib.closing(ocp.Checkpointer(handler)) as checkpointer:
                return checkpointer.restore(
                    self.path(number) / item, args=ocp.args.StandardRestore(target)
                )
        except Exception as error:
            if exists(self.path(number)):
                raise
            raise UserError(self._gone(number)) from error

    def _gone(self, number: int) -> str:
        return (
            f"checkpoint {number} in {self.folder}: there is none; a run that goes on deletes old "
            "ones, and `checkpoint` in its config says which stay"
        )

    def _check_same(self, number: int, wanted: dict[str, str]) -> None:
        """Compare names, shapes and types first: Orbax would cast a wrong type in silence."""
        saved = self.manifest(number).arrays
        for name in sorted(saved.keys() | wanted.keys()):
            if saved.get(name) != wanted.get(name):
                raise UserError(
                    f"checkpoint {number} does not hold this model and optimizer: {name} is "
                    f"{saved.get(name, 'missing')} there and {wanted.get(name, 'missing')} here"
                )


def abstract_state(init: Callable[..., TrainState], *arguments: Any) -> TrainState:
    """Shapes and types of the state `init(*arguments)`, of arrays or shapes, without computing it;
    on the default device."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(init, *arguments),
    )


def tree_of(state: TrainState) -> dict[str, Any]:
    """What of a state is saved. `direction` only where there is one: format 1 is older."""
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    if state.direction is None:
        del fields["direction"]
    return fields | {"params": trained(state.params)}


def shapes_of(tree: dict[str, Any]) -> dict[str, str]:
    """`type[shape]` of every array by its path."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
