"""What a task is: problems, and a verdict on a response."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

#: Why a reward is missing.
Missing = Literal["timeout", "unparsed", "crash"]


@dataclasses.dataclass(frozen=True)
class Problem:
    """One prompt with what is needed to verify a response to it. `answer` is plain JSON data;
    `task` names the part of a mixture that it comes from, `dataset` the data set that a held-out
    problem is of, where the task has several."""

    prompt: str
    answer: Any
    task: str = ""
    dataset: str = ""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the verifier says of one response.

    `reward` is what training maximises, None when the verifier could not decide; `correct` is the
    task's own accuracy, apart from any shaping of the reward; `reason` is for people; `answer` is
    the final answer in a normal form (empty if there is none), for majority votes; `missing` is the
    kind of cause where the reward is None, so that they are counted apart.
    """

    reward: float | None
    correct: bool
    reason: str
    answer: str = ""
    missing: Missing | None = None


class Task(Protocol):
    """A source of problems with a verifier. Problems are addressed by position, so order
    resumes."""

    @property
    def name(self) -> str:
        """The task's name in metrics."""
        ...

    def vocabulary(self) -> list[str] | None:
        """Every word that prompts and responses are made of, for training a small tokenizer; None
        where they are free text."""
        ...

    def problem(self, seed: int, position: int) -> Problem:
        """The training problem at a position of the stream of this seed; never a held-out one."""
        ...

    def held_out(self, count: int) -> list[Problem]:
        """`count` evaluation problems (of each data set at most), the same for every seed."""
        ...

    def demonstrations(self, seed: int) -> Iterator[tuple[str, str]]:
        """An endless stream of (prompt, response) pairs for the supervised warm-up."""
        ...

    def parse_problem(self, text: str) -> Problem:
        """A problem that a person typed. Raises UserError that shows the form."""
        ...

    def verify(self, response: str, answer: Any) -> Verdict:
        """Judge one response. Never executes it."""
        ...


@runtime_checkable
class VerifiesBatches(Protocol):
    """What a task may have beside `verify`: many verdicts at once, side by side."""

    def verify_batch(self, pairs: Sequence[tuple[str, Any]]) -> list[Verdict]:
        """The verdicts on (response, answer) pairs, in order."""
        ...


def verify_all(task: Task, pairs: Sequence[tuple[str, Any]]) -> list[Verdict]:
    """The verdicts on (response, answer) pairs, at once where the task can."""
    if isinstance(task, VerifiesBatches):
        return task.verify_batch(pairs)
    return [task.verify(*pair) for pair in pairs]
