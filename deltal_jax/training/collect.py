"""One rollout batch: sample, grade, and turn rewards and lengths into advantages and weights."""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deltal_jax.config import Config, ObjectiveConfig
from deltal_jax.data.prompts import encode_prompts, training_problems
from deltal_jax.objective.advantages import ADVANTAGES
from deltal_jax.objective.aggregation import AGGREGATIONS
from deltal_jax.objective.diagnostics import aggregation_diagnostics
from deltal_jax.rollout.engine import Engine
from deltal_jax.tasks.base import Problem
from deltal_jax.tasks.grading import Grades, Reward, grade
from deltal_jax.training.setup import Setup
from deltal_jax.types import Rollout


@dataclasses.dataclass(frozen=True)
class Collected:
    """A graded rollout batch, ready for updates."""

    problems: list[Problem]
    rollout: Rollout
    responses: list[str]
    grades: Grades
    advantages: np.ndarray
    weights: np.ndarray
    metrics: dict[str, float]


def collect(
    setup: Setup,
    engine: Engine,
    params: Any,
    key: jax.Array,
    *,
    step: int,
    rewards: Sequence[Reward | str] = ("task",),
) -> Collected:
    """The rollout batch of one RL step (counted from 0): prompts step·P … step·P + P − 1."""
    config = setup.config
    started = time.perf_counter()
    P, start = config.rl.prompts_per_step, step * config.rl.prompts_per_step
    problems = training_problems(setup.task, config.seed, start, P)
    width = config.rollout.max_prompt_length
    prompts = encode_prompts(problems, setup.tokenizer, width, start)
    rollout, stats = engine.generate(
        params, prompts, key, samples=config.rl.samples_per_prompt, step=step
    )
    sampled = time.perf_counter()
    responses = response_texts(setup, rollout)
    per_response = [problems[group] for group in rollout.group_ids]
    grades = grade(setup.task, per_response, responses, rewards)
    graded = time.perf_counter()
    lengths = rollout.response_lengths
    advantages, weights, diagnostics = _advantages_and_weights(
        grades.rewards,
        lengths,
        rollout.group_ids,
        minibatch_ids(config, rollout),
        objective=config.objective,
        normalizer=normalizer(config),
    )
    metrics = {
        **reward_metrics(grades, np.asarray(rollout.group_ids)),
        **length_metrics(lengths, rollout.truncated, grades.correct),
        **{f"aggregation/{name}": float(value) for name, value in diagnostics.items()},
        "advantage/mean": float(np.mean(advantages)),
        "advantage/min": float(np.min(advantages)),
        "advantage/max": float(np.max(advantages)),
        "rollout/utilization": stats.utilization,
        "time/rollout": sampled - started,
        "time/reward": graded - sampled,
    }
    arrays = np.asarray(advantages), np.asarray(weights)
    return Collected(problems, rollout, responses, grades, *arrays, metrics)


def response_texts(setup: Setup, rollout: Rollout) -> list[str]:
    """The text of every response: its trained tokens, without the end-of-sequence id."""
    eos = set(setup.tokenizer.eos_ids)
    texts = []
    for row, prompt, length in zip(
        rollout.tokens, rollout.prompt_lengths, rollout.lengths, strict=True
    ):
        ids = row[prompt:length].tolist()
        texts.append(setup.tokenizer.decode(ids[:-1] if ids and ids[-1] in eos else ids))
    return texts


def normalizer(config: Config) -> float:
    """The constant M of the aggregation."""
    given = config.objective.normalizer
    return float(config.rollout.max_response_length) if given is None else given


def minibatch_ids(config: Config, rollout: Rollout) -> np.ndarray:
    """Which optimizer update each response belongs to: whole prompts, in order."""
    prompts_each = config.rl.prompts_per_step // config.rl.updates_per_rollout
    return (np.asarray(rollout.group_ids) // prompts_each).astype(np.int32)


@functools.partial(jax.jit, static_argnames=("objective", "normalizer"))
def _advantages_and_weights(
    rewards: jax.Array,
    lengths: jax.Array,
    group_ids: jax.Array,
    minibatches: jax.Array,
    *,
    objective: ObjectiveConfig,
    normalizer: float,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """The two places where the method enters, side by side. A missing reward leaves both."""
    known = ~jnp.isnan(rewards)
    advantages = ADVANTAGES[objective.advantage](rewards, group_ids)
    options: dict[str, Any] = {}
    if objective.aggregation == "delta_l":
        options["alpha"] = objective.alpha
    if objective.aggregation in ("delta_l", "constant_length"):
        options["normalizer"] = normalizer
    scope_ids = {"batch": None, "minibatch": minibatches, "group": group_ids}[objective.scope]
    weights = AGGREGATIONS[objective.aggregation](
        lengths, where=known, scope_ids=scope_ids, **options
    )
    diagnostics = aggregation_diagnostics(weights, lengths, advantages, normalizer=normalizer)
    return advantages, weights, diagnostics


def reward_metrics(grades: Grades, group_ids: np.ndarray) -> dict[str, float]:
    """Means over the known rewards; groups of one reward teach nothing: all ≤ 0, or all above."""
    known = ~np.isnan(grades.rewards)
    rewards = grades.rewards[known]
    metrics = {
        "reward/mean": _mean(rewards),
        "reward/std": float(np.std(rewards)) if rewards.size else float("nan"),
        "reward/missing": float(np.sum(~known)),
        "accuracy/mean": _mean(grades.correct),
    }
    if len(grades.parts) > 1:
        metrics |= {f"reward/{k}/mean": _mean(v[~np.isnan(v)]) for k, v in grades.parts.items()}
    groups = [grades.rewards[(group_ids == g) & known] for g in np.unique(group_ids)]
    constant = [g[0] for g in groups if g.size and np.all(g == g[0])]
    zero = sum(reward <= 0 for reward in constant)
    metrics |= {
        "reward/frac_zero_std": len(constant) / len(groups),
        "reward/frac_all_zero": zero / len(groups),
        "reward/frac_all_one": (len(constant) - zero) / len(groups),
    }
    return metrics


def length_metrics(
    lengths: np.ndarray, truncated: np.ndarray, correct: np.ndarray
) -> dict[str, float]:
    """Trained tokens a response."""
    low, middle, high = np.percentile(lengths, [5, 50, 95])
    return {
        "length/mean": float(np.mean(lengths)),
        "length/min": float(np.min(lengths)),
        "length/max": float(np.max(lengths)),
        "length/p5": float(low),
        "length/p50": float(middle),
        "length/p95": float(high),
        "length/truncated_frac": float(np.mean(truncated)),
        "length/correct_mean": _mean(lengths[correct]),
        "length/wrong_mean": _mean(lengths[~correct]),
    }


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if values.size else float("nan")
