"""Responses to rewards. A missing reward (None from a reward function) stays missing: never a
zero."""

import dataclasses
import functools
import math
import typing
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from deltal_jax.errors import UserError
from deltal_jax.guard.pulse import pulse
from deltal_jax.guard.signals import check, interruptible, result_of
from deltal_jax.tasks.base import Missing, Problem, Task, Verdict, verify_all
from deltal_jax.tasks.mixture import Mixture

#: Why a reward is missing, by number.
MISSING: tuple[Missing | None, ...] = (None, *typing.get_args(Missing))
#: `fn(prompts, responses, answers) -> rewards`, one number or None (missing) a response.
RewardFunction = Callable[[list[str], list[str], list[Any]], Sequence[float | None]]
#: `journal(pairs, judge) -> verdicts` on (response, answer) pairs: those that it knows, or else
#: what `judge()` says.
Journal = Callable[[Sequence[tuple[str, Any]], Callable[[], list[Verdict]]], list[Verdict]]


@dataclasses.dataclass(frozen=True)
class Reward:
    """A named reward function and its weight in the total."""

    fn: RewardFunction
    name: str = ""
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise UserError(f"rewards: {self.fn!r} is not a function(prompts, responses, answers)")
        if not math.isfinite(self.weight):
            raise UserError(f"rewards: the weight of {self.name!r}, {self.weight}, is not finite")
        if not self.name:
            object.__setattr__(self, "name", getattr(self.fn, "__name__", "reward").strip("<>"))


@dataclasses.dataclass(frozen=True)
class Grades:
    """The verdicts on a batch of responses. `rewards` is NaN where missing."""

    rewards: np.ndarray
    correct: np.ndarray
    verdicts: list[Verdict]
    #: Every named reward apart, NaN where missing; of a mixture, also the total of each task.
    parts: dict[str, np.ndarray]

    @property
    def missing(self) -> np.ndarray:
        """Why the task has no verdict, by the position in `MISSING`; 0 where it has one."""
        return np.asarray([MISSING.index(verdict.missing) for verdict in self.verdicts], np.int8)


def as_rewards(items: Sequence[Reward | RewardFunction | str] | None) -> list[Reward | str]:
    """Normalise what `train(rewards=…)` takes; "task" stands for the task's own verifier."""
    rewards: list[Reward | str] = []
    if callable(items) or isinstance(items, (str, Reward)):
        raise UserError("rewards: expected a list, such as [fn] or ['task', Reward(fn)]")
    for item in items if items is not None else ["task"]:
        if isinstance(item, str) and item != "task":
            raise UserError(f"rewards: {item!r} is not known; the only name is 'task'")
        rewards.append(item if isinstance(item, (Reward, str)) else Reward(item))
    if not rewards:
        raise UserError("rewards: the list is empty; leave it out to use the task's verifier")
    names = [item if isinstance(item, str) else item.name for item in rewards]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"rewards: two are named {name!r}; give each Reward(fn, name=…) its own"
            )
    return rewards


def grade(
    task: Task,
    problems: Sequence[Problem],
    responses: Sequence[str],
    rewards: Sequence[Reward | str] = ("task",),
    early: Sequence[Future[Verdict] | None] = (),
    journal: Journal | None = None,
) -> Grades:
    """Verify every response and total its rewards: Σ weight·reward, missing if any part is missing.

    `correct` is always the task's own verdict, whatever the rewards are. `early` has those verdicts
    that somebody began to ask for before; others are None.
    """
    asked = zip(problems, responses, strict=True)
    pairs = [(response, known.answer) for known, response in asked]
    judge = functools.partial(_verdicts, task, pairs, early)
    verdicts = judge() if journal is None else journal(pairs, judge)
    parts: dict[str, np.ndarray] = {}
    taken = [task.name, *(task.parts if isinstance(task, Mixture) else ())]
    for item in rewards:
        if isinstance(item, Reward) and item.name in taken:
            raise UserError(
                f"rewards: {item.name!r} is the task's own name; call Reward(…, name=…) else"
            )
    total = np.zeros(len(responses), np.float64)
    for item in rewards:
        if isinstance(item, str):
            name, weight, values = task.name, 1.0, [v.reward for v in verdicts]
        else:
            check(together=False)
            name, weight, values = item.name, item.weight, _call(item, problems, responses)
            pulse()
        parts[name] = np.asarray([math.nan if v is None else v for v in values], np.float64)
        total += weight * parts[name]
    if isinstance(task, Mixture):
        of = np.asarray([problem.task for problem in problems])
        parts |= {name: np.where(of == name, total, math.nan) for name in task.parts}
    return Grades(
        rewards=total.astype(np.float32),
        correct=np.asarray([verdict.correct for verdict in verdicts]),
        verdicts=verdicts,
        parts=parts,
    )


def _verdicts(
    task: Task, pairs: Sequence[tuple[str, Any]], early: Sequence[Future[Verdict] | None]
) -> list[Verdict]:
    early = early or [None] * len(pairs)
    rest = [pair for pair, begun in zip(pairs, early, strict=True) if begun is None]
    others = iter(verify_all(task, rest))
    return [next(others) if begun is None else result_of(begun) for begun in early]


def _call(
    reward: Reward, problems: Sequence[Problem], responses: Sequence[str]
) -> Sequence[float | None]:
    prompts = [problem.prompt for problem in problems]
    answers = [problem.answer for problem in problems]
    with interruptible():
        values = list(reward.fn(prompts, list(responses), answers))
    if len(values) != len(responses):
        raise UserError(
            f"rewards: {reward.name!r} gave {len(values)} rewards for {len(responses)} responses"
        )
    for value in values:
        if value is not None and not math.isfinite(value):
            raise UserError(f"rewards: {reward.name!r} gave {value}; a missing reward is None")
    return values
