"""Attention over rows that devices share is that of one device, in value and gradient."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from deltal_jax.model import kernels
from deltal_jax.model.attention import attend_rows
from deltal_jax.parallel import context as module
from deltal_jax.parallel.mesh import make_mesh
from tests.test_attention import example, found_by, plain

#: Two rows of 48 tokens: segments that end on a cut of 2, 4 or 8 parts, beside one, and such that
#: lie on several devices; the last is the padding.
PACKED = ((12, 1, 23, 7, 5), (40, 5, 3))
#: (data, fsdp, tensor, context), query heads, key-value heads; and by which way.
CASES = [
    ((1, 1, 1, 8), 8, 2, "exchanged"),  # key-value heads are copied four times
    ((2, 1, 2, 2), 4, 1, "exchanged"),
    ((1, 2, 1, 4), 6, 2, "ring"),  # 4 does not divide 6
    ((1, 1, 2, 4), 4, 2, "ring"),  # 4 does not divide the 2 heads of a device
]


@pytest.fixture
def ways(monkeypatch):
    """Which of the two was taken."""
    taken = []
    for name, way in (("exchanged", "exchanged"), ("ring_attention", "ring")):
        function = getattr(module, name)

        def call(*arguments, function=function, way=way, **options):
            taken.append(way)
            return function(*arguments, **options)

        monkeypatch.setattr(kernels, name, call)
    return taken


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize(("sizes", "heads", "kv_heads", "way"), CASES)
def test_tokens_on_many_devices_attend_as_on_one(
    sizes, heads, kv_heads, way, window, ways, monkeypatch
):
    """A device has several blocks of queries, the last of which is padded."""
    monkeypatch.setattr(module, "QUERY_BLOCK", 5)
    rows, segments, weights = example(PACKED, heads, kv_heads, d=4)
    want = found_by(functools.partial(plain, segments=segments, window=window), rows, weights)
    with jax.set_mesh(make_mesh(*sizes)):
        got = found_by(lambda *rows: attend_rows(*rows, segments, window), rows, weights)
    assert set(ways) == {way}
    tokens = "tensor" if sizes[2] > 1 else None
    split = PartitionSpec(("data", "fsdp"), "context", tokens)
    assert got["out"].sharding.is_equivalent_to(
        jax.sharding.NamedSharding(make_mesh(*sizes), split), 4
    )
    chex.assert_trees_all_close(got, want, atol=1e-5)
    assert min(float(jnp.abs(x).max()) for x in want.values()) > 1


@pytest.mark.parametrize(("heads", "way"), [(4, "exchanged"), (3, "ring")])
def test_a_layer_whose_window_is_traced_is_that_of_one_device(heads, way, ways):
    rows, segments, _ = example(PACKED, heads, 1, d=4)

    @jax.jit
    def attend(local):
        return attend_rows(*rows, segments, 5, local)

    with jax.set_mesh(make_mesh(2, context=4)):
        for local, window in ((True, 5), (False, None)):
            got = attend(jnp.asarray(local))
            chex.assert_trees_all_close(got, plain(*rows, segments, window), atol=1e-5)
    assert set(ways) == {way}


def test_a_kernel_of_whole_rows_gets_whole_rows():
    rows, segments, weights = example(PACKED, 4, 1, d=8)

    def attend(*rows):
        return attend_rows(*rows, segments, 9, kernel="splash")

    want = found_by(functools.partial(plain, segments=segments, window=9), rows, weights)
    with jax.set_mesh(make_mesh(1, 2, context=4)):
        got = found_by(attend, rows, weights)
    chex.assert_trees_all_close(got, want, atol=1e-5)


def test_in_bfloat16_the_ring_errs_at_most_twice_as_much_as_the_plain_formula():
    """The softmax that is put together from parts is in float32."""
    from tests.test_attention import errors

    rows, segments, weights = example(PACKED, 3, 1, d=8)
    formula = functools.partial(plain, segments=segments)
    narrow = [x.astype(jnp.bfloat16) for x in rows]
    with jax.default_matmul_precision("highest"):
        want = found_by(formula, rows, weights)
    plainly = errors(found_by(formula, narrow, weights), want)
    with jax.set_mesh(make_mesh(2, context=4)):
        got = found_by(lambda *rows: attend_rows(*rows, segments), narrow, weights)
    for name, error in errors(got, want).items():
        assert (error <= 2 * plainly[name]).all(), (name, error / plainly[name])


def test_rows_that_do_not_split_are_refused():
    rows, segments, _ = example(((7, 3),) * 2, 4, 4, d=4)
    with (
        jax.set_mesh(make_mesh(2, context=4)),
        pytest.raises(ValueError, match="rows of 10 tokens on context=4"),
    ):
        jax.jit(lambda: attend_rows(*rows, segments))()
