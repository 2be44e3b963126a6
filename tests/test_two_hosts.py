"""`deltal train` on two hosts, each a parent and its child: one is lost, refuses its data or is
stopped; in the end the run is as if nothing had been."""

import json
import os
import re
import subprocess
import sys

import pytest

from deltal_jax.guard.failpoints import VARIABLE
from deltal_jax.guard.signals import STOPPED_EXIT
from tests.processes import ROOT, among, reserved_port
from tests.runs import TINY, assert_same, copied

REFUSED = "nothing of the data is here"
#: `mixed_reward`; what a host does beside is in its environment.
REWARD = f"""
import os, signal, time
from deltal_jax.guard import signals
if os.environ.get("DO") == "refuse":
    raise OSError("{REFUSED}")
def reward(prompts, responses, answers):
    if os.environ.pop("DO", "") == "stop":
        os.kill(os.getppid(), signal.SIGTERM)
        while signals._listening[0].asked_by is None:
            time.sleep(0.01)
    return [sum(map(ord, response)) % 5 / 4 for response in responses]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hosts")


@pytest.fixture(scope="module")
def port():
    with reserved_port() as port:
        yield port


def train_on_hosts(port, folder, *items, second=None):
    """`deltal train` on two hosts, the second one with more in its environment: their exit codes,
    and what each said on standard error."""
    hosts = []
    for number in range(2):
        environment = os.environ | among(port, 2, number) | ((second or {}) if number else {})
        environment["XLA_FLAGS"] += " --xla_force_host_platform_device_count=1"
        environment[STOPPED_EXIT] = "75"
        command = [sys.executable, "-m", "deltal_jax.cli.main", "train", *items]
        with (
            (folder / f"{number}.stdout").open("w") as out,
            (folder / f"{number}.stderr").open("w") as errors,
        ):
            options = {"cwd": ROOT, "env": environment, "stdout": out, "stderr": errors}
            hosts.append(subprocess.Popen(command, **options))
    try:
        codes = [host.wait(timeout=300) for host in hosts]
    finally:
        for host in hosts:
            host.kill()  # which takes its child along
    return codes, [(folder / f"{number}.stderr").read_text() for number in range(2)]


@pytest.fixture(scope="module")
def hosts(folder, port):
    """A run on two hosts that nobody disturbs."""
    (folder / "rewards.py").write_text(REWARD)
    options = TINY | {
        "sft.steps": 0,
        "rl.steps": 3,
        "rl.updates_per_rollout": 2,
        "evaluate.every": 0,
        "task.rewards": [f"{folder / 'rewards.py'}:reward"],
        "run.dir": str(folder / "hosts"),
    }
    items = [f"{name}={json.dumps(value)}" for name, value in options.items()]
    codes, said = train_on_hosts(port, folder, "countdown-tiny", *items, "--json")
    assert codes == [0, 0], said
    # One object, and nothing else: neither of the second host, nor what Gloo says.
    printed = [(folder / f"{number}.stdout").read_text() for number in range(2)]
    assert json.loads(printed[0])["status"] == "done" and printed[1] == ""
    return folder / "hosts"


@pytest.mark.slow
def test_hosts_of_which_one_is_lost_refuses_or_is_stopped_go_on_bit_for_bit(hosts, folder, port):
    run = copied(hosts, folder / "disturbed", 1)
    resume = f"deltal train run.dir={run} --resume"
    again = f"run.dir={run}", "--resume"

    # Killed in the middle of the second step.
    codes, said = train_on_hosts(port, folder, *again, second={VARIABLE: "update:1"})
    kept = f"newest complete checkpoint: 1; go on with: {resume}"
    assert codes == [1, 1]
    assert said[1].splitlines() == [f"deltal: process 1 was ended by SIGKILL; {kept}"]
    (line,) = [line for line in said[0].splitlines() if line.startswith("deltal: ")]
    assert line.startswith("deltal: process 0 lost another one and ended: INTERNAL: ")
    assert line.endswith(f"; {kept}")
    assert "Traceback" not in said[0]

    codes, said = train_on_hosts(port, folder, *again, second={"DO": "refuse"})
    line = f"deltal: task.rewards: {folder / 'rewards.py'} fails: OSError: {REFUSED}"
    assert codes == [2, 2]
    assert [text.splitlines() for text in said] == [[f"{line} (in process 1)"], [line]]

    codes, said = train_on_hosts(port, folder, *again, second={"DO": "stop"})
    kept = f"saved after RL step 2 (checkpoint 2); go on with: {resume}"
    assert codes == [75, 75]
    assert re.fullmatch(
        "stopped by SIGTERM (in|between) .*; go on with: .*", said[0].splitlines()[-1]
    )
    assert said[0].splitlines()[-1].endswith(f": {kept}") and said[1] == ""

    codes, said = train_on_hosts(port, folder, *again)
    assert codes == [0, 0], said
    assert_same(run, hosts)
