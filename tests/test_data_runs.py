"""A run on a file of problems: what it leaves out, how far it is, and that it goes on as if it had
never stopped, with the same data only."""

import json
import random
import shutil

import numpy as np
import pytest

from deltal_jax.errors import UserError
from deltal_jax.metrics import load_metrics
from deltal_jax.training.loop import train
from deltal_jax.training.run_folder import CHECKPOINTS

ROWS = 14
#: Prompts of up to 8 pieces, 3 a step; what a step begins too much is carried over.
OPTIONS = {
    "task.name": "math",
    "task.math.verifier": "reference",
    "task.math.template": "plain",
    "task.math.workers": 1,
    "model.layers": 1,
    "model.d_model": 16,
    "model.head_dim": 8,
    "model.d_ff": 16,
    "sft.steps": 0,
    "rl.steps": 6,
    "rl.prompts_per_step": 3,
    "rl.samples_per_prompt": 2,
    "rl.updates_per_rollout": 1,
    "rollout.partial": True,
    "rollout.oversampling": 2.0,
    "rollout.slots": 4,
    "rollout.max_prompt_length": 8,
    "rollout.max_response_length": 8,
    "length_buckets": [16],
    "evaluate.every": 0,
    "evaluate.problems": 2,
    "checkpoint.every": 3,
    "run.report": False,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Of 14 rows one is no problem, two are too long, and one is held out."""
    folder = tmp_path_factory.mktemp("data")
    rows = [{"problem": f"{n}+{n}?", "answer": str(2 * n)} for n in range(10, 21)]
    rows[3:3] = [{"problem": "no answer?"}]
    long = ["".join(random.Random(seed).choices("0123456789+-", k=200)) for seed in (1, 2)]
    rows += [{"problem": text, "answer": "1"} for text in long]
    lines = [json.dumps(row) for row in rows]
    (folder / "train.jsonl").write_text("\n".join(lines))
    (folder / "eval.jsonl").write_text(json.dumps({"problem": "20+20?", "answer": "40"}))
    return {
        "task.math.train": str(folder / "train.jsonl"),
        "task.math.eval": [str(folder / "eval.jsonl")],
    }


def lines_of(folder):
    """RL's lines of metrics, without those that go by a clock."""
    return [
        {k: v for k, v in line.items() if not k.startswith(("time/", "throughput/", "overlap/"))}
        for line in load_metrics(folder / "metrics.jsonl")
        if line["phase"] == "rl"
    ]


def test_a_run_counts_what_it_leaves_out_and_goes_on_with_the_same_data_only(files, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = OPTIONS | files
    train("countdown-tiny", options | {"run.dir": str(whole)}, quiet=True)
    shutil.copytree(whole, broken)  # as if it had died after step 3
    shutil.rmtree(broken / CHECKPOINTS / "6")
    summary = json.loads((broken / "summary.json").read_text())
    assert set(summary["data"]) == {
        f"math: {name}"
        for name in ("task.math.train", "task.math.eval", "task.math.template", "order")
    }
    other = tmp_path / "moved.jsonl"
    text = (tmp_path / files["task.math.train"]).read_text()
    again = {"run.dir": str(broken), "task.math.train": str(other)}
    other.write_text(text.replace("no answer", "No answer"))
    with pytest.raises(UserError, match=r"^data: math: task\.math\.train is not what the run was"):
        train(None, again, resume=True, quiet=True)
    other.write_text(text)  # the same data under another name
    train(None, again, resume=True, quiet=True)
    found = lines_of(whole)
    assert found == lines_of(broken)
    positions = [line["data/epoch"] * ROWS for line in found]
    np.testing.assert_allclose(positions, np.round(positions), atol=1e-9)
    assert positions == sorted(positions) and positions[-1] > ROWS  # into the second epoch
    rows = sum(line["data/dropped_rows"] for line in found)
    overlong = sum(line["data/dropped_prompts"] for line in found)
    epochs = positions[-1] / ROWS
    assert 2 * int(epochs) <= rows <= 2 * (int(epochs) + 1)
    assert 2 * int(epochs) <= overlong <= 2 * (int(epochs) + 1)
    carried = found[-1]["rollout/carried"] / 2
    assert round(positions[-1]) - rows - overlong == 6 * 3 + carried
