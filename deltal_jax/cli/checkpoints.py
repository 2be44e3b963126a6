"""List the checkpoints of a run with their verdicts."""

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltal_jax.errors import UserError

if TYPE_CHECKING:
    from deltal_jax.checkpoints.reader import SavedSteps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare every byte with its checksum; exit code 1 where one is damaged",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")


def run(arguments: argparse.Namespace) -> int:
    """List them; the exit code."""
    from deltal_jax.checkpoints.reader import SavedSteps
    from deltal_jax.training import run_folder

    config = run_folder.load_run_config(arguments.run)
    saved = SavedSteps(run_folder.checkpoints_folder(arguments.run, config))
    metric = run_folder.best_metric(config, config.task.name)
    origin = {"config": run_folder.fixed_fields(config)}
    rows = {number: _row(saved, number, metric, arguments.verify) for number in saved.all()}
    for number, row in rows.items() if arguments.verify else ():
        if row["damage"] is None:
            try:
                saved.check_origin(number, origin)
            except UserError as error:
                row["damage"] = str(error)
    left = saved.all()  # a run that goes on deletes old ones
    rows = {number: row for number, row in rows.items() if number in left}
    damaged = any(row["damage"] for row in rows.values())
    if arguments.json:
        print(json.dumps(rows))
    else:
        print("\n".join(_table(rows, metric, arguments.verify)))
    return 1 if damaged and arguments.verify else 0


def _row(saved: "SavedSteps", number: int, metric: str, verify: bool) -> dict[str, Any]:
    """What is known of one."""
    from deltal_jax.checkpoints.manifest import Damaged, read_manifest

    row: dict[str, Any] = {"damage": saved.damage(number, contents=verify)}
    try:
        manifest = read_manifest(saved.path(number))
    except Damaged:
        return row
    position = manifest.position
    return row | {
        "phase": position.phase,
        "step": position.step,
        "bytes": sum(size for size, _ in manifest.files.values()),
        "saved_at": manifest.saved_at,
        metric: manifest.metrics.get(metric),
    }


def _table(rows: dict[int, dict[str, Any]], metric: str, verify: bool) -> list[str]:
    lines = [f"{'number':>8}  {'after':12} {'MB':>10}  {'saved':19}  {metric}  verdict"]
    for number, row in rows.items():
        verdict = f"damaged: {row['damage']}" if row["damage"] else "complete"
        if verify and not row["damage"]:
            verdict = "intact"
        after, size, saved, figure = "?", "?", "?", "-"
        if "phase" in row:
            after = f"{row['phase']} {row['step']}"
            size = f"{row['bytes'] / 1e6:.2f}"
            saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["saved_at"]))
            figure = "-" if row[metric] is None else f"{row[metric]:.3f}"
        lines.append(
            f"{number:>8}  {after:12} {size:>10}  {saved:19}  {figure:>{len(metric)}}  {verdict}"
        )
    return lines
