"""2N steps are N steps, a resume and N more, bit for bit, wherever a run stops."""

import functools
import hashlib
import json
import shutil
import signal
import time

import numpy as np
import pytest

import deltal_jax.training.loop
from deltal_jax import Reward, train
from deltal_jax.checkpoints.reader import SavedSteps
from deltal_jax.config import ModelConfig
from deltal_jax.config.rules import SHAPE
from deltal_jax.guard import signals
from deltal_jax.metrics import MetricsWriter, load_metrics
from deltal_jax.tasks.math import task as math
from deltal_jax.tasks.workers import Limits
from deltal_jax.training.run_folder import CHECKPOINTS, VERDICTS
from tests import fakes, small_tokenizers
from tests.runs import TINY, arrays_saved, assert_same, copied, mixed_reward, timeless

REWARDS = [Reward(mixed_reward)]
#: Mini-batches, epochs, recomputed log-probabilities and a reference model; parameters and moments
#: that are rounded by chance.
UPDATES = TINY | {
    "sft.steps": 3,
    "rl.updates_per_rollout": 2,
    "rl.epochs_per_rollout": 2,
    "rl.optimizer.moment_dtype": "bfloat16",
    "rl.optimizer.learning_rate": 1e-2,
    "model.param_dtype": "bfloat16",
    "objective.old_logprobs": "recompute",
    "objective.kl_coefficient": 0.05,
    "objective.entropy_coefficient": 0.01,
}
#: What a step leaves to the next: responses that have begun, and a batch sampled ahead.
LEAVING = TINY | {
    "rollout.dynamic_sampling": "reward",
    "rollout.oversampling": 2.0,
    "rollout.partial": True,
    "rl.optimizer.learning_rate": 1e-2,
}


def rough_reward(prompts, responses, answers):
    """Equal within some groups and not in others."""
    return [float(sum(map(ord, response)) % 2) * (len(response) > 12) for response in responses]


def interrupt_after(monkeypatch, phase, step):
    """A real signal, as soon as this line of metrics is written: the run does one more step."""
    write = MetricsWriter.write

    def written(self, at, name, metrics):
        write(self, at, name, metrics)
        if (name, at) == (phase, step):
            signal.raise_signal(signal.SIGINT)
            while signals._listening[0].asked_by is None:  # a thread hears it
                time.sleep(0.001)

    monkeypatch.setattr(MetricsWriter, "write", written)


@pytest.fixture
def trained(monkeypatch):
    """A digest of every rollout that is trained on, by the number of updates before it."""
    update, seen = deltal_jax.training.loop.update_policy, {}

    def recorded(setup, compiled, state, batch, *watch):
        digest = hashlib.sha256()
        for array in (batch.positions, batch.rewards, *vars(batch.rollout).values()):
            digest.update(np.ascontiguousarray(array).tobytes())
        seen.setdefault(int(state.updates), []).append(digest.hexdigest())
        return update(setup, compiled, state, batch, *watch)

    monkeypatch.setattr(deltal_jax.training.loop, "update_policy", recorded)
    return seen


def go_on(folder, rewards=REWARDS, **overrides):
    return train(
        None, {"run.dir": str(folder)} | overrides, rewards=rewards, resume=True, quiet=True
    )


def assert_resumes(whole, folder, points, trained, **options):
    """From each of these checkpoints the run becomes the whole one again, and of each rollout there
    was only one."""
    first = {updates: list(digests) for updates, digests in trained.items()}
    for number in points:
        go_on(copied(whole, folder, number), **options)
        assert_same(folder, whole)
    assert len(first) == 4 and all(len(digests) == 1 for digests in first.values())
    assert all(len(set(digests)) == 1 for digests in trained.values())
    assert max(map(len, trained.values())) == 1 + len(points)


def test_updates_over_the_same_rollout(tmp_path, trained, monkeypatch):
    """From between warm-up and RL, and from within RL; stopped in the warm-up and after half of the
    steps."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train("countdown-tiny", UPDATES | {"run.dir": str(whole)}, rewards=REWARDS, quiet=True)
    assert_resumes(whole, broken, [3, 6], trained)
    halves = tmp_path / "halves"
    with monkeypatch.context() as patched:
        interrupt_after(patched, "sft", 1)
        options = UPDATES | {"run.dir": str(halves), "rl.steps": 2}
        stopped = train("countdown-tiny", options, rewards=REWARDS, quiet=True)
    assert stopped.status == "interrupted" and len(timeless(halves)) == 2
    assert go_on(halves).step == 2
    resumed = go_on(halves, **{"rl.steps": 4})
    assert resumed.step == 4 and resumed.status == "done"
    assert_same(halves, whole)
    start, end = arrays_saved(whole, 3), arrays_saved(whole, 7)
    kept = {name for name in start if "reference" in name}
    assert kept and all(start[name].tobytes() == end[name].tobytes() for name in kept)
    weights = [name for name in start if name.startswith(".params")]
    assert {str(end[name].dtype) for name in weights} == {"bfloat16"}
    assert np.mean([np.mean(start[name] != end[name]) for name in weights]) > 0.5
    kl = [x["policy/kl"] for x in load_metrics(whole / "metrics.jsonl") if x["phase"] == "rl"]
    assert min(kl) >= 0 and kl[0] < kl[-1] and kl[-1] > 1e-5


@pytest.mark.parametrize(
    ("options", "left"),
    [({}, {"carried"}), ({"rollout.ahead": 1}, {"carried", "pending"})],
    ids=["partial", "ahead"],
)
def test_what_was_sampled_and_not_trained_on(options, left, tmp_path, trained):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = LEAVING | options | {"run.dir": str(whole)}
    train("countdown-tiny", options, rewards=[Reward(rough_reward)], quiet=True)
    assert_resumes(whole, broken, [3, 5], trained, rewards=[Reward(rough_reward)])
    checkpoints = SavedSteps(whole / CHECKPOINTS)
    rollouts, position = checkpoints.read_rollouts(5), checkpoints.read_position(5)
    assert rollouts.keys() == left
    assert rollouts["carried"]["prompts"]["positions"][-1] == position.next_prompt - 1
    lines = [x for x in load_metrics(whole / "metrics.jsonl") if x["phase"] == "rl"]
    assert max(line["rollout/rounds"] for line in lines) > 1
    assert max(line["rollout/stale_frac"] for line in lines) > 0
    if "pending" in left:
        assert [line["rollout/staleness"] for line in lines] == [0, 1, 1, 1]
        assert max(line["mismatch/logprob_diff_max"] for line in lines[1:]) > 1e-4


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A small Qwen2, and 8 problems, which are two steps."""
    folder = tmp_path_factory.mktemp("files")
    small_tokenizers.write_folder(folder / "model", "qwen")
    config = fakes.CONFIGS["qwen2"] | {"vocab_size": 600, "num_hidden_layers": 1}
    fakes.write_checkpoint(folder / "model", config)
    for name, first, rows in (("train", 10, 8), ("eval", 20, 4)):
        lines = [{"problem": f"{n}+{n}?", "answer": str(2 * n)} for n in range(first, first + rows)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return {
        "task.name": "math",
        "task.math.verifier": "reference",
        "task.math.template": "plain",
        "task.math.workers": 1,
        "task.math.train": str(folder / "train.jsonl"),
        "task.math.eval": [str(folder / "eval.jsonl")],
        "model.path": str(folder / "model"),
        "lora.rank": 2,
        "lora.targets": ["q_proj", "down_proj"],
        "sft.steps": 0,
        "rl.optimizer.learning_rate": 1e-2,
    }


def test_adapters_files_and_verdicts_that_a_limit_would_cut_off(
    files, tmp_path, trained, monkeypatch
):
    """From within an epoch and from its end. Steps are also repeated with no time to judge: what
    was judged stays so."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = {k: v for k, v in TINY.items() if not k.startswith(("task.countdown.", "model."))}
    options |= {f"model.{name}": getattr(ModelConfig(), name) for name in SHAPE}
    options |= files | {"run.dir": str(whole)}
    rewards = ["task", Reward(mixed_reward)]
    train("countdown-tiny", options, rewards=rewards, quiet=True)
    epochs = [x["data/epoch"] for x in timeless(whole) if x["phase"] == "rl"]
    assert epochs == [0.5, 1.0, 1.5, 2.0]
    kept = {path.name.rsplit("-", 1)[0] for path in (whole / VERDICTS).iterdir()}
    # As the last save began, step 3 had the newest complete checkpoint, and step 2 the one before.
    assert kept == {"rl-000002", "eval-000002", "rl-000003", "rl-000004", "eval-000004"}
    assert all("missing_timeout" not in key for line in timeless(whole) for key in line)
    assert_resumes(whole, broken, [1, 2], trained, rewards=rewards)
    monkeypatch.setattr(math, "Limits", functools.partial(Limits, wall=1e-6))
    go_on(copied(whole, broken, 3), rewards=rewards)
    assert_same(broken, whole)
    shutil.rmtree(copied(whole, broken, 3) / VERDICTS)
    go_on(broken, rewards=rewards)
    assert timeless(broken)[-1]["eval/math/missing_timeout"] == 16  # there was no time indeed
