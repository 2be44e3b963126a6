"""The watchdog names what does not move, and only that."""

import subprocess
import sys
import threading
import time

import pytest

from deltal_jax.guard import pulse, watchdog


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """Complaints after 50 seconds, as they are said; and a way to pass a hundred of them."""
    monkeypatch.setattr(watchdog, "LOOK", 0.01)
    lines = []
    options = {"stop": False, "say": lines.append, "kept": lambda: ("saved", True)}

    def watching(**others):
        return watchdog.watching(tmp_path, 50.0, **options, **others)

    return watching, lines


def age(name):
    """The phase last moved a hundred seconds before it did."""
    (found,) = (found for found in pulse.open_phases() if found.name == name)
    found.moved -= 100
    return found


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def test_the_silent_phase_is_named_beside_another_and_once(watched, tmp_path):
    watching, lines = watched
    begun, over = threading.Event(), threading.Event()

    def work():
        with pulse.phase("rollout", "RL step 3"):
            begun.set()
            over.wait(60)

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait(60)
    with watching(), pulse.phase("update", "RL step 2"):
        age("update")
        wait_for(lambda: lines)
        pulse.pulse()  # it moves, and hangs again
        age("update")
        wait_for(lambda: len(lines) == 2)
        age("rollout")
        wait_for(lambda: len(lines) == 3)
    over.set()
    thread.join()
    first, again, other = lines
    assert first.startswith("watchdog: nothing moved in update of RL step 2 for 100 s; rollout of ")
    assert "; rollout of RL step 3 moved 0 s ago; stacks of all threads: " in first
    assert again.startswith("watchdog: nothing moved in update of RL step 2 for 100 s; rollout of ")
    assert other.startswith("watchdog: nothing moved in rollout of RL step 3 for 10")
    stacks = (tmp_path / "stalls.txt").read_text()
    assert stacks.count("in work") == stacks.count("in wait_for") == 3


@pytest.mark.parametrize(("name", "moves"), [("rollout", True), ("update", False)])
def test_what_other_threads_do_moves_a_rollout_and_no_update(name, moves):
    with pulse.phase(name):
        before = age(name).moved
        thread = threading.Thread(target=pulse.pulse)
        thread.start()
        thread.join()
        assert (pulse.open_phases()[0].moved > before) == moves


def test_inside_another_phase_it_is_the_inner_one_and_then_the_outer_moved():
    with pulse.phase("rollout", "RL step 7"):
        before = age("rollout").moved
        with pulse.phase("grading"):
            assert pulse.here() == "in grading of RL step 7"
        assert pulse.here() == "in rollout of RL step 7" and pulse.open_phases()[0].moved > before
    assert pulse.here() == "between two steps"


def test_a_save_moves_while_bytes_are_written(watched):
    watching, lines = watched
    sizes = iter(range(10**9))
    with watching(written=lambda: next(sizes)), pulse.phase("save"):
        found = age("save")
        before = found.moved
        wait_for(lambda: found.moved > before)
    assert not lines
    with watching(written=lambda: 7), pulse.phase("save"):
        found = age("save")
        before = found.moved
        wait_for(lambda: found.moved > before)  # the first look
        age("save")
        wait_for(lambda: lines)


HANGS = """
import sys, threading
from pathlib import Path
from deltal_jax.guard import pulse, watchdog
kept = lambda: ("saved after RL step 4 (checkpoint 9); go on with: …", True)
with watchdog.watching(Path(sys.argv[1]), 0.2, stop=True, say=print, kept=kept):
    with pulse.phase("grading", "RL step 5"):
        threading.Event().wait()
"""


def test_with_stop_the_process_ends_with_the_line_that_says_how_to_go_on(tmp_path):
    command = [sys.executable, "-c", HANGS, str(tmp_path)]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith("deltal: watchdog: nothing moved in grading of RL step 5 for 0 s")
    assert line.endswith("saved after RL step 4 (checkpoint 9); go on with: …")
    assert "in wait" in (tmp_path / "stalls.txt").read_text()
