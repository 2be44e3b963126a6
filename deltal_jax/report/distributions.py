"""Plots of single batches and of a variance measurement: lengths, weights, variance, exponents."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from deltal_jax.report.markup import note, table, text
from deltal_jax.report.plots import COLOURS, INK, MARKERS, figure, label_axes, set_log_ticks
from deltal_jax.report.reading import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_RIDGES, BINS, MAX_POINTS = 6, 24, 400
#: The exponent of those aggregations whose weight falls as a power of the length alone.
POWERS = {"sequence_mean": 1.0, "token_mean": 0.0, "constant_length": 0.0, "token_sum": 0.0}
KINDS = ("embed", "q", "k", "v", "o", "mlp", "norm", "head")


def lengths_over_time(rollouts: list[Row]) -> str:
    """The card of the histograms of recorded batches, one under the other; empty without any."""
    if not rollouts:
        return ""
    chosen = np.unique(np.linspace(0, len(rollouts) - 1, MAX_RIDGES).round().astype(int))
    records = [rollouts[at] for at in chosen]
    lengths = [np.asarray(record["lengths"], float) for record in records]
    low, high = min(x.min() for x in lengths), max(x.max() for x in lengths)
    edges = np.unique(np.linspace(low, high + 1, BINS + 1).round())
    shares = [np.histogram(x, edges)[0] / np.diff(edges) / len(x) for x in lengths]
    tallest = max(share.max() for share in shares) / 0.9

    def draw(axes: Axes) -> None:
        for row, (share, values) in enumerate(zip(shares, lengths, strict=True)):
            heights, base = np.repeat(share / tallest, 2), -row
            outline = np.repeat(edges, 2)[1:-1]
            axes.fill_between(outline, base, base + heights, color=COLOURS[0], alpha=0.3, lw=0)
            axes.plot(outline, base + heights, color=COLOURS[0], linewidth=1)
            middle = np.median(values)
            axes.plot([middle, middle], [base, base + 0.5], color=COLOURS[1], linewidth=2)
        axes.set_yticks([-row for row in range(len(records))], [r["step"] for r in records])
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        label_axes(axes, "length, tokens", "RL step")

    keys = ['<i style="color:var(--c0)">■</i>share of the responses']
    keys.append('<i style="border-top:3px solid var(--c1)"></i>median')
    caption = "Of recorded batches: does the whole distribution move, or does a tail grow?"
    return figure("Lengths over time", caption, keys, draw)


def weight_against_length(record: Row, config: Row, alpha: float | None) -> str:
    """The card of a recorded batch's weights, by the sign of the advantage, and of the formula's
    curve where the weight is a power of the length over the whole batch.

    `alpha` is the exponent of that step, None where it was the config's.
    """
    lengths, weights, advantages = (
        np.array([np.nan if x is None else x for x in record[name]], float)
        for name in ("lengths", "weights", "advantages")
    )
    signs = np.sign(advantages)
    kept = np.isfinite(weights) & np.isfinite(signs) & (weights > 0) & (lengths > 0)
    if not kept.any():
        return ""
    signed = (("o", 2, 1.0, "A > 0"), ("v", 1, -1.0, "A < 0"), ("x", 5, 0.0, "A = 0"))
    shown = [(m, c, label, kept & (signs == sign)) for m, c, sign, label in signed]
    shown = [item for item in shown if item[3].any()]
    power = _power(config, alpha)

    def draw(axes: Axes) -> None:
        for marker, colour, _, rows in shown:
            points = np.unique(np.stack([lengths[rows], weights[rows]]), axis=1)
            points = points[:, :: -(-points.shape[1] // MAX_POINTS)]
            axes.plot(*points, marker, color=COLOURS[colour], markersize=5, alpha=0.75)
        x, y = lengths[kept], weights[kept]
        if power is not None:
            grid = np.geomspace(x.min(), max(x.max(), x.min() + 1), 60)
            axes.plot(grid, grid**-power * y.sum() / np.sum(x**-power), color=INK, linewidth=1)
        if y.max() > 5 * y.min():
            axes.set(xscale="log", yscale="log")
            set_log_ticks(axes.xaxis, x.min(), x.max())
            set_log_ticks(axes.yaxis, y.min(), y.max())
        else:
            axes.set_ylim(0, 1.15 * y.max())
        label_axes(axes, "length, tokens", "weight of a response")

    keys = [f'<i style="color:var(--c{c})">{MARKERS[m]}</i>{label}' for m, c, label, _ in shown]
    if power is not None:
        line = '<i style="border-top:1px solid currentColor"></i>'
        said = f"∝ length<sup>{-power:g}</sup>" if power else "the same for every length"
        keys.append(f"{line}{said}")
    caption = f"The {int(kept.sum())} responses with a weight in the batch of RL step "
    caption += f"{record['step']}: how much does a token of a long one count?"
    return figure("Weight against length", caption, keys, draw)


def _power(config: Row, alpha: float | None) -> float | None:
    """How fast the weight falls with the length; None where that is not all there is to it."""
    method, given = config.get("objective.aggregation"), config.get("objective.alpha", 1.0)
    if method == "delta_l" and alpha is None and isinstance(given, int | float):
        alpha = float(given)
    power = alpha if method == "delta_l" else POWERS.get(str(method))
    return power if config.get("objective.scope", "batch") == "batch" else None


def variance_against_length(variance: Row) -> str:
    """The card of a measurement's bins and fits; empty without any."""
    found, keys = [], []
    for at, (name, gradient) in enumerate(_gradients(variance).items()):
        bins = [(b.get("length"), b.get("variance")) for b in gradient.get("bins", ())]
        bins = [(x, y) for x, y in bins if x and y and x > 0 and y > 0]
        fit = gradient.get("fit") or {}
        if not bins:
            continue
        found.append((at, np.asarray(sorted(bins), float).T, fit))
        said = f": β {_interval(fit)}" if fit.get("beta") is not None else ""
        swatch = f'<i style="color:var(--c{at})">{"●▼"[at]}</i>'
        keys.append(f"{swatch}{text(name)} gradient{text(said)}")
    if not found:
        return ""

    def draw(axes: Axes) -> None:
        for at, (x, y), fit in found:
            axes.plot(x, y, "ov"[at], color=COLOURS[at], markersize=5)
            if fit.get("beta") is not None and fit.get("scale"):
                line = fit["scale"] * x ** fit["beta"]
                axes.plot(x, line, color=COLOURS[at], linewidth=1.2, linestyle="dashed")
        axes.set(xscale="log", yscale="log")
        x, y = (np.concatenate([points[row] for _, points, _ in found]) for row in (0, 1))
        set_log_ticks(axes.xaxis, x.min(), x.max())
        set_log_ticks(axes.yaxis, y.min(), y.max())
        label_axes(axes, "length, tokens", "variance of a response's gradient")

    caption = f"Measured at step {_measured(variance)}; dashed the fits Var ∝ length^β. At β = 1 "
    caption += "the weights of ΔL with α = 1 have the least variance."
    return figure("Variance against length", caption, keys, draw)


def _measured(variance: Row) -> str:
    """At which step, and which responses count."""
    settings, counted = variance.get("settings") or {}, variance.get("counted")
    said = f"{variance.get('step')}" + (f", {counted} responses" if counted else "")
    if settings.get("min_length", 1) > 1:
        said += f" of at least {settings['min_length']} tokens"
    return said + (", none of them truncated" if settings.get("drop_truncated") else "")


def _gradients(variance: Row) -> dict[str, Row]:
    """Those measured, the score's and the advantage-weighted one."""
    both = variance.get("gradients")
    both = both if isinstance(both, dict) else {}
    return {k: both[k] for k in ("score", "advantage") if isinstance(both.get(k), dict)}


def _interval(fit: Row) -> str:
    low, high = fit.get("low"), fit.get("high")
    ends = f" ({low:.2f} to {high:.2f})" if low is not None and high is not None else ""
    return f"{fit['beta']:.2f}{ends}"


def exponents_by_layer(variance: Row) -> str:
    """A table of β by layer and kind of parameter, coloured by how far from 1 it is; of the
    advantage-weighted gradient where it was measured. Empty without any."""
    gradients = _gradients(variance)
    name = "advantage" if gradients.get("advantage", {}).get("heat") else "score"
    cells = {
        (str(cell.get("layer")), str(cell.get("kind"))): cell
        for cell in gradients.get(name, {}).get("heat") or ()
        if cell.get("beta") is not None
    }
    if not cells:
        return ""
    layers = sorted({layer for layer, _ in cells}, key=lambda x: (not x.isdigit(), x.zfill(6)))
    found = {kind for _, kind in cells}
    kinds = [kind for kind in KINDS if kind in found] + sorted(found - set(KINDS))
    rows = []
    for layer in layers:
        row = [text(f"layer {layer}" if layer.isdigit() else "outside")]
        rows.append(row + [_heat_cell(cells.get((layer, kind))) for kind in kinds])
    what = f"β of Var ∝ length^β of the {name} gradient, with 95% intervals: blue above 1, orange "
    what += "below, the stronger the farther. One colour throughout: the layers behave alike."
    head = ["", *(text(kind) for kind in kinds)]
    return f"<h3>Variance exponents by layer</h3>{note(what)}{table(head, rows, 'heat')}"


def _heat_cell(cell: Row | None) -> str:
    if cell is None:
        return ""
    beta = float(cell["beta"])
    strength, hue = min(abs(beta - 1.0), 1.0) * 45, "c0" if beta > 1 else "c1"
    ends = _interval(cell).partition(" ")[2].strip("()")
    colour = f"color-mix(in srgb,var(--{hue}) {strength:.0f}%,transparent)"
    return f'<div style="background:{colour}">{beta:.2f}<small>{ends}</small></div>'


def _with_ends(found: Row, key: str) -> str:
    value, low, high = (found.get(f"{key}{end}") for end in ("", "_low", "_high"))
    if value is None:
        return "not resolvable"
    return f"{value:.3g}" + (f" ({low:.3g} – {high:.3g})" if low is not None else "")


def compared_aggregations(variance: Row) -> str:
    """A table of what the measurement found of each aggregation; empty without any."""
    names = {"bias_cosine": "cosine to the unweighted gradient", "cv": "CV"}
    names |= {"variance": "variance", "cosine": "cosine of one batch to a target"}
    rows = []
    for found in variance.get("aggregations") or ():
        shown = (_with_ends(found, key) for key in names)
        rows.append([text(found.get("name")), *shown])
    head = ["aggregation", *names.values()]
    return f"<h3>Aggregations on the same responses</h3>{table(head, rows)}" if rows else ""
