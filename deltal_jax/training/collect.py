"""One rollout batch: sample and grade."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from deltal_jax.data.prompts import training_problems
from deltal_jax.rollout.base import RolloutEngine
from deltal_jax.tasks.base import Problem
from deltal_jax.tasks.grading import Grades, Reward, grade
from deltal_jax.training.setup import Setup, encode_problems
from deltal_jax.types import Rollout


@dataclasses.dataclass(frozen=True)
class Collected:
    """A graded rollout batch, ready for updates."""

    problems: list[Problem]
    rollout: Rollout
    responses: list[str]
    grades: Grades
    metrics: dict[str, float]


def collect(
    setup: Setup,
    engine: RolloutEngine,
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
    prompts = encode_problems(setup, problems, start)
    rollout, stats = engine.generate(
        params, prompts, key, samples=config.rl.samples_per_prompt, step=step
    )
    sampled = time.perf_counter()
    responses = response_texts(setup, rollout)
    per_response = [problems[group] for group in rollout.group_ids]
    grades = grade(setup.task, per_response, responses, rewards)
    graded = time.perf_counter()
    metrics = {
        **reward_metrics(grades, np.asarray(rollout.group_ids)),
        **length_metrics(rollout.response_lengths, rollout.truncated, grades.correct),
        "rollout/utilization": stats.utilization,
        "rollout/utilization_queued": stats.utilization_queued,
        "rollout/utilization_ideal": stats.ideal_utilization,
        "time/rollout": sampled - started,
        "time/reward": graded - sampled,
    }
    return Collected(problems, rollout, responses, grades, metrics)


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
