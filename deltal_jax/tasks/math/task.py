r"""Math: problems from files, answers in \boxed{}, judged in worker processes (`workers.py`)."""

import collections
import dataclasses
import hashlib
import importlib.util
import itertools
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from deltal_jax.data.rows import DropError, open_rows
from deltal_jax.data.training_rows import TrainingRows
from deltal_jax.errors import UserError
from deltal_jax.guard.signals import result_of
from deltal_jax.tasks.base import Missing, Problem, Verdict
from deltal_jax.tasks.math.data import Example, make_example, read_examples
from deltal_jax.tasks.math.rules import WARM_UP
from deltal_jax.tasks.workers import Limits, Outcome, Workers

#: Characters of a response, from its end, that are judged.
MAX_RESPONSE = 4000
#: What `task.math.template` may name; a file may be named instead.
TEMPLATES = {
    "plain": "{problem}",
    "boxed": "{problem}\nReason step by step, and put the final answer into \\boxed{}.\n",
    # The form of Open-Reasoner-Zero, in words of our own; its data in verl's format brings its own.
    "user_assistant": (
        "A conversation between User and Assistant. The User poses a problem, and the Assistant "
        "solves it. The Assistant first reasons about it and only then answers: the reasoning "
        "stands in <think> </think> and the answer in <answer> </answer>, as in <think> reasoning "
        "</think> <answer> answer </answer>. User: The answer has to stand in <answer> </answer>, "
        "and its final value there in \\boxed{}, from where it is read.\n"
        "The problem is:\n{problem}\nAssistant: <think>"
    ),
}
#: Why there is no verdict, by how the worker's call ended.
MISSING: dict[str, tuple[Missing, str]] = {
    "timeout": ("timeout", "timed out"),
    "memory": ("crash", "out of memory"),
    "crash": ("crash", "the verifier crashed"),
    "error": ("crash", "the verifier failed"),
}
_HELD_OUT = "also in an evaluation file"


class Math:
    """The problems of the file `train`, and of `held_out_files` for evaluation.

    Of the former, which may be large, a row is read when its turn comes; the latter are held in
    memory. A problem of an evaluation file is never trained on. `verifier` is a rule of
    `rules.py`.
    """

    name = "math"

    def __init__(
        self,
        train: str,
        held_out_files: Sequence[str],
        *,
        verifier: str = "math_verify",
        template: str = "boxed",
        workers: int = 2,
        limits: Limits | None = None,
    ):
        if verifier == "math_verify" and importlib.util.find_spec("math_verify") is None:
            raise UserError(
                "task.math.verifier: math_verify needs its package; pip install 'deltal-jax[math]',"
                " or set it to reference"
            )
        self.verifier, self._template = verifier, _read_template(template)
        self._count, self._limits = workers, limits or Limits()
        self._workers: Workers | None = None
        self._lock = threading.Lock()  # training and evaluation may both be the first to ask
        held_out = [open_rows(Path(path), "task.math.eval") for path in held_out_files]
        self._held_out = [x for rows in held_out for x in read_examples(rows, "task.math.eval")[0]]
        self._known = {_bare(example.text) for example in self._held_out}
        rows = open_rows(Path(train), "task.math.train")
        self._stem = rows.path.stem
        self._train = TrainingRows(rows, self._example, "task.math.train")
        self._files = {"task.math.train": [rows], "task.math.eval": held_out}

    @property
    def summary(self) -> str:
        return self._train.summary(len(self._held_out))

    def vocabulary(self) -> None:
        """Prompts and responses are free text."""

    def rows(self) -> int:
        return self._train.count

    def fingerprint(self) -> dict[str, str]:
        files = {
            name: " ".join(sorted(rows.fingerprint for rows in found))
            for name, found in self._files.items()
        }
        template = hashlib.sha256(self._template.encode()).hexdigest()
        return files | {"task.math.template": template, "order": self._train.order}

    def problem(self, seed: int, position: int) -> Problem | None:
        """Every row once an epoch, in an order of the seed and the epoch; None where it is no
        problem to train on."""
        example = self._train.at(seed, position)
        return None if example is None else self._problem(example)

    def held_out(self, count: int) -> list[Problem]:
        """The first `count` of each evaluation set, or all where it has fewer."""
        met: collections.Counter[str] = collections.Counter()
        kept = []
        for example in self._held_out:
            met[example.source] += 1
            if met[example.source] <= count:
                kept.append(dataclasses.replace(self._problem(example), dataset=example.source))
        return kept

    def demonstrations(self, seed: int) -> Iterator[tuple[str, str]]:
        for position in itertools.count():
            example = self._train.at(seed, position)
            if example is not None:
                yield self._problem(example).prompt, f"\\boxed{{{example.answer}}}"

    def parse_problem(self, text: str) -> Problem:
        """Any text is a problem, whose answer nobody knows."""
        if not text.strip():
            raise UserError("problem: is empty; ask something, such as 'What is 1 + 1?'")
        return self._problem(Example(text.strip(), "", "typed", ""))

    def verify(self, response: str, answer: Any) -> Verdict:
        return self.verify_batch([(response, answer)])[0]

    def verify_batch(self, pairs: Sequence[tuple[str, Any]]) -> list[Verdict]:
        """The verdicts on (response, answer) pairs, judged side by side by the workers.

        The reward is None where there is none: the verifier ran out of time or memory, failed or
        crashed, or could not read the answer.
        """
        return [result_of(future) for future in [self.submit(*pair) for pair in pairs]]

    def submit(self, response: str, answer: Any) -> Future[Verdict]:
        """The verdict of `verify_batch`, later."""
        if answer["gold"]:
            call = self.verifier, response[-MAX_RESPONSE:], answer["gold"]
            return self._open().submit(*call, then=_verdict)
        unknown: Future[Verdict] = Future()
        unknown.set_result(Verdict(None, False, "no known answer"))
        return unknown

    def close(self) -> None:
        """End the workers; new ones start where they are needed again."""
        with self._lock:
            workers, self._workers = self._workers, None
        if workers is not None:
            workers.close()

    def _open(self) -> Workers:
        with self._lock:
            if self._workers is None:
                self._workers = Workers(
                    "deltal_jax.tasks.math.rules:judge",
                    self._count,
                    limits=self._limits,
                    warm_up=[(self.verifier, *call) for call in WARM_UP],
                )
            return self._workers

    def _example(self, row: Any, number: int) -> Example:
        """The problem of a training row. Raises DropError where there is none to train on."""
        example = make_example(row, self._stem, number)
        if _bare(example.text) in self._known:
            raise DropError(_HELD_OUT)
        return example

    def _problem(self, example: Example) -> Problem:
        prompt = example.text
        if not example.complete:
            prompt = self._template.replace("{problem}", prompt)
        known = {"gold": example.answer, "source": example.source, "id": example.id}
        return Problem(prompt, known, messages=example.messages)


def _verdict(outcome: Outcome) -> Verdict:
    if outcome.status != "done":
        kind, why = MISSING[outcome.status]
        return Verdict(None, False, why, missing=kind)
    kind, why, answer = outcome.value
    if kind == "unparsed":
        return Verdict(None, False, f"not parsed: {why}", answer, missing="unparsed")
    return Verdict(float(kind == "correct"), kind == "correct", why, answer)


def _bare(text: str) -> str:
    return " ".join(text.split())


def _read_template(name: str) -> str:
    if name in TEMPLATES:
        return TEMPLATES[name]
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(
            f"task.math.template: {name!r} is neither one of {', '.join(TEMPLATES)} nor a text file"
        ) from error
    if "{problem}" not in text:
        raise UserError(f"task.math.template: {name} lacks {{problem}}, where the problem goes")
    return text
