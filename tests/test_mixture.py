"""Mixtures: which task a position belongs to, whose verdict counts, and metrics apart by task."""

import dataclasses
import json
from collections import Counter
from itertools import islice

import jax
import numpy as np
import pytest

from deltal_jax.config import load_config
from deltal_jax.errors import UserError
from deltal_jax.tasks.catalog import make_task
from deltal_jax.tasks.countdown.trace import CountDown
from deltal_jax.tasks.grading import Reward, grade
from deltal_jax.tasks.mixture import Mixture
from deltal_jax.tasks.paths import Paths
from deltal_jax.training.evaluate import evaluate
from deltal_jax.training.groups import reward_metrics
from deltal_jax.training.setup import init_params, make_local_engine, make_setup
from tests.fakes import config_refusal

COUNTDOWN, PATHS = CountDown(), Paths(nodes=6, edges=10)
TASK = Mixture([(COUNTDOWN, 0.75), (PATHS, 0.25)])
TINY = {
    "task.name": "mixture",
    "task.mixture": {"countdown": 3, "paths": 1},
    "task.paths.nodes": 6,
    "task.paths.edges": 10,
    "model.layers": 1,
    "model.d_model": 16,
    "model.heads": 1,
    "rollout.max_prompt_length": 16,
    "rollout.max_response_length": 8,
    "length_buckets": [24],
    "evaluate.problems": 10,
    "evaluate.samples_per_problem": 2,
}


def test_a_position_belongs_to_one_task_by_a_seeded_draw_with_the_weights():
    names = [TASK.problem(0, position).task for position in range(2000)]
    assert abs(Counter(names)["countdown"] / 2000 - 0.75) < 0.04
    assert names[:50] == [TASK.problem(0, position).task for position in range(50)]
    assert names[:200] != [TASK.problem(1, position).task for position in range(200)]
    for position in (0, 7, 1999):
        problem = TASK.problem(0, position)
        alone = TASK.parts[problem.task].problem(0, position)
        assert problem.answer == {"task": problem.task, "answer": alone.answer}
        assert problem.prompt == alone.prompt


@pytest.mark.parametrize(
    ("count", "expected"), [(8, (6, 2)), (10, (8, 2)), (1, (1, 0)), (3, (2, 1))]
)
def test_held_out_problems_are_each_tasks_own_in_the_proportion_of_weights(count, expected):
    problems = TASK.held_out(count)
    assert [p.task for p in problems] == ["countdown"] * expected[0] + ["paths"] * expected[1]
    first = COUNTDOWN.held_out(expected[0])
    assert [p.prompt for p in problems[: expected[0]]] == [p.prompt for p in first]


def test_a_response_is_judged_by_the_task_of_its_problem():
    numbers = TASK.parse_problem("7 1 5 -> 40")
    graph = TASK.parse_problem("a>c c>b a>d ? a b")
    assert (numbers.task, graph.task) == ("countdown", "paths")
    for response, verdicts in [
        ("<a> 5 * ( 1 + 7 ) </a>", (True, False)),
        ("<a> a c b </a>", (False, True)),
        ("", (False, False)),
    ]:
        judged = tuple(TASK.verify(response, p.answer).correct for p in (numbers, graph))
        assert judged == verdicts
    with pytest.raises(UserError, match=r"countdown: .*; paths: .*is not of the form"):
        TASK.parse_problem("what?")


def test_vocabulary_and_demonstrations_are_those_of_all():
    words = TASK.vocabulary()
    assert words is not None
    assert set(words) == {*COUNTDOWN.vocabulary(), *PATHS.vocabulary()}
    assert len(set(words)) == len(words)
    shown = list(islice(TASK.demonstrations(0), 400))
    graphs = [pair for pair in shown if ">" in pair[0].split()[0]]
    assert 60 < len(graphs) < 140
    assert graphs == list(islice(PATHS.demonstrations(0), len(graphs)))
    assert all(set(f"{a} {b}".split()) <= set(words) for a, b in shown)


def test_rewards_are_told_apart_by_task():
    problems = [TASK.parse_problem(t) for t in ("7 1 5 -> 40", "a>b b>c ? a c", "a>b b>c ? a c")]
    responses = ["<a> 5 * ( 1 + 7 ) </a>", "<a> a b c </a>", "no"]
    half = Reward(lambda prompts, responses, answers: [1.0, 1.0, None], "half", 0.5)
    grades = grade(TASK, problems, responses, ["task", half])
    np.testing.assert_array_equal(grades.rewards, [1.5, 1.5, np.nan])
    np.testing.assert_array_equal(grades.parts["countdown"], [1.5, np.nan, np.nan])
    np.testing.assert_array_equal(grades.parts["paths"], [np.nan, 1.5, np.nan])
    metrics = reward_metrics(grades.rewards, grades.correct, grades.parts, np.arange(3))
    assert metrics["reward/countdown/mean"] == metrics["reward/paths/mean"] == 1.5
    assert metrics["reward/mixture/mean"] == pytest.approx(2 / 3)
    with pytest.raises(UserError, match="'paths' is the task's own name"):
        grade(TASK, problems, responses, [dataclasses.replace(half, name="paths")])


def test_an_evaluation_has_metrics_of_each_task_and_of_all():
    setup = make_setup(load_config("countdown-tiny", TINY))
    key = jax.random.key(0)
    engine = make_local_engine(setup, temperature=1.0)
    found = evaluate(setup, engine, init_params(setup, key), key)
    names = {name.split("/")[1] for name in found.metrics}
    assert names == {"countdown", "paths", "mixture"}
    rows = {"countdown": found.rows[:16], "paths": found.rows[16:], "mixture": found.rows}
    for name, part in rows.items():
        assert found.metrics[f"eval/{name}/problems"] == len(part) / 2
        correct = np.mean([row["correct"] for row in part])
        assert found.metrics[f"eval/{name}/avg_at_k"] == pytest.approx(correct)
        length = np.mean([row["length"] for row in part])
        assert found.metrics[f"eval/{name}/length"] == pytest.approx(length)
        assert found.metrics[f"eval/{name}/distinct"] == len({row["prompt"] for row in part})
    json.dumps(found.rows)


def test_a_mixture_that_makes_no_sense_is_refused():
    for weights in (None, {"countdown": 0.0}, {"mixture": 1.0}):
        with pytest.raises(UserError, match=r"^task\.mixture: name tasks with their weights"):
            load_config("countdown-tiny", TINY | {"task.mixture": weights})
    with pytest.raises(UserError, match=r"^task\.name: 'path' is not one of .*; did you mean"):
        make_task(load_config("countdown-tiny", {"task.name": "path"}).task)
    with pytest.raises(UserError, match=r"^task\.mixture: two of its tasks have one name$"):
        Mixture([(COUNTDOWN, 1.0), (CountDown(numbers=4), 1.0)])
    assert config_refusal({"task.name": "mixture", "task.mixture": {"countdown": -1.0}}) == (
        "task.mixture.countdown: a weight is not below 0, got -1"
    )
