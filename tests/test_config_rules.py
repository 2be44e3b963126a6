"""Fields that contradict each other are refused, and those at the edge are not."""

import pytest

from deltal_jax.config import SCOPED, load_config
from deltal_jax.objective.advantages import ADVANTAGES
from deltal_jax.objective.aggregation import AGGREGATIONS
from deltal_jax.objective.correction import CORRECTIONS
from deltal_jax.tasks.catalog import make_task
from tests.fakes import config_refusal

TINY = "countdown-tiny"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            {"model.heads": 4, "model.kv_heads": 3},
            "model.kv_heads: 3 does not divide model.heads=4",
        ),
        ({"model.head_dim": 3}, "model.head_dim: 3 is not an even number"),
        ({"model.head_dim": None, "model.heads": 3}, "model.head_dim: 21.3333 is not an even"),
        ({"model.head_dim": None, "model.d_model": 12}, "model.head_dim: 3 is not an even number"),
        ({"length_buckets": [64, 32, 200]}, "length_buckets: must increase"),
        ({"length_buckets": [64, 64, 200]}, "length_buckets: must increase"),
        (
            {"rl.updates_per_rollout": 3},
            "rl.updates_per_rollout: 3 does not divide rl.prompts_per_step=16",
        ),
        (
            {"rollout.max_response_length": 193},
            "length_buckets: the last is 200, but prompt and response may take "
            "rollout.max_prompt_length + rollout.max_response_length = 201 tokens",
        ),
        (
            {"checkpoint.keep_best": 1, "evaluate.every": 0},
            "checkpoint.keep_best: nothing is evaluated on the way; set evaluate.every",
        ),
        ({"rl.samples_per_prompt": 1}, "rl.samples_per_prompt: a group of 1 has no spread"),
        (
            {"task.overlong_buffer": 193},
            "task.overlong_buffer: 193 is over rollout.max_response_length=192",
        ),
        ({"task.overlong_factor": 0.5}, "task.overlong_factor: set task.overlong_buffer too"),
        (
            {"task.overlong_buffer": 64, "objective.advantage": "max_rl"},
            "task.overlong_buffer: makes rewards negative, which objective.advantage=max_rl",
        ),
        ({"rollout.fill_up": False}, "rollout.fill_up: set rollout.dynamic_sampling too"),
        ({"rollout.max_rounds": 3}, "rollout.max_rounds: set rollout.dynamic_sampling too"),
        ({"task.mixture": {"paths": 1.0}}, "task.mixture: set task.name=mixture, or leave it out"),
        (
            {"task.name": "mixture", "task.mixture": {"countdown": 1.0}, "task.paths.nodes": 5},
            "task.paths.nodes: add paths to task.mixture, or leave it out",
        ),
    ],
)
def test_fields_that_contradict_each_other_are_refused(overrides, expected):
    assert config_refusal(overrides).startswith(expected)


@pytest.mark.parametrize(
    "overrides",
    [
        {"model.heads": 4, "model.kv_heads": 2},
        {"model.head_dim": None, "model.d_model": 12, "model.heads": 3},
        {"length_buckets": [200]},
        {"rl.updates_per_rollout": 16},
        {"rl.samples_per_prompt": 2},
        {"task.overlong_buffer": 192, "task.overlong_factor": 2},
        {"rollout.dynamic_sampling": "reward", "rollout.fill_up": False},
    ],
)
def test_fields_that_agree_at_the_edge_are_accepted(overrides):
    load_config(TINY, overrides)


def test_given_numbers_that_the_vocabulary_lacks_are_refused_before_a_run_starts():
    """Over max_value a number has no token, and two of them may have no legal operation at all."""
    said = config_refusal({"task.countdown.max_number": 61})
    assert "task.countdown.max_number" in said
    assert "task.countdown.max_value" in said
    load_config(TINY, {"task.countdown.max_number": 60})
    text = {"task.countdown.form": "text", "task.countdown.max_value": 9}
    said = config_refusal(text | {"task.countdown.max_number": 91})
    assert said == "task.countdown.max_number: 91 is over 10 · task.countdown.max_value=9"
    task = make_task(load_config(TINY, text | {"task.countdown.max_number": 90}).task)
    assert all(task.problem(0, position) for position in range(50))


SCOPELESS = ["balanced", "local_token_mean", "prompt_mean", "token_sum"]


def test_aggregations_are_those_with_a_scope_to_choose_and_those_without():
    assert sorted([*SCOPED, *SCOPELESS]) == sorted(AGGREGATIONS)


@pytest.mark.parametrize("scope", ["minibatch", "group"])
@pytest.mark.parametrize("name", SCOPELESS)
def test_a_scope_for_an_aggregation_that_has_none_is_refused(name, scope):
    expected = f"objective.scope: {name} has no scope to choose; leave it at batch"
    scoped = {"objective.scope": scope}
    assert config_refusal(scoped | {"objective.aggregation": name}) == expected
    other = scoped | {"objective.auxiliary_aggregation": name}
    load_config(TINY, other)  # without a KL or entropy term it weighs nothing
    for term in ("kl_coefficient", "entropy_coefficient"):
        assert config_refusal(other | {f"objective.{term}": 0.1}) == expected


@pytest.mark.parametrize("scope", ["batch", "minibatch", "group"])
@pytest.mark.parametrize("name", SCOPED)
def test_every_scope_is_accepted_for_an_aggregation_that_has_one(name, scope):
    options = {"objective.aggregation": name, "objective.scope": scope, "objective.rho": [0.1]}
    assert load_config(TINY, options).objective.scope == scope


def test_inverse_variance_without_an_autocorrelation_is_refused_with_the_way_out():
    expected = (
        "objective.rho: inverse_variance needs it, such as [0.2, 0.1]; for a variance of L^β use "
        "delta_l with objective.alpha=β"
    )
    assert config_refusal({"objective.aggregation": "inverse_variance"}) == expected
    auxiliary = {"objective.auxiliary_aggregation": "inverse_variance"}
    load_config(TINY, auxiliary)
    assert config_refusal(auxiliary | {"objective.kl_coefficient": 0.1}) == expected


@pytest.mark.parametrize("rho", [[1.01], [0.2, -1.5]])
def test_an_autocorrelation_beyond_one_is_refused(rho):
    expected = f"objective.rho: an autocorrelation is in -1 … 1, got {tuple(rho)}"
    assert config_refusal({"objective.rho": rho}) == expected
    load_config(TINY, {"objective.rho": [1.0, -1.0]})


@pytest.mark.parametrize("name", sorted(set(CORRECTIONS) - {"none"}))
def test_a_correction_of_the_samplers_logprobs_against_themselves_is_refused(name):
    correction = {"objective.importance_correction": name}
    assert config_refusal(correction) == (
        "objective.importance_correction: needs the trainer's own log-probabilities; set "
        "objective.old_logprobs=recompute"
    )
    load_config(TINY, correction | {"objective.old_logprobs": "recompute"})


def test_a_group_of_one_needs_an_advantage_over_the_batch():
    alone = {"rl.samples_per_prompt": 1}
    for name in sorted(set(ADVANTAGES) - {"batch_standardize"}):
        said = config_refusal(alone | {"objective.advantage": name})
        assert said.startswith("rl.samples_per_prompt: a group of 1 has no spread")
    load_config(TINY, alone | {"objective.advantage": "batch_standardize"})


URL = {"rollout.engine": "http", "rollout.server.url": "http://localhost:8000"}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"rollout.engine": "http"}, "rollout.server.url: rollout.engine=http needs one"),
        ({"rollout.server.url": "http://a:1"}, "rollout.server.url: only a server has one"),
        ({"rollout.server.timeout": 5.0}, "rollout.server.timeout: only a server has one"),
        ({"rollout.server.dialect": "sglang"}, "rollout.server.dialect: only a server has one"),
        *(
            (URL | {"rollout.server.url": url}, f"rollout.server.url: {url!r} is no address such")
            for url in (
                "localhost:8000",
                "ftp://a",
                "http://",
                "http://a:x",
                "http://a:0",
                "http://a/v1",
                "http://a/",
                "http://u@a",
                "http://a?b",
            )
        ),
        (
            URL
            | {
                "rollout.server.dialect": "sglang",
                "rollout.top_p": 0.9,
                "objective.old_logprobs": "recompute",
            },
            "rollout.server.dialect: sglang gives log-probabilities from before top_k",
        ),
    ],
)
def test_a_server_needs_an_address_and_fields_of_its_own(overrides, expected):
    assert config_refusal(overrides).startswith(expected)


@pytest.mark.parametrize("url", ["http://localhost", "https://a.b:8443/behind/a/proxy"])
def test_addresses_that_are_fine(url):
    assert load_config(TINY, URL | {"rollout.server.url": url})


CORRECTED = {
    "objective.old_logprobs": "recompute",
    "objective.importance_correction": "token_truncate",
}
PARTIAL = {"rollout.partial": True, "rollout.oversampling": 1.5}


@pytest.mark.parametrize("options", [{"rollout.ahead": 1}, PARTIAL], ids=["ahead", "partial"])
def test_what_older_parameters_sampled_needs_a_correction(options):
    name = next(iter(options))
    for uncorrected in (
        {"objective.old_logprobs": "recompute"},
        {"objective.surrogate": "reinforce"},
    ):
        said = config_refusal(options | uncorrected)
        assert said.startswith(f"{name}: trains on what older parameters sampled")
        load_config(TINY, options | uncorrected | CORRECTED)
    load_config(TINY, options | {"objective.surrogate": "cispo"})


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"rollout.oversampling": 1.5}, "rollout.oversampling: all that it samples beyond"),
        ({"rollout.partial": True}, "rollout.partial: nothing beyond the batch begins"),
        (
            URL | PARTIAL,
            "rollout.partial: not with a server",
        ),
        (
            URL | {"rollout.devices": 1},
            "rollout.devices: not with a server",
        ),
        (
            {"rollout.devices": 3},
            "rollout.slots: 16 do not split over rollout.devices=3",
        ),
        (
            {
                "rollout.dynamic_sampling": "reward",
                "rl.samples_per_prompt": 1,
                "objective.advantage": "batch_standardize",
            },
            "rollout.dynamic_sampling: nothing varies in a group of 1",
        ),
    ],
)
def test_ways_of_sampling_that_would_be_in_vain_are_refused(overrides, expected):
    assert config_refusal(overrides).startswith(expected)


def test_ways_of_sampling_go_together():
    together = PARTIAL | {"rollout.ahead": 1, "rollout.devices": 2}
    load_config(TINY, together | {"rollout.dynamic_sampling": "accuracy"})
    load_config(TINY, {"rollout.dynamic_sampling": "reward", "rollout.oversampling": 3})


@pytest.mark.parametrize("name", ["train", "eval"])
def test_mathematics_needs_files(name):
    files = {"train": "a.jsonl", "eval": ["b.jsonl"]}
    overrides = {f"task.math.{key}": value for key, value in files.items() if key != name}
    said = config_refusal({"task.name": "math"} | overrides)
    assert said.startswith(f"task.math.{name}: ")
    given = {f"task.math.{key}": value for key, value in files.items()}
    assert load_config(TINY, {"task.name": "math"} | given).task.math.eval == ("b.jsonl",)


def test_fields_of_mathematics_are_refused_for_another_task():
    said = config_refusal({"task.math.verifier": "reference"})
    assert said == "task.math.verifier: set task.name=math, or leave it out"


def test_an_object_store_that_arrays_cannot_be_written_to_is_refused():
    assert load_config("countdown-tiny", {"checkpoint.dir": "gs://bucket/run"})
    said = config_refusal({"checkpoint.dir": "s3://bucket/run"})
    assert said.startswith("checkpoint.dir: s3://bucket/run: Orbax writes arrays to folders and to")
