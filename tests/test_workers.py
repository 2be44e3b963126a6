"""Workers: every call has an outcome, whatever it does, and the next one finds a good worker."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltal_jax.tasks.workers import MAX_MESSAGE, Limits, Outcome, Workers, WorkerStartError

SHORT = Limits(timeout=0.3, wall=0.6, grace=0.3)
CALLS = "tests.worker_calls:"


@pytest.fixture(scope="module")
def concat():
    with Workers("operator:concat", 2) as workers:
        yield workers


def until(condition) -> None:
    """Wait for what is about to happen."""
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it never happened")


def alive(pid: int) -> bool:
    """Whether the process exists, as a zombie or not."""
    return Path(f"/proc/{pid}").exists()


def test_results_come_in_the_order_of_the_calls(concat):
    found = concat.map([(str(n), "!") for n in range(300)])
    assert found == [Outcome("done", f"{n}!") for n in range(300)]


@settings(max_examples=30)
@given(st.text(st.characters(exclude_categories=())), st.text())
def test_any_text_passes_unchanged(concat, left, right):
    assert concat.submit(left, right).result() == Outcome("done", left + right)


def test_surrogate_halves_and_nuls_pass_unchanged(concat):
    assert concat.submit("\ud800\x00", "\udfff\n").result().value == "\ud800\x00\udfff\n"


@pytest.mark.parametrize(
    ("function", "bad", "expected", "good"),
    [
        ("time:sleep", (30,), Outcome("timeout", "inner"), (0, None)),
        (CALLS + "swallow", (30,), Outcome("timeout", "inner"), (0, "slept")),
        (CALLS + "deaf", (30,), Outcome("timeout", "outer"), (0, None)),
        ("operator:pow", (7, 10**8), Outcome("timeout", "inner"), (2, 3, 8)),
        ("os:kill", (0, 9), Outcome("crash", -9), None),
        ("os:_exit", (3,), Outcome("crash", 3), None),
        ("os:abort", (), Outcome("crash", -6), None),
        (CALLS + "reply_and_die", ("x",), Outcome("crash", 7), None),
        ("operator:mul", ("x", 1 << 40), Outcome("memory"), ("x", 2, "xx")),
        ("operator:add", (1, "x"), Outcome("error", "TypeError"), (1, 2, 3)),
        ("builtins:complex", (1, 2), Outcome("error", "TypeError"), None),
        ("builtins:str", ("x" * MAX_MESSAGE,), Outcome("error", "TooLarge"), ("x", "x")),
    ],
)
def test_whatever_a_call_does_it_has_an_outcome_and_the_next_one_a_worker(
    function, bad, expected, good
):
    with Workers(function, 1, limits=SHORT) as workers:
        for _ in range(2):
            assert workers.submit(*bad).result() == expected
            if good is not None:
                *arguments, result = good
                assert workers.submit(*arguments).result() == Outcome("done", result)
        assert workers.counts[expected.status] == 2
        assert workers.counts.total() == (2 if good is None else 4)


def test_time_in_which_a_call_has_no_processor_is_not_its_own():
    """A verdict does not depend on what else the machine does."""
    with Workers("time:sleep", 1, limits=Limits(timeout=0.2, wall=30.0)) as workers:
        assert workers.submit(0.5).result() == Outcome("done")
    with Workers(CALLS + "spin", 1, limits=Limits(timeout=0.2, wall=30.0)) as workers:
        assert workers.submit(30).result() == Outcome("timeout", "inner")


def test_bad_calls_do_not_touch_the_good_ones_beside_them():
    seconds = [0 if n % 4 else 30 for n in range(12)]
    with Workers("time:sleep", 2, limits=SHORT) as workers:
        found = workers.map([(n,) for n in seconds])
    assert [x.status for x in found] == ["done" if n == 0 else "timeout" for n in seconds]


def test_a_worker_imports_next_to_nothing():
    with Workers(CALLS + "heavy_modules", 1) as workers:
        assert workers.submit().result() == Outcome("done", [])


def test_what_is_called_has_no_terminal_no_input_and_writes_no_file(tmp_path):
    with Workers(CALLS + "write_and_read", 1) as workers:
        found = workers.submit(str(tmp_path / "written")).result()
    assert found == Outcome("done", ["", "OSError"])
    assert (tmp_path / "written").read_text(encoding="utf-8") == ""


def test_limits_are_set_in_the_worker():
    with Workers(CALLS + "limits", 1, limits=Limits(memory=700 << 20)) as workers:
        assert workers.submit().result().value == [700 << 20, 0]


def test_a_worker_that_died_while_it_was_idle_costs_no_call():
    with Workers("os:getpid", 1) as workers:
        pid = workers.submit().result().value
        os.kill(pid, signal.SIGKILL)
        until(lambda: "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text())
        again = workers.submit().result()
        assert again.status == "done" and again.value != pid
        assert not alive(pid)


def test_no_process_and_no_zombie_is_left():
    with Workers("os:getpid", 2, limits=SHORT) as workers:
        pids = {x.value for x in workers.map([()] * 50)}
        assert all(map(alive, pids))
    assert not any(map(alive, pids))
    with Workers("time:sleep", 2, limits=SHORT) as workers:
        workers.map([(30,)] * 4)
    children = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()
    states = [Path(f"/proc/{child}/stat").read_text().split()[2] for child in children]
    assert "Z" not in states


@pytest.mark.parametrize("function", ["no_such_module:f", "math:no_such_function", "os:"])
def test_a_function_that_does_not_exist_raises_and_is_no_outcome(function):
    with Workers(function, 1) as workers:
        with pytest.raises(WorkerStartError, match=f"no worker for {function}: "):
            workers.submit().result()
        assert not workers.counts


def test_submitting_waits_where_the_queue_is_full():
    submitted = []
    with Workers("time:sleep", 1, limits=SHORT, waiting=2) as workers:

        def submit() -> None:
            for _ in range(6):
                submitted.append(workers.submit(0.2))

        thread = threading.Thread(target=submit)
        thread.start()
        until(lambda: len(submitted) >= 3)
        assert workers._queue.qsize() <= 2
        thread.join()
        assert [future.result().status for future in submitted] == ["done"] * 6


def test_closing_cancels_what_waits_and_refuses_more():
    workers = Workers("time:sleep", 1, limits=SHORT)
    futures = [workers.submit(0.25) for _ in range(4)]
    until(futures[0].running)
    workers.close()
    workers.close()
    assert futures[0].result() == Outcome("done")
    assert all(future.cancelled() for future in futures[1:])
    with pytest.raises(RuntimeError, match="closed"):
        workers.submit(0)


def test_workers_end_where_the_parent_is_killed():
    code = (
        "from deltal_jax.tasks.workers import Workers; import os, time\n"
        "workers = Workers('os:getpid', 1)\n"
        "print(workers.submit().result().value, flush=True)\n"
        "time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.kill()
    until(lambda: not alive(pid) or "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text())


def test_an_interpreter_ends_without_closing_them():
    code = (
        "from deltal_jax.tasks.workers import Workers\n"
        "workers = Workers('os:getpid', 2)\n"
        "print(workers.submit().result().status)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert (ended.stdout, ended.stderr) == ("done\n", "")


def test_sets_have_one_order_in_every_worker():
    """Of strings it is another in every Python, and a verdict may go by it."""
    words = [chr(ord("a") + n) * 3 for n in range(20)]
    orders = []
    for _ in range(2):
        with Workers("tests.worker_calls:set_order", 1) as workers:
            orders.append(workers.map([words])[0].value)
    assert orders[0] == orders[1] and sorted(orders[0]) == words
