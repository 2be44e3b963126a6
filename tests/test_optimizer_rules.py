"""Gradient descent and normalised gradients; and what of a config an update is compiled for."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltal_jax.config import ObjectiveConfig, OptimizerConfig, load_config
from deltal_jax.training.objective import LOSS_FIELDS, loss_config, make_loss
from deltal_jax.training.optimizer import make_optimizer
from deltal_jax.training.setup import make_setup, make_update
from tests.fakes import config_refusal
from tests.runs import TINY

PARAMS = {"w": jnp.asarray([2.0, -1.0]), "v": jnp.asarray([[0.5]])}
GRADS = {"w": jnp.asarray([3.0, -4.0]), "v": jnp.asarray([[12.0]])}
numbers = st.floats(-10, 10, width=32)


def steps(config, *grads):
    """The parameters after each of these gradients."""
    optimizer = make_optimizer(config, 10)
    state, params, found = optimizer.init(PARAMS), PARAMS, []
    for grad in grads:
        updates, state = optimizer.update(grad, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        found.append(params)
    return found


def test_gradient_descent_has_no_momentum_and_decays_weights_apart():
    config = OptimizerConfig(rule="sgd", learning_rate=0.1, weight_decay=0.01, clip_norm=None)
    first, second = steps(config, GRADS, GRADS)
    for name, start in PARAMS.items():
        want = start - 0.1 * (GRADS[name] + 0.01 * start)
        np.testing.assert_allclose(first[name], want, rtol=1e-6)
        want -= 0.1 * (GRADS[name] + 0.01 * want)
        np.testing.assert_allclose(second[name], want, rtol=1e-6)


def test_gradient_descent_is_behind_the_clip_and_by_the_schedule():
    config = OptimizerConfig(rule="sgd", learning_rate=0.4, warmup_steps=1, clip_norm=6.5)
    first, second = steps(config, GRADS, GRADS)  # a norm of 13, of which half is left
    np.testing.assert_allclose(first["w"], PARAMS["w"] - 0.2 * GRADS["w"] / 2, rtol=1e-6)
    np.testing.assert_allclose(second["w"], first["w"] - 0.4 * GRADS["w"] / 2, rtol=1e-6)


def test_a_normalised_gradient_has_the_norm_of_all_parameters_together():
    config = OptimizerConfig(rule="sgd", learning_rate=1.0, normalize=True)
    (found,) = steps(config, GRADS)
    for name, start in PARAMS.items():
        np.testing.assert_allclose(found[name], start - GRADS[name] / 13.0, rtol=1e-6)
    (still,) = steps(config, jax.tree.map(jnp.zeros_like, GRADS))
    jax.tree.map(np.testing.assert_array_equal, still, PARAMS)


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
@settings(max_examples=12)
@given(first=numbers, factors=st.tuples(st.floats(0.1, 9), st.floats(0.1, 9)))
def test_normalised_losses_that_differ_by_factors_take_the_same_steps(rule, first, factors):
    config = OptimizerConfig(rule=rule, learning_rate=0.1, normalize=True, epsilon=1e-3)
    grads = [GRADS | {"v": jnp.full((1, 1), first, jnp.float32)}, GRADS]
    scaled = [jax.tree.map(lambda x, f=f: f * x, g) for f, g in zip(factors, grads, strict=True)]
    for one, other in zip(steps(config, *grads), steps(config, *scaled), strict=True):
        # A few roundings of a number of the size of 1, over an epsilon of 1e-3, times the rate.
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), one, other)


@pytest.mark.parametrize("name", ["b1", "b2", "epsilon"])
def test_fields_of_adam_are_refused_for_gradient_descent(name):
    given_ = {"sft.optimizer": {"rule": "sgd", "b2": 0.999} | {name: 0.5}}
    said = config_refusal(given_)
    assert said.startswith(f"sft.optimizer.{name}: is Adam's; set it to its default")


def test_a_clip_of_its_own_is_refused_beside_a_normalised_gradient():
    said = config_refusal({"rl.optimizer.normalize": True, "rl.optimizer.clip_norm": 0.5})
    assert said.startswith("rl.optimizer.clip_norm: rl.optimizer.normalize takes its place")


def test_the_loss_reads_no_field_that_an_update_is_not_compiled_for():
    read = set()

    class Recorded:
        def __getattr__(self, name: str) -> Any:
            read.add(name)
            return getattr(objective, name)

    for given_ in (
        {"importance_correction": "token_truncate"},
        {"surrogate": "sapo", "kl_coefficient": 0.1, "entropy_coefficient": 0.1},
    ):
        objective = ObjectiveConfig(**given_)
        config: Any = SimpleNamespace(
            objective=Recorded(), rollout=SimpleNamespace(temperature=1.0)
        )
        make_loss(config)
    assert read == set(LOSS_FIELDS)


def test_methods_share_an_update_unless_their_loss_or_optimizer_differs():
    setup = make_setup(load_config("countdown-tiny", TINY))

    def update(given):
        config = load_config("countdown-tiny", TINY | given)
        return make_update(dataclasses.replace(setup, config=config), "rl")

    same = [
        {"objective.aggregation": "token_mean", "objective.scope": "group"},
        {"objective.alpha": 0.3, "objective.normalizer": 7.0, "objective.advantage": "max_rl"},
        {"objective.overlong_filter": "truncated", "objective.count_masked": True},
        {"rl.updates_per_rollout": 2, "rl.steps": 9, "seed": 5, "evaluate.problems": 3},
        {"rollout.dynamic_sampling": "reward", "objective.old_logprobs": "recompute"},
    ]
    other = [
        {"objective.clip_high": 0.3},
        {"objective.surrogate": "reinforce"},
        {"objective.kl_coefficient": 0.1},
        {"rollout.temperature": 0.7},
        {"rl.optimizer.learning_rate": 0.5},
        {"rl.optimizer.rule": "sgd", "rl.optimizer.b2": 0.999},
    ]
    assert {update(given_) for given_ in same} == {update({})}
    assert len({update(given_) for given_ in [{}, *other]}) == 1 + len(other)
    cosine = {"rl.optimizer.schedule": "cosine"}
    assert update(cosine) is not update(cosine | {"rl.steps": 9})
    config = load_config("countdown-tiny", TINY | same[0])
    assert loss_config(loss_config(config)) == loss_config(config)
