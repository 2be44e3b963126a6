"""Graded groups: which of them teach anything, and metrics of them."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from deltal_jax.tasks.grading import MISSING
from deltal_jax.types import Rollout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Groups:
    """Whole graded groups in prompt order: a row a response, G rows a group; in host memory."""

    #: Of each response's prompt in the training stream.
    positions: Int[np.ndarray, " B"]
    rollout: Rollout
    #: NaN where missing.
    rewards: Float[np.ndarray, " B"]
    #: The task's own verdict.
    correct: Bool[np.ndarray, " B"]
    #: Every named reward apart, NaN where missing.
    parts: dict[str, Float[np.ndarray, " B"]]
    #: `Grades.missing`.
    missing: Int[np.ndarray, " B"]

    @property
    def metrics(self) -> dict[str, float]:
        """Those of rewards and of lengths."""
        rollout = self.rollout
        return reward_metrics(self.rewards, self.correct, self.parts, rollout.group_ids) | (
            length_metrics(rollout.response_lengths, rollout.truncated, self.correct)
            | missing_metrics(self.missing)
        )


def join_groups(parts: Sequence[Groups], samples: int) -> Groups:
    """All groups, of `samples` responses each, one part after the other."""
    if len(parts) == 1:
        return parts[0]
    return _numbered(jax.tree.map(lambda *xs: np.concatenate(xs), *parts), samples)


def take_groups(groups: Groups, numbers: Int[np.ndarray, " n"], samples: int) -> Groups:
    """These groups, in this order."""
    rows = rows_of(numbers, samples)
    return _numbered(jax.tree.map(lambda x: x[rows], groups), samples)


def rows_of(numbers: Int[np.ndarray, " n"], samples: int) -> Int[np.ndarray, " B"]:
    """The rows of these groups, of `samples` responses each."""
    return (numbers[:, None] * samples + np.arange(samples)).reshape(-1)


def _numbered(groups: Groups, samples: int) -> Groups:
    ids = (np.arange(len(groups.positions)) // samples).astype(np.int32)
    return dataclasses.replace(groups, rollout=dataclasses.replace(groups.rollout, group_ids=ids))


def informative(values: np.ndarray, known: np.ndarray, samples: int) -> Bool[np.ndarray, " P"]:
    """Whether a group's values differ, those left out that are not known (their reward is missing).

    A group whose rewards are all equal has no advantage. Source: the dynamic sampling of DAPO, Yu
    et al., arXiv 2503.14476, section 3.2.
    """
    values = np.asarray(values, np.float64).reshape(-1, samples)
    known = known.reshape(-1, samples)
    low, high = np.where(known, values, np.inf), np.where(known, values, -np.inf)
    return low.min(axis=1) < high.max(axis=1)


def choose(good: Bool[np.ndarray, " P"], wanted: int) -> Int[np.ndarray, " n"]:
    """The first `wanted` good groups; where there are fewer, the first others beside them; in
    prompt order."""
    first = np.flatnonzero(good)[:wanted]
    others = np.flatnonzero(~good)[: wanted - len(first)]
    return np.sort(np.concatenate([first, others]))


def reward_metrics(
    rewards: np.ndarray, correct: np.ndarray, parts: dict[str, np.ndarray], group_ids: np.ndarray
) -> dict[str, float]:
    """Means over the known rewards; groups of one reward teach nothing: all ≤ 0, or all above."""
    known = ~np.isnan(rewards)
    metrics = {
        "reward/mean": _mean(rewards[known]),
        "reward/std": float(np.std(rewards[known])) if known.any() else float("nan"),
        "reward/missing": float(np.sum(~known)),
        "accuracy/mean": _mean(correct),
    }
    if len(parts) > 1:
        metrics |= {f"reward/{k}/mean": _mean(v[~np.isnan(v)]) for k, v in parts.items()}
    groups = [rewards[(group_ids == g) & known] for g in np.unique(group_ids)]
    constant = [g[0] for g in groups if g.size and np.all(g == g[0])]
    zero = sum(reward <= 0 for reward in constant)
    metrics |= {
        "reward/frac_zero_std": len(constant) / len(groups),
        "reward/frac_all_zero": zero / len(groups),
        "reward/frac_all_one": (len(constant) - zero) / len(groups),
    }
    return metrics


def missing_metrics(missing: np.ndarray) -> dict[str, float]:
    """How often the task had no verdict, by cause; only of causes that occurred."""
    counts = np.bincount(missing, minlength=len(MISSING))
    causes = zip(MISSING, counts, strict=True)
    return {f"reward/missing_{cause}": float(n) for cause, n in causes if cause and n}


def length_metrics(
    lengths: np.ndarray, truncated: np.ndarray, correct: np.ndarray
) -> dict[str, float]:
    """Trained tokens a response."""
    low, middle, high = np.percentile(lengths, [5, 50, 95])
    return {
        "length/mean": float(np.mean(lengths)),
        "length/min": float(np.min(lengths)),
        "length/max": float(np.max(lengths)),
        "length/p5": float(low),
        "length/p50": float(middle),
        "length/p95": float(high),
        "length/truncated_frac": float(np.mean(truncated)),
        "length/correct_mean": _mean(lengths[correct]),
        "length/wrong_mean": _mean(lengths[~correct]),
    }


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if values.size else float("nan")
