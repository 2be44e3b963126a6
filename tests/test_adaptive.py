"""The estimate of how variance grows with length finds the truth on synthetic gradients."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltal_jax.objective.adaptive import BETAS, Pairs, agreement, fit_growth, scales

MICROBATCHES, RESPONSES = 240, 6


def batches(seed, spread=1.0):
    """Lengths, ascending over the micro-batches as buckets have them, and w_i A_i; [K n] each."""
    rng = np.random.default_rng(seed)
    lengths = np.exp(rng.normal(4.0, spread, MICROBATCHES * RESPONSES)).astype(int) + 1
    lengths = np.sort(lengths).reshape(MICROBATCHES, RESPONSES)
    return lengths, rng.normal(size=lengths.shape) / lengths


def grid_of(lengths, weighted):
    return np.asarray([scales(w, n, BETAS) for w, n in zip(weighted, lengths, strict=True)])


def fitted(window):
    growth = fit_growth(window)
    assert growth is not None
    return growth


def expected(lengths, weighted, beta, scale=0.3):
    """E y_k."""
    return scale * np.sum(weighted**2 * np.asarray(lengths, float) ** beta, axis=1)


@pytest.mark.parametrize("beta", [-0.5, 0.5, 1.0, 1.6, 2.0])
def test_without_noise_the_estimate_is_the_truth(beta):
    lengths, weighted = batches(0)
    pairs = Pairs.of(expected(lengths, weighted, beta), grid_of(lengths, weighted))
    growth = fitted([pairs])
    assert growth.beta == pytest.approx(beta, abs=2e-3)  # a parabola between points 1/8 apart
    assert growth.scale == pytest.approx(0.3, rel=0.02)


#: y_k as multiples of their mean: one direction, several, and heavy tails of infinite variance.
LAWS = {
    "chi-square": lambda rng: rng.chisquare(1, MICROBATCHES),
    "gamma": lambda rng: rng.gamma(8, 1 / 8, MICROBATCHES),
    "lognormal": lambda rng: rng.lognormal(-0.72, 1.2, MICROBATCHES),
    "pareto": lambda rng: (rng.pareto(1.9, MICROBATCHES) + 1) * 0.9 / 1.9,
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("beta", [0.5, 1.6])
def test_under_any_law_of_the_noise_the_mean_of_many_estimates_is_the_truth(law, beta):
    found = []
    for seed in range(24):
        lengths, weighted = batches(seed)
        noise = LAWS[law](np.random.default_rng(1000 + seed))
        y = expected(lengths, weighted, beta) * noise
        found.append(fitted([Pairs.of(y, grid_of(lengths, weighted))]).beta)
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found) - beta) < 4 * error + 0.01
    assert error < 0.05


@settings(max_examples=25)
@given(
    st.integers(0, 99),
    st.floats(1e-6, 1e3),
    st.lists(st.integers(1, MICROBATCHES - 1), max_size=4),
)
def test_only_ratios_of_weights_count_and_steps_add(seed, factor, cuts):
    """In whatever steps the micro-batches came, and in whatever order."""
    lengths, weighted = batches(seed)
    rng = np.random.default_rng(seed)
    y = expected(lengths, weighted, 1.2) * rng.exponential(size=MICROBATCHES)
    want = fitted([Pairs.of(y, grid_of(lengths, weighted))])
    order = rng.permutation(MICROBATCHES)
    y, grid = factor**2 * y[order], grid_of(lengths, factor * weighted)[order]
    parts = np.split(np.arange(MICROBATCHES), sorted(cuts))
    found = fitted([Pairs.of(y[part], grid[part]) for part in parts])
    assert found.beta == pytest.approx(want.beta, abs=1e-6)
    assert found.scale == pytest.approx(want.scale, rel=1e-6)


def test_responses_that_move_nothing_and_what_is_not_finite_tell_nothing():
    lengths, weighted = batches(3)
    y = expected(lengths, weighted, 1.0)
    want = fit_growth([Pairs.of(y[:-2], grid_of(lengths[:-2], weighted[:-2]))])
    weighted[-2], y[-2:] = 0.0, (0.0, np.nan)
    pairs = Pairs.of(y, grid_of(lengths, weighted))
    assert (pairs.count, fit_growth([pairs])) == (MICROBATCHES - 2, want)
    idle = np.asarray([[0.0, 2.0]]), np.asarray([[7, 0]])
    np.testing.assert_array_equal(scales(idle[0][0], idle[1][0], BETAS), 0.0)


def test_too_little_to_tell_is_no_estimate():
    lengths, weighted = batches(0)
    y = expected(lengths, weighted, 1.0)
    grid = grid_of(lengths, weighted)
    assert fit_growth([]) is None
    assert fit_growth([Pairs.of(y[:0], grid[:0])]) is None
    assert fit_growth([Pairs.of(y[::120], grid[::120])]) is None  # two pairs
    assert fit_growth([Pairs.of(0.0 * y, grid)]) is None
    assert fit_growth([Pairs.of(y, grid_of(np.full_like(lengths, 50), weighted))]) is None
    mixture = grid_of(np.broadcast_to(lengths[::48].ravel(), (240, 30)), np.ones((240, 30)))
    assert fit_growth([Pairs.of(y, mixture)]) is None  # the same lengths in each


def test_beyond_the_grid_the_estimate_is_its_end():
    lengths, weighted = batches(1)
    for beta, end in ((4.0, 3.0), (-2.0, -1.0)):
        pairs = Pairs.of(expected(lengths, weighted, beta), grid_of(lengths, weighted))
        assert fitted([pairs]).beta == end


def test_the_agreement_is_a_cosine_less_a_pull_towards_one():
    """By hand for two classes, and where each has its direction the best weights are X / N."""
    alphas = np.linspace(-1, 3, 401)
    lengths, inner = np.asarray([10.0, 40.0]), np.asarray([[2.0, 0.5], [0.5, 9.0]])
    toward = np.asarray([0.3, 0.4])
    u = np.stack([10.0**-alphas, 40.0**-alphas])
    wanted = (0.3 * u[0] + 0.4 * u[1]) / np.sqrt(2 * u[0] ** 2 + u[0] * u[1] + 9 * u[1] ** 2)
    found = agreement(alphas, lengths, inner, toward)
    np.testing.assert_allclose(found, wanted - 0.1 * (alphas - 1) ** 2, rtol=1e-12)
    np.testing.assert_allclose(agreement(alphas, 7 * lengths, inner, toward), found, rtol=1e-12)
    growing = np.diag(np.asarray([1.0, 4.0**1.5]))  # E‖G_j‖² ∝ L^1.5 of one signal
    best = agreement(alphas, lengths, growing, np.asarray([0.1, 0.1])) + 0.1 * (alphas - 1) ** 2
    assert alphas[np.argmax(best)] == pytest.approx(1.5)
    nothing = agreement(alphas, lengths, np.zeros((2, 2)), np.zeros(2))
    assert alphas[np.argmax(nothing)] == pytest.approx(1.0)
