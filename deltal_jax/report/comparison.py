"""The page of a comparison's folder: its findings and its plots, as they were written there."""

from __future__ import annotations

from pathlib import Path

from deltal_jax.report.markup import details, markdown, note, text
from deltal_jax.report.plots import INK, inline_svg, themed

PLAN, FINDINGS, CELLS = "plan.yaml", "findings.md", "cells"


def is_comparison(folder: Path) -> bool:
    """Whether a folder is a comparison's."""
    return (folder / PLAN).is_file()


def page(folder: Path) -> tuple[str, str]:
    """Title and body of the page of a comparison, as far as it has come."""
    title = f"Comparison {folder.resolve().name}"
    cells = len(list((folder / CELLS).glob("*/seed-*.json")))
    body = [f"<h1>{text(title)}</h1>", note(f"Training runs that are done: {cells}.")]
    path = folder / FINDINGS
    if path.is_file():
        body.append(markdown(path.read_text("utf-8", "replace")))
    else:
        body.append(note("The findings are not there yet: they are written once cells are done."))
    figures = [_plot(path) for path in sorted([*folder.glob("*.svg"), *folder.glob("plots/*.svg")])]
    if figures:
        body.append(f'<h2>Plots</h2><div class="grid plots">{"".join(figures)}</div>')
    plan = (folder / PLAN).read_text("utf-8", "replace")
    body.append(details(PLAN, f"<pre>{text(plan)}</pre>"))
    return title, "\n".join(body)


def _plot(path: Path) -> str:
    """The card of an SVG file: in the page's colours where it was drawn for that, else on paper."""
    svg, name = path.read_text("utf-8", "replace"), path.stem.replace("_", " ").replace("-", " ")
    kind = "" if INK in svg else ' class="paper"'
    drawn = themed(inline_svg(svg, name)) if INK in svg else inline_svg(svg, name)
    return f"<figure{kind}><h3>{text(name.capitalize())}</h3>{drawn}</figure>"
