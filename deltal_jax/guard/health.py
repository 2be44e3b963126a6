"""Figures of a step that say that a run goes wrong, and running statistics of them.

Pure functions: what a step needs of those before it is a plain dictionary, which a checkpoint
keeps, so a resumed run warns as one that was never interrupted.

An alarm is raised once, as its figure passes its bound, and can be raised again only after the
figure was well inside it. The bounds are fields of `guard` in the config. What they are between, of
38 recorded runs and of faults made on purpose to a trained `countdown-tiny`:

    entropy, of its highest     bound 0.2; sound runs 0.67 and more
    truncated, over its lowest  bound 0.25; sound 0.21 and less, one that collapsed 0.32
    mean |Δ log p| of a token   bound 0.03; float32 4e-7, bfloat16 0.005, one step ahead up to 0.03,
                                temperature 0.7 0.04, parameters of 50 steps ago 0.06

Of the mismatch the mean of |Δ| is judged and not the KL, as the exponential of one odd token
decides that.
"""

import math
from typing import Any

from deltal_jax.config import Config, GuardConfig

#: Steps that a mean looks back over, and before which no mean is judged.
HORIZON = 10
#: Share of responses without a reward, a mean, that warns.
MISSING = 0.2
#: Steps in a row in which all groups are constant, so that nothing is learnt, that warn.
CONSTANT_STEPS = 5
#: Of a bound: an alarm whose figure is below that part of it may be raised again.
CALM = 0.8

DRIFT = "mismatch/logprob_diff_mean"


def judge(
    config: Config, metrics: dict[str, float], before: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """The statistics after a step, of those before it (empty at first), and what to warn of.

    `metrics` are those of the step, NaN where they could not be measured.
    """
    after = _advance(before, metrics, config.rl.prompts_per_step * config.rl.samples_per_prompt)
    alarms, said = set(before.get("alarms", [])), []
    for name, (excess, line) in _figures(config, metrics, after).items():
        if excess > 1 and name not in alarms:
            alarms.add(name)
            said.append(line)
        elif excess < CALM:
            alarms.discard(name)
    return after | {"alarms": sorted(alarms)}, said


def must_stop(config: Config, metrics: dict[str, float]) -> str | None:
    """Why the run may not go on; None: it may."""
    bound, drift = config.guard.mismatch_stop, metrics.get(DRIFT, math.nan)
    if bound is None or not drift > bound:
        return None
    return f"{_disagreement(drift)} over guard.mismatch_stop={bound:g}; {causes(config, metrics)}"


def causes(config: Config, metrics: dict[str, float]) -> str:
    """What makes sampler and trainer disagree under this config, the likeliest first."""
    rollout, found = config.rollout, []
    if rollout.ahead:
        found.append("rollout.ahead: it samples by the parameters before the last update")
    if metrics.get("rollout/stale_frac", 0.0) > 0:
        stale = metrics["rollout/stale_frac"]
        found.append(f"rollout.partial: {stale:.0%} of the tokens are of earlier parameters")
    updates = config.rl.updates_per_rollout * config.rl.epochs_per_rollout
    if updates > 1 and config.objective.old_logprobs == "sampler":
        found.append(
            f"the policy moves in the {updates} updates that the figure is over "
            "(objective.old_logprobs=recompute measures before them)"
        )
    if rollout.engine == "http":
        found += [
            "the server samples by old or other weights (does it see rollout.server.weights_dir?)",
            f"it computes in another type than model.compute_dtype={config.model.compute_dtype}",
            f"it has a temperature other than {rollout.temperature:g}, or filters tokens",
            "it has another tokenizer or chat template",
        ]
    elif config.model.compute_dtype != "float32":
        found.append("rounding (model.compute_dtype=float32 in `deltal debug replay` shows it)")
    if not found:
        found.append("sampler and trainer compute differently, such as by model.attention")
    return "likely: " + ", or ".join(found[:3])


def _advance(before: dict[str, Any], metrics: dict[str, float], responses: int) -> dict[str, Any]:
    """Each mean moved on by a step, and the extremes of those that are compared with them."""
    after, means = dict(before), dict(before.get("means", {}))
    for name, value in {
        "entropy": metrics.get("policy/entropy", math.nan),
        "truncated": metrics.get("length/truncated_frac", math.nan),
        "missing": metrics.get("reward/missing", math.nan) / responses,
    }.items():
        if math.isfinite(value):
            count, mean = means.get(name, (0, 0.0))
            weight = max(1 / (count + 1), 1 / HORIZON)
            means[name] = [count + 1, mean + weight * (value - mean)]
    entropy, truncated = (_mature(means, name) for name in ("entropy", "truncated"))
    if entropy is not None:
        after["highest_entropy"] = max(before.get("highest_entropy", entropy), entropy)
    if truncated is not None:
        after["lowest_truncated"] = min(before.get("lowest_truncated", truncated), truncated)
    constant = metrics.get("reward/frac_zero_std", 0.0) >= 1.0
    return after | {"means": means, "constant": before.get("constant", 0) + 1 if constant else 0}


def _figures(
    config: Config, metrics: dict[str, float], after: dict[str, Any]
) -> dict[str, tuple[float, str]]:
    """Of each alarm its figure over its bound, where both are known, and its line."""
    guard, means, found = config.guard, after["means"], {}
    drift = metrics.get(DRIFT, math.nan)
    if guard.mismatch_warn and math.isfinite(drift):
        line = f"{_disagreement(drift)} over guard.mismatch_warn={guard.mismatch_warn:g}"
        found["mismatch"] = drift / guard.mismatch_warn, f"{line}; {causes(config, metrics)}"
    found |= _drifts(guard, means, after)
    missing = _mature(means, "missing")
    if missing is not None:
        line = f"{missing:.0%} of the rewards are missing; reward/missing_… says of what"
        found["missing"] = missing / MISSING, line
    line = (
        f"all groups were constant for {after['constant']} steps: nothing is learnt; problems that "
        "are easier or harder, or rollout.dynamic_sampling, would help"
    )
    found["constant"] = (after["constant"] + 0.5) / CONSTANT_STEPS, line
    return found


def _drifts(
    guard: GuardConfig, means: dict[str, Any], after: dict[str, Any]
) -> dict[str, tuple[float, str]]:
    """The alarms of a mean that left where it was."""
    found = {}
    entropy, truncated = (_mature(means, name) for name in ("entropy", "truncated"))
    if entropy is not None:
        highest = after["highest_entropy"]
        line = (
            f"entropy collapses: {entropy:.3g} is below guard.entropy_floor={guard.entropy_floor:g}"
            f" of {highest:.3g}; a lower learning rate, objective.entropy_coefficient or a higher "
            "objective.clip_high would help"
        )
        found["entropy"] = guard.entropy_floor * highest / max(entropy, 1e-12), line
    if truncated is not None and guard.truncation_surge:
        lowest = after["lowest_truncated"]
        line = (
            f"truncation surges: {truncated:.0%} of the responses are cut off, from {lowest:.0%} "
            f"(guard.truncation_surge={guard.truncation_surge:g}); a lower learning rate, a higher "
            "rollout.max_response_length or task.overlong_buffer would help"
        )
        found["truncation"] = (truncated - lowest) / guard.truncation_surge, line
    return found


def _mature(means: dict[str, Any], name: str) -> float | None:
    """A mean that has seen enough steps."""
    count, mean = means.get(name, (0, 0.0))
    return mean if count >= HORIZON else None


def _disagreement(drift: float) -> str:
    return f"sampler and trainer disagree by {drift:.3g} a token (mean |Δ log p|),"
