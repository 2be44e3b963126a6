"""What a run folder holds, for its page: each part may be missing, damaged or still be written."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from deltal_jax.metrics import FILE_NAME, load_metrics

Row = dict[str, Any]
Table = dict[str, np.ndarray]  # one row a step; a metric without any finite value has no column
PHASES = ("sft", "rl", "eval")
NUMBER = re.compile(r"\d+")
TIMES = ("rollout", "reward", "old_logprob", "update", "checkpoint", "evaluate")


@dataclasses.dataclass(frozen=True)
class RunData:
    """A run folder as it is read. `config` is flat, by dotted names."""

    name: str
    folder: Path
    lines: list[Row]
    tables: dict[str, Table]
    config: Row
    config_text: str
    summary: Row
    #: `rollouts/step-N.json`, in order of steps.
    rollouts: list[Row]
    #: The newest of `variance/step-N.json` and `step-N-2.json`; empty where there is none.
    variance: Row
    #: The step of the newest evaluation that has samples, and these.
    samples: tuple[str, list[Row]]

    @property
    def times(self) -> dict[str, float]:
        """Seconds of the parts that took any, over all steps."""
        spent = {n: math.fsum(numbers(self.lines, f"time/{n}", 0.0)) for n in TIMES}
        return {name: seconds for name, seconds in spent.items() if seconds > 0}


def read_run(folder: Path) -> RunData:
    """Read a run folder. Raises FileNotFoundError when the folder itself is missing."""
    if not folder.is_dir():
        raise FileNotFoundError(folder)
    metrics, path = folder / FILE_NAME, folder / "config.yaml"
    lines = load_metrics(metrics) if metrics.exists() else []
    config = dict(flatten(_load(path, yaml.safe_load)))
    variance = [_load(path, json.loads) for path in _by_step(folder / "variance", "json")]
    return RunData(
        name=str(config.get("run.name") or folder.resolve().name),
        folder=folder,
        lines=lines,
        tables={phase: phase_table(lines, phase) for phase in PHASES},
        config=config,
        config_text=path.read_text("utf-8", "replace") if path.exists() else "",
        summary=_load(folder / "summary.json", json.loads),
        rollouts=list(
            filter(_whole, (_load(p, json.loads) for p in _by_step(folder / "rollouts")))
        ),
        variance=variance[-1] if variance else {},
        samples=_newest_samples(folder),
    )


def _by_step(folder: Path, ending: str = "json") -> list[Path]:
    """The files of a folder that are named by step, in that order, then by their number."""
    found = folder.glob(f"step-*.{ending}")
    return sorted(found, key=lambda path: [int(number) for number in NUMBER.findall(path.stem)])


def _load(path: Path, parse: Callable[[str], Any]) -> Row:
    """The mapping in a file, empty where it is missing or cannot be read."""
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}


def _whole(record: Row) -> bool:
    """Whether a rollout's lists are there, of one length that is not 0."""
    lists = [record.get(name) for name in ("lengths", "rewards", "advantages", "weights")]
    sizes = {len(found) if isinstance(found, list) else 0 for found in lists}
    return len(sizes) == 1 and sizes != {0}


def _newest_samples(folder: Path) -> tuple[str, list[Row]]:
    for path in reversed(_by_step(folder / "samples", "jsonl")):
        if rows := load_metrics(path):
            return path.stem[5:].lstrip("0") or "0", rows
    return "", []


def flatten(mapping: Row, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a nested mapping under dotted keys."""
    for key, value in mapping.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def numbers(rows: Iterable[Row], key: str, other: float = math.nan) -> list[float]:
    """A metric in all rows, `other` where it is absent, no number or not finite."""
    found = [row.get(key) for row in rows]
    return [float(v) if isinstance(v, int | float) and math.isfinite(v) else other for v in found]


def phase_table(lines: Iterable[Row], phase: str) -> Table:
    """The metrics of a phase in order of steps.

    Lines of one step are merged, and the later one wins: a resumed run repeats steps.
    """
    merged: dict[float, Row] = {}
    for line in lines:
        if line.get("phase") == phase and math.isfinite(step := numbers([line], "step")[0]):
            merged.setdefault(step, {}).update(line)
    rows = [merged[step] for step in sorted(merged)]
    columns = {key: np.array(numbers(rows, key)) for key in set().union(*rows)}
    return {key: column for key, column in columns.items() if np.isfinite(column).any()}


def data_sets(table: Table, figure: str = "avg_at_k") -> dict[str, str]:
    """The metric of a figure of every evaluated data set, by the set's name."""
    found = (re.fullmatch(f"eval/(.+)/{figure}", key) for key in table)
    return dict(sorted((match[1], match[0]) for match in found if match))


def average(table: Table, limit: int) -> Table:
    """A table of at most `limit` rows: means over neighbours, of the finite values."""
    size = len(table.get("step", ()))
    if size <= limit:
        return table
    starts = np.linspace(0, size, limit, endpoint=False).astype(int)
    means = {}
    for key, column in table.items():
        count = np.add.reduceat(np.isfinite(column).astype(float), starts)
        total = np.add.reduceat(np.nan_to_num(column), starts)
        means[key] = np.divide(total, count, where=count > 0, out=np.full(limit, math.nan))
    return means
