"""`deltal train` on four hosts, each a parent and its child: as one process, though one is slow;
and where one is lost, from the newest checkpoint on as if nothing had been."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from deltal_jax import train
from tests.processes import HEARTBEAT, ROOT, among, reserved_port
from tests.runs import ROLLOUTS, TINY, assert_same, copied, timeless

COUNT = 4
#: `mixed_reward`; what a host does beside is in its environment. Each also notes what it weighs.
REWARD = f"""
import json, os, pathlib, signal, time
from deltal_jax.training import policy

here, number = pathlib.Path(__file__).parent, os.environ.get("JAX_PROCESS_ID", "alone")
weigh = policy.weigh

def noted(config, rollout, *rest):
    found = weigh(config, rollout, *rest)
    with (here / f"weights.{{number}}").open("a") as file:
        lengths = rollout.response_lengths.tolist()
        print(json.dumps([lengths, found.weights.tolist(), found.advantages.tolist()]), file=file)
    return found

if weigh.__name__ == "weigh":  # this file is loaded more than once
    policy.weigh = noted

def reward(prompts, responses, answers):
    does, seconds = os.environ.pop("DO", ""), {HEARTBEAT} + 5
    if does == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if does:
        time.sleep(seconds if does == "dawdle" else 10 * seconds)
    return [sum(map(ord, response)) % 5 / 4 for response in responses]
"""
OPTIONS = TINY | {
    "model.compute_dtype": "float32",
    "rollout.slots": 8,
    "sft.steps": 0,
    "rl.steps": 3,
    "rl.updates_per_rollout": 2,
    "objective.old_logprobs": "recompute",
    "rl.optimizer.warmup_steps": 0,
    "evaluate.every": 0,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("hosts")
    (found / "rewards.py").write_text(REWARD)
    return found


def options(folder, name):
    rewards = {"task.rewards": [f"{folder / 'rewards.py'}:reward"]}
    return OPTIONS | rewards | {"run.dir": str(folder / name)}


def train_on_hosts(folder, *items, doing=None):
    """`deltal train` on four hosts, some with something to do in their first grading: their exit
    codes, and what each said on standard error."""
    hosts = []
    with reserved_port() as port:
        for number in range(COUNT):
            environment = os.environ | among(port, COUNT, number)
            environment |= {"DO": (doing or {}).get(number, "")}
            environment["XLA_FLAGS"] += " --xla_force_host_platform_device_count=1"
            command = [sys.executable, "-m", "deltal_jax.cli.main", "train", *items]
            with (folder / f"{number}.stderr").open("w") as errors:
                hosts.append(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=errors))
        try:
            codes = [host.wait(timeout=600) for host in hosts]
        finally:
            for host in hosts:
                host.kill()  # which takes its child along
    return codes, [(folder / f"{number}.stderr").read_text() for number in range(COUNT)]


def weighed(folder, number):
    lines = (folder / f"weights.{number}").read_text().splitlines()
    return [np.asarray(json.loads(line)) for line in lines]


@pytest.fixture(scope="module")
def hosts(folder):
    """A run of which one host is slow to grade: it sleeps for longer than a dead one is missed."""
    items = [f"{name}={json.dumps(value)}" for name, value in options(folder, "hosts").items()]
    codes, said = train_on_hosts(folder, "countdown-tiny", *items, doing={2: "dawdle"})
    assert codes == [0] * COUNT, said
    return folder / "hosts"


@pytest.mark.slow
def test_four_hosts_of_which_one_is_slow_are_one_process(hosts, folder, monkeypatch):
    from deltal_jax.training import policy

    monkeypatch.setattr(policy, "weigh", policy.weigh)  # the rewards put theirs in its place
    train("countdown-tiny", options(folder, "one"), quiet=True)
    for found, wanted in zip(timeless(hosts), timeless(folder / "one"), strict=True):
        assert (found["phase"], found["step"]) == (wanted["phase"], wanted["step"])
        if found["phase"] == "rl":
            assert found["optim/grad_norm"] == pytest.approx(wanted["optim/grad_norm"], rel=1e-5)
            # Advantages of a group sum to 0, and so almost does the loss: its parts are about 0.01.
            assert found["policy/loss"] == pytest.approx(wanted["policy/loss"], rel=1e-5, abs=1e-7)
            assert wanted["optim/grad_norm"] and wanted["policy/loss"]
    # What was sampled, apart: all of the first step, which has the same parameters.
    records = [
        json.loads((run / ROLLOUTS / "step-000001.json").read_text())
        for run in (hosts, folder / "one")
    ]
    responses, wanted = ([x["response"] for x in record["samples"]] for record in records)
    assert responses == wanted and len(set(responses)) > 8
    # Lengths of the whole batch and their weights: once a step, and the same on every host.
    alone = weighed(folder, "alone")
    assert len(alone) == OPTIONS["rl.steps"]
    for number in range(COUNT):
        shared = weighed(folder, number)[: len(alone)]
        np.testing.assert_array_equal(shared, weighed(folder, 0)[: len(alone)])
        np.testing.assert_array_equal([x[0] for x in shared], [x[0] for x in alone])
        np.testing.assert_allclose(shared, alone, rtol=1e-6)


@pytest.mark.slow
def test_four_hosts_of_which_one_dies_while_the_others_are_busy_go_on_from_their_checkpoint(
    hosts, folder
):
    """Nobody waits for the dead one, so that only its heartbeat is missed."""
    run = copied(hosts, folder / "disturbed", 1)
    again = f"run.dir={run}", "--resume"
    doing = {0: "sleep", 1: "sleep", 2: "sleep", 3: "die"}
    codes, said = train_on_hosts(folder, *again, doing=doing)
    assert codes == [1] * COUNT
    kept = f"newest complete checkpoint: 1; go on with: deltal train run.dir={run} --resume"
    for number, text in enumerate(said):
        (line,) = [line for line in text.splitlines() if line.startswith("deltal: ")]
        why = ", as jax ends a process whose peer was lost"
        ended = "SIGKILL" if number == 3 else f"SIGABRT{why}"
        assert line == f"deltal: process {number} was ended by {ended}; {kept}"
    codes, said = train_on_hosts(folder, *again)
    assert codes == [0] * COUNT, said
    assert_same(run, hosts)
