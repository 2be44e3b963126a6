"""Grading: the total is a weighted sum, a missing reward stays missing, bad rewards are refused."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltal_jax.errors import UserError
from deltal_jax.tasks.base import Problem, Verdict
from deltal_jax.tasks.countdown.trace import CountDown
from deltal_jax.tasks.grading import Reward, as_rewards, grade

TASK = CountDown()
PROBLEM = TASK.parse_problem("7 1 5 -> 13")
RIGHT, WRONG, SILENT = "<a> 7 + 1 + 5 </a>", "<a> 7 * 1 * 5 </a>", "7 + 1 + 5"
RESPONSES = [RIGHT, WRONG, SILENT]
PROBLEMS = [PROBLEM] * 3


class Undecided(CountDown):
    """A verifier that cannot decide on responses without an answer."""

    def verify(self, response: str, answer: dict) -> Verdict:
        verdict = super().verify(response, answer)
        return Verdict(None, False, "timed out") if verdict.reason == "no answer" else verdict


def fixed(*values):
    return lambda prompts, responses, answers: list(values)


def test_the_tasks_own_verdicts_are_the_default_reward():
    grades = grade(TASK, PROBLEMS, RESPONSES)
    np.testing.assert_array_equal(grades.rewards, np.float32([1, 0, 0]))
    np.testing.assert_array_equal(grades.correct, [True, False, False])
    assert [v.reason for v in grades.verdicts] == ["correct", "gives 35, not 13", "no answer"]
    np.testing.assert_array_equal(grades.parts["countdown"], [1.0, 0.0, 0.0])
    assert grades.rewards.dtype == np.float32


def test_each_response_is_judged_against_its_own_problem():
    problems = [TASK.parse_problem("7 1 5 -> 13"), TASK.parse_problem("7 1 5 -> 35")]
    np.testing.assert_array_equal(grade(TASK, problems, [RIGHT, RIGHT]).correct, [True, False])
    np.testing.assert_array_equal(grade(TASK, problems, [WRONG, WRONG]).correct, [False, True])
    with pytest.raises(ValueError, match="zip"):
        grade(TASK, problems, RESPONSES)


def test_a_verifier_that_cannot_decide_leaves_the_reward_missing_and_not_zero():
    grades = grade(Undecided(), PROBLEMS, RESPONSES)
    np.testing.assert_array_equal(grades.rewards, [1.0, 0.0, math.nan])
    np.testing.assert_array_equal(grades.correct, [True, False, False])


def test_none_from_a_reward_function_is_missing():
    grades = grade(TASK, PROBLEMS, RESPONSES, [Reward(fixed(0.5, None, 2), "mine")])
    np.testing.assert_array_equal(grades.rewards, [0.5, math.nan, 2.0])
    np.testing.assert_array_equal(grades.parts["mine"], [0.5, math.nan, 2.0])


parts = st.lists(
    st.tuples(
        st.floats(-4, 4),
        st.lists(st.none() | st.floats(-100, 100), min_size=3, max_size=3),
    ),
    min_size=1,
    max_size=4,
)


@given(parts, st.booleans())
def test_the_total_is_the_weighted_sum_and_missing_where_any_part_is(drawn, with_task):
    rewards = [Reward(fixed(*values), f"part{n}", w) for n, (w, values) in enumerate(drawn)]
    columns = [(w, values) for w, values in drawn]
    if with_task:
        rewards.insert(0, "task")
        columns.append((1.0, [1.0, 0.0, 0.0]))
    grades = grade(TASK, PROBLEMS, RESPONSES, as_rewards(rewards))
    for i in range(3):
        values = [(w, column[i]) for w, column in columns]
        if any(value is None for _, value in values):
            assert math.isnan(grades.rewards[i])
        else:
            expected = math.fsum(w * value for w, value in values)
            scale = max(abs(w * value) for w, value in values)
            rounding = 1e-14 * scale + 1e-38  # of the float64 sum, and float32's underflow
            assert grades.rewards[i] == pytest.approx(expected, rel=2**-23, abs=rounding)
    for n, (_, values) in enumerate(drawn):
        unweighted = [math.nan if v is None else v for v in values]
        np.testing.assert_array_equal(grades.parts[f"part{n}"], unweighted)


def test_a_part_of_weight_zero_is_still_missed():
    rewards = ["task", Reward(fixed(None, 1.0, 1.0), "watched", weight=0.0)]
    grades = grade(TASK, PROBLEMS, RESPONSES, as_rewards(rewards))
    np.testing.assert_array_equal(grades.rewards, [math.nan, 0.0, 0.0])


@pytest.mark.parametrize(
    "rewards",
    [
        [Reward(fixed(0.0, 1.0, 1.0), "against")],
        [Reward(fixed(None, None, None), "missing")],
        ["task", Reward(fixed(-5, -5, -5), "shaping")],
    ],
)
def test_correct_is_the_tasks_verdict_whatever_is_rewarded(rewards):
    grades = grade(TASK, PROBLEMS, RESPONSES, as_rewards(rewards))
    np.testing.assert_array_equal(grades.correct, [True, False, False])
    assert [v.reward for v in grades.verdicts] == [1.0, 0.0, 0.0]


def test_a_reward_function_sees_prompts_responses_and_answers_in_order():
    seen = {}

    def spy(prompts, responses, answers):
        seen.update(prompts=prompts, responses=responses, answers=answers)
        return np.zeros(len(responses))

    problems = [Problem("p0", {"numbers": [1], "target": 1}), PROBLEM, PROBLEM]
    grade(TASK, problems, RESPONSES, as_rewards([spy]))
    assert seen == {
        "prompts": ["p0", "7 1 5 -> 13 :", "7 1 5 -> 13 :"],
        "responses": RESPONSES,
        "answers": [{"numbers": [1], "target": 1}, PROBLEM.answer, PROBLEM.answer],
    }


def test_integers_booleans_arrays_and_generators_are_numbers_of_a_reward():
    for values in ([1, 0, 2], [True, False, 2], np.float32([1, 0, 2]), (v for v in (1, 0, 2))):
        grades = grade(TASK, PROBLEMS, RESPONSES, [Reward(lambda p, r, a, v=values: v, "n")])
        np.testing.assert_array_equal(grades.rewards, [1.0, 0.0, 2.0])


@pytest.mark.parametrize("count", [0, 2, 4])
def test_a_wrong_number_of_rewards_is_refused_with_both_counts(count):
    rewards = [Reward(fixed(*[1.0] * count), "short")]
    message = rf"^rewards: 'short' gave {count} rewards for 3 responses$"
    with pytest.raises(UserError, match=message):
        grade(TASK, PROBLEMS, RESPONSES, rewards)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_nan_and_infinity_are_refused_and_none_is_named(value):
    with pytest.raises(UserError, match=r"^rewards: 'broken' gave -?(nan|inf); .* is None$"):
        grade(TASK, PROBLEMS, RESPONSES, [Reward(fixed(0.0, value, 1.0), "broken")])


def test_rewards_are_named_after_their_functions():
    def brevity(prompts, responses, answers):
        return [0.0] * len(responses)

    named = as_rewards([brevity, lambda p, r, a: [0.0] * len(r), Reward(brevity, "mine")])
    assert [reward.name for reward in named] == ["brevity", "lambda", "mine"]
    assert [reward.weight for reward in named] == [1.0, 1.0, 1.0]
    assert as_rewards(None) == ["task"]


@pytest.mark.parametrize(
    ("rewards", "culprit"),
    [
        ([fixed(0), fixed(1)], "'lambda'"),
        ([Reward(fixed(0), "same"), Reward(fixed(1), "same")], "'same'"),
        (["task", "task"], "'task'"),
        (["task", Reward(fixed(0), "task")], "'task'"),
    ],
)
def test_two_rewards_of_one_name_are_refused(rewards, culprit):
    with pytest.raises(UserError, match=rf"^rewards: two are named {culprit}; give each Reward"):
        as_rewards(rewards)


def test_a_reward_named_like_the_task_does_not_hide_the_tasks_own():
    rewards = ["task", Reward(fixed(5.0, 6.0, 7.0), "countdown")]
    with pytest.raises(UserError, match="'countdown'"):
        grade(TASK, PROBLEMS, RESPONSES, as_rewards(rewards))


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([], "the list is empty"),
        (["verifier"], "'verifier' is not known; the only name is 'task'"),
        ([3], r"3 is not a function\(prompts, responses, answers\)"),
        ([None], r"None is not a function\(prompts, responses, answers\)"),
    ],
)
def test_what_is_not_a_reward_is_refused_with_the_fix(rewards, message):
    with pytest.raises(UserError, match=f"^rewards: {message}"):
        as_rewards(rewards)
