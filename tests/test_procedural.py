"""Procedural tasks: verdicts against judgements by other means, other solutions, hostile text, and
the problem streams."""

import ast
import itertools
import json
import random
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("reasoning_gym", reason="install deltal-jax[procedural] to test its tasks")

from deltal_jax.data.prompts import train_tokenizer
from deltal_jax.errors import UserError
from deltal_jax.tasks import procedural
from deltal_jax.tasks.mixture import Mixture
from deltal_jax.tasks.paths import Paths
from deltal_jax.tasks.procedural import DOMAINS, KINDS
from deltal_jax.tasks.procedural.algorithms import shortest_ladder
from deltal_jax.tasks.procedural.generated import CLOSE, OPEN, Generated, _dataset
from deltal_jax.tasks.procedural.reading import MAX_ANSWER
from tests.procedural_cases import CASES, mutated

PROBLEMS, MUTATIONS = 5, 45
#: Tasks whose generator's scorer says otherwise: it wants the layout of its own answer, no zeros
#: before a number, takes numbers that are nearly the same, or reads // and a sign before a sum.
SCORED_OTHERWISE = ("futoshiki", "base_conversion", "number_sorting", "puzzle24")
#: Tasks most of whose problems have several solutions.
OPEN_ENDED = ("graph_color", "jugs", "sokoban", "shortest_path")


def said(text: str) -> str:
    return f"Let me think. {OPEN}{text}{CLOSE}"


def correct(name: str, text: str, facts: dict, example: str = "0") -> bool:
    verdict = Generated(name).verify(said(text), {"facts": facts, "example": example})
    assert verdict.reward == float(verdict.correct)
    return verdict.correct


def test_there_are_tasks_of_six_domains_and_each_is_judged_here():
    assert set(DOMAINS) == {"logic", "algorithms", "games", "graphs", "cognition", "arithmetic"}
    assert set(CASES) == set(KINDS)
    assert sum(map(len, DOMAINS.values())) == len(KINDS) >= 20


@pytest.mark.parametrize("name", KINDS)
def test_verdicts_on_mutated_answers_are_those_of_a_judge_and_of_the_generators_scorer(name):
    task, case, rng, right = Generated(name), CASES[name], random.Random(name), 0
    source, entries = task._source("train/0"), itertools.count()
    for _ in range(PROBLEMS):
        entry = next(
            e for e in map(source.__getitem__, entries) if not task.is_held_out(task._problem(e))
        )
        answer = task._problem(entry).answer
        value = case.parse(answer["example"])
        assert case.solves(value, answer["facts"])
        assert task.verify(said(answer["example"]), answer).correct
        spoilt: dict[str, Any] = {}
        while len(spoilt) < MUTATIONS:  # of the answer, or of one that is spoilt already
            other = mutated(rng, rng.choice([value, value, *spoilt.values()]))
            spoilt[case.write(other)] = other
        for text, other in spoilt.items():
            judged = bool(case.solves(other, answer["facts"]))
            verdict = task.verify(said(text), answer)
            assert verdict.correct == judged, (answer, text, verdict)
            assert verdict.reward == float(judged)
            right += judged
            if name not in SCORED_OTHERWISE:  # its scorers execute text: this one is our own
                assert (source.score_answer(text, entry) == 1.0) == judged, (answer, text)
    assert right < PROBLEMS * MUTATIONS


@pytest.mark.parametrize("name", KINDS)
def test_the_last_answer_counts_with_any_space_around_it(name):
    task = Generated(name)
    answer = task.problem(1, 0).answer
    text = answer["example"]
    assert task.verify(said("42 nonsense") + said(f"\n  {text} \n"), answer).correct
    assert not task.verify(said(text) + said("42 nonsense"), answer).correct
    assert not task.verify(f"{OPEN}{text}", answer).correct
    assert not task.verify(f"{text}{CLOSE}", answer).correct
    assert not task.verify(text, answer).correct


HOSTILE = [
    "",
    " ",
    "\x00",
    "\ud800\udfff\ud83d",
    "9" * 1_000_000,
    "-" * 1_000_000,
    "1 " * 500_000,
    "[" * 1_000_000,
    "[" * 3_000,
    "[" * 300 + "]" * 300,
    '{"a":' * 300,
    "(" * 4_000,
    "((((" * 10 + "1" + "))))" * 10,
    "1" * MAX_ANSWER,
    "9" * 5_000,
    "1e999999999",
    "9**9**9**9",
    "9" * 30 + "*" + "9" * 30,
    "NaN",
    "Infinity",
    "true",
    "null",
    "[1, 2, [3]]",
    '{"0": 1, "0": 2}',
    '{"0": true}',
    '["fill Z", "pour A->A"]',
    "move disk 99 from peg 99 to peg 99",
    "up" * 3_000,
    "up " * 2_600,
    "U" * MAX_ANSWER,
    "x=1," * 2_000,
    "A is a knight, and " * 400,
    "1/0",
    "0/0",
    "\\frac{1}{0}",
    "²",
    "٣",
    "１２",
    "__import__('os').system('true')",
    "().__class__.__bases__[0].__subclasses__()",
    "a" * 4_000 + "!" * 3_999,
    "\u202e1\u202c",
    f"{OPEN}" * 100_000,
    f"{CLOSE}" * 100_000,
    "\n" * MAX_ANSWER,
    "_ " * 4_000,
    ", " * 3_000,
]


@pytest.mark.parametrize("name", KINDS)
def test_hostile_text_is_wrong_and_never_raises(name):
    task = Generated(name)
    answer = task.problem(2, 0).answer
    for text in HOSTILE:
        for response in (said(text), text, f"{OPEN}{text}", said(answer["example"] + text + "?!")):
            verdict = task.verify(response, answer)
            assert (verdict.reward, verdict.correct) == (0.0, False), (text[:50], verdict)
            json.dumps(verdict.answer).encode()


@pytest.mark.parametrize("name", KINDS)
def test_cuts_and_noise_in_a_right_answer_never_raise(name):
    task, rng = Generated(name), random.Random(f"noise {name}")
    answer = task.problem(3, 0).answer
    for _ in range(200):
        text = list(answer["example"])
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(text) + 1)
            text[at : at + rng.randrange(3)] = rng.choice(
                ["", "\x00", "\ud800", "[", '"', "-", "\\", "∧", "=", "\n", "0", "é"]
            )
        verdict = task.verify(said("".join(text)), answer)
        assert verdict.reward in (0.0, 1.0)


def test_nothing_executes_what_a_model_wrote():
    """No module of the verifiers names a function that could, nor a scorer of reasoning-gym."""
    forbidden = {"eval", "exec", "compile", "literal_eval", "sympify", "parse_expr", "score_answer"}
    for path in Path(procedural.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        attributes = {
            n.attr
            for n in ast.walk(tree)
            if isinstance(n, ast.Attribute)
            and not (isinstance(n.value, ast.Name) and n.value.id == "re")
        }
        assert not forbidden & (names | attributes), path


@pytest.mark.parametrize("name", OPEN_ENDED)
def test_mutations_find_other_solutions_than_the_generators(name):
    task, case, rng, found = Generated(name), CASES[name], random.Random(f"other {name}"), 0
    for position in range(20):
        answer = task.problem(4, position).answer
        value = case.parse(answer["example"])
        others = (mutated(rng, value) for _ in range(60))
        found += any(
            other != value and task.verify(said(case.write(other)), answer).correct
            for other in others
        )
    assert found > 0


def test_every_completion_of_an_open_sudoku_is_accepted():
    facts = {"puzzle": [[1, 2, 3, 4], [3, 4, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]}
    right = ["1 2 3 4\n3 4 1 2\n2 1 4 3\n4 3 2 1", "1 2 3 4\n3 4 2 1\n2 1 4 3\n4 3 1 2"]
    wrong = ["1 2 3 4\n3 4 1 2\n2 1 4 3\n4 3 1 2", "2 1 3 4\n3 4 1 2\n1 2 4 3\n4 3 2 1"]
    assert [correct("mini_sudoku", text, facts) for text in right + wrong] == [True] * 2 + [
        False
    ] * 2


def test_both_peaceful_boards_of_four_and_no_other_are_accepted():
    empty = {"puzzle": [["_"] * 4] * 4}
    boards = ["_ Q _ _\n_ _ _ Q\nQ _ _ _\n_ _ Q _", "_ _ Q _\nQ _ _ _\n_ _ _ Q\n_ Q _ _"]
    assert all(correct("n_queens", board, empty) for board in boards)
    held = {"puzzle": [["_", "Q", "_", "_"], *[["_"] * 4] * 3]}
    assert [correct("n_queens", board, held) for board in boards] == [True, False]
    assert not correct("n_queens", boards[0].replace("Q", "_", 1), empty)


def test_a_longer_way_with_jugs_disks_and_words_is_a_way():
    jugs = {"puzzle": {"jug_capacities": [3, 5], "target": 4}}
    short = ["fill B", "pour B->A", "empty A", "pour B->A", "fill B", "pour B->A"]
    assert correct("jugs", json.dumps(short), jugs)
    assert correct("jugs", json.dumps(["fill A", "empty A", *short]), jugs)
    assert not correct("jugs", json.dumps(short[:-1]), jugs)
    tower = {"num_disks": 1, "num_pegs": 3, "start_peg": 1, "target_peg": 3}
    assert correct("tower_of_hanoi", "Move disk 1 from Peg 1 to Peg 3", tower)
    way = "Move disk 1 from Peg 1 to Peg 2\n\nmove  disk 1 from peg 2 to peg 3."
    assert correct("tower_of_hanoi", way, tower)
    assert not correct("tower_of_hanoi", way.replace("peg 3", "peg 1"), tower)
    ends = {"start_word": "COLD", "end_word": "WARM"}
    ladder = shortest_ladder("COLD", "WARM")
    assert correct("word_ladder", ",".join(ladder), ends)
    assert not correct("word_ladder", ",".join([*ladder, "WARM"]), ends)
    back = [*ladder[:2], *ladder[:1], *ladder[1:]]
    assert correct("word_ladder", ",".join(back).lower(), ends)
    assert not correct("word_ladder", "COLD,COLZ,WARM", ends)


def test_every_shortest_path_and_no_longer_one_is_accepted():
    facts = {"matrix": [["*", "O"], ["O", "#"]]}
    for text, right in [
        ("right down", True),
        ("down right", True),
        ("DOWN, right", True),
        ("down up down right", False),
        ("infeasible", False),
        ("down", False),
    ]:
        assert correct("shortest_path", text, facts) == right, text
    walled = {"matrix": [["*", "X"], ["X", "#"]]}
    assert correct("shortest_path", "Infeasible", walled)
    assert not correct("shortest_path", "right down", walled)


def test_every_solution_of_a_sum_of_letters_and_of_24_is_accepted():
    facts = {"words_letters": ["A", "B"], "result_letters": "C", "allow_leading_zero": False}
    for text, right in [
        ("A=1,B=2,C=3", True),
        ("C = 9, B=4, A=5", True),
        ("A=1,B=1,C=2", False),
        ("A=0,B=1,C=1", False),
        ("A=1,B=2,C=4", False),
        ("A=1,B=2,C=3,D=4", False),
        ("A=1,B=2", False),
    ]:
        assert correct("cryptarithm", text, facts) == right, text
    numbers = {"numbers": [8, 3, 8, 3]}
    for text, right in [
        ("8 / (3 - 8 / 3)", True),
        ("-8 / (8/3 - 3)", True),
        ("8 * 3", False),
        ("3 * 8 + 3 - 3", False),
        ("0 + 8 / (3 - 8 / 3)", False),
        ("24", False),
    ]:
        assert correct("puzzle24", text, numbers) == right, text


def test_a_numeral_is_judged_by_its_value_and_zero_is_never_asked_for():
    facts = {"decimal_value": 30, "source_base": 10, "target_base": 16}
    for text, right in [
        ("1e", True),
        ("001E", True),
        ("0x1e", False),
        ("1g", False),
        ("30", False),
    ]:
        assert correct("base_conversion", text, facts) == right, text
    assert correct("base_conversion", "0", facts | {"decimal_value": 0}, example="")
    least = {"min_value": 0, "max_value": 1}
    assert Generated("base_conversion")._source("x") is _dataset(
        "base_conversion", "x", '{"min_value": 1}'
    )
    assert Generated("base_conversion", least).problem(0, 0).answer["example"] in ("", "1")


def test_a_known_answer_that_is_none_leaves_the_reward_missing():
    verdict = Generated("gcd").verify(said("1"), {"facts": {"numbers": [2, 3]}, "example": ""})
    assert (verdict.reward, verdict.correct, verdict.missing) == (None, False, "unparsed")


def test_who_lies_may_be_said_in_any_order_but_not_twice_in_different_ways():
    facts = {
        "statements": [["lying", 1], ["and", ["lying", 0], ["lying", 1]]],
        "names": ["Ann", "Bob"],
        "knight": "angel",
        "knave": "egoist",
    }
    for text, right in [
        ("Ann is an angel, and Bob is an egoist.", True),
        ("bob is an egoist and ann is an angel", True),
        ("Bob is a egoist\nAnn is a angel", True),
        ("Ann is an egoist, and Bob is an angel.", False),
        ("Ann is an angel", False),
        ("Ann is an angel, Bob is an egoist, and Bob is an angel", False),
        ("Ann is an angel, Bob is an egoist, and Cid is an angel", False),
    ]:
        assert correct("knights_knaves", text, facts) == right, text


@pytest.mark.parametrize("name", KINDS)
def test_training_and_held_out_problems_are_apart_and_addressed_by_position(name):
    task = Generated(name)
    training = [task.problem(0, position) for position in range(6)]
    held_out = task.held_out(3)
    assert not any(map(task.is_held_out, training))
    assert all(map(task.is_held_out, held_out))
    _dataset.cache_clear()
    assert [task.problem(0, position) for position in (5, 0)] == [training[5], training[0]]
    assert task.draw_held_out(3) == held_out
    assert task.problem(1, 0).prompt != training[0].prompt or name == "circuit_logic"
    assert json.loads(json.dumps(training[0].answer)) == training[0].answer
    prompt, response = next(task.demonstrations(0))
    assert prompt.endswith(training[0].prompt[-40:])
    assert response.startswith(OPEN)


def test_options_reach_the_generator_and_bad_ones_are_refused():
    facts = (
        Generated("tower_of_hanoi", {"min_disks": 3, "max_disks": 3}).problem(0, 0).answer["facts"]
    )
    assert facts["num_disks"] == 3
    for options in ({"disks": 3}, {"min_disks": 9, "max_disks": 3}):
        with pytest.raises(UserError, match=r"^task\.procedural: tower_of_hanoi refuses"):
            Generated("tower_of_hanoi", options).problem(0, 0)


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    _dataset.cache_clear()
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=r"needs reasoning-gym; install deltal-jax\[procedural\]$"):
        Generated("gcd").problem(0, 0)
    with pytest.raises(UserError, match="are generated"):
        Generated("gcd").parse_problem("12 18")


def test_a_tokenizer_of_free_text_is_made_of_demonstrations_where_there_is_no_vocabulary():
    task = Mixture([(Paths(), 1.0), (Generated("gcd"), 1.0)])
    assert task.vocabulary() is None
    tokenizer = train_tokenizer(task)
    for prompt, response in islice(task.demonstrations(3), 20):
        ids = tokenizer.encode(prompt)
        assert tokenizer.decode(ids) == prompt
        assert len(ids) < len(prompt)
        assert tokenizer.decode(tokenizer.encode(response)) == response
