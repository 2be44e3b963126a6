r"""Math: problems from files, answers in \boxed{}, judged in worker processes (`workers.py`)."""

import collections
import dataclasses
import functools
import importlib.util
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from deltal_jax.errors import UserError
from deltal_jax.tasks.base import Missing, Problem, Verdict
from deltal_jax.tasks.math_data import Example, read_examples
from deltal_jax.tasks.math_rules import WARM_UP
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


class Math:
    """The problems of the file `train`, and of `held_out_files` for evaluation.

    A problem of an evaluation file is never trained on. `verifier` is a rule of `math_rules.py`.
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
        files = [read_examples(Path(path), "task.math.eval")[0] for path in held_out_files]
        self._held_out = [example for file in files for example in file]
        known = {_bare(example.text) for example in self._held_out}
        examples, self.dropped = read_examples(Path(train), "task.math.train")
        self._train = []
        for number, example in enumerate(examples):
            if _bare(example.text) in known:
                self.dropped.add("also in an evaluation file", example.text, number)
            else:
                self._train.append(example)
        if not self._train:
            raise UserError("task.math.train: all its problems are those of task.math.eval")

    @property
    def summary(self) -> str:
        """How many problems there are, and what of the training file was dropped."""
        said = f"task: {len(self._train):,} problems to train on, {len(self._held_out):,} held out"
        reasons = [f"{count:,} {reason}" for reason, count in self.dropped.counts.most_common()]
        return f"{said}; dropped: {', '.join(reasons)}" if reasons else said

    def vocabulary(self) -> list[str]:
        words: set[str] = set()
        for example in [*self._train, *self._held_out]:
            words.update(self._problem(example).prompt.split(), _response(example).split())
        return sorted(words)

    def problem(self, seed: int, position: int) -> Problem:
        """Every problem once an epoch, in an order of the seed and the epoch."""
        epoch, at = divmod(position, len(self._train))
        return self._problem(self._train[_order(len(self._train), seed, epoch)[at]])

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
        position = 0
        while True:
            epoch, at = divmod(position, len(self._train))
            example = self._train[_order(len(self._train), seed, epoch)[at]]
            yield self._problem(example).prompt, _response(example)
            position += 1

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
        calls = [(self.verifier, text[-MAX_RESPONSE:], known["gold"]) for text, known in pairs]
        outcomes = self._workers.map(call for call in calls if call[2])
        found = iter(outcomes)
        unknown = Verdict(None, False, "no known answer")
        return [_verdict(next(found)) if call[2] else unknown for call in calls]

    def close(self) -> None:
        """End the workers; new ones start where they are needed again."""
        if "_workers" in self.__dict__:
            self._workers.close()
            del self._workers

    @functools.cached_property
    def _workers(self) -> Workers:
        return Workers(
            "deltal_jax.tasks.math_rules:judge",
            self._count,
            limits=self._limits,
            warm_up=[(self.verifier, *call) for call in WARM_UP],
        )

    def _problem(self, example: Example) -> Problem:
        prompt = example.text
        if not example.complete:
            prompt = self._template.replace("{problem}", prompt)
        known = {"gold": example.answer, "source": example.source, "id": example.id}
        return Problem(prompt, known)


def _verdict(outcome: Outcome) -> Verdict:
    if outcome.status != "done":
        kind, why = MISSING[outcome.status]
        return Verdict(None, False, why, missing=kind)
    kind, why, answer = outcome.value
    if kind == "unparsed":
        return Verdict(None, False, f"not parsed: {why}", answer, missing="unparsed")
    return Verdict(float(kind == "correct"), kind == "correct", why, answer)


def _response(example: Example) -> str:
    return f"\\boxed{{{example.answer}}}"


def _bare(text: str) -> str:
    return " ".join(text.split())


@functools.lru_cache(4)
def _order(count: int, seed: int, epoch: int) -> list[int]:
    order = list(range(count))
    random.Random(f"math/train/{seed}/{epoch}").shuffle(order)
    return order


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
