"""The plots of a comparison: SVG files that are drawn from its findings alone."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltal_jax.compare.endpoints import PRIMARY

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Found = dict[str, Any]
#: Colours that people with any colour vision tell apart (Okabe & Ito 2008), the reference's first.
COLOURS = "#000000 #0072b2 #d55e00 #009e73 #cc79a7 #e69f00 #56b4e9".split()
DASHES = ("-", "--", ":")
STYLE: dict[Any, Any] = {
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.formatter.useoffset"), False),
    **{"axes.grid": True, "grid.alpha": 0.2, "axes.axisbelow": True, "font.size": 9},
    **{"svg.fonttype": "none", "svg.hashsalt": "compare", "legend.frameon": False},
}
PANELS = {
    "length_right": "length of right answers, tokens",
    "length_wrong": "length of wrong answers, tokens",
    "truncated_frac": "share of truncated responses",
}
FROZEN_PANELS = {
    "cv": "CV of a batch's gradient",
    "true_cosine": "cosine with the true gradient",
    "relative_variance": "variance, of ΔL α=1 it is 1",
}


def draw_plots(found: Found, folder: Path) -> list[Path]:
    """Write the plots into a folder, each under 100 kB, and return their paths."""
    folder.mkdir(exist_ok=True)
    drawn = {"areas": _areas, "accuracy": _accuracy, "outcomes": _outcomes}
    if found["frozen"]:
        drawn["frozen"] = _frozen
    return [_save(folder / f"{name}.svg", draw, found) for name, draw in drawn.items()]


def _save(path: Path, draw: Callable[[Found], "Figure"], found: Found) -> Path:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a matplotlibrc of the user must not change them
        matplotlib.rcParams.update(STYLE)
        figure = draw(found)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        file = io.StringIO()
        FigureCanvasSVG(figure).print_svg(file, metadata=nothing)
    short = re.sub(
        r' (?:d|x|y)="[^"]*"', lambda m: re.sub(r"(\.\d\d)\d+", r"\1", m[0]), file.getvalue()
    )
    path.write_text(short, encoding="utf-8")
    return path


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _line(found: Found, name: str) -> dict[str, Any]:
    """Colour and dash of a method: the reference is black."""
    others = [n for n in found["plan"]["methods"] if n != found["plan"]["reference"]]
    at = others.index(name) if name in others else -1
    colour = COLOURS[0] if at < 0 else COLOURS[1 + at % 6]
    return {"color": colour, "linestyle": DASHES[max(at, 0) // 6 % 3]}


def _areas(found: Found) -> "Figure":
    """Areas, and their differences from the reference, each with its interval."""
    names, reference = list(found["methods"]), found["plan"]["reference"]
    figure = _figure(8, 1.3 + 0.28 * len(names))
    left, right = figure.subplots(1, 2, sharey=True)
    for row, name in enumerate(names):
        colour = _line(found, name)["color"]
        _whisker(left, row, found["methods"][name]["figures"][PRIMARY], "mean", colour)
        pairs = found["comparisons"].get(name, {"endpoints": {}})["endpoints"]
        if PRIMARY in pairs:
            _whisker(right, row, pairs[PRIMARY], "difference", colour)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set_xlabel(f"area under Avg@{found['k']} by tokens, 95 %")
    right.axvline(0, color="#000000", linewidth=0.8)
    right.set_xlabel(f"paired difference from {reference}, 95 %")
    for panel in (left, right):
        panel.locator_params(axis="x", nbins=5)
    return figure


def _whisker(axes: Any, row: float, one: Found, key: str, colour: str) -> None:
    if one["low"] is not None:
        axes.plot([one["low"], one["high"]], [row, row], color=colour, linewidth=1.5)
    axes.plot([one[key]], [row], "o", color=colour, markersize=4)


def _accuracy(found: Found) -> "Figure":
    """A panel for each method: its curve and band over generated tokens, the reference's behind."""
    names, reference = list(found["methods"]), found["plan"]["reference"]
    columns = min(len(names), 4)
    rows = -(-len(names) // columns)
    figure = _figure(0.6 + 2.2 * columns, 0.5 + 1.9 * rows)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for panel, name in zip(panels, names, strict=False):
        _band(panel, found["methods"][name]["accuracy_curve"], _line(found, name)["color"])
        if name != reference and reference in names:
            behind = found["methods"][reference]["accuracy_curve"]
            panel.plot(behind["tokens"], behind["mean"], color="#777777", linewidth=0.9)
        panel.set_title(name, fontsize=9)
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    figure.supxlabel(f"generated tokens (grey: {reference}; bands: 95 %)", fontsize=9)
    figure.supylabel(f"Avg@{found['k']}", fontsize=9)
    return figure


def _band(axes: Any, curve: Found, colour: str) -> None:
    from matplotlib.ticker import EngFormatter

    axes.plot(curve["tokens"], curve["mean"], color=colour)
    low, high = _known(curve["low"]), _known(curve["high"])
    axes.fill_between(curve["tokens"], low, high, color=colour, alpha=0.2, linewidth=0)
    axes.locator_params(nbins=4)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _outcomes(found: Found) -> "Figure":
    """Lengths of right and wrong answers and truncation over the steps, means over runs."""
    figure = _figure(9.5, 3.1)
    panels = figure.subplots(1, len(PANELS))
    for panel, (outcome, label) in zip(panels, PANELS.items(), strict=True):
        for name, method in found["methods"].items():
            curves = method["outcome_curves"]
            values = _known(curves[outcome])
            panel.plot(curves["step"], values, label=name, linewidth=1.2, **_line(found, name))
        panel.set_title(label, fontsize=9)
        panel.set_xlabel("step")
        if outcome.endswith("_frac"):
            panel.set_ylim(0, max(panel.get_ylim()[1], 0.05))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5))
    return figure


def _frozen(found: Found) -> "Figure":
    """CV, cosine and variance of the methods at each warm-up, with their intervals."""
    names = list(found["plan"]["methods"])
    figure = _figure(9.5, 1.4 + 0.32 * len(names))
    panels = figure.subplots(1, len(FROZEN_PANELS), sharey=True)
    for panel, (key, label) in zip(panels, FROZEN_PANELS.items(), strict=True):
        for number, one in enumerate(found["frozen"]):
            colour = COLOURS[1 + number % 6]
            for row in one["methods"]:
                if row.get(key) is None:
                    continue
                at = names.index(row["name"]) + 0.2 * (number - (len(found["frozen"]) - 1) / 2)
                ends = {end: row[f"{key}_{end}"] for end in ("low", "high")}
                _whisker(panel, at, {"value": row[key], **ends}, "value", colour)
            panel.plot([], [], "o-", color=colour, markersize=4, label=f"warm-up {one['warmup']}")
        panel.set_xlabel(label)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5))
    return figure


def _known(values: list[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]
