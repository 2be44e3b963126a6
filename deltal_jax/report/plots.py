"""Plots as elements of a page: Matplotlib draws them, the page gives them its colours and font."""

from __future__ import annotations

import dataclasses
import io
import itertools
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from deltal_jax.report.markup import text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Matplotlib draws in these exact colours; the page replaces them by those of its own theme.
INK, COLOURS = "#0a0b0c", [f"#5e000{index}" for index in range(6)]
DASHES = ("solid", "dashed", "dotted")  # names that both Matplotlib and CSS know
#: Of points, and how a legend shows them.
MARKERS = {"o": "●", "v": "▼", "x": "×"}
STYLE: dict[Any, Any] = {
    **dict.fromkeys(("axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.titlecolor", "text.color", "grid.color"), INK),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.formatter.useoffset"), False),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none"),
    **{"axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "grid.alpha": 0.14},
    **{"axes.titlelocation": "left", "axes.titlesize": 11, "axes.titlepad": 8, "font.size": 11},
    **{"svg.fonttype": "none", "svg.hashsalt": "report"},
}


@dataclasses.dataclass(frozen=True)
class Series:
    """One line of a plot; `colour` counts through the palette and its dashes.

    x, y and the ends of the band have one length; what is not finite is left out.
    """

    label: str
    colour: int
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None

    @property
    def dash(self) -> str:
        """Changes with the colour, for who cannot tell them apart, and where lines coincide."""
        return DASHES[(self.colour + self.colour // 6) % 3]

    @property
    def style(self) -> dict[str, Any]:
        """Colour and dash, for Matplotlib."""
        return {"color": COLOURS[self.colour % 6], "linestyle": self.dash}

    @property
    def swatch(self) -> str:
        """The same, for a legend."""
        line = f"border-top:3px {self.dash} var(--c{self.colour % 6})"
        return f'<i style="{line}"></i>{text(self.label)}'

    @property
    def block(self) -> str:
        """A legend's item where it is drawn as an area."""
        return f'<i style="color:var(--c{self.colour % 6})">■</i>{text(self.label)}'


def curves(
    title: str, caption: str, series: Sequence[Series], scale: str, unit: str, over: str
) -> str:
    """The card of lines over steps, empty without any.

    `scale` is "plain", "share" (per cent, from zero) or "log" (where the values span over 10x);
    `unit` is of the values, `over` what the steps are of.
    """

    def draw(axes: Axes) -> None:
        for line in series:
            marker = "." if len(line.x) < 30 else ""
            known = np.isfinite(line.y)
            axes.plot(line.x[known], line.y[known], marker=marker, **line.style)
            if line.low is not None and line.high is not None:
                band = {"color": line.style["color"], "alpha": 0.17, "linewidth": 0}
                known = np.isfinite(line.low) & np.isfinite(line.high)
                axes.fill_between(line.x[known], line.low[known], line.high[known], **band)
        set_scale(axes, scale, np.concatenate([line.y for line in series]))
        label_axes(axes, over, unit)

    return figure(title, caption, [line.swatch for line in series], draw) if series else ""


def bars(
    title: str, caption: str, steps: np.ndarray, parts: dict[str, np.ndarray], unit: str
) -> str:
    """The card of bars over RL steps, their parts on top of one another; empty without any."""
    lines = [Series(label, at, steps, part) for at, (label, part) in enumerate(parts.items())]

    def draw(axes: Axes) -> None:
        width, bottom = 0.8 * np.ptp(steps) / max(len(steps) - 1, 1) or 0.8, 0.0
        for line in lines:
            axes.bar(steps, line.y, width, bottom, color=line.style["color"])
            bottom = bottom + line.y
        set_scale(axes, "plain", np.concatenate([line.y for line in lines]))
        label_axes(axes, "RL step", unit)

    return figure(title, caption, [line.block for line in lines], draw) if parts else ""


def label_axes(axes: Axes, x: str, y: str) -> None:
    """Say what is on the axes: y above it, where it takes no width."""
    axes.set_xlabel(x)
    axes.set_title(y)


def set_scale(axes: Axes, scale: str, values: np.ndarray) -> None:
    """Set the axes of a plot of these values over steps; see `curves` for the scales."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    low, high = np.nanmin(values), np.nanmax(values)
    if scale == "share":
        axes.set_ylim(0, min(max(axes.get_ylim()[1], 0.05), 1.05))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
    elif scale == "log" and low > 0 and high > 10 * low:
        axes.set_yscale("log", subs=[])
        set_log_ticks(axes.yaxis, low, high)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))


def set_log_ticks(axis: Any, low: float, high: float) -> None:
    """Few ticks, in plain numbers, on a logarithmic axis from low to high."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def figure(
    title: str, caption: str, keys: Sequence[str], draw: Callable[[Axes], None], height: float = 2.6
) -> str:
    """Draw a plot and return its card; `keys` are the items of the legend, in HTML, which is left
    out where there is one only."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a matplotlibrc of the user must not change the page
        matplotlib.rcParams.update(STYLE)
        drawn, file = Figure(figsize=(4.3, height), layout="constrained"), io.StringIO()
        draw(drawn.subplots())
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        FigureCanvasSVG(drawn).print_svg(file, metadata=nothing)
    legend = "".join(f"<li>{key}</li>" for key in keys) if len(keys) > 1 else ""
    svg = themed(inline_svg(file.getvalue(), title))
    heading, caption = f"<h3>{text(title)}</h3>", f"<figcaption>{text(caption)}</figcaption>"
    return f"<figure>{heading}{legend and f'<ul>{legend}</ul>'}{svg}{caption}</figure>"


def inline_svg(svg: str, title: str) -> str:
    """An SVG file of Matplotlib as an element of a page: no style of its own, which would apply to
    all of the page, no script, and only the ids that something refers to."""
    head = rf'<svg \1 role="img" aria-label="{text(title)}">'
    svg = re.sub('^.*?<svg.*?(viewBox="[^"]*").*?>', head, svg, count=1, flags=re.S)
    svg = re.sub("<(style|metadata|script)\\b.*?</\\1>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub('<g id="[^"]*"', "<g", svg)  # nothing refers to a group
    return svg.replace("xlink:href", "href").strip()


def themed(svg: str) -> str:
    """With the page's colours and font."""
    svg = re.sub(r'font: ([\d.]+)px [^;"]*', r"font-size: \1px", svg)
    return re.sub("#5e000([0-5])", r"var(--c\1)", svg.replace(INK, "currentColor"))


def number_ids(page: str) -> str:
    """The page with ids of its own in every plot: by the plot's number."""
    numbers = itertools.count(1)

    def number(found: re.Match[str]) -> str:
        prefix = rf"\1p{next(numbers)}-"
        return re.sub(r'(\bid="|url\(#|href="#)', prefix, found[0])

    return re.sub("<svg .*?</svg>", number, page, flags=re.S)
