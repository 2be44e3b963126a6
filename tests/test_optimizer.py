"""The schedule and the optimizer of a phase."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltal_jax.config import OptimizerConfig
from deltal_jax.training.optimizer import (
    learning_rate,
    make_optimizer,
    round_like,
    stochastic_round,
    widen,
)


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


_rounded = jax.jit(lambda x, seed: stochastic_round(x, jax.random.key(seed)))


@given(st.floats(width=32), st.integers(0, 2**31 - 1))
def test_a_rounded_number_is_one_of_its_two_neighbours(value, seed):
    x = np.float32(value)
    got = np.float32(_rounded(x, seed))
    nearest = np.float32(jnp.bfloat16(x))
    if not np.isfinite(x):
        np.testing.assert_array_equal(got, nearest)
    elif nearest == x:
        assert got == x
    else:
        cut = np.uint32(x.view(np.uint32) & 0xFFFF0000)
        pair = [cut.view(np.float32), np.uint32(cut + 0x10000).view(np.float32)]
        assert got in pair and nearest in pair


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_the_mean_of_rounded_numbers_is_the_number(part):
    """Between two neighbours, `part` of the way up: the upper one is drawn so often."""
    low, step, count = 1.0, 2.0**-7, 200_000
    x = jnp.full(count, low + part * step)
    drawn = np.asarray(stochastic_round(x, jax.random.key(3)), np.float64)
    assert set(np.unique(drawn)) == {low, low + step}
    upper = np.mean(drawn > low)
    assert abs(upper - part) < 5 * (part * (1 - part) / count) ** 0.5


def test_steps_that_rounding_to_nearest_loses_add_up():
    """300 steps of 1e-6 from 0.02, a 60th of what a bfloat16 can show there."""

    @jax.jit
    def step(stored, nearest, number):
        wide = widen({"x": stored})["x"] + 1e-6
        new = round_like({"x": wide}, {"x": stored}, jax.random.key(number))["x"]
        return new, (nearest.astype(jnp.float32) + 1e-6).astype(jnp.bfloat16)

    stored = nearest = jnp.full(4096, 0.02, jnp.bfloat16)
    for number in range(300):
        stored, nearest = step(stored, nearest, number)
    moved = np.float64(np.mean(np.asarray(stored, np.float64)) - float(jnp.bfloat16(0.02)))
    assert moved == pytest.approx(3e-4, rel=0.05)
    assert (nearest == jnp.bfloat16(0.02)).all()


def test_only_what_is_stored_in_bfloat16_is_widened_and_rounded():
    tree = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(2), "c": jnp.ones((), jnp.int32)}
    wide = widen(tree)
    assert {k: str(v.dtype) for k, v in wide.items()} == {
        "a": "float32",
        "b": "float32",
        "c": "int32",
    }
    odd = jax.tree.map(lambda x: x * 1.001 if x.dtype == jnp.float32 else x, wide)
    again = round_like(odd, tree, jax.random.key(0))
    assert jax.tree.map(lambda x: x.dtype, again) == jax.tree.map(lambda x: x.dtype, tree)
    np.testing.assert_array_equal(again["b"], odd["b"])


def test_leaves_of_the_same_shape_are_rounded_by_different_draws():
    stored = {"a": jnp.zeros(4096, jnp.bfloat16), "b": jnp.zeros(4096, jnp.bfloat16)}
    half = jax.tree.map(lambda x: x.astype(jnp.float32) + 1.0 + 2.0**-8, stored)
    got = round_like(half, stored, jax.random.key(1))
    assert 0.4 < np.mean(np.asarray(got["a"] == got["b"])) < 0.6
