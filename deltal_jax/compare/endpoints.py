"""What a comparison measures of its cells: endpoints by problem, curves, outcomes.

A cell is what one training run left, a mapping (`findings.load_cells`). S cells of different seeds,
P problems, the same in all, E evaluations of a cell.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from deltal_jax.analysis.accuracy import avg_at_n, pass_at_k
from deltal_jax.analysis.paired import area, crossed_intervals, interpolation
from deltal_jax.errors import UserError

Cell = dict[str, Any]
#: From where to where the evaluations of all cells reach, by abscissa.
Spans = dict[str, tuple[float, float]]

#: The abscissas that an evaluation has.
AXES = ("tokens", "updates", "seconds")
#: Endpoint → abscissa of its area; None: it is of the last evaluation.
ENDPOINTS = {f"area_by_{axis}": axis for axis in AXES} | {
    "final_avg_at_k": None,
    "final_pass_at_k": None,
}
#: Fixed beforehand: the one that verdicts are of.
PRIMARY = "area_by_tokens"
#: Outcome → metric of training, a number a step.
OUTCOMES = {
    "length_right": "length/correct_mean",
    "length_wrong": "length/wrong_mean",
    "truncated_frac": "length/truncated_frac",
    "length_ratio": None,  # p95 / p5
    "length": "length/mean",
    "reward": "reward/mean",
}
#: Points of a drawn curve.
POINTS = 25


def common_spans(cells: Iterable[Cell]) -> Spans:
    """The largest first and the smallest last value of each abscissa over the cells.

    Raises UserError where the cells have no stretch in common.
    """
    cells, spans = list(cells), {}
    for axis in AXES:
        start = max(cell["evaluations"][0][axis] for cell in cells)
        stop = min(cell["evaluations"][-1][axis] for cell in cells)
        if not start < stop:
            raise UserError(
                f"cells: evaluations: no stretch of {axis} that all have in common;"
                " compare runs that are evaluated before the first step and after the last"
            )
        spans[axis] = (float(start), float(stop))
    return spans


def endpoints(cells: Sequence[Cell], spans: Spans) -> dict[str, Float[np.ndarray, "S P"]]:
    """The endpoints of each cell by problem: the mean over problems is the cell's figure."""
    found = {name: np.stack([_area(cell, x, spans) for cell in cells]) for name, x in _AREAS}
    last = [_correct(cell)[-1] for cell in cells]
    found["final_avg_at_k"] = np.stack([avg_at_n(one) for one in last])
    found["final_pass_at_k"] = np.stack([pass_at_k(one, one.shape[1]) for one in last])
    return found


def figures(cells: Sequence[Cell], spans: Spans) -> dict[str, dict[str, float]]:
    """Mean and interval of each endpoint over the cells of a method."""
    values = endpoints(cells, spans)
    intervals = crossed_intervals(np.stack(list(values.values()))).clip(0, 1)
    return {
        name: {"mean": float(value.mean()), "low": float(low), "high": float(high)}
        for (name, value), (low, high) in zip(values.items(), intervals, strict=True)
    }


def accuracy_curve(cells: Sequence[Cell], spans: Spans) -> dict[str, list[float]]:
    """Avg@k against generated tokens: mean over the cells, and its interval, at so many points."""
    at = np.linspace(*spans["tokens"], POINTS)
    values = np.stack([_heights(cell, at) for cell in cells], axis=1)
    low, high = crossed_intervals(values).clip(0, 1).T
    mean = values.mean(axis=(1, 2))
    curves = {"tokens": at, "mean": mean, "low": low, "high": high}
    return {name: curve.tolist() for name, curve in curves.items()}


def outcomes(cells: Sequence[Cell]) -> dict[str, dict[str, float]]:
    """Means over cells of the first and of the last tenth of the steps; tokens a run in all."""
    found = {}
    for name in OUTCOMES:
        series = _series(cells, name)
        tenth = -(-series.shape[1] // 10)
        found[name] = {"first": _mean(series[:, :tenth]), "last": _mean(series[:, -tenth:])}
    for axis in AXES:
        found[axis] = {"first": 0.0, "last": _mean([c["evaluations"][-1][axis] for c in cells])}
    return found


def outcome_curves(cells: Sequence[Cell]) -> dict[str, list[float]]:
    """The outcomes over the steps, means over cells, in at most 100 stretches of steps."""
    steps = min(_steps(cell) for cell in cells)
    parts = np.array_split(np.arange(steps), min(steps, 100))
    curves = {"step": [float(part.mean() + 1) for part in parts]}
    for name in OUTCOMES:
        series = _series(cells, name)
        curves[name] = [_mean(series[:, part]) for part in parts]
    return curves


_AREAS = [(name, axis) for name, axis in ENDPOINTS.items() if axis]


def _correct(cell: Cell) -> np.ndarray:
    """[E, P, k]: whether a response is correct, the correct ones of a problem first."""
    counts = np.array([evaluation["correct"] for evaluation in cell["evaluations"]])
    return counts[..., None] > np.arange(cell["k"])


def _axis(cell: Cell, axis: str) -> Float[np.ndarray, " E"]:
    return np.array([evaluation[axis] for evaluation in cell["evaluations"]], np.float64)


def _area(cell: Cell, axis: str, spans: Spans) -> Float[np.ndarray, " P"]:
    start, stop = spans[axis]
    return area(_axis(cell, axis), _correct(cell).mean(axis=-1), stop, start)


def _heights(cell: Cell, at: Float[np.ndarray, " N"]) -> Float[np.ndarray, "N P"]:
    return interpolation(_axis(cell, "tokens"), at) @ _correct(cell).mean(axis=-1)


def _series(cells: Sequence[Cell], outcome: str) -> Float[np.ndarray, "S steps"]:
    """A metric of training of all cells, as far as all go; NaN where a step has none."""
    key = OUTCOMES[outcome]
    if key is None:
        low, high = (_series_of(cells, f"length/{p}") for p in ("p5", "p95"))
        return high / np.where(low > 0, low, np.nan)
    return _series_of(cells, key)


def _series_of(cells: Sequence[Cell], key: str) -> Float[np.ndarray, "S steps"]:
    steps = min(_steps(cell) for cell in cells)
    unknown = [None] * steps
    return np.array([cell["train"].get(key, unknown)[:steps] for cell in cells], np.float64)


def _steps(cell: Cell) -> int:
    return len(cell["train"]["length/mean"])


def _mean(values: Any) -> float:
    known = np.asarray(values, np.float64)
    known = known[np.isfinite(known)]
    return float(known.mean()) if known.size else float("nan")
