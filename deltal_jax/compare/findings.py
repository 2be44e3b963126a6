"""What a comparison shows: read its cells, test, and say it in words that the figures allow."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from deltal_jax import __version__
from deltal_jax.analysis.paired import EXACT_PAIRS, PERMUTATIONS
from deltal_jax.analysis.statistics import RESAMPLES
from deltal_jax.compare.controls import find_controls
from deltal_jax.compare.directions import directions, share_direction
from deltal_jax.compare.endpoints import (
    ENDPOINTS,
    PRIMARY,
    accuracy_curve,
    common_spans,
    figures,
    outcome_curves,
    outcomes,
)
from deltal_jax.compare.exponents import exponents
from deltal_jax.compare.pairs import ALPHA, POWER, Cells, compare, judge
from deltal_jax.compare.sentences import markdown, summary
from deltal_jax.errors import UserError

#: What an entry of `methods` or `controls` may have; one with none of them is its `set`.
KEYS = frozenset({"set", "weights", "seeds", "expect", "of", "kind"})
#: What the findings need of a cell.
NEEDED = frozenset("seed warmup k evaluations train first_batch environment".split())
FORMAT = 1


def write_findings(folder: Path) -> str:
    """Write findings.json, findings.md and plots/*.svg of the comparison in a folder, from its
    plan.yaml and as many of its cells as there are; the same cells give the same bytes.

    Returns the text to print. Raises UserError where nothing can be said yet.
    """
    from deltal_jax.compare.plots import draw_plots

    plan = load_plan(folder)
    found = find(load_cells(folder, plan), plan, load_frozen(folder))
    text = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "findings.json").write_text(text + "\n", encoding="utf-8")
    plots = draw_plots(found, folder / "plots")
    names = [plot.relative_to(folder).as_posix() for plot in plots]
    (folder / "findings.md").write_text(markdown(found, names), encoding="utf-8")
    return f"{summary(found)}\nWrote findings.md, findings.json and {len(plots)} plots to {folder}"


def load_plan(folder: Path) -> dict[str, Any]:
    """The resolved plan of a comparison, each entry in its long form, `{"set": {…}, …}`."""
    path = folder / "plan.yaml"
    try:
        plan = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: no comparison's plan; run `deltal compare` first") from error
    if not isinstance(plan, dict) or not {"methods", "seeds", "reference"} <= set(plan):
        raise UserError(f"{path}: no comparison's plan; delete it and run `deltal compare` again")
    for section in ("methods", "controls"):
        entries = plan.get(section) or {}
        plan[section] = {name: _long(entry or {}) for name, entry in entries.items()}
    return plan


def _long(entry: dict[str, Any]) -> dict[str, Any]:
    if "kind" in entry and entry["kind"] is None:
        return entry | {"kind": "null"}  # YAML reads the word without quotes as nothing
    return entry if KEYS & set(entry) else {"set": entry}


def load_cells(folder: Path, plan: dict[str, Any]) -> dict[str, Cells]:
    """The cells of a comparison that are there, by method and seed; files of methods and seeds that
    the plan, as `load_plan` gives it, does not have are left alone.

    Raises UserError for a file that is no cell of this format.
    """
    found: dict[str, Cells] = {}
    planned = [
        folder / "cells" / name / f"seed-{seed}.json"
        for name, entry in (plan["methods"] | plan["controls"]).items()
        for seed in _seeds(entry, plan)
    ]
    for path in filter(Path.exists, planned):
        try:
            cell = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read; delete it and run it again") from error
        good = isinstance(cell, dict) and cell.get("format") == FORMAT and set(cell) >= NEEDED
        if not good or len(cell["evaluations"]) < 2:
            raise UserError(f"{path}: no cell of format {FORMAT}; delete it and run it again")
        found.setdefault(path.parent.name, {})[cell["seed"]] = cell
    return found


def load_frozen(folder: Path) -> list[dict[str, Any]]:
    """The measurements at warm-ups that are there, in their order.

    Raises UserError for a file that is none of this format.
    """
    found = {}
    for path in folder.glob("frozen/warmup-*.json"):
        try:
            one = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read; delete it and run it again") from error
        if not isinstance(one, dict) or one.get("format") != FORMAT:
            raise UserError(f"{path}: no measurement of format {FORMAT}; delete it")
        found[one["warmup"]] = one
    return [found[number] for number in sorted(found)]


def find(
    cells: Mapping[str, Cells], plan: dict[str, Any], frozen: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """All figures of a comparison as plain JSON, for `plan` as `load_plan` gives it, with what
    `load_frozen` found.

    The horizon of the areas is where the first of the methods' cells ends. Raises UserError where
    no method has a cell, or cells are evaluated on different problems.
    """
    methods, controls, reference = plan["methods"], plan["controls"], plan["reference"]
    everything = {
        name: {s: cells[name][s] for s in _seeds(entry, plan) if s in cells.get(name, {})}
        for name, entry in (methods | controls).items()
    }
    present = {name: everything[name] for name in methods if everything[name]}
    used = [cell for some in present.values() for cell in some.values()]
    if not used:
        raise UserError("cells: none of a method yet; run `deltal compare` on")
    _check_problems(everything)
    spans = common_spans(used)
    shared = directions({name: everything[name] for name in present})
    against = {
        name: compare(everything[name], everything[reference], spans)
        for name in methods
        if name != reference
    }
    judge(against)
    shown = find_controls(controls, everything, reference)
    for name, one in (*against.items(), *shown["lr"]["at_highest"].items()):
        one["same_direction"] = share_direction(shared, name, reference)
    return _plain(
        {
            "format": FORMAT,
            "version": __version__,
            "settings": _settings(),
            "plan": plan,
            "cells": _count_cells(everything, plan),
            "problems": len(used[0]["evaluations"][0]["correct"]),
            "k": used[0]["k"],
            "environments": _environments(everything),
            "primary": PRIMARY,
            "spans": spans,
            "shortest": _shortest(present),
            "methods": {name: _method(some, spans) for name, some in present.items()},
            "comparisons": against,
            "frozen": [_frozen(one, plan) for one in frozen if plan.get("frozen")],
            "exponents": {
                name: one
                for name, some in present.items()
                if (one := exponents(list(some.values()))) is not None
            },
            "directions": shared,
            "controls": shown,
            "control_outcomes": {
                name: outcomes(list(everything[name].values()))
                for name in controls
                if everything[name]
            },
        }
    )


def _seeds(entry: dict[str, Any], plan: dict[str, Any]) -> list[int]:
    return sorted(entry.get("seeds") or plan["seeds"])


def _settings() -> dict[str, Any]:
    return {
        "alpha": ALPHA,
        "power": POWER,
        "resamples": RESAMPLES,
        "exact_pairs": EXACT_PAIRS,
        "permutations": PERMUTATIONS,
        "endpoints": list(ENDPOINTS),
    }


def _count_cells(everything: dict[str, Cells], plan: dict[str, Any]) -> dict[str, Any]:
    entries = plan["methods"] | plan["controls"]
    missing = [
        f"{name}/seed-{seed}"
        for name, entry in entries.items()
        for seed in _seeds(entry, plan)
        if seed not in everything[name]
    ]
    found = sum(map(len, everything.values()))
    return {"planned": found + len(missing), "complete": found, "missing": missing}


def _check_problems(everything: dict[str, Cells]) -> None:
    """Raises UserError where two cells are not of the same problems and samples."""
    first = None
    for name, some in everything.items():
        for seed, cell in some.items():
            counts = {len(evaluation["correct"]) for evaluation in cell["evaluations"]}
            first = first or (cell["k"], counts)
            if (cell["k"], counts) != first or len(counts) > 1:
                raise UserError(
                    f"cells/{name}/seed-{seed}.json: evaluated on other problems or samples than"
                    " the rest; delete it and run it again"
                )


def _environments(everything: dict[str, Cells]) -> list[dict[str, Any]]:
    texts = {
        json.dumps(cell["environment"], sort_keys=True)
        for some in everything.values()
        for cell in some.values()
    }
    return [json.loads(text) for text in sorted(texts)]


def _shortest(present: dict[str, Cells]) -> str:
    """The cell whose end is the horizon in tokens."""
    ends = {
        f"{name}/seed-{seed}": cell["evaluations"][-1]["tokens"]
        for name, some in present.items()
        for seed, cell in some.items()
    }
    return min(ends, key=lambda name: ends[name])


def _method(some: Cells, spans: dict[str, tuple[float, float]]) -> dict[str, Any]:
    runs = list(some.values())
    return {
        "seeds": list(some),
        "figures": figures(runs, spans),
        "outcomes": outcomes(runs),
        "accuracy_curve": accuracy_curve(runs, spans),
        "outcome_curves": outcome_curves(runs),
    }


def _frozen(one: dict[str, Any], plan: dict[str, Any]) -> dict[str, Any]:
    """Of a measurement at a warm-up what the page says."""
    sizes = {key: one[key] for key in ("warmup", "groups", "responses", "batch_groups")}
    fits = {name: None if x is None else x["fit"] for name, x in one["gradients"].items()}
    rows = {row["name"]: row for row in one["methods"]}
    methods = [rows[name] for name in plan["methods"] if name in rows]
    return sizes | {"beta": fits, "methods": methods}


def _plain(value: Any) -> Any:
    """The same as JSON has it: six significant digits, null for what is not finite."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
