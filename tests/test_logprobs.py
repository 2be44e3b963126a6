"""Token log-probabilities and entropy against float64 NumPy, at the sampler's temperature."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from deltal_jax.objective.logprobs import chunk_size, chunked_logprobs, token_logprobs
from deltal_jax.parallel.mesh import make_mesh

rng = np.random.default_rng(0)
LOGITS = rng.normal(size=(3, 5, 17)) * 4
TARGETS = rng.integers(0, 17, (3, 5))
TEMPERATURES = [0.3, 0.7, 1.0, 2.5]


def exact(logits, targets, temperature) -> tuple[np.ndarray, np.ndarray]:
    scaled = np.asarray(logits, np.float64) / temperature
    shifted = scaled - scaled.max(axis=-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    chosen = np.take_along_axis(log_p, np.asarray(targets)[..., None], axis=-1)[..., 0]
    return chosen, -np.sum(np.exp(log_p) * log_p, axis=-1)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_logprobs_and_entropy_are_those_of_the_tempered_softmax(temperature):
    reference = exact(LOGITS, TARGETS, temperature)
    with jax.enable_x64(True):
        found = token_logprobs(jnp.asarray(LOGITS), jnp.asarray(TARGETS), temperature=temperature)
        for mine, theirs in zip(found, reference, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=1e-13)
    single = np.float32(LOGITS)
    found = token_logprobs(jnp.asarray(single), jnp.asarray(TARGETS), temperature=temperature)
    # A few roundings of the largest scaled logit.
    rounding = 4 * np.spacing(np.float32(np.abs(single).max() / temperature))
    for mine, theirs in zip(found, exact(single, TARGETS, temperature), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=rounding)


def test_temperature_one_is_the_default():
    logits, targets = jnp.asarray(LOGITS, jnp.float32), jnp.asarray(TARGETS)
    for mine, theirs in zip(
        token_logprobs(logits, targets),
        token_logprobs(logits, targets, temperature=1.0),
        strict=True,
    ):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_probabilities_of_all_targets_sum_to_one_and_give_the_entropy(temperature):
    with jax.enable_x64(True):
        logits = jnp.asarray(np.broadcast_to(LOGITS[0, :1], (17, 17)))
        found = token_logprobs(logits, jnp.arange(17), temperature=temperature)
    logprobs, entropy = map(np.asarray, found)
    assert np.exp(logprobs).sum() == pytest.approx(1.0, rel=1e-12)
    assert -np.sum(np.exp(logprobs) * logprobs) == pytest.approx(entropy[0], rel=1e-12)


def test_a_flat_distribution_has_the_entropy_of_the_vocabulary_and_a_sharp_one_none():
    flat, sharp = jnp.zeros((1, 17)), jnp.zeros((1, 17)).at[0, 3].set(100.0)
    target = jnp.asarray([3])
    logprob, entropy = token_logprobs(flat, target)
    np.testing.assert_allclose([logprob[0], entropy[0]], [-np.log(17), np.log(17)], rtol=1e-6)
    logprob, entropy = token_logprobs(sharp, target)
    np.testing.assert_allclose([logprob[0], entropy[0]], [0.0, 0.0], atol=1e-6)


@pytest.mark.parametrize("shift", [-100.0, 50.0, 1000.0])
def test_a_constant_added_to_all_logits_changes_nothing_beyond_its_rounding(shift):
    logits = np.float32(np.round(LOGITS * 256) / 256)  # so that the sum is exact
    for mine, theirs in zip(
        token_logprobs(jnp.asarray(logits + np.float32(shift)), jnp.asarray(TARGETS)),
        token_logprobs(jnp.asarray(logits), jnp.asarray(TARGETS)),
        strict=True,
    ):
        np.testing.assert_allclose(mine, theirs, atol=4 * np.spacing(np.float32(abs(shift))))


def test_large_logits_do_not_overflow():
    logits, targets = jnp.asarray([[3e4, -3e4, 0.0]]), jnp.asarray([1])
    logprob, entropy = token_logprobs(logits, targets, temperature=0.01)
    assert float(logprob[0]) == pytest.approx(-6e6)
    assert float(entropy[0]) == 0.0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_logits_are_computed_in_float32(dtype):
    logits, targets = jnp.asarray(LOGITS, dtype), jnp.asarray(TARGETS)
    for mine, theirs in zip(
        token_logprobs(logits, targets, temperature=0.7),
        token_logprobs(logits.astype(jnp.float32), targets, temperature=0.7),
        strict=True,
    ):
        assert mine.dtype == jnp.float32
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_the_gradient_of_a_logprob_is_one_hot_minus_probabilities_over_temperature(temperature):
    def total(logits):
        return jnp.sum(token_logprobs(logits, jnp.asarray(TARGETS), temperature=temperature)[0])

    with jax.enable_x64(True):
        gradient = jax.jit(jax.grad(total))(jnp.asarray(LOGITS))
    every = np.broadcast_to(np.arange(17), (3, 5, 17))
    repeated = np.broadcast_to(LOGITS[:, :, None, :], (3, 5, 17, 17))
    probabilities = np.exp(exact(repeated, every, temperature)[0])
    one_hot = np.eye(17)[TARGETS]
    np.testing.assert_allclose(gradient, (one_hot - probabilities) / temperature, atol=1e-12)


def linear_head(parameters, hidden):
    bias = jnp.expand_dims(parameters["bias"], tuple(range(hidden.ndim - 1)))
    return hidden @ parameters["kernel"] + bias


def bare_head(kernel, hidden):
    return hidden @ kernel


def tied_head(parameters, hidden):
    return hidden @ parameters["embedding"].T


D, V = 6, 19
HEADS = {
    "linear": (linear_head, {"kernel": rng.normal(size=(D, V)), "bias": rng.normal(size=V)}),
    "tied": (tied_head, {"embedding": rng.normal(size=(V, D))}),
}


def ragged_mask(rows: int, width: int, seed: int) -> np.ndarray:
    """Rows with holes, of any fill; an empty row, a full one and a lone last column."""
    draws = np.random.default_rng(seed)
    mask = draws.random((rows, width)) < draws.random((rows, 1))
    mask[0], mask[-1] = False, True
    mask[rows // 2] = np.arange(width) == width - 1
    return mask


@functools.cache
def chunked_and_plain(name: str, temperature: float, shards: int = 1):
    """Values and gradients of a weighted sum, in chunks and from all logits at once; chunks of each
    device's own rows, where there are several."""
    head, options = HEADS[name][0], {"temperature": temperature}
    in_chunks = functools.partial(chunked_logprobs, head, **options)
    if shards > 1:
        in_chunks = jax.shard_map(
            functools.partial(in_chunks, axis_name="data"),
            mesh=make_mesh(shards, devices=jax.devices()[:shards]),
            in_specs=(P(), P("data"), P("data"), P("data")),
            out_specs=P("data"),
            check_vma=False,
        )

    def chunked(parameters, hidden, targets, mask, by_logprob, by_entropy):
        found = in_chunks(parameters, hidden, targets, mask)
        return jnp.sum(found[0] * by_logprob) + jnp.sum(found[1] * by_entropy), found

    def plain(parameters, hidden, targets, mask, by_logprob, by_entropy):
        logits = head(parameters, hidden)
        found = token_logprobs(logits, targets, temperature=temperature)
        found = tuple(jnp.where(mask, x, 0.0) for x in found)
        return jnp.sum(found[0] * by_logprob) + jnp.sum(found[1] * by_entropy), found

    return [
        jax.jit(jax.value_and_grad(fn, argnums=(0, 1), has_aux=True)) for fn in (chunked, plain)
    ]


#: Rows and columns of tokens, devices that the rows are split over, and tokens of a chunk.
SHAPES = [(40, 45, 1, 225), (40, 45, 4, 128), (6, 7, 2, 21), (3, 401, 1, 150)]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("rows", "width", "shards", "size"), SHAPES)
def test_chunks_give_the_values_and_gradients_of_all_logits_at_once(
    head, rows, width, shards, size
):
    assert chunk_size(rows * width // shards, V) == size
    draws = np.random.default_rng(rows)
    with jax.enable_x64(True):
        parameters = jax.tree.map(jnp.asarray, HEADS[head][1])
        hidden = jnp.asarray(draws.normal(size=(rows, width, D)))
        targets = jnp.asarray(draws.integers(0, V, (rows, width)))
        factors = [jnp.asarray(draws.normal(size=(rows, width))) for _ in range(2)]
        programs = chunked_and_plain(head, 0.8, shards)
        for seed, mask in enumerate(
            [
                ragged_mask(rows, width, 1),
                np.zeros((rows, width), bool),
                np.ones((rows, width), bool),
            ]
        ):
            arguments = (parameters, hidden, targets, jnp.asarray(mask), *factors)
            ((_, mine), of_mine), ((_, theirs), of_theirs) = (fn(*arguments) for fn in programs)
            chex.assert_trees_all_close(mine, theirs, rtol=1e-12, atol=1e-12)
            scale = max(1.0, *(float(jnp.abs(x).max()) for x in jax.tree.leaves(of_theirs)))
            chex.assert_trees_all_close(of_mine, of_theirs, rtol=1e-12, atol=1e-12 * scale)
            assert (seed == 1) != bool(np.any(np.asarray(mine[0]) != 0))
            for found in (*mine, of_mine[1]):
                assert np.all(np.asarray(found)[~mask] == 0)


@pytest.mark.parametrize("fill", [np.nan, np.inf])
@pytest.mark.parametrize("head", HEADS)
def test_hidden_states_outside_the_mask_reach_neither_values_nor_gradients(head, fill):
    draws = np.random.default_rng(0)
    rows, width = 40, 45
    mask = ragged_mask(rows, width, 2)
    hidden = draws.normal(size=(rows, width, D))
    targets, ones = draws.integers(0, V, (rows, width)), np.ones((rows, width))
    with jax.enable_x64(True):
        parameters = jax.tree.map(jnp.asarray, HEADS[head][1])
        chunked = chunked_and_plain(head, 0.8)[0]
        first, second = (
            chunked(parameters, *map(jnp.asarray, (states, targets, mask, ones, ones)))
            for states in (hidden, np.where(mask[..., None], hidden, fill))
        )
    chex.assert_trees_all_equal(first, second)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(second))


def test_half_precision_hidden_states_give_float32_logprobs_and_gradients_of_their_own_kind():
    draws = np.random.default_rng(0)
    head, parameters = linear_head, jax.tree.map(jnp.float32, HEADS["linear"][1])
    hidden = jnp.asarray(draws.normal(size=(3, 20, D)), jnp.bfloat16)
    targets = jnp.asarray(draws.integers(0, V, (3, 20)))
    mask = jnp.asarray(ragged_mask(3, 20, 0))
    ones = jnp.ones(mask.shape)
    chunked, plain = chunked_and_plain("linear", 0.8)
    (_, found), gradients = chunked(parameters, hidden, targets, mask, ones, ones)
    (_, same), others = plain(parameters, hidden, targets, mask, ones, ones)
    assert found[0].dtype == found[1].dtype == jnp.float32
    chex.assert_trees_all_close(found, same, atol=1e-6)
    logits = head(parameters, hidden)
    assert logits.dtype == jnp.float32
    assert gradients[1].dtype == jnp.bfloat16
    assert jax.tree.leaves(gradients[0])[0].dtype == jnp.float32
    chex.assert_trees_all_close(gradients[0], others[0], atol=1e-4)
    # One rounding to eight bits of each element, of equal float32 numbers.
    mine, theirs = (np.asarray(g[1], np.float32) for g in (gradients, others))
    np.testing.assert_allclose(mine, theirs, rtol=2**-7, atol=1e-6)


def test_half_precision_parameters_gather_their_gradient_in_float32():
    """Over many chunks bf16 sums would lose what is small against them."""
    draws = np.random.default_rng(0)
    rows, width = 40, 200
    exact_parameters = {"embedding": jnp.asarray(HEADS["tied"][1]["embedding"], jnp.bfloat16)}
    wide = jax.tree.map(jnp.float32, exact_parameters)
    hidden = jnp.asarray(draws.normal(size=(rows, width, D)), jnp.bfloat16)
    targets = jnp.asarray(draws.integers(0, V, (rows, width)))
    ones = jnp.ones((rows, width))
    chunked = chunked_and_plain("tied", 0.8)[0]

    def gradient(parameters, hidden):
        return chunked(parameters, hidden, targets, ones > 0, ones, 0 * ones)[1][0]["embedding"]

    found = gradient(exact_parameters, hidden)
    assert found.dtype == jnp.bfloat16
    want = np.asarray(gradient(wide, hidden.astype(jnp.float32)))
    error = np.asarray(found, np.float32) - want
    assert np.linalg.norm(error) < 0.02 * np.linalg.norm(want)


@pytest.mark.parametrize("head", HEADS)
def test_without_its_gradient_the_entropy_has_its_value_and_moves_nothing(head):
    draws = np.random.default_rng(0)
    fn, parameters = HEADS[head][0], jax.tree.map(jnp.float32, HEADS[head][1])
    hidden = jnp.asarray(draws.normal(size=(5, 40, D)), jnp.float32)
    targets = jnp.asarray(draws.integers(0, V, (5, 40)))
    mask = jnp.asarray(ragged_mask(5, 40, 0))

    @functools.partial(jax.jit, static_argnums=(2, 3))
    def gradient(parameters, hidden, entropy_gradient, factor):
        def total(parameters, hidden):
            options = {"entropy_gradient": entropy_gradient}
            found = chunked_logprobs(fn, parameters, hidden, targets, mask, **options)
            return jnp.sum(found[0]) + factor * jnp.sum(found[1]), found

        return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(parameters, hidden)

    (_, with_it), wanted = gradient(parameters, hidden, True, 0.0)
    (_, without), found = gradient(parameters, hidden, False, 7.0)
    chex.assert_trees_all_close(without, with_it, rtol=1e-6)
    chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert float(jnp.abs(with_it[1]).max()) > 1.0


def temporaries(tokens: int, vocabulary: int, *, backward: bool) -> int:
    """Bytes that the compiled program needs beside its arguments and results."""

    def total(kernel, hidden, targets, mask):
        return jnp.sum(chunked_logprobs(bare_head, kernel, hidden, targets, mask)[0])

    def shape(*dims, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(dims, dtype)

    program = jax.jit(jax.grad(total, argnums=(0, 1)) if backward else total)
    ids, mask = shape(2, tokens // 2, dtype=jnp.int32), shape(2, tokens // 2, dtype=jnp.bool_)
    lowered = program.lower(shape(32, vocabulary), shape(2, tokens // 2, 32), ids, mask)
    return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(("backward", "part"), [(False, 0.3), (True, 0.5)])
def test_logits_of_all_tokens_never_exist_at_once(backward, part):
    """Temporaries are a part of what [tokens × vocabulary] takes, and of a large vocabulary they
    do not grow with the tokens."""
    assert temporaries(4096, 50_000, backward=backward) < part * 4096 * 50_000 * 4
    once, twice = (temporaries(n, 200_000, backward=backward) for n in (4096, 8192))
    assert once < part / 1.5 * 4096 * 200_000 * 4
    assert twice - once < 0.01 * 4096 * 200_000 * 4
