"""One self-contained HTML page about a run: numbers, formula, plots, samples, configuration.

The page needs no network, no script and no second file. It leaves out what is not there yet, so
it can be written at any moment of a run. The same run folder always gives the same bytes.
"""

from __future__ import annotations

import html
import io
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from deltal_jax.analysis.accuracy import rank_correlation
from deltal_jax.metrics import load_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]
Table = dict[str, np.ndarray]  # one row a step; a metric without any finite value has no column
MAX_POINTS, MAX_BARS, MAX_SAMPLES = 400, 24, 24  # longer series are averaged before they are drawn
CAVEAT = """<p class="note">Intervals by bootstrap over distinct problems: responses to one problem
are no independent trials. Monotonicity is the rank correlation of step and accuracy.</p>"""
TIMES = ("rollout", "reward", "old_logprob", "update", "checkpoint", "evaluate")
SUBTITLE = ("objective.aggregation", "objective.alpha", "seed", "sft.steps", "rl.steps")
# Matplotlib draws in these exact colours; the page replaces them by those of its own theme.
INK, COLOURS = "#0a0b0c", [f"#5e000{index}" for index in range(6)]
DASHES = ("solid", "dashed", "dotted")  # names that both Matplotlib and CSS know
STYLE: dict[Any, Any] = {
    **dict.fromkeys(("axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.formatter.useoffset"), False),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none"),
    **{"axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "grid.alpha": 0.14},
    **{"grid.color": INK, "font.size": 11, "svg.fonttype": "none", "svg.hashsalt": "report"},
}
LENGTH = {"median": "length/p50", "wrong": "length/wrong_mean", "right": "length/correct_mean"}
WEIGHTS = {"largest": "aggregation/weight_max", "smallest": "aggregation/weight_min"}
BANDS = {"length/p50": ("length/p5", "length/p95")}
PLOTS = (
    ("Reward", "rl", "plain", {"reward": "reward/mean", "accuracy": "accuracy/mean"}),
    ("Response length", "rl", "plain", LENGTH),
    ("Truncated responses", "rl", "share", {"truncated": "length/truncated_frac"}),
    ("Groups without a signal", "rl", "share", {"groups": "reward/frac_zero_std"}),
    ("Gradient norm", "rl", "log", {"norm": "optim/grad_norm"}),
    ("Entropy", "rl", "plain", {"entropy": "policy/entropy"}),
    ("Warm-up loss", "sft", "plain", {"loss": "sft/loss"}),
    ("Weights", "rl", "log", WEIGHTS),
    ("Effective sample size", "rl", "plain", {"size": "aggregation/ess"}),
    ("Rollout utilization", "rl", "share", {"slots": "rollout/utilization"}),
)
CAPTIONS = {
    "Held-out accuracy": "Does it rise and stay up? Bands are the 95% intervals.",
    "Reward": "Means on training prompts: do reward and accuracy rise together?",
    "Response length": "Tokens, band 5% to 95%. Do wrong answers grow away from right ones?",
    "Truncated responses": "Should stay near zero: a response cut short cannot give its answer.",
    "Groups without a signal": "All their rewards are equal: near 100%, nothing is left to learn.",
    "Gradient norm": "Spikes or a slow climb are early signs of an unstable run.",
    "Entropy": "A fall to zero ends exploration; a steady rise is divergence.",
    "Warm-up loss": "Supervised training before RL: has it flattened out?",
    "Weights": "Extremes over the responses of a batch: the wider, the more lengths matter.",
    "Effective sample size": "A low value means that few responses carry most of the weight.",
    "Rollout utilization": "Decoding slots at work: a low share means waiting for long responses.",
    "Seconds a step": "Where the time goes, and whether that shifts as responses grow.",
}

CSS = """
:root{color-scheme:light dark; --bg:#fbfbf9; --card:#fff; --ink:#1d2126; --soft:#5c646e;
--line:#dfe1e4; --c0:#0068a8; --c1:#c85200; --c2:#00805d; --c3:#a8458a; --c4:#8a6d00; --c5:#6b7480}
@media(prefers-color-scheme:dark){:root{--bg:#131518; --card:#1a1d21; --ink:#e4e6e9; --soft:#9aa3ad;
--line:#31363c; --c0:#5eb8f0; --c1:#f39a5f; --c2:#43c99b; --c3:#e295c6; --c4:#e3c44c; --c5:#9aa3ad}}
*{box-sizing:border-box} h1,h2,p,pre,b,span,li{overflow-wrap:anywhere} h3,p,pre{margin:0}
body{margin:0 auto; max-width:1240px; padding:2rem clamp(1rem,3vw,2.5rem) 4rem; color:var(--ink);
background:var(--bg); font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif}
h1{font-size:1.75rem; line-height:1.2; margin:0} h2{font-size:1.1rem; margin:2.5rem 0 .75rem}
h3{font-size:.95rem} summary{cursor:pointer; margin:.75rem 0} .scroll{overflow-x:auto}
.note,figcaption,th,.tiles span{color:var(--soft); font-size:.85rem} .tiles *{display:block}
.grid{display:grid; gap:1rem; margin:.75rem 0;
grid-template-columns:repeat(auto-fill,minmax(min(100%,var(--min,21rem)),1fr))}
.tiles>div,figure,.formula{padding:1rem; background:var(--card); border:1px solid var(--line);
border-radius:6px; margin:0; min-width:0} .tiles{--min:13rem} .tiles b{font-size:1.3rem}
figure{display:flex; flex-direction:column; gap:.35rem} svg text{font-family:inherit}
svg{width:100%; height:auto; margin-top:auto; stroke-linejoin:round}
ul{display:flex; flex-wrap:wrap; gap:0 .9rem; list-style:none; margin:0; padding:0; font-size:.8rem}
li i{display:inline-block; width:1.5em; margin-right:.4em; vertical-align:.25em}
pre{white-space:pre-wrap; font:.85rem/1.5 ui-monospace,Menlo,Consolas,monospace}
.formula{border-left:3px solid var(--c0); font-size:1rem} td pre{min-width:3rem}
table{border-collapse:collapse; font-size:.85rem; font-variant-numeric:tabular-nums}
th,td{padding:.4rem .9rem; text-align:left; vertical-align:top; border-bottom:1px solid var(--line)}
.right{--mark:var(--c2)} .wrong{--mark:var(--c1)} th,.mark{white-space:nowrap; font-weight:500}
.samples .mark{border-left:4px solid var(--mark); color:var(--mark)}
@media(max-width:640px){.samples thead{display:none} .samples tr{display:block; margin:0 0 1.5rem}
.samples td{display:block; border:0; border-left:4px solid var(--mark); padding:.15rem .75rem}
.samples td::before{content:attr(data-label); display:block; font-size:.75rem; color:var(--soft)}}
"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>{css}</style></head>
<body>{body}</body></html>
"""


def write_report(run_dir: pathlib.Path) -> pathlib.Path:
    """Write `run_dir/report.html` in one atomic step and return its path.

    Reads config.yaml, metrics.jsonl, summary.json and samples/, each of which may be missing.
    Raises FileNotFoundError when the folder itself is missing.
    """
    metrics = run_dir / "metrics.jsonl"
    lines = load_metrics(metrics) if metrics.exists() else []
    tables = {phase: _phase_table(lines, phase) for phase in ("sft", "rl", "eval")}
    times = {n: s for n in TIMES if (s := math.fsum(_numbers(lines, f"time/{n}", 0.0))) > 0}
    config = dict(_flatten(_load_mapping(run_dir / "config.yaml", yaml.safe_load)))
    summary = _load_mapping(run_dir / "summary.json", json.loads)
    title = _text(config.get("run.name") or run_dir.resolve().name)
    subtitle = " · ".join(f"{key} {_text(config[key])}" for key in SUBTITLE if key in config)
    body = [f'<h1>{title}</h1><p class="note">{subtitle}</p>', _headline(tables, times, config)]
    if formula := summary.pop("formula", None):
        body.append(f'<h2>Loss</h2><pre class="formula">{_text(formula)}</pre>')
    if warnings := summary.pop("warnings", None):
        listed = "".join(f"<p>{_text(line)}</p>" for line in warnings)
        body.append(f"<h2>Warnings</h2>{listed}")
    body += [_plots(lines, tables, times), _samples(run_dir), _setup(run_dir, summary)]
    page = PAGE.format(title=title, css=CSS, body="\n".join(body))
    target, partial = run_dir / "report.html", run_dir / f".report.html.{os.getpid()}"
    try:
        partial.write_bytes(page.encode("utf-8", "replace"))  # a sample may hold lone surrogates
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def _load_mapping(path: pathlib.Path, parse: Callable[[str], Any]) -> Row:
    """Return the mapping in a file, empty where it is missing or cannot be read."""
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}


def _flatten(mapping: Row, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a nested mapping under dotted keys."""
    for key, value in mapping.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _text(value: Any) -> str:
    """Return any value as text that is safe in HTML; control characters become visible signs."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    visible = re.sub(r"[\0-\x08\x0b-\x1f\x7f]", lambda m: chr(0x2400 + min(ord(m[0]), 33)), text)
    return html.escape(visible)


def _numbers(rows: Iterable[Row], key: str, other: float = math.nan) -> list[float]:
    """Return a metric in all rows, `other` where it is absent, no number or not finite."""
    found = [row.get(key) for row in rows]
    return [float(v) if isinstance(v, int | float) and math.isfinite(v) else other for v in found]


def _phase_table(lines: Iterable[Row], phase: str) -> Table:
    """Return the metrics of a phase in order of steps.

    Lines of one step are merged, and the later one wins: a resumed run repeats steps.
    """
    merged: dict[float, Row] = {}
    for line in lines:
        if line.get("phase") == phase and math.isfinite(step := _numbers([line], "step")[0]):
            merged.setdefault(step, {}).update(line)
    rows = [merged[step] for step in sorted(merged)]
    columns = {key: np.array(_numbers(rows, key)) for key in set().union(*rows)}
    return {key: column for key, column in columns.items() if np.isfinite(column).any()}


def _accuracies(table: Table) -> dict[str, str]:
    """Return the accuracy metric of every evaluated task, by the task's name."""
    found = (re.fullmatch("eval/(.+)/avg_at_k", key) for key in table)
    return dict(sorted((match[1], match[0]) for match in found if match))


def _average(table: Table, limit: int) -> Table:
    """Return a table of at most `limit` rows: means over neighbours, of the finite values."""
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


def _headline(tables: dict[str, Table], times: dict[str, float], config: Row) -> str:
    """Return the tiles with the run's main numbers."""
    rl, evals, tiles = tables["rl"], tables["eval"], []
    for task, key in _accuracies(evals).items():
        known = np.flatnonzero(np.isfinite(evals[key]))
        ends, notes = sorted({known[0], known[-1]}), []
        for row in ends:
            step, unknown = evals["step"][row], np.full(len(evals["step"]), math.nan)
            low, high = (evals.get(f"{key}_{end}", unknown)[row] for end in ("low", "high"))
            interval = f"{low:.1%} to {high:.1%}" if low <= high else "unknown"
            when = f"step {step:.0f}" if step else "before RL"
            notes.append(f"{when}: 95% interval {interval}")
        if (order := rank_correlation(evals["step"], evals[key])) is not None:
            notes.append(f"monotonicity {order:.2f}, over {len(known)} evaluations")
        value = " → ".join(f"{evals[key][row]:.1%}" for row in ends)
        tiles.append((f"Accuracy, {task}", value, notes))
    planned = [f"of {config['rl.steps']} planned"] if "rl.steps" in config else []
    tiles.append(("RL steps done", f"{rl['step'][-1] if rl else 0:.0f}", planned))
    if times:
        total = str(timedelta(seconds=round(sum(times.values()))))
        tiles.append(("Wall time", total, ["h:mm:ss, all timed parts of all steps"]))
    if "length/p50" in rl:
        lengths = rl["length/p50"][np.isfinite(rl["length/p50"])]
        note = f"tokens, at the last RL step; {lengths[0]:.0f} at the first"
        tiles.append(("Median length", f"{lengths[-1]:.0f}", [note]))
    cells = ""
    for label, value, notes in tiles:
        small = "".join(f"<span>{_text(note)}</span>" for note in notes)
        cells += f"<div><span>{_text(label)}</span><b>{value}</b>{small}</div>"
    return f'<div class="grid tiles">{cells}</div>{CAVEAT if _accuracies(evals) else ""}'


def _plots(lines: list[Row], tables: dict[str, Table], times: dict[str, float]) -> str:
    """Return the section with every plot that has data."""
    averaged = {phase: _average(table, MAX_POINTS) for phase, table in tables.items()}
    plots = (("Held-out accuracy", "eval", "share", _accuracies(tables["eval"])), *PLOTS)
    cards = [_curves(name, averaged[phase], scale, keys) for name, phase, scale, keys in plots]
    # A part that a step does not have took no time: averages must count it as zero.
    parts = {key: np.nan_to_num(column) for key, column in tables["rl"].items()}
    keys = {f"{part} {spent / 60:.1f} min": f"time/{part}" for part, spent in times.items()}
    cards.append(_curves("Seconds a step", _average(parts, MAX_BARS), "bars", keys))
    bad = [key for line in lines for key, v in line.items() if isinstance(v, float) and v - v != 0]
    notes = [f"Not finite, not drawn: {key} ({bad.count(key)} times)." for key in sorted(set(bad))]
    if any(len(table.get("step", ())) > MAX_POINTS for table in tables.values()):
        notes.append(f"Neighbouring steps are averaged, to {MAX_POINTS} points a line.")
    note = "".join(f'<p class="note">{_text(note)}</p>' for note in notes)
    return f'<h2>Plots</h2>{note}<div class="grid">{"".join(cards)}</div>' if any(cards) else note


def _curves(title: str, table: Table, scale: str, curves: dict[str, str]) -> str:
    """Return the card of one plot over steps, empty when the table has none of its metrics.

    `curves` maps labels to metrics; a metric that has bounds in the table gets a band.
    `scale` is "plain", "share" (per cent, from zero), "log" (where the values span over 10x) or
    "bars" (the metrics are drawn as bars on top of one another).
    """
    drawn = [(i, label, key) for i, (label, key) in enumerate(curves.items()) if key in table]

    def draw(axes: Axes) -> None:
        steps, bottom = table["step"], 0.0
        width = 0.8 * np.ptp(steps) / max(len(steps) - 1, 1) or 0.8
        for index, _, key in drawn:
            colour, column, known = COLOURS[index % 6], table[key], np.isfinite(table[key])
            if scale == "bars":
                axes.bar(steps, column, width, bottom, color=colour)
                bottom = bottom + column
                continue
            dash, marker = DASHES[index // 6 % 3], "." if len(steps) < 30 else ""
            axes.plot(steps[known], column[known], color=colour, linestyle=dash, marker=marker)
            low, high = (table.get(name) for name in BANDS.get(key, (f"{key}_low", f"{key}_high")))
            if low is not None and high is not None:
                axes.fill_between(steps, low, high, color=colour, alpha=0.17, linewidth=0)
        _set_scale(axes, scale, np.concatenate([table[key] for _, _, key in drawn]))

    return _figure(title, [item[:2] for item in drawn], draw) if drawn else ""


def _set_scale(axes: Axes, scale: str, values: np.ndarray) -> None:
    """Set the axes of a plot of these values; see `_curves` for the scales."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    low, high = np.nanmin(values), np.nanmax(values)
    if scale == "share":
        axes.set_ylim(0, max(axes.get_ylim()[1], 0.05))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
    elif scale == "log" and low > 0 and high > 10 * low:
        axes.set_yscale("log", subs=[])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.set_xlabel("step")


def _figure(title: str, keys: list[tuple[int, str]], draw: Callable[[Axes], None]) -> str:
    """Draw a plot and return its card; `keys` are the legend's palette indices and labels."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    name = title.lower().replace(" ", "-")
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a matplotlibrc of the user must not change the page
        matplotlib.rcParams.update(STYLE)
        figure, file = Figure(figsize=(5, 2.9), layout="constrained"), io.StringIO()
        draw(figure.subplots())
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(file, metadata=nothing)
    legend = ""
    for index, label in keys if len(keys) > 1 else ():
        swatch = f"border-top:3px {DASHES[index // 6 % 3]} var(--c{index % 6})"
        legend += f'<li><i style="{swatch}"></i>{_text(label)}</li>'
    svg = _inline_svg(file.getvalue(), name, title)
    caption = f"<figcaption>{CAPTIONS[title]}</figcaption>"
    return f"<figure><h3>{title}</h3>{legend and f'<ul>{legend}</ul>'}{svg}{caption}</figure>"


def _inline_svg(svg: str, name: str, title: str) -> str:
    """Turn an SVG file into an element of a page: ids of its own, the page's colours and font."""
    # Its only text is numbers and our own words, so replacing in the source is safe.
    head = rf'<svg \1 role="img" aria-label="{title}">'
    svg = re.sub('^.*?<svg.*?(viewBox="[^"]*").*?>', head, svg, count=1, flags=re.S)
    svg = re.sub("<style.*?</style>", "", svg, flags=re.S)  # it would apply to the whole page
    svg = re.sub('<g id="[^"]*"', "<g", svg)  # nothing refers to a group
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", svg).replace("xlink:href", "href")
    svg = re.sub(r'font: ([\d.]+)px [^;"]*', r"font-size: \1px", svg)
    return re.sub("#5e000([0-5])", r"var(--c\1)", svg.replace(INK, "currentColor"))


def _samples(run_dir: pathlib.Path) -> str:
    """Return the table of samples of the newest evaluation that has any."""
    paths = sorted(run_dir.glob("samples/step-*.jsonl"), key=lambda path: (len(path.name), path))
    for path in reversed(paths):
        if rows := load_metrics(path):
            break
    else:
        return ""
    body, columns = "", ("prompt", "response", "answer", "reward", "length")
    for row in rows[:MAX_SAMPLES]:
        verdict = "right" if row.get("correct") else "wrong"
        cut = "<br>truncated" if row.get("truncated") else ""
        body += f'\n<tr class="{verdict}"><td class="mark">{verdict}{cut}</td>'
        for name in columns:
            body += f'<td data-label="{name}"><pre>{_text(row.get(name))}</pre></td>'
    head = "".join(f"<th>{name}</th>" for name in ("verdict", *columns))
    count = f'<p class="note">The first {min(len(rows), MAX_SAMPLES)} of {len(rows)}.</p>'
    table = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    table = f'<div class="scroll"><table class="samples">{table}</table></div>'
    return f"<h2>Samples at step {_text(path.stem[5:].lstrip('0') or '0')}</h2>{count}{table}"


def _setup(run_dir: pathlib.Path, summary: Row) -> str:
    """Return the section with the run's summary and its configuration."""
    pairs = [f"<th>{_text(key)}</th><td>{_text(value)}</td>" for key, value in _flatten(summary)]
    rows = "".join(f"<tr>{pair}</tr>" for pair in pairs)
    table = f'<div class="scroll"><table>{rows}</table></div>' if rows else ""
    path = run_dir / "config.yaml"
    config = _text(path.read_text(encoding="utf-8", errors="replace")) if path.exists() else ""
    details = f"<details><summary>config.yaml</summary><pre>{config}</pre></details>"
    return f"<h2>Setup</h2>{table}{details if config else ''}" if rows or config else ""
