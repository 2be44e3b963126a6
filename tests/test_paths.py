"""Paths: the verifier against every walk of small graphs, hostile text, and the problem streams."""

import itertools
import json
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltal_jax.data.tokenizer import train_word_tokenizer
from deltal_jax.errors import UserError
from deltal_jax.tasks.paths import MAX_ANSWER_LENGTH, Paths

TASK = Paths()
SMALL = Paths(nodes=5, edges=8, distance=1)


def correct(walk: str, answer: dict) -> bool:
    verdict = TASK.verify(f"c x <a> {walk} </a>", answer)
    assert verdict.reward == float(verdict.correct)
    return verdict.correct


def simple_paths(given: dict) -> set[str]:
    """Among all orders of all sets of nodes."""
    nodes = sorted(set("".join(given["edges"])) - {">"})
    found = set()
    for count in range(2, len(nodes) + 1):
        for walk in itertools.permutations(nodes, count):
            steps = {f"{a}>{b}" for a, b in itertools.pairwise(walk)}
            if (
                steps <= set(given["edges"])
                and walk[0] + walk[-1] == given["start"] + given["goal"]
            ):
                found.add(" ".join(walk))
    return found


@pytest.mark.parametrize("position", range(5))
def test_exactly_the_simple_paths_of_a_graph_are_accepted(position):
    answer = SMALL.problem(0, position).answer
    right = simple_paths(answer)
    assert right
    for count in range(1, 6):
        for walk in itertools.product("abcde", repeat=count):
            assert correct(" ".join(walk), answer) == (" ".join(walk) in right)


@given(st.integers(0, 10**6), st.permutations(range(TASK.edges)), st.permutations("abcdefghij"))
def test_a_verdict_does_not_depend_on_the_order_of_edges_or_the_names(position, order, names):
    answer = TASK.problem(0, position % 50).answer
    renamed = str.maketrans("abcdefghij", "".join(names))
    other = {
        "edges": [answer["edges"][i].translate(renamed) for i in order],
        "start": answer["start"].translate(renamed),
        "goal": answer["goal"].translate(renamed),
    }
    for _, response in islice(TASK.demonstrations(position % 7), 3):
        walk = response.rpartition("<a>")[2].removesuffix("</a>").strip()
        assert correct(walk, answer) == correct(walk.translate(renamed), other)


def test_a_walk_that_is_no_path_is_refused_with_its_reason():
    answer = TASK.parse_problem("a>c c>b b>c a>b ? a b").answer
    for walk, reason in [
        ("a c b", "correct"),
        ("a b", "correct"),
        ("c b", "does not lead from start to goal"),
        ("a c", "does not lead from start to goal"),
        ("a c b c b", "visits a node twice"),
        ("a d b", "has no edge a>d"),
        ("", "does not lead from start to goal"),
        ("acb", "does not lead from start to goal"),
        ("a " * MAX_ANSWER_LENGTH, "answer too long"),
    ]:
        assert TASK.verify(f"<a> {walk} </a>", answer).reason == reason
    assert TASK.verify("<a> a c </a> <a> a c b </a>", answer).correct
    assert not TASK.verify("<a> a c b </a> <a> a c </a>", answer).correct
    for text in ("", "a c b", "<a> a c b", "a c b </a>", "</a> a c b <a>", "<a>" * 10**5):
        assert TASK.verify(text, answer).reason == "no answer"
    for text in ("\x00", "\ud800", "9" * 10**6, "a>c", "[" * 10**6, "__import__('os')"):
        assert not TASK.verify(f"<a>{text}</a>", answer).correct


def test_problems_are_solvable_addressed_by_position_and_apart_from_those_held_out():
    training = [TASK.problem(0, position) for position in range(200)]
    assert [TASK.problem(0, position) for position in range(200)] == training
    assert len({problem.prompt for problem in training}) == 200
    held_out = TASK.held_out(100)
    assert held_out == TASK.held_out(200)[:100]
    assert all(map(TASK.is_held_out, held_out))
    assert not any(map(TASK.is_held_out, training))
    for problem in training[:20]:
        answer = problem.answer
        assert f"{answer['start']}>{answer['goal']}" not in answer["edges"]
        assert TASK.parse_problem(problem.prompt).answer == answer
        assert json.loads(json.dumps(answer)) == answer


def test_demonstrations_try_walks_judge_them_rightly_and_answer_with_the_last():
    tokenizer, hits, directs, repeats = train_word_tokenizer(TASK.vocabulary()), 0, 0, 0
    lengths = []
    for prompt, response in islice(TASK.demonstrations(0), 500):
        assert tokenizer.decode(tokenizer.encode(f"{prompt} {response}")) == f"{prompt} {response}"
        answer = TASK.parse_problem(prompt).answer
        trace, _, final = response.partition("<a>")
        walk = final.removesuffix("</a>").split()
        tries = trace.replace("ok", "ok|").replace("x", "x|").split("|")[:-1]
        directs += not tries
        for said in tries:
            *steps, verdict = said.split()
            assert (verdict == "ok") == correct(" ".join(steps), answer)
        if tries:
            assert tries[-1].split()[:-1] == walk
            repeats += len({t.split()[0] + t for t in tries}) < len(tries)
        hits += correct(" ".join(walk), answer)
        lengths.append(len(response.split()))
    assert 0.05 < directs / 500 < 0.15
    assert 0.5 < hits / 500 < 0.8
    assert repeats < 10
    assert sorted(lengths)[475] > 2 * sorted(lengths)[250] - 2  # a long tail


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7 1 5 -> 40", "is not of the form 'a>c c>b a>d \\? a b'$"),
        ("a>c ? a", "is not of the form"),
        ("a>z ? a z", "node z is not in a … j$"),
    ],
)
def test_a_typed_problem_that_cannot_be_read_is_refused(text, expected):
    with pytest.raises(UserError, match=expected):
        TASK.parse_problem(text)
