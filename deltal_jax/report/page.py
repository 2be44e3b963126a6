"""Self-contained HTML pages: of a run, of several runs together, of a comparison.

A page needs no network, no script and no second file. It leaves out what is not there yet, so it
can be written at any moment of a run. The same folders always give the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from deltal_jax.report import comparison, sections, several
from deltal_jax.report.markup import text
from deltal_jax.report.plots import number_ids
from deltal_jax.report.reading import RunData, read_run

SUBTITLE = ("objective.aggregation", "objective.alpha", "seed", "sft.steps", "rl.steps")
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>{css}</style></head>
<body>{body}</body></html>
"""


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` in one atomic step and return its path.

    Reads config.yaml, metrics.jsonl, summary.json, rollouts/, variance/ and samples/, each of which
    may be missing. Raises FileNotFoundError when the folder itself is missing.
    """
    return write_page([run_dir], run_dir / "report.html")


def write_page(folders: Sequence[Path], target: Path) -> Path:
    """Write the page of one run, of several, or of one comparison, in one atomic step.

    Raises FileNotFoundError when a folder is missing.
    """
    if len(folders) == 1 and comparison.is_comparison(folders[0]):
        title, body = comparison.page(folders[0])
    elif len(folders) == 1:
        title, body = _one(read_run(folders[0]))
    else:
        title, body = several.page([read_run(folder) for folder in folders], body_of)
    css = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    page = number_ids(PAGE.format(title=text(title), css=css, body=body))
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        partial.write_bytes(page.encode("utf-8", "replace"))  # a sample may hold lone surrogates
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def _one(run: RunData) -> tuple[str, str]:
    """Title and body of one run's page."""
    known = [f"{key} {text(run.config[key])}" for key in SUBTITLE if key in run.config]
    head = f'<h1>{text(run.name)}</h1><p class="note">{" · ".join(known)}</p>'
    return run.name, f"{head}\n{body_of(run)}"


def body_of(run: RunData) -> str:
    """All parts of one run, without its title."""
    parts = (sections.headline, sections.loss, sections.charts, sections.samples, sections.setup)
    return "\n".join(part(run) for part in parts)
