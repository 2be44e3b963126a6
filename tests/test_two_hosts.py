"""`deltal train` on two hosts, each a parent and its child: one is lost, one has bad data, one is
stopped; in the end the run is as if nothing had been."""

import os
import re
import subprocess
import sys

import pytest

from deltal_jax.guard.failpoints import VARIABLE
from deltal_jax.guard.supervise import _newest
from tests.processes import ROOT, among, reserved_port
from tests.runs import TINY, assert_same, copied

STEPS = 5
#: What a process does beside is in its environment.
REWARD = """
import os, signal, time
if os.environ.get("DO") == "refuse":
    raise OSError("nothing of the data is here")
def reward(prompts, responses, answers):
    if os.environ.pop("DO", "") == "stop":
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(1)  # until it is heard
    return [sum(map(ord, response)) % 5 / 4 for response in responses]
"""


@pytest.fixture(scope="module")
def port():
    with reserved_port() as port:
        yield port


def train(port, folder, *items, second=None):
    """Both commands, the second one with more in its environment: their exit codes, and what each
    said on standard error."""
    hosts = []
    for number in range(2):
        environment = os.environ | among(port, 2, number) | ((second or {}) if number else {})
        environment["XLA_FLAGS"] += " --xla_force_host_platform_device_count=1"
        command = [sys.executable, "-m", "deltal_jax.cli.main", "train", *items]
        with (folder / f"{number}.stderr").open("w") as errors:
            hosts.append(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=errors))
    try:
        codes = [host.wait(timeout=120) for host in hosts]
    finally:
        for host in hosts:
            host.kill()  # which takes its child along
    return codes, [(folder / f"{number}.stderr").read_text() for number in range(2)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, port):
    """A run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("hosts")
    (folder / "rewards.py").write_text(REWARD)
    options = TINY | {
        "rl.steps": STEPS,
        "rl.updates_per_rollout": 2,
        "task.rewards": [f"{folder / 'rewards.py'}:reward"],
        "evaluate.every": 0,
        "run.dir": str(folder / "whole"),
    }
    items = [f"{name}={value}".replace("'", '"') for name, value in options.items()]
    codes, said = train(port, folder, "countdown-tiny", *items)
    assert codes == [0, 0], said
    return folder / "whole"


def test_two_hosts_of_which_one_is_lost_refuses_or_is_stopped_end_as_two_that_are_not(whole, port):
    run = copied(whole, whole.with_name("run"), TINY["sft.steps"] + 1)
    resume = f"deltal train run.dir={run} --resume"
    again = f"run.dir={run}", "--resume"

    # In the middle of the second step from there, its checkpoint is the last.
    codes, said = train(port, whole.parent, *again, second={VARIABLE: "update:3"})
    assert codes == [1, 1]
    kept = _newest(str(run / "checkpoints"), resume)
    assert re.match("newest complete checkpoint: [34]; go on with: ", kept)
    for number in range(2):
        print(said[number])
    assert said[1].splitlines()[-1] == f"deltal: process 1 was ended by SIGKILL; {kept}"
    found = said[0].splitlines()
    assert found[-1] == f"deltal: process 0 failed with exit code 1; {kept}"
    assert found[-2].startswith("deltal: process 0 lost another one and ends: INTERNAL: ")
    assert "Traceback" not in said[0]

    codes, said = train(port, whole.parent, *again, second={"DO": "refuse"})
    assert codes == [2, 2]
    for number in range(2):
        print(said[number])

    codes, said = train(port, whole.parent, *again, second={"DO": "stop"})
    for number in range(2):
        print(said[number])
    assert codes == [0, 0]

    codes, said = train(port, whole.parent, *again)
    assert codes == [0, 0], said
    assert_same(run, whole)
