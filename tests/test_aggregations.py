"""Bias, variance and CV of aggregations from a finite pool, against what is known or simulated."""

import functools

import numpy as np
import pytest
from scipy import stats

from deltal_jax.laboratory.aggregations import (
    REFERENCE,
    UNWEIGHTED,
    Pairs,
    Pool,
    batch_weights,
    compare,
    draw_batches,
    figures,
    methods,
)

BY_NAME = {method.name: method for method in methods(1.4)}


def by_name(gram, pool, size, beta=1.4):
    return {row["name"]: row for row in compare(gram, pool, size, beta)}


def test_orthogonal_prompts_of_100_and_1000_tokens():
    """Half the prompts have 100 tokens and one gradient, the others 1000 and an orthogonal one.
    Weights by 1/L mix them 10 : 1, a cosine of 11 / √202 with the even mixture; with batches of
    half the pool their shares vary by a little. Weights that know no length have no bias."""
    groups, samples = 64, 2
    long = np.repeat(np.arange(groups) % 2, samples)
    gradients = np.eye(2)[long]
    pool = Pool(100 + 900 * long, np.ones(len(long)), np.ones(len(long), bool), groups)
    found = by_name(gradients @ gradients.T, pool, 32)
    assert found[UNWEIGHTED]["bias_cosine"] == pytest.approx(1.0)
    assert found["DAPO (token_mean)"]["bias_cosine"] == pytest.approx(1.0, abs=0.02)
    expected = {
        alpha: (1 + 10**-alpha) / np.sqrt(2 * (1 + 10 ** (-2 * alpha)))
        for alpha in (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
    }
    assert expected[1.0] == pytest.approx(0.774, abs=1e-3)
    for alpha, cosine in expected.items():
        assert found[f"ΔL α={alpha:g}"]["bias_cosine"] == pytest.approx(cosine, abs=0.02)
    assert found["GRPO (sequence_mean)"]["bias_cosine"] == pytest.approx(expected[1.0], abs=0.03)


def test_micro_batches_are_of_four_responses_in_a_row():
    """What the paper's reference calls DAPO Norm: token means of micro-batches, averaged."""
    lengths = np.array([1, 2, 3, 2, 10, 20, 5, 5] * 4)
    pool, batches = pool_of(lengths, 8), draw_batches(8, 2, rounds=3)
    found = batch_weights(pool, batches, BY_NAME["DAPO Norm (local_token_mean)"].weigh)
    tokens = np.repeat(lengths.reshape(8, 4).sum(1), 4)  # a group is a micro-batch here
    often = found[found > 0] * np.broadcast_to(tokens, found.shape)[found > 0]
    assert len(often) == len(found) * 8 and often == pytest.approx(often[0])


def draw(rng, groups, samples=2):
    """Gradients whose mean and variance depend on the length, and that agree within a group."""
    lengths = np.exp(rng.normal(3.0, 0.8, (groups, 1)) + rng.normal(0, 0.5, (groups, samples)))
    lengths = np.clip(lengths, 3, 200).astype(int)
    mean = np.stack([np.ones_like(lengths, float), np.log(lengths) - 3, 0 * lengths], axis=-1)
    noise = rng.normal(size=(groups, 1, 3)) + rng.normal(size=(groups, samples, 3))
    found = mean + 0.15 * np.sqrt(lengths[..., None] / 2) * noise
    return found.reshape(-1, 3), lengths.reshape(-1)


def pool_of(lengths, groups):
    return Pool(lengths, np.ones(len(lengths)), np.ones(len(lengths), bool), groups)


@functools.cache
def truth(name, size):
    """Mean and total variance of a batch's gradient over 8,000 fresh batches."""
    rng, count = np.random.default_rng(7), 8000
    gradients, lengths = draw(rng, count * size)
    weights = np.ones((count, size * 2)) if name == UNWEIGHTED else 1 / lengths.reshape(count, -1)
    weights /= weights.sum(1, keepdims=True)
    batches = np.einsum("br,brd->bd", weights, gradients.reshape(count, -1, 3))
    return batches.mean(0), batches.var(0).sum()


def test_a_small_pool_gives_the_true_mean_variance_and_direction():
    """100 pools of 10 groups, batches of 4: the estimates' means are those of fresh batches, to
    three standard errors."""
    groups, size, names = 10, 4, (REFERENCE, UNWEIGHTED)
    batches, found = draw_batches(groups, size, rounds=20), {name: [] for name in names}
    for seed in range(100):
        gradients, lengths = draw(np.random.default_rng(seed), groups)
        pool, gram = pool_of(lengths, groups), gradients @ gradients.T
        weights = {name: batch_weights(pool, batches, BY_NAME[name].weigh) for name in names}
        for name in names:
            own = Pairs.of([gram], [weights[name]], [weights[UNWEIGHTED]], batches, groups)
            found[name].append([own.mean[0], own.variance[0], own.cross[0]])
    unweighted = truth(UNWEIGHTED, size)[0]
    for name in names:
        mean, variance = truth(name, size)
        expected = np.asarray([mean @ mean, variance, mean @ unweighted])
        values = np.asarray(found[name])
        error = values.std(0) / np.sqrt(len(values))
        assert np.all(np.abs(values.mean(0) - expected) < 3 * error + 0.02 * expected), name


def test_intervals_cover_the_truth():
    """80 pools of 32 groups, nearly all of which tell: the interval of the CV contains that of
    fresh batches as often as a binomial of 95 % does in 999 of 1000 cases."""
    mean, variance = truth(REFERENCE, 4)
    cv, hits, known = np.sqrt(variance / (mean @ mean)), 0, 0
    batches = draw_batches(32, 4, rounds=30)
    for seed in range(80):
        gradients, lengths = draw(np.random.default_rng(1000 + seed), 32)
        pool, pairs = pool_of(lengths, 32), {}
        weights = {
            n: batch_weights(pool, batches, BY_NAME[n].weigh) for n in (REFERENCE, UNWEIGHTED)
        }
        for name, own in weights.items():
            gram = gradients @ gradients.T
            pairs[name] = Pairs.of([gram], [own], [weights[UNWEIGHTED]], batches, 32)
        row = figures(pairs, REFERENCE, UNWEIGHTED, REFERENCE)
        if row["cv"] is not None:
            known += 1
            hits += row["cv_low"] <= cv <= row["cv_high"]
        assert row["gain"] in (0.0, None) and row["relative_variance"] == 1.0
    assert known >= 70 and hits >= stats.binom.ppf(0.001, known, 0.95)


def test_a_mean_under_the_noise_is_not_resolvable():
    gradients = np.random.default_rng(0).normal(size=(48, 40))
    lengths = np.random.default_rng(1).integers(5, 90, 48)
    found = by_name(gradients @ gradients.T, pool_of(lengths, 12), 4)
    assert all(row["cv"] is None and row["bias_cosine"] is None for row in found.values())
    assert all(row["variance"] > 0 and row["relative_variance"] > 0 for row in found.values())


def test_responses_that_do_not_count_change_nothing():
    """Their gradients may be anything, and they leave the denominators."""
    gradients, lengths = draw(np.random.default_rng(3), 12, samples=4)
    kept = np.random.default_rng(4).random(48) < 0.7
    pool = Pool(lengths, np.ones(48), kept, 12)
    wild = np.where(kept[:, None], gradients, 1e3)
    other = Pool(np.where(kept, lengths, 999), np.ones(48), kept, 12)
    first, second = by_name(gradients @ gradients.T, pool, 4), by_name(wild @ wild.T, other, 4)
    for name, row in first.items():
        for key, value in row.items():
            same = pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
            assert second[name][key] == same, (name, key)


def test_batches_of_one_group_are_the_groups_themselves():
    gradients, _ = draw(np.random.default_rng(5), 12, samples=3)
    batches, gram = draw_batches(12, 1, rounds=4), gradients @ gradients.T
    weights = np.repeat(np.eye(12)[batches.chosen[:, 0]], 3, axis=1) / 3
    own = Pairs.of([gram], [weights], [weights], batches, 12)
    means = gradients.reshape(12, 3, 3).mean(axis=1)
    assert own.variance[0] == pytest.approx(means.var(axis=0, ddof=1).sum())
    assert own.variance[5] == pytest.approx(np.delete(means, 4, 0).var(axis=0, ddof=1).sum())


def test_batches_need_two_of_them():
    with pytest.raises(ValueError, match="fewer than two batches"):
        draw_batches(15, 8)
    batches = draw_batches(17, 8, rounds=5)
    for first, second in batches.chosen.reshape(5, 2, 8):
        assert not set(first) & set(second)
