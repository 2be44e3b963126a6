"""The parent of a process among several: what it hands on, and what it says of the child's end."""

import os
import signal
import subprocess
import sys
import time

import pytest

from deltal_jax.guard import supervise
from deltal_jax.guard.signals import STOPPED_EXIT

#: A child that tells where its run is, then ends in the way that it is asked to.
CHILD = """
import os, signal, sys, time
from deltal_jax.guard import supervise
supervise.follow_parent()
supervise.tell(folder=sys.argv[1], resume="deltal train run.dir=x --resume")
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
print("ready", flush=True)
exec(sys.argv[2])
"""
PARENT = f"""
import sys
from deltal_jax.guard import supervise
code = supervise.supervise([sys.executable, "-c", {CHILD!r}, *sys.argv[1:]])
assert "jax" not in sys.modules
sys.exit(code)
"""


@pytest.fixture
def checkpoints(tmp_path):
    for name in ("3", "7", "12"):
        (tmp_path / name).mkdir()
    for name in ("3", "7"):  # the last one is not complete
        (tmp_path / name / supervise.MANIFEST).touch()
    return tmp_path


def start(folder, what):
    command = [sys.executable, "-c", PARENT, str(folder), what]
    environment = os.environ | {"JAX_PROCESS_ID": "1", STOPPED_EXIT: "75"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


KEPT = "newest complete checkpoint: 7; go on with: deltal train run.dir=x --resume\n"


@pytest.mark.parametrize(
    ("what", "code", "said"),
    [
        ("os.kill(os.getpid(), 9)", 1, f"deltal: process 1 was ended by SIGKILL; {KEPT}"),
        (
            "os.abort()",
            1,
            "deltal: process 1 was ended by SIGABRT, as jax ends a process whose peer was lost; "
            + KEPT,
        ),
        ("os._exit(1)", 1, f"deltal: process 1 failed with exit code 1; {KEPT}"),
        (
            "supervise.tell(process=3, lost='INTERNAL: Gloo'); os._exit(1)",
            1,
            f"deltal: process 3 lost another one and ended: INTERNAL: Gloo; {KEPT}",
        ),
        ("sys.exit(2)", 2, ""),
        ("sys.exit(75)", 75, ""),  # stopped and saved, by what STOPPED_EXIT asks for
        ("print('done')", 0, ""),
    ],
    ids=["killed", "aborted", "failed", "lost another", "bad input", "stopped", "done"],
)
def test_an_end_that_was_not_its_own_will_is_said_in_one_line(what, code, said, checkpoints):
    process = start(checkpoints, what)
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (code, said)
    assert out == ("ready\ndone\n" if code == 0 else "ready\n")


def test_what_a_child_has_left_behind_keeps_no_parent_waiting(checkpoints):
    """A process that holds its pipe for longer than it lives."""
    left = (
        "import subprocess\n"
        f"pipe = int(os.environ['{supervise.CHILD}'].partition(':')[0])\n"
        "print(subprocess.Popen(['sleep', '600'], pass_fds=[pipe]).pid, flush=True)\n"
        "os._exit(1)"
    )
    process = start(checkpoints, left)
    assert process.stdout.readline() == "ready\n"
    holder = int(process.stdout.readline())
    try:
        assert process.wait(timeout=60) == 1
        os.kill(holder, 0)  # it is still there
    finally:
        os.kill(holder, signal.SIGKILL)
    assert process.communicate()[1].endswith(KEPT)


def test_a_signal_reaches_the_child_whose_exit_code_is_the_parents(checkpoints):
    process = start(checkpoints, "time.sleep(60)")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[1] == "" and process.returncode == 0


def test_a_parent_that_is_killed_takes_the_child_along(checkpoints, tmp_path):
    ended = tmp_path / "ended"
    what = f"import atexit, pathlib; atexit.register(pathlib.Path({str(ended)!r}).touch)\n"
    process = start(checkpoints, what + "time.sleep(60)")
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)  # until the exit is arranged
    process.kill()
    process.communicate(timeout=60)  # the child holds the pipes, too
    assert ended.exists()


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, False),
        ({"JAX_NUM_PROCESSES": "1"}, False),
        ({"JAX_NUM_PROCESSES": "2"}, True),
        ({"SLURM_STEP_NUM_TASKS": "8"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "4", supervise.CHILD: "5:1"}, False),
        ({"TPU_WORKER_HOSTNAMES": "t-0.svc"}, False),
        ({"TPU_WORKER_HOSTNAMES": "t-0.svc,t-1.svc"}, True),
        ({"TPU_WORKER_HOSTNAMES": "t-0.svc", "MEGASCALE_NUM_SLICES": "2"}, True),
        ({supervise.ASKED: "1"}, True),
        ({supervise.ASKED: "1", supervise.CHILD: "5:1"}, False),
    ],
)
def test_only_a_process_among_several_has_a_parent(environment, wanted, monkeypatch):
    names = (*supervise.LAUNCHED, *supervise.LISTED, supervise.ASKED, supervise.CHILD)
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert supervise.wanted() == wanted
