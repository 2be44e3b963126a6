"""Prompts of the training stream: the first that fit, the same for all processes, in parts."""

import dataclasses
import functools

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from deltal_jax.data import prompts as module
from deltal_jax.data.chat import render_chat
from deltal_jax.data.epochs import epochs
from deltal_jax.data.prompts import draw_prompts, encode_prompts, problem_ids, problems_at, share
from deltal_jax.data.tokenizer import read_tokenizer, train_text_tokenizer
from deltal_jax.errors import UserError
from deltal_jax.tasks.base import Problem
from tests.small_tokenizers import write_folder
from tests.test_chat import CHATML

LETTERS = train_text_tokenizer(["ab"], 300)
SEED = 7


@dataclasses.dataclass(frozen=True)
class Listed:
    """A task whose rows are prompts, or None where a row is no problem."""

    prompts: list[str | None]

    @functools.cached_property
    def row(self):
        return functools.cache(
            epochs(len(self.prompts), SEED, self.prompts.__getitem__).__getitem__
        )

    def problem(self, seed, position):
        assert seed == SEED
        text = self.row(position)
        return None if text is None else Problem(text, text)


def drawn(task, start, count, width=8, **options):
    return draw_prompts(task, LETTERS, seed=SEED, start=start, count=count, width=width, **options)


def texts(prompts):
    """What the prompts say."""
    rows = zip(prompts.tokens, prompts.lengths, strict=True)
    return [LETTERS.decode(row[:length].tolist()) for row, length in rows]


ROWS = st.lists(
    st.one_of(st.none(), st.sampled_from(["a", "b" * 3, "c" * 30]), st.text("xyz", max_size=5)),
    min_size=1,
    max_size=12,
)


@given(
    rows=ROWS.filter(lambda rows: any(row is not None and len(row) < 7 for row in rows)),
    steps=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    processes=st.integers(1, 5),
)
def test_steps_and_processes_together_are_the_stream_without_what_is_left_out(
    rows, steps, processes
):
    task = Listed(rows)
    whole = drawn(task, 0, sum(steps))
    at, parts, dropped = 0, [], {}
    for count in steps:
        step = drawn(task, at, count)  # as after a resume: a position is all that it needs
        other = drawn(task, at, count)  # by another process
        for process in range(processes):
            own = share((other if process else step).prompts, process, processes)
            assert abs(len(own.lengths) - count / processes) < 1
            parts.append(own)
        at, dropped = step.next_position, dropped | step.dropped
    assert at == whole.next_position and dropped == whole.dropped
    for name in ("tokens", "lengths", "positions"):
        joined = np.concatenate([getattr(part, name) for part in parts])
        np.testing.assert_array_equal(joined, getattr(whole.prompts, name))
    taken = whole.prompts.positions.tolist()
    assert sorted([*taken, *dropped]) == list(range(at)) and taken[-1] == at - 1
    assert texts(whole.prompts) == [p.prompt for p in problems_at(task, SEED, taken)]
    for position in range(at):
        problem = task.problem(SEED, position)
        why = "row" if problem is None else "overlong" if len(problem.prompt) > 6 else None
        assert dropped.get(position) == why


def test_too_long_a_prompt_is_refused_where_that_is_asked_for():
    task = Listed(["a", "b" * 30])
    with pytest.raises(UserError, match=r"^rollout\.max_prompt_length: 8 is too short for 'bb"):
        drawn(task, 0, 2, overlong="error")
    assert texts(drawn(task, 0, 2).prompts) == ["a", "a"]
    with pytest.raises(UserError, match=r"^rollout\.max_prompt_length: 8 is too short for 'bb"):
        encode_prompts([Problem("a", 0), Problem("b" * 30, 0)], LETTERS, 8)
    with pytest.raises(UserError, match=r"^.{,200}, which takes 1333 tokens; raise it$"):
        encode_prompts([Problem("ab " * 333, 0)], LETTERS, 8)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("b" * 30, r"^rollout\.max_prompt_length: 8 is too short for 50 of the 50 prompts before"),
        (None, r"^task: none of the 50 rows before position 5\d is a problem to train on"),
    ],
)
def test_a_stream_that_gives_nothing_any_more_ends_with_why(monkeypatch, row, message):
    monkeypatch.setattr(module, "MAX_DROPPED", 50)
    with pytest.raises(UserError, match=message):
        drawn(Listed([row]), 3, 1)
    rare = Listed([row] * 24 + ["a"])  # at most 48 in a row
    assert texts(drawn(rare, 0, 4).prompts) == ["a"] * 4


def test_messages_of_the_data_go_through_the_template_as_they_are(tmp_path):
    tokenizer = read_tokenizer(write_folder(tmp_path, "qwen", template=CHATML))
    turns = (("system", "Think."), ("user", "1 + 1?"))
    problem = Problem("Think.\n\n1 + 1?", 2, messages=turns)
    messages = [{"role": role, "content": content} for role, content in turns]
    want = tokenizer.encode(render_chat(CHATML, messages, add_generation_prompt=True))
    assert problem_ids(problem, tokenizer, chat=True) == want
    one = [{"role": "user", "content": problem.prompt}]
    without = dataclasses.replace(problem, messages=())
    want = tokenizer.encode(render_chat(CHATML, one, add_generation_prompt=True))
    assert problem_ids(without, tokenizer, chat=True) == want
    assert tokenizer.decode(problem_ids(problem, tokenizer)) == problem.prompt
