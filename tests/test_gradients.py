"""Gradients of single responses: against the update's own, exact and projected."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltal_jax.config import load_config
from deltal_jax.laboratory import gradients
from deltal_jax.laboratory.gradients import (
    KINDS,
    OUTSIDE,
    blocks_of,
    kind_of,
    measure_gradients,
    sketch,
)
from deltal_jax.model.lora import TARGETS
from deltal_jax.parallel.sharding import PARAMETER_AXES
from deltal_jax.training.buckets import make_buckets
from deltal_jax.training.setup import init_params, make_setup, make_update
from tests.fakes import rollout
from tests.runs import TINY

KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def measured():
    """A setup of two layers with its parameters, responses, advantages, and exact Grams."""
    options = {"model.layers": 2, "length_buckets": [16], "rl.pack": False, "model.remat": "none"}
    setup = make_setup(load_config("countdown-tiny", TINY | options))
    params = init_params(setup, jax.random.key(0))
    batch = rollout(8, longest=14, vocab=setup.tokenizer.vocab_size)
    advantages = np.random.default_rng(1).normal(size=8).astype(np.float32)
    advantages[2] = 0.0
    return (
        setup,
        params,
        batch,
        advantages,
        measure_gradients(setup, params, batch, advantages, KEY),
    )


def test_weighted_sums_are_the_gradient_of_the_update(measured):
    """wᵀ K w of each block is the squared norm of what `accumulate` gives for the weights w: for
    enough w that says all of K."""
    setup, params, batch, advantages, grams = measured
    update = make_update(setup, "rl")
    rng = np.random.default_rng(0)
    for _ in range(3):
        weights = rng.normal(size=8).astype(np.float32)
        (bucket,) = make_buckets(
            batch,
            np.arange(8),
            advantages=advantages,
            weights=weights,
            edges=(16,),
            tokens_per_microbatch=128,
        )
        own = np.asarray(update.logprobs(params, update.place(bucket)))
        grads = update.accumulate(params, [dataclasses.replace(bucket, old_logprobs=own)]).grads
        whole = blocks_of(jax.tree.map(lambda x: x[None], grads))
        assert set(whole) == set(grams.loss)
        for block, parts in whole.items():
            expected = sum(float(jnp.sum(x**2)) for x in parts.values())
            # Two programs in float32: each sums tens of thousands of products.
            assert weights @ grams.loss[block] @ weights == pytest.approx(expected, rel=2e-4)


def test_at_the_ratio_one_a_response_counts_by_its_advantage(measured):
    *_, advantages, grams = measured
    for block, gram in grams.score.items():
        expected = advantages[:, None] * gram * advantages
        np.testing.assert_allclose(grams.loss[block], expected, atol=1e-4 * np.abs(gram).max())


def test_blocks_are_layers_and_kinds(measured):
    _, _, _, _, grams = measured
    inside = {(layer, k) for layer in (0, 1) for k in ("q", "k", "v", "o", "mlp", "norm")}
    assert set(grams.score) == inside | {(OUTSIDE, k) for k in ("embed", "head", "norm")}
    assert {kind_of(path) for path in PARAMETER_AXES} == set(KINDS)
    for target in TARGETS.values():
        assert kind_of(f"blocks/{target}/lora/lora_a") == kind_of(f"blocks/{target}/kernel")
    with pytest.raises(KeyError, match="blocks/other"):
        kind_of("blocks/other/kernel")


def test_projections_stand_for_exact_gradients(measured, monkeypatch):
    """Norms within five of the stated standard deviations, the same when drawn again, and taken
    where the memory is not there."""
    setup, params, batch, advantages, exact = measured
    found = measure_gradients(setup, params, batch, advantages, KEY, project=64)
    assert (exact.projected, found.projected) == (None, 64)
    for block, gram in exact.score.items():
        own = np.diag(found.score[block]) / np.diag(gram)
        assert np.abs(own - 1).max() < 5 * np.sqrt(2 / 64)
    monkeypatch.setattr(gradients, "MEMORY", 1)
    monkeypatch.setattr(gradients, "PROJECTED", 64)
    again = measure_gradients(setup, params, batch, advantages, KEY)
    for block, gram in found.loss.items():
        np.testing.assert_array_equal(again.loss[block], gram)


def test_a_projection_keeps_inner_products_on_average():
    """Over 4,000 draws: the mean is exact to three standard errors, and the squared norm's relative
    variance is at most 2/k, also where all of it lies in one residue of the lines."""
    size, x = 8, np.random.default_rng(0).normal(size=(2, 41)).astype(np.float32)
    x[1, 1:] = 0.0
    x[1, ::8] = 1.0
    draws = jax.vmap(lambda key: sketch(jnp.asarray(x), key, size))(jax.random.split(KEY, 4000))
    products = np.einsum("nik,njk->nij", draws, draws)
    exact = x @ x.T
    error = products.std(0) / np.sqrt(len(products))
    assert np.all(np.abs(products.mean(0) - exact) < 3 * error + 1e-5)
    relative = products[:, [0, 1], [0, 1]].var(0) / np.diag(exact) ** 2
    assert np.all(relative < 2 / size * 1.1)
