"""What training measures of its gradients, and the exponent that follows from it.

Each micro-batch is taken in two halves, whose difference tells the variance of the gradient
(`objective/adaptive.py`). Every so many steps the gradient is also compared with that of the same
responses under equal weights. An exponent that adapts is fixed before the step's batch is sampled:
weights that depended on gradients of the batch that they weigh would bias the step.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from deltal_jax.config import Config
from deltal_jax.objective.adaptive import BETAS, Growth, Pairs, agreement, fit_growth, scales
from deltal_jax.training.objective import first_exponent
from deltal_jax.training.step import Update, UpdateReport
from deltal_jax.types import Bucket, TrainState

#: What `LiveMeters` keeps, among what is kept with a checkpoint.
KEPT = "meters"
#: Steps that estimates are from.
WINDOW = 10
#: Of `mse`: classes of like length, and how many exponents of the range are tried.
CLASSES, EXPONENTS = 6, 151


@dataclasses.dataclass(frozen=True)
class Seen:
    """What one step tells `mse` of its classes of responses, plain JSON: mean lengths, ⟨G_j, G_k⟩
    and the part of G_j along R."""

    lengths: list[float]
    inner: list[list[float]]
    toward: list[float]


@dataclasses.dataclass(frozen=True)
class Step:
    """What one step tells of its variance."""

    pairs: Pairs
    #: Σ over its updates of tr Var ĝ, measured and as steps before predicted it, and of ‖ĝ‖².
    noise: float
    predicted: float | None
    square: float

    def saved(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "count": self.pairs.count,
            "log_scales": self.pairs.log_scales.tolist(),
            "ratios": self.pairs.ratios.tolist(),
            "noise": self.noise,
            "predicted": self.predicted,
            "square": self.square,
        }

    @classmethod
    def load(cls, kept: dict[str, Any]) -> "Step":
        """From what `saved` gave; older checkpoints have the pairs alone."""
        sums = (np.asarray(kept[name]) for name in ("log_scales", "ratios"))
        rest = kept.get("noise", 0.0), kept.get("predicted"), kept.get("square", 0.0)
        return cls(Pairs(kept["count"], *sums), *rest)


class LiveMeters:
    """Of one run, from step to step. `saved` is what `saved` gave: a run that goes on from it does
    what one that never stopped does."""

    def __init__(self, config: Config, saved: dict[str, Any] | None = None):
        self.config = config
        kept = saved or {"steps": 0, "alpha": first_exponent(config), "window": [], "seen": []}
        #: The exponent of the coming step.
        self.alpha: float = kept["alpha"]
        self._steps: int = kept["steps"]
        self._window = [Step.load(x) for x in kept["window"]]
        self._seen = [Seen(**x) for x in kept["seen"]]

    def saved(self) -> dict[str, Any]:
        """All that the next steps depend on, as plain JSON."""
        window = [step.saved() for step in self._window]
        seen = [dataclasses.asdict(x) for x in self._seen]
        return {"steps": self._steps, "alpha": self.alpha, "window": window, "seen": seen}

    @property
    def compares(self) -> bool:
        """Whether the coming step is compared with the unweighted gradient."""
        every = self.config.meters.every
        return every > 0 and (self._steps + 1) % every == 0

    def observe(
        self, minibatches: Sequence[Sequence[Bucket]], reports: Sequence[UpdateReport]
    ) -> dict[str, float]:
        """The metrics of a step, from the mini-batches of its first epoch and the reports of its
        updates; then the exponent of the next step. Updates that were left out tell nothing."""
        metrics = {}
        if self.config.objective.aggregation == "delta_l":
            metrics["aggregation/alpha"] = self.alpha
        made = [pair for pair in zip(minibatches, reports, strict=False) if not pair[1].skipped]
        if self.config.halves:
            metrics |= self._variance(made)
        for _, report in made:
            if report.likeness is not None:
                metrics["bias/cosine"], metrics["bias/norm_ratio"] = report.likeness
        self._steps += 1
        adaptive = self.config.objective.adaptive
        since = self._steps - adaptive.start
        if since >= 0 and since % adaptive.every == 0:
            self._follow()
        return metrics

    def look(self, update: Update, state: TrainState, buckets: Sequence[Bucket]) -> None:
        """Before the first update of a step, for `objective.alpha: mse`: the gradients of classes
        of like length, among each other and along those of earlier steps."""
        if self.config.objective.alpha != "mse":
            return
        classes, means = length_classes(buckets)
        if len(means) < CLASSES:
            return
        inner, toward = update.inner_products(state, buckets, classes, CLASSES)
        if np.all(np.isfinite(inner)) and np.any(toward != 0):
            seen = Seen(means, inner.tolist(), toward.tolist())
            self._seen = [*self._seen, seen][-WINDOW:]

    def _variance(self, made: Sequence[tuple[Sequence[Bucket], UpdateReport]]) -> dict[str, float]:
        """Adds the step to the window; what was predicted is from the window before. A single
        step's signal is a small difference of noisy numbers, so the CV is that of the window."""
        before = self._growth()
        spreads = np.asarray([y for _, report in made for y in report.spreads])
        moved = [moves(bucket) for buckets, _ in made for bucket in buckets]
        grid = np.asarray([scales(*move, BETAS) for move in moved]).reshape(-1, len(BETAS))
        predicted = None
        if before is not None:
            at = np.asarray([before.beta])
            predicted = before.scale * sum(float(scales(*move, at)[0]) for move in moved)
        square = sum(report.norms["optim/grad_norm"] ** 2 for _, report in made)
        step = Step(Pairs.of(spreads, grid), float(np.sum(spreads)), predicted, square)
        self._window = [*self._window, step][-WINDOW:]
        after = self._growth()
        foretold = [x for x in self._window if x.predicted is not None]
        return {
            "variance/beta": math.nan if after is None else after.beta,
            "variance/beta_pairs": float(sum(x.pairs.count for x in self._window)),
            "variance/cv": _cv([x.noise for x in self._window], self._window),
            "variance/cv_predicted": _cv([x.predicted or 0.0 for x in foretold], foretold),
        }

    def _growth(self) -> Growth | None:
        return fit_growth([step.pairs for step in self._window])

    def _follow(self) -> None:
        """The exponent of the next step; the old one where nothing better is known."""
        low, high = self.config.objective.adaptive.range
        growth = self._growth()
        if self.config.objective.alpha == "beta" and growth is not None:
            self.alpha = min(max(growth.beta, low), high)
        elif self.config.objective.alpha == "mse" and self._seen:
            lengths = np.exp(np.mean(np.log([x.lengths for x in self._seen]), axis=0))
            inner = np.mean([x.inner for x in self._seen], axis=0)
            toward = np.mean([x.toward for x in self._seen], axis=0)
            alphas = np.linspace(low, high, EXPONENTS)
            self.alpha = float(alphas[np.argmax(agreement(alphas, lengths, inner, toward))])


def _cv(noise: Sequence[float], steps: Sequence[Step]) -> float:
    """√(noise / ‖E ĝ‖²), over the steps; NaN where the mean is under the noise."""
    signal = sum(step.square - step.noise for step in steps)
    return math.sqrt(sum(noise) / signal) if signal > 0 else math.nan


def length_classes(buckets: Sequence[Bucket]) -> tuple[np.ndarray, list[float]]:
    """The class of each response, Int[B], by the rank of its length among those that move anything
    (-1 for the others), and the mean length of each class; equally many in each, so that classes of
    one rank are compared from step to step. Fewer means where there are too few responses."""
    lengths = np.sum([moves(bucket)[1] for bucket in buckets], axis=0)
    counted = np.flatnonzero(lengths)
    order = counted[np.argsort(lengths[counted], kind="stable")]
    classes = np.full(len(lengths), -1)
    classes[order] = np.arange(len(order)) * CLASSES // max(len(order), 1)
    present = [number for number in range(CLASSES) if np.any(classes == number)]
    return classes, [float(np.mean(lengths[classes == number])) for number in present]


def moves(bucket: Bucket) -> tuple[np.ndarray, np.ndarray]:
    """w_i A_i and L_i, Float[B] and Int[B], of the responses of a bucket that move anything; L_i
    is 0 for the others."""
    ids = np.asarray(bucket.segment_ids)[np.asarray(bucket.loss_mask)]
    weighted = np.asarray(bucket.weights, np.float64) * np.asarray(bucket.advantages, np.float64)
    lengths = np.bincount(ids, minlength=len(weighted))[: len(weighted)]
    return weighted, np.where(weighted != 0, lengths, 0)
