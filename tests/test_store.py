"""Checkpoints give back every bit, and refuse to be what they are not."""

import dataclasses
import functools
from contextlib import closing
from pathlib import Path

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
from tests.processes import run_processes


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


def test_what_is_saved_is_the_state_as_it_was_however_soon_its_memory_is_given_away(tmp_path):
    """Large arrays, of one device and of several; the update begins while they are written."""
    update = jax.jit(lambda x: jax.tree.map(lambda a: a * 0 - 1, x), donate_argnums=0)
    sharding = jax.sharding.NamedSharding(
        jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,)),
        jax.sharding.PartitionSpec("x"),
    )
    key = jax.random.key(7, impl="threefry2x32")
    with closing(Checkpoints(tmp_path / "c", Keep(last=9))) as checkpoints:
        seen = []
        for number in range(4):
            values = np.full((8, 100_000), float(number), np.float32)
            params = {"one": jnp.asarray(values), "several": jax.device_put(values, sharding)}
            given = TrainState(params, {}, jnp.asarray(0), key)
            checkpoints.save(number, given, POSITION)
            left = {name: update(x) for name, x in params.items()}
            assert given.params["one"].is_deleted() and given.params["several"].is_deleted()
            assert float(left["several"][7, -1]) == -1.0
            kept = [x for group in checkpoints._snapshot._kept.values() for x in group]
            large = [x.addressable_data(0) for x in kept if x.size > 1]
            seen.append([x.unsafe_buffer_pointer() for x in large])
        assert all(len(places) == 2 and places == seen[0] for places in seen), "memory is kept"
        like = abstract_state(lambda: dataclasses.replace(given, params=left))
        for number in range(4):
            restored = checkpoints.read_state(number, like).params
            for name in ("one", "several"):
                assert np.all(np.asarray(restored[name]) == number), (number, name)


def test_the_thread_makes_durable_what_the_position_counts_on_before_the_step_exists(tmp_path):
    found = []
    with closing(Checkpoints(tmp_path / "c")) as checkpoints:
        there = tmp_path / "c" / "1" / "manifest.json"
        before = lambda: found.append((there.exists(), there.parent.is_dir()))  # noqa: E731
        checkpoints.save(1, state(), POSITION, before=before)
        assert checkpoints.all() == [1]
    assert found == [(False, True)]


def test_the_best_by_a_metric_stay_and_are_told_before_they_are_saved(tmp_path):
    keep = Keep(last=1, every=10, best=1, metric="eval/x")
    with closing(Checkpoints(tmp_path / "c", keep)) as checkpoints:
        for step, value in ((1, 0.5), (2, 0.7), (3, 0.6), (10, float("nan")), (11, 0.1)):
            assert checkpoints.among_best({"eval/x": value}) == (step in (1, 2))
            checkpoints.save(step, state(), Position("rl", step, 0, 0), metrics={"eval/x": value})
        assert checkpoints.all() == [2, 10, 11]
        with pytest.raises(UserError, match=r"^checkpoint.best_metric: no .*'eval/x', but eval/y$"):
            checkpoints.among_best({"eval/y": 1.0})
    with closing(Checkpoints(tmp_path / "c", keep)) as checkpoints:  # what they remember
        assert not checkpoints.among_best({"eval/x": 0.65})
        assert checkpoints.among_best({"eval/x": 0.75})


def shared(folder):
    """In each of two processes: save arrays that lie on both, twice, and restore otherwise."""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = (
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in (["x"], [])
    )
    place = functools.partial(jax.make_array_from_callback, (8, 4))
    key = jax.random.key(7, impl="threefry2x32")
    scalars = jax.jit(lambda: (jnp.asarray(5), key), out_shardings=whole)()
    said = []
    with closing(Checkpoints(folder, Keep(last=2), say=said.append)) as checkpoints:
        assert checkpoints.choose(0) is None
        for number in (1, 2, 3):
            values = np.arange(32.0, dtype=np.float32).reshape(8, 4) + number
            params = {"w": place(split, lambda index, values=values: values[index])}
            given = TrainState(params, {}, *scalars)
            checkpoints.save(number, given, Position("rl", number, 0, 0))
        checkpoints.wait()
    if jax.process_index() == 0:
        (Path(folder) / "3" / "commit_success.txt").write_text("")
    with closing(Checkpoints(folder, Keep(last=2), say=said.append)) as checkpoints:
        number = checkpoints.choose(0)
        like = jax.eval_shape(lambda: given)
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), like)
        restored = checkpoints.read_state(number, like)
    return {
        "number": number,
        "w": restored.params["w"].addressable_data(0),
        "key": jax.random.key_data(restored.key).addressable_data(0),
        "said": len(said),
    }


def test_two_processes_save_one_checkpoint_and_agree_on_the_one_that_is_restored(tmp_path):
    results = run_processes("tests.test_store:shared", devices_each=2, folder=str(tmp_path / "c"))
    for process, found in enumerate(results):
        assert found["number"] == 2 and found["said"] == (process == 0)
        np.testing.assert_array_equal(found["w"], np.arange(32).reshape(8, 4) + 2)
        np.testing.assert_array_equal(found["key"], [0, 7])
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["2", "3.damaged"]


def test_an_empty_folder_has_no_newest(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    assert checkpoints.newest() is None
    checkpoints.close()
