"""A whole update on a mesh, in one process or several, is the update of one device."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deltal_jax.model.lora import LoRA, overlay, trained
from deltal_jax.model.transformer import init_model, make_graphdef, split_model
from deltal_jax.objective.aggregation import AGGREGATIONS
from deltal_jax.objective.divergence import kl_k2
from deltal_jax.objective.surrogate import clipped, gspo
from deltal_jax.parallel.mesh import make_mesh
from deltal_jax.parallel.sharding import row_shards, wholly_replicated
from deltal_jax.training.buckets import make_buckets, make_minibatches
from deltal_jax.training.loss import SUPERVISED, LossTerms
from deltal_jax.training.policy import rollout_logprobs
from deltal_jax.training.step import Update
from tests import fakes
from tests.processes import run_processes

COUNT = 24
#: Sizes of data, fsdp, tensor and context. PLAIN has two heads: 2 tokens' devices exchange them, 4
#: pass keys and values round; neither divides the 30 tokens of a row by 4.
MESHES = [
    (8, 1, 1, 1),
    (4, 2, 1, 1),
    (2, 2, 2, 1),
    (2, 1, 1, 4),
    (1, 2, 2, 2),
    *(
        pytest.param(sizes, marks=pytest.mark.slow)
        for sizes in [
            (2, 4, 1, 1),
            (1, 1, 2, 1),
            (4, 1, 1, 1),
            (2, 2, 1, 2),
            (1, 1, 1, 8),
            (1, 1, 2, 4),
        ]
    ),
]
METHODS = ["delta_l", "sequence_mean", "token_mean", "constant_length"]


def _token_loss(logprobs, advantages, bucket):
    """A token-level and a sequence-level surrogate at once."""
    segments = {"segment_ids": bucket.segment_ids, "mask": bucket.loss_mask, "num_segments": COUNT}
    ranges = {"clip_low": 0.3, "clip_high": 0.3}
    sequence = gspo(logprobs, bucket.old_logprobs, advantages, **segments, **ranges)
    return clipped(logprobs, bucket.old_logprobs, advantages) + sequence


TERMS = LossTerms(_token_loss, divergence=kl_k2, kl_coefficient=0.1, entropy_coefficient=0.1)


@functools.cache
def update_on(sizes, *, distributed=False):
    """The update, compiled so that it leaves the state; the state and the mesh. `sizes` None: one
    device, no mesh."""
    graphdef, params = fakes.model(fakes.PLAIN)
    mesh = None
    if sizes is not None:
        devices = jax.devices() if distributed else jax.devices()[: int(np.prod(sizes))]
        mesh = make_mesh(*sizes, devices=devices)
    update = Update(graphdef, optax.sgd(0.1), TERMS, mesh=mesh)
    return update, jax.jit(update._apply), update.init(params, jax.random.key(0)), mesh


def step_on(sizes, method, *, pack=True, distributed=False):
    """Loss, gradient and new parameters of the second of two mini-batches."""
    update, apply, state, mesh = update_on(sizes, distributed=distributed)
    rollout = fakes.rollout(COUNT)
    weights = np.asarray(AGGREGATIONS[method](jnp.asarray(rollout.response_lengths)))
    advantages = np.random.default_rng(1).normal(size=COUNT).astype(np.float32)
    _, buckets = make_minibatches(
        rollout,
        rollout.group_ids // 3,
        advantages=advantages,
        weights=weights,
        auxiliary_weights=np.full(COUNT, 1e-2, np.float32),
        reference_logprobs=rollout.logprobs + np.float32(0.1),
        edges=(30,),
        tokens_per_microbatch=120,
        pack=pack,
        row_multiple=1 if mesh is None else row_shards(mesh),
    )
    gradient = update.accumulate(state.params, buckets)
    after, norms = apply(state, gradient)
    tree = {"grads": gradient.grads, "params": after.params}
    if distributed:
        from jax.experimental.multihost_utils import process_allgather

        tree = process_allgather(tree, tiled=True)
    arrays = {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree.leaves_with_path(tree)}
    return arrays | {
        "loss": np.asarray(gradient.loss),
        "norm": np.asarray(norms["optim/grad_norm"]),
    }


def assert_same(found, want):
    assert set(found) == set(want)
    for name, array in want.items():
        error = np.linalg.norm(found[name] - array)
        assert error <= 1e-5 * np.linalg.norm(array), name
    assert np.linalg.norm(want["norm"]) > 1e-3


@pytest.mark.parametrize("sizes", MESHES)
def test_loss_gradient_and_sgd_step_on_a_mesh_are_those_of_one_device(sizes):
    for method in METHODS:
        for pack in (False, True) if method == "delta_l" else (True,):
            assert_same(step_on(sizes, method, pack=pack), step_on(None, method, pack=pack))


def test_log_probabilities_of_rows_that_are_padded_to_split_are_those_of_one_device():
    found = []
    for sizes in (None, (2, 1, 1, 4)):
        update, _, state, mesh = update_on(sizes)
        layout = {"edges": (30,), "tokens_per_microbatch": 120, "pack": True}
        rows = 1 if mesh is None else row_shards(mesh)
        found.append(
            rollout_logprobs(
                update, state.params, fakes.rollout(COUNT), row_multiple=rows, **layout
            )
        )
    np.testing.assert_allclose(found[1], found[0], atol=1e-5)
    assert found[0].shape == (COUNT, 30) and np.abs(found[0]).max() > 1


def test_parameters_gradients_and_moments_are_laid_out_alike_and_stay_so():
    graphdef, params = fakes.model(fakes.PLAIN)
    mesh = make_mesh(2, 2, 2)
    update = Update(graphdef, optax.adam(0.1), TERMS, mesh=mesh)
    state = update.init(params, jax.random.key(0), reference=True)
    before = jax.tree.map(lambda x: x.sharding, state)
    assert not wholly_replicated(before.params, state.params, over=1000)
    mu = state.opt_state[0].mu
    for moments in (mu, state.reference):
        assert jax.tree.leaves(jax.tree.map(lambda x: x.sharding, moments)) == jax.tree.leaves(
            before.params
        )
    split = [s for s in jax.tree.leaves(before.params) if not s.is_fully_replicated]
    assert len(split) >= 8
    rollout = fakes.rollout(COUNT)
    ones = np.ones(COUNT, np.float32)
    (buckets,) = make_minibatches(
        rollout,
        np.zeros(COUNT, int),
        advantages=ones,
        weights=ones,
        auxiliary_weights=ones,
        reference_logprobs=rollout.logprobs,
        edges=(30,),
        tokens_per_microbatch=120,
        row_multiple=4,
    )
    gradient = update.accumulate(state.params, buckets)
    after, _ = update.apply(state, gradient)
    for tree in (gradient.grads, after.params, after.opt_state[0].mu):
        found = jax.tree.map(
            lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), tree, before.params
        )
        assert all(jax.tree.leaves(found))


def narrow(x):
    return x.astype(jnp.bfloat16)


def stored_in_bfloat16(kind):
    """Graph definition and parameters, computed in float32: all stored in bfloat16, or all beside
    adapters in float32."""
    lora = LoRA(2, 4.0, ("q_proj", "o_proj", "down_proj")) if kind == "adapters" else None
    arch = dataclasses.replace(fakes.PLAIN, compute_dtype="float32", lora=lora)
    params = split_model(init_model(arch, jax.random.key(0)))[1]
    low = overlay(params, jax.tree.map(narrow, fakes.model(fakes.PLAIN)[1]))
    if lora is None:
        return make_graphdef(arch), low
    adapters = jax.tree.map(lambda x: x + 0.1, trained(params))  # B starts at 0
    return make_graphdef(arch), overlay(low, adapters)


@functools.cache
def narrow_steps(kind, sizes):
    """The first gradient, and the state before and after two updates."""
    graphdef, params = stored_in_bfloat16(kind)
    mesh = None if sizes is None else make_mesh(*sizes)
    moments = "float32" if kind == "adapters" else "bfloat16"
    update = Update(graphdef, optax.adam(1e-3), SUPERVISED, mesh=mesh, moment_dtype=moments)
    state = update.init(params, jax.random.key(0), reference=True)
    rollout, ones = fakes.rollout(COUNT), np.ones(COUNT, np.float32)
    buckets = make_buckets(
        rollout,
        np.arange(COUNT),
        advantages=ones,
        weights=ones,
        edges=(30,),
        tokens_per_microbatch=120,
        row_multiple=1 if mesh is None else row_shards(mesh),
    )
    # Too many programs of eight devices at once, and on a busy machine each waits for another.
    gradient = jax.block_until_ready(update.accumulate(state.params, buckets).grads)
    before = jax.block_until_ready(jax.tree.map(jnp.copy, state))
    for _ in range(2):
        state, _ = update(state, buckets)
    return gradient, before, state


@pytest.mark.parametrize("kind", ["adapters", "bfloat16"])
def test_what_is_stored_in_bfloat16_is_trained_on_a_mesh_as_on_one_device(kind):
    gradient, before, after = narrow_steps(kind, (2, 2, 2))
    want, _, alone = narrow_steps(kind, None)
    # Gradients of bfloat16 parameters are rounded to it once a micro-batch.
    tolerance = 1e-5 if kind == "adapters" else 2**-8
    for found, wanted in zip(*map(jax.tree.leaves, (gradient, want)), strict=True):
        assert found.dtype == jnp.float32
        assert np.linalg.norm(np.asarray(found) - wanted) <= tolerance * np.linalg.norm(wanted)
    # The same random numbers round on all meshes, so that few numbers fall to the other side.
    pairs = list(zip(*map(jax.tree.leaves, (after.params, alone.params)), strict=True))
    assert [a.dtype for a, _ in pairs] == [b.dtype for _, b in pairs]
    far = [np.abs(np.asarray(a, float) - np.asarray(b, float)) > 1e-5 for a, b in pairs]
    assert np.mean(np.concatenate([x.ravel() for x in far])) < 0.02
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before.params, after.params)
    assert all(jax.tree.leaves(trained(moved)))
    assert sum(jax.tree.leaves(moved)) == len(jax.tree.leaves(trained(moved)))


@pytest.mark.parametrize("kind", ["adapters", "bfloat16"])
def test_what_is_trained_is_laid_out_as_its_moments_and_reference_are(kind):
    gradient, before, after = narrow_steps(kind, (2, 2, 2))
    want = trained(before.params)
    moments = after.opt_state[0]
    for tree in (gradient, trained(after.params), moments.mu, moments.nu, after.reference):
        alike = jax.tree.map(
            lambda x, w: x.sharding.is_equivalent_to(w.sharding, x.ndim), tree, want
        )
        assert all(jax.tree.leaves(alike))
    stored = {str(x.dtype) for x in jax.tree.leaves((moments.mu, moments.nu))}
    assert stored == {"float32" if kind == "adapters" else "bfloat16"}
    split = [x for x in jax.tree.leaves(want) if not x.sharding.is_fully_replicated]
    assert len(split) >= 6
    for a, b in zip(*map(jax.tree.leaves, (before.reference, after.reference)), strict=True):
        np.testing.assert_array_equal(a, b)


def in_processes(method: str) -> dict[str, np.ndarray]:
    """What each of two processes finds, with two devices each."""
    return step_on((2, 2, 1), method, distributed=True)


def test_two_processes_take_the_step_of_one_device():
    want = step_on(None, "delta_l")
    target = "tests.test_step_on_meshes:in_processes"
    for found in run_processes(target, count=2, devices_each=2, method="delta_l"):
        assert_same(found, want)


#: Scanned, as no fewer layers are; heads that 2 tensor devices divide.
DEEP = dataclasses.replace(fakes.PLAIN, layers=6, d_model=32, d_ff=48, remat="layer")


def collectives(sizes):
    """(kind, dimensions of the first result, where it comes from) of all that devices exchange in
    the gradient of a bucket of 8 × 32 tokens, as it is compiled."""
    graphdef, params = fakes.model(DEEP)
    mesh = make_mesh(*sizes)
    update = Update(graphdef, optax.sgd(0.1), SUPERVISED, mesh=mesh)
    state = update.init(params, jax.random.key(0))
    ones = np.ones(8, np.float32)
    (bucket,) = make_buckets(
        fakes.rollout(8),
        np.arange(8),
        advantages=ones,
        weights=ones,
        edges=(32,),
        tokens_per_microbatch=256,
        row_multiple=8,
    )
    layout = update._as_gradient(state.params)
    with jax.set_mesh(mesh):
        program = jax.jit(update.gradient, out_shardings=layout)
        text = program.lower(state.params, update.place(bucket)).compile().as_text()
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    pattern = rf"= \(?\w+\[([\d,]*)\].*? ({kinds})(?:-start)?\(.*op_name=\"([^\"]*)"
    return [
        (kind, tuple(int(x) for x in dims.split(",") if x), source)
        for dims, kind, source in re.findall(pattern, text)
    ]


@pytest.mark.parametrize("sizes", [(1, 8, 1, 1), (1, 2, 2, 2)])
def test_nothing_is_gathered_whole_but_one_layer_and_both_ends(sizes):
    """Parameters are gathered a layer at a time, inside the scan, and never a stack of all; those
    of the ends once, outside the loop over chunks of logits; activations not at all."""
    found = collectives(sizes)
    gathered = [dims for kind, dims, _ in found if kind == "all-gather"]
    layer = (DEEP.d_model, DEEP.d_ff // sizes[2])
    assert layer in gathered and layer[::-1] in gathered
    assert not [dims for dims in gathered if np.prod(dims) > max(DEEP.d_ff, 23) * DEEP.d_model]
    assert not [dims for dims in gathered if DEEP.layers in dims and np.prod(dims) > 8 * 32]
    assert not [dims for dims in gathered if len(dims) > 2]  # rows × tokens × anything
    ends = [source for _, dims, source in found if 23 in dims]
    assert ends and not [source for source in ends if "while/body" in source]
