"""Several tasks in one stream, each position of which belongs to one of them."""

import dataclasses
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import Future

from deltal_jax.errors import UserError
from deltal_jax.tasks.base import Problem, Task, Verdict, VerifiesAside, close, verify_all


class Mixture:
    """Tasks with weights > 0: a seeded draw says which of them a position belongs to.

    The `answer` of a problem is its own under "answer", beside the name of its "task".
    """

    name = "mixture"

    def __init__(self, parts: Sequence[tuple[Task, float]]):
        self.parts = {task.name: task for task, _ in parts}
        self.weights = [weight for _, weight in parts]
        if len(self.parts) < len(parts) or self.name in self.parts:
            raise UserError("task.mixture: two of its tasks have one name")

    def vocabulary(self) -> list[str] | None:
        """The words of all, each once; None if one of them has free text."""
        words: dict[str, None] = {}
        for part in self.parts.values():
            own = part.vocabulary()
            if own is None:
                return None
            words |= dict.fromkeys(own)
        return list(words)

    def problem(self, seed: int, position: int) -> Problem | None:
        rng = random.Random(f"mixture/train/{seed}/{position}")
        name = self._draw(rng)
        problem = self.parts[name].problem(seed, position)
        return None if problem is None else _tagged(name, problem)

    def held_out(self, count: int) -> list[Problem]:
        """Each task's own, as many as its weight says; the largest remainders round up."""
        shares = [count * weight / sum(self.weights) for weight in self.weights]
        counts = [int(share) for share in shares]
        by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])
        for i in by_remainder[: count - sum(counts)]:
            counts[i] += 1
        return [
            _tagged(name, problem)
            for (name, part), wanted in zip(self.parts.items(), counts, strict=True)
            if wanted
            for problem in part.held_out(wanted)
        ]

    def demonstrations(self, seed: int) -> Iterator[tuple[str, str]]:
        rng = random.Random(f"mixture/demonstrations/{seed}")
        streams = {name: part.demonstrations(seed) for name, part in self.parts.items()}
        while True:
            yield next(streams[self._draw(rng)])

    def parse_problem(self, text: str) -> Problem:
        """A problem of the first task that can read it."""
        refused = []
        for name, part in self.parts.items():
            try:
                return _tagged(name, part.parse_problem(text))
            except UserError as error:
                refused.append(f"{name}: {error}")
        raise UserError("; ".join(refused))

    def verify(self, response: str, answer: dict) -> Verdict:
        return self.parts[answer["task"]].verify(response, answer["answer"])

    def submit(self, response: str, answer: dict) -> Future[Verdict] | None:
        part = self.parts[answer["task"]]
        return part.submit(response, answer["answer"]) if isinstance(part, VerifiesAside) else None

    def verify_batch(self, pairs: Sequence[tuple[str, dict]]) -> list[Verdict]:
        """Each task's own at once."""
        found: dict[int, Verdict] = {}
        for name, part in self.parts.items():
            rows = [row for row, (_, answer) in enumerate(pairs) if answer["task"] == name]
            own = [(pairs[row][0], pairs[row][1]["answer"]) for row in rows]
            found |= zip(rows, verify_all(part, own), strict=True)
        return [found[row] for row in range(len(pairs))]

    def close(self) -> None:
        for part in self.parts.values():
            close(part)

    def _draw(self, rng: random.Random) -> str:
        return rng.choices(list(self.parts), self.weights)[0]


def _tagged(name: str, problem: Problem) -> Problem:
    answer = {"task": name, "answer": problem.answer}
    return dataclasses.replace(problem, answer=answer, task=name)
