"""Exponents of parts, on blocks of gradients whose exponents are known."""

import dataclasses

import numpy as np
import pytest

from deltal_jax.laboratory.aggregations import Pool
from deltal_jax.laboratory.exponents import ONE, compare_exponents


def blocks(betas, groups=128, samples=4, seed=1):
    """Grams of one block a layer, Var = L^β around one mean, of like size, and the pool."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(np.exp(rng.normal(3.0, 0.9, groups * samples)), 3, 300).astype(int)
    found = {}
    for layer, beta in enumerate(betas):
        spread = lengths**beta / np.mean(lengths**beta)
        noise = rng.normal(size=(len(lengths), 20)) * np.sqrt(spread)[:, None]
        own = 0.3 + noise
        found[layer, "q"] = own @ own.T
    return found, Pool(lengths, np.ones(len(lengths)), np.ones(len(lengths), bool), groups)


def rows(betas):
    grams, pool = blocks(betas)
    found = compare_exponents(grams, pool, 16, 6)
    assert found is not None and found["batch_groups"] == 16
    return {row["name"]: row for row in found["rows"]}


def test_layers_that_differ_gain_by_exponents_of_their_own():
    """One exponent is wrong for both layers; kinds do not tell them apart."""
    found = rows((0.0, 2.0))
    own = found["β per layer"]
    assert own["gain_low"] > 0 and own["relative_variance_high"] < 1
    assert found["β per layer and kind"]["gain"] == pytest.approx(own["gain"])
    assert found["β per kind"]["gain"] == found[ONE]["gain"] == 0.0
    assert own["cv"] < found[ONE]["cv"] and own["true_cosine"] > found[ONE]["true_cosine"]


def test_layers_that_do_not_differ_gain_nothing():
    found = rows((1.0, 1.0))["β per layer"]
    assert abs(found["gain"]) < 0.01 and found["relative_variance"] == pytest.approx(1.0, abs=0.02)


def test_small_pools_and_no_gradient_say_nothing():
    grams, pool = blocks((1.0,), groups=6)
    assert compare_exponents(grams, pool, 16, 6) is None
    grams, pool = blocks((1.0,), groups=8)
    assert compare_exponents({b: 0 * gram for b, gram in grams.items()}, pool, 16, 6) is None
    for half in (slice(0, 16), slice(16, 32)):
        kept = np.zeros(32, bool)
        kept[half] = True
        assert compare_exponents(grams, dataclasses.replace(pool, kept=kept), 16, 6) is None
