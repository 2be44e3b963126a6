"""A rollout batch: its prompts, its grades, and metrics that agree with them."""

import jax
import numpy as np
import pytest

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


def test_rewards_are_the_users_and_a_missing_one_is_kept_apart(collected):
    _, (batch, _) = collected
    rewards = batch.grades.rewards
    want = np.asarray([float(len(r) % 3) for r in batch.responses])
    want[5] = np.nan
    np.testing.assert_array_equal(rewards, want)
    assert batch.metrics["reward/missing"] == 1
    assert batch.metrics["reward/mean"] == pytest.approx(np.nanmean(want))


def test_responses_are_the_texts_of_the_sampled_tokens(collected):
    setup, (batch, _) = collected
    rollout = batch.rollout
    assert len(batch.responses) == 16
    np.testing.assert_array_equal(rollout.group_ids, np.repeat(np.arange(4), 4))
    for i, text in enumerate(batch.responses):
        ids = rollout.tokens[i, rollout.prompt_lengths[i] : rollout.lengths[i]].tolist()
        ended = ids[-1] in setup.tokenizer.eos_ids
        assert ended != rollout.truncated[i]
        assert text == setup.tokenizer.decode(ids[:-1] if ended else ids)
    lengths = rollout.lengths - rollout.prompt_lengths
    np.testing.assert_array_equal(rollout.response_lengths, lengths)
    assert batch.metrics["length/mean"] == pytest.approx(lengths.mean())
    assert batch.metrics["length/max"] == lengths.max()
    assert batch.metrics["length/truncated_frac"] == pytest.approx(rollout.truncated.mean())


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
