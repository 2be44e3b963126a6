"""CountDown in free text, at the paper's size: `<think>` and `<answer>` tags, and data from files.

The prompt has what the reference's has, in words of our own: the numbers in square brackets, the
target, the four operations, each number once, the tags with an example, and an `Assistant:` turn
that has begun to think. A demonstration goes on like this:

     5 + 7 = 12, 12 * 1 = 12: too low
    1 + 7 = 8, 5 * 8 = 40: right </think>
    <answer> 5 * (1 + 7) </answer>
"""

import dataclasses
import functools
import random
from collections.abc import Iterator

from deltal_jax.tasks.base import Problem, Verdict
from deltal_jax.tasks.countdown_data import Example, Given
from deltal_jax.tasks.countdown_problems import Expression, Generator, identity, read_problem
from deltal_jax.tasks.countdown_rules import GRAMMARS, TURN

PROMPT = (
    "User and Assistant talk. User poses a task; Assistant first thinks about it, and then "
    "answers.\n"
    "User: Reach {target} with the numbers {numbers}: write an expression of + - * / that has each "
    "of them exactly once. Think inside <think> </think>, and then give the expression inside "
    "<answer> </answer>, such as <answer> (9 - 1) / 4 </answer>.\n"
    "Assistant: I try it step by step.\n"
    "<think>"
)


@dataclasses.dataclass(frozen=True)
class CountDownText(Generator):
    """The problems of files, or of the `Generator`: values on the way are whole and not negative,
    without an upper bound.

    `grammar` is one of `countdown_rules.GRAMMARS`. Demonstrations are always the generator's.
    """

    #: A product and a quotient are tried twice as often: most of their values are dropped.
    operators: str = "+-**//"
    grammar: str = "strict"
    given: Given | None = None

    @property
    def summary(self) -> str:
        """How many problems the files have, and what of them was dropped."""
        if self.given is None:
            return ""
        train, held_out = len(self.given.train), len(self.given.held_out)
        dropped = self.given.dropped.counts.most_common()
        said = f"task: {train:,} problems to train on, {held_out:,} held out"
        reasons = [f"{count:,} {reason}" for reason, count in dropped]
        return f"{said}; dropped: {', '.join(reasons)}" if reasons else said

    def allows(self, value: int) -> bool:
        return 0 <= value <= 10 * self.max_value

    def vocabulary(self) -> None:
        return None

    def make_problem(self, numbers: list[int], target: int) -> Problem:
        return Problem(_prompt(numbers, target), {"numbers": numbers, "target": target})

    def problem(self, seed: int, position: int) -> Problem:
        """The generator's, or every problem of the file once an epoch, in an order of the seed and
        the epoch."""
        if self.given is None:
            return super().problem(seed, position)
        epoch, at = divmod(position, len(self.given.train))
        return self._given(self.given.train[_order(len(self.given.train), seed, epoch)[at]])

    def held_out(self, count: int) -> list[Problem]:
        """The generator's, or the first `count` of the file's, or all where it has fewer."""
        if self.given is None:
            return super().held_out(count)
        return [self._given(example) for example in self.given.held_out[:count]]

    def is_held_out(self, problem: Problem) -> bool:
        if self.given is None:
            return super().is_held_out(problem)
        return identity(problem.answer["numbers"], problem.answer["target"]) in self.given.known

    def demonstrations(self, seed: int) -> Iterator[tuple[str, str]]:
        rng = random.Random(f"countdown/demonstrations/{seed}")
        for problem, solution in self._problems(rng):
            if not self.is_held_out(problem):
                yield problem.prompt, self._response(rng, problem, solution)

    def parse_problem(self, text: str) -> Problem:
        return self.make_problem(*read_problem(text))

    def verify(self, response: str, answer: dict) -> Verdict:
        """Reward 1 when the answer in the response is right by the grammar."""
        grammar = GRAMMARS[self.grammar]
        # The reference reads prompt and response as one text, of which it strips the prompt.
        found = grammar.find(TURN + response)
        if found is None:
            return Verdict(0.0, False, "no answer")
        return grammar.judge(found, answer["numbers"], answer["target"])

    def _given(self, example: Example) -> Problem:
        problem = self.make_problem(list(example.numbers), example.target)
        return dataclasses.replace(problem, prompt=example.prompt) if example.prompt else problem

    def _response(self, rng: random.Random, problem: Problem, solution: Expression) -> str:
        if rng.random() < self.direct:
            said, tries = [], [self._random_expression(rng, problem.answer["numbers"])]
        else:
            tries, target = self._search(rng, problem, solution), problem.answer["target"]
            said = [f"{', '.join(steps)}: {_sign(value, target)}" for value, _, steps in tries]
        answer = tries[-1][1].replace("( ", "(").replace(" )", ")")
        return " " + "\n".join(said) + f" </think>\n<answer> {answer} </answer>"


def _prompt(numbers: list[int], target: int) -> str:
    return PROMPT.replace("{numbers}", str(numbers)).replace("{target}", str(target))


def _sign(value: int, target: int) -> str:
    return "right" if value == target else "too low" if value < target else "too high"


@functools.lru_cache(4)
def _order(count: int, seed: int, epoch: int) -> list[int]:
    order = list(range(count))
    random.Random(f"countdown/order/{seed}/{epoch}").shuffle(order)
    return order
