"""One cell: an RL training run from given parameters, in memory, and what it came to."""

import dataclasses
import functools
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from deltal_jax.compare.clock import Stopwatch
from deltal_jax.compare.plan import Cell, chosen
from deltal_jax.compare.warmups import PLACES, digest
from deltal_jax.config import Config
from deltal_jax.guard.pulse import phase
from deltal_jax.metrics import finite
from deltal_jax.training.ahead import open_batches
from deltal_jax.training.collect import Collected
from deltal_jax.training.evaluate import Evaluation, evaluate
from deltal_jax.training.meters import LiveMeters
from deltal_jax.training.objective import Weighted, weigh
from deltal_jax.training.opening import choose_rewards, data_fingerprint
from deltal_jax.training.policy import Transform, update_policy
from deltal_jax.training.run_folder import write_text
from deltal_jax.training.setup import Setup, make_engine, make_update
from deltal_jax.training.trained import root_key

#: Of a cell's file. Raise it when the same fields would give another result, as where a default
#: changes.
FORMAT = 1
#: Keeps the draws of permuted weights apart from others of the same seed.
PERMUTATION = 0x7065726D
#: Sections of the config that decide nothing of a result.
IDLE = ("run.", "checkpoint.", "guard.", "watchdog.")
#: Metrics that are not kept: they are not the same twice.
CLOCKS = ("time/", "throughput/", "overlap/")
#: Of a metric of a step, significant digits that are kept.
DIGITS = 6
#: Told the step and its metrics.
Show = Callable[[int, dict[str, float]], None]


def fingerprint(setup: Setup, cell: Cell, warmup: str) -> str:
    """A hash of all that decides a cell's result; `warmup` is the identity of what it starts
    from."""
    facts = {
        "format": FORMAT,
        "config": decides(cell.config),
        "permuted": cell.method.permuted,
        "data": data_fingerprint(setup.task),
        "warmup": warmup,
    }
    return digest(facts)


def decides(config: Config) -> dict[str, Any]:
    """The fields that decide a result, where they are not at their default."""
    return {
        name: value
        for name, value in chosen(config).items()
        if not name.startswith(IDLE) and name not in PLACES
    }


def run_cell(setup: Setup, cell: Cell, start: Any, known: str, show: Show) -> dict[str, Any]:
    """Train the cell's method from the parameters `start`, which stay as they are, and evaluate on
    the way. Returns the content of its file; `known` is its fingerprint.

    Prompts and random numbers depend on the seed alone, so that cells of one seed are paired.
    """
    began, cpu = time.perf_counter(), time.process_time()
    setup = dataclasses.replace(setup, config=cell.config)
    config, watch = cell.config, Stopwatch()
    update = make_update(setup, "rl")
    key = jax.random.split(root_key(cell.seed))[1]
    state = update.init(start, key, reference=config.objective.kl_coefficient > 0)
    evaluator = make_engine(setup, temperature=config.evaluate.temperature)
    evaluations: list[dict[str, Any]] = []
    train: list[dict[str, float]] = []
    first: dict[str, list[Any]] = {}
    tokens, live = 0, LiveMeters(config)

    def look(step: int) -> None:
        with phase("evaluation", f"RL step {step}"):
            found = evaluate(setup, evaluator, state.params, state.key)
        counted = {"step": step, "updates": int(state.updates), "tokens": tokens}
        evaluations.append(counted | {"seconds": watch.seconds} | summarise(found, setup.task.name))

    look(0)
    rewards = choose_rewards(config, None)
    with open_batches(setup, state.key, rewards, next_prompt=0, rollouts={}) as batches:
        for step in range(1, config.rl.steps + 1):
            transform = _transform(cell, step)
            with watch.running():
                batch = batches.next(state.params, step - 1)
            if step == 1:
                first = first_batch(setup, batch, live.alpha, transform)
            with watch.running():
                state, metrics = update_policy(
                    setup, update, state, batch, live=live, transform=transform
                )
                jax.block_until_ready(state.params)
            train.append(metrics | batch.metrics)
            trained = float(batch.rollout.response_lengths.sum())
            tokens += int(batch.metrics.get("rollout/tokens", trained))
            if evaluates(config, step):
                look(step)
            show(step, {"accuracy": evaluations[-1]["avg_at_k"], **train[-1]})
    return {
        "format": FORMAT,
        "method": cell.method.name,
        "seed": cell.seed,
        "warmup": cell.warmup,
        "fingerprint": known,
        "set": cell.method.overrides,
        "k": config.evaluate.samples_per_problem,
        "problems": len(evaluations[0]["correct"]),
        "evaluations": evaluations,
        "train": by_name(train),
        "first_batch": first,
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
        "environment": {
            "jax": jax.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
        },
    }


def evaluates(config: Config, step: int) -> bool:
    """Whether there is an evaluation after this RL step; 0: before the first."""
    every = config.evaluate.every
    return step in (0, config.rl.steps) or (every > 0 and step % every == 0)


def summarise(found: Evaluation, task: str) -> dict[str, Any]:
    """What of an evaluation a cell keeps: figures, and of each problem how many of its k responses
    were right."""
    prefix = f"eval/{task}/"
    lengths = np.asarray([row["length"] for row in found.rows], np.float64)
    right = np.asarray([row["correct"] for row in found.rows], bool)
    problems = int(found.metrics[f"{prefix}problems"])
    names = ("avg_at_k", "pass_at_k", "length", "truncated_frac")
    return {name: found.metrics[f"{prefix}{name}"] for name in names} | {
        "length_right": float(lengths[right].mean()) if right.any() else None,
        "length_wrong": float(lengths[~right].mean()) if not right.all() else None,
        "correct": right.reshape(problems, -1).sum(axis=1).tolist(),
    }


def first_batch(
    setup: Setup, batch: Collected, alpha: float, transform: Transform | None
) -> dict[str, list[Any]]:
    """Lengths, weights and advantages of a batch: those of step 1 are of the same responses for all
    methods of a seed."""
    weighted = weigh(setup.config, batch.rollout, batch.rewards, alpha)
    if transform is not None:
        weighted = transform(weighted)
    return {
        "lengths": batch.rollout.response_lengths.tolist(),
        "weights": [float(x) for x in weighted.weights],
        "advantages": [float(x) for x in weighted.advantages],
    }


def permute_weights(weighted: Weighted, seed: int, step: int) -> Weighted:
    """The weights of a batch dealt out anew among the responses that carry one, by draws of the
    seed and the step alone. The meters stay those of the weights before."""
    carrying = np.flatnonzero(weighted.weights)
    drawn = np.random.default_rng((PERMUTATION, seed, step)).permutation(carrying)
    weights = weighted.weights.copy()
    weights[carrying] = weighted.weights[drawn]
    return dataclasses.replace(weighted, weights=weights)


def _transform(cell: Cell, step: int) -> Transform | None:
    if not cell.method.permuted:
        return None
    return functools.partial(permute_weights, seed=cell.seed, step=step)


def by_name(steps: list[dict[str, float]]) -> dict[str, list[float | None]]:
    """Of each metric that repeats its values a list with one a step; null where a step has none, or
    none that is finite."""
    names = sorted({name for step in steps for name in step if not name.startswith(CLOCKS)})
    return {name: [_short(step.get(name, float("nan"))) for step in steps] for name in names}


def _short(value: float) -> float | None:
    return finite(float(f"{value:.{DIGITS}g}"))


def save_result(path: Path, content: dict[str, Any]) -> None:
    """Write a file of results, a line for each of its parts, as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{json.dumps(name)}: {json.dumps(part)}" for name, part in content.items()]
    write_text(path, "{" + ",\n ".join(lines) + "}\n")
