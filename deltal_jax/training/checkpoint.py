"""Orbax checkpoints of a run: the state and where the run is."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from deltal_jax.errors import UserError
from deltal_jax.model.lora import trained
from deltal_jax.types import TrainState

#: Name of the arrays beside the state.
ROLLOUTS = "rollouts"


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a run is: all that is not an array. Plain JSON."""

    phase: str  # "sft" or "rl"
    step: int  # finished steps of that phase
    next_prompt: int  # position in the stream of training problems
    metrics_bytes: int  # size of metrics.jsonl
    #: What else the next steps depend on: counters and running statistics by name.
    running: dict[str, Any] = dataclasses.field(default_factory=dict)


class Checkpoints:
    """The checkpoints under `folder`, numbered by the steps of both phases together."""

    def __init__(self, folder: Path, keep_last: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep_last, create=True)
        self._folder = folder.absolute()
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def save(
        self,
        number: int,
        state: TrainState,
        position: Position,
        rollouts: dict[str, Any] | None = None,
    ) -> None:
        """Write one checkpoint and wait until it is complete. Of the parameters only the trained
        ones are in it. `rollouts`: nested dictionaries of NumPy arrays that go with it, if any."""
        if number in self._manager.all_steps():
            return
        meta = {"position": dataclasses.asdict(position)}
        items: dict[str, Any] = {
            "state": ocp.args.StandardSave(_tree(state)),
            "meta": ocp.args.JsonSave(meta),
        }
        if rollouts:
            items[ROLLOUTS] = ocp.args.StandardSave(rollouts)
        self._manager.save(number, args=ocp.args.Composite(**items))
        self._manager.wait_until_finished()

    def newest(self) -> int | None:
        """The number of the newest complete checkpoint."""
        return self._manager.latest_step()

    def all(self) -> list[int]:
        """The numbers of all complete checkpoints, in order."""
        return sorted(self._manager.all_steps())

    def read_position(self, number: int) -> Position:
        """Where the run was."""
        restored = self._manager.restore(
            number, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
        )
        return Position(**restored["meta"]["position"])

    def read_rollouts(self, number: int) -> dict[str, Any]:
        """The arrays that were saved beside the state; empty where there were none."""
        if not (self._folder / str(number) / ROLLOUTS).is_dir():
            return {}
        item = ocp.args.Composite(**{ROLLOUTS: ocp.args.StandardRestore()})
        return self._manager.restore(number, args=item)[ROLLOUTS]

    def read_state(self, number: int, abstract: TrainState) -> TrainState:
        """The state, in the shapes and types of `abstract`; of its parameters the trained ones.

        Raises UserError where the checkpoint is of another model or optimizer.
        """
        self._check_same(number, abstract)
        target = _tree(abstract)
        restored = self._manager.restore(
            number, args=ocp.args.Composite(state=ocp.args.StandardRestore(target))
        )
        tree = restored["state"]
        return dataclasses.replace(abstract, **tree)

    def _check_same(self, number: int, abstract: TrainState) -> None:
        """Compare names, shapes and types first: Orbax would cast a wrong type in silence."""
        handler = ocp.StandardCheckpointHandler()
        metadata: Any = handler.metadata(epath.Path(self._folder / str(number) / "state"))
        handler.close()
        saved = _shapes(getattr(metadata, "tree", metadata))
        wanted = _shapes(_tree(abstract))
        for name in sorted(saved.keys() | wanted.keys()):
            if saved.get(name) != wanted.get(name):
                raise UserError(
                    f"checkpoint {number} does not hold this model and optimizer: {name} is "
                    f"{saved.get(name, 'missing')} there and {wanted.get(name, 'missing')} here"
                )

    def close(self) -> None:
        """Release the manager's threads."""
        self._manager.close()


def abstract_state(init: Callable[..., TrainState], *arguments: Any) -> TrainState:
    """Shapes and types of the state `init(*arguments)`, of arrays or shapes, without computing it;
    on the default device."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(init, *arguments),
    )


def _tree(state: TrainState) -> dict[str, Any]:
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    return fields | {"params": trained(state.params)}


def _shapes(tree: dict[str, Any]) -> dict[str, str]:
    """`type[shape]` of every array by its path; not the key, which is stored as raw numbers."""
    leaves = jax.tree_util.tree_flatten_with_path({k: v for k, v in tree.items() if k != "key"})[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in leaves
    }
