"""Where arrays live on the mesh."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from deltal_jax.config import OptimizerConfig
from deltal_jax.model.families import architecture_of
from deltal_jax.model.lora import LoRA
from deltal_jax.model.published import PUBLISHED
from deltal_jax.model.transformer import abstract_params, make_graphdef
from deltal_jax.parallel.mesh import AXES, make_mesh
from deltal_jax.parallel.sharding import (
    MESH_AXES,
    PARAMETER_AXES,
    by_device,
    constrain,
    parameter_shardings,
    row_shards,
    shard_bucket,
    slot_shards,
    state_shardings,
    token_sharding,
    wholly_replicated,
)
from deltal_jax.training.loss import SUPERVISED
from deltal_jax.training.optimizer import make_optimizer
from deltal_jax.training.step import Update
from deltal_jax.types import Bucket, TrainState
from tests.fakes import FAMILIES, GROUPED, PLAIN, model
from tests.processes import run_processes


def paths(tree) -> dict:
    """Leaves by path."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def test_every_parameter_of_the_model_has_a_row_and_every_row_a_parameter():
    adapted = dataclasses.replace(PLAIN, lora=LoRA(rank=2, alpha=1.0))
    architectures = [PLAIN, GROUPED, adapted, *FAMILIES.values()]
    found = {path for arch in architectures for path in paths(abstract_params(arch))}
    assert found == set(PARAMETER_AXES)
    of_parameters = {axis for axes in PARAMETER_AXES.values() for axis in axes}
    assert set(MESH_AXES) - of_parameters == {
        "rows",
        "tokens",
        "slots",
        "act_embed",
        "act_heads",
    }
    assert {axis for axes in MESH_AXES.values() for axis in axes} == set(AXES)


def test_parameters_are_split_as_the_two_tables_say():
    found = paths(parameter_shardings(make_mesh(2, 2, 2), model(PLAIN)[1]))
    assert {path: sharding.spec for path, sharding in found.items()} == {
        "embed/embedding": P(None, "fsdp"),  # 23 words do not split over 2 tensor devices
        "blocks/attention_norm/scale": P(None, None),
        "blocks/attention/q/kernel": P(None, "fsdp", "tensor"),
        "blocks/attention/k/kernel": P(None, "fsdp", "tensor"),
        "blocks/attention/v/kernel": P(None, "fsdp", "tensor"),
        "blocks/attention/o/kernel": P(None, "tensor", "fsdp"),
        "blocks/mlp_norm/scale": P(None, None),
        "blocks/mlp/gate/kernel": P(None, "fsdp", "tensor"),
        "blocks/mlp/up/kernel": P(None, "fsdp", "tensor"),
        "blocks/mlp/down/kernel": P(None, "tensor", "fsdp"),
        "norm/scale": P(None),
        "head/kernel": P("fsdp", None),
    }


def test_shapes_alone_are_enough():
    mesh, params = make_mesh(1, 2, 4), model(GROUPED)[1]
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert parameter_shardings(mesh, shapes) == parameter_shardings(mesh, params)


def test_each_device_holds_its_part_of_a_parameter():
    mesh, params = make_mesh(2, 2, 2), model(PLAIN)[1]
    placed = jax.device_put(params, parameter_shardings(mesh, params))
    kernel, whole = placed["blocks"]["mlp"]["up"]["kernel"], params["blocks"]["mlp"]["up"]["kernel"]
    for shard in kernel.addressable_shards:
        (_, fsdp, _, tensor) = np.argwhere(mesh.devices == shard.device)[0]
        rows, columns = slice(8 * fsdp, 8 * fsdp + 8), slice(12 * tensor, 12 * tensor + 12)
        np.testing.assert_array_equal(shard.data, np.asarray(whole)[:, rows, columns])


def test_an_unknown_parameter_is_refused_by_its_name():
    mesh, params = make_mesh(), {"blocks": {"attention": {"sink": jnp.ones((2, 3))}}}
    for shardings in (parameter_shardings, state_shardings):
        with pytest.raises(KeyError, match="blocks/attention/sink: not a parameter"):
            shardings(mesh, params)
    with pytest.raises(KeyError, match="ema/norm/scale: not a parameter"):
        parameter_shardings(mesh, {"ema": {"norm": {"scale": jnp.ones(3)}}})
    with pytest.raises(KeyError, match="temperature: not a parameter"):
        parameter_shardings(mesh, {"temperature": jnp.ones(())})


def test_a_parameter_of_other_dimensions_is_refused_by_its_name():
    with pytest.raises(ValueError, match=r"norm/scale: dimensions \(2, 3\) where .*'norm'"):
        parameter_shardings(make_mesh(), {"norm": {"scale": jnp.ones((2, 3))}})


def test_optimizer_moments_follow_their_parameters_and_scalars_are_replicated():
    mesh, params = make_mesh(2, 2, 2), model(PLAIN)[1]
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = TrainState(
        params, optimizer.init(params), jnp.zeros((), jnp.int32), jax.random.key(0), params
    )
    shardings = state_shardings(mesh, state)
    of_parameters = parameter_shardings(mesh, params)
    assert shardings.params == of_parameters and shardings.reference == of_parameters
    adam = shardings.opt_state[1][0]
    assert adam.mu == of_parameters and adam.nu == of_parameters
    assert {s.spec for s in (adam.count, shardings.updates, shardings.key)} == {P()}
    placed = jax.device_put(state, shardings)
    kept = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), placed, shardings)
    assert all(jax.tree.leaves(kept))
    np.testing.assert_array_equal(jax.random.key_data(placed.key), jax.random.key_data(state.key))


def test_large_arrays_that_every_device_holds_whole_are_listed():
    params = model(PLAIN)[1]
    sizes = {path: leaf.nbytes for path, leaf in paths(params).items()}
    norms = {"blocks/attention_norm/scale", "blocks/mlp_norm/scale", "norm/scale"}

    def listed(mesh, over):
        return set(wholly_replicated(parameter_shardings(mesh, params), params, over=over))

    assert listed(make_mesh(2, 2, 2), over=0) == norms
    assert listed(make_mesh(2, 2, 2), over=sizes["norm/scale"]) == norms - {"norm/scale"}
    # 23 words divide by neither axis here, and 16 columns do not divide by 5.
    five = make_mesh(1, 5, 1, devices=jax.devices()[:5])
    assert listed(five, over=1000) == {path for path in sizes if sizes[path] > 1000}
    assert wholly_replicated(parameter_shardings(five, params), params) == []  # none over 1 MiB
    assert listed(make_mesh(8, 1, 1), over=0) == set()


@pytest.mark.parametrize("arch", [PLAIN, GROUPED])
def test_the_forward_pass_on_split_parameters_is_that_of_one_device(arch):
    mesh, (graphdef, params) = make_mesh(2, 2, 2), model(arch)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, arch.vocab, (4, 9)).astype(np.int32)
    positions = np.broadcast_to(np.arange(9, dtype=np.int32), tokens.shape)

    def logits(params, tokens, positions, segments):
        transformer = nnx.merge(graphdef, params)
        return transformer.logits(transformer.hidden(tokens, positions, segments))

    rows = (tokens, positions, np.zeros_like(tokens))
    shardings = parameter_shardings(mesh, params)
    placed = jax.device_put(params, shardings), *jax.device_put(rows, token_sharding(mesh))
    want = np.asarray(jax.jit(logits)(params, *rows))
    found = jax.jit(logits, out_shardings=token_sharding(mesh))(*placed)
    # Of the largest logit: one rounding of each parameter moves the logits as far as that.
    np.testing.assert_allclose(found, want, atol=1e-5 * np.abs(want).max(), rtol=0)


def bucket(rows: int = 8) -> Bucket:
    """Fields of known content; those that may be None are."""
    rng = np.random.default_rng(1)
    by_row = {
        "tokens": np.int32,
        "positions": np.int32,
        "segment_ids": np.int32,
        "loss_mask": bool,
        "sampler_logprobs": np.float32,
        "old_logprobs": np.float32,
    }
    of_responses = ("advantages", "weights", "auxiliary_weights")
    fields = {f.name: None for f in dataclasses.fields(Bucket)}
    fields |= {k: rng.integers(0, 2, (rows, 6)).astype(dtype) for k, dtype in by_row.items()}
    fields |= {k: rng.normal(size=7).astype(np.float32) for k in of_responses}
    return Bucket(**fields)


@pytest.mark.parametrize(
    "sizes", [(8, 1, 1, 1), (2, 2, 2, 1), (1, 8, 1, 1), (1, 1, 8, 1), (2, 2, 1, 2), (1, 2, 2, 2)]
)
def test_a_bucket_is_split_by_rows_and_tokens_and_its_responses_are_everywhere(sizes):
    mesh, host = make_mesh(*sizes), bucket()
    placed = shard_bucket(mesh, host)
    assert row_shards(mesh) == sizes[0] * sizes[1]
    assert slot_shards(mesh) == row_shards(mesh) * sizes[3]
    for field in dataclasses.fields(Bucket):
        want, found = getattr(host, field.name), getattr(placed, field.name)
        if want is None:
            assert found is None
            continue
        assert found.dtype == want.dtype
        np.testing.assert_array_equal(found, want)
        for shard in found.addressable_shards:
            data, fsdp, context, _ = np.argwhere(mesh.devices == shard.device)[0]
            if want.ndim == 2:
                rows = np.split(want, row_shards(mesh))[data * sizes[1] + fsdp]
                want_here = np.split(rows, sizes[3], axis=1)[context]
            else:
                want_here = want
            np.testing.assert_array_equal(shard.data, want_here)


def test_rows_and_tokens_that_do_not_split_evenly_are_refused():
    with pytest.raises(ValueError, match=r"6 rows does not split over 4 .*data=2 × fsdp=2"):
        shard_bucket(make_mesh(2, 2, 2), bucket(rows=6))
    with pytest.raises(ValueError, match=r"rows of 6 tokens does not split over context=4"):
        shard_bucket(make_mesh(2, context=4), bucket())


def test_a_function_of_a_devices_own_tokens_moves_none_and_adds_the_gradient_of_what_is_shared():
    mesh = make_mesh(1, 2, 1, 4)
    host = np.random.default_rng(0).normal(size=(4, 8, 3)).astype(np.float32)
    shared = jnp.asarray([1.0, -2.0, 0.5])

    def own(axes, shared, x):
        """Numbers that tell where each token is, and a sum that the gradient goes through."""
        here = jnp.zeros((), jnp.int32) if not axes else jax.lax.axis_index(axes)
        return jnp.sum(x * shared[None, None], axis=2) ** 2, jnp.full(x.shape[:2], here)

    def total(shared, x):
        found, here = by_device(own, shared, x)
        return jnp.sum(found), here

    both = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
    (want, alone), slopes = both(shared, host)
    assert np.all(alone == 0)
    placed = jax.device_put(host, token_sharding(mesh))
    with jax.set_mesh(mesh):
        program = both.lower(shared, placed).compile()
        (found, here), gradients = program(shared, placed)
    assert float(found) == pytest.approx(float(want), rel=1e-6)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), gradients, slopes
    )
    assert gradients[1].sharding.is_equivalent_to(token_sharding(mesh), 3)
    assert not re.findall("all-gather|all-to-all|permute", program.as_text())
    for shard in here.addressable_shards:
        ((_, fsdp, context, _),) = np.argwhere(mesh.devices == shard.device)
        np.testing.assert_array_equal(shard.data, np.full((2, 2), 4 * fsdp + context))


def test_activations_are_split_by_logical_names_where_there_is_a_mesh():
    x = jnp.ones((4, 6, 5))
    assert constrain(x, "rows", "tokens", "act_embed") is x
    pin = jax.jit(lambda x: constrain(x, "rows", "tokens"))
    for sizes, spec in (
        ((4, 1, 1, 2), P(("data", "fsdp"), "context")),
        ((1, 4, 2, 1), P(("data", "fsdp"))),
        ((2, 1, 1, 4), P("data")),  # 4 does not divide 6
        ((8, 1, 1, 1), P()),
    ):
        mesh = make_mesh(*sizes)
        with jax.set_mesh(mesh):
            assert pin(x).sharding.is_equivalent_to(NamedSharding(mesh, spec), 3), sizes


def split_in_processes() -> dict[str, np.ndarray]:
    """A bucket on the devices of both processes: what each holds, and the whole of it."""
    mesh, host = make_mesh(fsdp=2), bucket()
    placed = shard_bucket(mesh, host)
    return {
        "mine": np.concatenate([shard.data for shard in placed.tokens.addressable_shards]),
        "all": multihost_utils.process_allgather(placed.tokens, tiled=True),
        "weights": np.asarray(placed.weights),
        "weighed": jax.jit(
            lambda b: jnp.sum(b.tokens, axis=1) @ b.old_logprobs,
            out_shardings=NamedSharding(mesh, P()),
        )(placed),
    }


def test_two_processes_split_the_bucket_that_both_hold():
    host = bucket()
    results = run_processes("tests.test_sharding:split_in_processes", devices_each=2)
    for index, found in enumerate(results):
        np.testing.assert_array_equal(found["mine"], np.split(host.tokens, 2)[index])
        np.testing.assert_array_equal(found["all"], host.tokens)
        np.testing.assert_array_equal(found["weights"], host.weights)
        want = host.tokens.sum(axis=1) @ host.old_logprobs
        np.testing.assert_allclose(found["weighed"], want, rtol=1e-6)


@functools.cache
def state_of_3b():
    """All that an update of Qwen2.5-3B may hold: moments, reference, running mean. Shapes alone."""
    arch = architecture_of(PUBLISHED["Qwen/Qwen2.5-3B"])
    options = OptimizerConfig(schedule="cosine", warmup_steps=2)
    optimizer = make_optimizer(options, 10)
    update = Update(make_graphdef(arch), optimizer, SUPERVISED, remembers=True)
    init = functools.partial(update.init, reference=True)
    return jax.eval_shape(init, abstract_params(arch), jax.random.key(0))


@pytest.mark.parametrize(
    "sizes", [(1, 8, 1, 1), (2, 4, 1, 1), (1, 1, 1, 8), (1, 4, 1, 2), (2, 2, 2, 2), (1, 1, 4, 2)]
)
def test_no_array_of_a_3b_state_over_a_mebibyte_is_whole_on_every_device(sizes):
    """Sizes of data, fsdp, context and tensor."""
    mesh, state = AbstractMesh(sizes, AXES), state_of_3b()
    shardings = state_shardings(mesh, state)
    assert wholly_replicated(shardings, state) == []
    kinds = {path.split("/")[0] for path in paths(state)}
    assert {"params", "opt_state", "reference", "direction"} <= kinds
    whole, held = 0, 0
    for leaf, sharding in zip(*map(jax.tree.leaves, (state, shardings)), strict=True):
        size = 4 if leaf.dtype == jax.random.key(0).dtype else leaf.dtype.itemsize
        whole += size * leaf.size
        held += size * int(np.prod(sharding.shard_shape(leaf.shape)))
    assert whole == pytest.approx(5 * 4 * 3_085_938_688, rel=1e-3)  # five copies in float32
    # Beside norms and biases, each device but those of data has its part of everything.
    assert held == pytest.approx(whole / (np.prod(sizes) / sizes[0]), rel=2e-3)
