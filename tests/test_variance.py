"""The variance command and its flow, on a run of the tiniest model."""

import json

import numpy as np
import pytest

from deltal_jax import Reward, train
from deltal_jax.cli.main import main
from deltal_jax.laboratory.measure import Settings, measure, sample
from deltal_jax.laboratory.plots import write_plots
from deltal_jax.report.reading import read_run
from deltal_jax.training.trained import load_trained
from tests.runs import TINY, mixed_reward

OPTIONS = TINY | {
    "sft.steps": 0,
    "rl.steps": 1,
    "evaluate.every": 0,
    "evaluate.samples_per_problem": 1,
}
REWARDS = [Reward(mixed_reward)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of one step by a model that knows nothing."""
    folder = tmp_path_factory.mktemp("run") / "run"
    train("countdown-tiny", OPTIONS | {"run.dir": str(folder)}, rewards=REWARDS, quiet=True)
    return folder


@pytest.fixture(scope="module")
def measured(folder):
    """A measurement with rewards that differ."""
    trained = load_trained(folder, {})
    options = {"start": trained.position.next_prompt, "rewards": REWARDS}
    settings = Settings(groups=8, bins=3, subsets=True)
    return measure(trained.setup, trained.params, trained.key, settings=settings, **options)


def test_equal_rewards_leave_the_score(folder, capsys):
    """The task itself rewards nothing that this model says: no advantage, and the reason."""
    assert main(["variance", str(folder), "--groups", "8", "--bins", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((folder / "variance" / "step-000001.json").read_text())
    assert found["gradients"]["advantage"] is None and "rewards" in found["reason"]
    assert found["aggregations"] == [] and found["exponents"] is None
    assert (found["groups"], found["responses"], found["step"]) == (8, 32, 1)
    assert found["gradients"]["score"]["bins"][0]["second_moment"] > 0
    assert {p.suffix for p in (folder / "variance").iterdir()} == {".json", ".svg"}
    first = (folder / "variance" / "step-000001.json").read_bytes()
    more = ["--groups", "8", "--bins", "2", "--json"]
    for _ in range(2):  # others stay; the same again is one file
        assert main(["variance", str(folder), *more]) == 0
    other = json.loads((folder / "variance" / "step-000001-2.json").read_text())
    assert len(list((folder / "variance").glob("*.json"))) == 2
    assert (folder / "variance" / "step-000001.json").read_bytes() == first
    assert other["settings"]["bins"] == 2 and read_run(folder).variance == other


def test_a_measurement_holds_every_figure(measured):
    assert measured["responses"] == measured["counted"] == 32 and measured["batch_groups"] == 4
    for name in ("score", "advantage"):
        found = measured["gradients"][name]
        assert sum(row["count"] for row in found["bins"]) == 32
        assert set(found["kinds"]) >= {"q", "k", "v", "o", "mlp", "embed", "norm"}
        assert list(found["layers"]) == ["0"]
        assert {cell["kind"] for cell in found["heat"]} == set(found["kinds"])
    rows = {row["name"]: row for row in measured["aggregations"]}
    assert rows["ΔL α=1"]["relative_variance"] == 1.0
    assert [rows[f"ΔL α={a}"]["alpha"] for a in (0.25, 0.5, 1.5)] == [0.25, 0.5, 1.5]
    assert all(-1 <= row["cosine"] <= 1 and row["variance"] > 0 for row in rows.values())
    assert (
        measured["subsets"]["all"]["gradients"]["score"]["fit"]
        == (measured["gradients"]["score"]["fit"])
    )
    for name, found in measured["subsets"].items():
        if "under" in name:
            edge = int(name.split()[-2])
            assert found["gradients"]["score"]["bins"][0]["low"] >= edge
    json.dumps(measured, allow_nan=False)


def test_prompts_are_new_and_sampled_alike(folder, measured, tmp_path):
    """They begin where those of the run end; plots of one measurement are the same bytes."""
    trained = load_trained(folder, {})
    start = trained.position.next_prompt
    first, second = (sample(trained.setup, trained.params, trained.key, 8, start) for _ in range(2))
    assert start == 4
    np.testing.assert_array_equal(np.unique(first.positions), np.arange(start, start + 8))
    np.testing.assert_array_equal(first.rollout.tokens, second.rollout.tokens)
    once, again = ([p.read_bytes() for p in write_plots(tmp_path, "s", measured)] for _ in "ab")
    assert once == again and len(once) == 3 and max(map(len, once)) < 100_000


BAD = {
    "--groups: 7 are fewer than 8": ["--groups", "7"],
    "--groups: 9 are fewer than 8, or than two batches of rl.prompts_per_step=5": [
        "rl.prompts_per_step=5",
        "--groups=9",
    ],
    "--bins: must be at least 2, got 1": ["--bins", "1"],
    "--min-length: 0 of 32 responses are left": ["--groups=8", "--min-length=999"],
    "--step: ": ["--step", "3"],
    "--seed: ": ["--seed=-1"],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_line(folder, capsys, message):
    assert main(["variance", str(folder), *BAD[message]]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith(f"deltal: {message}")
