"""CountDown in free text, at the paper's size: `<think>` and `<answer>` tags, and data from files.

The prompt has what the reference's has, in words of our own: the numbers in square brackets, the
target, the four operations, each number once, the tags with an example, and an `Assistant:` turn
that has begun to think. A demonstration goes on like this:

     5 + 7 = 12, 12 * 1 = 12: too low
    1 + 7 = 8, 5 * 8 = 40: right </think>
    <answer> 5 * (1 + 7) </answer>
"""

import dataclasses
import random
from collections.abc import Iterator

from deltal_jax.tasks.base import Problem, Verdict
from deltal_jax.tasks.countdown.data import Example, Given
from deltal_jax.tasks.countdown.problems import Expression, Generator, identity, read_problem
from deltal_jax.tasks.countdown.rules import GRAMMARS, TURN

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
    """The `Generator`'s problems: values on the way are whole and in 0..10·`max_value`.

    `grammar` is one of `rules.GRAMMARS`.
    """

    #: A product and a quotient are tried twice as often: most of their values are dropped.
    operators: str = "+-**//"
    grammar: str = "strict"

    def allows(self, value: int) -> bool:
        return 0 <= value <= 10 * self.max_value

    def vocabulary(self) -> None:
        """Prompts and responses are free text."""

    def make_problem(self, numbers: list[int], target: int) -> Problem:
        return Problem(_prompt(numbers, target), {"numbers": numbers, "target": target})

    def demonstrations(self, seed: int) -> Iterator[tuple[str, str]]:
        rng = random.Random(f"countdown/demonstrations/{seed}")
        for problem, solution in self.problems(rng):
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

    def _response(self, rng: random.Random, problem: Problem, solution: Expression) -> str:
        if rng.random() < self.direct:
            said, tries = [], [self._random_expression(rng, problem.answer["numbers"])]
        else:
            tries, target = self._search(rng, problem, solution), problem.answer["target"]
            said = [f"{', '.join(steps)}: {_sign(value, target)}" for value, _, steps in tries]
        answer = tries[-1][1].replace("( ", "(").replace(" )", ")")
        return " " + "\n".join(said) + f" </think>\n<answer> {answer} </answer>"


@dataclasses.dataclass(frozen=True)
class CountDownRows(CountDownText):
    """The problems of files. Demonstrations are the generator's, without what is held out."""

    given: Given = dataclasses.field(kw_only=True)

    @property
    def summary(self) -> str:
        return self.given.summary

    def rows(self) -> int:
        return self.given.train.count

    def fingerprint(self) -> dict[str, str]:
        return self.given.fingerprint()

    def problem(self, seed: int, position: int) -> Problem | None:
        example = self.given.train.at(seed, position)
        return None if example is None else self._problem_of(example)

    def held_out(self, count: int) -> list[Problem]:
        """The first `count`, or all where there are fewer."""
        return [self._problem_of(example) for example in self.given.held_out[:count]]

    def is_held_out(self, problem: Problem) -> bool:
        return identity(problem.answer["numbers"], problem.answer["target"]) in self.given.known

    def _problem_of(self, example: Example) -> Problem:
        problem = self.make_problem(list(example.numbers), example.target)
        if not example.messages:
            return problem
        prompt = "\n\n".join(content for _, content in example.messages)
        return dataclasses.replace(problem, prompt=prompt, messages=example.messages)


def _prompt(numbers: list[int], target: int) -> str:
    return PROMPT.replace("{numbers}", str(numbers)).replace("{target}", str(target))


def _sign(value: int, target: int) -> str:
    return "right" if value == target else "too low" if value < target else "too high"
