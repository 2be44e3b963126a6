"""Sampling on a mesh: the ids of one device, whatever is split, and on several processes."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from deltal_jax.errors import UserError
from deltal_jax.model.transformer import make_graphdef
from deltal_jax.parallel.mesh import make_mesh
from deltal_jax.parallel.sharding import parameter_shardings
from deltal_jax.rollout import engine as module
from deltal_jax.rollout import pools
from deltal_jax.rollout.engine import Engine, SamplingOptions
from deltal_jax.rollout.results import assemble, begin
from tests import fakes
from tests.processes import run_processes

OPTIONS = SamplingOptions(slots=8, max_response_length=12, eos_ids=(fakes.EOS, 5))
KEY = jax.random.key(11, impl="threefry2x32")
#: Mesh sizes (data, fsdp, tensor, context); prompts that devices share evenly, or not.
MESHES = {(8, 1, 1): 8, (2, 2, 2): 5, (1, 1, 2): 5, (1, 4, 1): 5, (1, 2, 2, 2): 5}
#: Most responses are short, some are long.
LONG_TAILED = SamplingOptions(slots=4, max_response_length=24, eos_ids=(3, 5, 7, 9))


@functools.cache
def engine_on(sizes=None, options=OPTIONS):
    """On the first devices, or without a mesh; what it has compiled serves all tests."""
    mesh = sizes and make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    return Engine(fakes.model(fakes.PLAIN)[0], options, mesh=mesh)


@functools.cache
def sampled(count, sizes=None, options=OPTIONS):
    params, engine = fakes.model(fakes.PLAIN)[1], engine_on(sizes, options)
    if engine.mesh is not None:  # as training keeps them
        params = jax.device_put(params, parameter_shardings(engine.mesh, params))
    return engine.generate(params, fakes.prompts(count), KEY, samples=3, step=2)


@pytest.mark.parametrize("sizes", MESHES)
def test_the_ids_on_a_mesh_are_those_of_one_device(sizes):
    count = MESHES[sizes]
    want, _ = sampled(count)
    got, stats = sampled(count, sizes)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.loss_mask, want.loss_mask)
    np.testing.assert_array_equal(got.truncated, want.truncated)
    np.testing.assert_array_equal(got.group_ids, want.group_ids)
    np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-5)
    assert stats.useful_steps == want.response_lengths.sum()


def test_a_kernel_that_the_compiler_does_not_split_prefills_on_a_mesh():
    """Rows over data, heads over tensor; interpreted here."""
    arch = dataclasses.replace(fakes.PLAIN, attention="splash")
    mesh = make_mesh(2, 1, 2, devices=jax.devices()[:4])
    engine = Engine(make_graphdef(arch), OPTIONS, mesh=mesh)
    params = fakes.model(fakes.PLAIN)[1]
    got, _ = engine.generate(params, fakes.prompts(5), KEY, samples=3, step=2)
    np.testing.assert_array_equal(got.tokens, sampled(5)[0].tokens)


def test_the_mesh_may_be_one_of_its_own_apart_from_that_of_training():
    """Parameters on four devices, slots on two others."""
    training = make_mesh(2, 2, 1, devices=jax.devices()[:4])
    mesh = make_mesh(2, 1, 1, devices=jax.devices()[6:])
    graphdef, params = fakes.model(fakes.PLAIN)
    params = jax.device_put(params, parameter_shardings(training, params))
    engine = Engine(graphdef, OPTIONS, mesh=mesh)
    got, _ = engine.generate(params, fakes.prompts(5), KEY, samples=3, step=2)
    np.testing.assert_array_equal(got.tokens, sampled(5)[0].tokens)


@pytest.mark.parametrize("knobs", [{"top_k": 3, "raw_logprobs": True}, {"temperature": 0.0}])
def test_every_knob_does_on_a_mesh_what_it_does_on_one_device(knobs):
    options = dataclasses.replace(OPTIONS, **knobs)
    want, _ = sampled(4, options=options)
    got, _ = sampled(4, (2, 1, 2), options)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-5)
    if options.raw_logprobs:
        np.testing.assert_allclose(got.raw_logprobs, want.raw_logprobs, atol=1e-5)


@pytest.mark.parametrize("seed", range(2))
def test_pools_and_windows_on_a_mesh_change_no_id(seed, monkeypatch):
    """Devices that run out of work, or of room, at different times: none waits for ever."""
    monkeypatch.setattr(module, "NARROWEST", 8)
    monkeypatch.setattr(pools, "POOL_PAIRS", 2)
    params = fakes.model(fakes.PLAIN)[1]
    key = jax.random.key(seed, impl="threefry2x32")
    want, got = (
        engine_on(sizes, LONG_TAILED).generate(params, fakes.prompts(24), key, samples=1)[0]
        for sizes in (None, (2, 1, 1))
    )
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-5)


def test_who_listens_changes_nothing_on_a_mesh(monkeypatch):
    """A device whose responses outgrow the cache waits for the others, as without a listener."""
    monkeypatch.setattr(module, "NARROWEST", 8)
    monkeypatch.setattr(module, "CHUNK", 3)
    params, engine = fakes.model(fakes.PLAIN)[1], engine_on((2, 1, 1), LONG_TAILED)
    none, told = begin(LONG_TAILED, fakes.prompts(12), KEY, samples=1), {}
    for needed in (None, 4):
        want, steps = engine.sample(params, none, needed=needed)
        found, same = engine.sample(params, none, needed=needed, finished=told.__setitem__)
        jax.tree.map(np.testing.assert_array_equal, found, want)
        assert same == steps and len(told) > 0.6 * found.finished.sum()
        for row, tokens in told.items():
            np.testing.assert_array_equal(tokens, found.tokens[row, : found.lengths[row]])
        told.clear()


def test_what_was_begun_goes_on_with_the_same_ids_on_a_mesh(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 3)
    params = fakes.model(fakes.PLAIN)[1]
    engine = engine_on((2, 1, 1), dataclasses.replace(OPTIONS, slots=4))
    none = begin(OPTIONS, fakes.prompts(5), KEY, samples=3, step=2)
    some, _ = engine.sample(params, none, needed=2)
    assert some.finished[:6].all() and not some.finished.all()
    got = assemble(engine.sample(params, some)[0])
    want, _ = sampled(5)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-5)


def test_slots_that_do_not_split_over_the_devices_are_refused():
    mesh = make_mesh(4, 2, 1)
    with pytest.raises(UserError, match=r"rollout\.slots: 4 do not split over the mesh's 8"):
        Engine(fakes.model(fakes.PLAIN)[0], dataclasses.replace(OPTIONS, slots=4), mesh=mesh)


def sample_together(sizes):
    """In each of several processes: what each of them gets."""
    sizes = tuple(sizes)
    rollout, stats = sampled(5, sizes)
    fields = {name: getattr(rollout, name) for name in ("tokens", "logprobs", "truncated")}
    fields |= {"steps": stats.slot_steps, "useful": stats.useful_steps}
    start = 2 * jax.process_index()
    own = jax.tree.map(lambda x: x[start : start + 2], fakes.prompts(5))
    params, engine = fakes.model(fakes.PLAIN)[1], engine_on(sizes)
    mine, _ = engine.generate(params, own, KEY, samples=3, step=2, own_prompts=True)
    uneven = fakes.prompts(1 + jax.process_index())
    with pytest.raises(UserError, match=r"prompts: processes have \[\[1, 6\], \[2, 6\]\]"):
        engine.generate(params, uneven, KEY, samples=3, own_prompts=True)
    return fields | {"own_tokens": mine.tokens, "own_groups": mine.group_ids}


def test_two_processes_sample_what_one_does():
    """Two devices in each; slots over data, heads over tensor. All give the same prompts, or each
    its own."""
    want, _ = sampled(5)
    target = "tests.test_engine_on_meshes:sample_together"
    results = run_processes(target, count=2, devices_each=2, timeout=300.0, sizes=[2, 1, 2])
    for process, found in enumerate(results):
        np.testing.assert_array_equal(found["own_tokens"], want.tokens[6 * process :][:6])
        np.testing.assert_array_equal(found["own_groups"], [0, 0, 0, 1, 1, 1])
        np.testing.assert_array_equal(found["tokens"], want.tokens)
        np.testing.assert_array_equal(found["truncated"], want.truncated)
        np.testing.assert_allclose(found["logprobs"], want.logprobs, atol=1e-5)
        assert found["useful"] == want.response_lengths.sum() <= found["steps"]
