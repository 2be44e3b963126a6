"""A disk that is full in the middle of a run: one line, and once there is room it goes on."""

import resource
import time

import pytest
from etils import epath

from deltal_jax import train
from deltal_jax.checkpoints.manifest import exists
from deltal_jax.cli.main import main
from deltal_jax.metrics import MetricsWriter
from deltal_jax.training.run_folder import CHECKPOINTS
from tests import runs
from tests.runs import TINY, assert_same

OPTIONS = TINY | {
    "sft.steps": 0,
    "evaluate.every": 0,
    "task.rewards": [f"{runs.__file__}:mixed_reward"],
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run on a disk with room."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train("countdown-tiny", OPTIONS | {"run.dir": str(folder)}, quiet=True)
    return folder


@pytest.fixture
def command(capfd):
    """`deltal train`; its exit code and what it said at the end."""

    def command(folder, *items):
        code = main(["train", *items, f"run.dir={folder}"])
        return code, capfd.readouterr().err.strip().splitlines()

    return command


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        (20_000, "RL step 3: checkpoint 2 could not be saved in {c}: File too large; last good"),
        (None, "RL step 3: {run}: File too large; last good checkpoint: 1 (after RL step 1); "),
    ],
    ids=["arrays", "a line of metrics"],
)
def test_a_run_on_a_full_disk(limit, said, whole, command, tmp_path, monkeypatch):
    full, write = tmp_path / "full", MetricsWriter.write
    options = [f"{k}={v}".replace("'", "") for k, v in OPTIONS.items()]

    def filling(self, step, phase, metrics):
        write(self, step, phase, metrics)
        if (step, phase) == (2, "rl"):
            while not exists(epath.Path(full / CHECKPOINTS / "1")):
                time.sleep(0.001)
            room = limit or self.bytes_written  # more than has been said so far, to a file, too
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))

    with monkeypatch.context() as patched:
        patched.setattr(MetricsWriter, "write", filling)
        try:
            code, lines = command(full, "countdown-tiny", *options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    resume = f"deltal train run.dir={full} --resume"
    assert code == 1 and not any("Traceback" in line for line in lines)
    assert lines[-1].startswith("deltal: " + said.format(c=full / CHECKPOINTS, run=full))
    assert lines[-1].endswith(f"go on with: {resume}")
    assert command(full, "--resume")[0] == 0
    assert_same(full, whole)
