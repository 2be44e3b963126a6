"""What was said of a response stays said where its step is repeated."""

import json

import pytest

from deltal_jax.tasks.base import close
from deltal_jax.tasks.grading import grade
from deltal_jax.tasks.math.task import Math
from deltal_jax.tasks.workers import Limits
from deltal_jax.training.journal import VerdictJournal

RESPONSES = ["so \\boxed{20}", "so \\boxed{\\frac{40}{2}}", "\\boxed{21}", "nothing"]


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    """The verdicts on `RESPONSES`, judged by worker processes with these limits."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    path.write_text(json.dumps({"problem": "10+10?", "answer": "20"}))

    def verdicts(journal, responses=RESPONSES, **limits):
        task = Math(str(path), [], verifier="reference", workers=1, limits=Limits(**limits))
        problems = [task.problem(0, 0)] * len(responses)
        try:
            return grade(task, problems, responses, journal=journal).verdicts
        finally:
            close(task)

    return verdicts


#: No call is done by then; the signal is real.
NO_TIME = {"wall": 1e-6}


def test_what_a_limit_cut_off_is_cut_off_again_and_what_it_did_not_is_not(verdicts, tmp_path):
    cut, judged = verdicts(None, **NO_TIME), verdicts(None)
    assert {verdict.missing for verdict in cut} == {"timeout"}
    assert [verdict.reward for verdict in judged[:3]] == [1.0, 1.0, 0.0]
    first = VerdictJournal(tmp_path / "verdicts")
    assert verdicts(first.of("rl", 5), **NO_TIME) == cut
    assert verdicts(first.of("rl", 6)) == judged
    again = VerdictJournal(tmp_path / "verdicts")
    assert verdicts(again.of("rl", 5)) == cut
    assert verdicts(again.of("rl", 6), **NO_TIME) == judged
    assert verdicts(again.of("eval", 5)) == judged  # of another phase
    assert verdicts(again.of("rl", 5), RESPONSES[::-1]) == judged[::-1]  # of another call


def test_steps_that_no_resume_repeats_are_forgotten(verdicts, tmp_path):
    journal = VerdictJournal(tmp_path / "verdicts")
    for step in (9, 10, 11):
        verdicts(journal.of("rl", step))
    (torn,) = journal.folder.glob("rl-000011-*")
    (journal.folder / f".{torn.name}.123").write_text("[")  # killed while it wrote
    journal.drop(11)
    assert sorted(journal.folder.glob("rl-*")) == [torn]
    torn.write_text("")  # the machine died before it was on the disk
    judged = verdicts(None)
    assert verdicts(journal.of("rl", 11)) == judged
    assert verdicts(journal.of("rl", 11), **NO_TIME) == judged
    journal.drop(12)
    assert not list(journal.folder.iterdir())


def test_each_of_several_processes_keeps_its_share(verdicts, tmp_path):
    journals = [VerdictJournal(tmp_path / "verdicts") for _ in range(2)]
    shares = [RESPONSES[:2], RESPONSES[2:]]
    pairs = list(zip(journals, shares, strict=True))
    judged = [verdicts(journal.of("rl", 1), share) for journal, share in pairs]
    again = [verdicts(journal.of("rl", 1), share, **NO_TIME) for journal, share in pairs]
    assert again == judged
    for journal in journals:  # each where it is told, be it the first or not
        journal.drop(2)
    assert not list((tmp_path / "verdicts").iterdir())
