"""Laws of the decoder: causality, segments, padding, and a cache that changes nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deltal_jax.model.architecture import rope_frequencies
from deltal_jax.model.attention import RopeScaling, rope, rotations
from deltal_jax.model.cache import resized, time_of
from deltal_jax.model.transformer import (
    GatedMLP,
    RMSNorm,
    init_model,
    parameter_count,
    split_model,
)
from tests import fakes

KINDS = {"plain": fakes.PLAIN, "gqa": fakes.GROUPED, **fakes.FAMILIES}
ARCHITECTURES = pytest.mark.parametrize("arch", KINDS.values(), ids=KINDS)
#: Of most rows: a shape is a compilation.
SHAPE = (3, 16)
#: One layer that sees four tokens, so that a window is seen in the logits.
WINDOWED = dataclasses.replace(fakes.SHALLOW, sliding_window=4, local_layers=(True,))


def tokens_of(shape, seed=0):
    return np.random.default_rng(seed).integers(3, 23, shape)


@ARCHITECTURES
def test_a_later_token_changes_nothing_before_it(arch):
    params = fakes.model(arch)[1]
    first = tokens_of(SHAPE)
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
        model.embedded = lambda _: embedded
        return model.hidden(tokens, positions, segments)[0, 4].sum()

    embedded = nnx.merge(graphdef, params).embedded(tokens)
    gradient = np.abs(np.asarray(jax.jit(jax.grad(logit))(embedded)))[0].max(axis=-1)
    assert (gradient[:5] > 0).all()
    assert (gradient[5:] == 0).all()


@ARCHITECTURES
def test_right_padding_and_row_neighbours_change_no_logits(arch):
    params = fakes.model(arch)[1]
    row = tokens_of((1, 8))
    alone = fakes.forward(arch, params, row)
    together = tokens_of(SHAPE, 1)
    together[:1, :8] = row
    got = fakes.forward(arch, params, together)[:1, :8]
    np.testing.assert_allclose(got, alone, atol=2e-5)


@ARCHITECTURES
def test_segments_packed_into_a_row_do_not_see_each_other(arch):
    params = fakes.model(arch)[1]
    apart = tokens_of(SHAPE, 3)
    packed = apart.copy()
    packed[0, 9:] = apart[1, :7]
    positions = np.stack([np.concatenate([np.arange(9), np.arange(7)]), *[np.arange(16)] * 2])
    segments = np.zeros(SHAPE, int)
    segments[0, 9:] = 1
    got = fakes.forward(arch, params, packed, positions, segments)[0]
    want = fakes.forward(arch, params, apart)
    np.testing.assert_allclose(got[:9], want[0, :9], atol=2e-5)
    np.testing.assert_allclose(got[9:], want[1, :7], atol=2e-5)


@ARCHITECTURES
def test_cached_decoding_equals_the_full_forward(arch):
    graphdef, params = fakes.model(arch)
    prefill = jax.jit(lambda *a: nnx.merge(graphdef, params).prefill(*a))
    decode = jax.jit(lambda *a: nnx.merge(graphdef, params).decode(*a))
    prompts = fakes.prompts(3)
    tokens = tokens_of(SHAPE, 5)
    for row, length in enumerate(prompts.lengths):
        tokens[row, :length] = prompts.tokens[row, :length]
    full = fakes.forward(arch, params, tokens)
    cache = prefill(jnp.asarray(prompts.tokens))
    cache = resized(cache, time_of(cache) + 10)
    rows = np.arange(3)
    for step in range(-1, 8):  # from the prompt's last token on
        at = prompts.lengths + step
        logits, cache = decode(jnp.asarray(tokens[rows, at]), jnp.asarray(at), cache)
        np.testing.assert_allclose(logits, full[rows, at], atol=2e-5)


def test_rope_scores_depend_on_the_distance_alone():
    turn = jax.jit(lambda x, at, frequencies: rope(x, rotations(at, frequencies)))
    frequencies = 100.0 ** -(jnp.arange(4) / 4)
    q, k = jax.random.normal(jax.random.key(1), (2, 1, 1, 1, 8))

    def score(i, j):
        at = [turn(x, jnp.full((1, 1), p), frequencies) for x, p in ((q, i), (k, j))]
        return float(jnp.sum(at[0] * at[1]))

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3
    turned = turn(q, jnp.full((1, 1), 7), frequencies)
    assert float(jnp.linalg.norm(turned)) == pytest.approx(float(jnp.linalg.norm(q)), rel=1e-5)


def seen_from(j, tokens, logits):
    """Positions of one row whose logits change with token j."""
    other = tokens.copy()
    other[:, j] = (other[:, j] + 5) % 23
    change = np.abs(logits(tokens) - logits(other)).max(axis=-1)[0]
    assert ((change == 0) | (change > 1e-5)).all()
    return np.flatnonzero(change).tolist()


def test_in_a_window_a_token_sees_so_many_tokens_itself_included():
    params = fakes.model(WINDOWED)[1]
    tokens = tokens_of((1, 12), 6)
    seen = seen_from(3, tokens, lambda t: fakes.forward(WINDOWED, params, t))
    assert seen == [3, 4, 5, 6]


def test_a_window_ends_where_its_segment_ends():
    params = fakes.model(WINDOWED)[1]
    tokens = tokens_of((1, 12), 6)
    positions = np.concatenate([np.arange(5), np.arange(7)])[None]
    segments = np.asarray([[0] * 5 + [1] * 7])

    def logits(t):
        return fakes.forward(WINDOWED, params, t, positions, segments)

    assert seen_from(3, tokens, logits) == [3, 4]
    assert seen_from(5, tokens, logits) == [5, 6, 7, 8]
    alone = fakes.forward(WINDOWED, params, np.roll(tokens, -5, axis=1))
    np.testing.assert_allclose(logits(tokens)[:, 5:], alone[:, :7], atol=2e-5)


def test_a_window_is_the_same_in_the_cache():
    graphdef, params = fakes.model(WINDOWED)
    prefill = jax.jit(lambda *a: nnx.merge(graphdef, params).prefill(*a))
    decode = jax.jit(lambda *a: nnx.merge(graphdef, params).decode(*a))

    def logits(tokens):
        """Logits at the positions 4 to 11, by decoding."""
        cache = prefill(jnp.asarray(tokens[:, :5]))
        cache = resized(cache, time_of(cache) + 7)
        rows = []
        for at in range(4, 12):
            found, cache = decode(jnp.asarray(tokens[:, at]), jnp.asarray([at]), cache)
            rows.append(found)
        return np.stack(rows, axis=1)

    tokens = tokens_of((1, 12), 6)
    for j, seen in {2: [4, 5], 4: [4, 5, 6, 7], 6: [6, 7, 8, 9], 10: [10, 11]}.items():
        assert [at + 4 for at in seen_from(j, tokens, logits)] == seen


def test_a_window_as_long_as_the_row_changes_nothing():
    params = fakes.model(WINDOWED)[1]
    tokens = tokens_of((1, 12), 6)
    wide = dataclasses.replace(WINDOWED, sliding_window=12)
    full = fakes.forward(fakes.SHALLOW, params, tokens)
    np.testing.assert_array_equal(fakes.forward(wide, params, tokens), full)
    assert np.abs(fakes.forward(WINDOWED, params, tokens) - full).max() > 1e-2


def test_linear_rope_turns_as_much_slower_as_its_factor():
    arch = dataclasses.replace(
        fakes.PLAIN, head_dim=8, rope_theta=500.0, rope_scaling=RopeScaling(4.0)
    )
    want = [500.0 ** (-2 * i / 8) / 4.0 for i in range(4)]
    np.testing.assert_allclose(rope_frequencies(arch, False), want, rtol=1e-6)


def test_llama3_rope_slows_what_turns_slowly_and_leaves_what_turns_fast():
    theta, factor, low, high, length = 500_000.0, 8.0, 1.0, 4.0, 64
    arch = dataclasses.replace(
        fakes.PLAIN,
        head_dim=32,
        rope_theta=theta,
        rope_scaling=RopeScaling(factor, low, high, length),
    )
    want = []
    for i in range(16):
        wavelength = 2 * np.pi * theta ** (2 * i / 32)
        if wavelength > length / low:
            wavelength *= factor
        elif wavelength > length / high:
            share = (length / wavelength - low) / (high - low)
            wavelength = 1 / (share / wavelength + (1 - share) / (wavelength * factor))
        want.append(2 * np.pi / wavelength)
    got = np.asarray(rope_frequencies(arch, False))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    slower = theta ** -(np.arange(16) / 16) / got
    assert {round(float(x), 3) for x in slower[[0, 1, -2, -1]]} == {1.0, 8.0}
    assert ((slower > 1.001) & (slower < 7.999)).any()


def test_local_layers_have_their_own_rope_base_without_scaling():
    arch = fakes.FAMILIES["gemma3"]
    local, full = (np.asarray(rope_frequencies(arch, which)) for which in (True, False))
    np.testing.assert_allclose(local, 100.0 ** -(np.arange(3) / 3), rtol=1e-6)
    np.testing.assert_allclose(full, 500.0 ** -(np.arange(3) / 3) / 2.0, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_a_norm_with_an_offset_scales_and_then_rounds_and_one_without_rounds_first(dtype):
    x = jax.random.normal(jax.random.key(0), (3, 64)).astype(dtype)
    scale = (0.3 * jax.random.normal(jax.random.key(1), (64,))).astype(dtype)
    wide = np.asarray(x, np.float32)
    normed = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6)

    def norm(offset):
        made = RMSNorm(64, dataclasses.replace(fakes.PLAIN, norm_offset=offset), nnx.Rngs(0))
        np.testing.assert_array_equal(made.scale[...], np.full(64, 1.0 - offset))
        made.scale[...] = scale
        found = made(x)
        assert found.dtype == dtype
        return np.asarray(found, np.float32)

    def rounded(values):
        return np.asarray(jnp.asarray(values).astype(dtype), np.float32)

    scaled = np.asarray(scale, np.float32)[None]
    ulp = 0.0 if dtype == jnp.bfloat16 else 2e-6
    np.testing.assert_allclose(norm(1.0), rounded(normed * (1.0 + scaled)), atol=ulp)
    np.testing.assert_allclose(norm(0.0), rounded(rounded(normed) * scaled), atol=ulp)


def test_a_post_norm_of_zero_leaves_the_residual_and_one_hides_the_size_of_what_it_norms():
    arch = dataclasses.replace(fakes.SHALLOW, post_norms=True)
    params = fakes.model(arch)[1]
    tokens = tokens_of((1, 12), 8)
    plain = fakes.forward(arch, params, tokens)

    def changed(suffixes, factor):
        def change(path, x):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return x * factor if name.endswith(suffixes) else x

        return fakes.forward(arch, jax.tree_util.tree_map_with_path(change, params), tokens)

    larger = changed(("o/kernel", "down/kernel"), 3.0)
    np.testing.assert_allclose(larger, plain, atol=2e-5)
    silent = changed(("post_norm/scale",), 0.0)
    x = np.asarray(params["embed"]["embedding"])[tokens]
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(silent, normed @ np.asarray(params["head"]["kernel"]), atol=2e-5)
    assert np.abs(silent - plain).max() > 1e-2


def test_the_query_scale_stands_for_the_root_of_the_head_dimension():
    scaled = dataclasses.replace(fakes.SHALLOW, query_scale=0.7)
    params = fakes.model(fakes.SHALLOW)[1]
    tokens = tokens_of((1, 12), 8)
    kernel = params["blocks"]["attention"]["q"]["kernel"]
    attention = params["blocks"]["attention"] | {"q": {"kernel": kernel * 0.7 * 8**0.5}}
    turned = params | {"blocks": params["blocks"] | {"attention": attention}}
    want = fakes.forward(fakes.SHALLOW, turned, tokens)
    np.testing.assert_allclose(fakes.forward(scaled, params, tokens), want, atol=2e-5)
    assert np.abs(fakes.forward(fakes.SHALLOW, params, tokens) - want).max() > 1e-2


def test_the_embedding_scale_counts_at_the_input_and_not_at_a_tied_head():
    tied = dataclasses.replace(fakes.SHALLOW, tied_embeddings=True, embed_scale=5.0)
    untied = dataclasses.replace(fakes.SHALLOW)
    params = fakes.model(tied)[1]
    embedding = params["embed"]["embedding"]
    written = params | {"embed": {"embedding": 5.0 * embedding}, "head": {"kernel": embedding.T}}
    tokens = tokens_of((1, 12), 8)
    got = fakes.forward(tied, params, tokens)
    np.testing.assert_allclose(got, fakes.forward(untied, written, tokens), atol=2e-5)
    assert np.abs(got).max() > 0.1


def test_the_feed_forward_has_the_activation_of_its_family():
    x = np.random.default_rng(0).normal(size=(1, 4, 16)).astype(np.float32)
    curves = {
        "silu": lambda g: g / (1 + np.exp(-g)),
        "gelu_tanh": lambda g: 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3))),
    }
    for name, curve in curves.items():
        mlp = GatedMLP(dataclasses.replace(fakes.PLAIN, activation=name), nnx.Rngs(0))
        gate, up, down = (np.asarray(layer.kernel[...]) for layer in (mlp.gate, mlp.up, mlp.down))
        want = (curve(x @ gate) * (x @ up)) @ down
        np.testing.assert_allclose(mlp(jnp.asarray(x)), want, atol=1e-5)


@pytest.mark.parametrize("arch", [fakes.PLAIN, fakes.GROUPED], ids=["plain", "gqa"])
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
