"""Chain: apply x → a · x + b modulo m again and again, n times.

    prompt    3 2 5 * 4 :                       a = 3, b = 2, x = 5, n = 4, m = 7
    response  1 3 3 2 4 1 0 0 2 = 2             one step a jump; steps left and value after each

A response says how many steps it takes at a jump: several are shorter and harder. Or it answers at
once. The number of steps is drawn from 1 to `steps` such that its logarithm is uniform, so lengths
span two orders of magnitude, and long responses have more places to go wrong. The verifier looks at
the answer alone.
"""

import dataclasses
import math
import random
import re
import zlib
from collections.abc import Iterator
from itertools import islice

from deltal_jax.errors import UserError
from deltal_jax.tasks.base import Problem, Verdict

#: Every tenth class of problems is held out.
HELD_OUT_CLASSES = 10
#: Most problems that are drawn for one that is held out.
MAX_DRAWS = 1000
#: Steps that one jump of a warm-up trace takes, and how often.
JUMPS, JUMP_WEIGHTS = (1, 2, 4), (0.5, 0.3, 0.2)


@dataclasses.dataclass(frozen=True)
class Chain:
    """Chains of up to `steps` steps modulo `modulus`.

    A problem is held out when crc32 of (a, b, x, n) is 0 modulo 10.
    """

    steps: int = 120
    modulus: int = 7
    #: Warm-up traces: share of direct answers.
    direct: float = 0.1

    name = "chain"

    def vocabulary(self) -> list[str]:
        return [*map(str, range(max(self.steps + 1, self.modulus))), "*", ":", "="]

    def problem(self, seed: int, position: int) -> Problem:
        rng = random.Random(f"chain/train/{seed}/{position}")
        return next(p for p in self._problems(rng) if not self.is_held_out(p))

    def held_out(self, count: int) -> list[Problem]:
        stream = self._problems(random.Random("chain/held-out"))
        kept = list(islice(filter(self.is_held_out, islice(stream, MAX_DRAWS * count)), count))
        if len(kept) < count:
            raise UserError("task.chain.steps: too few problems are held out; raise it")
        return kept

    def demonstrations(self, seed: int) -> Iterator[tuple[str, str]]:
        rng = random.Random(f"chain/demonstrations/{seed}")
        for problem in self._problems(rng):
            if not self.is_held_out(problem):
                yield problem.prompt, self._trace(rng, problem.answer)

    def parse_problem(self, text: str) -> Problem:
        match = re.fullmatch(r"\s*(\d{1,3})\s+(\d{1,3})\s+(\d{1,3})\s*\*\s*(\d{1,3})\s*:?\s*", text)
        if match is None:
            raise UserError(f"problem: {text!r} is not of the form '3 2 5 * 4'")
        a, b, x, n = map(int, match.groups())
        if max(a, b, x) >= self.modulus or not 1 <= n <= self.steps:
            raise UserError(
                f"problem: the first three numbers are below {self.modulus}, the last is in 1 … "
                f"{self.steps}"
            )
        return _problem(a, b, x, n)

    def verify(self, response: str, answer: dict) -> Verdict:
        """Reward 1 when the response ends in `= ` and the value after all steps."""
        said = response.rpartition("=")
        if not said[1]:
            return Verdict(0.0, False, "no answer")
        text = said[2].strip()
        right = text == str(self.value(answer, answer["n"]))
        return Verdict(float(right), right, "correct" if right else "wrong value", text[:20])

    def value(self, given: dict, steps: int) -> int:
        """The value after so many steps."""
        value = given["x"]
        for _ in range(steps):
            value = (given["a"] * value + given["b"]) % self.modulus
        return value

    @staticmethod
    def is_held_out(problem: Problem) -> bool:
        """Whether the problem is kept from training: a property of its four numbers."""
        return zlib.crc32(problem.prompt.encode()) % HELD_OUT_CLASSES == 0

    def _problems(self, rng: random.Random) -> Iterator[Problem]:
        while True:
            a = rng.randrange(2, self.modulus)
            b, x = rng.randrange(self.modulus), rng.randrange(self.modulus)
            n = int(math.exp(rng.uniform(0, math.log(self.steps + 1))))
            yield _problem(a, b, x, min(n, self.steps))

    def _trace(self, rng: random.Random, given: dict) -> str:
        left, jump = given["n"], rng.choices(JUMPS, JUMP_WEIGHTS)[0]
        said = [] if rng.random() < self.direct else [str(jump)]
        while said and left:
            left = max(left - jump, 0)
            said += [str(left), str(self.value(given, given["n"] - left))]
        return " ".join([*said, "=", str(self.value(given, given["n"]))])


def _problem(a: int, b: int, x: int, n: int) -> Problem:
    return Problem(f"{a} {b} {x} * {n} :", {"a": a, "b": b, "x": x, "n": n})
