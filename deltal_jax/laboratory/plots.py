"""Plots of a measurement as SVG files. The same measurement gives the same bytes."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

COLOURS = {"score": "#0068a8", "advantage": "#c85200"}
STYLE: dict[Any, Any] = {
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    **{"font.size": 10, "svg.fonttype": "none", "svg.hashsalt": "variance"},
}
Result = dict[str, Any]


def write_plots(folder: Path, name: str, result: Result) -> list[Path]:
    """`<name>-lengths.svg`, `<name>-layers.svg` and, where there are aggregations,
    `<name>-aggregations.svg`."""
    plots: dict[str, tuple[Callable[..., None], tuple[float, float]]] = {
        "lengths": (_lengths, (5.0, 3.4)),
        "layers": (_layers, (9.0, 1.6 + 0.28 * _rows(result))),
    }
    if result["aggregations"]:
        plots["aggregations"] = (_aggregations, (9.0, 1.2 + 0.26 * len(result["aggregations"])))
    return [_write(folder / f"{name}-{kind}.svg", result, *plot) for kind, plot in plots.items()]


def _write(
    path: Path, result: Result, draw: Callable[["Figure", Result], None], size: tuple[float, float]
) -> Path:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a matplotlibrc of the user must not change the plot
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=size, layout="constrained")
        draw(figure, result)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(str(path), metadata=nothing)
    return path


def _kinds(result: Result) -> list[str]:
    return [name for name in COLOURS if result["gradients"][name] is not None]


def _lengths(figure: "Figure", result: Result) -> None:
    """Variance against length on logarithmic axes, each gradient relative to its first bin."""
    axes = figure.subplots()
    for name in _kinds(result):
        found = result["gradients"][name]
        bins, fit = found["bins"], found["fit"]
        unit = abs(bins[0]["variance"]) or 1.0
        lengths = np.asarray([x["length"] for x in bins])
        variances = np.asarray([x["variance"] for x in bins]) / unit
        label = name if fit is None else f"{name}: β = {_beta(fit)}"
        axes.plot(lengths, variances, "o", color=COLOURS[name], label=label)
        if fit is not None:
            line = np.geomspace(lengths.min(), lengths.max(), 20)
            axes.plot(line, fit["scale"] * line ** fit["beta"] / unit, color=COLOURS[name])
    axes.set(xscale="log", yscale="log", xlabel="length L, tokens")
    axes.set_ylabel("Var(g | L), first bin = 1")
    axes.set_title("Variance of one response's gradient", fontsize=10, loc="left")
    _plain_ticks(axes.xaxis, axes.yaxis)
    axes.legend(frameon=False)


def _plain_ticks(*every: "Axis") -> None:
    """Logarithmic axes with numbers as they are said."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis in every:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def _beta(fit: dict[str, float | None]) -> str:
    low, high = fit["low"], fit["high"]
    ends = "" if low is None or high is None else f" ({low:.2f} – {high:.2f})"
    return f"{fit['beta']:.2f}{ends}"


def _table(found: dict[str, Any]) -> tuple[list[str], list[str], np.ndarray]:
    """β by layer and kind, NaN where there is none."""
    cells = {(cell["layer"], cell["kind"]): cell["beta"] for cell in found["heat"]}
    layers = list(dict.fromkeys(layer for layer, _ in cells))
    kinds = [kind for kind in found["kinds"] if any(kind == k for _, k in cells)]
    values = [[cells.get((layer, kind)) for kind in kinds] for layer in layers]
    names = ["outside" if layer is None else f"layer {layer}" for layer in layers]
    return names, kinds, np.asarray(values, float)


def _rows(result: Result) -> int:
    return len(_table(result["gradients"]["score"])[0])


def _layers(figure: "Figure", result: Result) -> None:
    """Heat maps of β; 1 is what ΔL with α = 1 assumes."""
    names = _kinds(result)
    every = figure.subplots(1, len(names), squeeze=False)[0]
    image = None
    for axes, name in zip(every, names, strict=True):
        rows, columns, values = _table(result["gradients"][name])
        image = axes.imshow(values, cmap="RdBu_r", vmin=0.0, vmax=2.0, aspect="auto")
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows if axes is every[0] else [""] * len(rows))
        axes.set_title(f"β, {name}", fontsize=10, loc="left")
        axes.tick_params(length=0)
        for (row, column), value in np.ndenumerate(values):
            if math.isfinite(value):
                colour = "white" if abs(value - 1) > 0.7 else "black"
                text = f"{value:.1f}"
                axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    if image is not None:
        figure.colorbar(image, ax=list(every), shrink=0.9)


def _aggregations(figure: "Figure", result: Result) -> None:
    """Variance, CV and cosine of each aggregation with their intervals."""
    rows = result["aggregations"]
    every = figure.subplots(1, 3, sharey=True)
    titles = {
        "relative_variance": "variance, of ΔL α=1 it is 1",
        "cv": "CV of a batch's gradient",
        "true_cosine": "cosine with the mean gradient",
    }
    for axes, (name, title) in zip(every, titles.items(), strict=True):
        for at, row in enumerate(rows):
            if row[name] is None:
                across = axes.get_yaxis_transform()
                axes.text(0.03, at, "not resolvable", transform=across, va="center", fontsize=8)
                continue
            low, high = row[f"{name}_low"], row[f"{name}_high"]
            if low is not None:
                axes.plot([low, high], [at, at], color="#5c646e", linewidth=1)
            axes.plot(row[name], at, "o", color=COLOURS["score"])
        axes.set_title(title, fontsize=10, loc="left")
        axes.grid(axis="x", alpha=0.2)
        axes.tick_params(axis="y", length=0)
        if all(row[name] is None for row in rows):
            axes.set_xticks([])
        elif name == "relative_variance":
            axes.set_xscale("log")
            _plain_ticks(axes.xaxis)
    every[0].set_yticks(range(len(rows)), [row["name"] for row in rows])
    every[0].set_ylim(len(rows) - 0.5, -0.5)
