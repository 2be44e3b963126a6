"""Field by field: which values are refused, in which words, and how fields are described."""

import dataclasses
import math
import re
import typing

import pytest

from deltal_jax.config import Config, describe_fields, load_config
from deltal_jax.config.tasks import SECTIONS
from tests.fakes import config_refusal

TINY = "countdown-tiny"


def leaves() -> list[tuple[str, dataclasses.Field, type]]:
    """(dotted name, field, type) of every field."""

    def walk(kind: type, prefix: str):
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            if dataclasses.is_dataclass(hints[field.name]):
                yield from walk(hints[field.name], f"{prefix}{field.name}.")
            else:
                yield prefix + field.name, field, hints[field.name]

    return list(walk(Config, ""))


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("rl.step", "; did you mean rl.steps?"),
        ("rl.stpes", "; did you mean rl.steps?"),
        ("objective.clip_hi", "; did you mean objective.clip_high?"),
        ("sft.optimizer.weight_deacy", "; did you mean sft.optimizer.weight_decay?"),
        ("objectiv.alpha", "; did you mean objective?"),
        ("alpha", "; did you mean lora.alpha or objective.alpha?"),
        ("rl.temperature", "; did you mean rollout.temperature or evaluate.temperature?"),
        ("rl.learning_rate", "did you mean sft.optimizer.learning_rate or rl.optimizer."),
        ("task.math.zzz", "; the fields here are train, eval, verifier, template, workers"),
    ],
)
def test_an_unknown_field_is_refused_with_the_nearest_one(key, suggestion):
    said = config_refusal({key: 1})
    unknown = key.split(".")[0] if key.startswith("objectiv.") else key
    assert said.startswith(f"{unknown}: no such field")
    assert suggestion in said


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("rl.steps", "ten", "rl.steps: expected int, got 'ten'"),
        ("rl.steps", 1.5, "rl.steps: expected int, got 1.5"),
        ("rl.steps", True, "rl.steps: expected int, got True"),
        ("rl.steps", None, "rl.steps: expected int, got None"),
        ("rl.steps", [1], "rl.steps: expected int, got [1]"),
        ("objective.alpha", "1", "objective.alpha: expected float or beta|mse, got '1'"),
        ("objective.alpha", False, "objective.alpha: expected float or beta|mse, got False"),
        ("objective.dual_clip", "x", "objective.dual_clip: expected float, got 'x'"),
        ("model.tied_embeddings", 1, "model.tied_embeddings: expected true|false, got 1"),
        ("model.tied_embeddings", "yes!", "model.tied_embeddings: expected true|false, got 'yes!'"),
        ("run.name", 5, "run.name: expected text, got 5"),
        ("run.dir", 5, "run.dir: expected text, got 5"),
        ("run.name", "two\nlines", None),
        ("length_buckets", 64, "length_buckets: expected a list such as [32, 64], got 64"),
        ("length_buckets", [], "length_buckets: expected a list such as [32, 64], got []"),
        ("length_buckets", [32, "x"], "length_buckets[1]: expected int, got 'x'"),
        ("length_buckets", [32, 2.5], "length_buckets[1]: expected int, got 2.5"),
        ("rl", 5, "rl: expected a section of fields, got 5"),
        ("rl.optimizer", "adam", "rl.optimizer: expected a section of fields, got 'adam'"),
        ("seed.x", 5, "seed.x: seed is a value, not a section"),
        ("rl.steps.x", 5, "rl.steps.x: steps is a value, not a section"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_the_type_and_the_value(key, value, expected):
    if expected is None:
        assert load_config(TINY, {key: value}).run.name == value
    else:
        assert config_refusal({key: value}) == expected


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        (
            "objective.aggregation",
            "deltal",
            "'deltal' is not one of delta_l, sequence_mean, token_mean, constant_length, "
            "prompt_mean, token_sum, sequence_sum, local_token_mean, balanced, inverse_variance; "
            "did you mean 'delta_l'?",
        ),
        (
            "objective.scope",
            "everything",
            "'everything' is not one of batch, minibatch, group",
        ),
        (
            "objective.surrogate",
            "clip",
            "'clip' is not one of clipped, reinforce, gspo, gspo_token, cispo, gmpo, sapo, dppo; "
            "did you mean 'clipped'?",
        ),
        ("rl.optimizer.schedule", ["x"], "['x'] is not one of constant, cosine"),
        ("rollout.engine", None, "None is not one of jax, http"),
    ],
)
def test_a_choice_that_does_not_exist_is_refused_with_the_choices(key, value, expected):
    assert config_refusal({key: value}) == f"{key}: {expected}"


def bounded(side: str) -> list:
    return [
        pytest.param(name, field.metadata[side], hint, id=f"{name}-{side}")
        for name, field, hint in leaves()
        if field.metadata[side] is not None
    ]


@pytest.mark.parametrize(("name", "low", "hint"), bounded("low"))
def test_a_value_below_its_bound_is_refused_with_the_bound(name, low, hint):
    below = low - 1 if isinstance(low, int) else low - 1e-3
    below = [int(below)] if hint == tuple[int, ...] | None else below
    shown = below[0] if isinstance(below, list) else below
    assert config_refusal({name: below}) == f"{name}: must be at least {low}, got {shown}"


@pytest.mark.parametrize(("name", "high", "hint"), bounded("high"))
def test_a_value_above_its_bound_is_refused_with_the_bound(name, high, hint):
    above = high + 1 if isinstance(high, int) else high + 1e-3
    assert config_refusal({name: above}) == f"{name}: must be at most {high}, got {above}"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [n for n, _, hint in leaves() if hint in (float, float | None)])
def test_a_float_that_is_not_finite_is_refused(name, value):
    assert config_refusal({name: value}) == f"{name}: must be finite, got {value}"


def test_a_number_beyond_floating_point_is_refused_by_field():
    assert config_refusal({"model.rope_theta": 10**400}).startswith("model.rope_theta: ")


def test_every_error_is_one_line_that_starts_with_the_field():
    for name, _, hint in leaves():
        if hint is not str and hint != str | None:
            said = config_refusal({name: "not this"})
            assert re.match(rf"{re.escape(name)}: ", said), said


def test_described_fields_are_those_of_the_config_with_their_defaults_and_a_help_each():
    rows = {name: (kind, default, help_) for name, kind, default, help_ in describe_fields()}
    assert list(rows) == [name for name, *_ in leaves()]
    assert rows["rl.steps"][:2] == ("int", 100)
    assert rows["run.dir"][:2] == ("text or null", None)
    assert rows["objective.scope"][:2] == ("batch|minibatch|group", "batch")
    assert rows["length_buckets"][:2] == ("list of int or null", None)
    assert rows["objective.rho"][:2] == ("list of float or null", None)
    assert rows["model.remat"][:2] == ("none|layer|attention|dots|offload", "none")
    assert rows["rl.optimizer.offload"][:2] == ("true|false", False)
    assert all(help_.strip() for _, _, help_ in rows.values())
    # To learn: both optimizers have the same fields, and a run reads the section of one task.
    learnt = [name for name in rows if not name.startswith("sft.optimizer.")]
    sections = [sum(name.startswith(f"task.{task}.") for name in rows) for task in SECTIONS]
    assert len(learnt) - sum(sections) + max(sections) <= 138
