"""A finished or running run, opened for use: its newest parameters with all that they need."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax

from deltal_jax.backend import enable_compile_cache
from deltal_jax.config import load_config
from deltal_jax.errors import UserError
from deltal_jax.model.lora import overlay
from deltal_jax.training import run_folder
from deltal_jax.training.checkpoint import Checkpoints, Position, abstract_state
from deltal_jax.training.setup import (
    Setup,
    abstract_trained,
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


def load_trained(folder: Path, overrides: dict[str, Any]) -> Trained:
    """The newest checkpoint of a run folder. Raises UserError where there is none."""
    enable_compile_cache()
    run_folder.load_run_config(folder)
    config = load_config(folder / run_folder.CONFIG, overrides)
    checkpoints = Checkpoints(folder / run_folder.CHECKPOINTS, config.checkpoint.keep_last)
    try:
        newest = checkpoints.newest()
        if newest is None:
            raise UserError(f"{folder}: no checkpoint yet")
        position = checkpoints.read_position(newest)
        setup = make_setup(config, run_folder.model_files(folder))
        state = restore_state(checkpoints, newest, setup, position)
    finally:
        checkpoints.close()
    return Trained(setup, state.params, state.key, position)


def restore_state(
    checkpoints: Checkpoints, number: int, setup: Setup, position: Position
) -> TrainState:
    """The state of a checkpoint. Frozen parameters, which are not in it, come from `model.path`."""
    state = checkpoints.read_state(number, like_saved(setup, position.phase))
    if setup.architecture.lora is None:
        return state
    return dataclasses.replace(state, params=overlay(load_checkpoint(setup), state.params))


def like_saved(setup: Setup, phase: str) -> TrainState:
    """Shapes and types of the state that a phase saves, of whose parameters only the trained."""
    config = setup.config
    update = make_update(setup, phase)
    reference = phase == "rl" and config.objective.kl_coefficient > 0
    key = jax.eval_shape(lambda: jax.random.key(config.seed, impl="threefry2x32"))
    init = functools.partial(update.init, reference=reference)
    return abstract_state(init, abstract_trained(setup), key)
