"""Verdicts while others are sampled: each is the task's own, whenever it was asked for, and nothing
is left running."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest

from deltal_jax.tasks import early
from deltal_jax.tasks.base import Verdict
from deltal_jax.tasks.countdown.trace import CountDown
from deltal_jax.tasks.early import EarlyVerdicts


class Aside:
    """Judges in a thread of its own, not before `go` is set."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []
        self.go = threading.Event()
        self._pool = ThreadPoolExecutor(1)

    def submit(self, response: str, answer: int) -> Future[Verdict] | None:
        self.asked.append((response, answer))
        if response == "fails":
            raise ZeroDivisionError("the verifier's own")
        return None if response == "quick" else self._pool.submit(self._judge, response, answer)

    def _judge(self, response: str, answer: int) -> Verdict:
        self.go.wait(60)
        return Verdict(float(response == str(answer)), response == str(answer), response)


@pytest.fixture
def task():
    made = Aside()
    yield made
    made.go.set()
    made._pool.shutdown()


def read(tokens) -> str:
    return "".join(map(chr, tokens))


def written(text: str) -> np.ndarray:
    return np.asarray([ord(letter) for letter in text], np.int32)


def until(condition) -> None:
    for _ in range(6000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("nothing happened in a minute")


def test_a_verdict_is_known_by_its_problem_and_text_and_begun_once(task):
    task.go.set()
    verdicts = EarlyVerdicts(task, read)
    with verdicts:
        for position, answer, text in [(3, 7, "7"), (3, 7, "7"), (3, 7, "8"), (4, 8, "8")]:
            verdicts.offer(position, answer, written(text))
        until(lambda: verdicts.find(4, "8"))
        found = [verdicts.find(*of) for of in [(3, "7"), (3, "8"), (4, "8")]]
        assert [future.result(60).reward for future in found if future] == [1.0, 0.0, 1.0]
    assert task.asked == [("7", 7), ("8", 7), ("8", 8)]
    assert verdicts.find(4, "7") is None
    verdicts.keep({4})
    assert verdicts.find(3, "7") is None
    assert verdicts.find(4, "8") is found[2]


def test_a_task_that_is_as_quick_itself_and_one_that_fails(task):
    verdicts = EarlyVerdicts(task, read)
    with verdicts:
        verdicts.offer(0, 1, written("quick"))
        verdicts.offer(1, 1, written("fails"))
        until(lambda: verdicts.find(1, "fails"))
    assert verdicts.find(0, "quick") is None
    failed = verdicts.find(1, "fails")
    assert failed is not None
    with pytest.raises(ZeroDivisionError, match="the verifier's own"):
        failed.result(60)


def test_a_response_that_finds_no_room_is_left_to_be_judged_afterwards(task, monkeypatch):
    monkeypatch.setattr(early, "WAITING", 2)
    verdicts = EarlyVerdicts(task, read)
    for position in range(5):
        verdicts.offer(position, 1, written("1"))
    with verdicts:
        until(lambda: len(task.asked) == 2)
    assert [position for position in range(5) if verdicts.find(position, "1")] in ([], [0], [0, 1])


def test_where_it_ends_no_thread_is_left_and_what_nobody_works_at_is_forgotten(task):
    threads = threading.active_count()
    verdicts = EarlyVerdicts(task, read)
    with verdicts:
        verdicts.offer(0, 1, written("1"))  # the one that is worked at
        until(lambda: (worked := verdicts.find(0, "1")) is not None and worked.running())
        verdicts.offer(1, 1, written("1"))
        until(lambda: verdicts.find(1, "1"))
    assert threading.active_count() == threads + 1  # the task's own
    assert verdicts.find(1, "1") is None
    task.go.set()
    worked = verdicts.find(0, "1")
    assert worked is not None
    assert worked.result(60).correct


def test_only_tasks_that_verify_aside_are_served(task):
    assert EarlyVerdicts.serves(task)
    assert not EarlyVerdicts.serves(CountDown())
