"""What is stored or computed in bfloat16 is added in float32 where it matters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltal_jax.model.precision import look_up, wide_product


def test_gradients_of_a_token_in_many_places_add_up():
    """5,000 places: added in bfloat16, the sum of ones stops at 256."""
    tokens = jnp.asarray(np.repeat([1, 3], [5000, 2]).reshape(2, -1))

    def total(matrix):
        return jnp.sum(look_up(matrix, tokens).astype(jnp.float32))

    found = jax.grad(total)(jnp.ones((4, 3), jnp.bfloat16))
    assert found.dtype == jnp.bfloat16
    want = np.asarray([0, 5000, 0, 2])[:, None] * np.ones(3)
    np.testing.assert_allclose(found.astype(jnp.float32), want, rtol=2**-8)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_looking_up_is_indexing(dtype):
    with jax.enable_x64(dtype == np.float64):
        random = np.random.default_rng(0)
        matrix, weights = (jnp.asarray(random.normal(size=s), dtype) for s in ((5, 3), (2, 4, 3)))
        tokens = jnp.asarray(random.integers(0, 5, (2, 4)))
        got = jax.value_and_grad(lambda m: jnp.sum(weights * look_up(m, tokens)))(matrix)
        want = jax.value_and_grad(lambda m: jnp.sum(weights * m[tokens]))(matrix)
        for a, b in zip(got, want, strict=True):
            assert a.dtype == dtype
            np.testing.assert_allclose(a, b, rtol=1e-5)


def test_a_product_of_bfloat16_factors_is_not_rounded_to_bfloat16():
    random = np.random.default_rng(0)
    x, matrix = (jnp.asarray(random.normal(size=s), jnp.bfloat16) for s in ((7, 64), (64, 5)))
    exact = np.asarray(x, np.float64) @ np.asarray(matrix, np.float64)
    np.testing.assert_allclose(wide_product(x, matrix), exact, atol=1e-5)
    assert np.abs(np.asarray(x @ matrix, np.float64) - exact).max() > 1e-3
    of_x, of_matrix = jax.grad(lambda a, b: jnp.sum(jnp.sin(wide_product(a, b))), (0, 1))(x, matrix)
    assert of_x.dtype == of_matrix.dtype == jnp.bfloat16
    cosine = np.cos(exact)
    for got, want in (
        (of_x, cosine @ np.asarray(matrix, float).T),
        (of_matrix, np.asarray(x, float).T @ cosine),
    ):
        error = np.linalg.norm(np.asarray(got, float) - want)
        assert error <= 2**-7 * np.linalg.norm(want)
