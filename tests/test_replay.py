"""A run with an update that is not finite: left out, kept, said, and replayed to the same bits."""

import json
import shutil

import numpy as np
import pytest

from deltal_jax import Reward, TrainingError, train
from deltal_jax.cli.main import main
from deltal_jax.guard.dumps import load_dump
from deltal_jax.guard.replay import replay
from deltal_jax.metrics import load_metrics
from deltal_jax.training import ahead
from deltal_jax.training.collect import RolloutStream
from tests.runs import TINY, assert_same, copied, mixed_reward

#: Two mini-batches × two epochs a step; the ratio is to the sampler's log-probabilities.
OPTIONS = TINY | {
    "sft.steps": 0,
    "rl.steps": 3,
    "rl.updates_per_rollout": 2,
    "rl.epochs_per_rollout": 2,
    "objective.kl_coefficient": 0.05,
    "evaluate.every": 0,
    "guard.dump_steps": [3],
    "guard.mismatch_warn": 1e-9,
}
#: The response, of 16, whose log-probability is lost in step 2: of the second mini-batch.
LOST = 11
REWARDS = [Reward(mixed_reward)]


def losing(original):
    """A sampler that says nan for one token of step 2."""

    def next_(self, params, step):
        batch = original(self, params, step)
        if step == 1:
            batch.rollout.logprobs[LOST, batch.rollout.prompt_lengths[LOST]] = np.nan
        return batch

    return next_


@pytest.fixture(scope="module")
def lost(tmp_path_factory):
    """The folder of the run."""
    folder = tmp_path_factory.mktemp("lost") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RolloutStream, "next", losing(RolloutStream.next))
        options = OPTIONS | {"run.dir": str(folder)}
        assert train("countdown-tiny", options, rewards=REWARDS, quiet=True).status == "done"
    return folder


def warnings(folder):
    return json.loads((folder / "summary.json").read_text())["warnings"]


def test_a_run_leaves_out_what_is_not_finite_and_goes_on(lost):
    lines = [x for x in load_metrics(lost / "metrics.jsonl") if x["phase"] == "rl"]
    assert [x["optim/skipped"] for x in lines] == [0, 2, 0]
    measured = ("policy/loss", "policy/entropy", "mismatch/kl", "optim/grad_norm", "policy/kl")
    assert all(np.isfinite(x[name]) for x in lines for name in measured)
    said = warnings(lost)
    mismatch, first, second = said  # the first of them once, not each step
    assert mismatch.startswith("RL step 1: sampler and trainer disagree by ")
    assert "over guard.mismatch_warn=1e-09; likely: the policy moves in the 4 updates" in mismatch
    assert first.startswith("RL step 2: update 2: loss nan, gradient norm nan in bucket ")
    assert ", gradients not finite of blocks/" in first and second.startswith(
        "RL step 2: update 4: loss nan"
    )
    folder = lost / "dumps" / "step-000002-update-2"
    assert first.endswith(f"; skipped; see it with: deltal debug replay {folder}")
    assert second.endswith("; skipped")
    assert {x.name for x in folder.parent.iterdir()} == {folder.name, "step-000003-update-1"}


def test_a_dump_is_replayed_bit_for_bit_and_names_the_response(lost):
    dump = load_dump(lost / "dumps" / "step-000002-update-2", {})
    assert int(dump.state.updates) == 4 + 1 and dump.exact
    found = replay(dump)
    assert [report.skipped is None for report in found.reports] == [False, True, False]
    assert not found.differing
    compared = {name for name, (was, _) in found.figures.items() if was is not None}
    assert {"update 2: loss", "update 4: policy/kl", "policy/loss", "optim/grad_norm"} <= compared
    ((response, bad),) = [item for bucket in found.buckets for item in bucket.responses.items()]
    assert response == LOST
    assert (bad.pop("sampler's log p"), bad.pop("old log p")) == (1, 1)
    assert np.isnan(bad.pop("loss")) and bad.keys() == {"gradient"}
    sound = [bucket for bucket in found.buckets if bucket.health.finite]
    assert sound and not any(bucket.responses for bucket in sound)
    norm, count = found.health.parameters["head/kernel"]
    assert np.isnan(norm) and count > 0


def test_a_sound_step_is_replayed_by_command_and_otherwise_computed_to_rounding(lost, capsys):
    folder = str(lost / "dumps" / "step-000003-update-1")
    assert main(["debug", "replay", folder]) == 0
    told = capsys.readouterr().out
    assert "RL step 3, update 4 (epoch 2, mini-batch 2): loss " in told
    assert "figures are bit for bit those recorded" in told and "NOT FINITE" not in told
    assert main(["debug", "replay", folder, "rl.tokens_per_microbatch=32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert not found["exact"] and found["differing"] and found["step"] == 3
    pairs = [pair for name, pair in found["figures"].items() if "mismatch" not in name]
    was, now = np.asarray([pair for pair in pairs if pair[0] is not None]).T
    np.testing.assert_allclose(now, was, rtol=1e-3, atol=1e-6)
    norms = [norm for norm, _ in found["health"]["parameters"].values()]
    assert np.sqrt(np.sum(np.square(norms))) == pytest.approx(
        found["figures"]["update 1: optim/grad_norm"][1], rel=1e-5
    )


def test_a_dump_that_was_tampered_with_is_said_to_differ(lost, tmp_path, capsys):
    folder = shutil.copytree(lost / "dumps" / "step-000003-update-1", tmp_path / "dump")
    record = json.loads((folder / "record.json").read_text())
    record["reports"][1]["loss"] = np.nextafter(record["reports"][1]["loss"], 1.0)
    (folder / "record.json").write_text(json.dumps(record))
    assert main(["debug", "replay", str(folder), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["differing"] == ["update 2: loss"]


def test_a_resumed_run_has_the_same_warnings_and_the_same_end(lost, tmp_path):
    died = copied(lost, tmp_path / "run", 2)
    shutil.rmtree(died / "dumps" / "step-000003-update-1")
    train(None, {"run.dir": str(died)}, rewards=REWARDS, resume=True, quiet=True)
    assert_same(died, lost)
    assert warnings(died) == warnings(lost)
    kept = "dumps/step-000003-update-1/record.json"
    one, other = (json.loads((x / kept).read_text()) for x in (died, lost))
    assert one["reports"] == other["reports"]


def test_a_sampler_of_another_temperature_stops_the_run_with_a_checkpoint(tmp_path, monkeypatch):
    original = ahead.make_engine

    def colder(setup, *, temperature, training=False):
        return original(setup, temperature=0.5 * temperature, training=training)

    monkeypatch.setattr(ahead, "make_engine", colder)
    options = OPTIONS | {"run.dir": str(tmp_path / "run"), "guard.mismatch_stop": 0.02}
    options |= {"rl.updates_per_rollout": 1, "rl.epochs_per_rollout": 1, "checkpoint.every": 0}
    stopped = (
        r"^RL step 1: sampler and trainer disagree by .* over guard.mismatch_stop=0.02; .*: 1 "
    )
    with pytest.raises(TrainingError, match=stopped):
        train("countdown-tiny", options, rewards=REWARDS, quiet=True)
    lines = load_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [x["step"] for x in lines if x["phase"] == "rl"] == [1]


def test_a_warm_up_that_diverges_stops_after_so_many_updates_in_a_row(tmp_path):
    options = OPTIONS | {"run.dir": str(tmp_path / "run"), "sft.steps": 6, "sft.log_every": 2}
    options |= {"sft.optimizer.learning_rate": 1e30, "sft.optimizer.warmup_steps": 0}
    stopped = (
        r"^warm-up step 4: loss .*, update_norm inf in a bucket of \d+ rows of \d+ tokens; 4 in a"
    )
    with pytest.raises(TrainingError, match=stopped):
        train("countdown-tiny", options, quiet=True)
    (line,) = load_metrics(tmp_path / "run" / "metrics.jsonl")
    assert (line["step"], line["optim/skipped"], line["sft/loss"]) == (2, 2, None)
    (said,) = warnings(tmp_path / "run")
    assert said.startswith("warm-up step 1: loss ") and said.endswith("; skipped; so were 1 more")
