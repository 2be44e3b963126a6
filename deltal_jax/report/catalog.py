"""Which metrics are drawn, under what title, and what to look for in each plot."""

from __future__ import annotations

import dataclasses

import numpy as np

from deltal_jax.report import plots
from deltal_jax.report.plots import Series
from deltal_jax.report.reading import Table, data_sets


@dataclasses.dataclass(frozen=True)
class Plot:
    """Lines over the steps of a phase: metrics by label. A metric that has bounds in the table gets
    a band. For `scale` see `plots.curves`."""

    title: str
    caption: str
    unit: str
    metrics: dict[str, str]
    scale: str = "plain"
    phase: str = "rl"

    @property
    def over(self) -> str:
        """What its steps are of."""
        return "warm-up step" if self.phase == "sft" else "RL step"


BANDS = {"length/p50": ("length/p5", "length/p95")}
LENGTH = {"median": "length/p50", "wrong": "length/wrong_mean", "right": "length/correct_mean"}
WEIGHTS = {"largest": "aggregation/weight_max", "smallest": "aggregation/weight_min"}
VARIATION = {"measured": "variance/cv", "predicted": "variance/cv_predicted"}
STEPS = {"clipped updates": "optim/clipped_frac", "under Adam's epsilon": "optim/below_eps_frac"}
IDLE = {"the update waits": "overlap/update_idle", "the sampler waits": "overlap/rollout_idle"}

LEARNING = (
    Plot(
        "Reward",
        "Means on training prompts: do reward and accuracy rise together?",
        "mean of a step",
        {"reward": "reward/mean", "accuracy": "accuracy/mean"},
    ),
    Plot(
        "Response length",
        "Band 5% to 95%. Do wrong answers grow away from right ones?",
        "tokens",
        LENGTH,
    ),
    Plot(
        "Truncated responses",
        "Should stay near zero: a response cut short cannot give its answer.",
        "share of responses",
        {"truncated": "length/truncated_frac"},
        "share",
    ),
    Plot(
        "Groups without a signal",
        "All their rewards are equal: near 100%, nothing is left to learn.",
        "share of groups",
        {"groups": "reward/frac_zero_std"},
        "share",
    ),
    Plot(
        "Entropy",
        "A fall to zero ends exploration; a steady rise is divergence.",
        "nats a token",
        {"entropy": "policy/entropy"},
    ),
    Plot(
        "Warm-up loss",
        "Supervised training before RL: has it flattened out?",
        "nats a token",
        {"loss": "sft/loss"},
        phase="sft",
    ),
)
WEIGHTING = (
    Plot(
        "Weights",
        "Extremes over the responses of a batch: the wider, the more lengths matter.",
        "weight of a response",
        WEIGHTS,
        "log",
    ),
    Plot(
        "Effective sample size",
        "A low value means that few responses carry most of the weight.",
        "responses",
        {"size": "aggregation/ess"},
    ),
    Plot(
        "Variance exponent",
        "β of Var ∝ length^β as live meters find it, beside the exponent in use. Unbiased weights "
        "vary least where both agree.",
        "exponent",
        {"measured β": "variance/beta", "α in use": "aggregation/alpha"},
    ),
    Plot(
        "Variation of the gradient",
        "Its standard deviation over its mean. Far apart: the prediction's assumption does not "
        "hold here.",
        "coefficient of variation",
        VARIATION,
    ),
    Plot(
        "Direction of the gradient",
        "Cosine of the weighted to the unweighted gradient of the same batch, beside what noise "
        "alone would have: well under that is bias.",
        "cosine",
        {"cosine": "bias/cosine", "of noise alone": "bias/cosine_noise"},
    ),
    Plot(
        "Gradient norm",
        "Before clipping. Spikes or a slow climb are early signs of an unstable run.",
        "norm",
        {"norm": "optim/grad_norm"},
        "log",
    ),
    Plot(
        "What the optimizer changes",
        "Clipping and Adam's epsilon both undo a constant factor in the weights: where they are "
        "rare, it cancels.",
        "share of updates, of elements",
        STEPS,
        "share",
    ),
)
SPEED = (
    Plot(
        "Rollout utilization",
        "Decoding slots at work: a low share means waiting for long responses.",
        "share of slots",
        {"slots": "rollout/utilization"},
        "share",
    ),
    Plot(
        "Idle time",
        "Sampling ahead: who waits for whom. Both near zero is full overlap.",
        "share of a step",
        IDLE,
        "share",
    ),
    Plot(
        "Staleness",
        "How many updates older than the trained parameters those are that sampled the batch.",
        "updates",
        {"staleness": "rollout/staleness"},
    ),
)


def evaluations(table: Table) -> tuple[Plot, ...]:
    """The plots of held-out accuracy, of the data sets in the table."""
    return (
        Plot(
            "Held-out accuracy",
            "Does it rise and stay up? Bands are the 95% intervals.",
            "share of responses that are right",
            data_sets(table),
            "share",
            "eval",
        ),
        Plot(
            "Held-out problems solved",
            "At least one of k responses is right (pass@k). Bands are the 95% intervals.",
            "share of problems",
            data_sets(table, "pass_at_k") if np.nanmax(_samples_each(table), initial=0) > 1 else {},
            "share",
            "eval",
        ),
    )


def _samples_each(table: Table) -> np.ndarray:
    """How many responses each problem had."""
    found = [column for name, column in table.items() if name.endswith("/k")]
    return np.concatenate(found) if found else np.zeros(0)


def curve(plot: Plot, table: Table) -> str:
    """The card of a plot, empty where the table has none of its metrics."""
    series = []
    for at, (label, key) in enumerate(plot.metrics.items()):
        if key in table:
            low, high = BANDS.get(key, (f"{key}_low", f"{key}_high"))
            ends = table.get(low), table.get(high)
            series.append(Series(label, at, table["step"], table[key], *ends))
    return plots.curves(plot.title, plot.caption, series, plot.scale, plot.unit, plot.over)
