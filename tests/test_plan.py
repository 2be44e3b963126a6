"""What is planned before it is there, and what is not checked then."""

import json

import pytest

from deltal_jax.cli.main import main
from deltal_jax.config import load_config
from deltal_jax.errors import UserError
from deltal_jax.model.families import architecture_of
from deltal_jax.model.published import PUBLISHED
from deltal_jax.training import plan as module
from deltal_jax.training.describe import memory_estimate
from deltal_jax.training.plan import make_plan
from tests import fakes

MATH = {
    "task.name": "math",
    "task.math.train": "no/train.jsonl",
    "task.math.eval": ["data/sums-test.json", "no/test.jsonl"],
    "task.math.verifier": "reference",
}
AWAY = {"model.path": "Qwen/Qwen2.5-3B"}


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "is_here", lambda path, revision: (tmp_path / path).is_dir())


def plan_of(overrides):
    return make_plan(load_config("countdown-checkpoint", AWAY | overrides))


def test_a_published_model_that_is_not_here_is_planned_by_its_known_shape():
    plan = plan_of({})
    shape, known = plan.architecture, architecture_of(PUBLISHED["Qwen/Qwen2.5-3B"])
    assert (shape.layers, shape.d_model, shape.vocab) == (36, 2048, known.vocab)
    assert plan.notes == [
        "note: Qwen/Qwen2.5-3B is not here; its shape is known, a run fetches the rest"
    ]
    assert plan.task is not None


def test_files_of_problems_that_are_not_here_are_named_and_those_of_the_package_are_found():
    plan = plan_of(MATH)
    assert plan.task is None
    assert plan.notes[0] == "note: not here, so not checked: no/train.jsonl, no/test.jsonl"


def test_what_needs_none_of_it_is_checked_all_the_same():
    for overrides, said in (
        ({"rollout.max_response_length": 32_768}, r"^rollout.max_response_length: with the prom"),
        ({"objective.threshold": 0.5}, r"^objective.threshold: clipped does not take it"),
        ({"task.rewards": ["no.py:f"]}, r"^task.rewards: no file no.py$"),
    ):
        with pytest.raises(UserError, match=said):
            plan_of(overrides)


def test_devices_that_are_not_here_are_said():
    overrides = {"rollout.devices": 8, "rollout.slots": 8}
    said = "so their memory is not checked"
    assert plan_of(overrides).notes[1:] == [f"note: not 9 devices here, {said}"]
    overrides = {"mesh.data": 4, "mesh.fsdp": 4, "mesh.tensor": 2, "rollout.slots": 32}
    config = load_config("countdown-tiny", overrides)
    away, held = make_plan(config), ("parameters", "optimizer", "kv_cache")
    assert away.notes == [f"note: not 32 devices here, {said}"] and away.task is not None
    memory = memory_estimate(config, away.architecture, away.mesh)
    fewer = load_config("countdown-tiny", overrides | {"mesh.data": 1, "rollout.slots": 8})
    here = make_plan(fewer)  # the same for each device: data holds whole copies
    assert here.notes == [] and here.mesh.size == 8
    known = memory_estimate(fewer, here.architecture, here.mesh)
    assert [memory[part] for part in held] == [known[part] for part in held]
    one = memory_estimate(fewer, here.architecture)
    assert one["parameters"] > 4 * memory["parameters"] > 0
    with pytest.raises(UserError, match=r"^rollout.slots: 8 do not split over .* 16 devices"):
        make_plan(load_config("countdown-tiny", overrides | {"rollout.slots": 8}))
    rest = plan_of(overrides | {"mesh.fsdp": -1, "mesh.data": 8})
    assert rest.notes[1:] == [f"note: not 16 devices here, {said}; -1, the rest, counts as 1"]


def test_problems_that_are_missing_beside_a_checkpoint_that_is_here(tmp_path):
    fakes.write_checkpoint(
        tmp_path / "here", fakes.CONFIGS["qwen2"] | {"max_position_embeddings": 600}
    )
    plan = plan_of(MATH | {"model.path": "here"})
    assert plan.architecture.d_model == 32 and plan.task is None and len(plan.notes) == 1


def test_without_a_checkpoint_the_files_must_be_there():
    with pytest.raises(UserError, match=r"^task.math.eval: no/test.jsonl "):
        make_plan(load_config("countdown-tiny", MATH))


def test_a_dry_run_says_what_is_not_here_and_of_which_files_the_config_is(capsys):
    arguments = ["train", "paper/math-delta-l", "--dry-run"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "\n\nnote: not here, so not checked: data/orz-57k.jsonl, data/math500" in out
    names = ["paper.yaml", "paper-math.yaml", "paper-aggregation.yaml", "math-delta-l.yaml"]
    lines = out.splitlines()[: len(names)]
    assert [line.rpartition("/")[2] for line in lines] == names[::-1]
    assert all(line.startswith("#") for line in lines)
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [file.rpartition("/")[2] for file in found["files"]] == names
    assert len(found["notes"]) == 2
