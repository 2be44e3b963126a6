"""Evaluation by sampling on held-out problems."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from deltal_jax.analysis.accuracy import (
    avg_at_n,
    best_at_k_bootstrap,
    distinct,
    majority_at_n,
    pass_at_k,
    powers_of_two,
)
from deltal_jax.analysis.statistics import bootstrap_intervals
from deltal_jax.parallel.sharding import host_key
from deltal_jax.rollout.base import RolloutEngine
from deltal_jax.tasks.base import Problem
from deltal_jax.tasks.grading import MISSING, Grades, Journal
from deltal_jax.training.collect import response_texts
from deltal_jax.training.groups import rows_of
from deltal_jax.training.setup import Setup, encode_problems
from deltal_jax.training.verdicts import grade_together

#: Keeps evaluation draws apart from training draws of the same root key.
EVALUATION_STREAM = 0x6576616C


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Metrics `eval/<data set>/…` and one row of plain data a response."""

    metrics: dict[str, float]
    rows: list[dict[str, Any]]


def evaluate(
    setup: Setup,
    engine: RolloutEngine,
    params: Any,
    key: jax.Array,
    journal: Journal | None = None,
) -> Evaluation:
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
        jax.random.fold_in(host_key(key), EVALUATION_STREAM),
        samples=config.samples_per_problem,
    )
    responses = response_texts(setup, rollout)
    asked = [problems[group] for group in rollout.group_ids]
    grades = grade_together(
        setup.task, asked, responses, journal=journal, numbers=rollout.group_ids
    )
    lengths = rollout.response_lengths
    metrics: dict[str, float] = {}
    sets = data_sets(setup.task.name, problems)
    for name, numbers in sets.items():
        which = rows_of(numbers, config.samples_per_problem)
        identities = [_identity(problems[number]) for number in numbers]
        found = accuracy_metrics(_take(grades, which), identities) | {
            "length": float(np.mean(lengths[which])),
            "truncated_frac": float(np.mean(rollout.truncated[which])),
        }
        metrics |= {f"eval/{name}/{k}": v for k, v in found.items()}
    metrics |= macro_averages(setup.task.name, sets, metrics)
    rows = [
        {
            "dataset": "/".join(filter(None, (problem.task, problem.dataset))),
            "prompt": problem.prompt,
            "response": response,
            "answer": problem.answer,
            "reward": verdict.reward,
            "correct": verdict.correct,
            "reason": verdict.reason,
            "missing": verdict.missing,
            "length": int(length),
            "truncated": bool(truncated),
        }
        for problem, response, verdict, length, truncated in zip(
            asked, responses, grades.verdicts, lengths, rollout.truncated, strict=True
        )
    ]
    return Evaluation(metrics, rows)


def data_sets(task: str, problems: Sequence[Problem]) -> dict[str, np.ndarray]:
    """The numbers of the problems that figures are given of, by name: each data set of a task that
    has several (`task/set`), each part of a mixture, and at the end all, under the task's name."""
    found: dict[str, list[int]] = {}
    parts = sorted({problem.task for problem in problems} - {""})
    for part in parts or [""]:
        own = [number for number, problem in enumerate(problems) if problem.task == part]
        names = list(dict.fromkeys(problems[number].dataset for number in own))
        for name in names if len(names) > 1 else ():
            path = f"{part or task}/{name or 'other'}"
            found[path] = [number for number in own if problems[number].dataset == name]
        found[part or task] = own
    found.pop(task, None)
    found[task] = list(range(len(problems)))
    return {name: np.asarray(numbers) for name, numbers in found.items()}


def macro_averages(
    task: str, sets: dict[str, np.ndarray], metrics: dict[str, float]
) -> dict[str, float]:
    """Means of the sets' own figures, each set alike, beside that of all problems alike: over the
    parts of a mixture, and over the data sets of a task."""
    found = {}
    for parent in sets:
        own = [name for name in sets if name.startswith(f"{parent}/")]
        if parent == task and not own:
            own = [name for name in sets if "/" not in name and name != task]
        for figure in ("avg_at_k", "pass_at_k") if own else ():
            values = [metrics[f"eval/{name}/{figure}"] for name in own]
            found[f"eval/{parent}/macro_{figure}"] = float(np.mean(values))
    return found


def _take(grades: Grades, rows: np.ndarray) -> Grades:
    verdicts = [grades.verdicts[row] for row in rows]
    return Grades(grades.rewards[rows], grades.correct[rows], verdicts, {})


def accuracy_metrics(grades: Grades, identities: Sequence[str]) -> dict[str, float]:
    """Figures of `analysis.accuracy` over k responses to each problem, with their 95% intervals.

    `identities` are equal for copies of a problem. A response without a verdict is not correct, and
    is counted.
    """
    samples = len(grades.verdicts) // len(identities)
    correct = grades.correct.reshape(-1, samples)
    clusters = distinct(identities)
    figures = {
        "avg_at_k": avg_at_n(correct),
        **{f"pass_at_{k}": pass_at_k(correct, k) for k in powers_of_two(samples)[1:-1]},
        "pass_at_k": pass_at_k(correct, samples),
        "maj_at_k": majority_at_n([verdict.answer for verdict in grades.verdicts], correct),
        "best_at_k_bootstrap": best_at_k_bootstrap(correct, samples),
    }
    metrics = {name: float(values.mean()) for name, values in figures.items()}
    names = ("avg_at_k", "pass_at_k")
    bounds = bootstrap_intervals(np.stack([figures[name] for name in names], axis=1), clusters)
    for name, (low, high) in zip(names, bounds, strict=True):
        metrics |= {f"{name}_low": float(low), f"{name}_high": float(high)}
    counts = np.bincount(grades.missing, minlength=len(MISSING))
    causes = zip(MISSING, counts, strict=True)
    return metrics | {
        "k": float(samples),
        "problems": float(len(identities)),
        "distinct": float(clusters.max() + 1),
        "missing_frac": float(np.isnan(grades.rewards).mean()),
        **{f"missing_{cause}": float(n) for cause, n in causes if cause and n},
    }


def write_samples(folder: Path, name: str, evaluation: Evaluation, rows: int) -> None:
    """`<name>.jsonl` with every response, and `<name>.md`, a readable table of the first `rows`."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) for row in evaluation.rows]
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    table = ["| prompt | response | tokens | verdict |", "| --- | --- | --- | --- |"]
    for row in evaluation.rows[:rows]:
        response = row["response"] + (" …" if row["truncated"] else "")
        cells = [row["prompt"], response, str(row["length"]), row["reason"]]
        escaped = (
            " ".join(cell.split()).replace("|", "\\|").replace("<", "&lt;") for cell in cells
        )
        table.append(f"| {' | '.join(escaped)} |")
    (folder / f"{name}.md").write_text("\n".join(table) + "\n", encoding="utf-8")


def samples_name(step: int) -> str:
    """What `write_samples` calls the files of a step."""
    return f"step-{step:06d}"


def _identity(problem: Problem) -> str:
    """A problem up to the order of what it gives; where it gives no lists, its prompt."""
    given = problem.answer["answer"] if problem.task else problem.answer
    if not isinstance(given, dict) or not any(isinstance(v, list) for v in given.values()):
        return problem.prompt
    answer = {k: sorted(v, key=str) if isinstance(v, list) else v for k, v in given.items()}
    return json.dumps(answer, sort_keys=True)
