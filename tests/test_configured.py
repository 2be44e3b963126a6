"""Configs on one batch of responses: their figures are those of gradients A_i times the score's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltal_jax.config import Config, load_config
from deltal_jax.laboratory.aggregations import Pool, compare
from deltal_jax.laboratory.configured import compare_configs, unmeasured
from deltal_jax.objective.advantages import ADVANTAGES
from deltal_jax.objective.surrogate import SURROGATES
from deltal_jax.training.collect import Collected
from deltal_jax.training.objective import make_loss
from deltal_jax.types import Bucket
from tests import fakes

GROUPS, SAMPLES, COUNT = 16, 4, 64


def config(**objective) -> Config:
    fields = {"rl.prompts_per_step": 4, "rl.samples_per_prompt": SAMPLES}
    return load_config(
        "countdown-tiny", fields | {f"objective.{k}": v for k, v in objective.items()}
    )


@pytest.fixture(scope="module")
def batch():
    rollout = fakes.rollout(COUNT)
    rewards = np.random.default_rng(1).integers(0, 2, COUNT).astype(np.float32)
    return Collected(np.repeat(np.arange(GROUPS), SAMPLES), rollout, rewards, {})


@pytest.fixture(scope="module")
def scores(batch):
    """Gradients of scores whose mean is far above their noise."""
    noise = np.random.default_rng(2).normal(size=(COUNT, 5))
    sign = np.where(batch.rewards > 0, 1.0, -1.0)[:, None]
    return sign + 0.3 * np.sqrt(batch.rollout.response_lengths)[:, None] * noise


def measured(scores, batch, *configs, beta=1.4):
    named = {str(at): one for at, one in enumerate(configs)}
    every = np.ones(COUNT, bool)
    return compare_configs(scores @ scores.T, batch, named, configs[0], every, beta)


def test_another_advantage_is_as_if_the_gradients_were_taken_with_it(scores, batch):
    """The laboratory's own figures of gradients A_i g_i."""
    changed = config(advantage="group_center", aggregation="token_mean")
    given = (batch.rewards, batch.rollout.group_ids)
    advantages = np.asarray(ADVANTAGES["group_center"](*map(jnp.asarray, given)))
    own = scores * advantages[:, None]
    pool = Pool(batch.rollout.response_lengths, advantages, np.ones(COUNT, bool), GROUPS)
    expected = {row["aggregation"]: row for row in compare(own @ own.T, pool, 4, None)}
    row = measured(scores, batch, config(), changed)[1]
    for name in ("variance", "cv", "cv_high", "bias_cosine", "true_cosine", "gain", "cosine"):
        assert expected["token_mean"][name] is not None
        assert row[name] == pytest.approx(expected["token_mean"][name], rel=1e-4, abs=1e-6)


def test_filtered_responses_count_for_nothing(scores, batch):
    """Whatever their gradients are."""
    truncated = np.arange(COUNT) % 5 == 0
    cut = dataclasses.replace(batch.rollout, truncated=truncated)
    other = np.where(truncated[:, None], 100.0, scores)
    filtered = config(overlong_filter="truncated")
    rows = [
        measured(x, dataclasses.replace(batch, rollout=cut), filtered)[0] for x in (scores, other)
    ]
    assert rows[0] == rows[1]


def test_what_these_responses_say_nothing_of(scores, batch):
    shared, follows = config(), config(alpha="beta")
    assert unmeasured(follows, shared, 1.0) is None
    assert unmeasured(follows, shared, None) == "its exponent is β, and none could be fitted"
    equal = dataclasses.replace(batch, rewards=np.ones(COUNT, np.float32))
    (row,) = measured(scores, equal, shared)
    assert set(row) == {"name", "reason"} and "every advantage is 0" in row["reason"]


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_where_the_ratio_is_1_every_surrogate_is_the_advantage_times_the_score(surrogate):
    """Two responses in a row, one good and one bad, and padding."""
    values = jnp.asarray([[-0.5, -1.2, -3.0, -0.1, -2.0, -0.7]])
    segments, mask = jnp.asarray([[0, 0, 1, 1, 1, 2]]), jnp.asarray([[True] * 5 + [False]])
    zeros = jnp.zeros_like(values)
    bucket = Bucket(
        segments, segments, segments, mask, values, values, jnp.ones(2), jnp.ones(2), zeros[0, :2]
    )  # fmt: skip
    advantages = jnp.asarray([[1.5, 1.5, -0.7, -0.7, -0.7, 0.0]])
    terms = make_loss(config(surrogate=surrogate))
    loss = lambda x: jnp.sum(jnp.where(mask, terms.token_loss(x, advantages, bucket), 0.0))  # noqa: E731
    np.testing.assert_allclose(jax.grad(loss)(values), -advantages, atol=1e-6)
