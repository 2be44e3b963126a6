"""Grading by all processes of a run: each judges its own share, and all get every verdict."""

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from deltal_jax.parallel.processes import gather, on_each, own_share
from deltal_jax.tasks.base import Problem, Task, Verdict
from deltal_jax.tasks.grading import Grades, Journal, Reward, grade


def grade_together(
    task: Task,
    problems: Sequence[Problem],
    responses: Sequence[str],
    rewards: Sequence[Reward | str] = ("task",),
    early: Sequence[Future[Verdict] | None] = (),
    journal: Journal | None = None,
    *,
    numbers: Int[np.ndarray, " B"],
) -> Grades:
    """`tasks.grading.grade`, the same in all processes, though a verifier has time limits and a
    reward may be random.

    `numbers` are those of the responses' prompts, by which whole groups are dealt out: reward
    functions see the responses of some groups. Raises in all processes what `grade` raises in one.
    """
    if jax.process_count() == 1:
        return grade(task, problems, responses, rewards, early, journal)
    own = np.flatnonzero(own_share(numbers)).tolist()

    def judge() -> dict[str, Any]:
        asked, given = [problems[i] for i in own], [responses[i] for i in own]
        begun = [early[i] for i in own] if early else []
        if not own:  # a reward function need not be ready for that
            return {}
        return _plain(own, grade(task, asked, given, rewards, begun, journal))

    return _joined([part for part in gather(on_each(judge)) if part], len(responses))


def _plain(own: list[int], grades: Grades) -> dict[str, Any]:
    return {
        "rows": own,
        "rewards": grades.rewards.tolist(),
        "verdicts": [
            [v.reward and float(v.reward), bool(v.correct), v.reason, v.answer, v.missing]
            for v in grades.verdicts
        ],
        "parts": {name: values.tolist() for name, values in grades.parts.items()},
    }


def _joined(parts: list[dict[str, Any]], count: int) -> Grades:
    rows = np.concatenate([part["rows"] for part in parts])
    order = np.argsort(rows)
    assert len(rows) == count, "every response is somebody's"

    def whole(values: list[list[float]], dtype: Any) -> np.ndarray:
        return np.concatenate([np.asarray(own, dtype) for own in values])[order]

    verdicts = [Verdict(*fields) for part in parts for fields in part["verdicts"]]
    verdicts = [verdicts[i] for i in order]
    return Grades(
        rewards=whole([part["rewards"] for part in parts], np.float32),
        correct=np.asarray([verdict.correct for verdict in verdicts]),
        verdicts=verdicts,
        parts={
            name: whole([part["parts"][name] for part in parts], np.float64)
            for name in parts[0]["parts"]
        },
    )
