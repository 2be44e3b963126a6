"""What is kept of a batch: what its losses were multiplied by, and the same bytes each time."""

import dataclasses
import json

import numpy as np
import pytest

from deltal_jax.config import load_config
from deltal_jax.data.prompts import problems_at
from deltal_jax.training.collect import Collected, response_texts
from deltal_jax.training.objective import weigh
from deltal_jax.training.policy import make_updates
from deltal_jax.training.rollouts import SAMPLES, write_rollout
from deltal_jax.training.setup import make_setup
from tests import fakes

COUNT = 20


@pytest.fixture(scope="module")
def setup():
    options = {"rl.prompts_per_step": 5, "rl.samples_per_prompt": 4, "objective.alpha": 0.75}
    correction = {"old_logprobs": "recompute", "importance_correction": "token_mask"}
    options |= {f"objective.{name}": value for name, value in correction.items()}
    return make_setup(load_config("countdown-tiny", options))


@pytest.fixture(scope="module")
def batch():
    rollout = dataclasses.replace(fakes.rollout(COUNT), truncated=np.arange(COUNT) == 3)
    rewards = np.random.default_rng(0).integers(0, 2, COUNT).astype(np.float32)
    rewards[5] = np.nan
    return Collected(rollout.group_ids + 7, rollout, rewards, {})


def written(folder, setup, batch, weighted) -> dict:
    write_rollout(folder, setup, 20, batch, weighted)
    (path,) = (folder / "rollouts").iterdir()
    assert path.name == "step-000020.json"
    return json.loads(path.read_text(encoding="utf-8"))


def test_each_number_is_of_its_response(setup, batch, tmp_path):
    weighted = weigh(setup.config, batch.rollout, batch.rewards)
    found = written(tmp_path, setup, batch, weighted)
    assert found["step"] == 20 and found["rewards"][5] is None
    assert found["lengths"] == batch.rollout.response_lengths.tolist()
    assert found["rewards"][:5] == batch.rewards[:5].tolist()
    np.testing.assert_array_equal(np.float32(found["advantages"]), weighted.advantages)
    np.testing.assert_array_equal(np.float32(found["weights"]), weighted.weights)
    assert found["truncated"] == batch.rollout.truncated.tolist()
    problems = problems_at(setup.task, setup.config.seed, batch.positions)
    texts = response_texts(setup, batch.rollout)
    assert len(found["samples"]) == SAMPLES < COUNT
    for row, sample in enumerate(found["samples"]):
        assert sample == {
            "prompt": problems[row].prompt,
            "response": texts[row],
            "answer": problems[row].answer,
            "reward": found["rewards"][row],
            "advantage": found["advantages"][row],
            "weight": found["weights"][row],
            "length": found["lengths"][row],
            "truncated": found["truncated"][row],
        }


def test_the_weights_are_those_of_the_updates_and_the_lengths_what_they_are_of(
    setup, batch, tmp_path
):
    """Rejected tokens leave the lengths; the mini-batches' own factor is no part of the weights."""
    old = batch.rollout.logprobs + np.where(np.arange(30) % 7 == 6, 2.0, 0.0).astype(np.float32)
    batch = dataclasses.replace(batch, old_logprobs=old)
    plan = make_updates(setup, batch, 0.75)
    found = written(tmp_path, setup, batch, plan.weighted)
    np.testing.assert_array_equal(np.float32(found["weights"]), plan.minibatches[0][0].weights)
    lengths, weights = np.asarray(found["lengths"], float), np.asarray(found["weights"])
    assert lengths.sum() < batch.rollout.response_lengths.sum()
    kept = (weights > 0) & (lengths > 0)
    by_length = lengths[kept] ** -0.75
    np.testing.assert_allclose(weights[kept] * 192, by_length / by_length.sum(), rtol=1e-5)


def test_the_same_batch_gives_the_same_bytes(setup, batch, tmp_path):
    weighted = weigh(setup.config, batch.rollout, batch.rewards)
    written(tmp_path, setup, batch, weighted)
    path = tmp_path / "rollouts" / "step-000020.json"
    before = path.read_bytes()
    written(tmp_path, setup, batch, weighted)
    assert path.read_bytes() == before
