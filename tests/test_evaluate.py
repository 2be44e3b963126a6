"""What an evaluation says of judged responses, by data set, and how it is shown and kept."""

import json

import numpy as np
import pytest

from deltal_jax.cli.evaluate import table
from deltal_jax.tasks.base import Problem, Verdict
from deltal_jax.tasks.grading import Grades
from deltal_jax.training.evaluate import (
    Evaluation,
    accuracy_metrics,
    data_sets,
    macro_averages,
    write_samples,
)


def grades(rows):
    """rows: (answer, correct) of each response, in order; correct is None where nobody knows."""
    verdicts = [
        Verdict(None, False, "", answer, "timeout")
        if correct is None
        else Verdict(float(correct), correct, "", answer)
        for answer, correct in rows
    ]
    rewards = [np.nan if correct is None else float(correct) for _, correct in rows]
    correct = np.asarray([bool(correct) for _, correct in rows])
    return Grades(np.asarray(rewards, np.float32), correct, verdicts, {})


ROWS = [
    *(("a", True), ("b", False), ("b", False), ("c", False)),  # majority wrong
    *(("a", True), ("a", True), ("b", False), ("c", False)),  # majority right
    *(("x", False), ("y", False), ("", None), ("z", False)),  # never right
]


def test_the_figures_of_four_responses_by_hand():
    metrics = accuracy_metrics(grades(ROWS), ["p", "q", "r"])
    assert metrics["avg_at_k"] == pytest.approx(3 / 12)
    assert metrics["pass_at_2"] == pytest.approx((1 / 2 + 5 / 6 + 0) / 3)
    assert metrics["pass_at_k"] == pytest.approx(2 / 3)
    assert metrics["maj_at_k"] == pytest.approx(1 / 3)
    best = (1 - (3 / 4) ** 4) + (1 - (1 / 2) ** 4)
    assert metrics["best_at_k_bootstrap"] == pytest.approx(best / 3)
    assert (metrics["k"], metrics["problems"], metrics["distinct"]) == (4, 3, 3)
    assert metrics["missing_frac"] == pytest.approx(1 / 12)
    assert metrics["missing_timeout"] == 1 and "missing_crash" not in metrics
    for name in ("avg_at_k", "pass_at_k"):
        assert 0 <= metrics[f"{name}_low"] < metrics[name] < metrics[f"{name}_high"] <= 1


def test_with_one_sample_all_figures_agree():
    metrics = accuracy_metrics(grades([("a", True), ("b", False), ("c", True)]), ["p", "q", "r"])
    names = ("avg_at_k", "pass_at_k", "maj_at_k", "best_at_k_bootstrap")
    assert {metrics[name] for name in names} == {2 / 3}
    assert not any(name.startswith("pass_at_1") or name == "pass_at_2" for name in metrics)


def test_copies_of_a_problem_are_one_cluster():
    """The same responses to three copies and another problem: an interval as of two problems."""
    rows = [("a", True)] * 3 + [("b", False)]
    metrics = accuracy_metrics(grades(rows), ["p", "p", "p", "q"])
    assert (metrics["distinct"], metrics["avg_at_k"]) == (2, 3 / 4)
    assert (metrics["avg_at_k_low"], metrics["avg_at_k_high"]) == (0, 1)
    alone = accuracy_metrics(grades(rows), ["p"] * 4)
    assert np.isnan([alone["avg_at_k_low"], alone["avg_at_k_high"]]).all()


def problem(task="", dataset=""):
    return Problem("", {}, task, dataset)


SETS = {
    "one set": ("math", [problem(dataset="a")] * 2, {"math": [0, 1]}),
    "no set": ("math", [problem()] * 2, {"math": [0, 1]}),
    "several": (
        "math",
        [problem(dataset="b"), problem(dataset="a/c"), problem(dataset="b")],
        {"math/b": [0, 2], "math/a/c": [1], "math": [0, 1, 2]},
    ),
    "some without": (
        "math",
        [problem(dataset="b"), problem()],
        {"math/b": [0], "math/other": [1], "math": [0, 1]},
    ),
    "mixture": (
        "mixture",
        [problem("paths"), problem("math", "a"), problem("math", "b"), problem("paths")],
        {"math/a": [1], "math/b": [2], "math": [1, 2], "paths": [0, 3], "mixture": [0, 1, 2, 3]},
    ),
}


@pytest.mark.parametrize("case", SETS)
def test_each_data_set_has_a_name_of_its_own(case):
    task, problems, expected = SETS[case]
    found = data_sets(task, problems)
    assert list(found) == list(expected)
    assert {name: numbers.tolist() for name, numbers in found.items()} == expected


def test_a_macro_average_counts_each_set_alike():
    task, problems, _ = SETS["mixture"]
    values = {"math/a": 0.1, "math/b": 0.5, "math": 0.4, "paths": 1.0, "mixture": 0.7}
    metrics = {f"eval/{k}/{f}": v for k, v in values.items() for f in ("avg_at_k", "pass_at_k")}
    found = macro_averages(task, data_sets(task, problems), metrics)
    expected = {"math": 0.3, "mixture": 0.7}
    assert found == {
        f"eval/{k}/macro_{f}": pytest.approx(v)
        for k, v in expected.items()
        for f in ("avg_at_k", "pass_at_k")
    }


def of(name, rows, identities):
    extra = {"length": 12.25, "truncated_frac": 0.5}
    found = accuracy_metrics(grades(rows), identities) | extra
    return {f"eval/{name}/{k}": v for k, v in found.items()}


def test_the_table_has_a_row_for_each_set_and_says_what_is_missing():
    both = of("math/b", ROWS[:4], ["p"]) | of("math", ROWS, ["p", "q", "r"])
    metrics = {k: None if np.isnan(v) else v for k, v in both.items()}
    lines = table(metrics | {"eval/math/macro_avg_at_k": 0.25})
    head, first, second, *notes = [" ".join(line.split()) for line in lines]
    assert head == (
        "data set problems distinct avg@4 95 % interval pass@2 pass@4 95 % interval maj@4 length "
        "truncated no verdict"
    )
    assert first == "math/b 1 1 0.250 unknown 0.500 1.000 unknown 0.000 12.2 0.500 0.000"
    assert second.startswith("math 3 3 0.250 0.000 – 0.500 0.444 0.667 ")
    assert second.endswith(" 0.333 12.2 0.500 0.083")
    assert notes == [
        "math, mean of its sets: avg@k 0.250",
        "best@4 with replacement, for comparison with published numbers only: "
        "math/b 0.684, math 0.540",
        "no verdict counts as not correct: timeout 1",
    ]
    assert len({len(line) for line in lines[:3]}) == 1  # aligned


def test_samples_are_one_table_row_each_whatever_they_contain(tmp_path):
    row = {"prompt": "a | b", "response": "line\nbreak <a> | </a>", "length": 4, "truncated": True}
    rows = [row | {"reason": "no answer", "correct": False}] * 3
    write_samples(tmp_path, "step-000007", Evaluation({}, rows), rows=2)
    table = (tmp_path / "step-000007.md").read_text().splitlines()
    assert len(table) == 4
    unescaped = [line.replace("\\|", "") for line in table]
    assert {line.count("|") for line in unescaped} == {5}
    assert "<a>" not in table[2]
    whole = [json.loads(x) for x in (tmp_path / "step-000007.jsonl").read_text().splitlines()]
    assert whole == rows
