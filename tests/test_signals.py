"""Signals in every phase of a run: it says where it stopped, and goes on as if nothing had been."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from deltal_jax import train
from deltal_jax.checkpoints.reader import SavedSteps
from deltal_jax.cli.main import main
from deltal_jax.guard import pulse, signals
from deltal_jax.metrics import load_metrics
from deltal_jax.training.run_folder import CHECKPOINTS
from deltal_jax.training.trained import load_trained

#: Two layers less than any experiment; one shape of rows.
OPTIONS = {
    "task.countdown.numbers": 2,
    "task.countdown.max_number": 5,
    "task.countdown.max_value": 25,
    "model.layers": 1,
    "model.d_model": 16,
    "model.head_dim": 8,
    "model.d_ff": 16,
    "length_buckets": [32],
    "rollout.max_prompt_length": 7,
    "rollout.max_response_length": 25,
    "rollout.slots": 8,
    "sft.steps": 5,
    "sft.log_every": 3,
    "sft.tokens_per_batch": 128,
    "rl.steps": 4,
    "rl.prompts_per_step": 2,
    "rl.samples_per_prompt": 4,
    "rl.tokens_per_microbatch": 128,
    "evaluate.every": 2,
    "evaluate.problems": 8,
    "checkpoint.every": 3,
    "run.report": False,
}
#: Never ends in a run that has to stop, and makes something else of it when it is cut off.
REWARD = """
import time
from deltal_jax.guard import signals

def length(prompts, responses, answers):
    if any(stop.asked_by for stop in signals._listening):
        try:
            time.sleep(60)
        except Exception:
            return [None] * len(responses)
    return [len(response) / 10 for response in responses]
"""
CLOCKS = ("time/", "throughput/", "overlap/")


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    file = tmp_path_factory.mktemp("rewards") / "rewards.py"
    file.write_text(REWARD)
    return OPTIONS | {"task.rewards": [f"{file}:length"]}


@pytest.fixture
def strike(monkeypatch):
    """Has SIGTERM come as soon as a phase begins, and the process hear of it; several signals where
    the phase is named several times."""

    def arm(*phases):
        left, begin = list(phases), pulse._begin

        def hook(new):
            begin(new)
            while left and str(new) == left[0]:
                stop = signals._listening[0]
                heard = stop.asked_by is None and stop.serving
                left.pop(0)
                os.kill(os.getpid(), signal.SIGTERM)
                while heard and stop.asked_by is None:
                    time.sleep(0.001)

        monkeypatch.setattr(pulse, "_begin", hook)
        return left

    return arm


def compare(found, whole):
    """Metrics but for clocks, the final parameters, and the responses of every evaluation."""
    lines = [
        [{k: v for k, v in x.items() if not k.startswith(CLOCKS)} for x in load_metrics(path)]
        for path in (found / "metrics.jsonl", whole / "metrics.jsonl")
    ]
    assert lines[0] == lines[1]
    pairs = (load_trained(path, {}).params for path in (found, whole))
    jax.tree.map(np.testing.assert_array_equal, *pairs)
    for path in (whole / "samples").glob("*.jsonl"):
        assert (found / "samples" / path.name).read_bytes() == path.read_bytes()


#: Where a signal comes, the grace period, and what is saved then.
STRIKES = [
    ("update of warm-up step 2", 30, "warm-up step 2 (checkpoint 2)"),
    ("evaluation of RL step 0", 0, "RL step 0 (checkpoint 5)"),
    ("rollout of RL step 2", 0, "RL step 1 (checkpoint 6)"),
    ("grading of RL step 3", 1, "RL step 2 (checkpoint 7)"),
    ("update of RL step 4", 0, "RL step 4 (checkpoint 9)"),
    ("save of RL step 6", 30, "RL step 6 (checkpoint 11)"),
    # Here a second one comes while a checkpoint is written.
    ("evaluation of RL step 8", 0, "RL step 8 (checkpoint 13)"),
]


def test_a_run_stopped_in_every_phase_ends_as_one_that_nobody_stopped(
    options, strike, tmp_path, capfd, monkeypatch
):
    whole, found = tmp_path / "whole", tmp_path / "found"
    options = options | {"rl.steps": 8}
    train("countdown-tiny", options | {"run.dir": str(whole)}, quiet=True)
    resume = f"deltal train run.dir={found} --resume"
    strike("start-up")
    with pytest.raises(signals.Stopped) as stopped:
        train("countdown-tiny", options | {"run.dir": str(found)})
    assert stopped.value.code == 128 + signal.SIGTERM
    assert str(stopped.value) == (
        "SIGTERM in start-up: ended at once; nothing was saved yet; start again with: " + resume
    )
    for number, (where, grace, saved) in enumerate(STRIKES):
        if number == 6:
            twice = strike(*["save of RL step 8"] * 2)
            monkeypatch.setattr(signals, "APART", 0.0)
            with pytest.raises(signals.Stopped) as stopped:
                train(None, {"run.dir": str(found)}, resume=True)
            monkeypatch.setattr(signals, "APART", 1.0)
            assert stopped.value.code == 128 + signal.SIGTERM and not twice
            kept = f"saved after RL step 6 (checkpoint 11); go on with: {resume}"
            assert str(stopped.value) == f"SIGTERM in save of RL step 8: ended at once; {kept}"
        capfd.readouterr()
        left = strike(where)
        command = ["train", f"run.dir={found}", "--resume", f"run.grace_seconds={grace}"]
        code = (0, 75)[number % 2]  # what launchers ask for
        monkeypatch.setenv(signals.STOPPED_EXIT, str(code))
        assert main(command) == code and not left
        out, err = capfd.readouterr()
        last = err.strip().splitlines()[-1]
        assert last == f"stopped by SIGTERM in {where}: saved after {saved}; go on with: {resume}"
        assert f"SIGTERM in {where}: saving after this step" in err
        assert ("last evaluation (step" in out) == (
            "warm-up" not in where and where != STRIKES[1][0]
        )
    for code in ("75", ""):
        monkeypatch.setenv(signals.STOPPED_EXIT, code)
        strike("start-up")  # nothing new to save: nothing is lost
        with pytest.raises(signals.Stopped, match=f"go on with: {resume}") as stopped:
            train(None, {"run.dir": str(found)}, resume=True)
        assert stopped.value.code == int(code or 0)
    left = strike("report")
    ended = train(None, {"run.dir": str(found), "run.report": True}, resume=True)
    assert ended.status == "done" and ended.report.is_file() and not left
    compare(found, whole)
    # The evaluation that the resumed run did is among the figures that the best are chosen by.
    assert SavedSteps(found / CHECKPOINTS).manifest(13).metrics
    changes = json.loads((found / "summary.json").read_text())["changes"]
    grace = [x for x in changes if x["field"] == "run.grace_seconds"]
    assert [(x["step"], x["before"], x["after"]) for x in grace] == [
        (2, 30, 0),
        (1, 0, 1),
        (2, 1, 0),
        (4, 0, 30),
        (6, 30, 0),
    ]


def test_what_was_sampled_ahead_is_sampled_again_by_the_same_parameters(options, strike, tmp_path):
    whole, found = tmp_path / "whole", tmp_path / "found"
    options = options | {"rollout.ahead": 1, "sft.steps": 0, "evaluate.every": 0}
    train("countdown-tiny", options | {"run.dir": str(whole)}, quiet=True)
    left = strike("rollout of RL step 3")  # while the update of step 2 runs
    stopped = train(
        "countdown-tiny", options | {"run.dir": str(found), "run.grace_seconds": 0}, quiet=True
    )
    assert (stopped.step, stopped.status, left) == (2, "interrupted", [])
    resumed = train(None, {"run.dir": str(found)}, resume=True, quiet=True)
    assert (resumed.step, resumed.status) == (4, "done")
    compare(found, whole)


@pytest.mark.parametrize("code", ["gone", "-1", "256"])
def test_what_is_no_exit_code_is_refused_before_anything_runs(code, monkeypatch, capsys):
    monkeypatch.setenv(signals.STOPPED_EXIT, code)
    assert main(["train", "countdown-tiny"]) == 2
    said = f"deltal: {signals.STOPPED_EXIT}: {code!r} is no exit code; set it to 75, or unset it\n"
    assert capsys.readouterr().err == said


#: The main thread never gets back to Python's own handling of signals.
BUSY = """
import ctypes
from deltal_jax.guard import signals
with signals.listening(at_once=True) as stop:
    stop.serving, stop.grace = {serving}, None
    print("ready", flush=True)
    while True:
        ctypes.CDLL(None).sleep(60)
"""


@pytest.mark.parametrize(
    ("serving", "sent", "said"),
    [
        (False, 1, "deltal: SIGINT between two steps: ended at once; nothing was saved yet"),
        (True, 2, "deltal: SIGINT between two steps: ended at once; nothing was saved yet"),
    ],
    ids=["before anything", "the second"],
)
def test_a_command_ends_at_once_whatever_its_main_thread_does(serving, sent, said):
    program = BUSY.format(serving=serving)
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    for number in range(sent):
        time.sleep(1.1 * signals.APART * bool(number))
        process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGINT
    lines = errors.splitlines()
    assert len(lines) == sent and lines[-1].startswith(said)
