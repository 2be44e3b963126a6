"""What is measured of gradients is what a computation by hand gives; the exponent follows it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deltal_jax import Reward, train
from deltal_jax.config import OptimizerConfig, load_config
from deltal_jax.metrics import load_metrics
from deltal_jax.objective.adaptive import agreement
from deltal_jax.parallel.mesh import make_mesh
from deltal_jax.training.buckets import make_buckets
from deltal_jax.training.describe import formula
from deltal_jax.training.loss import SUPERVISED, Meters
from deltal_jax.training.meters import CLASSES, WINDOW, LiveMeters, length_classes
from deltal_jax.training.optimizer import make_optimizer, optimizer_meter
from deltal_jax.training.step import Update, UpdateReport
from tests import fakes
from tests.runs import TINY, assert_same, copied, mixed_reward

COUNT = 7
REWARDS = [Reward(mixed_reward)]


def bucket_of(weights, rows=8):
    """One bucket, the last row of which is empty."""
    (bucket,) = make_buckets(
        fakes.rollout(COUNT),
        np.arange(COUNT),
        advantages=np.random.default_rng(1).normal(size=COUNT).astype(np.float32),
        weights=weights,
        edges=(30,),
        tokens_per_microbatch=30 * rows,
    )
    assert bucket.tokens.shape == (rows, 30)
    return bucket


def rows_of(bucket, rows):
    """These rows of a bucket alone."""
    return jax.tree.map(lambda x: x[rows] if x.ndim == 2 else x, bucket)


def flat(tree):
    return np.concatenate([np.ravel(x).astype(np.float64) for x in jax.tree.leaves(tree)])


@pytest.fixture(scope="module")
def halved():
    """An update that halves, and its report of one bucket compared with equal weights."""
    graphdef, params = fakes.model(fakes.SHALLOW)
    update = Update(graphdef, optax.sgd(0.1), SUPERVISED, halves=True)
    bucket = bucket_of(np.linspace(0.2, 1, COUNT, dtype=np.float32))
    equal = dataclasses.replace(bucket, weights=np.full(COUNT, 0.5, np.float32))
    states = [update.init(params, jax.random.key(0)) for _ in range(2)]
    report = update(states[0], [bucket], [equal])[1]
    return update, states[1].params, bucket, equal, report


def test_what_is_measured_of_a_bucket_is_what_its_halves_and_weights_are_by_hand(halved):
    update, params, bucket, equal, report = halved
    plain = Update(fakes.model(fakes.SHALLOW)[0], optax.sgd(0.1), SUPERVISED)
    one, other = (
        flat(plain.accumulate(params, [rows_of(bucket, np.arange(at, 8, 2))]).grads)
        for at in (0, 1)
    )
    assert report.spreads == [pytest.approx(np.sum((one - other) ** 2), rel=1e-4)]
    assert report.norms["optim/grad_norm"] == pytest.approx(np.linalg.norm(one + other), rel=1e-5)
    unweighted = flat(update.accumulate(params, [equal]).grads)
    norms = np.linalg.norm(one + other), np.linalg.norm(unweighted)
    cosine = (one + other) @ unweighted / norms[0] / norms[1]
    assert cosine < 0.999
    assert report.likeness == (
        pytest.approx(cosine, rel=1e-5),
        pytest.approx(norms[0] / norms[1], rel=1e-5),
    )
    assert update.add._cache_size() == 1  # other weights are no other program


def test_a_bucket_that_cannot_be_halved_is_added_all_the_same(halved):
    update, params, bucket, *_ = halved
    gradient, (spread,) = update._measure(params, [rows_of(bucket, np.arange(7))])
    assert np.isnan(float(spread))
    whole = flat(update.accumulate(params, [bucket]).grads)
    assert np.linalg.norm(flat(gradient.grads) - whole) <= 1e-5 * np.linalg.norm(whole)


def test_on_a_mesh_the_halves_are_those_of_one_device(halved):
    *_, bucket, equal, want = halved
    graphdef, params = fakes.model(fakes.SHALLOW)
    mesh = make_mesh(2, 2, 1, devices=jax.devices()[:4])
    update = Update(graphdef, optax.sgd(0.1), SUPERVISED, mesh=mesh, halves=True)
    assert update.row_multiple == 8
    report = update(update.init(params, jax.random.key(0)), [bucket], [equal])[1]
    assert report.spreads == pytest.approx(want.spreads, rel=1e-4)
    assert report.likeness == pytest.approx(want.likeness, rel=1e-4)


def step_of(beta, seed, skipped=None):
    """The buckets of a step and a report with y_k = ‖G‖² / 2 · Σ (w A)² L^β by no noise."""
    rollout = fakes.rollout(48, seed=seed)
    rng = np.random.default_rng(seed)
    buckets = make_buckets(
        rollout,
        np.arange(48),
        advantages=rng.normal(size=48).astype(np.float32),
        weights=(1 / rollout.response_lengths).astype(np.float32),
        edges=(8, 12, 16, 30),
        tokens_per_microbatch=60,
        row_multiple=2,
    )
    lengths, spreads = rollout.response_lengths.astype(float), []
    for bucket in buckets:
        ids = np.unique(bucket.segment_ids[bucket.loss_mask])
        moved = (bucket.weights * bucket.advantages)[ids].astype(float)
        spreads.append(float(np.sum(moved**2 * lengths[ids] ** beta)))
    norms = {"optim/grad_norm": float(np.sqrt(5 * np.sum(spreads)))}
    return [buckets], [UpdateReport(0.0, Meters({}, {}), norms, skipped, spreads)]


def test_the_cv_is_of_the_window_as_a_whole():
    """Steps whose own mean is under the noise do not make it unknown, nor a lucky one small."""
    live, spent = LiveMeters(load_config("countdown-tiny", {"meters.variance": True})), [0.0, 0.0]
    for step, factor in enumerate([9.0, 0.5, 0.9, 5.0, 1.0]):
        buckets, (report,) = step_of(1.0, step)
        noise = sum(report.spreads)
        report.norms["optim/grad_norm"] = float(np.sqrt(factor * noise))
        found = live.observe(buckets, [report])
        spent = [spent[0] + noise, spent[1] + (factor - 1) * noise]
        assert found["variance/cv"] == pytest.approx(np.sqrt(spent[0] / spent[1]))


ADAPTS = {
    "objective.alpha": "beta",
    "objective.adaptive.start": 3,
    "objective.adaptive.every": 2,
}


def test_the_exponent_follows_what_was_measured_before_by_the_schedule():
    """And what is kept as JSON goes on as if nothing had happened."""
    live = LiveMeters(load_config("countdown-tiny", ADAPTS | {"objective.adaptive.range": [-1, 3]}))
    used, betas = [], [0.5] * 4 + [1.6] * (WINDOW + 4)
    for step, beta in enumerate(betas):
        used.append(live.alpha)
        live = LiveMeters(live.config, json.loads(json.dumps(live.saved())))
        found = live.observe(*step_of(beta, step))
        assert found["aggregation/alpha"] == used[-1]
        assert found["variance/cv"] == pytest.approx(0.5)  # noise 1, signal 4
        if 1 <= step < 4:
            assert found["variance/cv_predicted"] == pytest.approx(0.5, rel=0.02)
    assert used[:3] == [1.0, 1.0, 1.0]
    assert used[3] == used[4] == pytest.approx(0.5, abs=0.01)
    assert used[5] == used[6] != used[4]
    assert used[-1] == pytest.approx(1.6, abs=0.01)  # the window has forgotten


def test_the_exponent_stays_in_its_range_and_where_nothing_is_known():
    live = LiveMeters(load_config("countdown-tiny", ADAPTS))
    for step in range(3):
        assert live.observe(*step_of(1.8, step, skipped="nan"))["variance/beta_pairs"] == 0
    assert live.alpha == 1.0
    live.observe(*step_of(1.8, 0))
    found = live.observe(*step_of(1.8, 1))
    assert found["variance/beta"] == pytest.approx(1.8, abs=0.01) and live.alpha == 1.25
    for alpha in (0.5, 1):
        fixed = LiveMeters(load_config("countdown-tiny", {"objective.alpha": alpha}))
        for step in range(9):
            fixed.observe(*step_of(1.8, step))
        assert fixed.alpha == alpha
    comparing = LiveMeters(load_config("countdown-tiny", {"meters.every": 3}))
    compared = []
    for step in range(6):
        compared.append(comparing.compares)
        comparing.observe(*step_of(1.0, step))
    assert compared == [False, False, True] * 2


@pytest.mark.parametrize("alpha", ["beta", "mse"])
def test_a_run_whose_exponent_adapts_is_resumed_bit_for_bit(alpha, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = TINY | {
        "sft.steps": 0,
        "rollout.max_response_length": 24,
        "length_buckets": [32],
        "rl.tokens_per_microbatch": 64,
        "rl.optimizer.learning_rate": 1e-2,
        "evaluate.every": 0,
        "objective.alpha": alpha,
        "objective.adaptive.start": 1,
        "objective.adaptive.every": 1,
        "objective.adaptive.range": [-1, 3],
        "meters.every": 2,
    }
    train("countdown-tiny", options | {"run.dir": str(whole)}, rewards=REWARDS, quiet=True)
    lines = [x for x in load_metrics(whole / "metrics.jsonl") if x["phase"] == "rl"]
    alphas = [line["aggregation/alpha"] for line in lines]
    assert alphas[0] == 1.0 and len(set(alphas[1:])) >= 2, "changes before and after the resume"
    assert alphas[2] not in alphas[:2] and alphas[3] != alphas[2]
    assert ["bias/cosine" in line for line in lines] == [False, True, False, True]
    train(
        None,
        {"run.dir": str(copied(whole, broken, 2))},
        rewards=REWARDS,
        resume=True,
        quiet=True,
    )
    assert_same(broken, whole)


def test_what_mse_looks_at_is_the_gradients_of_the_classes_by_hand():
    graphdef, params = fakes.model(fakes.SHALLOW)
    update = Update(graphdef, optax.sgd(0.1), SUPERVISED, remembers=True)
    bucket = bucket_of(np.full(COUNT, 0.5, np.float32))
    classes = np.asarray([0, 1, 0, 2, 1, -1, 2])
    state = update.init(params, jax.random.key(0))
    assert not np.any(update.inner_products(state, [bucket], classes, 3)[1])
    first, second = (
        flat(update.accumulate(params, [dataclasses.replace(bucket, weights=weights)]).grads)
        for weights in (np.full(COUNT, 0.5, np.float32), np.float32(classes == 1))
    )
    moved, _ = update(state, [bucket])
    np.testing.assert_allclose(flat(moved.direction), 0.1 * first, rtol=1e-5, atol=1e-6)
    fixed = dataclasses.replace(moved, params=params)
    inner, toward = update.inner_products(fixed, [bucket], classes, 3)
    assert inner[1, 1] == pytest.approx(second @ second, rel=1e-4)
    assert toward[1] == pytest.approx(second @ first / np.linalg.norm(first), rel=1e-4)
    np.testing.assert_array_equal(inner, inner.T)


def test_classes_are_of_equal_size_by_rank_and_leave_out_what_moves_nothing():
    (buckets,), _ = step_of(1.0, 3)
    silent = np.float32(np.arange(48) % 4 > 0)
    buckets = [dataclasses.replace(x, advantages=x.advantages * silent) for x in buckets]
    classes, means = length_classes(buckets)
    lengths = fakes.rollout(48, seed=3).response_lengths
    assert np.all((classes == -1) == (silent == 0))
    assert np.unique(classes, return_counts=True)[1].tolist() == [12] + [6] * CLASSES
    for number in range(CLASSES - 1):
        assert lengths[classes == number].max() <= lengths[classes == number + 1].min()
        assert means[number] == lengths[classes == number].mean()


def test_the_exponent_of_mse_maximises_the_agreement_of_what_was_seen():
    config = load_config(
        "countdown-tiny",
        {
            "objective.alpha": "mse",
            "objective.adaptive.start": 1,
            "objective.adaptive.range": [-1, 3],
        },
    )
    lengths = 10.0 * 2 ** np.arange(6)
    inner, toward = np.diag(lengths**1.5), np.full(6, 10.0)
    seen = {"lengths": lengths.tolist(), "inner": inner.tolist(), "toward": toward.tolist()}
    live = LiveMeters(config, LiveMeters(config).saved() | {"seen": [seen, seen]})
    live.observe(*step_of(1.0, 0))
    tried = np.linspace(-1, 3, 4001)
    best = tried[np.argmax(agreement(tried, lengths, inner, toward))]
    assert 1.2 < best < 1.5 and live.alpha == pytest.approx(best, abs=0.014)  # 151 are tried


def test_the_share_of_elements_that_epsilon_damps_and_of_clipped_updates():
    config = OptimizerConfig(learning_rate=0.1, epsilon=1e-3, b2=0.9, clip_norm=5.0)
    params = {"a": jnp.zeros(3), "b": jnp.zeros(1)}
    state = (optimizer := make_optimizer(config, 10)).init(params)
    meter = optimizer_meter(config)
    gradients = [[1.0, 0.011, 0.009, 0.0], [1.0, 0.0, 0.009, 0.02]]
    # The second: root mean squares by weights 0.09 / 0.19 and 0.1 / 0.19 are 0.0076, 0.009, 0.0145.
    for values, share in zip(gradients, (0.5, 0.5), strict=True):
        grads = {"a": jnp.asarray(values[:3]), "b": jnp.asarray(values[3:])}
        _, state = optimizer.update(grads, state, params)
        found = meter(jnp.asarray(np.linalg.norm(values)), state)
        assert {k: float(v) for k, v in found.items()} == {
            "optim/clipped_frac": 0.0,
            "optim/below_eps_frac": pytest.approx(share),
        }
    assert float(meter(jnp.asarray(5.1), state)["optim/clipped_frac"]) == 1.0
    unclipped = optimizer_meter(dataclasses.replace(config, clip_norm=None))
    assert unclipped(jnp.asarray(5.1), optax.sgd(0.1).init(params)) == {}


REFUSED = {
    "objective.adaptive.start: set objective.alpha=beta too": {"objective.adaptive.start": 9},
    "objective.alpha: beta is an exponent of delta_l; set": {
        "objective.alpha": "beta",
        "objective.aggregation": "token_mean",
    },
    "objective.adaptive.range: give the lowest and the highest exponent": {
        "objective.alpha": "mse",
        "objective.adaptive.range": [1.5, 0.5],
    },
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_an_exponent_contradicts_is_refused(said):
    assert fakes.config_refusal(REFUSED[said]).startswith(said)


def test_the_formula_says_what_the_exponent_follows():
    said = formula(load_config("countdown-tiny", {"objective.alpha": "beta"})).splitlines()
    assert "w_i  = (1/192) · L_i^-α / Σ_(j in batch) L_j^-α" in said
    assert (
        "α    = 1 for 8 steps; from then on it follows β̂, with Var(g_i) ∝ L_i^β̂ in the steps "
        "before: anew every 5 steps, in 0.5 … 1.25" in said
    )
    assert "(experimental)" in formula(load_config("countdown-tiny", {"objective.alpha": "mse"}))
