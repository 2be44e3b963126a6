"""How a run goes on: what is refused changes nothing, and what may change is not refused later."""

import dataclasses
import json
import shutil
from contextlib import closing

import pytest

from deltal_jax import train
from deltal_jax.checkpoints.manifest import Position
from deltal_jax.checkpoints.store import Checkpoints
from deltal_jax.config import load_config
from deltal_jax.errors import UserError
from deltal_jax.training import run_folder
from deltal_jax.training.opening import MESH, create_run
from tests.runs import TINY
from tests.test_store import state

PARTIAL = {"rollout.partial": True, "rollout.oversampling": 2.0}


@pytest.fixture
def run(tmp_path):
    """One that was on another mesh when it was saved, with a line of metrics."""
    folder, _ = create_run(
        "countdown-tiny", TINY | PARTIAL | {"run.dir": str(tmp_path / "run")}, None, None
    )
    (folder / "metrics.jsonl").write_text('{"step": 0, "phase": "eval"}\n')
    with closing(Checkpoints(folder / run_folder.CHECKPOINTS)) as checkpoints:
        checkpoints.save(2, state(), Position("rl", 0, 0, 0, {MESH: "data 2: 2 devices"}))
    return folder


def test_a_resume_that_is_refused_changes_nothing_in_the_folder(run):
    """Otherwise the field that was refused would be the run's own the next time."""

    def contents():
        files = (path for path in run.rglob("*") if path.is_file())
        return {path: path.read_bytes() for path in files if path.name != run_folder.LOCK}

    before = contents()
    with pytest.raises(UserError, match=r"^mesh: the run was on data 2: 2 devices, which decides"):
        train(None, {"run.dir": str(run), "checkpoint.every": 7}, resume=True, quiet=True)
    assert contents() == before


def test_a_run_that_goes_on_elsewhere_is_left_alone(run):
    with (
        run_folder.locked(run),
        pytest.raises(UserError, match=r"^run.dir: .* is in use by process \d+ of .*; wait until"),
    ):
        train(None, {"run.dir": str(run)}, resume=True, quiet=True)


def test_a_run_past_its_first_checkpoint_does_not_begin_anew_in_an_empty_folder(run):
    shutil.rmtree(run / run_folder.CHECKPOINTS / "2")
    every = run_folder.load_run_config(run).checkpoint.every
    line = {"step": every + 1, "phase": "rl"}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(
        UserError, match=rf"has no checkpoint, though the run came to RL step {every + 1};"
    ):
        train(None, {"run.dir": str(run)}, resume=True, quiet=True)
    assert json.loads((run / "metrics.jsonl").read_text()) == line


def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew(run):
    shutil.rmtree(run / run_folder.CHECKPOINTS)
    with pytest.raises(
        UserError, match=r"^checkpoint.dir: .*/checkpoints is gone, and the run went"
    ):
        train(None, {"run.dir": str(run)}, resume=True, quiet=True)
    assert (run / "metrics.jsonl").stat().st_size


DAMAGES = {
    "summary": ("summary.json", '{"data', ".*/summary.json: empty or damaged; delete it, or"),
    "config": ("config.yaml", "", "run.dir: .*/config.yaml is empty or damaged; bring it back$"),
    "metrics": ("metrics.jsonl", None, "run.dir: cannot write to .*/run: Is a directory$"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_run_folder_that_cannot_be_used_is_refused_in_one_line(case, run):
    name, text, said = DAMAGES[case]
    (run / name).unlink(missing_ok=True)
    if text is None:
        (run / name).mkdir()
    else:
        (run / name).write_text(text)
    with pytest.raises(UserError, match=f"^{said}"):
        train(None, {"run.dir": str(run)}, resume=True, quiet=True)


def test_what_may_change_on_resume_is_not_what_a_checkpoint_refuses():
    """A run that stopped for want of groups may look longer, or fill up."""
    options = {"rollout.dynamic_sampling": "reward", "rollout.fill_up": False}
    stored = load_config("countdown-tiny", options)
    saved = run_folder.fixed_fields(stored)
    for changed in ({"max_rounds": 20}, {"fill_up": True}):
        config = dataclasses.replace(stored, rollout=dataclasses.replace(stored.rollout, **changed))
        assert list(run_folder.changes(stored, config)) == [f"rollout.{name}" for name in changed]
        now = run_folder.fixed_fields(config)
        assert [name for name in saved.keys() & now.keys() if saved[name] != now[name]] == []
