"""What a task is: problems, and a verdict on a response."""

import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any, Literal, Protocol, runtime_checkable

#: Why a reward is missing.
Missing = Literal["timeout", "unparsed", "crash"]


@dataclasses.dataclass(frozen=True)
class Problem:
    """One prompt with what is needed to verify a response to it. `answer` is plain JSON data;
    `task` names the part of a mixture that it comes from, `dataset` the data set that a held-out
    problem is of, where the task has several. `messages` are the prompt's (role, content) where the
    data have them, which a chat template then takes as they are."""

    prompt: str
    answer: Any
    task: str = ""
    dataset: str = ""
    messages: tuple[tuple[str, str], ...] = ()


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

    def problem(self, seed: int, position: int) -> Problem | None:
        """The training problem at a position of the stream of this seed; never a held-out one.
        None, always there, where a data set has none: the stream goes on behind it."""
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


@runtime_checkable
class ReadsFiles(Protocol):
    """What a task may have beside if its problems are rows of a file."""

    def rows(self) -> int:
        """Rows to train on: so many positions of the stream are one epoch."""
        ...

    def fingerprint(self) -> dict[str, str]:
        """What the stream of problems depends on beside the config, by name: a run goes on with
        nothing else."""
        ...


def files_of(task: Task) -> dict[str, ReadsFiles]:
    """The tasks that read files, by name: this one, or parts of a mixture."""
    parts = getattr(task, "parts", {task.name: task})
    return {name: part for name, part in parts.items() if isinstance(part, ReadsFiles)}


@runtime_checkable
class VerifiesAside(Protocol):
    """What a task may have beside `verify`: verdicts that others work out while the caller goes
    on."""

    def submit(self, response: str, answer: Any) -> Future[Verdict] | None:
        """Begin to judge one response; may block while too many wait. None where `verify` is as
        quick. The verdict is the same whenever it is asked for."""
        ...


def close(task: Task) -> None:
    """End what the task has started, such as processes, if it has a `close` of its own."""
    if callable(own := getattr(task, "close", None)):
        own()


def verify_all(task: Task, pairs: Sequence[tuple[str, Any]]) -> list[Verdict]:
    """The verdicts on (response, answer) pairs, at once where the task can."""
    if isinstance(task, VerifiesBatches):
        return task.verify_batch(pairs)
    return [task.verify(*pair) for pair in pairs]
