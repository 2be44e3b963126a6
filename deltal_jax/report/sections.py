"""The parts of a page that one run fills: figures, plots, samples, setup."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import numpy as np

from deltal_jax.analysis.accuracy import rank_correlation
from deltal_jax.report import distributions, plots
from deltal_jax.report.catalog import LEARNING, SPEED, WEIGHTING, Plot, curve, evaluations
from deltal_jax.report.markup import details, note, table, text, tiles
from deltal_jax.report.reading import Row, RunData, average, data_sets, flatten

#: Longer series are averaged before they are drawn; of samples, those after the first are folded.
MAX_POINTS, MAX_BARS, MAX_SAMPLES, UNFOLDED = 400, 24, 24, 4
CAVEAT = "Intervals by bootstrap over distinct problems: responses to one problem are no "
CAVEAT += "independent trials. Monotonicity is the rank correlation of step and accuracy."


def headline(run: RunData) -> str:
    """The tiles with the run's main numbers."""
    rl, shown = run.tables["rl"], accuracies(run)
    figures: list[tuple[str, str, list[str]]] = []
    for task, points in shown.items():
        ends = points if len(points) < 2 else [points[0], points[-1]]
        notes = [f"{_when(step)}: 95% interval {interval}" for step, _, interval in ends]
        if (order := rank_correlation(*zip(*[p[:2] for p in points], strict=True))) is not None:
            notes.append(f"monotonicity {order:.2f}, over {len(points)} evaluations")
        value = " → ".join(f"{accuracy:.1%}" for _, accuracy, _ in ends)
        figures.append((f"Accuracy, {task}", value, notes))
    planned = [f"of {run.config['rl.steps']} planned"] if "rl.steps" in run.config else []
    figures.append(("RL steps done", f"{rl['step'][-1] if rl else 0:.0f}", planned))
    if run.times:
        total = str(timedelta(seconds=round(sum(run.times.values()))))
        figures.append(("Wall time", total, ["h:mm:ss, all timed parts of all steps"]))
    if "length/p50" in rl:
        lengths = rl["length/p50"][np.isfinite(rl["length/p50"])]
        small = f"tokens, at the last RL step; {lengths[0]:.0f} at the first"
        figures.append(("Median length", f"{lengths[-1]:.0f}", [small]))
    return tiles(figures) + (note(CAVEAT) if shown else "")


def accuracies(run: RunData) -> dict[str, list[tuple[float, float, str]]]:
    """(step, accuracy, interval in words) of every evaluation, by data set."""
    evals, found = run.tables["eval"], {}
    for task, key in data_sets(evals).items():
        unknown = np.full(len(evals["step"]), np.nan)
        low, high = (evals.get(f"{key}_{end}", unknown) for end in ("low", "high"))
        found[task] = [
            (
                float(evals["step"][row]),
                float(evals[key][row]),
                f"{low[row]:.1%} to {high[row]:.1%}" if low[row] <= high[row] else "unknown",
            )
            for row in np.flatnonzero(np.isfinite(evals[key]))
        ]
    return found


def _when(step: float) -> str:
    return f"step {step:.0f}" if step else "before RL"


def charts(run: RunData) -> str:
    """Every plot that has data, in three parts."""
    tables = {phase: average(table, MAX_POINTS) for phase, table in run.tables.items()}

    def drawn(some: tuple[Plot, ...]) -> list[str]:
        return [curve(plot, tables[plot.phase]) for plot in some]

    learning = drawn((*evaluations(tables["eval"]), *LEARNING))
    learning.insert(4, distributions.lengths_over_time(run.rollouts))
    weighting = drawn(WEIGHTING)
    if run.rollouts:
        newest = run.rollouts[-1]
        steps, alphas = (tables["rl"].get(k, np.zeros(0)) for k in ("step", "aggregation/alpha"))
        at = alphas[steps == newest.get("step")] if len(alphas) else alphas
        alpha = float(at[0]) if len(at) and np.isfinite(at[0]) else None
        weighting.insert(1, distributions.weight_against_length(newest, run.config, alpha))
    weighting.insert(4, distributions.variance_against_length(run.variance))
    # A part that a step does not have took no time: averages must count it as zero.
    parts = {key: np.nan_to_num(column) for key, column in run.tables["rl"].items()}
    parts = average(parts, MAX_BARS)
    known = {
        f"{k} {spent / 60:.1f} min": parts[f"time/{k}"]
        for k, spent in run.times.items()
        if f"time/{k}" in parts
    }
    caption = "Where the time goes, and whether that shifts as responses grow."
    seconds = plots.bars(
        "Seconds a step", caption, parts.get("step", np.zeros(0)), known, "seconds"
    )
    measured = distributions.exponents_by_layer(run.variance)
    measured += distributions.compared_aggregations(run.variance)
    return "".join(
        (
            _chart_notes(run),
            _part("Learning", learning),
            _part("Weights and variance", weighting, measured),
            _part("Speed", [*drawn(SPEED), seconds]),
        )
    )


def _part(title: str, cards: list[str], more: str = "") -> str:
    grid = f'<div class="grid">{"".join(cards)}</div>' if any(cards) else ""
    return f"<h2>{title}</h2>{grid}{more}" if grid or more else ""


def _chart_notes(run: RunData) -> str:
    """What the plots leave out."""
    values = (item for line in run.lines for item in line.items())
    bad = [key for key, value in values if isinstance(value, float) and value - value != 0]
    notes = [f"Not finite, not drawn: {key} ({bad.count(key)} times)." for key in sorted(set(bad))]
    if any(len(table.get("step", ())) > MAX_POINTS for table in run.tables.values()):
        notes.append(f"Neighbouring steps are averaged, to {MAX_POINTS} points a line.")
    return "".join(map(note, notes))


def samples(run: RunData) -> str:
    """The tables of sampled responses: of the newest recorded batch, and of the newest evaluation
    that has any."""
    out = ""
    recorded = [record for record in run.rollouts if record.get("samples")]
    if recorded:
        columns = ("prompt", "response", "answer", "reward", "advantage", "weight", "length")
        rows = recorded[-1]["samples"]
        marks = [_sign(row.get("advantage")) for row in rows]
        out += f"<h2>Trained responses of step {text(recorded[-1].get('step'))}</h2>"
        out += _responses(rows, marks, columns, len(recorded[-1].get("lengths") or rows))
    step, rows = run.samples
    if rows:
        columns = ("prompt", "response", "answer", "reward", "length")
        marks = [("right", "right") if row.get("correct") else ("wrong", "wrong") for row in rows]
        out += f"<h2>Held-out samples at step {text(step)}</h2>"
        out += _responses(rows, marks, columns, len(rows))
    return out


def _sign(advantage: Any) -> tuple[str, str]:
    """How a trained response is marked, and in words."""
    if not advantage:
        return "even", "no signal"
    return ("right", "raised") if advantage > 0 else ("wrong", "lowered")


def _responses(
    rows: list[Row], marks: list[tuple[str, str]], columns: tuple[str, ...], of: int
) -> str:
    """A table of the first rows, which are the first of so many."""
    head = "".join(f"<th>{name}</th>" for name in ("", *columns))
    lines = []
    for row, (kind, words) in list(zip(rows, marks, strict=True))[:MAX_SAMPLES]:
        cut = "<br>truncated" if row.get("truncated") else ""
        line = f'\n<tr class="{kind}"><td class="mark">{words}{cut}</td>'
        for name in columns:
            cell = f"<pre>{text(_short(row.get(name)))}</pre>"
            line += f'<td data-label="{name}" class="{name}">{cell}</td>'
        lines.append(line)

    def shown(some: list[str]) -> str:
        inner = f"<thead><tr>{head}</tr></thead><tbody>{''.join(some)}</tbody>"
        return f'<div class="scroll" tabindex="0"><table class="samples">{inner}</table></div>'

    count, more = note(f"The first {len(lines)} of {of}."), lines[UNFOLDED:]
    folded = details(f"{len(more)} more", shown(more)) if more else ""
    return f"{count}{shown(lines[:UNFOLDED])}{folded}"


def _short(value: Any) -> Any:
    """A number with the digits that one reads; all else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else value


def loss(run: RunData) -> str:
    """The effective formula, and what the run warned of."""
    formula, warnings = (run.summary.get(name) for name in ("formula", "warnings"))
    shown = f'<h2>Loss</h2><pre class="formula">{text(formula)}</pre>' if formula else ""
    listed = "".join(f"<p>{text(line)}</p>" for line in warnings or ())
    return shown + (f"<h2>Warnings</h2>{listed}" if listed else "")


def setup(run: RunData) -> str:
    """The run's summary with its environment, and its configuration."""
    known = {k: v for k, v in run.summary.items() if k not in ("formula", "warnings")}
    facts = table([], ([text(key), text(_short(value))] for key, value in flatten(known)))
    config = f"<pre>{text(run.config_text)}</pre>" if run.config_text else ""
    shown = facts + details("config.yaml", config)
    return f"<h2>Setup</h2>{shown}" if shown else ""
