"""A small run of every part of a step, and what two runs are compared by, bit for bit."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from deltal_jax.checkpoints.manifest import Position
from deltal_jax.checkpoints.reader import SavedSteps
from deltal_jax.metrics import load_metrics
from deltal_jax.training.run_folder import (
    CHECKPOINTS,
    ROLLOUTS,
    SAMPLES,
    load_run_config,
    model_files,
)
from deltal_jax.training.setup import make_setup
from deltal_jax.training.trained import like_saved

#: Metrics that no two runs share.
CLOCKS = ("time/", "throughput/", "overlap/")
#: As few and small programs as a run has: one length, and no more slots than are kept to the end.
TINY = {
    "task.countdown.numbers": 2,
    "task.countdown.max_number": 5,
    "task.countdown.max_value": 25,
    "model.layers": 1,
    "model.d_model": 16,
    "model.head_dim": 8,
    "model.heads": 2,
    "model.d_ff": 16,
    "length_buckets": [16],
    "rollout.max_prompt_length": 8,
    "rollout.max_response_length": 8,
    "rollout.slots": 4,
    "sft.steps": 2,
    "sft.log_every": 1,
    "sft.tokens_per_batch": 64,
    "rl.steps": 4,
    "rl.prompts_per_step": 4,
    "rl.samples_per_prompt": 4,
    "rl.tokens_per_microbatch": 64,
    "rl.optimizer.warmup_steps": 2,
    "evaluate.every": 2,
    "evaluate.problems": 4,
    "evaluate.samples_per_problem": 4,
    "checkpoint.every": 1,
    "checkpoint.keep_last": 9,
    "run.report": False,
}


def mixed_reward(prompts: list[str], responses: list[str], answers: list[Any]) -> list[float]:
    """Of every response its own, so that an untrained model has something to learn from."""
    del prompts, answers
    return [sum(map(ord, response)) % 5 / 4 for response in responses]


def timeless(run: Path) -> list[dict[str, Any]]:
    """Metric lines without clocks."""
    lines = load_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in x.items() if not k.startswith(CLOCKS)} for x in lines]


def arrays_saved(run: Path, number: int) -> dict[str, np.ndarray]:
    """Every array of the state in a checkpoint of the RL phase, by its path."""
    setup = make_setup(load_run_config(run), model_files(run))
    state = SavedSteps(run / CHECKPOINTS).read_state(number, like_saved(setup, "rl"))
    state = dataclasses.replace(state, key=jax.random.key_data(state.key))
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def copied(run: Path, to: Path, number: int) -> Path:
    """The run as if it had died after this checkpoint, in the middle of what came next."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(run, to)
    for folder in (to / CHECKPOINTS).iterdir():
        if folder.name.isdigit() and int(folder.name) > number:
            shutil.rmtree(folder)
    return to


def assert_same(found: Path, wanted: Path) -> None:
    """Two runs are one: every metric but clocks, every sampled token, and in their last checkpoint
    every array and counter."""
    assert timeless(found) == timeless(wanted)
    for path in sorted(path for name in (SAMPLES, ROLLOUTS) for path in (wanted / name).iterdir()):
        assert (found / path.relative_to(wanted)).read_bytes() == path.read_bytes(), path.name
    saved = SavedSteps(found / CHECKPOINTS), SavedSteps(wanted / CHECKPOINTS)
    last = saved[1].newest()
    assert last is not None and saved[0].newest() == last
    ours, theirs = (dataclasses.asdict(steps.read_position(last)) for steps in saved)
    assert ours | {"metrics_bytes": 0} == theirs | {"metrics_bytes": 0}  # clocks have digits
    jax.tree.map(np.testing.assert_array_equal, *(steps.read_rollouts(last) for steps in saved))
    ours, theirs = arrays_saved(found, last), arrays_saved(wanted, last)
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert ours[name].dtype == array.dtype and ours[name].tobytes() == array.tobytes(), name


def newest_verified(run: Path) -> tuple[Position | None, dict[int, str]]:
    """Where the newest checkpoint that is complete and intact goes on from, if there is one; and
    what is wrong with those after it."""
    saved = SavedSteps(run / CHECKPOINTS)
    number, damaged = saved.newest_intact()
    return None if number is None else saved.read_position(number), damaged
