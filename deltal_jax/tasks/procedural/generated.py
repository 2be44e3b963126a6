"""A task whose problems reasoning-gym generates and whose verifier is ours."""

import dataclasses
import functools
import json
import zlib
from collections.abc import Iterator, Mapping
from itertools import count as counted
from typing import Any

from deltal_jax.errors import UserError
from deltal_jax.tasks.base import Problem, Verdict
from deltal_jax.tasks.procedural import KINDS
from deltal_jax.tasks.procedural.reading import MAX_ANSWER, Wrong, reasoning_gym

#: Positions of the generator that one of ours may look through for a problem of its side.
MAX_DRAWS = 1000
#: Every fifth class of problems is held out: some generators are too slow for fewer.
HELD_OUT_CLASSES = 5
#: Characters of the normal form of an answer.
MAX_FORM = 400

OPEN, CLOSE = "<answer>", "</answer>"
REQUEST = f"Give your final answer between {OPEN} and {CLOSE}."


@dataclasses.dataclass(frozen=True)
class Generated:
    """The problems of the data set `name`, made with these options of its generator.

    A problem is held out when crc32 of its name and facts is 0 modulo 5.
    """

    name: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def vocabulary(self) -> None:
        """None: prompts are free text."""

    def problem(self, seed: int, position: int) -> Problem:
        source, first = self._source(f"train/{seed}"), position * MAX_DRAWS
        for at in range(first, first + MAX_DRAWS):
            problem = self._problem(source[at])
            if not self.is_held_out(problem):
                return problem
        raise UserError(f"task.procedural: {self.name} has no problems to train on; widen them")

    def held_out(self, count: int) -> list[Problem]:
        return list(_held_out(self.name, json.dumps(dict(self.options), sort_keys=True), count))

    def draw_held_out(self, count: int) -> list[Problem]:
        """Those of `held_out`, drawn anew."""
        source, kept = self._source("held-out"), []
        for at in range(MAX_DRAWS * count):
            problem = self._problem(source[at])
            if self.is_held_out(problem):
                kept.append(problem)
            if len(kept) == count:
                return kept
        raise UserError(
            f"task.procedural: too few problems of {self.name} are held out; widen them"
        )

    def demonstrations(self, seed: int) -> Iterator[tuple[str, str]]:
        """The generator's own answers, without a way to find them."""
        source = self._source(f"demonstrations/{seed}")
        for at in counted():
            problem = self._problem(source[at])
            if not self.is_held_out(problem):
                yield problem.prompt, f"{OPEN}{problem.answer['example']}{CLOSE}"

    def parse_problem(self, text: str) -> Problem:
        del text
        raise UserError(f"problem: those of {self.name} are generated; leave it out to draw one")

    def verify(self, response: str, answer: dict) -> Verdict:
        """Reward 1 when the last `<answer> … </answer>` solves the problem."""
        end = response.rfind(CLOSE)
        begin = response.rfind(OPEN, 0, max(end, 0))
        if begin < 0:
            return Verdict(0.0, False, "no answer")
        text = response[begin + len(OPEN) : end].strip()
        if len(text) > MAX_ANSWER:
            return Verdict(0.0, False, "answer too long")
        kind, facts = KINDS[self.name], answer["facts"]
        try:
            value = kind.read(text, facts)
        except Wrong as error:
            return Verdict(0.0, False, str(error))
        if kind.holds is not None:
            right = kind.holds(value, facts)
        else:
            try:
                right = value == kind.read(answer["example"], facts)
            except Wrong:  # an odd problem is no reason to end a run
                return Verdict(None, False, "the known answer is none", missing="unparsed")
        form = json.dumps(value, default=str)[:MAX_FORM]
        return Verdict(float(right), right, "correct" if right else "not a solution", form)

    def is_held_out(self, problem: Problem) -> bool:
        """Whether the problem is kept from training: a property of its facts alone."""
        identity = json.dumps([self.name, problem.answer["facts"]], sort_keys=True)
        return zlib.crc32(identity.encode()) % HELD_OUT_CLASSES == 0

    def _source(self, stream: str) -> Any:
        options = {**KINDS[self.name].options, **self.options}
        return _dataset(self.name, stream, json.dumps(options, sort_keys=True))

    def _problem(self, entry: dict) -> Problem:
        kind = KINDS[self.name]
        facts = json.loads(json.dumps(kind.facts(entry), default=int))
        prompt = f"{entry['question'].strip()}\n\n{REQUEST}"
        return Problem(prompt, {"facts": facts, "example": kind.example(entry)})


@functools.lru_cache(maxsize=64)
def _held_out(name: str, options: str, count: int) -> tuple[Problem, ...]:
    """Kept, as every evaluation asks for them and four of five that are drawn are none."""
    return tuple(Generated(name, json.loads(options)).draw_held_out(count))


@functools.lru_cache(maxsize=256)
def _dataset(name: str, stream: str, options: str) -> Any:
    """A generator whose entries depend on its seed + position, so seeds lie far apart."""
    seed = zlib.crc32(f"{name}/{stream}".encode()) << 40
    gym = reasoning_gym()
    try:
        source = gym.create_dataset(name, seed=seed, **json.loads(options))
    except (TypeError, AssertionError, ValueError) as error:
        raise UserError(
            f"task.procedural: {name} refuses {options}: {' '.join(str(error).split())}"
        ) from error
    source.size = 1 << 40  # virtual: one of them looks at it
    return source
