"""Laws of the decoder: causality, segments, padding, and a cache that changes nothing."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deltal_jax.model.attention import attend_rows, rope
from deltal_jax.model.transformer import init_model, parameter_count, split_model
from tests import fakes

ARCHITECTURES = pytest.mark.parametrize("arch", [fakes.PLAIN, fakes.GROUPED], ids=["plain", "gqa"])


def tokens_of(shape, seed=0):
    return np.random.default_rng(seed).integers(3, 23, shape)


@ARCHITECTURES
def test_a_later_token_changes_nothing_before_it(arch):
    params = fakes.model(arch)[1]
    first = tokens_of((2, 12))
    second = first.copy()
    second[:, 7] = (second[:, 7] + 5) % 23
    a, b = (fakes.forward(arch, params, t) for t in (first, second))
    np.testing.assert_array_equal(a[:, :7], b[:, :7])
    assert np.abs(a[:, 7:] - b[:, 7:]).max(axis=(0, 2)).min() > 1e-3


@ARCHITECTURES
def test_the_gradient_of_a_logit_reaches_no_later_token(arch):
    graphdef, params = fakes.model(arch)
    tokens = jnp.asarray(tokens_of((1, 9)))
    positions, segments = jnp.arange(9)[None], jnp.zeros((1, 9), int)

    def logit(embedded):
        model = nnx.merge(graphdef, params)
        model.embed = lambda _: embedded
        return model.hidden(tokens, positions, segments)[0, 4].sum()

    embedded = nnx.merge(graphdef, params).embed(tokens)
    gradient = np.abs(np.asarray(jax.jit(jax.grad(logit))(embedded)))[0].max(axis=-1)
    assert (gradient[:5] > 0).all()
    assert (gradient[5:] == 0).all()


@ARCHITECTURES
def test_right_padding_and_row_neighbours_change_no_logits(arch):
    params = fakes.model(arch)[1]
    row = tokens_of((1, 8))
    alone = fakes.forward(arch, params, row)
    padded = np.concatenate([row, tokens_of((1, 5), 1)], axis=1)
    together = np.concatenate([padded, tokens_of((2, 13), 2)])
    got = fakes.forward(arch, params, together)[:1, :8]
    np.testing.assert_allclose(got, alone, atol=2e-5)


@ARCHITECTURES
def test_segments_packed_into_a_row_do_not_see_each_other(arch):
    params = fakes.model(arch)[1]
    a, b = tokens_of((1, 6), 3), tokens_of((1, 5), 4)
    packed = np.concatenate([a, b], axis=1)
    positions = np.concatenate([np.arange(6), np.arange(5)])[None]
    segments = np.asarray([[0] * 6 + [1] * 5])
    got = fakes.forward(arch, params, packed, positions, segments)[0]
    want = np.concatenate([fakes.forward(arch, params, x)[0] for x in (a, b)])
    np.testing.assert_allclose(got, want, atol=2e-5)


@ARCHITECTURES
def test_cached_decoding_equals_the_full_forward(arch):
    graphdef, params = fakes.model(arch)
    prefill = jax.jit(lambda *a: nnx.merge(graphdef, params).prefill(*a))
    decode = jax.jit(lambda *a: nnx.merge(graphdef, params).decode(*a))
    prompts = fakes.prompts(3)
    tokens = tokens_of((3, 16), 5)
    for row, length in enumerate(prompts.lengths):
        tokens[row, :length] = prompts.tokens[row, :length]
    full = fakes.forward(arch, params, tokens)
    lengths = jnp.asarray(prompts.lengths)
    logits, cache = prefill(jnp.asarray(prompts.tokens), lengths)
    cache = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 10), (0, 0))), cache)
    rows = np.arange(3)
    np.testing.assert_allclose(logits, full[rows, prompts.lengths - 1], atol=2e-5)
    for step in range(8):
        at = prompts.lengths + step
        logits, cache = decode(jnp.asarray(tokens[rows, at]), jnp.asarray(at), cache)
        np.testing.assert_allclose(logits, full[rows, at], atol=2e-5)


def test_remat_changes_no_gradient():
    tokens = tokens_of((2, 7))

    def gradient(arch):
        graphdef, params = fakes.model(fakes.PLAIN)
        model = nnx.merge(graphdef, params)
        model.arch = arch
        graphdef = nnx.split(model)[0]

        def loss(p):
            model = nnx.merge(graphdef, p)
            return model.hidden(
                jnp.asarray(tokens),
                jnp.broadcast_to(jnp.arange(7), (2, 7)),
                jnp.zeros((2, 7), int),
            ).std()

        return jax.jit(jax.grad(loss))(params)

    with_remat = gradient(fakes.PLAIN)
    without = gradient(dataclasses.replace(fakes.PLAIN, remat=False))
    chex.assert_trees_all_close(with_remat, without, atol=1e-6)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(without)) > 1e-2


def test_rope_scores_depend_on_the_distance_alone():
    turn = jax.jit(rope, static_argnums=2)
    q, k = jax.random.normal(jax.random.key(1), (2, 1, 1, 1, 8))

    def score(i, j):
        at = [turn(x, jnp.full((1, 1), p), 100.0) for x, p in ((q, i), (k, j))]
        return float(jnp.sum(at[0] * at[1]))

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3
    turned = turn(q, jnp.full((1, 1), 7), 100.0)
    assert float(jnp.linalg.norm(turned)) == pytest.approx(float(jnp.linalg.norm(q)), rel=1e-5)


def test_grouped_attention_equals_attention_with_repeated_heads():
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (2, 7, 6, 4))
    k, v = (jax.random.normal(key, (2, 7, 2, 4)) for key in keys[1:])
    segments = jnp.asarray([[0] * 7, [0, 0, 0, 1, 1, 1, 1]])
    got = np.asarray(jax.jit(attend_rows)(q, k, v, segments))
    for n in range(2):
        for head in range(6):
            scores = np.asarray(q[n, :, head] @ k[n, :, head // 3].T) / 2.0
            allowed = np.tril(np.ones((7, 7), bool))
            allowed &= np.asarray(segments[n])[:, None] == np.asarray(segments[n])[None, :]
            weights = np.where(allowed, np.exp(scores), 0.0)
            want = weights / weights.sum(1, keepdims=True) @ np.asarray(v[n, :, head // 3])
            np.testing.assert_allclose(got[n, :, head], want, atol=1e-5)


@ARCHITECTURES
def test_parameter_count_is_that_of_the_real_model(arch):
    _, params = split_model(init_model(arch, jax.random.key(0)))
    assert parameter_count(arch) == sum(x.size for x in jax.tree.leaves(params))


def test_the_tiny_experiment_has_161_thousand_parameters():
    arch = dataclasses.replace(
        fakes.PLAIN, vocab=79, layers=3, d_model=64, heads=2, kv_heads=2, head_dim=32, d_ff=176
    )
    assert parameter_count(arch) == 161_088


def test_the_benchmark_model_is_an_architecture():
    """Grouped heads, tied embeddings and a head_dim of its own: 4.46 M parameters."""
    arch = dataclasses.replace(
        fakes.GROUPED,
        vocab=2048,
        layers=4,
        d_model=256,
        heads=4,
        kv_heads=2,
        head_dim=64,
        d_ff=1024,
    )
    assert parameter_count(arch) == 4_458_752
