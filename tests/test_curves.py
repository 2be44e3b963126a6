"""The rules over a run's metrics: silent on sound curves, and each of them speaks of its own."""

import pytest

from deltal_jax.analysis.guide import find_entry
from deltal_jax.config import load_config
from deltal_jax.guard.curves import judge_curves, rules

CONFIG = load_config("countdown-tiny")
STEPS = 40
SOUND = {
    "policy/loss": 0.01,
    "policy/entropy": 0.4,
    "policy/approx_kl": 0.001,
    "policy/clip_frac_high": 0.0,
    "policy/clip_frac_low": 0.0,
    "length/mean": 30.0,
    "length/truncated_frac": 0.02,
    "mismatch/logprob_diff_mean": 4e-7,
    "reward/mean": 0.5,
    "reward/missing": 0.0,
    "reward/frac_zero_std": 0.3,
    "reward/frac_all_zero": 0.2,
    "aggregation/zero_advantage_weight": 0.3,
    "aggregation/ess": 90.0,
    "optim/grad_norm": 0.3,
    "optim/clipped_frac": 0.1,
    "optim/below_eps_frac": 0.0,
    "optim/skipped": 0.0,
    "bias/cosine": 0.8,
    "bias/cosine_noise": 0.7,
    "throughput/padding_frac": 0.2,
    "overlap/update_idle": 0.1,
    "overlap/rollout_idle": 0.1,
    "rollout/stale_frac": 0.1,
    "rollout/informative_frac": 0.6,
    "rollout/utilization": 0.8,
    "rollout/utilization_ideal": 0.85,
}


def lines(first=None, last=None, accuracies=(0.4, 0.6)):
    """A sound run of STEPS, other in its first or second half; the reward rises."""
    warm = [{"step": step, "phase": "sft", "sft/loss": 2.0 / step} for step in (1, 2)]
    rl = [
        {"step": step, "phase": "rl"}
        | SOUND
        | {"reward/mean": 0.4 + 0.005 * step}
        | ((first if step <= STEPS // 2 else last) or {})
        for step in range(1, STEPS + 1)
    ]
    name = "eval/countdown/avg_at_k"
    ends = [
        {"phase": "eval", name: x, f"{name}_low": x - 0.05, f"{name}_high": x + 0.05}
        for x in accuracies
    ]
    return [*warm, ends[0], *rl, *ends[1:]]


def trouble(found, config=CONFIG):
    """Of each metric that is not ok its worst verdict."""
    figures = [x for x in judge_curves(config, found)[0] if x.verdict != "ok"]
    ordered = sorted(figures, key=lambda x: x.verdict == "failed")
    return {figure.name.split(", ")[0]: figure.verdict for figure in ordered}


def test_sound_curves_are_ok_by_every_rule():
    figures, idle = judge_curves(CONFIG, lines())
    assert not idle and len(figures) == len(rules(CONFIG)) > 25
    assert {figure.verdict for figure in figures} == {"ok"}


SPOKEN = {
    "entropy": ({}, {"policy/entropy": 0.05}, {"policy/entropy": "failed"}),
    "noise": ({"policy/entropy": 0.2}, {"policy/entropy": 0.5}, {"policy/entropy": "look"}),
    "truncation": ({}, {"length/truncated_frac": 0.4}, {"length/truncated_frac": "failed"}),
    "length": ({}, {"length/mean": 120.0}, {"length/mean": "look"}),
    "constant": ({}, {"reward/frac_zero_std": 1.0}, {"reward/frac_zero_std": "failed"}),
    "dull": ({}, {"reward/frac_zero_std": 0.9}, {"reward/frac_zero_std": "look"}),
    "unsolved": ({}, {"reward/frac_all_zero": 0.9}, {"reward/frac_all_zero": "look"}),
    "missing": ({}, {"reward/missing": 40.0}, {"reward/missing": "failed"}),
    "few missing": ({}, {"reward/missing": 10.0}, {"reward/missing": "look"}),
    "mismatch": ({}, {"mismatch/logprob_diff_mean": 0.1}, {"mismatch/logprob_diff_mean": "look"}),
    "other policy": (
        {},
        {"mismatch/logprob_diff_mean": 0.9},
        {"mismatch/logprob_diff_mean": "failed"},
    ),
    "clipped": ({}, {"optim/grad_norm": 7.0}, {"optim/grad_norm": "look"}),
    "always clipped": ({}, {"optim/clipped_frac": 1.0}, {"optim/clipped_frac": "look"}),
    "epsilon": ({}, {"optim/below_eps_frac": 0.4}, {"optim/below_eps_frac": "look"}),
    "skipped": ({}, {"optim/skipped": 1.0}, {"optim/skipped": "look"}),
    "not finite": ({}, {"policy/loss": None}, {"policy/loss": "failed"}),
    "ratio": ({}, {"policy/clip_frac_low": 0.4}, {"policy/clip_frac_low": "look"}),
    "moved": ({}, {"policy/approx_kl": 0.4}, {"policy/approx_kl": "look"}),
    "turned": ({}, {"bias/cosine": 0.3}, {"bias/cosine": "look"}),
    "few": ({}, {"aggregation/ess": 9.0}, {"aggregation/ess": "look"}),
    "idle": (
        {},
        {"aggregation/zero_advantage_weight": 0.95},
        {"aggregation/zero_advantage_weight": "look"},
    ),
    "padding": ({}, {"throughput/padding_frac": 0.7}, {"throughput/padding_frac": "look"}),
    "waits": ({}, {"overlap/update_idle": 0.9}, {"overlap/update_idle": "look"}),
    "stale": ({}, {"rollout/stale_frac": 0.7}, {"rollout/stale_frac": "look"}),
    "uninformative": ({}, {"rollout/informative_frac": 0.1}, {"rollout/informative_frac": "look"}),
    "idle slots": ({}, {"rollout/utilization": 0.3}, {"rollout/utilization": "look"}),
}


@pytest.mark.parametrize(("first", "last", "said"), SPOKEN.values(), ids=SPOKEN)
def test_each_trouble_is_named_with_the_guides_remedy(first, last, said):
    found = lines(first, last)
    assert trouble(found) == said
    for figure in judge_curves(CONFIG, found)[0]:
        if figure.verdict != "ok":
            entry = find_entry(figure.name.split(", ")[0])
            assert entry is not None and figure.remedy == entry.remedy


@pytest.mark.parametrize(
    ("accuracies", "verdict"), [((0.6, 0.4), "failed"), ((0.6, 0.53), "look"), ((0.6, 0.59), None)]
)
def test_accuracy_that_falls_while_the_reward_rises_beyond_its_interval(accuracies, verdict):
    name = "eval/countdown/avg_at_k"
    assert trouble(lines(accuracies=accuracies)).get(name) == verdict
    falling = lines({"reward/mean": 0.6}, {"reward/mean": 0.3}, accuracies)
    assert name not in trouble(falling)


def test_rules_without_data_are_named_and_judge_nothing():
    short = [line for line in lines() if line["phase"] != "rl"][:2]
    figures, idle = judge_curves(CONFIG, short)
    assert [figure.name.split(", ")[0] for figure in figures] == ["sft/loss"]
    assert {"policy/entropy", "optim/grad_norm", "rollout/utilization"} <= set(idle)
    rising = [{"phase": "sft", "sft/loss": loss} for loss in (2.0, 3.0)]
    assert trouble(rising) == {"sft/loss": "look"}


def test_the_bounds_are_those_of_the_runs_own_guard():
    collapsed = lines({}, {"policy/entropy": 0.05})
    assert trouble(collapsed, load_config("countdown-tiny", {"guard.entropy_floor": 0.1})) == {}
    clip = load_config("countdown-tiny", {"rl.optimizer.clip_norm": None})
    assert trouble(lines({}, {"optim/grad_norm": 7.0}), clip) == {}
    normalised = load_config("countdown-tiny", {"rl.optimizer.normalize": True})
    assert trouble(lines({}, {"optim/grad_norm": 7.0}), normalised) == {}
