"""Wrong static arguments raise ValueError while a program is traced, and arrays pass."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltal_jax.objective.advantages import batch_standardize, group_standardize
from deltal_jax.objective.aggregation import (
    constant_length,
    delta_l,
    inverse_variance,
    local_token_mean,
    prompt_mean,
)
from deltal_jax.objective.checks import check_ids, check_number
from deltal_jax.objective.diagnostics import aggregation_diagnostics
from deltal_jax.objective.surrogate import (
    cispo,
    clipped,
    dppo,
    gmpo,
    gspo,
    gspo_token,
    ratio_diagnostics,
    sapo,
)

NAN, INF = math.nan, math.inf
LENGTHS, IDS = jnp.asarray([3, 1, 4, 1]), jnp.asarray([0, 0, 1, 1])
ROWS = jnp.asarray([0.1, -0.2, 0.3, -0.4])
PACKED = {"segment_ids": IDS, "mask": jnp.ones(4, bool), "num_segments": 2}


def weigh(function, **options):
    return lambda: function(LENGTHS, **options)


def lose(function, **options):
    return lambda: function(ROWS, ROWS, ROWS, **options)


def standardize(function, epsilon):
    return lambda: function(ROWS, IDS, epsilon=epsilon)


def meters(**options):
    return lambda: aggregation_diagnostics(ROWS, LENGTHS, ROWS, **options)


CLIPS = {"clip_low": 0.2, "clip_high": 0.2}
REFUSALS = [
    (weigh(delta_l, normalizer=0), "normalizer: expected a finite number above 0, got 0"),
    (weigh(delta_l, normalizer=-8192), "normalizer: expected a finite number above 0, got -8192"),
    (weigh(delta_l, normalizer=NAN), "normalizer: expected a finite number above 0, got nan"),
    (weigh(delta_l, normalizer=INF), "normalizer: expected a finite number above 0, got inf"),
    (weigh(constant_length, normalizer=0.0), "normalizer: expected a finite number above 0"),
    (weigh(inverse_variance, variance={"beta": 1.0}, normalizer=0), "normalizer: expected"),
    (weigh(inverse_variance, variance={"rho": ROWS}, normalizer=0), "normalizer: expected"),
    (weigh(delta_l, alpha=NAN), "alpha: expected a finite number, got nan"),
    (weigh(delta_l, alpha=INF), "alpha: expected a finite number, got inf"),
    (weigh(delta_l, alpha=-INF), "alpha: expected a finite number, got -inf"),
    (weigh(inverse_variance, variance={"beta": NAN}), r"variance\['beta'\]: expected a finite"),
    (weigh(inverse_variance, variance={"beta": "1"}), r"variance\['beta'\]: .*, got '1'"),
    (weigh(inverse_variance, variance={}), r"variance: expected {'beta': …} or {'rho': …}, got \["),
    (weigh(inverse_variance, variance={"beta": 1, "rho": ROWS}), r"got \['beta', 'rho'\]"),
    (weigh(inverse_variance, variance={"rho": 0.5}), r"variance\['rho'\]: .*, got shape \(\)"),
    (standardize(group_standardize, 0.0), "epsilon: expected a finite number above 0, got 0.0"),
    (standardize(batch_standardize, -1e-6), "epsilon: expected a finite number above 0"),
    (lose(clipped, clip_low=-0.2), "clip_low: expected a number of at least 0, got -0.2"),
    (lose(clipped, clip_high=-0.2), "clip_high: expected a number of at least 0, got -0.2"),
    (lose(clipped, clip_low=NAN), "clip_low: expected a number of at least 0, got nan"),
    (lose(clipped, dual_clip=1.0), "dual_clip: expected a finite number above 1, got 1.0"),
    (lose(clipped, dual_clip=0.5), "dual_clip: expected a finite number above 1, got 0.5"),
    (lose(ratio_diagnostics, **CLIPS, dual_clip=-3.0), "dual_clip: expected"),
    (lose(ratio_diagnostics, clip_low=0.2, clip_high=-1.0), "clip_high: expected"),
    (lose(gspo, **PACKED, clip_low=-1e-3), "clip_low: expected"),
    (lose(gspo_token, **PACKED, clip_high=-1e-3), "clip_high: expected"),
    (lose(gmpo, **PACKED, clip_low=-0.4), "clip_low: expected"),
    (lose(cispo, clip_high=-0.1), "clip_high: expected"),
    (lose(sapo, tau_positive=0.0), "tau_positive: expected a finite number above 0, got 0.0"),
    (lose(sapo, tau_negative=-1.0), "tau_negative: expected a finite number above 0, got -1.0"),
    (lose(dppo, threshold=-0.1), "threshold: expected a finite number of at least 0, got -0.1"),
    (meters(normalizer=0), "normalizer: expected a finite number above 0, got 0"),
    (meters(normalizer=1, beta=NAN), "beta: expected a finite number, got nan"),
]


@pytest.mark.parametrize(("call", "message"), REFUSALS, ids=[message for _, message in REFUSALS])
def test_a_wrong_static_argument_is_refused_with_and_without_jit(call, message):
    for function in (call, jax.jit(call)):
        with pytest.raises(ValueError, match=message):
            function()


@pytest.mark.parametrize(
    "value", ["1.0", None, True, [1.0], 1j], ids=["text", "none", "bool", "list", "complex"]
)
def test_what_is_no_number_is_refused(value):
    with pytest.raises(ValueError, match=r"^alpha: expected a finite number, got "):
        check_number("alpha", value)
    # The tests check annotations before the body runs; a user's program does not.
    with pytest.raises(ValueError, match=r"^alpha: expected a finite number, got "):
        inspect.unwrap(delta_l)(LENGTHS, value)


@pytest.mark.parametrize(
    ("value", "bounds"),
    [
        (3, {}),
        (-2.5, {}),
        (np.float32(0.5), {"above": 0.0}),
        (np.int64(8192), {"above": 0.0}),
        (0.0, {"least": 0.0}),
        (INF, {"least": 0.0, "most": INF}),
    ],
)
def test_numbers_within_bounds_pass_whatever_their_type(value, bounds):
    check_number("x", value, **bounds)


def test_a_number_without_a_float_is_refused():
    with pytest.raises(
        ValueError, match=r"^normalizer: expected a finite number above 0, got 1000"
    ):
        check_number("normalizer", 10**400, above=0.0)


def test_arrays_pass_traced_or_not():
    def weights(alpha, normalizer):
        return delta_l(LENGTHS, alpha, normalizer=normalizer)

    unwrapped = inspect.unwrap(delta_l)
    want = unwrapped(LENGTHS, 0.5, normalizer=7.0)
    got = jax.jit(lambda a, m: unwrapped(LENGTHS, a, normalizer=m))(0.5, 7.0)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(weights(jnp.asarray(0.5), 7), want, rtol=1e-6)
    check_number("alpha", jnp.asarray(NAN))


def test_ids_out_of_range_are_refused_by_name_where_their_values_are_at_hand():
    check_ids("scope_ids", jnp.asarray([0, 3, 1]), 4)
    check_ids("scope_ids", jnp.zeros(0, jnp.int32), 0)
    for ids in ([0, 4], [-1, 0]):
        with pytest.raises(ValueError, match=r"^scope_ids: expected ids in \[0, 4\), got "):
            check_ids("scope_ids", jnp.asarray(ids), 4)
    with pytest.raises(ValueError, match=r"^scope_ids: expected ids in \[0, 4\), got 0 … 4$"):
        delta_l(LENGTHS, 1.0, scope_ids=jnp.asarray([0, 1, 2, 4]))
    for function, name in ((prompt_mean, "group_ids"), (local_token_mean, "microbatch_ids")):
        with pytest.raises(ValueError, match=rf"^{name}: expected ids in \[0, 4\), got -1 … 2$"):
            function(LENGTHS, jnp.asarray([0, 1, 2, -1]))
