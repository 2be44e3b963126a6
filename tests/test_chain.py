"""Chain: the verifier against the definition, and the problem streams."""

import itertools
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltal_jax.data.tokenizer import train_word_tokenizer
from deltal_jax.errors import UserError
from deltal_jax.tasks.chain import Chain

TASK = Chain()
SMALL = Chain(steps=12, modulus=5)


@given(st.integers(2, 6), st.integers(0, 6), st.integers(0, 6), st.integers(1, 120))
def test_the_value_is_that_of_the_closed_form(a, b, x, n):
    power = pow(a, n, 7)
    sums = n * b if a == 1 else (power - 1) * pow(a - 1, -1, 7) * b
    problem = TASK.parse_problem(f"{a} {b} {x} * {n}")
    assert TASK.value(problem.answer, n) == (power * x + sums) % 7


def test_exactly_the_right_value_behind_the_last_sign_is_accepted():
    answer = TASK.parse_problem("3 2 5 * 4 :").answer
    assert TASK.verify("1 3 3 2 4 1 0 0 2 = 2", answer).correct
    assert TASK.verify("= 2", answer).correct
    assert TASK.verify("= 3 = 2", answer).correct
    for wrong in ("2", "", "= 3", "= 2 2", "= 2 = 3", "= 02", "= 2 ="):
        assert not TASK.verify(wrong, answer).correct, wrong


@pytest.mark.parametrize("task", [TASK, SMALL])
def test_demonstrations_are_right_at_every_jump(task):
    words, kinds = set(task.vocabulary()), set()
    for prompt, response in islice(task.demonstrations(3), 300):
        answer = task.parse_problem(prompt).answer
        assert not task.is_held_out(task.parse_problem(prompt))
        assert task.verify(response, answer).correct
        assert set(prompt.split()) | set(response.split()) <= words
        jump, *trace = map(int, response.split()[:-2] or [0])
        left = [answer["n"], *trace[::2]]
        jumps = [before - after for before, after in itertools.pairwise(left)]
        assert all(found == jump for found in jumps[:-1]) and all(0 < x <= jump for x in jumps)
        assert not trace or left[-1] == 0
        kinds.add(jump)
        for rest, value in zip(trace[::2], trace[1::2], strict=True):
            assert value == task.value(answer, answer["n"] - rest)
    assert {0, 1, 2, 4} <= kinds


def test_lengths_of_demonstrations_span_more_than_an_order_of_magnitude():
    lengths = sorted(len(r.split()) + 1 for _, r in islice(TASK.demonstrations(0), 1000))
    assert lengths[950] / lengths[50] > 25


def test_problems_repeat_for_their_seed_and_none_is_held_out():
    problems = [TASK.problem(1, position) for position in range(200)]
    assert problems == [TASK.problem(1, position) for position in range(200)]
    assert problems != [TASK.problem(2, position) for position in range(200)]
    held_out = TASK.held_out(100)
    assert all(map(TASK.is_held_out, held_out))
    assert not any(map(TASK.is_held_out, problems))


def test_every_word_has_a_token_of_its_own():
    tokenizer = train_word_tokenizer(TASK.vocabulary())
    text = "3 2 5 * 120 : 119 3 = 6"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", ["", "3 2 5 4", "7 0 0 * 3", "3 2 5 * 0", "3 2 5 * 121", "a"])
def test_what_is_no_problem_is_refused_in_one_line(text):
    with pytest.raises(UserError, match=r"problem: [^\n]*$"):
        TASK.parse_problem(text)
