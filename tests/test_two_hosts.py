"""`deltal train` on two hosts, each a parent and its child: one is lost, one has bad data, one is
stopped; in the end the run is as if nothing had been."""

import os
import re
import subprocess
import sys

import pytest

from deltal_jax.checkpoints.reader import SavedSteps
from deltal_jax.guard.failpoints import VARIABLE
from deltal_jax.training.run_folder import CHECKPOINTS
from tests.processes import ROOT, among, reserved_port
from tests.runs import TINY, assert_same, copied

STEPS = 5
REFUSED = "nothing of the data is here"
#: What a process does beside is in its environment.
REWARD = f"""
import os, signal, time
if os.environ.get("DO") == "refuse":
    raise OSError("{REFUSED}")
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

    # Killed in the middle of the second step from there.
    codes, said = train(port, whole.parent, *again, second={VARIABLE: "update:3"})
    assert codes == [1, 1]
    kept = f"newest complete checkpoint: {SavedSteps(run / CHECKPOINTS).newest()}; go on with: "
    kept += resume
    assert said[1].splitlines() == [f"deltal: process 1 was ended by SIGKILL; {kept}"]
    found = said[0].splitlines()
    assert found[-1] == f"deltal: process 0 failed with exit code 1; {kept}"
    assert found[-2].startswith("deltal: process 0 lost another one and ends: INTERNAL: ")
    assert "Traceback" not in said[0]

    codes, said = train(port, whole.parent, *again, second={"DO": "refuse"})
    assert codes == [2, 2]
    line = f"deltal: task.rewards: {whole.parent / 'rewards.py'} fails: OSError: {REFUSED}"
    assert [text.splitlines() for text in said] == [[f"{line} (in process 1)"], [line]]

    codes, said = train(port, whole.parent, *again, second={"DO": "stop"})
    assert codes == [0, 0]
    newest = SavedSteps(run / CHECKPOINTS).newest()
    assert newest is not None and newest < STEPS + TINY["sft.steps"] and said[1] == ""
    kept = f"saved after RL step {newest - TINY['sft.steps']} (checkpoint {newest}); go on with: "
    assert re.fullmatch("stopped by SIGTERM in .*", said[0].splitlines()[-1])
    assert said[0].splitlines()[-1].endswith(kept + resume)

    codes, said = train(port, whole.parent, *again)
    assert codes == [0, 0], said
    assert_same(run, whole)
