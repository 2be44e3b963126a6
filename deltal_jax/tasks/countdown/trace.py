"""CountDown in a small closed vocabulary: reach a target from numbers, each used exactly once.

    prompt    7 1 5 -> 40 :
    response  5 + 7 = 12 , 12 * 1 = 12 < 1 + 7 = 8 , 5 * 8 = 40 ok <a> 5 * ( 1 + 7 ) </a>

A response is a trace of tries and then an answer. After each try the trace says how its value
compares with the target: `<` too low, `>` too high, `ok` a hit. The verifier looks at the answer
alone. `text.py` is the full-size task.
"""

import dataclasses
import random
from collections.abc import Iterator

from deltal_jax.errors import UserError
from deltal_jax.tasks.base import Problem, Verdict
from deltal_jax.tasks.countdown.problems import Expression, Generator, read_problem
from deltal_jax.tasks.countdown.rules import find_last, judge_strict


@dataclasses.dataclass(frozen=True)
class CountDown(Generator):
    """The `Generator`'s problems, whose intermediate values stay in 0..`max_value`."""

    def vocabulary(self) -> list[str]:
        words = [str(value) for value in range(self.max_value + 1)]
        return [*words, *self.operators, *"-> : = , < > ok <a> </a> ( )".split()]

    def make_problem(self, numbers: list[int], target: int) -> Problem:
        prompt = f"{' '.join(map(str, numbers))} -> {target} :"
        return Problem(prompt, {"numbers": numbers, "target": target})

    def demonstrations(self, seed: int) -> Iterator[tuple[str, str]]:
        rng = random.Random(f"countdown/demonstrations/{seed}")
        for problem, solution in self.problems(rng):
            if not self.is_held_out(problem):
                yield problem.prompt, self._trace(rng, problem, solution)

    def parse_problem(self, text: str) -> Problem:
        numbers, target = read_problem(text)
        for value in (*numbers, target):
            if value > self.max_value:
                raise UserError(
                    f"problem: {value} is over task.countdown.max_value={self.max_value}"
                )
        return self.make_problem(numbers, target)

    def verify(self, response: str, answer: dict) -> Verdict:
        """Reward 1 when the last `<a> … </a>` is an expression of the target with every number
        once."""
        found = find_last(response, "a")
        if found is None:
            return Verdict(0.0, False, "no answer")
        return judge_strict(found, answer["numbers"], answer["target"])

    def _trace(self, rng: random.Random, problem: Problem, solution: Expression) -> str:
        if rng.random() < self.direct:
            return f"<a> {self._random_expression(rng, problem.answer['numbers'])[1]} </a>"
        tries, target = self._search(rng, problem, solution), problem.answer["target"]
        said = [f"{' , '.join(steps)} {_sign(value, target)}" for value, _, steps in tries]
        return f"{' '.join(said)} <a> {tries[-1][1]} </a>"


def _sign(value: int, target: int) -> str:
    return "ok" if value == target else "<" if value < target else ">"
