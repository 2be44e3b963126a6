"""Several runs on one page: curves over one another, what differs, figures side by side.

Runs that are seeds of one config (equal but for `seed` and `run.*`) are one curve: the mean, and
its 95% interval over these runs (Student's t), at the steps that all of them have.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit

from deltal_jax.report import plots
from deltal_jax.report.catalog import LEARNING, SPEED, WEIGHTING, Plot, evaluations
from deltal_jax.report.markup import details, note, table, text
from deltal_jax.report.plots import Series
from deltal_jax.report.reading import Row, RunData, Table, average, data_sets
from deltal_jax.report.sections import MAX_POINTS

#: Differing fields that a label may name; with more, it is the folder's name.
NAMED = 3


@dataclasses.dataclass(frozen=True)
class Group:
    """One curve: a run, or the seeds of one config. Tables are means where there are several."""

    label: str
    colour: int
    runs: Sequence[RunData]
    tables: dict[str, Table]

    @property
    def seeds(self) -> str:
        """Of its runs, in words."""
        return ", ".join(str(run.config.get("seed", "?")) for run in self.runs)


def page(runs: Sequence[RunData], body_of: Callable[[RunData], str]) -> tuple[str, str]:
    """Title and body of the page; `body_of` gives what is folded of each run."""
    kinds: dict[str, list[RunData]] = {}
    for run in runs:
        own = {key: value for key, value in run.config.items() if not _free(key)}
        name = json.dumps(own, default=str) if own else str(run.folder)
        seed = run.config.get("seed")
        if any(other.config.get("seed") == seed for other in kinds.get(name, [])):
            name = str(run.folder)  # the same run twice says nothing of how seeds vary
        kinds.setdefault(name, []).append(run)
    differing = differing_fields([members[0].config for members in kinds.values()])
    groups = [
        Group(_label(members[0], differing), at, members, merged_tables(members))
        for at, members in enumerate(kinds.values())
    ]
    title = f"{len(runs)} runs: {', '.join(dict.fromkeys(run.name for run in runs))}"
    legend = "".join(f"<li>{_swatch(group)} {_count(group)}</li>" for group in groups)
    body = [f'<h1>{text(title)}</h1><ul class="legend">{legend}</ul>']
    if any(len(group.runs) > 1 for group in groups):
        said = (
            "Runs that differ in their seed alone are one curve: the mean, with its 95% interval "
        )
        said += "over the seeds (Student's t), at the steps that all of them have."
        body.append(note(said))
    body += ["<h2>Figures</h2>", _figures(groups), _differences(groups, differing)]
    body += ["<h2>Plots</h2>", f'<div class="grid">{"".join(_overlays(groups))}</div>']
    body.append("<h2>Each run</h2>")
    for group in groups:
        for run in group.runs:
            what = f"{text(run.folder.resolve().name)}: {text(group.label)}"
            body.append(details(f"{what}, seed {text(run.config.get('seed'))}", body_of(run)))
    return title, "\n".join(body)


def _free(key: str) -> bool:
    """Whether a field may differ between seeds of one config."""
    return key == "seed" or key.startswith("run.")


def differing_fields(configs: Sequence[Row]) -> list[str]:
    """The fields, but for seeds and folders, that are not the same in all configs; in order."""
    names = dict.fromkeys(key for config in configs for key in config if not _free(key))
    return [k for k in names if len({json.dumps(c.get(k), default=str) for c in configs}) > 1]


def _label(run: RunData, differing: Sequence[str]) -> str:
    if not 0 < len(differing) <= NAMED:
        return run.name if not differing else run.folder.resolve().name
    return ", ".join(f"{key.rsplit('.', 1)[-1]} {_plain(run.config.get(key))}" for key in differing)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _swatch(group: Group) -> str:
    return Series(group.label, group.colour, np.zeros(0), np.zeros(0)).swatch


def _count(group: Group) -> str:
    return f"({len(group.runs)} seeds: {text(group.seeds)})" if len(group.runs) > 1 else ""


def merged_tables(runs: Sequence[RunData]) -> dict[str, Table]:
    """The tables of one run, or means over several, with the interval of each metric beside it
    (`_low`, `_high`), at the steps at which all have a finite value."""
    if len(runs) == 1:
        return runs[0].tables
    return {phase: _mean([run.tables[phase] for run in runs]) for phase in runs[0].tables}


def _mean(tables: Sequence[Table]) -> Table:
    if not all("step" in each for each in tables):
        return {}
    steps = tables[0]["step"]
    for each in tables[1:]:
        steps = np.intersect1d(steps, each["step"])
    found: Table = {"step": steps}
    bounds = {end for key in tables[0] for end in (f"{key}_low", f"{key}_high")}
    wide = float(stdtrit(len(tables) - 1, 0.975)) / np.sqrt(len(tables))
    for key in sorted(set.intersection(*(set(each) for each in tables)) - bounds - {"step"}):
        values = np.stack([each[key][np.isin(each["step"], steps)] for each in tables])
        mean, half = values.mean(axis=0), wide * values.std(axis=0, ddof=1)
        if np.isfinite(mean).any():
            found |= {key: mean, f"{key}_low": mean - half, f"{key}_high": mean + half}
    return found


def _overlays(groups: Sequence[Group]) -> list[str]:
    """A card of every plot that any group has data for: its first metric, of evaluations each."""
    tables = [{k: average(t, MAX_POINTS) for k, t in group.tables.items()} for group in groups]
    evals: Table = {}
    for each in tables:
        evals |= each["eval"]
    wanted = [
        (plot, label, key)
        for plot in (*evaluations(evals), *LEARNING, *WEIGHTING, *SPEED)
        for at, (label, key) in enumerate(plot.metrics.items())
        if not at or plot.phase == "eval"
    ]
    return [
        _overlay(plot, label, key, groups, [each[plot.phase] for each in tables])
        for plot, label, key in wanted
    ]


def _overlay(
    plot: Plot, label: str, key: str, groups: Sequence[Group], tables: Sequence[Table]
) -> str:
    series = []
    for group, found in zip(groups, tables, strict=True):
        if key in found:
            band = found.get(f"{key}_low"), found.get(f"{key}_high")
            series.append(Series(group.label, group.colour, found["step"], found[key], *band))
    alone = len(plot.metrics) == 1 or label == plot.title.lower()
    title = plot.title if alone else f"{plot.title}: {label}"
    # A legend of one line is left out.
    of = f"{series[0].label} alone. " if len(series) == 1 < len(groups) else ""
    return plots.curves(title, of + plot.caption, series, plot.scale, plot.unit, plot.over)


def _figures(groups: Sequence[Group]) -> str:
    """Main numbers, a row a group."""
    tasks = sorted({task for group in groups for task in data_sets(group.tables["eval"])})
    head = [
        "",
        *(f"{text(t)}, {when}" for t in tasks for when in ("before RL", "last")),
        "RL steps",
    ]
    head += ["median length", "wall time"]
    rows = []
    for group in groups:
        evals, rl = group.tables["eval"], group.tables["rl"]
        row = [_swatch(group)]
        row += [_accuracy(evals, f"eval/{task}/avg_at_k", end) for task in tasks for end in (0, -1)]
        row.append(f"{rl['step'][-1]:.0f}" if "step" in rl else "0")
        row.append(_last(rl, "length/p50", "{:.0f}"))
        minutes = [sum(run.times.values()) / 60 for run in group.runs]
        rows.append([*row, f"{np.mean(minutes):.1f} min"])
    over = "Accuracy with its 95% interval: of one run over problems, of several over seeds."
    return table(head, rows) + note(over)


def _accuracy(evals: Table, key: str, end: int) -> str:
    if not len(known := np.flatnonzero(np.isfinite(evals.get(key, np.zeros(0))))):
        return "–"
    at = known[end]
    low, high = (
        np.clip(evals[name][at], 0, 1) if (name := f"{key}_{bound}") in evals else np.nan
        for bound in ("low", "high")
    )
    ends = f"<small>{low:.1%} to {high:.1%}</small>" if low <= high else ""
    when = f"<small>step {evals['step'][at]:.0f}</small>" if end else ""
    return f"{evals[key][at]:.1%}{ends}{when}"


def _last(found: Table, key: str, form: str) -> str:
    known = found.get(key, np.zeros(0))
    known = known[np.isfinite(known)]
    return form.format(known[-1]) if len(known) else "–"


def _differences(groups: Sequence[Group], differing: Sequence[str]) -> str:
    """The fields that differ, a column a group."""
    rows = [
        [text(key), *(text(_plain(group.runs[0].config.get(key))) for group in groups)]
        for key in differing
    ]
    rows.append(["seed", *(text(group.seeds) for group in groups)])
    head = ["field", *(_swatch(group) for group in groups)]
    return f"<h2>Differing fields</h2>{table(head, rows)}"
