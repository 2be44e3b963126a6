"""Evaluation by sampling on held-out problems."""

import collections
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from deltal_jax.rollout.base import RolloutEngine
from deltal_jax.tasks.base import Problem
from deltal_jax.tasks.grading import Grades, grade
from deltal_jax.training.collect import response_texts
from deltal_jax.training.groups import rows_of
from deltal_jax.training.setup import Setup, encode_problems

#: Keeps evaluation draws apart from training draws of the same root key.
EVALUATION_STREAM = 0x6576616C


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Metrics `eval/<task>/…` and one row of plain data a response."""

    metrics: dict[str, float]
    rows: list[dict[str, Any]]


def evaluate(setup: Setup, engine: RolloutEngine, params: Any, key: jax.Array) -> Evaluation:
    """Sample k responses to every held-out problem and judge them.

    The same random numbers serve every evaluation of a run, so that two of them differ by the
    parameters alone.
    """
    config = setup.config.evaluate
    problems = setup.task.held_out(config.problems)
    prompts = encode_problems(setup, problems)
    rollout, _ = engine.generate(
        params,
        prompts,
        jax.random.fold_in(key, EVALUATION_STREAM),
        samples=config.samples_per_problem,
    )
    responses = response_texts(setup, rollout)
    asked = [problems[group] for group in rollout.group_ids]
    grades = grade(setup.task, asked, responses)
    lengths = rollout.response_lengths
    metrics: dict[str, float] = {}
    for name, numbers in _by_task(setup.task.name, problems).items():
        which = rows_of(numbers, config.samples_per_problem)
        found = accuracy_metrics(_take(grades, which), len(numbers), config.samples_per_problem) | {
            "length": float(np.mean(lengths[which])),
            "truncated_frac": float(np.mean(rollout.truncated[which])),
            "distinct": float(len({_identity(problems[i]) for i in numbers})),
        }
        metrics |= {f"eval/{name}/{k}": v for k, v in found.items()}
    rows = [
        {
            "prompt": problem.prompt,
            "response": response,
            "answer": problem.answer,
            "reward": verdict.reward,
            "correct": verdict.correct,
            "reason": verdict.reason,
            "length": int(length),
            "truncated": bool(truncated),
        }
        for problem, response, verdict, length, truncated in zip(
            asked, responses, grades.verdicts, lengths, rollout.truncated, strict=True
        )
    ]
    return Evaluation(metrics, rows)


def _by_task(name: str, problems: list[Problem]) -> dict[str, np.ndarray]:
    """The numbers of all problems under the task's name, and of a mixture each part's before."""
    parts = sorted({problem.task for problem in problems} - {""})
    found = {part: [i for i, p in enumerate(problems) if p.task == part] for part in parts}
    return {k: np.asarray(v) for k, v in (found | {name: list(range(len(problems)))}).items()}


def _take(grades: Grades, rows: np.ndarray) -> Grades:
    verdicts = [grades.verdicts[row] for row in rows]
    return Grades(grades.rewards[rows], grades.correct[rows], verdicts, {})


def accuracy_metrics(grades: Grades, problems: int, samples: int) -> dict[str, float]:
    """avg@k, pass@k and maj@k over k = `samples` responses to each problem.

    pass@k with all k samples is unbiased: the share of problems with a correct sample (Chen et al.,
    arXiv 2107.03374). maj@k judges the most frequent answer; ties count by their correct share.
    """
    correct = grades.correct.reshape(problems, samples)
    answers = [verdict.answer for verdict in grades.verdicts]
    votes = [
        _majority(answers[i * samples : (i + 1) * samples], correct[i]) for i in range(problems)
    ]
    return {
        "avg_at_k": float(correct.mean()),
        "pass_at_k": float(correct.any(axis=1).mean()),
        "maj_at_k": float(np.mean(votes)),
        "k": float(samples),
        "problems": float(problems),
    }


def write_samples(folder: Path, step: int, evaluation: Evaluation, rows: int) -> None:
    """`step-000020.jsonl` with every response, and a readable table of the first `rows`."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) for row in evaluation.rows]
    (folder / f"step-{step:06d}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    table = ["| prompt | response | tokens | verdict |", "| --- | --- | --- | --- |"]
    for row in evaluation.rows[:rows]:
        response = row["response"] + (" …" if row["truncated"] else "")
        cells = [row["prompt"], response, str(row["length"]), row["reason"]]
        escaped = (
            " ".join(cell.split()).replace("|", "\\|").replace("<", "&lt;") for cell in cells
        )
        table.append(f"| {' | '.join(escaped)} |")
    (folder / f"step-{step:06d}.md").write_text("\n".join(table) + "\n", encoding="utf-8")


def _majority(answers: list[str], correct: np.ndarray) -> float:
    counts = collections.Counter(answers)
    most = max(counts.values())
    winners = {answer for answer, count in counts.items() if count == most}
    return float(np.mean([correct[answers.index(answer)] for answer in winners]))


def _identity(problem: Problem) -> str:
    """A problem up to the order of what it gives."""
    given = problem.answer["answer"] if problem.task else problem.answer
    answer = {k: sorted(v) if isinstance(v, list) else v for k, v in dict(given).items()}
    return json.dumps(answer, sort_keys=True)
