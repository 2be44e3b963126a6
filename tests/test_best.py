"""The best of a run's own evaluations: it stays, the last step is a candidate, and commands take
it."""

import json

import pytest

from deltal_jax import Reward, train
from deltal_jax.checkpoints.reader import SavedSteps
from deltal_jax.cli.main import main
from deltal_jax.metrics import load_metrics
from deltal_jax.training.run_folder import CHECKPOINTS
from tests.runs import TINY, assert_same, copied, mixed_reward, timeless

METRIC = "eval/countdown/length"
#: An evaluation after step 2, and, of a run that ends there, after step 3.
OPTIONS = TINY | {
    "sft.steps": 0,
    "rl.steps": 3,
    "rl.optimizer.learning_rate": 3e-2,
    "checkpoint.keep_last": 1,
    "checkpoint.keep_best": 1,
    "checkpoint.best_metric": METRIC,
}


def run(folder, **options):
    """A run, or the rest of one."""
    name = None if "resume" in options else "countdown-tiny"
    settings = ({} if name is None else OPTIONS) | options | {"run.dir": str(folder)}
    resume = bool(settings.pop("resume", False))
    return train(name, settings, rewards=[Reward(mixed_reward)], resume=resume, quiet=True)


def evaluated(folder):
    """What was found after each step."""
    lines = load_metrics(folder / "metrics.jsonl")
    return {x["step"]: x[METRIC] for x in lines if x["phase"] == "eval"}


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A run of three steps."""
    folder = tmp_path_factory.mktemp("short") / "run"
    run(folder)
    return folder


def test_the_best_stays_and_the_last_step_is_evaluated_before_it_is_saved(short):
    found, saved = evaluated(short), SavedSteps(short / CHECKPOINTS)
    best = max(found, key=lambda step: (found[step], step))
    assert found.keys() == {0, 2, 3} and len(set(found.values())) == 3
    assert saved.all() == sorted({best, 3}) and best != 3
    assert {n: saved.manifest(n).metrics[METRIC] for n in saved.all()} == {
        n: found[n] for n in saved.all()
    }


def test_the_evaluation_of_an_end_that_is_none_any_more_is_cut_off(short, tmp_path):
    again, longer, whole = copied(short, tmp_path / "again", 3), tmp_path / "on", tmp_path / "whole"
    run(again, resume=True)
    assert_same(again, short)
    run(copied(short, longer, 3), resume=True, **{"rl.steps": 4})
    run(whole, **{"rl.steps": 4})
    assert timeless(longer) == timeless(whole) and evaluated(whole).keys() == {0, 2, 4}
    assert_same(longer, whole)


def test_commands_take_the_best_step_or_any(short, tmp_path, capsys):
    found = evaluated(short)
    best = max(found, key=lambda step: (found[step], step))
    assert main(["evaluate", str(short), "--step", "best", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["step"], told[METRIC]) == (best, found[best])
    for step, wanted in (("best", best), ("3", 3)):
        to = str(tmp_path / step)
        assert main(["export", str(short), "--to", to, "--step", step, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["step"] == wanted
    for command, step in (("sample", "all"), ("export", "2,3")):
        more = ["--to", str(tmp_path / "none")] * (command == "export")
        assert main([command, str(short), *more, "--step", step]) == 2
        told = f"deltal: --step: {step!r} is neither best nor an RL step\n"
        assert capsys.readouterr().err == told
