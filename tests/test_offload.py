"""Moments in the host's memory: the same steps to the bit, and checkpoints that either kind of run
goes on from."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deltal_jax import Reward, train
from deltal_jax.config import load_config
from deltal_jax.errors import UserError
from deltal_jax.model.remat import PINNED_HOST
from deltal_jax.model.transformer import abstract_params, make_graphdef
from deltal_jax.parallel.mesh import make_mesh
from deltal_jax.parallel.sharding import state_shardings
from deltal_jax.training.activations import activation_bytes, offloaded_bytes
from deltal_jax.training.buckets import make_buckets
from deltal_jax.training.describe import describe_model, memory_estimate
from deltal_jax.training.loss import SUPERVISED, Meters
from deltal_jax.training.setup import check_setup, make_architecture, make_setup
from deltal_jax.training.step import Gradient, Update
from deltal_jax.types import TrainState
from tests import fakes
from tests.runs import TINY, arrays_saved, assert_same, copied, mixed_reward

COUNT = 8
OFFLOAD = {"rl.optimizer.offload": True, "sft.optimizer.offload": True}


@functools.cache
def stepped(moments, offload):
    """The state after two updates."""
    graphdef, params = fakes.model(fakes.PLAIN)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    update = Update(graphdef, optimizer, SUPERVISED, moment_dtype=moments, offload=offload)
    rollout, ones = fakes.rollout(COUNT), np.ones(COUNT, np.float32)
    buckets = make_buckets(
        rollout,
        np.arange(COUNT),
        advantages=ones,
        weights=ones,
        edges=(30,),
        tokens_per_microbatch=240,
    )
    state = update.init(params, jax.random.key(0))
    for _ in range(2):
        before = where(state)
        state, _ = update(state, buckets)
        assert where(state) == before
    return state


def where(state):
    """The kind of memory and the number of dimensions of each array of the optimizer's state."""
    leaves = jax.tree.leaves(state.opt_state)
    return [(x.sharding.memory_kind, x.ndim) for x in leaves]


@pytest.mark.parametrize("moments", ["bfloat16", "float32"])
def test_moments_in_the_hosts_memory_change_no_bit(moments):
    host, device = (stepped(moments, offload) for offload in (True, False))
    for kind, dimensions in where(host):
        assert kind == (PINNED_HOST if dimensions else "device")
    assert {kind for kind, _ in where(device)} == {"device"}
    assert len([kind for kind, _ in where(host) if kind == PINNED_HOST]) > 10
    jax.tree.map(
        np.testing.assert_array_equal,
        (host.params, host.opt_state),
        (device.params, device.opt_state),
    )
    own, other = jax.tree.leaves(host.opt_state), jax.tree.leaves(device.opt_state)
    for one, same in zip(own, other, strict=True):  # each device has its part of either
        assert one.sharding.with_memory_kind("device").is_equivalent_to(same.sharding, one.ndim)


def test_a_run_goes_on_with_moments_on_either_side(tmp_path):
    """An offloaded run, and one that is not, each resumed as it was and as the other is."""
    rewards = [Reward(mixed_reward)]
    options = TINY | {"rl.steps": 2, "model.compute_dtype": "float32"}
    host, device = tmp_path / "host", tmp_path / "device"
    for folder, more in ((host, OFFLOAD), (device, {})):
        train(
            "countdown-tiny", options | more | {"run.dir": str(folder)}, rewards=rewards, quiet=True
        )
    last = options["sft.steps"] + options["rl.steps"]
    found, wanted = arrays_saved(host, last), arrays_saved(device, last)
    assert [x.tobytes() for x in found.values()] == [x.tobytes() for x in wanted.values()]
    for whole, more in ((host, {}), (host, dict.fromkeys(OFFLOAD, False)), (device, OFFLOAD)):
        broken = copied(whole, tmp_path / "broken", last - 1)
        changes = {"run.dir": str(broken)} | more
        train(None, changes, rewards=rewards, resume=True, quiet=True)
        assert_same(broken, whole)


def test_memory_of_the_host_is_counted_apart():
    def memory(**changes):
        config = load_config(
            "countdown-tiny", {k.replace("__", "."): v for k, v in changes.items()}
        )
        arch = make_architecture(config, 23)
        return memory_estimate(config, arch), describe_model(config, arch)

    plain, said = memory()
    host, host_said = memory(rl__optimizer__offload=True)
    assert "of_host" not in plain and "moments in float32\n" in said
    assert "moments in float32 in the host's memory\n" in host_said
    assert host["of_host"] == plain["optimizer"] > 0 == host["optimizer"]
    assert host["total"] == plain["total"] - plain["optimizer"]
    # Where little else is freed before the step, what is moved for it counts.
    few = {"rl__tokens_per_microbatch": 1, "model__layers": 40, "meters__every": 0}
    deep, _ = memory(rl__optimizer__offload=True, model__remat="layer", **few)
    free = deep["activations"] + deep["gradients"] // 2
    assert 0 < deep["optimizer"] == deep["of_host"] - free
    config = load_config("countdown-tiny", {"model.remat": "offload"})
    arch = make_architecture(config, 23)
    inputs, _ = memory(model__remat="offload")
    assert inputs["of_host"] == offloaded_bytes(arch, 5, 200) == 3 * 5 * 200 * 64 * 4
    assert inputs["activations"] == activation_bytes(arch, 5, 200)


@pytest.fixture
def no_compile_cache():
    """What is compiled for a TPU that is not there cannot be read back, so it is not kept."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = jax.config.values[name]
    jax.config.update(name, 1e9)
    yield
    jax.config.update(name, before)


@pytest.mark.slow
@pytest.mark.usefixtures("no_compile_cache")
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.xdist_group("libtpu")  # it locks
def test_a_tpu_has_the_moments_in_the_hosts_memory(monkeypatch):
    """The step for the eight chips of a v5e-8: moments come from the host and go back to the same
    memory there; as arguments a chip has its parts of parameters and gradient alone."""
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    mesh = make_mesh(fsdp=4, tensor=2, devices=devices)
    arch = dataclasses.replace(fakes.PLAIN, d_model=512, d_ff=2048)
    params = abstract_params(arch)
    update = Update(make_graphdef(arch), optax.adamw(1e-3), SUPERVISED, mesh=mesh, offload=True)

    def placed(tree, shardings):
        return jax.tree.map(
            lambda x, own: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own), tree, shardings
        )

    def start(params, key):
        opt_state = update.optimizer.init(params)
        return TrainState(params, opt_state, jnp.zeros((), jnp.int32), key)

    state = jax.eval_shape(start, params, jax.eval_shape(lambda: jax.random.key(0)))
    state = placed(state, update.layout(state))
    gradient = Gradient(params, jax.ShapeDtypeStruct((), jnp.float32), Meters({}, {}))
    gradient = placed(gradient, state_shardings(mesh, gradient))
    step = jax.jit(update._apply, out_shardings=update._as_state(state), donate_argnums=0)
    found = step.lower(state, gradient).compile().memory_analysis()
    part = 4 * sum(x.size for x in jax.tree.leaves(params)) / mesh.size
    for size in (
        found.host_argument_size_in_bytes,
        found.host_output_size_in_bytes,
        found.host_alias_size_in_bytes,
        found.argument_size_in_bytes,
    ):
        assert size == pytest.approx(2 * part, rel=0.05)  # norms are whole on each
    assert found.output_size_in_bytes == pytest.approx(part, rel=0.05)


def test_a_mesh_of_cpus_is_refused_in_one_line():
    """Its devices, waiting for each other and for copies, were seen to wait for ever."""
    setup = make_setup(
        load_config("countdown-tiny", TINY | OFFLOAD | {"mesh.data": -1, "rollout.slots": 8})
    )
    with pytest.raises(
        UserError, match=r"^sft.optimizer.offload: not on a mesh of CPUs; set it to"
    ):
        check_setup(setup)
