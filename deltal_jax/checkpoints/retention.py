"""Which checkpoints stay."""

import dataclasses
import math
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Saved:
    """What decides about a checkpoint: its step of RL, None in the warm-up, and its metrics."""

    step: int | None
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Keep:
    """The newest `last`; those after every `every` steps of RL (0: none); the `best` ones by a
    metric, where more is better (0: none)."""

    last: int = 2
    every: int = 0
    best: int = 0
    metric: str = ""


def kept(checkpoints: Mapping[int, Saved], keep: Keep) -> set[int]:
    """The numbers of those that stay, which are all that one of the rules wants."""
    newest = sorted(checkpoints)[-keep.last :]
    regular = [
        number
        for number, saved in checkpoints.items()
        if keep.every and saved.step is not None and saved.step % keep.every == 0
    ]
    return {*newest, *regular, *best(checkpoints, keep)}


def best(checkpoints: Mapping[int, Saved], keep: Keep) -> list[int]:
    """The numbers of the best, the best first; of equals the newest."""
    values = {
        number: saved.metrics[keep.metric]
        for number, saved in checkpoints.items()
        if math.isfinite(saved.metrics.get(keep.metric, math.nan))
    }
    return sorted(values, key=lambda number: (values[number], number), reverse=True)[: keep.best]
