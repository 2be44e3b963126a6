"""`deltal debug checkpoints`: what there is, and what is wrong with it."""

import json
from contextlib import closing

import pytest

from deltal_jax.checkpoints.manifest import Position
from deltal_jax.checkpoints.store import Checkpoints
from deltal_jax.cli.main import main
from deltal_jax.config import load_config
from deltal_jax.training.run_folder import CHECKPOINTS, create_run_folder
from tests.test_store import state


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a checkpoint of the warm-up and one of RL, whose last byte is flipped."""
    folder = tmp_path_factory.mktemp("listed") / "run"
    create_run_folder(load_config("countdown-tiny", {"run.dir": str(folder)}))
    found = {"eval/countdown/avg_at_k": 0.25}
    with closing(Checkpoints(folder / CHECKPOINTS)) as checkpoints:
        checkpoints.save(3500, state(), Position("sft", 3500, 0, 0))
        checkpoints.save(3510, state(), Position("rl", 10, 160, 900), metrics=found)
    damaged = folder / CHECKPOINTS / "3510" / "state" / "_METADATA"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    return folder


def test_a_table_by_sizes_and_one_by_checksums(run, capsys):
    assert main(["debug", "checkpoints", str(run)]) == 0
    head, warm_up, rl = capsys.readouterr().out.splitlines()
    assert head.split() == "number after MB saved eval/countdown/avg_at_k verdict".split()
    assert warm_up.split()[:3] == ["3500", "sft", "3500"] and warm_up.endswith("-  complete")
    assert rl.split()[:3] == ["3510", "rl", "10"] and rl.endswith("0.250  complete")
    assert main(["debug", "checkpoints", str(run), "--verify"]) == 1
    _, warm_up, rl = capsys.readouterr().out.splitlines()
    assert warm_up.endswith("-  intact")
    assert rl.endswith("0.250  damaged: state/_METADATA has flipped bytes")


def test_the_same_as_json(run, capsys):
    assert main(["debug", "checkpoints", str(run), "--verify", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["3500"]["damage"] is None and found["3500"]["phase"] == "sft"
    assert found["3510"]["damage"] == "state/_METADATA has flipped bytes"
    assert found["3510"]["eval/countdown/avg_at_k"] == 0.25 and found["3510"]["bytes"] > 1000
