"""The scripts that start a run on several hosts: what they start again, and what they do not.

Shells are real; `deltal`, `srun`, `ssh` and `gcloud` are small programs in their place that note
how they were called. The slow test has real processes of `deltal train` behind `gpu-ssh`.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from deltal_jax.config import load_config, parse_overrides
from deltal_jax.guard.signals import STOPPED_EXIT
from deltal_jax.guard.supervise import ASKED
from deltal_jax.training.run_folder import CONFIG
from tests.processes import HEARTBEAT, ROOT, reserved_port
from tests.runs import TINY, load_metrics

LAUNCH = ROOT / "scripts" / "launch"
SHELL = ("again", "until-done", "slurm.sbatch", "gpu-ssh", "tpu-vm")
#: The command, of this Python.
REAL = f"""#!/usr/bin/env bash
exec {sys.executable} -m deltal_jax.cli.main "$@"
"""
#: Seconds of the JobSet's grace period that are no part of the run's own.
SLACK = 30
#: Notes its arguments and variables, makes the run's folder, ends with the next of the codes.
DELTAL = f"""#!/usr/bin/env python3
import json, os, pathlib, signal, sys, time
here = pathlib.Path(__file__).parent
names = ("{ASKED}", "{STOPPED_EXIT}", "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES",
         "JAX_PROCESS_ID", "DELTAL_HEARTBEAT")
with (here / "calls").open("a") as file:
    found = {{name: os.environ[name] for name in names if name in os.environ}}
    print(json.dumps([sys.argv[1:], found]), file=file)
run = next(x for x in sys.argv if x.startswith("run.dir=")).removeprefix("run.dir=")
pathlib.Path(run).mkdir(parents=True, exist_ok=True)
(pathlib.Path(run) / "{CONFIG}").touch()
codes = (here / "codes").read_text().split()
(here / "codes").write_text(" ".join(codes[1:]))
if codes[0] == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    (here / "waiting").touch()
    time.sleep(60)
sys.exit(int(codes[0]))
"""
#: Notes its arguments; a command for another host is run on this one.
ASIDE = """#!/usr/bin/env bash
printf '%s\\n' "$(basename "$0") $*" >> "$(dirname "$0")/asides"
"""
SRUN = ASIDE + 'while [[ $1 == --* ]]; do shift; done; exec "$@"\n'
#: Nodes are all this machine, where one lock would hold the second back: so each has its folder.
APART = (
    ASIDE
    + """while [[ $1 == -o ]]; do shift 2; done
mkdir -p "$TMPDIR/$1"
exec env -i HOME="$HOME" PATH="$PATH" TMPDIR="$TMPDIR/$1" bash -c "$2"
"""
)


def repository(folder):
    """A repository without a .venv, whose `deltal` would be found before ours."""
    found = folder / "repository"
    found.mkdir()
    (found / "scripts").symlink_to(ROOT / "scripts")
    return found


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """A folder of programs, found before all others."""
    folder = tmp_path / "tools"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("DELTAL_PAUSE", "0")

    def add(codes="", **programs):
        (folder / "codes").write_text(codes)
        for name, text in programs.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        return folder

    return add


def run(name, *arguments, **environment):
    command = [str(LAUNCH / name), *map(str, arguments)]
    return subprocess.run(
        command,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def calls(folder):
    lines = (folder / "calls").read_text().splitlines()
    return [json.loads(line) for line in lines]


def until(done, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.02)


@pytest.mark.parametrize("name", SHELL)
def test_a_script_is_what_the_shell_and_its_checker_read(name):
    assert os.access(LAUNCH / name, os.X_OK)
    subprocess.run(["bash", "-n", LAUNCH / name], check=True)
    if shutil.which("shellcheck"):
        found = subprocess.run(
            ["shellcheck", LAUNCH / name], capture_output=True, text=True, check=False
        )
        assert not found.returncode, found.stdout


def test_a_run_begins_and_then_goes_on_and_its_codes_tell_them_apart(tools, tmp_path):
    folder = tools("75 0", deltal=DELTAL)
    given = tmp_path / "runs" / "x", "countdown-tiny", "rl.steps=3"
    assert [run("again", *given).returncode for _ in range(2)] == [75, 0]
    (first, variables), (second, _) = calls(folder)
    assert first == ["train", "countdown-tiny", f"run.dir={given[0]}", "rl.steps=3"]
    assert second == ["train", f"run.dir={given[0]}", "rl.steps=3", "--resume"]
    assert variables == {ASKED: "1", STOPPED_EXIT: "75"}
    assert run("again", given[0]).returncode == 2


@pytest.mark.parametrize(
    ("codes", "restarts", "ends", "begun"),
    [
        ("1 75 143 0", "9", 0, 4),  # lost a host, was stopped, was stopped before there was a step
        ("2 0", "9", 2, 1),  # bad input would be the same again
        ("1 1 1 0", "1", 1, 2),
    ],
)
def test_what_ends_is_started_again_but_for_what_is_done_or_cannot_be(
    codes, restarts, ends, begun, tools, tmp_path
):
    folder = tools(codes, deltal=DELTAL)
    done = run("until-done", tmp_path / "x", "countdown-tiny", DELTAL_RESTARTS=restarts)
    assert (done.returncode, len(calls(folder))) == (ends, begun)


def test_a_signal_reaches_the_run_and_starts_nothing_again(tools, tmp_path):
    folder = tools("wait 0", deltal=DELTAL)
    command = [LAUNCH / "until-done", tmp_path / "x", "countdown-tiny"]
    loop = subprocess.Popen(command)
    until((folder / "waiting").exists)
    second = run("until-done", tmp_path / "x", "countdown-tiny")  # while it runs
    assert second.returncode == 0 and "is started on this host already" in second.stderr
    loop.send_signal(signal.SIGTERM)
    assert loop.wait(timeout=60) == 75 and len(calls(folder)) == 1


@pytest.mark.parametrize(
    ("code", "restarts", "queued"), [(0, 0, 0), (2, 0, 0), (75, 0, 1), (1, 3, 1), (1, 50, 0)]
)
def test_slurm_queues_anew_what_was_stopped_or_failed(code, restarts, queued, tools, tmp_path):
    folder = tools(str(code), deltal=DELTAL, srun=SRUN, scontrol=ASIDE)
    variables = {"SLURM_SUBMIT_DIR": str(repository(tmp_path)), "SLURM_JOB_ID": "7"}
    variables["SLURM_RESTART_COUNT"] = str(restarts)
    assert run("slurm.sbatch", tmp_path / "x", "gsm8k-0.5b-24gb", **variables).returncode == code
    asides = (folder / "asides").read_text().splitlines()
    assert asides[1:] == ["scontrol requeue 7"] * queued
    assert "--kill-on-bad-exit=0" in asides[0]  # every host says its own line
    assert re.search(r"run\.grace_seconds=(\d+)$", asides[0])


def test_slurm_sends_its_signal_early_enough_and_leaves_jax_all_gpus_of_a_node():
    text = (LAUNCH / "slurm.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.MULTILINE))
    assert "requeue" in options and options["ntasks-per-node"] == "1"
    assert options["signal"].startswith("TERM@")  # to the steps, which have the run
    grace = int(re.search(r"GRACE=(\d+)", text)[1])
    assert grace + SLACK <= int(options["signal"].removeprefix("TERM@"))
    assert not {"gpus-per-task", "gpu-bind"} & options.keys()


def test_the_jobset_restarts_as_a_whole_but_for_bad_input():
    claim, jobset = yaml.safe_load_all((LAUNCH / "gke-jobset.yaml").read_text())
    assert (claim["kind"], jobset["kind"]) == ("PersistentVolumeClaim", "JobSet")
    (slices,) = jobset["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    # A pod that fails ends its job at once; by code 2 for another reason than by all others.
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    (rule,) = job["podFailurePolicy"]["rules"]
    codes = {"containerName": container["name"], "operator": "In", "values": [2]}
    assert rule == {"action": "FailJob", "onExitCodes": codes}
    (fails,) = jobset["spec"]["failurePolicy"]["rules"]
    assert fails == {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] >= 10
    # One process a host of the slice.
    wide, high = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = {container["resources"][which]["google.com/tpu"] for which in ("requests", "limits")}
    assert {job["parallelism"], job["completions"]} == {wide * high // chips.pop()} and not chips
    # The run folder is on what all hosts see.
    folder, config, *fields = container["args"]
    (mount,) = container["volumeMounts"]
    (volume,) = pod["volumes"]
    assert Path(folder).is_relative_to(mount["mountPath"]) and mount["name"] == volume["name"]
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    # What is run is there, its fields are known, and it has the time that it takes for itself.
    assert (ROOT / container["command"][0]).samefile(LAUNCH / "again")
    resolved = load_config(config, parse_overrides(fields))
    assert resolved.checkpoint.every and resolved.run.grace_seconds
    assert resolved.run.grace_seconds + SLACK <= pod["terminationGracePeriodSeconds"]


def test_every_node_is_told_by_ssh_who_it_is_and_stops(tools, tmp_path):
    folder = tools("wait wait", deltal=DELTAL, ssh=APART)
    given = "one two", tmp_path / "x y", "countdown-tiny"
    home = {
        "DELTAL_HOME": str(repository(tmp_path)),
        "DELTAL_PORT": "9911",
        "DELTAL_HEARTBEAT": "7 ",
    }
    assert run("gpu-ssh", "start", *given, "seed=3", **home).returncode == 0
    until(lambda: (folder / "calls").exists() and len(calls(folder)) == 2)
    found = sorted(calls(folder), key=lambda call: call[1]["JAX_PROCESS_ID"])
    for number, (arguments, variables) in enumerate(found):
        assert "train" in arguments and f"run.dir={given[1]}" in arguments
        assert "seed=3" in arguments
        assert variables["JAX_PROCESS_ID"] == str(number) and variables["JAX_NUM_PROCESSES"] == "2"
        assert variables["JAX_COORDINATOR_ADDRESS"] == "one:9911"
        assert variables["DELTAL_HEARTBEAT"] == "7 "
    assert run("gpu-ssh", "status", *given[:2]).stdout.count(": running") == 2
    assert run("gpu-ssh", "stop", *given[:2]).stdout.count(": saving") == 2
    until(lambda: run("gpu-ssh", "status", *given[:2]).stdout.count(": not running") == 2)
    assert len(calls(folder)) == 2


#: Says which state the slice is in, one after the other, and does nothing else.
GCLOUD = (
    ASIDE
    + """
here=$(dirname "$0")
case "$*" in
  *describe*)
    head -n 1 "$here/states"
    [ "$(wc -l < "$here/states")" -eq 1 ] || sed -i 1d "$here/states" ;;
  *'tail -n 2'*) tail -n 1 "$here/said" ;;
  *until-done*) [ "$(wc -l < "$here/states")" -gt 1 ] ||
    echo 'until-done: exit code 0' >> "$here/said" ;;
esac
"""
)


def test_a_preempted_slice_is_asked_for_anew_until_the_run_is_done(tools):
    folder = tools(gcloud=GCLOUD)
    (folder / "said").write_text("until-done: exit code 75\n")
    states = "ACTIVE SUSPENDED NONE WAITING_FOR_RESOURCES ACTIVE".split()
    (folder / "states").write_text("\n".join(states) + "\n")
    given = {"TPU": "t", "ZONE": "z", "TYPE": "v6e-16", "RUN": "/mnt/runs/x", "PAUSE": "0"}
    given |= {"CONFIG": "countdown-tiny", "NFS": "h:/s", "REPOSITORY": "r"}
    done = run("tpu-vm", "watch", "seed=3", **given)
    assert done.returncode == 0, done.stderr
    text = (folder / "asides").read_text()
    names = ("describe", "resources delete", "resources create", "git clone", "until-done ")
    steps = re.findall("|".join(names), text)
    assert [step for step in steps if step != "describe"] == [
        "until-done ",  # it was active
        *("resources delete", "resources create", "git clone", "until-done "),
    ]
    assert text.count("--worker=all") >= 3 and "seed=3" in text and "mount -t nfs" in text


@pytest.mark.slow
def test_a_run_started_by_ssh_that_loses_a_process_goes_on_to_its_end(tools, tmp_path):
    """Two nodes that are this machine, by the real command: one process is killed once, and both
    loops start again."""
    tools(deltal=REAL, ssh=APART)
    nodes, folder = "localhost 127.0.0.1", tmp_path / "x"
    options = TINY | {"sft.steps": 0, "rl.steps": 4, "evaluate.every": 0}
    fields = [f"{name}={json.dumps(value)}" for name, value in options.items()]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
    with reserved_port() as port:
        variables = {
            "DELTAL_HOME": str(ROOT),
            "DELTAL_PORT": str(port),
            "DELTAL_HEARTBEAT": str(HEARTBEAT),
            "DELTAL_PAUSE": "1",
            "XLA_FLAGS": flags,
        }
        started = run("gpu-ssh", "start", nodes, folder, "countdown-tiny", *fields, **variables)
        assert started.returncode == 0, started.stderr
        try:
            metrics = folder / "metrics.jsonl"
            until(lambda: metrics.exists() and metrics.read_text().count('"rl"') >= 1, 300)
            logs = [tmp_path / f"x.{node}.log" for node in nodes.split()]
            child = subprocess.run(
                ["pgrep", "-f", f"cli.main train.*run.dir={folder}"],
                capture_output=True,
                text=True,
                check=True,
            ).stdout.split()
            os.kill(int(child[-1]), signal.SIGKILL)
            until(
                lambda: run("gpu-ssh", "status", nodes, folder).stdout.count("not running") == 2,
                300,
            )
        finally:
            run("gpu-ssh", "stop", nodes, folder)
    text = "".join(log.read_text() for log in logs)
    assert "was ended by SIGKILL" in text and text.count("; again in 1 s") == 2, text
    steps = [line["step"] for line in load_metrics(metrics) if line["phase"] == "rl"]
    assert steps == [1, 2, 3, 4]
