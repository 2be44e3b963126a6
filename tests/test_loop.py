"""Whole runs: they learn, resume bit for bit, stop cleanly, and leave what they promise."""

import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deltal_jax import Reward, TrainingError, train
from deltal_jax.cli.main import main
from deltal_jax.config import load_config
from deltal_jax.errors import UserError
from deltal_jax.metrics import load_metrics
from deltal_jax.training.collect import RolloutStream
from deltal_jax.training.objective import make_loss
from deltal_jax.training.policy import rollout_logprobs, update_policy
from deltal_jax.training.run_folder import load_run_config
from deltal_jax.training.setup import init_params, make_engine, make_setup
from deltal_jax.training.step import Update

#: Two numbers, one layer: learns in seconds, on the same code path as the real experiment.
SMALL = {
    "task.countdown.numbers": 2,
    "task.countdown.max_number": 5,
    "task.countdown.max_value": 25,
    "model.layers": 1,
    "model.d_model": 32,
    "model.head_dim": 16,
    "model.d_ff": 64,
    "length_buckets": [24, 56],
    "rollout.max_prompt_length": 7,
    "rollout.max_response_length": 48,
    "rollout.slots": 8,
    "sft.tokens_per_batch": 480,
    "rl.tokens_per_microbatch": 480,
    "evaluate.problems": 64,
}
#: Every switch that adds state or order: mini-batches, epochs, recomputed log-probabilities, a
#: reference model. Few shapes, so soon compiled.
RESUMABLE = SMALL | {
    "length_buckets": [56],
    "rl.tokens_per_microbatch": 168,
    "rl.pack": True,
    "sft.steps": 3,
    "sft.log_every": 1,
    "rl.steps": 4,
    "rl.prompts_per_step": 4,
    "rl.samples_per_prompt": 4,
    "rl.updates_per_rollout": 2,
    "rl.epochs_per_rollout": 2,
    "objective.old_logprobs": "recompute",
    "objective.importance_correction": "token_truncate",
    "objective.scope": "minibatch",
    "objective.kl_coefficient": 0.05,
    "objective.entropy_coefficient": 0.01,
    "evaluate.every": 2,
    "evaluate.problems": 16,
    "run.report": False,
}

#: What a run needs not do for laws of something else.
NO_MORE = {"sft.steps": 0, "evaluate.every": 0, "rl.epochs_per_rollout": 1}


def length_reward(prompts, responses, answers):
    """Differs within every group, so that an untrained model has something to learn from."""
    return [len(response) / 10 for response in responses]


#: Metrics that no two runs share.
CLOCKS = ("time/", "throughput/", "overlap/")


def timeless(path):
    """Metric lines without clocks."""
    lines = load_metrics(path / "metrics.jsonl")
    return [{k: v for k, v in x.items() if not k.startswith(CLOCKS)} for x in lines]


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """One short run of the real loop."""
    folder = tmp_path_factory.mktemp("learned") / "run"
    options = {
        "sft.steps": 400,
        "rl.steps": 40,
        "rl.optimizer.learning_rate": 1e-3,
        "evaluate.every": 0,
        "evaluate.problems": 256,
        "checkpoint.every": 15,
    }
    overrides = SMALL | options | {"run.dir": str(folder)}
    return train("countdown-tiny", overrides, quiet=True)


def test_a_short_run_learns(learned):
    """The gain in accuracy is over four standard errors of its difference: no luck."""
    lines = load_metrics(learned.run_dir / "metrics.jsonl")
    accuracies = [x["accuracy/mean"] for x in lines if x["phase"] == "rl"]
    before, after = np.mean(accuracies[:5]), np.mean(accuracies[-10:])
    error = math.sqrt(before * (1 - before) / (5 * 128) + after * (1 - after) / (10 * 128))
    assert after - before > 4 * error
    assert learned.after["avg_at_k"] > learned.before["avg_at_k"]
    losses = [x["sft/loss"] for x in lines if x["phase"] == "sft"]
    assert losses[-1] < 0.7 * losses[0]


def test_the_run_folder_holds_what_it_promises(learned):
    folder = learned.run_dir
    assert learned.status == "done" and learned.step == 40
    assert learned.monotonicity == {"countdown": None}  # two evaluations have no order
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["monotonicity"] == learned.monotonicity and "loss = " in summary["formula"]
    assert learned.report == folder / "report.html" and learned.report.stat().st_size > 20_000
    assert (folder / "config.yaml").is_file()
    assert list((folder / "tensorboard").glob("events*"))
    assert sorted(p.name for p in (folder / "checkpoints").iterdir() if p.name.isdigit()) == [
        "430",
        "440",
    ]
    table = (folder / "samples" / "step-000040.md").read_text().splitlines()
    assert len(table) == 2 + 16
    rows = [
        json.loads(x) for x in (folder / "samples" / "step-000040.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 256
    assert np.mean([row["correct"] for row in rows]) == pytest.approx(learned.after["avg_at_k"])


def evaluated(capsys, *arguments):
    assert main(["evaluate", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def figures(metrics):
    """Those of the task, as `before` and `after` have them."""
    return {k.split("/", 2)[2]: v for k, v in metrics.items() if k.startswith("eval/")}


def test_a_run_and_its_export_are_evaluated_as_the_run_did(learned, tmp_path, capsys):
    """The same problems and random numbers: the same figures, responses and files."""
    found = evaluated(capsys, learned.run_dir)
    assert found["step"] == 40 and figures(found) | {"step": 40} == learned.after
    assert found["monotonicity"] == {"countdown": None}  # of two evaluations
    kept = learned.run_dir / "evaluations" / "step-000040.json"
    settings = {
        "seed": None,
        "evaluate": dataclasses.asdict(load_run_config(kept.parents[1]).evaluate),
    }
    assert json.loads(kept.read_text()) | settings == json.loads(kept.read_text())
    assert figures(json.loads(kept.read_text())) == figures(found)
    told = learned.run_dir / "samples" / "step-000040.jsonl"
    assert kept.with_suffix(".jsonl").read_bytes() == told.read_bytes()
    folder = tmp_path / "exported"
    command = ["export", str(learned.run_dir), "--to", str(folder), "--dtype", "float32"]
    assert main(command) == 0
    capsys.readouterr()
    shape = ("task.", "rollout.", "length_buckets")
    items = [f"{k}={v}" for k, v in SMALL.items() if k.startswith(shape)]
    options = ["--config", "countdown-tiny", *items, "evaluate.problems=256"]
    exported = evaluated(capsys, folder, *options, "--to", tmp_path / "results")
    assert figures(exported) == figures(found) and exported["step"] is None
    names = {path.name for path in (tmp_path / "results").iterdir()}
    assert names == {"model.json", "model.jsonl", "model.md"}
    assert (tmp_path / "results" / "model.jsonl").read_bytes() == told.read_bytes()


def test_several_checkpoints_are_evaluated_at_once(learned, tmp_path, capsys):
    options = ["evaluate.problems=32", "evaluate.samples_per_problem=4", "--to", tmp_path]
    both = evaluated(capsys, learned.run_dir, "--step", "all", *options)["evaluations"]
    assert [found["step"] for found in both] == [30, 40]
    assert both[0]["eval/countdown/k"] == 4
    alone = evaluated(capsys, learned.run_dir, "--step", "30", *options)
    assert {k: alone[k] for k in both[0]} == both[0] != both[1]
    assert {path.name for path in tmp_path.glob("*.json")} == {
        "step-000030.json",
        "step-000040.json",
    }


EVALUATE_REFUSALS = {
    "step": (["--step", "7"], r"--step: .* has no checkpoint after RL step 7, but after 30, 40;"),
    "words": (
        ["task.countdown.max_value=30"],
        "task.countdown.max_value: the model's tokenizer has no '26', a word of that task;",
    ),
    "config": (["--config", "countdown-tiny"], "--config: .* is a run, which has its own"),
    "to": (["--to", "/dev/null/x"], "--to: cannot write to /dev/null/x: Not a directory"),
}


@pytest.mark.parametrize("case", EVALUATE_REFUSALS)
def test_what_cannot_be_evaluated_is_refused_in_one_line(case, learned, capsys):
    arguments, said = EVALUATE_REFUSALS[case]
    assert main(["evaluate", str(learned.run_dir), *arguments]) == 2
    out, err = capsys.readouterr()
    assert re.match(f"deltal: {said}", err) and err.count("\n") == 1 and not out


def test_metric_lines_have_the_standard_names(learned):
    lines = load_metrics(learned.run_dir / "metrics.jsonl")
    assert [x["step"] for x in lines if x["phase"] == "rl"] == list(range(1, 41))
    assert [x["step"] for x in lines if x["phase"] == "eval"] == [0, 40]
    names = """reward/mean reward/std reward/frac_zero_std length/mean length/min length/max
        length/p5 length/p50 length/p95 length/truncated_frac length/correct_mean length/wrong_mean
        advantage/mean advantage/min advantage/max policy/loss policy/entropy policy/approx_kl
        policy/clip_frac_low policy/clip_frac_high policy/ratio_max mismatch/logprob_diff_mean
        mismatch/logprob_diff_max mismatch/kl optim/lr optim/grad_norm optim/update_norm
        aggregation/weight_min aggregation/weight_max aggregation/ess aggregation/bias_factor
        aggregation/predicted_cv time/rollout time/reward time/old_logprob time/update
        time/checkpoint throughput/tokens_per_s throughput/padding_frac rollout/utilization
        rollout/utilization_queued rollout/utilization_ideal"""
    last = next(x for x in reversed(lines) if x["phase"] == "rl")
    assert set(names.split()) <= set(last)
    evaluation = lines[-1]
    for name in "avg_at_k pass_at_k maj_at_k length truncated_frac distinct missing_frac".split():
        assert f"eval/countdown/{name}" in evaluation
    assert last["aggregation/bias_factor"] == pytest.approx(1.0, abs=1e-5)
    assert last["mismatch/logprob_diff_max"] < 1e-4
    assert last["policy/ratio_max"] == pytest.approx(1.0, abs=1e-4)
    assert last["optim/lr"] == pytest.approx(1e-3)


def test_a_resumed_run_refuses_what_would_change_it(tmp_path):
    folder = tmp_path / "run"
    options = RESUMABLE | {"run.dir": str(folder), "rl.steps": 0, "sft.steps": 1}
    train("countdown-tiny", options, quiet=True)
    with pytest.raises(UserError, match=r"objective\.alpha: .* 1\.0 .* 0\.5"):
        train(None, {"run.dir": str(folder), "objective.alpha": 0.5}, resume=True, quiet=True)
    with pytest.raises(UserError, match="exists already"):
        train("countdown-tiny", options, quiet=True)


def test_user_rewards_replace_the_verifier_and_missing_ones_are_left_out(tmp_path):
    seen = {}

    def brevity(prompts, responses, answers):
        assert len(prompts) == len(responses) == len(answers) == 16
        seen["answer"] = answers[0]
        return [None if i == 3 else -len(r) / 100 for i, r in enumerate(responses)]

    folder = tmp_path / "run"
    train(
        "countdown-tiny",
        RESUMABLE | NO_MORE | {"run.dir": str(folder), "rl.steps": 1},
        rewards=[Reward(brevity, weight=2.0), "task"],
        quiet=True,
    )
    (line,) = (x for x in load_metrics(folder / "metrics.jsonl") if x["phase"] == "rl")
    assert set(seen["answer"]) == {"numbers", "target"}
    assert line["reward/missing"] == 1
    assert line["reward/brevity/mean"] < 0 <= line["reward/countdown/mean"]
    assert line["reward/mean"] < line["reward/brevity/mean"] + 1


def test_steps_that_are_not_finite_stop_the_run_and_are_named(tmp_path):
    options = RESUMABLE | {
        "run.dir": str(tmp_path / "run"),
        "rl.optimizer.learning_rate": 1e30,
        "rl.optimizer.clip_norm": None,
        "rl.optimizer.warmup_steps": 0,
    }
    with pytest.raises(
        TrainingError, match=r"RL step 1: update 4: .*; 4 in a row, .* last good checkpoint: 3 "
    ):
        train("countdown-tiny", options, rewards=[length_reward], quiet=True)


def test_a_run_cannot_be_resumed_with_other_rewards(tmp_path):
    options = RESUMABLE | NO_MORE | {"run.dir": str(tmp_path / "run"), "rl.steps": 0}
    train("countdown-tiny", options, rewards=[length_reward], quiet=True)
    before = (tmp_path / "run" / "config.yaml").read_text()
    again = {"run.dir": str(tmp_path / "run"), "rl.steps": 1}
    with pytest.raises(UserError, match=r"started with \['1 \* length_reward'\] .* \['task'\]"):
        train(None, again, resume=True, quiet=True)
    assert (tmp_path / "run" / "config.yaml").read_text() == before
    assert train(None, again, rewards=[length_reward], resume=True, quiet=True).step == 1


def test_demonstrations_that_fit_no_bucket_end_the_run_with_the_field(tmp_path):
    options = RESUMABLE | {"run.dir": str(tmp_path / "run"), "length_buckets": [10]}
    with pytest.raises(UserError, match="length_buckets: 10000 demonstrations in a row"):
        train("countdown-tiny", options | {"rollout.max_response_length": 3}, quiet=True)


#: One rollout of a tiny model; one shape of 16 rows for all of it.
ONCE = SMALL | {
    "model.d_model": 16,
    "model.head_dim": 8,
    "model.d_ff": 16,
    "length_buckets": [56],
    "rl.tokens_per_microbatch": 16 * 56,
    "rl.prompts_per_step": 4,
    "rl.samples_per_prompt": 4,
    "objective.aggregation": "token_mean",
    "objective.old_logprobs": "recompute",
}
#: A step so small that every update of a rollout sees the same policy.
STILL = 1e-9


def once(**changes):
    return load_config(
        "countdown-tiny", ONCE | {k.replace("__", "."): v for k, v in changes.items()}
    )


@pytest.fixture(scope="module")
def sampled():
    """A setup, its parameters and a graded rollout of theirs."""
    setup = make_setup(once())
    params = init_params(setup, jax.random.key(1))
    params = jax.tree.map(lambda x: x * 1.5 if x.ndim > 1 else x, params)
    engine = make_engine(setup, temperature=1.0)
    key = jax.random.key(0, impl="threefry2x32")
    stream = RolloutStream(setup, engine, key, [Reward(length_reward)])
    return setup, params, stream.next(params, 0)


@pytest.fixture(scope="module")
def plain(sampled):
    return Update(sampled[0].graphdef, optax.sgd(STILL), make_loss(once()))


def updated(sampled, update, config, reference=None, batch=None):
    """The state after all updates on the rollout, and the metrics without clocks."""
    setup, params, sampled_batch = sampled
    setup = dataclasses.replace(setup, config=config)
    params, reference = jax.tree.map(jnp.copy, (params, reference))  # the state is donated
    state = update.init(params, jax.random.key(0))
    state = dataclasses.replace(state, reference=reference)
    state, metrics = update_policy(setup, update, state, batch or sampled_batch)
    clocks = ("time/", "throughput/")
    return state, {k: v for k, v in metrics.items() if not k.startswith(clocks)}


@pytest.mark.parametrize("pack", [False, True])
def test_recomputed_logprobs_are_the_samplers_on_policy(sampled, plain, pack):
    _, params, batch = sampled
    layout = {"edges": (56,), "tokens_per_microbatch": 16 * 56, "pack": pack}
    found = rollout_logprobs(plain, params, batch.rollout, **layout)
    mask = batch.rollout.loss_mask
    np.testing.assert_allclose(found[mask], batch.rollout.logprobs[mask], atol=1e-4)
    assert np.all(found[~mask] == 0) and np.mean(found[mask]) < -0.5
    metrics = updated(sampled, plain, once(rl__pack=pack))[1]
    difference = np.abs(found - batch.rollout.logprobs)[mask]
    assert metrics["mismatch/logprob_diff_max"] == pytest.approx(difference.max(), rel=1e-3)
    assert metrics["mismatch/ess"] == pytest.approx(1.0, abs=1e-4)
    assert metrics["mismatch/dropped_frac"] == 0.0


def test_no_mismatch_is_reported_where_the_sampler_draws_among_fewer_tokens(sampled, plain):
    full, filtered = (updated(sampled, plain, once(rollout__top_p=p))[1] for p in (1.0, 0.9))
    gone = {name for name in full if name.startswith("mismatch/")}
    assert len(gone) == 5 and filtered == {k: v for k, v in full.items() if k not in gone}


def test_packing_changes_no_metric_and_no_gradient(sampled, plain):
    padded, packed = (updated(sampled, plain, once(rl__pack=pack))[1] for pack in (False, True))
    assert abs(padded["policy/loss"]) > 1e-3 and padded["optim/grad_norm"] > 1e-3
    exact = {k: v for k, v in padded.items() if not k.startswith("mismatch/")}
    found = {k: v for k, v in packed.items() if not k.startswith("mismatch/")}
    assert found == pytest.approx(exact, rel=1e-5, abs=1e-5)


def test_minibatches_and_epochs_are_that_many_updates_and_average_to_the_batch(sampled, plain):
    """Each mini-batch's loss estimates that of the batch: their mean is equal to it."""
    whole_state, whole = updated(sampled, plain, once())
    state, metrics = updated(
        sampled, plain, once(rl__updates_per_rollout=2, rl__epochs_per_rollout=2)
    )
    assert (int(whole_state.updates), int(state.updates)) == (1, 4)
    assert metrics["policy/loss"] == pytest.approx(whole["policy/loss"], rel=1e-5)
    for name in ("policy/entropy", "policy/approx_kl", "mismatch/kl", "aggregation/ess"):
        assert metrics[name] == pytest.approx(whole[name], rel=1e-5, abs=1e-6)
    assert metrics["optim/grad_norm"] > whole["optim/grad_norm"]  # halves differ: triangle


def test_the_kl_is_zero_and_moves_nothing_until_the_policy_leaves_its_reference(sampled, plain):
    setup, params, _ = sampled
    config = once(objective__kl_coefficient=0.5)
    update = Update(setup.graphdef, optax.sgd(STILL), make_loss(config))
    without = updated(sampled, plain, once())[1]
    at_start = updated(sampled, update, config, reference=params)[1]
    assert at_start["policy/kl"] == pytest.approx(0.0, abs=1e-9)
    assert at_start["policy/loss"] == pytest.approx(without["policy/loss"], rel=1e-5)
    assert at_start["optim/grad_norm"] == pytest.approx(without["optim/grad_norm"], rel=1e-5)
    elsewhere = jax.tree.map(lambda x: x * 0.9, params)
    moved = updated(sampled, update, config, reference=elsewhere)[1]
    assert moved["policy/kl"] > 1e-4
    # Both are token means here, so the loss grows by exactly the coefficient times the meter.
    growth = moved["policy/loss"] - without["policy/loss"]
    assert growth == pytest.approx(0.5 * moved["policy/kl"], rel=1e-3)
    assert abs(moved["optim/grad_norm"] - without["optim/grad_norm"]) > 1e-4


def test_the_entropy_bonus_raises_the_entropy(sampled):
    """With equal rewards there is no other force."""
    setup, _, batch = sampled
    config = once(objective__entropy_coefficient=1.0)
    setup = dataclasses.replace(setup, config=config)
    update = Update(setup.graphdef, optax.sgd(0.02), make_loss(config))
    equal = dataclasses.replace(batch, rewards=np.ones_like(batch.rewards))
    state = update.init(jax.tree.map(jnp.copy, sampled[1]), jax.random.key(0))
    entropies = []
    for _ in range(4):
        state, metrics = update_policy(setup, update, state, equal)
        entropies.append(metrics["policy/entropy"])
        assert metrics["policy/loss"] == pytest.approx(-metrics["policy/entropy"], rel=1e-4)
    assert np.all(np.diff(entropies) > 0) and entropies[-1] > entropies[0] + 0.02
