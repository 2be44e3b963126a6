"""Grading on several processes: one verdict for all of them, or one failure."""

import random

import jax
import numpy as np

from deltal_jax.parallel.processes import PeerError
from deltal_jax.tasks.countdown.trace import CountDown
from deltal_jax.tasks.grading import Reward
from deltal_jax.training.verdicts import grade_together
from tests.processes import run_processes

#: Of each response's prompt: groups of two, three for process 0 and two for process 1.
NUMBERS = np.repeat([4, 5, 6, 7, 8], 2)


def graded():
    """In each process: by a reward that is random in every one, then by one that fails in one."""
    drawn = random.Random(jax.process_index())
    task, called = CountDown(), []

    def noise(prompts, responses, answers):
        del prompts, answers
        called.append(responses)
        return [drawn.choice([None, drawn.random()]) for _ in responses]

    def broken(prompts, responses, answers):
        if jax.process_index() == 1:
            raise LookupError("no such table")
        return [0.0] * len(responses)

    drawn_problems = (task.problem(0, position) for position in range(100))
    problem = next(problem for problem in drawn_problems if problem is not None)
    problems, responses = [problem] * len(NUMBERS), [f"response {i}" for i in range(len(NUMBERS))]
    grades = grade_together(task, problems, responses, [Reward(noise)], numbers=NUMBERS)
    try:
        grade_together(task, problems, responses, [Reward(broken)], numbers=NUMBERS)
    except (PeerError, LookupError) as error:
        said = f"{type(error).__name__}: {error}"
    return {"rewards": grades.rewards, "saw": called[0], "said": said}


def test_all_processes_have_the_rewards_that_one_of_them_drew_and_the_failure_of_one():
    first, second = run_processes("tests.test_verdicts:graded")
    np.testing.assert_array_equal(first["rewards"], second["rewards"])
    want = np.full(len(NUMBERS), np.nan, np.float32)
    for process in range(2):
        drawn = random.Random(process)
        for row in np.flatnonzero(int(process) == NUMBERS % 2):
            value = drawn.choice([None, drawn.random()])
            want[row] = np.nan if value is None else value
    np.testing.assert_array_equal(first["rewards"], want)
    assert np.isnan(want).any() and not np.isnan(want).all()
    assert first["saw"].tolist() == [f"response {i}" for i in (0, 1, 4, 5, 8, 9)]
    assert first["said"] == "PeerError: LookupError: no such table (in process 1)"
    assert second["said"] == "LookupError: no such table"
