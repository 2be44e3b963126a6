"""Alarms: each at its onset and once, none for sound runs; likely causes by the config."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltal_jax.config import load_config
from deltal_jax.guard.health import CONSTANT_STEPS, HORIZON, causes, judge, must_stop
from tests.fakes import config_refusal

CONFIG = load_config("countdown-tiny")
#: Of 35 recorded runs: two sound ones, and one that collapsed into truncation (learning rate 1e-3).
RECORDED = json.loads((Path(__file__).parent / "data" / "health_series.json").read_text())


def steps(**series):
    """A line of metrics for each step; what is not given is as in a sound run."""
    sound = {
        "policy/entropy": 0.3,
        "length/truncated_frac": 0.02,
        "reward/missing": 0.0,
        "reward/frac_zero_std": 0.2,
        "mismatch/logprob_diff_mean": 1e-6,
    }
    names = {key: next(name for name in sound if name.endswith(key)) for key in series}
    rows = zip(*series.values(), strict=True)
    return [sound | dict(zip(names.values(), map(float, row), strict=True)) for row in rows]


def alarms(lines, config=CONFIG):
    """(step, first word of the warning) over a whole run, its statistics through JSON each step, as
    a resume at every step would have it."""
    running, found = {}, []
    for step, line in enumerate(lines, start=1):
        running, said = judge(config, line, json.loads(json.dumps(running)))
        found += [(step, text.split()[0]) for text in said]
    return found


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_runs_warn_only_where_one_collapsed(name):
    series = RECORDED[name]
    lines = steps(entropy=series["entropy"], truncated_frac=series["truncated"])
    found = alarms(lines)
    if name != "collapsed":
        assert not found
        return
    ((step, word),) = found
    assert word == "truncation"
    # The mean of the last steps is what passed the bound, not a single noisy one.
    assert np.mean(series["truncated"][step - HORIZON : step]) > 0.25


def test_an_entropy_that_falls_away_is_said_once_at_its_onset():
    rng = np.random.default_rng(0)
    entropy = 0.4 * np.exp(0.1 * rng.normal(size=200))
    entropy[100:] *= np.maximum(0.9 ** np.arange(100), 0.01)
    ((step, word),) = alarms(steps(entropy=entropy))
    under = 101 + np.log(0.2) / np.log(0.9)  # here the entropy itself passes the bound
    assert word == "entropy" and under < step < under + 2 * HORIZON


def test_a_surge_is_said_again_only_after_it_was_over():
    truncated = np.repeat([0.02, 0.5, 0.02, 0.5], 40)
    found = alarms(steps(truncated_frac=truncated))
    assert [word for _, word in found] == ["truncation"] * 2
    assert [40 < step <= 50 for step, _ in found] == [True, False] and 120 < found[1][0] <= 130


def test_a_high_start_is_no_surge_and_first_steps_are_not_judged():
    assert not alarms(steps(truncated_frac=np.linspace(0.9, 0.1, 60)))
    wild = steps(entropy=np.geomspace(5, 0.001, HORIZON - 1), missing=[100] * (HORIZON - 1))
    assert not alarms(wild)


def test_missing_rewards_and_constant_groups_warn():
    missing = [0] * 20 + [64] * 40  # of 128
    assert [word.endswith("%") for _, word in alarms(steps(missing=missing))] == [True]
    constant = [1.0] * (CONSTANT_STEPS - 1) + [0.9] + [1.0] * 20
    ((step, word),) = alarms(steps(frac_zero_std=constant))
    assert (step, word) == (2 * CONSTANT_STEPS, "all")


@given(st.lists(st.floats(0.001, 0.0299), max_size=30))
def test_a_mismatch_under_its_bound_is_never_said(drifts):
    assert not alarms(steps(logprob_diff_mean=drifts)) if drifts else True


def test_a_mismatch_warns_once_and_stops_beyond_the_second_bound():
    drifts = [0.001, 0.04, 0.04, 0.027, 0.04, 0.01, 0.04, 0.4]
    found = alarms(steps(logprob_diff_mean=drifts))
    assert [step for step, _ in found] == [2, 7]  # 0.027 is not far enough below
    lines = steps(logprob_diff_mean=[0.5, 0.51, np.nan])
    assert [must_stop(CONFIG, line) is not None for line in lines] == [False, True, False]
    assert "0.51 a token" in must_stop(CONFIG, lines[1])
    unbound = load_config("countdown-tiny", {"guard.mismatch_stop": None})
    assert must_stop(unbound, lines[1]) is None
    silent = load_config("countdown-tiny", {"guard.mismatch_warn": None})
    assert not alarms(steps(logprob_diff_mean=drifts), silent)


def test_a_step_in_which_nothing_was_measured_changes_no_statistic():
    running = {}
    for line in steps(entropy=[0.3] * 12):
        running, _ = judge(CONFIG, line, running)
    nothing = dict.fromkeys(line, float("nan")) | {"reward/frac_zero_std": 0.0}
    assert judge(CONFIG, nothing, running) == (running, [])


CAUSES = {
    "float32": ({}, {}, "sampler and trainer compute differently"),
    "bfloat16": ({"model.compute_dtype": "bfloat16"}, {}, "rounding"),
    "ahead": ({"rollout.ahead": 1, "model.compute_dtype": "bfloat16"}, {}, "rollout.ahead"),
    "partial": (
        {"rollout.partial": True, "rollout.oversampling": 2.0},
        {"rollout/stale_frac": 0.25},
        "rollout.partial: 25% of the tokens",
    ),
    "updates": ({"rl.updates_per_rollout": 4}, {}, "the policy moves in the 4 updates"),
    "server": (
        {"rollout.engine": "http", "rollout.server.url": "http://localhost:8000"},
        {},
        "the server samples by old or other weights",
    ),
}


@pytest.mark.parametrize("case", CAUSES)
def test_the_likeliest_cause_comes_first(case):
    overrides, metrics, first = CAUSES[case]
    config = load_config("countdown-tiny", overrides)
    assert causes(config, metrics).startswith(f"likely: {first}")


def test_bounds_that_contradict_each_other_are_refused():
    said = config_refusal({"guard.mismatch_stop": 0.01})
    assert said == "guard.mismatch_stop: 0.01 is below guard.mismatch_warn=0.03"
