"""An open run: what it says where it cannot write."""

import shutil
from contextlib import closing

import pytest

from deltal_jax import TrainingError
from deltal_jax.checkpoints.manifest import Position
from deltal_jax.checkpoints.store import Checkpoints
from deltal_jax.guard.signals import Stop
from deltal_jax.metrics import MetricsWriter
from deltal_jax.progress import ProgressDisplay
from deltal_jax.training.opening import create_run
from deltal_jax.training.run import Run
from tests.runs import TINY
from tests.test_damage import small_files
from tests.test_store import state


def test_a_signal_is_answered_though_the_checkpoints_cannot_be_read(tmp_path):
    options = TINY | {"run.dir": str(tmp_path / "run")}
    folder, setup = create_run("countdown-tiny", options, None, None)
    writer, display = MetricsWriter(None), ProgressDisplay(quiet=True)
    with closing(Checkpoints(folder / "checkpoints")) as checkpoints:
        run = Run(folder, setup, ["task"], writer, checkpoints, display, None, Stop(at_once=False))
        (folder / "checkpoints" / "7").mkdir()
        loop = folder / "checkpoints" / "7" / "manifest.json"
        loop.symlink_to(loop)
        said, anything = run.kept()
        shutil.rmtree(loop.parent)
    assert "Too many levels" in said and "--resume" in said and not anything


def test_a_line_of_metrics_without_room_ends_the_run_with_the_way_to_go_on(tmp_path):
    options = TINY | {"run.dir": str(tmp_path / "run")}
    folder, setup = create_run("countdown-tiny", options, None, None)
    writer, display = MetricsWriter(folder), ProgressDisplay(quiet=True)
    with closing(Checkpoints(folder / "checkpoints")) as checkpoints, closing(writer):
        stop = Stop(at_once=False)
        run = Run(folder, setup, ["task"], writer, checkpoints, display, None, stop)
        checkpoints.save(5, state(), Position("rl", 3, 0, 0))
        checkpoints.wait()
        with small_files(9), pytest.raises(TrainingError) as stopped, run.writing("RL", 4):
            writer.write(4, "rl", {"reward/mean": 0.5})
    assert str(stopped.value) == (
        f"RL step 4: {folder}: File too large; last good checkpoint: 5 (after RL step 3); "
        f"go on with: deltal train run.dir={folder} --resume"
    )
