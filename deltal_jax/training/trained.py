"""A finished or running run, opened for use: its newest parameters with all that they need."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from deltal_jax.backend import enable_compile_cache
from deltal_jax.config import load_config
from deltal_jax.errors import UserError
from deltal_jax.training import run_folder
from deltal_jax.training.checkpoint import Checkpoints, Position, abstract_state
from deltal_jax.training.optimizer import make_optimizer
from deltal_jax.training.setup import Setup, init_params, make_setup
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
        position, tokenizer = checkpoints.read_meta(newest)
        setup = make_setup(config, tokenizer)
        state = checkpoints.read_state(newest, like_saved(setup, position.phase))
    finally:
        checkpoints.close()
    return Trained(setup, state.params, state.key, position)


def check_seed(seed: int) -> None:
    """Raises UserError for a seed that a random key does not take."""
    if not 0 <= seed < 2**31:
        raise UserError(f"--seed: must be in 0 … 2147483647, got {seed}")


def like_saved(setup: Setup, phase: str) -> TrainState:
    """Shapes and types of the state that a phase saves."""
    config = setup.config
    optimizer = {
        "sft": lambda: make_optimizer(config.sft.optimizer, config.sft.steps),
        "rl": lambda: make_optimizer(config.rl.optimizer, config.rl.updates),
    }[phase]()

    def init() -> TrainState:
        key = jax.random.key(config.seed, impl="threefry2x32")
        params = init_params(setup, key)
        reference = params if phase == "rl" and config.objective.kl_coefficient else None
        updates = jax.numpy.zeros((), "int32")
        return TrainState(params, optimizer.init(params), updates, key, reference)

    return abstract_state(init)
