"""Accuracy figures by hand."""

import json

import numpy as np
import pytest

from deltal_jax.tasks.base import Verdict
from deltal_jax.tasks.grading import Grades
from deltal_jax.training.evaluate import Evaluation, accuracy_metrics, write_samples


def grades(rows):
    """rows: (answer, correct) of each response, in order."""
    verdicts = [Verdict(float(correct), correct, "", answer) for answer, correct in rows]
    correct = np.asarray([c for _, c in rows])
    return Grades(correct.astype(np.float32), correct, verdicts, {})


def test_avg_pass_and_majority_at_k_by_hand():
    rows = [
        *(("a", True), ("b", False), ("b", False), ("c", False)),  # majority wrong
        *(("a", True), ("a", True), ("b", False), ("c", False)),  # majority right
        *(("x", False), ("y", False), ("y", False), ("z", False)),  # never right
    ]
    metrics = accuracy_metrics(grades(rows), 3, 4)
    assert metrics["avg_at_k"] == pytest.approx(3 / 12)
    assert metrics["pass_at_k"] == pytest.approx(2 / 3)
    assert metrics["maj_at_k"] == pytest.approx(1 / 3)
    assert (metrics["k"], metrics["problems"]) == (4, 3)


def test_a_tied_vote_counts_by_its_correct_share():
    rows = [("a", True), ("a", True), ("b", False), ("b", False)]
    assert accuracy_metrics(grades(rows), 1, 4)["maj_at_k"] == pytest.approx(0.5)


def test_with_one_sample_all_three_agree():
    rows = [("a", True), ("b", False), ("c", True)]
    metrics = accuracy_metrics(grades(rows), 3, 1)
    assert metrics["avg_at_k"] == metrics["pass_at_k"] == metrics["maj_at_k"]


def test_samples_are_one_table_row_each_whatever_they_contain(tmp_path):
    row = {"prompt": "a | b", "response": "line\nbreak <a> | </a>", "length": 4, "truncated": True}
    rows = [row | {"reason": "no answer", "correct": False}] * 3
    write_samples(tmp_path, 7, Evaluation({}, rows), rows=2)
    table = (tmp_path / "step-000007.md").read_text().splitlines()
    assert len(table) == 4
    unescaped = [line.replace("\\|", "") for line in table]
    assert {line.count("|") for line in unescaped} == {5}
    assert "<a>" not in table[2]
    whole = [json.loads(x) for x in (tmp_path / "step-000007.jsonl").read_text().splitlines()]
    assert whole == rows
