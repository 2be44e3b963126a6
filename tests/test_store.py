"""Checkpoints give back every bit, and refuse to be what they are not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deltal_jax.checkpoints.manifest import Position
from deltal_jax.checkpoints.reader import abstract_state
from deltal_jax.checkpoints.retention import Keep
from deltal_jax.checkpoints.store import Checkpoints
from deltal_jax.errors import UserError
from deltal_jax.types import TrainState


def state(width=3, seed=0, optimizer=None):
    params = {"w": jax.random.normal(jax.random.key(seed), (width, 4)), "b": jnp.ones(4)}
    optimizer = optimizer or optax.adam(0.1)
    key = jax.random.key(7, impl="threefry2x32")
    return TrainState(params, optimizer.init(params), jnp.asarray(5), key)


def _halved(x):
    return x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x


POSITION = Position("rl", 3, 48, 1234)


@pytest.mark.parametrize("make", [state, lambda: jax.tree.map(_halved, state())])
def test_every_array_comes_back_bit_for_bit(make, tmp_path):
    """In float32, and parameters and moments in bfloat16."""
    saved = make()
    first = Checkpoints(tmp_path / "c")
    first.save(10, saved, POSITION)
    first.close()
    second = Checkpoints(tmp_path / "c")
    assert second.newest() == 10
    assert second.read_position(10) == POSITION
    restored = second.read_state(10, abstract_state(make))
    second.close()
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(saved), strict=True):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            assert jax.random.key_impl(a) == jax.random.key_impl(b)
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


def test_arrays_beside_the_state_come_back_without_their_shapes_being_known(tmp_path):
    arrays = {
        "carried": {"keys": np.arange(6, dtype=np.uint32).reshape(3, 2), "ended": np.eye(2) > 0},
        "pending": {"rewards": np.asarray([1 / 3, np.nan]), "said": np.frombuffer(b"{}", np.uint8)},
    }
    first = Checkpoints(tmp_path / "c")
    first.save(1, state(), POSITION, arrays)
    first.save(2, state(), POSITION, {})
    first.close()
    second = Checkpoints(tmp_path / "c")
    restored = second.read_rollouts(1)
    assert second.read_rollouts(2) == {}
    second.close()
    jax.tree.map(np.testing.assert_array_equal, restored, arrays)
    assert jax.tree.map(lambda x: x.dtype, restored) == jax.tree.map(lambda x: x.dtype, arrays)


def test_frozen_parameters_are_not_saved_nor_asked_for(tmp_path):
    adapter = {"lora_a": jnp.full((2, 4), 0.5)}
    params = {"layer": {"kernel": jnp.ones((4, 4), jnp.bfloat16), "lora": adapter}}
    whole = dataclasses.replace(state(), params=params, opt_state=(), reference={"r": jnp.ones(2)})
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(1, whole, POSITION)
    restored = checkpoints.read_state(1, abstract_state(lambda: whole))
    checkpoints.close()
    assert restored.params.keys() == {"layer"} and restored.params["layer"].keys() == {"lora"}
    np.testing.assert_array_equal(restored.params["layer"]["lora"]["lora_a"], adapter["lora_a"])
    np.testing.assert_array_equal(restored.reference["r"], whole.reference["r"])


def test_only_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", Keep(last=2))
    for number in (1, 2, 5):
        checkpoints.save(number, state(), POSITION)
    checkpoints.close()
    kept = sorted(int(p.name) for p in (tmp_path / "c").iterdir() if p.name.isdigit())
    assert kept == [2, 5]


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(1, state(), POSITION)
    other = (
        r"does not hold this model and optimizer: .* is float32\[3, 4\] there and float32\[5, 4\]"
    )
    with pytest.raises(UserError, match=other):
        checkpoints.read_state(1, abstract_state(lambda: state(width=5)))
    with pytest.raises(UserError, match=r"is int32.* there and missing here"):
        checkpoints.read_state(1, abstract_state(lambda: state(optimizer=optax.sgd(0.1))))
    halves = jax.eval_shape(lambda: jax.tree.map(_halved, state()))
    with pytest.raises(UserError, match=r"is float32\[4\] there and bfloat16\[4\] here"):
        checkpoints.read_state(1, halves)
    checkpoints.close()


def test_an_empty_folder_has_no_newest(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    assert checkpoints.newest() is None
    checkpoints.close()
