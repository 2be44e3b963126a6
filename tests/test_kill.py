"""A run that dies at each fail-point, one after the other, ends as one that never did."""

import json
import subprocess
import sys

import pytest

from deltal_jax.guard.failpoints import POINTS
from tests.processes import ROOT


@pytest.mark.slow
def test_a_run_that_dies_at_every_fail_point_ends_as_one_that_does_not():
    """Real processes and SIGKILL; `scripts/soak kill` does it at random moments as well."""
    command = [sys.executable, "-m", "tests.soak", "kill", "--steps", "6"]
    command += ["--count", str(len(POINTS))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert found["kills"] == dict.fromkeys(POINTS, 1)
    assert found["runs"] == 1 and found["restarts"] >= len(POINTS) - 1
    assert found["damaged_steps"] == 0
