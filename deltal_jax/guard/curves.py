"""What the metrics of a run say of it: rules, each with the guide's own remedy."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from deltal_jax.analysis.guide import find_entry
from deltal_jax.config import Config
from deltal_jax.guard.health import HORIZON, MISSING
from deltal_jax.guard.ladder import Figure, at_least, at_most

#: Evaluation accuracies that are told apart though their intervals have no width.
ACCURACY_STEP = 0.02


class Curves:
    """The lines of `metrics.jsonl` by phase."""

    def __init__(self, lines: Sequence[dict[str, Any]]):
        self._lines = {
            phase: [line for line in lines if line.get("phase") == phase]
            for phase in ("sft", "rl", "eval")
        }

    def series(self, name: str, phase: str = "rl") -> list[float]:
        """The known values of a metric, in order."""
        values = [line.get(name) for line in self._lines[phase]]
        return [float(value) for value in values if value is not None]

    def recent(self, name: str) -> float | None:
        """The mean of the last steps."""
        values = self.series(name)[-HORIZON:]
        return statistics.fmean(values) if values else None

    def means(self, name: str) -> list[float]:
        """The means over `HORIZON` steps; none of a shorter run."""
        values = self.series(name)
        starts = range(len(values) - HORIZON + 1)
        return [statistics.fmean(values[at : at + HORIZON]) for at in starts]

    def unknown(self, name: str) -> float | None:
        """The share of the last steps in which a metric was not finite; None where it is none of
        this run."""
        lines = self._lines["rl"]
        if not any(name in line for line in lines):
            return None
        return statistics.fmean(line.get(name) is None for line in lines[-HORIZON:])


@dataclasses.dataclass(frozen=True)
class Rule:
    """A figure of the curves and its bounds; `least`: they are from below."""

    metric: str
    says: str
    figure: Callable[[Curves], float | None]
    ok: float
    failed: float = math.inf
    least: bool = False


def judge_curves(config: Config, lines: Sequence[dict[str, Any]]) -> tuple[list[Figure], list[str]]:
    """The figures of all rules that have something to judge, and the metrics of the others."""
    curves, figures, idle = Curves(lines), [], []
    for rule in rules(config):
        value = rule.figure(curves)
        if value is None:
            idle.append(rule.metric)
            continue
        entry = find_entry(rule.metric)
        judge = at_least if rule.least else at_most
        failed = -rule.failed if rule.least and math.isinf(rule.failed) else rule.failed
        remedy = "" if entry is None else entry.remedy
        name = f"{rule.metric}, {rule.says}"
        figures.append(judge(name, value, rule.ok, failed, remedy=remedy))
    return figures, idle


def rules(config: Config) -> list[Rule]:
    """All of them; bounds that the run itself warns by are those of its `guard`."""
    return [
        *_alarms(config),
        *_learning(config),
        *_optimizing(config),
        *_recent(
            ("throughput/padding_frac", 0.5),
            ("overlap/update_idle", 0.8),
            ("overlap/rollout_idle", 0.8),
            ("rollout/stale_frac", 0.5),
        ),
        _low("rollout/informative_frac", 0.2),
        Rule("rollout/utilization", "of the ideal, last steps", _utilization, 0.5, least=True),
    ]


def _alarms(config: Config) -> list[Rule]:
    """Those that `health` raises during the run."""
    guard, responses = config.guard, config.rl.prompts_per_step * config.rl.samples_per_prompt
    stop = math.inf if guard.mismatch_stop is None else guard.mismatch_stop
    surge = guard.truncation_surge or math.inf
    floor = guard.entropy_floor

    def missing(curves: Curves) -> float | None:
        found = curves.recent("reward/missing")
        return None if found is None else found / responses

    warn = guard.mismatch_warn or stop
    rise = "last steps over the lowest"
    return [
        Rule("policy/entropy", "last steps of the highest", _of_highest, floor, floor, least=True),
        Rule("length/truncated_frac", rise, _over_lowest, surge, surge),
        Rule(
            "mismatch/logprob_diff_mean",
            "last steps",
            _mean("mismatch/logprob_diff_mean"),
            warn,
            stop,
        ),
        Rule("reward/missing", "share, last steps", missing, 0.02, MISSING),
    ]


def _learning(config: Config) -> list[Rule]:
    """Whether there is something to learn, and it is learnt."""
    accuracy = f"eval/{config.task.name}/avg_at_k"
    gamed = "fall in widths of its interval, where the reward rises"
    longer = "last steps of the first"
    return [
        Rule("reward/frac_zero_std", "last steps", _mean("reward/frac_zero_std"), 0.8, 0.999),
        *_recent(("reward/frac_all_zero", 0.8), ("length/truncated_frac", 0.2)),
        Rule("length/mean", longer, _growth("length/mean"), 3.0),
        Rule("policy/entropy", longer, _growth("policy/entropy"), 2.0),
        Rule(accuracy, gamed, lambda curves: _gamed(curves, accuracy), 0.5, 1.0),
        Rule("sft/loss", "last of the first", _warm_up, 1.0),
        *_recent(("aggregation/zero_advantage_weight", 0.8)),
        Rule(
            "aggregation/ess", "of the batch, last steps", _share_of_batch(config), 0.25, least=True
        ),
    ]


def _optimizing(config: Config) -> list[Rule]:
    """Steps that are clipped, left out, or ruled by something else than the gradient."""
    clip = None if config.rl.optimizer.normalize else config.rl.optimizer.clip_norm

    def clipped(curves: Curves) -> float | None:
        norms = curves.series("optim/grad_norm")[-HORIZON:]
        if clip is None or len(norms) < HORIZON:
            return None
        return statistics.fmean(norm > clip for norm in norms)

    return [
        Rule("policy/loss", "not finite, last steps", lambda c: c.unknown("policy/loss"), 0.0, 0.5),
        Rule("optim/grad_norm", "over clip_norm, last steps", clipped, 0.9),
        *_recent(
            ("optim/clipped_frac", 0.9),
            ("optim/below_eps_frac", 0.1),
            ("optim/skipped", 0.0),
            ("policy/clip_frac_high", 0.2),
            ("policy/clip_frac_low", 0.2),
            ("policy/approx_kl", 0.1),
        ),
        Rule("bias/cosine", "less that of noise, last steps", _turned, -0.2, least=True),
    ]


def _mean(metric: str) -> Callable[[Curves], float | None]:
    return lambda curves: curves.recent(metric)


def _recent(*bounds: tuple[str, float]) -> list[Rule]:
    """Means of the last steps that are to be at most so much."""
    return [Rule(metric, "last steps", _mean(metric), ok) for metric, ok in bounds]


def _low(metric: str, ok: float) -> Rule:
    return Rule(metric, "last steps", _mean(metric), ok, least=True)


def _turned(curves: Curves) -> float | None:
    """How far the cosine is over what noise alone would have."""
    found, noise = (curves.recent(f"bias/cosine{end}") for end in ("", "_noise"))
    return None if found is None or noise is None else found - noise


def _of_highest(curves: Curves) -> float | None:
    means = curves.means("policy/entropy")
    return means[-1] / max(*means, 1e-12) if means else None


def _over_lowest(curves: Curves) -> float | None:
    means = curves.means("length/truncated_frac")
    return means[-1] - min(means) if means else None


def _growth(metric: str) -> Callable[[Curves], float | None]:
    """Of the first steps, from a run of two horizons on."""

    def growth(curves: Curves) -> float | None:
        means = curves.means(metric)
        return means[-1] / max(means[0], 1e-12) if len(means) > HORIZON else None

    return growth


def _gamed(curves: Curves, accuracy: str) -> float | None:
    """How far the accuracy fell from the first evaluation to the last, 0 where the reward did not
    rise, in half the sum of the widths of both intervals."""
    found, rewards = curves.series(accuracy, "eval"), curves.means("reward/mean")
    if len(found) < 2 or not rewards:
        return None
    if rewards[-1] <= rewards[0]:
        return 0.0
    low, high = (curves.series(f"{accuracy}_{side}", "eval") for side in ("low", "high"))
    widths = [b - a for a, b in zip(low, high, strict=False)]
    width = (widths[0] + widths[-1]) / 2 if widths else 0.0
    return max(found[0] - found[-1], 0.0) / max(width, ACCURACY_STEP)


def _warm_up(curves: Curves) -> float | None:
    losses = curves.series("sft/loss", "sft")
    return losses[-1] / max(losses[0], 1e-12) if len(losses) > 1 else None


def _share_of_batch(config: Config) -> Callable[[Curves], float | None]:
    responses = config.rl.prompts_per_step * config.rl.samples_per_prompt

    def share(curves: Curves) -> float | None:
        found = curves.recent("aggregation/ess")
        return None if found is None else found / responses

    return share


def _utilization(curves: Curves) -> float | None:
    found, ideal = (curves.recent(f"rollout/utilization{end}") for end in ("", "_ideal"))
    return None if found is None or not ideal else found / ideal
