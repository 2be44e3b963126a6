"""Adapters change nothing at first, are all that is trained, and merge into what they stood for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from deltal_jax.model.lora import TARGETS, LoRA, merge_adapters, overlay, trained
from deltal_jax.model.transformer import abstract_params, init_model, make_graphdef, split_model
from deltal_jax.training.loss import SUPERVISED
from deltal_jax.training.step import Update
from tests import fakes
from tests.test_step import COUNT, LAYOUTS, buckets_of

BASE = dataclasses.replace(fakes.GROUPED, layers=2)
SOME = LoRA(rank=3, alpha=12.0, targets=("q_proj", "down_proj"))


def adapted(lora, seed=0, drawn=True):
    """An architecture with adapters, and parameters whose base is that of `BASE`."""
    arch = dataclasses.replace(BASE, lora=lora)
    params = split_model(init_model(arch, jax.random.key(seed)))[1]
    if drawn:  # B starts at 0
        keys = iter(jax.random.split(jax.random.key(9), 99))
        adapters = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), trained(params))
        params = overlay(params, adapters)
    return arch, overlay(params, fakes.model(BASE)[1])


def flat(params):
    return traverse_util.flatten_dict(params, sep="/")


@pytest.mark.parametrize("lora", [SOME, LoRA(2, 2.0)], ids=["two", "all"])
def test_fresh_adapters_change_no_logit(lora):
    arch, params = adapted(lora, drawn=False)
    tokens = np.random.default_rng(0).integers(3, 23, (2, 12))
    want = fakes.forward(BASE, fakes.model(BASE)[1], tokens)
    np.testing.assert_allclose(fakes.forward(arch, params, tokens), want, atol=1e-6)
    a = flat(trained(params))["blocks/attention/q/lora/lora_a"]
    assert np.abs(a).max() <= BASE.d_model**-0.5 and np.std(a) > 0.4 * BASE.d_model**-0.5


@pytest.mark.parametrize("lora", [SOME, LoRA(2, 2.0)], ids=["two", "all"])
def test_a_merged_model_gives_the_same_logits(lora):
    arch, params = adapted(lora)
    tokens = np.random.default_rng(0).integers(3, 23, (2, 12))
    got = fakes.forward(arch, params, tokens)
    merged = merge_adapters(params, lora)
    assert flat(merged).keys() == flat(fakes.model(BASE)[1]).keys()
    np.testing.assert_allclose(fakes.forward(BASE, merged, tokens), got, atol=1e-4, rtol=1e-4)
    plain = fakes.forward(BASE, fakes.model(BASE)[1], tokens)
    assert np.abs(got - plain).max() > 0.1 * np.abs(plain).max()


def test_the_scale_is_alpha_by_the_rank():
    (a_arch, params), (b_arch, _) = adapted(SOME), adapted(dataclasses.replace(SOME, alpha=6.0))
    assert (a_arch.lora.scale, b_arch.lora.scale) == (4.0, 2.0)
    name = "blocks/mlp/down/kernel"
    base = flat(params)[name]
    a, b = (flat(merge_adapters(params, x.lora))[name] - base for x in (a_arch, b_arch))
    np.testing.assert_allclose(a, 2 * b, rtol=1e-4, atol=1e-5)


def test_every_target_is_a_matrix_of_the_model():
    arch, params = adapted(LoRA(2, 2.0))
    found = {name for name in flat(params) if name.endswith("lora_a")}
    assert found == {f"blocks/{path}/lora/lora_a" for path in TARGETS.values()}
    for name in found:
        kernel = flat(params)[name.replace("lora/lora_a", "kernel")]
        b = flat(params)[name.replace("lora_a", "lora_b")]
        assert flat(params)[name].shape == (*kernel.shape[:2], 2)
        assert b.shape == (kernel.shape[0], 2, kernel.shape[2])
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, abstract_params(arch))


def test_an_update_moves_the_adapters_and_nothing_else():
    arch, params = adapted(SOME, drawn=False)
    arch = dataclasses.replace(arch, compute_dtype="float32")
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    params = overlay(low, trained(params))  # the base is stored in bfloat16
    before = jax.tree.map(np.asarray, params)
    update = Update(make_graphdef(arch), optax.adam(0.01), SUPERVISED)
    state = update.init(params, jax.random.key(0), reference=True)
    moments = flat(jax.tree.map(jnp.shape, state.opt_state[0].mu))
    assert moments.keys() == flat(trained(params)).keys() == flat(state.reference).keys()
    for _ in range(2):  # at first only B has a gradient
        state, report = update(state, buckets_of(LAYOUTS[0], np.ones(COUNT, np.float32)))
    assert report.norms["optim/grad_norm"] > 0
    for name, now in flat(state.params).items():
        was = flat(before)[name]
        assert now.dtype == was.dtype
        assert np.array_equal(now, was) is ("lora" not in name), name
        if "lora" in name:
            np.testing.assert_array_equal(flat(state.reference)[name], was)


def test_without_adapters_everything_is_trained():
    params = fakes.model(BASE)[1]
    assert flat(trained(params)).keys() == flat(params).keys()
