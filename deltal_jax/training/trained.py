"""Trained parameters with all that they need: of a finished or running run, or of a checkpoint
folder under a config."""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from deltal_jax.backend import enable_compile_cache
from deltal_jax.checkpoints.manifest import Damaged, Position, read_manifest
from deltal_jax.checkpoints.reader import SavedSteps, abstract_state
from deltal_jax.checkpoints.retention import Keep, Saved, best
from deltal_jax.config import MeshConfig, ModelConfig, load_config
from deltal_jax.config.rules import SHAPE
from deltal_jax.errors import UserError
from deltal_jax.model import huggingface
from deltal_jax.model.lora import overlay
from deltal_jax.training import run_folder
from deltal_jax.training.setup import (
    Setup,
    abstract_trained,
    check_context,
    find_base,
    load_checkpoint,
    make_setup,
    make_update,
)
from deltal_jax.types import TrainState


@dataclasses.dataclass(frozen=True)
class Trained:
    """Parameters with the setup that they were trained in."""

    setup: Setup
    params: Any
    key: jax.Array
    position: Position


#: Fields of a config that has no mesh of its own.
ONE_DEVICE = {f"mesh.{name}": value for name, value in vars(MeshConfig()).items()}
#: Fields of one whose moments lie on the devices.
ON_DEVICE = {f"{phase}.optimizer.offload": False for phase in ("sft", "rl")}
#: Which RL steps of a run; "best": by its own evaluations; None: its newest checkpoint, of whatever
#: phase.
Steps = Sequence[int] | Literal["all", "best"] | None


def load_trained(folder: Path, overrides: dict[str, Any], steps: Steps = None) -> Trained:
    """A checkpoint of a run folder, the first of these. Raises as `load_steps`."""
    with contextlib.closing(load_steps(folder, overrides, steps)) as found:
        return next(found)


def load_steps(
    folder: Path, overrides: dict[str, Any], steps: Steps
) -> Generator[Trained, None, None]:
    """The checkpoints of a run after these RL steps, one after the other, in one setup.

    Raises UserError for a step that has no checkpoint, or where there is none at all.
    """
    enable_compile_cache()
    origin = {"config": run_folder.fixed_fields(run_folder.load_run_config(folder))}
    # Who trained on many devices may look at it on one, which may reach no memory of the host.
    config = run_folder.load_run_config(folder, ONE_DEVICE | ON_DEVICE | overrides)
    checkpoints = SavedSteps(run_folder.checkpoints_folder(folder, config))
    numbers = _numbers(folder, checkpoints, steps, config.sft.steps)
    setup = make_setup(config, run_folder.model_files(folder))
    if steps == "best":
        numbers = _best(checkpoints, numbers, run_folder.best_metric(config, setup.task.name))
    changed = [name for name in overrides if name.split(".")[0] == "task"]
    if changed:
        _check_words(setup, ", ".join(changed))
    for number in numbers:
        checkpoints.check_origin(number, origin)
        position = checkpoints.read_position(number)
        state = restore_state(checkpoints, number, setup, position)
        yield Trained(setup, state.params, state.key, position)


def load_pretrained(path: str, experiment: str, overrides: dict[str, Any]) -> Trained:
    """A Hugging Face folder or hub id, as a run of this config would begin with it.

    What the config says of a new model's shape, and of adapters, does not apply.
    """
    enable_compile_cache()
    shapeless = {f"model.{name}": getattr(ModelConfig(), name) for name in SHAPE}
    given = shapeless | overrides | {"lora.rank": 0, "model.path": path}
    config = load_config(experiment, given)
    setup = make_setup(config)
    check_context(config, setup.checkpoint_config)
    _check_words(setup, "--config")
    params = huggingface.load_params(
        find_base(setup), setup.architecture, dtype=jax.numpy.dtype(config.model.compute_dtype)
    )
    key = jax.random.split(root_key(config.seed))[1]  # that of a run
    return Trained(setup, params, key, Position("", 0, 0, 0))


def root_key(seed: int) -> jax.Array:
    """Of a run: split into one for the first parameters, and one for all that is sampled."""
    return jax.random.key(seed, impl="threefry2x32")


def _numbers(folder: Path, checkpoints: SavedSteps, steps: Steps, warm_up: int) -> list[int]:
    """The numbers of the checkpoints after these RL steps."""
    found = [number - warm_up for number in checkpoints.all()]
    if not found:
        raise UserError(f"{folder}: no checkpoint yet")
    if steps is None:
        newest, damaged = checkpoints.newest_intact()
        for number, what in damaged.items():
            print(f"note: checkpoint {number} is damaged: {what}", file=sys.stderr)
        return [] if newest is None else [newest]
    known = [step for step in found if step >= 0]
    if steps in ("all", "best"):
        return [step + warm_up for step in known]
    for step in steps:
        if step not in known:
            raise UserError(
                f"--step: {folder} has no checkpoint after RL step {step}, but after "
                f"{', '.join(map(str, known)) or 'none'}; checkpoint.keep_last says how many stay"
            )
    return [step + warm_up for step in steps]


def _best(checkpoints: SavedSteps, numbers: Sequence[int], metric: str) -> list[int]:
    """Of these the one with the best evaluation. Raises UserError where none has any."""
    saved = {}
    for number in numbers:
        with contextlib.suppress(Damaged):
            saved[number] = Saved(None, read_manifest(checkpoints.path(number)).metrics)
    found = best(saved, Keep(best=1, metric=metric))
    if not found:
        raise UserError(
            f"--step: no checkpoint in {checkpoints.folder} has an evaluation with {metric!r}; "
            "checkpoint.keep_best keeps some"
        )
    return found


def _check_words(setup: Setup, fields: str) -> None:
    """Raises UserError, naming the fields that said so, where the task has words that the tokenizer
    lacks: otherwise the first such prompt would be blamed."""
    for word in setup.task.vocabulary() or ():
        try:
            setup.tokenizer.encode(word)
        except UserError as error:
            raise UserError(
                f"{fields}: the model's tokenizer has no {word!r}, a word of that task; evaluate "
                "the task that it was trained on"
            ) from error


def restore_state(
    checkpoints: SavedSteps, number: int, setup: Setup, position: Position
) -> TrainState:
    """The state of a checkpoint. Frozen parameters, which are not in it, come from `model.path`."""
    state = checkpoints.read_state(number, like_saved(setup, position.phase))
    if setup.architecture.lora is None:
        return state
    return dataclasses.replace(state, params=overlay(load_checkpoint(setup), state.params))


def like_saved(setup: Setup, phase: str) -> TrainState:
    """Shapes and types of the state that a phase saves, of whose parameters only the trained, and
    where they lie on the mesh of this run, whatever the one that saved them had."""
    config = setup.config
    update = make_update(setup, phase)
    reference = phase == "rl" and config.objective.kl_coefficient > 0
    key = jax.eval_shape(lambda: root_key(config.seed))
    init = functools.partial(update.init, reference=reference)
    state = abstract_state(init, abstract_trained(setup), key)
    return jax.tree.map(
        lambda x, own: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own),
        state,
        update.layout(state),
    )
