"""Whole runs on meshes and on two hosts: those of one device, and resumed bit for bit, though a
host is lost, refuses its data or is stopped."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from deltal_jax import Reward, train
from deltal_jax.cli.main import main
from deltal_jax.config import ModelConfig, load_config
from deltal_jax.config.rules import SHAPE
from deltal_jax.errors import UserError
from deltal_jax.guard.dumps import DUMPS, load_dump
from deltal_jax.guard.failpoints import VARIABLE
from deltal_jax.guard.replay import replay
from deltal_jax.training.setup import init_params, make_setup, make_update
from deltal_jax.training.sft import demonstration_batches
from deltal_jax.training.trained import ONE_DEVICE, root_key
from tests import fakes, small_tokenizers
from tests.processes import ROOT, among, reserved_port
from tests.runs import TINY, assert_same, copied, mixed_reward, timeless
from tests.test_resume import rough_reward

#: What a step may have beside: a reference model, recomputed log-probabilities, mini-batches.
OPTIONS = TINY | {
    "model.compute_dtype": "float32",
    "rollout.slots": 8,
    "sft.steps": 0,
    "rl.steps": 2,
    "rl.updates_per_rollout": 2,
    "objective.old_logprobs": "recompute",
    "objective.kl_coefficient": 0.05,
    "rl.optimizer.warmup_steps": 0,
    "evaluate.every": 0,
    "guard.dump_steps": [2],
}
ALL = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
AHEAD = {"rollout.ahead": 1, "objective.importance_correction": "token_truncate"}
DATA = ONE_DEVICE | {"mesh.data": 8}

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


def run_on(folder, mesh, **options):
    """A run, or the rest of one; the responses that it was rewarded for, in their order."""
    seen = []

    def watched(prompts, responses, answers):
        seen.append(responses)
        return mixed_reward(prompts, responses, answers)

    name = None if options.get("resume") else "countdown-tiny"
    settings = mesh | {"run.dir": str(folder)} | ({} if name is None else OPTIONS)
    train(name, settings, rewards=[Reward(watched)], **({"quiet": True} | options))
    return seen


def assert_close(folder, one, lines=None):
    """Losses and gradients to rounding; in which slot what was sampled is another matter."""
    lines, want = timeless(folder)[:lines], timeless(one)[:lines]
    assert [(x["phase"], x["step"]) for x in lines] == [(x["phase"], x["step"]) for x in want]
    for line, other in zip(lines, want, strict=True):
        for name in ("policy/loss", "optim/grad_norm", "policy/kl", "length/mean"):
            if name in other:
                assert line[name] == pytest.approx(other[name], rel=1e-5, abs=1e-7), name
                assert name == "policy/kl" or other[name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("meshes")


@pytest.fixture(scope="module")
def responses(folder):
    """Of runs on one device and on all axes of a mesh; they are in folders of these names."""
    return {"one": run_on(folder / "one", {}), "all": run_on(folder / "all", ALL)}


def test_a_run_on_a_mesh_is_that_of_one_device(responses, folder):
    assert responses["all"] == responses["one"]
    assert_close(folder / "all", folder / "one")


def test_a_run_on_a_mesh_is_resumed_bit_for_bit(responses, folder):
    resumed = copied(folder / "all", folder / "resumed", 1)
    assert run_on(resumed, {}, resume=True) == responses["all"][1:]
    assert_same(resumed, folder / "all")


def test_a_run_may_go_on_on_another_mesh_and_says_so(responses, folder, capfd):
    moved = copied(folder / "all", folder / "moved", 0)
    assert run_on(moved, DATA, resume=True, quiet=False) == responses["one"]
    said = "mesh: data 8: 8 devices, before data 2 × fsdp 2 × tensor 2: 8 devices; equal to"
    assert said in capfd.readouterr().err
    assert_close(moved, folder / "one")


#: What one step leaves to the next, on a mesh beside devices that sample.
ADAPTERS = TINY | {f"model.{name}": getattr(ModelConfig(), name) for name in SHAPE}
ADAPTERS |= {
    "mesh.data": 2,
    "mesh.fsdp": 2,
    "rollout.devices": 4,
    "rollout.slots": 8,
    "rollout.dynamic_sampling": "reward",
    "rollout.oversampling": 2.0,
    "rollout.partial": True,
    "rollout.max_prompt_length": 28,
    "length_buckets": [36],
    "rl.tokens_per_microbatch": 144,
    "rl.steps": 3,
    "rl.optimizer.learning_rate": 1e-2,
    "sft.steps": 0,
    "evaluate.every": 0,
    "lora.rank": 2,
}


def test_adapters_of_a_model_in_parts_sampled_elsewhere_are_resumed_bit_for_bit(tmp_path):
    model, whole = tmp_path / "model", tmp_path / "whole"
    small_tokenizers.write_folder(model, "qwen")
    shape = {"vocab_size": 600, "num_hidden_layers": 1}
    fakes.write_checkpoint(model, fakes.CONFIGS["qwen2"] | shape)
    options = ADAPTERS | {"model.path": str(model), "run.dir": str(whole)}
    train("countdown-tiny", options, rewards=[Reward(rough_reward)], quiet=True)
    resumed = copied(whole, tmp_path / "resumed", 1)
    again = {"run.dir": str(resumed)}
    train(None, again, rewards=[Reward(rough_reward)], resume=True, quiet=True)
    assert_same(resumed, whole)
    lines = [x for x in timeless(whole) if x["phase"] == "rl"]
    assert lines[1]["rollout/stale_frac"] > 0 and all(x["optim/grad_norm"] for x in lines)


def test_a_step_is_replayed_bit_for_bit_on_its_mesh_and_nowhere_else(responses, folder, capsys):
    dump = str(folder / "all" / DUMPS / "step-000002-update-1")
    assert main(["debug", "replay", dump]) == 0
    assert "figures are bit for bit those recorded" in capsys.readouterr().out
    for mesh, said in ((ONE_DEVICE, "one device"), (DATA, "data 8: 8 devices")):
        found = load_dump(Path(dump), mesh)
        assert found.inexact == f"on {said}, and not on data 2 × fsdp 2 × tensor 2: 8 devices,"
        pairs = [pair for pair in replay(found).figures.values() if pair[0] is not None]
        was, now = np.asarray(pairs).T
        np.testing.assert_allclose(now, was, rtol=1e-4, atol=1e-6)


def test_a_warm_up_step_on_a_mesh_is_that_of_one_device():
    """Its rows, which the mesh does not divide, are filled up with empty ones."""
    found = []
    for mesh in ({}, ALL):
        options = OPTIONS | mesh | {"sft.steps": 1, "sft.tokens_per_batch": 6 * 16}
        setup = make_setup(load_config("countdown-tiny", options))
        update = make_update(setup, "sft")
        rows = update.row_multiple
        batch = next(demonstration_batches(setup.config, setup.task, setup.tokenizer, rows))
        state = update.init(init_params(setup, root_key(3)), root_key(4))
        _, metrics = update.single(state, update.place(batch))
        found.append((batch, {name: float(value) for name, value in metrics.items()}))
    (alone, want), (padded, metrics) = found
    assert len(alone.tokens) == 6 and len(padded.tokens) == 8
    np.testing.assert_array_equal(padded.tokens[:6], alone.tokens)
    assert metrics == pytest.approx(want, rel=1e-5)


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
        command = [sys.executable, "-m", "deltal_jax.cli.main", "train", *items]
        with (folder / f"{number}.stderr").open("w") as errors:
            hosts.append(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=errors))
    try:
        codes = [host.wait(timeout=300) for host in hosts]
    finally:
        for host in hosts:
            host.kill()  # which takes its child along
    return codes, [(folder / f"{number}.stderr").read_text() for number in range(2)]


@pytest.fixture(scope="module")
def hosts(folder, port):
    """A run on two hosts that nobody disturbs; two of its steps are kept for replay."""
    (folder / "rewards.py").write_text(REWARD)
    options = OPTIONS | {
        "rl.steps": 3,
        "guard.dump_steps": [1, 2],
        "task.rewards": [f"{folder / 'rewards.py'}:reward"],
        "run.dir": str(folder / "hosts"),
    }
    items = [f"{name}={json.dumps(value)}" for name, value in options.items()]
    codes, said = train_on_hosts(port, folder, "countdown-tiny", *items)
    assert codes == [0, 0], said
    return folder / "hosts"


@pytest.mark.usefixtures("responses")
def test_a_run_on_two_hosts_is_that_of_one_device(hosts, folder):
    assert_close(hosts, folder / "one", lines=3)  # an evaluation and two steps
    assert len(list((hosts / "dumps").glob("*/record.json"))) == 2


def test_hosts_of_which_one_is_lost_refuses_or_is_stopped_go_on_bit_for_bit(hosts, folder, port):
    run = copied(hosts, folder / "disturbed", 1)
    resume = f"deltal train run.dir={run} --resume"
    again = f"run.dir={run}", "--resume"

    # Killed in the middle of the second step.
    codes, said = train_on_hosts(port, folder, *again, second={VARIABLE: "update:1"})
    kept = f"newest complete checkpoint: 1; go on with: {resume}"
    assert codes == [1, 1]
    assert said[1].splitlines() == [f"deltal: process 1 was ended by SIGKILL; {kept}"]
    found = said[0].splitlines()
    assert found[-2].startswith("deltal: process 0 lost another one and ends: INTERNAL: ")
    assert found[-1] == f"deltal: process 0 failed with exit code 1; {kept}"
    assert "Traceback" not in said[0]

    codes, said = train_on_hosts(port, folder, *again, second={"DO": "refuse"})
    line = f"deltal: task.rewards: {folder / 'rewards.py'} fails: OSError: {REFUSED}"
    assert codes == [2, 2]
    assert [text.splitlines() for text in said] == [[f"{line} (in process 1)"], [line]]

    codes, said = train_on_hosts(port, folder, *again, second={"DO": "stop"})
    kept = f"saved after RL step 2 (checkpoint 2); go on with: {resume}"
    assert codes == [0, 0]
    assert re.fullmatch("stopped by SIGTERM in .*; go on with: .*", said[0].splitlines()[-1])
    assert said[0].splitlines()[-1].endswith(f": {kept}") and said[1] == ""

    codes, said = train_on_hosts(port, folder, *again)
    assert codes == [0, 0], said
    assert_same(run, hosts)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mesh.fsdp": 3}, r"mesh: .* does not multiply to the 8 devices; set one of them to -1"),
        ({"mesh.data": 0}, r"mesh\.data: a size is 1 or more, or -1 for the rest, got 0"),
        ({"mesh.data": -1, "mesh.fsdp": -1}, "mesh: only one of data, fsdp and tensor may be -1"),
        ({"mesh.fsdp": 8, "rollout.slots": 4}, r"rollout\.slots: 4 do not split over .* 8 dev"),
        ({"mesh.fsdp": 8} | AHEAD, r"rollout\.ahead: .* rollout\.devices of its own"),
        ({"mesh.fsdp": 8, "rollout.devices": 8}, r"rollout\.devices: 8 of 8 .* at most 7"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_in_one_line(options, said, tmp_path):
    options = OPTIONS | options | {"run.dir": str(tmp_path / "run")}
    with pytest.raises(UserError, match=f"^{said}") as refused:
        train("countdown-tiny", options, quiet=True)
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()
