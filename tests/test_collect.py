"""A rollout batch: advantages, weights and metrics agree with the objective."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltal_jax import delta_l, group_standardize
from deltal_jax.config import load_config
from deltal_jax.tasks.base import Verdict
from deltal_jax.tasks.grading import Grades, Reward
from deltal_jax.training.collect import collect, reward_metrics
from deltal_jax.training.setup import init_params, make_engine, make_setup

OPTIONS = {
    "model.layers": 1,
    "model.d_model": 16,
    "model.head_dim": 8,
    "model.d_ff": 16,
    "rollout.max_response_length": 20,
    "rl.prompts_per_step": 4,
    "rl.samples_per_prompt": 4,
    "objective.alpha": 0.5,
}


@pytest.fixture(scope="module")
def collected():
    setup = make_setup(load_config("countdown-tiny", OPTIONS))
    params = init_params(setup, jax.random.key(3))
    engine = make_engine(setup, temperature=1.0)

    def reward(prompts, responses, answers):
        return [None if i == 5 else float(len(r) % 3) for i, r in enumerate(responses)]

    key = jax.random.key(0, impl="threefry2x32")
    return setup, [
        collect(setup, engine, params, key, step=step, rewards=[Reward(reward)]) for step in (2, 3)
    ]


def test_weights_and_advantages_are_the_objective_of_the_batch(collected):
    _, (batch, _) = collected
    rewards, groups = jnp.asarray(batch.grades.rewards), jnp.asarray(batch.rollout.group_ids)
    assert np.isnan(rewards).nonzero()[0].tolist() == [5]
    lengths = jnp.asarray(batch.rollout.response_lengths)
    weights = delta_l(lengths, 0.5, normalizer=20.0, where=~jnp.isnan(rewards))
    np.testing.assert_allclose(batch.weights, weights, rtol=1e-6)
    assert batch.weights[5] == 0.0 and batch.weights.sum() == pytest.approx(1 / 20)
    np.testing.assert_allclose(batch.advantages, group_standardize(rewards, groups), rtol=1e-6)
    assert batch.metrics["reward/missing"] == 1
    assert batch.metrics["length/mean"] == pytest.approx(float(lengths.mean()))


def test_prompts_come_from_consecutive_positions_of_the_stream(collected):
    setup, batches = collected
    for step, batch in zip((2, 3), batches, strict=True):
        want = [setup.task.problem(0, step * 4 + i) for i in range(4)]
        assert batch.problems == want


def test_reward_metrics_by_hand():
    rewards = np.asarray([0, 0, 1, 1, 0, 1, np.nan, 0], np.float32)
    correct = np.nan_to_num(rewards) > 0
    verdicts = [Verdict(float(c), bool(c), "") for c in correct]
    metrics = reward_metrics(
        Grades(rewards, correct, verdicts, {"task": rewards}), np.repeat(np.arange(4), 2)
    )
    assert metrics["reward/mean"] == pytest.approx(3 / 7)
    assert metrics["accuracy/mean"] == pytest.approx(3 / 8)
    assert metrics["reward/frac_zero_std"] == pytest.approx(3 / 4)
    assert metrics["reward/frac_all_zero"] == pytest.approx(2 / 4)
    assert metrics["reward/frac_all_one"] == pytest.approx(1 / 4)
