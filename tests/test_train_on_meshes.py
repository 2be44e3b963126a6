"""Whole runs on meshes and on two processes: those of one device, and resumed bit for bit."""

import json
from pathlib import Path

import numpy as np
import pytest

from deltal_jax import Reward, train
from deltal_jax.cli.main import main
from deltal_jax.config import ModelConfig, load_config
from deltal_jax.config.rules import SHAPE
from deltal_jax.errors import UserError
from deltal_jax.guard.dumps import DUMPS, load_dump
from deltal_jax.guard.replay import replay
from deltal_jax.parallel.processes import gather, is_first, on_first
from deltal_jax.training.setup import init_params, make_setup, make_update
from deltal_jax.training.sft import demonstration_batches
from deltal_jax.training.trained import ONE_DEVICE, root_key
from tests import fakes, small_tokenizers
from tests.processes import run_processes
from tests.runs import TINY, assert_same, copied, mixed_reward, timeless
from tests.test_resume import rough_reward

#: What a step may have beside: a reference model, recomputed log-probabilities, mini-batches.
OPTIONS = TINY | {
    "model.compute_dtype": "float32",
    "rollout.slots": 8,
    "sft.steps": 0,
    "rl.steps": 2,
    "rl.updates_per_rollout": 2,
    "objective.old_logprobs": "recompute",
    "objective.kl_coefficient": 0.05,
    "rl.optimizer.warmup_steps": 0,
    "evaluate.every": 0,
    "guard.dump_steps": [1, 2],
}
#: All axes but data, which DATA has.
ALL = {"mesh.fsdp": 2, "mesh.context": 2, "mesh.tensor": 2}
AHEAD = {"rollout.ahead": 1, "objective.importance_correction": "token_truncate"}
DATA = ONE_DEVICE | {"mesh.data": 8}


def run_on(folder, mesh, **options):
    """A run, or the rest of one; the responses that it was rewarded for, in their order."""
    seen = []

    def watched(prompts, responses, answers):
        seen.append(responses)
        return mixed_reward(prompts, responses, answers)

    name = None if options.get("resume") else "countdown-tiny"
    settings = mesh | {"run.dir": str(folder)} | ({} if name is None else OPTIONS)
    train(name, settings, rewards=[Reward(watched)], **({"quiet": True} | options))
    return seen


def assert_close(folder, one):
    """Losses and gradients to rounding; in which slot what was sampled is another matter."""
    lines, want = timeless(folder), timeless(one)
    assert [(x["phase"], x["step"]) for x in lines] == [(x["phase"], x["step"]) for x in want]
    for line, other in zip(lines, want, strict=True):
        for name in ("policy/loss", "optim/grad_norm", "policy/kl", "length/mean"):
            if name in other:
                assert line[name] == pytest.approx(other[name], rel=1e-5, abs=1e-7), name
                assert name == "policy/kl" or other[name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("meshes")


@pytest.fixture(scope="module")
def responses(folder):
    """Of runs on one device and on all axes of a mesh; they are in folders of these names."""
    return {"one": run_on(folder / "one", {}), "all": run_on(folder / "all", ALL)}


def test_a_run_on_a_mesh_is_that_of_one_device(responses, folder):
    assert responses["all"] == responses["one"]
    assert_close(folder / "all", folder / "one")


def test_a_run_on_a_mesh_is_resumed_bit_for_bit(responses, folder):
    resumed = copied(folder / "all", folder / "resumed", 1)
    assert run_on(resumed, {}, resume=True) == responses["all"][1:]
    assert_same(resumed, folder / "all")


def test_a_run_may_go_on_on_another_mesh_and_says_so(responses, folder, capfd):
    moved = copied(folder / "all", folder / "moved", 0)
    assert run_on(moved, DATA, resume=True, quiet=False) == responses["one"]
    said = "mesh: data 8: 8 devices, before fsdp 2 × context 2 × tensor 2: 8 devices; equal to"
    assert said in capfd.readouterr().err
    assert_close(moved, folder / "one")


#: What one step leaves to the next, on a mesh beside devices that sample.
ADAPTERS = TINY | {f"model.{name}": getattr(ModelConfig(), name) for name in SHAPE}
ADAPTERS |= {
    "mesh.data": 2,
    "mesh.fsdp": 2,
    "rollout.devices": 4,
    "rollout.slots": 8,
    "rollout.dynamic_sampling": "reward",
    "rollout.oversampling": 2.0,
    "rollout.partial": True,
    "rollout.max_prompt_length": 28,
    "length_buckets": [36],
    "rl.tokens_per_microbatch": 144,
    "rl.steps": 3,
    "rl.optimizer.learning_rate": 1e-2,
    "sft.steps": 0,
    "evaluate.every": 0,
    "lora.rank": 2,
}


def test_adapters_of_a_model_in_parts_sampled_elsewhere_are_resumed_bit_for_bit(tmp_path):
    model, whole = tmp_path / "model", tmp_path / "whole"
    small_tokenizers.write_folder(model, "qwen")
    shape = {"vocab_size": 600, "num_hidden_layers": 1}
    fakes.write_checkpoint(model, fakes.CONFIGS["qwen2"] | shape)
    options = ADAPTERS | {"model.path": str(model), "run.dir": str(whole)}
    train("countdown-tiny", options, rewards=[Reward(rough_reward)], quiet=True)
    resumed = copied(whole, tmp_path / "resumed", 1)
    again = {"run.dir": str(resumed)}
    train(None, again, rewards=[Reward(rough_reward)], resume=True, quiet=True)
    assert_same(resumed, whole)
    lines = [x for x in timeless(whole) if x["phase"] == "rl"]
    assert lines[1]["rollout/stale_frac"] > 0 and all(x["optim/grad_norm"] for x in lines)


def test_a_step_is_replayed_bit_for_bit_on_its_mesh_and_nowhere_else(responses, folder, capsys):
    dump = str(folder / "all" / DUMPS / "step-000002-update-1")
    assert main(["debug", "replay", dump]) == 0
    assert "figures are bit for bit those recorded" in capsys.readouterr().out
    for mesh, said in ((ONE_DEVICE, "one device"), (DATA, "data 8: 8 devices")):
        found = load_dump(Path(dump), mesh)
        assert found.inexact == f"on {said}, and not on fsdp 2 × context 2 × tensor 2: 8 devices,"
        pairs = [pair for pair in replay(found).figures.values() if pair[0] is not None]
        was, now = np.asarray(pairs).T
        np.testing.assert_allclose(now, was, rtol=1e-4, atol=1e-6)


def test_a_warm_up_step_on_a_mesh_is_that_of_one_device():
    """Its rows, which the mesh does not divide, are filled up with empty ones."""
    found = []
    for mesh in ({}, {"mesh.data": 2, "mesh.fsdp": 2, "mesh.context": 2}):
        options = OPTIONS | mesh | {"sft.steps": 1, "sft.tokens_per_batch": 6 * 16}
        setup = make_setup(load_config("countdown-tiny", options))
        update = make_update(setup, "sft")
        rows = update.row_multiple
        batch = next(demonstration_batches(setup.config, setup.task, setup.tokenizer, rows))
        state = update.init(init_params(setup, root_key(3)), root_key(4))
        _, metrics = update.single(state, update.place(batch))
        found.append((batch, {name: float(value) for name, value in metrics.items()}))
    (alone, want), (padded, metrics) = found
    assert len(alone.tokens) == 6 and len(padded.tokens) == 8
    np.testing.assert_array_equal(padded.tokens[:6], alone.tokens)
    assert metrics == pytest.approx(want, rel=1e-5)


def in_two_processes(folder):
    """In each: a whole run, whose steps are kept for replay, and one that is resumed after its
    first step."""
    whole, resumed = Path(folder) / "whole", Path(folder) / "resumed"
    seen = [run_on(whole, {})]
    on_first(lambda: str(copied(whole, resumed, 1)))
    seen.append(run_on(resumed, {}, resume=True))
    shares = gather(seen)
    return {"seen": np.asarray(json.dumps(shares)), "first": is_first()}


def test_two_processes_run_and_resume_as_one_does(responses, folder, tmp_path):
    target = "tests.test_train_on_meshes:in_two_processes"
    results = run_processes(target, count=2, folder=str(tmp_path), timeout=300.0)
    assert [bool(result["first"]) for result in results] == [True, False]
    assert_close(tmp_path / "whole", folder / "one")
    assert_same(tmp_path / "resumed", tmp_path / "whole")
    assert len(list((tmp_path / "whole" / "dumps").glob("*/record.json"))) == 2
    whole, resumed = zip(*json.loads(str(results[0]["seen"])), strict=True)
    assert list(resumed) == [steps[1:] for steps in whole]
    # Prompts are dealt out in turn, with the four responses to each.
    for step, sampled in enumerate(responses["one"]):
        shares = [share[step] for share in whole]
        groups = [part[at : at + 4] for at in (0, 4) for part in shares]
        assert [text for part in groups for text in part] == sampled


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mesh.fsdp": 3}, r"mesh: .* does not multiply to the 8 devices; set one of them to -1"),
        ({"mesh.data": 0}, r"mesh\.data: a size is 1 or more, or -1 for the rest, got 0"),
        (
            {"mesh.data": -1, "mesh.fsdp": -1},
            "mesh: only one of data, fsdp, tensor and context may be -1",
        ),
        ({"mesh.fsdp": 8, "rollout.slots": 4}, r"rollout\.slots: 4 do not split over .* 8 dev"),
        ({"mesh.context": 8, "rollout.slots": 4}, r"rollout\.slots: 4 do not .* × context$"),
        ({"mesh.auto": True, "mesh.fsdp": 8}, r"mesh\.auto: chooses all sizes; leave out mesh\.fs"),
        ({"mesh.auto": True} | AHEAD, r"rollout\.ahead: .* rollout\.devices of its own"),
        ({"mesh.fsdp": 8} | AHEAD, r"rollout\.ahead: .* rollout\.devices of its own"),
        ({"mesh.fsdp": 8, "rollout.devices": 8}, r"rollout\.devices: 8 of 8 .* at most 7"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_in_one_line(options, said, tmp_path):
    options = OPTIONS | options | {"run.dir": str(tmp_path / "run")}
    with pytest.raises(UserError, match=f"^{said}") as refused:
        train("countdown-tiny", options, quiet=True)
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()
