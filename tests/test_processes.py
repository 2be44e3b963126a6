"""Three hosts, each a parent and its child, one of which is lost: what the others say."""

import os
import subprocess
import sys

import pytest

from deltal_jax.guard import supervise
from tests.processes import ROOT, among, reserved_port

#: Seconds after which a process is missed; and within which its end has to be said then.
HEARTBEAT, PATIENCE = 5, 60
KEPT = "newest complete checkpoint: 7; go on with: deltal train run.dir=x --resume"


def hosts(folder, where, lost, count=3):
    """Their exit codes, and what each said on standard output and standard error."""
    (folder / "7").mkdir()
    (folder / "7" / supervise.MANIFEST).touch()
    command = [sys.executable, "-m", "tests.lost_peer", str(folder), where, str(lost)]
    with reserved_port() as port:
        found = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | among(port, count, i) | {"DELTAL_HEARTBEAT": str(HEARTBEAT)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for i in range(count)
        ]
        try:
            said = [host.communicate(timeout=PATIENCE + HEARTBEAT) for host in found]
        finally:
            for host in found:
                host.kill()
    return [host.returncode for host in found], said


@pytest.mark.parametrize(
    ("where", "lost"),
    [
        ("inside", 1),
        pytest.param("outside", 1, marks=pytest.mark.slow),
        pytest.param("inside", 0, marks=pytest.mark.slow),  # that the others meet at
        pytest.param("outside", 0, marks=pytest.mark.slow),
    ],
)
def test_every_host_that_is_left_says_in_one_line_that_one_is_lost_and_what_is_kept(
    where, lost, tmp_path
):
    codes, said = hosts(tmp_path, where, lost)
    assert codes == [1, 1, 1]
    for index, (out, errors) in enumerate(said):
        assert (
            "the others: process 2 has others than process 0; the processes of a run need the same "
            "software, and accelerators of one kind"
        ) in out.splitlines()  # among Gloo's own
        (line,) = [line for line in errors.splitlines() if line.startswith("deltal: ")]
        who, what = f"deltal: process {index} ", f"; {KEPT}"
        assert line.startswith(who) and line.endswith(what), line
        reason = line.removeprefix(who).removesuffix(what)
        if index == lost:
            assert reason == "was ended by SIGKILL"
        else:
            assert reason.startswith("lost another one and ended: ") or reason == (
                "was ended by SIGABRT, as jax ends a process whose peer was lost"
            )
        assert "Traceback" not in errors
