"""Diagnostics: what the meters say of each aggregation, against the closed forms of the paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from deltal_jax.objective.aggregation import AGGREGATIONS, delta_l
from deltal_jax.objective.diagnostics import aggregation_diagnostics

SIZE, M = 12, 512.0
METER = jax.jit(aggregation_diagnostics, static_argnames=("normalizer", "beta"))
LENGTHS = np.random.default_rng(3).integers(1, 500, SIZE)


def meters(weights, lengths, advantages=None, *, normalizer=M, beta=1.0) -> dict[str, float]:
    if advantages is None:
        advantages = np.ones(len(weights))
    arrays = (jnp.asarray(weights, float), jnp.asarray(lengths), jnp.asarray(advantages, float))
    return {k: float(v) for k, v in METER(*arrays, normalizer=normalizer, beta=beta).items()}


def weigh(method: str, lengths=LENGTHS, **options) -> jax.Array:
    if method in ("delta_l", "constant_length"):
        options["normalizer"] = M
    return AGGREGATIONS[method](jnp.asarray(lengths), **options)


def decile_shares(weights, lengths) -> tuple[float, float]:
    """Tenths of a response at a time, responses of equal length in equal parts."""
    carried = sorted((n, w) for n, w in zip(lengths, weights, strict=True) if n > 0 and w > 0)
    if not carried:
        return 0.0, 0.0
    mean = {n: np.mean([w for m, w in carried if m == n]) for n, _ in carried}
    tenths = [mean[n] / 10 for n, _ in carried for _ in range(10)]
    total = sum(w for _, w in carried)
    return sum(tenths[: len(carried)]) / total, sum(tenths[-len(carried) :]) / total


@given(
    st.lists(st.floats(0, 1), min_size=SIZE, max_size=SIZE).filter(lambda w: sum(w) > 1e-3),
    st.lists(st.integers(0, 8192), min_size=SIZE, max_size=SIZE),
    st.lists(st.sampled_from([0.0, 1.0, -0.5]), min_size=SIZE, max_size=SIZE),
    st.sampled_from([0.0, 1.0, 1.6]),
)
def test_every_meter_is_its_formula(weights, lengths, advantages, beta):
    w, L = np.asarray(weights), np.asarray(lengths, float)
    w = np.where((L > 0) & (w > 1e-30), w, 0.0)  # nothing below float32's range
    weights = w.tolist()
    assume(w.sum() > 0)
    shortest, longest = decile_shares(w, L)
    powers = np.where(L > 0, np.maximum(L, 1) ** beta, 0.0)
    formulas = {
        "bias_factor": M * w.sum(),
        "predicted_cv": np.sqrt(np.sum(w**2 * powers)) / w.sum(),
        "ess": w.sum() ** 2 / np.sum(w**2),
        "weight_shortest_decile": shortest,
        "weight_longest_decile": longest,
        "zero_advantage_weight": w[np.asarray(advantages) == 0].sum() / w.sum(),
        "weight_min": w.min(),
        "weight_max": w.max(),
    }
    with jax.enable_x64(True):
        found = meters(weights, lengths, advantages, beta=beta)
    assert found == pytest.approx(formulas, rel=1e-12)
    assert meters(weights, lengths, advantages, beta=beta) == pytest.approx(formulas, rel=1e-5)


def test_the_bias_factor_is_one_for_unbiased_methods_and_the_papers_for_the_others():
    for alpha in (0.0, 0.75, 1.0, 2.0):
        factor = meters(weigh("delta_l", alpha=alpha), LENGTHS)["bias_factor"]
        assert factor == pytest.approx(1.0, rel=1e-5)
    unbiased = meters(weigh("constant_length"), LENGTHS)
    assert unbiased["bias_factor"] == pytest.approx(1.0, rel=1e-5)
    assert meters(weigh("token_mean"), LENGTHS)["bias_factor"] == pytest.approx(
        SIZE * M / LENGTHS.sum(), rel=1e-5
    )
    assert meters(weigh("sequence_mean"), LENGTHS)["bias_factor"] == pytest.approx(
        M * np.mean(1 / LENGTHS), rel=1e-5
    )


def test_predicted_variation_of_every_method_is_its_closed_form():
    names = ("delta_l", "sequence_mean", "token_mean", "constant_length")
    cv = {name: meters(weigh(name), LENGTHS)["predicted_cv"] for name in names}
    long = np.sqrt(LENGTHS.sum()) / SIZE
    assert cv["sequence_mean"] == pytest.approx(np.sum(1 / LENGTHS) ** -0.5, rel=1e-5)
    assert cv["token_mean"] == pytest.approx(long, rel=1e-5)
    assert cv["constant_length"] == pytest.approx(long, rel=1e-5)
    assert cv["delta_l"] == pytest.approx(cv["sequence_mean"], rel=1e-5)
    for alpha in (0.25, 0.75, 1.6):
        closed = np.sqrt(np.sum(LENGTHS ** (1 - 2 * alpha))) / np.sum(LENGTHS**-alpha)
        found = meters(weigh("delta_l", alpha=alpha), LENGTHS)["predicted_cv"]
        assert found == pytest.approx(closed, rel=1e-5)


@pytest.mark.parametrize("beta", [0.5, 1.0, 1.6])
def test_predicted_variation_is_least_at_the_exponent_beta(beta):
    cv = {
        alpha: meters(weigh("delta_l", alpha=alpha), LENGTHS, beta=beta)["predicted_cv"]
        for alpha in (beta, beta - 0.2, beta + 0.2, 0.0)
    }
    assert min(cv, key=cv.get) == beta


def test_effective_sample_size_is_b_for_equal_weights_and_one_for_a_single_weight():
    assert meters(np.full(SIZE, 0.01), LENGTHS)["ess"] == pytest.approx(SIZE, rel=1e-6)
    assert meters(np.eye(SIZE)[3] * 0.01, LENGTHS)["ess"] == pytest.approx(1.0, rel=1e-6)
    for alpha in (0.0, 1.0):
        ess = meters(weigh("delta_l", alpha=alpha), LENGTHS)["ess"]
        assert ess < SIZE - 1 if alpha else ess == pytest.approx(SIZE, rel=1e-6)


def test_weight_on_idle_responses_is_counted_by_weight_and_not_by_number():
    advantages = np.where(np.median(LENGTHS) > LENGTHS, 0.0, 1.0)
    share = meters(weigh("delta_l"), LENGTHS, advantages)["zero_advantage_weight"]
    assert share == pytest.approx(np.sum((1 / LENGTHS)[advantages == 0]) / np.sum(1 / LENGTHS))
    idle = meters(weigh("delta_l"), LENGTHS, np.zeros(SIZE))
    assert idle["zero_advantage_weight"] == pytest.approx(1.0, rel=1e-6)
    assert meters(weigh("delta_l"), LENGTHS)["zero_advantage_weight"] == 0.0


def test_all_meters_are_finite_where_there_is_nothing_to_train():
    for lengths in (np.zeros(SIZE, int), LENGTHS):
        found = meters(np.zeros(SIZE), lengths, np.zeros(SIZE))
        assert found == dict.fromkeys(found, 0.0)


@pytest.mark.parametrize("lengths", [[1] * SIZE, [10**6] * SIZE, [1, 10**6] * (SIZE // 2)])
@pytest.mark.parametrize("alpha", [-1.0, 0.0, 1.0, 3.0])
def test_all_meters_are_finite_at_the_extremes(lengths, alpha):
    weights = delta_l(jnp.asarray(lengths), alpha, normalizer=1e6)
    found = meters(weights, lengths, normalizer=1e6)
    assert np.isfinite(list(found.values())).all()
    assert found["bias_factor"] == pytest.approx(1.0, rel=1e-5)
    assert 1.0 - 1e-5 <= found["ess"] <= SIZE + 1e-4


def deciles(weights, lengths) -> tuple[float, float]:
    found = meters(weights, lengths)
    return found["weight_shortest_decile"], found["weight_longest_decile"]


def test_the_weight_on_the_shortest_and_longest_tenth_by_hand():
    lengths = np.asarray([10, 400, 20, 30, 40, 50, 60, 70, 80, 90, 10, 300, 15, 25, 35, 45, 55, 65])
    lengths = np.append(lengths, [75, 85])
    weights = np.arange(1.0, 21.0)
    # A tenth of 20 is 2: the two of length 10, at 0 and 10; 400 and 300, at 1 and 11.
    assert deciles(weights, lengths) == pytest.approx(((1 + 11) / 210, (2 + 12) / 210))


def test_responses_of_equal_length_share_their_place_in_a_tenth():
    lengths, weights = [5] * 4 + [9] * 6, [1.0, 2, 3, 4, 1, 1, 1, 1, 1, 3]
    # A tenth of 10 is one of the four shortest, of mean weight 2.5, and one of the six longest.
    assert deciles(weights, lengths) == pytest.approx((2.5 / 18, (8 / 6) / 18))


def test_a_tenth_of_fewer_than_ten_responses_is_a_part_of_the_extreme_one():
    assert deciles([6.0, 3.0, 1.0], [1, 2, 6]) == pytest.approx((0.3 * 0.6, 0.3 * 0.1))
    assert deciles([2.0], [7]) == pytest.approx((0.1, 0.1))
    # Of 15 it is one and a half.
    weights = np.arange(15.0) + 1
    assert deciles(weights, np.arange(15) + 1) == pytest.approx(
        ((1 + 0.5 * 2) / 120, (15 + 0.5 * 14) / 120)
    )


@pytest.mark.parametrize("size", [1, 3, 10, 12, 37])
def test_equal_weights_put_a_tenth_on_each_tenth(size):
    lengths = np.random.default_rng(size).integers(1, 9, size)
    assert deciles(np.full(size, 0.3), lengths) == pytest.approx((0.1, 0.1))


def test_filtered_and_empty_responses_are_in_no_tenth():
    lengths, weights = np.asarray([4, 9, 2, 7]), np.asarray([3.0, 1, 5, 1])
    among = np.asarray([0, 4, 1, 9, 2, 50, 7]), np.asarray([0.0, 3, 0, 1, 5, 0, 1])
    assert deciles(among[1], among[0]) == pytest.approx(deciles(weights, lengths))


@given(st.permutations(range(SIZE)), st.sampled_from([2, 5, 500]))
def test_the_meters_do_not_depend_on_the_order_of_the_responses(order, longest):
    lengths = np.random.default_rng(longest).integers(1, longest, SIZE)
    weights, advantages = np.arange(SIZE) / 7, np.arange(SIZE) % 3 - 1.0
    order = list(order)
    shuffled = meters(weights[order], lengths[order], advantages[order])
    assert shuffled == pytest.approx(meters(weights, lengths, advantages), rel=1e-6)


def test_the_shortest_tenth_weighs_more_the_larger_the_exponent():
    shares = [deciles(weigh("delta_l", alpha=alpha), LENGTHS) for alpha in (-1.0, 0.0, 1.0, 2.0)]
    assert shares[1] == pytest.approx((0.1, 0.1))
    assert [short for short, _ in shares] == sorted(short for short, _ in shares)
    assert [long for _, long in shares] == sorted((long for _, long in shares), reverse=True)


def test_tiny_weights_have_the_same_shape_as_large_ones():
    """At M = 10^6 and B = 10^6 a weight is 10^-12 or less, and its square at float32's edge."""
    weights = np.asarray(weigh("delta_l"))
    tiny, plain = meters(weights * 1e-25, LENGTHS), meters(weights, LENGTHS)
    scale_free = plain.keys() - {"bias_factor", "weight_min", "weight_max"}
    for name in scale_free:
        assert tiny[name] == pytest.approx(plain[name], rel=1e-5)
