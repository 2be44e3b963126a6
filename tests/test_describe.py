"""What is said before a run is what the run does."""

import dataclasses
import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltal_jax.config import (
    SCOPED,
    Advantage,
    Aggregation,
    Correction,
    LoraConfig,
    Surrogate,
    load_config,
)
from deltal_jax.model.lora import overlay, trained
from deltal_jax.model.transformer import cast_weights, init_model, split_model
from deltal_jax.training.describe import (
    batch_arithmetic,
    describe_sampling,
    formula,
    memory_estimate,
)
from deltal_jax.training.objective import make_loss
from deltal_jax.training.optimizer import make_optimizer
from deltal_jax.training.setup import init_params, make_architecture, make_setup
from deltal_jax.training.step import Update
from deltal_jax.types import Bucket


def test_batch_arithmetic_of_the_tiny_experiment():
    counts = batch_arithmetic(load_config("countdown-tiny", {"rl.updates_per_rollout": 4}))
    assert counts["responses_per_step"] == 128
    assert counts["responses_per_minibatch"] == 32
    assert counts["updates_per_step"] == 4
    assert counts["rl_updates"] == 400
    assert counts["responses"] == 12_800
    assert counts["max_response_tokens"] == 12_800 * 192


def lines(**objective) -> dict[str, str]:
    """The formula's lines by what stands before the equals sign; "" holds the others."""
    changes = {f"objective.{name}": value for name, value in objective.items()}
    found = {"": ""}
    for line in formula(load_config("countdown-tiny", changes)).splitlines():
        name, separator, text = line.partition(" = " if " = " in line[:7] else "\0")
        if separator:
            found[name.strip()] = text.strip()
        else:
            found[""] += line + "\n"
    return found


AMONG = {"batch": "j in batch", "minibatch": "j in mini-batch", "group": "j in group"}
SIZE = {"batch": "B_batch", "minibatch": "B_minibatch", "group": "B_group"}
WORDS = {
    "batch": "normalised over the rollout batch",
    "minibatch": "normalised over each mini-batch",
    "group": "normalised over each prompt's group",
}
OWN = {
    "prompt_mean": "normalised over each prompt's group",
    "local_token_mean": "normalised over each micro-batch",
    "balanced": "normalised over each sign of the advantage",
    "token_sum": "not normalised",
}
WEIGHTS = {
    "delta_l": "(1/192) · L_i^-0.75 / Σ_({among}) L_j^-0.75",
    "sequence_mean": "1 / ({size} · L_i)",
    "token_mean": "1 / Σ_({among}) L_j",
    "constant_length": "(1/192) / {size}",
    "sequence_sum": "1 / {size}",
    "inverse_variance": "(1/192) · v(L_i)^-1 / Σ_({among}) v(L_j)^-1, "
    "v(L) = L + 2 Σ_h max(L - h, 0) ρ_h, ρ = [0.3, 0.1]",
    "prompt_mean": "1 / (K · Σ_(j in group) L_j), K groups that have anything to train",
    "token_sum": "1",
    "local_token_mean": "1 / (K · Σ_(j in micro-batch of 5) L_j), K micro-batches",
    "balanced": "(n_s / (n_+ + n_-)) / Σ_(j of sign s) L_j, s = sign(A_i); 0 where A_i = 0",
}
OPTIONS = {"alpha": 0.75, "rho": [0.3, 0.1], "microbatch_size": 5}


@pytest.mark.parametrize("scope", ["batch", "minibatch", "group"])
@pytest.mark.parametrize("name", get_args(Aggregation))
def test_the_formula_names_method_scope_and_constant(name, scope):
    if scope != "batch" and name not in SCOPED:
        return  # refused by the config
    want = WEIGHTS[name].format(among=AMONG[scope], size=SIZE[scope])
    if scope == "group":
        want = f"(1/K) · {want}, K groups that have anything to train"
    found = lines(aggregation=name, scope=scope, **OPTIONS)
    assert found["w_i"] == want
    assert f"      {name}, {OWN.get(name, WORDS[scope])}" in found["loss"]
    assert ("warning" in found[""]) == (name == "local_token_mean")
    if scope == "batch":
        auxiliary = lines(auxiliary_aggregation=name, kl_coefficient=0.1, **OPTIONS)
        assert auxiliary["u_i"] == want
    if "1/192" in want:
        other = lines(aggregation=name, scope=scope, normalizer=100.0, **OPTIONS)
        assert other["w_i"] == want.replace("1/192", "1/100")


def test_local_token_mean_is_warned_of_where_it_weighs_something():
    warning = (
        "warning: local_token_mean follows how responses fall into micro-batches of 5; it is for "
        "reproduction only"
    )
    assert warning in lines(aggregation="local_token_mean", **OPTIONS)[""]
    idle = {"auxiliary_aggregation": "local_token_mean"}
    assert warning not in lines(**idle, **OPTIONS)[""]
    assert warning in lines(**idle, **OPTIONS, entropy_coefficient=0.1)[""]


#: Options and what the line of the token loss says of them, after the defaults.
TOKEN_LOSSES = {
    "reinforce": ("-A · log π", {}, "-A · log π"),
    "clipped": (
        "max(-A·r, -A·clip(r, 0.8, 1.2)), r = π/π_old",
        {"clip_low": 0.1, "clip_high": 0.28, "dual_clip": 3.0},
        "max(-A·r, -A·clip(r, 0.9, 1.28)), at most -A·3 where A < 0, r = π/π_old",
    ),
    "gspo": (
        "max(-A·s, -A·clip(s, 0.9997, 1.0004)), s = exp(mean_t log π/π_old)",
        {"clip_low": 0.1, "clip_high": 0.2},
        "max(-A·s, -A·clip(s, 0.9, 1.2)), s = exp(mean_t log π/π_old)",
    ),
    "gspo_token": (
        "max(-A·s, -A·clip(s, 0.9997, 1.0004)), s = sg(exp(mean_t log π/π_old)) · π/sg(π)",
        {"clip_low": 0.1, "clip_high": 0.2},
        "max(-A·s, -A·clip(s, 0.9, 1.2)), s = sg(exp(mean_t log π/π_old)) · π/sg(π)",
    ),
    "cispo": (
        "-sg(clip(r, 0, 1.28)) · A · log π, r = π/π_old",
        {"clip_low": 0.5, "clip_high": 0.1},
        "-sg(clip(r, 0.5, 1.1)) · A · log π, r = π/π_old",
    ),
    "gmpo": (
        "-A · exp(mean_t c), c = log π/π_old, at most 0.4 where A > 0, at least -0.4 where A < 0",
        {"clip_low": 0.1, "clip_high": 0.2},
        "-A · exp(mean_t c), c = log π/π_old, at most 0.2 where A > 0, at least -0.1 where A < 0",
    ),
    "sapo": (
        "-A · (4/τ) σ(τ(r - 1)), τ = 1 where A > 0, else 1.05, r = π/π_old",
        {"tau_positive": 2.0, "tau_negative": 3.5},
        "-A · (4/τ) σ(τ(r - 1)), τ = 2 where A > 0, else 3.5, r = π/π_old",
    ),
    "dppo": (
        "-A·r, 0 where |π - π_old| > 0.2 and r moves on, r = π/π_old",
        {"threshold": 0.05},
        "-A·r, 0 where |π - π_old| > 0.05 and r moves on, r = π/π_old",
    ),
}


@pytest.mark.parametrize("name", get_args(Surrogate))
def test_the_formula_shows_the_surrogate_with_its_options_and_where_the_old_policy_is_from(name):
    default, options, want = TOKEN_LOSSES[name]
    for given, text in (({}, default), (options, want)):
        for source, word in (("sampler", "sampler"), ("recompute", "trainer")):
            said = lines(surrogate=name, old_logprobs=source, **given)["ℓ_it"]
            assert said == (text if name == "reinforce" else f"{text}, π_old from the {word}")


@pytest.mark.parametrize("name", get_args(Advantage))
def test_the_formula_shows_the_advantage(name):
    want = {
        "group_standardize": "(r_i - mean_group) / (std_group + 1e-6), n-1 standard deviation",
        "group_center": "r_i - mean_group",
        "leave_one_out": "r_i - mean of the others in the group",
        "batch_standardize": "(r_i - mean_batch) / (std_batch + 1e-6), n-1 standard deviation",
        "length_weighted_baseline": "r_i - Σ_(j in group) L_j r_j / Σ_(j in group) L_j",
        "max_rl": "(r_i - mean_group) / mean_group, 0 where the mean is not positive",
    }
    assert lines(advantage=name)["A_i"] == want[name]


@pytest.mark.parametrize("name", get_args(Correction))
def test_the_formula_shows_the_importance_correction_with_its_threshold(name):
    found = lines(importance_correction=name, old_logprobs="recompute", correction_threshold=3.5)
    if name == "none":
        assert "ρ_it" not in found["loss"] and "ρ_it" not in found
        return
    assert found["loss"].startswith("Σ_i (w_i Σ_t ρ_it ℓ_it)")
    want = {
        "token_truncate": "min(ρ, C)",
        "token_mask": "ρ where 1/C ≤ ρ ≤ C, other tokens are not trained",
        "sequence_mask": "ρ where 1/C ≤ geometric mean ≤ C, other responses are not trained",
    }[name]
    assert found["ρ_it"] == f"{want}, ρ = π_old / π_sampler, C = 3.5"


@pytest.mark.parametrize(
    ("options", "terms"),
    [
        ({}, ""),
        ({"kl_coefficient": 0.05}, "0.05 · kl_k3_straight_through_it"),
        ({"kl_coefficient": 0.05, "kl_estimator": "kl_k2"}, "0.05 · kl_k2_it"),
        ({"entropy_coefficient": 0.01}, "- 0.01 · H_it"),
        (
            {"kl_coefficient": 0.5, "kl_estimator": "kl_k3", "entropy_coefficient": 0.01},
            "0.5 · kl_k3_it - 0.01 · H_it",
        ),
    ],
)
def test_auxiliary_terms_show_with_their_weights_when_they_are_on(options, terms):
    found = lines(**options)
    loss = found["loss"].partition("      ")[0]
    assert loss == f"Σ_i (w_i Σ_t ℓ_it{f' + u_i Σ_t ({terms})' if terms else ''})"
    assert ("u_i" in found) == bool(terms)
    assert found.get("u_i", "1 / Σ_(j in batch) L_j") == "1 / Σ_(j in batch) L_j"


def test_minibatches_show_with_their_factor_and_number():
    updates = {"rl.updates_per_rollout": 4, "rl.epochs_per_rollout": 3}
    text = formula(load_config("countdown-tiny", updates))
    assert text.startswith("loss of each mini-batch = 4 · Σ_(i in mini-batch) (w_i Σ_t ℓ_it)      ")
    assert "4 mini-batches × 3 epochs = 12 updates a rollout" in text
    own = formula(load_config("countdown-tiny", updates | {"objective.scope": "minibatch"}))
    assert own.startswith("loss of each mini-batch = Σ_(i in mini-batch) (w_i Σ_t ℓ_it)      ")


def test_what_changes_lengths_and_probabilities_is_said():
    changes = {
        "objective.old_logprobs": "recompute",
        "objective.importance_correction": "token_mask",
        "rollout.temperature": 0.8,
    }
    text = formula(load_config("countdown-tiny", changes))
    assert "L_i counts tokens not rejected" in text
    assert "π is the softmax at temperature 0.8" in text


@pytest.mark.parametrize(
    ("overlong", "who"),
    [
        ("none", "a missing reward"),
        ("truncated", "a missing reward or a truncated response"),
        ("at_limit", "a missing reward or a response of 192 tokens, ended or not,"),
    ],
)
@pytest.mark.parametrize("counted", [False, True])
def test_what_counts_is_said(overlong, who, counted):
    said = lines(overlong_filter=overlong, count_masked=counted)[""]
    where = "stays in the denominators" if counted else "leaves the denominators too"
    assert said == (
        f"L_i counts sampled tokens, EOS included; {who} has the weight 0 and {where}\n"
    )


def test_the_soft_punishment_is_said():
    changes = {"task.overlong_buffer": 128, "task.overlong_factor": 0.5}
    text = formula(load_config("countdown-tiny", changes))
    assert "\nr_i  = reward + min(-(length_i - 64) / 128 · 0.5, 0)\n" in text
    assert "r_i  =" not in formula(load_config("countdown-tiny"))


def test_the_memory_estimate_is_near_what_the_compiler_says():
    config = load_config("countdown-tiny")
    setup = make_setup(config)
    estimate = memory_estimate(config, make_architecture(config, setup.tokenizer.vocab_size))
    optimizer = make_optimizer(config.rl.optimizer, 1)
    update = Update(setup.graphdef, optimizer, make_loss(config))
    params = jax.eval_shape(lambda: init_params(setup, jax.random.key(0)))
    whole, count = (5, 200), 128
    floats, ids = jnp.float32, jnp.int32
    bucket = Bucket(
        **{name: jax.ShapeDtypeStruct(whole, ids) for name in ("tokens", "positions")},
        segment_ids=jax.ShapeDtypeStruct(whole, ids),
        loss_mask=jax.ShapeDtypeStruct(whole, bool),
        sampler_logprobs=jax.ShapeDtypeStruct(whole, floats),
        old_logprobs=jax.ShapeDtypeStruct(whole, floats),
        advantages=jax.ShapeDtypeStruct((count,), floats),
        weights=jax.ShapeDtypeStruct((count,), floats),
        auxiliary_weights=jax.ShapeDtypeStruct((count,), floats),
    )
    compiled = jax.jit(update.gradient).lower(params, bucket).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert 0.5 < estimate["activations"] / temporary < 2.0
    sizes = [np.prod(x.shape) * 4 for x in jax.tree.leaves(params)]
    assert estimate["parameters"] == sum(sizes) == 161_088 * 4
    assert estimate["total"] == sum(v for k, v in estimate.items() if k != "total")
    # A KL term keeps a second copy of the parameters.
    with_reference = load_config("countdown-tiny", {"objective.kl_coefficient": 0.1})
    more = memory_estimate(
        with_reference, make_architecture(with_reference, setup.tokenizer.vocab_size)
    )
    assert (estimate["reference"], more["reference"]) == (0, sum(sizes))
    assert more["total"] == estimate["total"] + sum(sizes)


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("computed", ["float32", "bfloat16"])
@pytest.mark.parametrize("rank", [0, 2])
def test_the_memory_of_weights_is_that_of_what_a_run_holds(stored, computed, rank):
    """The sampler's copies are those that it makes; frozen parameters are in bfloat16."""
    config = load_config(
        "countdown-tiny", {"model.param_dtype": stored, "model.compute_dtype": computed}
    )
    lora = LoraConfig(rank=rank, targets=("q_proj", "down_proj"))
    config = dataclasses.replace(config, lora=lora)
    arch = make_architecture(config, 23)
    params = jax.eval_shape(lambda: split_model(init_model(arch, jax.random.key(0)))[1])
    own = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, stored), trained(params))
    base = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)
    params = overlay(base, own)
    cast = jax.eval_shape(functools.partial(cast_weights, dtype=computed), params)
    held, copied = jax.tree.map(lambda x: x.size * x.dtype.itemsize, (params, cast))
    estimate = memory_estimate(config, arch)
    assert estimate["parameters"] == sum(jax.tree.leaves(held))
    layers = sum(jax.tree.leaves(copied.pop("blocks")))  # one by one, and not as a stack
    del held["blocks"]
    others = zip(jax.tree.leaves(copied), jax.tree.leaves(held), strict=True)
    copies = sum(new for new, old in others if new != old)
    assert estimate["sampling_weights"] == copies + layers


def test_one_line_says_what_of_sampling_is_not_the_default():
    assert describe_sampling(load_config("countdown-tiny")) == ""
    options = {"rollout.dynamic_sampling": "reward", "rollout.oversampling": 1.5}
    assert describe_sampling(load_config("countdown-tiny", options)) == (
        "rollouts: 16 groups whose reward varies, in at most 10 rounds, then filled up; 1.5 "
        "prompts begun for each group needed"
    )
    options = {
        "rollout.partial": True,
        "rollout.oversampling": 2,
        "rollout.ahead": 1,
        "rollout.devices": 4,
    }
    assert describe_sampling(load_config("countdown-tiny", options)) == (
        "rollouts: 2 prompts begun for each group needed; what was begun beyond them is carried "
        "over; one step ahead of the update; on 4 devices of their own"
    )


def test_sampling_ahead_on_the_same_devices_takes_a_copy_of_the_parameters():
    def memory(**options):
        config = load_config("countdown-tiny", {f"rollout.{k}": v for k, v in options.items()})
        return memory_estimate(config, make_architecture(config, 23))

    plain = memory()
    assert memory(ahead=1)["total"] == plain["total"] + plain["parameters"]
    apart = memory(ahead=1, devices=2)
    assert apart["sampling_copy"] == 0
    assert (2 * apart["kv_cache"], 2 * apart["responses"]) == (
        plain["kv_cache"],
        plain["responses"],
    )


def test_the_memory_of_gradients_and_moments_is_of_as_many_as_are_held():
    def held(**options):
        config = load_config("countdown-tiny", {"meters.every": 0} | options)
        found = memory_estimate(config, make_architecture(config, 23))
        return [found[part] / found["parameters"] for part in ("gradients", "optimizer")]

    assert held() == [2, 2]
    assert held(**{"meters.every": 5, "meters.variance": True}) == [4, 2]
    # Of five classes, the running sum of the sixth and what is added, and the running mean.
    assert held(**{"objective.alpha": "mse"}) == [8, 2]
    assert held(**{"rl.optimizer": {"rule": "sgd", "b2": 0.999}}) == [2, 0]
