"""Every kernel against the plain formula, in value and gradient; memory that grows with the length.

Splash is interpreted here. cuDNN needs a GPU: `JAX_PLATFORMS=cuda pytest --noconftest -k cudnn`.
"""

import dataclasses
import functools
import importlib.util
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from deltal_jax.errors import UserError
from deltal_jax.model import kernels
from deltal_jax.model.architecture import Architecture
from deltal_jax.model.attention import attend_rows
from deltal_jax.model.transformer import abstract_params, make_graphdef
from deltal_jax.parallel.mesh import make_mesh
from tests import fakes

GPU = jax.default_backend() == "gpu"
CUDNN = pytest.param("cudnn", marks=pytest.mark.skipif(not GPU, reason="cuDNN needs a GPU"))
KERNELS = pytest.mark.parametrize("kernel", ["xla", "splash", CUDNN])
#: An odd length of several blocks: see `small_blocks`.
T = 197
#: Several segments that end inside a block; the last one is the padding.
PACKED = ((60, 3, 70, 50, 14), (128, 1, 60, 8))
#: One response a row.
ALONE = ((180, 17), (64, 133))
EIGHT = pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")


@pytest.fixture
def small_blocks(monkeypatch):
    """Rows of `T` tokens are taken in several blocks."""
    monkeypatch.setattr("deltal_jax.model.attention.WHOLE_ROW", 64)
    monkeypatch.setattr("deltal_jax.model.attention.QUERY_BLOCK", 64)
    monkeypatch.setattr("deltal_jax.model.kernels.SPLASH_BLOCK", 128)


def example(lengths, heads=4, kv_heads=2, d=16, dtype=jnp.float32):
    """Queries, keys, values, segment ids and a cotangent that is 0 on the padding; the numbers
    are ones that bfloat16 can hold."""
    rng = np.random.default_rng(0)
    N, T = len(lengths), sum(lengths[0])
    q, k, v, weights = (
        jnp.asarray(rng.normal(size=(N, T, count, d)), jnp.bfloat16).astype(dtype)
        for count in (heads, kv_heads, kv_heads, heads)
    )
    segments = np.stack([np.repeat(np.arange(len(row)), row) for row in lengths])
    padding = segments == segments[:, -1:]
    weights = jnp.where(padding[:, :, None, None], 0.0, weights)
    return (q * (2 * d**-0.5), k, v), jnp.asarray(segments), weights


def plain(q, k, v, segments, window=None):
    """The formula, over a T × T matrix, in the type of its inputs but for the softmax."""
    T, group = q.shape[1], q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    scores = jnp.einsum("nihd,njhd->nhij", q, k).astype(jnp.float32)
    back = jnp.arange(T)[:, None] - jnp.arange(T)[None]
    near = (back >= 0) & (back < (T if window is None else window))
    visible = near[None] & (segments[:, :, None] == segments[:, None, :])
    chances = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf))
    return jnp.einsum("nhij,njhd->nihd", chances.astype(v.dtype), v)


def found_by(attend, rows, weights):
    """The outputs that are read, and the gradients of the queries, keys and values."""

    def total(*rows):
        found = attend(*rows)
        return jnp.sum(found * weights.astype(found.dtype), dtype=jnp.float32), found

    (_, out), gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(*rows)
    out = jnp.where(jnp.any(weights != 0, axis=(2, 3), keepdims=True), out, 0.0)
    return {"out": out, **dict(zip("qkv", gradients, strict=True))}


def errors(found, want):
    """The root of the mean square and the largest of the errors of each."""
    return {
        name: np.array([jnp.sqrt(jnp.mean(error**2)), jnp.max(jnp.abs(error))])
        for name in want
        for error in [found[name].astype(jnp.float32) - want[name]]
    }


def test_grouped_attention_equals_attention_with_repeated_heads():
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (2, 7, 6, 4))
    k, v = (jax.random.normal(key, (2, 7, 2, 4)) for key in keys[1:])
    segments = jnp.asarray([[0] * 7, [0, 0, 0, 1, 1, 1, 1]])
    got = np.asarray(jax.jit(attend_rows)(q / 2.0, k, v, segments))
    for n in range(2):
        for head in range(6):
            scores = np.asarray(q[n, :, head] @ k[n, :, head // 3].T) / 2.0
            allowed = np.tril(np.ones((7, 7), bool))
            allowed &= np.asarray(segments[n])[:, None] == np.asarray(segments[n])[None, :]
            weights = np.where(allowed, np.exp(scores), 0.0)
            want = weights / weights.sum(1, keepdims=True) @ np.asarray(v[n, :, head // 3])
            np.testing.assert_allclose(got[n, :, head], want, atol=1e-5)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("window", [None, 37])
@KERNELS
def test_in_bfloat16_a_kernel_errs_at_most_twice_as_much_as_the_plain_formula(kernel, window):
    """Against float32, in the outputs and in all gradients, on average and at most."""
    lengths = PACKED if kernel in kernels.PACKS else ALONE
    rows, segments, weights = example(lengths)
    formula = functools.partial(plain, segments=segments, window=window)
    narrow = [x.astype(jnp.bfloat16) for x in rows]
    chex.assert_trees_all_equal([x.astype(jnp.float32) for x in narrow], list(rows))

    def attend(q, k, v):
        return attend_rows(q, k, v, segments, window, kernel=kernel)

    with jax.default_matmul_precision("highest"):
        want = found_by(formula, rows, weights)
    plainly = errors(found_by(formula, narrow, weights), want)
    for name, error in errors(found_by(attend, narrow, weights), want).items():
        assert (error <= 2 * plainly[name]).all(), (name, error / plainly[name])


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("window", [None, 37])
@pytest.mark.parametrize("kernel", kernels.PACKS)
def test_in_float32_a_kernel_is_the_plain_formula(kernel, window):
    """Several segments, grouped heads, padding and an odd length."""
    rows, segments, weights = example(PACKED)
    got = found_by(
        lambda q, k, v: attend_rows(q, k, v, segments, window, kernel=kernel), rows, weights
    )
    want = found_by(functools.partial(plain, segments=segments, window=window), rows, weights)
    chex.assert_trees_all_close(got, want, atol=2e-5)
    assert min(float(jnp.abs(x).max()) for x in want.values()) > 1


@pytest.mark.parametrize("window", [None, 5])
def test_the_call_of_cudnn_means_the_plain_formula(window):
    """Its arguments, by the implementation of the same function that runs here: the scale, the
    window with the token itself, which head reads which, an odd length, rows without segments."""
    rows, segments, weights = example(((20, 3), (9, 14)))
    got = found_by(
        lambda q, k, v: kernels.attend_cudnn(q, k, v, window, implementation="xla"), rows, weights
    )
    want = found_by(functools.partial(plain, segments=segments, window=window), rows, weights)
    chex.assert_trees_all_close(got, want, atol=1e-5)


@KERNELS
def test_a_traced_layer_is_local_or_not_as_a_known_one(kernel):
    dtype = jnp.bfloat16 if kernel == "cudnn" else jnp.float32
    rows, segments, _ = example(((40,),), dtype=dtype)

    @jax.jit
    def attend(local):
        return attend_rows(*rows, segments, 5, local, kernel=kernel)

    traced = [attend(jnp.asarray(local)) for local in (True, False)]
    known = [
        jax.jit(lambda local=local: attend_rows(*rows, segments, 5, local, kernel=kernel))()
        for local in (True, False)
    ]
    chex.assert_trees_all_close(traced, known, atol=1e-6)
    assert float(jnp.abs(traced[0] - traced[1]).max()) > 0.1
    wide = jax.jit(lambda: attend_rows(*rows, segments, 40, kernel=kernel))()
    chex.assert_trees_all_close(wide, known[1], atol=1e-6)


def test_a_model_is_the_same_by_splash():
    """Scanned layers of which some are local, recomputed in the backward pass: packed rows."""
    arch = dataclasses.replace(fakes.FAMILIES["gemma3"], remat="layer")
    params = fakes.model(fakes.FAMILIES["gemma3"])[1]
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, 23, (2, 14)))
    segments = jnp.asarray([[0] * 6 + [1] * 8, [2] * 14])
    positions = jnp.asarray([[*range(6), *range(8)], [*range(14)]])

    def total(params, kernel):
        graphdef = make_graphdef(dataclasses.replace(arch, attention=kernel))
        hidden = nnx.merge(graphdef, params).hidden(tokens, positions, segments)
        return jnp.sum(jnp.sin(hidden))

    found = [
        jax.jit(jax.value_and_grad(functools.partial(total, kernel=kernel)))(params)
        for kernel in ("xla", "splash")
    ]
    chex.assert_trees_all_close(found[1], found[0], atol=1e-4, rtol=1e-4)


def context(data, fsdp, tensor):
    return jax.set_mesh(make_mesh(data, fsdp, tensor))


@EIGHT
@pytest.mark.parametrize("kernel", kernels.PACKS)
def test_a_kernel_on_a_mesh_is_itself_on_one_device(kernel, monkeypatch):
    """Rows over "data" and "fsdp", heads over "tensor", which does not divide those of keys; a
    layer whose window is traced."""
    monkeypatch.setattr("deltal_jax.model.attention.WHOLE_ROW", 16)
    monkeypatch.setattr("deltal_jax.model.attention.QUERY_BLOCK", 16)
    rows, segments, weights = example(((20, 3),) * 4, heads=4, kv_heads=1)

    def attend(q, k, v, local=True):
        return attend_rows(q, k, v, segments, 7, local, kernel=kernel)

    alone = found_by(attend, rows, weights)
    with context(2, 2, 2):
        meshed = found_by(attend, rows, weights)
        traced = jax.jit(attend)(*rows, jnp.asarray(False))
    assert meshed["out"].sharding.spec == PartitionSpec(("data", "fsdp"), None, "tensor")
    chex.assert_trees_all_close(meshed, alone, atol=1e-5)
    chex.assert_trees_all_close(traced, plain(*rows, segments), atol=1e-5)


@EIGHT
@pytest.mark.parametrize(
    ("N", "heads", "kv_heads", "share"),
    [
        (4, 8, 4, (2, 2, 1)),
        (4, 8, 2, (2, 2, 1)),
        (4, 8, 1, (2, 2, 1)),
        (4, 12, 6, (2, 3, 3)),
        (4, 6, 3, (2, 6, 3)),
        (3, 8, 8, (3, 2, 2)),
    ],
)
def test_a_device_gets_its_rows_and_its_heads_with_their_keys(N, heads, kv_heads, share):
    """Two parts of the rows, four of the heads; what these do not divide stays whole."""
    rows, segments, _ = example(((7, 2),) * N, heads, kv_heads)
    seen = set()

    def call(q, k, v, segments):
        seen.add((q.shape[0], q.shape[2], k.shape[2]))
        return plain(q, k, v, segments)

    with context(1, 2, 4):
        got = jax.jit(functools.partial(kernels.over_mesh, call))(*rows, segments)
    assert seen == {share}
    chex.assert_trees_all_close(got, plain(*rows, segments), atol=1e-5)


def test_a_call_that_a_kernel_cannot_serve_is_refused_in_one_line():
    def attend(kernel, d, dtype):
        rows, segments, _ = example(((4,),), d=d, dtype=dtype)
        return attend_rows(*rows, segments, kernel=kernel)

    for kernel, d, dtype, said in (
        ("cudnn", 16, jnp.float32, "cudnn computes in bfloat16 or float16, not float32"),
        ("cudnn", 12, jnp.bfloat16, "a head_dim that is a multiple of 8 up to .* here, not 12"),
        ("cudnn", 264, jnp.bfloat16, "a head_dim that is a multiple of 8 up to .* here, not 264"),
        ("splash", 16, jnp.float16, "splash computes in bfloat16 or float32, not float16"),
    ):
        with pytest.raises(UserError, match=rf"^model\.attention: .*{said}; set it to .*$"):
            attend(kernel, d, dtype)
    if not GPU:
        with pytest.raises(UserError, match="cudnn needs a GPU, and JAX runs on cpu here"):
            attend("cudnn", 16, jnp.bfloat16)


def test_a_platform_has_its_kernel_where_that_serves_the_model():
    bf16, f32 = jnp.bfloat16, jnp.float32
    for case, want in {
        ("cpu", bf16, 128, False): "xla",
        ("cpu", f32, 128, True): "xla",
        ("gpu", bf16, 128, False): "cudnn",
        ("gpu", jnp.float16, 64, False): "cudnn",
        ("gpu", bf16, 128, True): "xla",  # no segment ids
        ("gpu", f32, 128, False): "xla",
        ("gpu", bf16, 100, False): "xla",
        ("tpu", bf16, 100, True): "splash",
        ("tpu", f32, 128, False): "splash",
        ("tpu", jnp.float16, 128, False): "xla",
    }.items():
        assert kernels.default_attention(*case) == want, case


def test_memory_of_attention_grows_with_the_length_and_not_with_its_square():
    """Forward and backward: twice the length, about twice the memory."""

    def temporaries(T):
        def total(q, k, v):
            return jnp.sum(attend_rows(q, k, v, jnp.zeros((1, T), int)))

        shape = jax.ShapeDtypeStruct((1, T, 4, 16), jnp.float32)
        compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(shape, shape, shape).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    sizes = [temporaries(T) for T in (4_096, 8_192, 16_384)]
    assert sizes[1] < 2.3 * sizes[0] and sizes[2] < 2.3 * sizes[1]
    assert sizes[2] < 4 * 16_384**2  # the scores of one head alone


#: One layer of Qwen2.5-3B.
LAYER = Architecture(
    vocab=256,
    layers=1,
    d_model=2048,
    heads=16,
    kv_heads=2,
    head_dim=128,
    d_ff=11_008,
    tied_embeddings=True,
    qkv_bias=True,
)


def test_a_row_of_8192_tokens_of_a_3b_layer_builds_no_square_matrix():
    """Nor is one in the gradient: no array of the compiled program has two axes of that length."""
    T = 8192
    graphdef = make_graphdef(LAYER)

    def total(params, tokens):
        hidden = nnx.merge(graphdef, params).hidden(tokens, tokens, tokens)
        return jnp.sum(hidden, dtype=jnp.float32)

    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), abstract_params(LAYER)
    )
    tokens = jax.ShapeDtypeStruct((1, T), jnp.int32)
    program = jax.jit(jax.grad(total)).lower(params, tokens).compile().as_text()
    shapes = [sizes.split(",") for sizes in set(re.findall(r"\w\[([\d,]+)\]", program))]
    assert any(sizes.count(str(T)) == 1 for sizes in shapes)
    assert not [sizes for sizes in shapes if sizes.count(str(T)) > 1]


@pytest.fixture
def no_compile_cache():
    """What is compiled for a TPU that is not there cannot be read back, so it is not kept."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = jax.config.values[name]
    jax.config.update(name, 1e9)
    yield
    jax.config.update(name, before)


@pytest.mark.usefixtures("no_compile_cache")
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.xdist_group("libtpu")  # it locks
@pytest.mark.parametrize("tensor", [1, 4])
def test_splash_compiles_for_a_tpu_without_a_square_matrix(tensor, monkeypatch):
    """Packed rows of 8,192 tokens, forward and backward, on the eight chips of a v5e-8: three
    kernels, and less memory than one head's scores in bfloat16 for each row."""
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    mesh = make_mesh(fsdp=8 // tensor, tensor=tensor, devices=devices)

    def shape(*sizes, dtype=jnp.bfloat16):
        heads = "tensor" if len(sizes) == 4 and sizes[2] % tensor == 0 else None
        spec = PartitionSpec(("data", "fsdp"), None, *[heads] * (len(sizes) == 4))
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec))

    def total(q, k, v, segments):
        found = attend_rows(q, k, v, segments, kernel="splash")
        return jnp.sum(found.astype(jnp.float32) ** 2)

    T = 8192
    keys = shape(8, T, 2, 128)
    with jax.set_mesh(mesh):
        lowered = jax.jit(jax.grad(total, (0, 1, 2))).lower(
            shape(8, T, 16, 128), keys, keys, shape(8, T, dtype=jnp.int32)
        )
    compiled = lowered.compile()
    program = compiled.as_text()
    assert program.count('custom_call_target="tpu_custom_call"') == 3
    assert f"{T},{T}" not in program
    assert compiled.memory_analysis().temp_size_in_bytes < tensor * 2 * T * T
