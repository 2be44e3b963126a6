"""The command line without training: exit codes, one-line messages, dry runs and JSON."""

import json
import os
import subprocess
import sys

import pytest

from deltal_jax import __version__
from deltal_jax.cli import debug
from deltal_jax.cli.main import COMMANDS, main
from deltal_jax.config import describe_fields, load_config, shipped_configs, shipped_plans

TINY = "countdown-tiny"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "runs").exists(), "nothing here may start a run"


@pytest.fixture
def deltal(capsys):
    """Run a command line in this process: (exit code, standard output, standard error)."""

    def deltal(*arguments: str) -> tuple[int, str, str]:
        try:
            code = main(list(arguments))
        except SystemExit as left:
            code = left.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return deltal


REFUSALS = {
    "no config": (["train"], "config: name an experiment, such as countdown-tiny"),
    "unknown config": (
        ["train", "countdown-tinny"],
        "config: no file 'countdown-tinny' and no config of that name; "
        "did you mean 'countdown-tiny'?",
    ),
    "two configs": (["train", TINY, "other"], "expected one config, got countdown-tiny and other"),
    "unknown field": (
        ["train", TINY, "rl.step=3"],
        "rl.step: no such field; did you mean rl.steps?",
    ),
    "field of another section": (
        ["train", TINY, "rl.alpha=1"],
        "rl.alpha: no such field; did you mean lora.alpha or objective.alpha?",
    ),
    "wrong type": (["train", TINY, "rl.steps=many"], "rl.steps: expected int, got 'many'"),
    "out of range": (["train", TINY, "seed=-1"], "seed: must be at least 0, got -1"),
    "not a choice": (
        ["train", TINY, "objective.scope=grup"],
        "objective.scope: 'grup' is not one of batch, minibatch, group; did you mean 'group'?",
    ),
    "not yaml": (["train", TINY, "rl.steps=[1"], "rl.steps: '[1' is not valid YAML"),
    "contradiction": (
        ["train", TINY, "rl.updates_per_rollout=3"],
        "rl.updates_per_rollout: 3 does not divide rl.prompts_per_step=16",
    ),
    "nothing to resume": (
        ["train", TINY, "--resume"],
        "--resume: no run of countdown-tiny under runs/; name run.dir",
    ),
    "nothing to resume at all": (
        ["train", "--resume"],
        "--resume: no run of any experiment under runs/; name run.dir",
    ),
    "resume of no run": (
        ["train", "--resume", "run.dir=nowhere"],
        "run.dir: nowhere is not a run folder (it has no config.yaml)",
    ),
    "dry run of nothing": (["train", "--dry-run"], "config: name an experiment"),
    "dry run of an unknown field": (
        ["train", TINY, "model.layer=1", "--dry-run"],
        "model.layer: no such field; did you mean model.layers?",
    ),
    "evaluate no run": (["evaluate", "nowhere"], "run.dir: nowhere is not a run folder"),
    "evaluate a bad override": (["evaluate", "nowhere", "x"], "override 'x': expected key.sub="),
    "evaluate a checkpoint": (["evaluate", "x/checkpoints/5"], "--step: name the run, x, and its"),
    "evaluate by no config": (
        ["evaluate", "nowhere", "--config", "nothing"],
        "config: no file 'nothing' and no config of that name",
    ),
    "evaluate a step of a model": (
        ["evaluate", "nowhere", "--config", TINY, "--step", "3"],
        "--step: only a run has steps",
    ),
    "evaluate no step": (["evaluate", "nowhere", "--step", "x"], "run.dir: nowhere is not a run"),
    "sample from no run": (["sample", "nowhere"], "run.dir: nowhere is not a run folder"),
}


@pytest.mark.parametrize("as_json", [False, True], ids=["plain", "json"])
@pytest.mark.parametrize("case", REFUSALS)
def test_bad_input_exits_with_2_and_one_line_on_standard_error(deltal, case, as_json):
    arguments, message = REFUSALS[case]
    code, out, err = deltal(*arguments, *["--json"] * as_json)
    assert (code, out) == (2, "")
    assert err.startswith(f"deltal: {message}")
    assert err.count("\n") == 1
    assert err.endswith("\n")


@pytest.mark.parametrize(
    "text", ["3", "", ":", "3:", ":5", "5:3", "0:2", "-1:2", "a:b", "1:2:3", "1.5:2", "3-5"]
)
def test_a_malformed_profile_range_is_refused_with_the_form(deltal, text):
    code, out, err = deltal("train", TINY, f"--profile={text}")
    assert (code, out) == (2, "")
    assert err == (
        f"deltal: --profile: {text!r} is not START:STOP with 1 ≤ START ≤ STOP, such as 3:5\n"
    )


@pytest.mark.parametrize("option", [[], ["--dry-run"], ["--json"]])
def test_a_run_folder_in_use_is_refused_and_left_alone(deltal, tmp_path, option):
    used = tmp_path / "used"
    used.mkdir()
    (used / "mine.txt").write_text("mine")
    code, out, err = deltal("train", TINY, "run.dir=used", *option)
    assert (code, out) == (2, "")
    assert err == (
        "deltal: run.dir: used exists already; add --resume to go on with it, or name another\n"
    )
    assert [path.name for path in used.iterdir()] == ["mine.txt"]
    assert (used / "mine.txt").read_text() == "mine"


def test_a_run_without_a_checkpoint_cannot_be_evaluated_or_sampled(deltal, tmp_path):
    from deltal_jax.training.run_folder import create_run_folder

    create_run_folder(load_config(TINY, {"run.dir": "started"}))
    for command in ("evaluate", "sample"):
        code, out, err = deltal(command, "started")
        assert (code, out, err) == (2, "", "deltal: started: no checkpoint yet\n")


def test_a_dry_run_prints_config_formula_arithmetic_and_memory_and_writes_nothing(deltal, tmp_path):
    code, out, err = deltal("train", TINY, "rl.steps=7", "objective.alpha=0.75", "--dry-run")
    assert (code, err) == (0, "")
    assert "alpha: 0.75" in out
    assert "w_i  = (1/192) · L_i^-0.75 / Σ_(j in batch) L_j^-0.75" in out
    table = "\n".join(out.strip().split("\n\n")[-2:]).splitlines()
    figures = {
        line[:32].strip(): float(line[32:].removesuffix(" MiB").replace(",", "")) for line in table
    }
    assert figures["prompts per step"] == 16
    assert figures["responses per step"] == 16 * 8
    assert figures["rl updates"] == 7
    assert figures["prompts"] == 16 * 7
    assert figures["max response tokens per step"] == 16 * 8 * 192
    parts = ["parameters", "optimizer", "gradients", "activations"]
    parts += ["sampling weights", "kv cache", "prompt cache", "responses"]
    total = sum(figures[f"memory, {part}"] for part in parts)
    assert figures["memory, total"] == pytest.approx(total, abs=0.3)
    assert list(tmp_path.iterdir()) == []
    assert "rollouts:" not in out
    _, out, _ = deltal("train", TINY, "rollout.ahead=1", "--dry-run")
    assert "\n\nrollouts: one step ahead of the update\n\n" in out


def test_more_slots_than_fit_are_refused_before_the_warm_up(deltal, tmp_path):
    code, out, err = deltal("train", TINY, "rollout.slots=100000000")
    assert (code, out) == (2, "") and len(err.splitlines()) == 1
    assert err.startswith("deltal: rollout.slots: sampling with 100000000 takes ")
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_as_json_is_one_object_that_agrees_with_the_config(deltal, tmp_path):
    overrides = ["rl.updates_per_rollout=4", "rl.epochs_per_rollout=2", "objective.scope=group"]
    code, out, err = deltal("train", TINY, *overrides, "--dry-run", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found.keys() == {"files", "notes", "batch", "memory_bytes", "formula"}
    assert found["batch"]["responses_per_minibatch"] == 16 * 8 // 4
    assert found["batch"]["updates_per_step"] == 4 * 2
    loss = "loss of each mini-batch = 4 · Σ_(i in mini-batch) (w_i Σ_t ℓ_it)      delta_l, "
    assert found["formula"].startswith(f"{loss}normalised over each prompt's group")
    memory = found["memory_bytes"]
    assert memory.pop("total") == sum(memory.values())
    vocabulary, width, ff, layers = 79, 64, 176, 3
    parameters = 2 * vocabulary * width + width
    parameters += layers * (4 * width * width + 3 * width * ff + 2 * width)
    assert memory["parameters"] == 4 * parameters
    assert memory["kv_cache"] == 4 * layers * 2 * 16 * 2 * 200 * 32
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        (TINY, "--json", "rl.steps=7", "--dry-run"),
        (TINY, "--dry-run", "--json", "rl.steps=7"),
        ("--dry-run", TINY, "--json", "rl.steps=7"),
        ("--json", "--dry-run", TINY, "rl.steps=7"),
    ],
)
def test_options_may_stand_anywhere_among_the_overrides(deltal, arguments):
    code, out, err = deltal("train", *arguments)
    assert (code, err) == (0, "")
    assert json.loads(out)["batch"]["rl_steps"] == 7


@pytest.mark.parametrize(
    ("overrides", "weight"),
    [
        (["objective.aggregation=sequence_mean"], "1 / (B_batch · L_i)"),
        (
            ["objective.aggregation=token_mean", "objective.scope=minibatch"],
            "1 / Σ_(j in mini-batch) L_j",
        ),
        (["objective.aggregation=constant_length"], "(1/192) / B_batch"),
        (
            ["objective.scope=group", "objective.normalizer=100"],
            "(1/K) · (1/100) · L_i^-1 / Σ_(j in group) L_j^-1, K groups that have anything to "
            "train",
        ),
    ],
)
def test_the_effective_formula_names_method_scope_and_constant(deltal, overrides, weight):
    _, out, _ = deltal("train", TINY, *overrides, "--dry-run", "--json")
    assert f"\nw_i  = {weight}\n" in json.loads(out)["formula"]


def test_configs_lists_every_shipped_experiment_with_its_summary(deltal):
    names = [*shipped_configs(), *shipped_plans()]
    assert TINY in names and "paper/countdown-delta-l" in names
    assert "compare-study-chain" in shipped_plans()  # by a file below it
    assert not [name for name in names if name.startswith("bases/")]
    code, out, err = deltal("configs")
    assert (code, err) == (0, "")
    groups = [[line.split()[0] for line in group.splitlines()] for group in out.split("\n\n")]
    assert [name for group in groups for name in group] == names
    folders = [{name.rpartition("/")[0] for name in group} for group in groups if group]
    assert all(len(folder) == 1 for folder in folders) and len(folders) > 1
    code, as_json, err = deltal("configs", "--json")
    assert (code, err) == (0, "")
    found = json.loads(as_json)
    assert list(found) == names
    assert all(summary and summary in out for summary in found.values())


def test_fields_lists_every_field_with_type_default_and_meaning(deltal):
    code, out, err = deltal("configs", "--fields")
    assert (code, err) == (0, "")
    for name, kind, default, help_ in describe_fields():
        shown = "null" if default is None else default
        assert f"{name}\n    {kind}, default {shown}: {help_}\n" in out


def test_fields_as_json_is_one_document_of_all_fields(deltal):
    code, out, err = deltal("configs", "--fields", "--json")
    assert (code, err) == (0, "")
    fields = json.loads(out)["fields"]
    found = [tuple(field.values()) for field in fields]
    expected = [
        (name, kind, list(default) if isinstance(default, tuple) else default, help_)
        for name, kind, default, help_ in describe_fields()
    ]
    assert found == expected
    assert all(field.keys() == {"name", "type", "default", "help"} for field in fields)


#: By what to type; those of `debug` have commands of their own.
LEAVES = {k: v for k, v in COMMANDS.items() if k != "debug"} | {
    f"debug {name}": module for name, module in debug.COMMANDS.items()
}


@pytest.mark.parametrize("command", LEAVES)
def test_help_of_every_command_says_what_it_does_and_every_option(deltal, command):
    code, out, err = deltal(*command.split(), "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: deltal {command}")
    assert LEAVES[command].__doc__.strip().split("\n")[0] in out
    assert "--json" in out


def test_help_lists_the_commands_examples_and_exit_codes(deltal):
    code, out, err = deltal("--help")
    assert (code, err) == (0, "")
    for command, module in COMMANDS.items():
        assert f"  {command} " in out
        assert module.__doc__.strip().split("\n")[0][:40] in out
    assert "examples:" in out
    assert "exit codes: 0 done, 1 the run failed, 2 bad input" in out


def test_version_is_the_packages(deltal):
    assert deltal("--version") == (0, f"deltal-jax {__version__}\n", "")


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["train", TINY, "--fast"], ["evaluate"], ["sample"]]
)
def test_a_command_line_that_does_not_parse_exits_with_2_and_the_usage(deltal, arguments):
    code, out, err = deltal(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("usage: deltal")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ArithmeticError("RL step 3: loss nan"), 1, "deltal: RL step 3: loss nan\n"),
        (KeyboardInterrupt(), 130, "deltal: stopped\n"),
    ],
)
def test_a_failed_run_exits_with_1_and_an_interrupted_one_with_130(
    deltal, monkeypatch, error, code, message
):
    def fail(arguments):
        raise error

    monkeypatch.setattr(COMMANDS["configs"], "run", fail)
    assert deltal("configs") == (code, "", message)


def test_the_module_runs_as_a_program_and_imports_no_jax_to_refuse(tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", "deltal_jax.cli.main", "train", "x"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=dict(os.environ), check=False
    )
    lines = done.stderr.splitlines()
    assert done.returncode == 2
    assert [line for line in lines if not line.startswith("import time:")] == [
        "deltal: config: no file 'x' and no config of that name; `deltal configs` lists them"
    ]
    assert not [line for line in lines if line.endswith("| jax")]
