"""The schedule and the optimizer of a phase."""

import jax.numpy as jnp
import numpy as np
import pytest

from deltal_jax.config import OptimizerConfig
from deltal_jax.training.optimizer import learning_rate, make_optimizer


def rates(config, steps, at):
    schedule = learning_rate(config, steps)
    return [float(np.asarray(schedule(step))) for step in at]


def test_warm_up_starts_above_zero_and_ends_at_the_peak():
    config = OptimizerConfig(learning_rate=0.6, warmup_steps=5)
    assert rates(config, 100, range(7)) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.6])


def test_cosine_ends_at_the_final_fraction():
    config = OptimizerConfig(
        learning_rate=1.0, warmup_steps=10, schedule="cosine", final_fraction=0.05
    )
    middle = 0.05 + 0.95 * 0.5
    assert rates(config, 110, [10, 60, 110]) == pytest.approx([1.0, middle, 0.05])


def test_the_first_update_is_adamw_by_hand():
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.01, clip_norm=1.0, epsilon=1e-8)
    optimizer = make_optimizer(config, 10)
    params, grads = {"w": jnp.asarray([2.0, -1.0])}, {"w": jnp.asarray([3.0, -4.0])}
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    # After bias correction Adam's first step is the gradient's sign; the clip does not change it.
    want = -0.1 * (np.sign([3.0, -4.0]) + 0.01 * np.asarray([2.0, -1.0]))
    np.testing.assert_allclose(updates["w"], want, rtol=1e-5)


def test_the_clip_scales_gradients_against_epsilon():
    """Where a gradient is small against epsilon, Adam's step shrinks with the clip."""
    big = {"w": jnp.asarray([300.0, -400.0])}
    steps = {}
    for clip in (None, 1.0):
        optimizer = make_optimizer(
            OptimizerConfig(learning_rate=1.0, epsilon=1.0, clip_norm=clip), 10
        )
        params = {"w": jnp.zeros(2)}
        steps[clip] = np.asarray(optimizer.update(big, optimizer.init(params), params)[0]["w"])
    np.testing.assert_allclose(steps[None], [-300 / 301, 400 / 401], rtol=1e-5)
    np.testing.assert_allclose(steps[1.0], [-0.6 / 1.6, 0.8 / 1.8], rtol=1e-5)
