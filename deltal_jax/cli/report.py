"""Write one self-contained HTML page about a run, several runs or a comparison."""

import argparse
import json
from pathlib import Path

from deltal_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="run folders, or the folder of one comparison; seeds of one config become one curve",
    )
    parser.add_argument(
        "--to",
        metavar="FILE",
        help="default: report.html, of one folder in it, of several runs where you are",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")


def run(arguments: argparse.Namespace) -> int:
    """Write the page; the exit code."""
    from deltal_jax.report.comparison import PLAN, is_comparison
    from deltal_jax.report.page import write_page
    from deltal_jax.training.run_folder import CONFIG

    folders = [Path(name) for name in dict.fromkeys(arguments.runs)]
    for folder in folders:
        if is_comparison(folder) and len(folders) > 1:
            raise UserError(f"RUN: {folder} is a comparison, which has a page alone; name only it")
        if not is_comparison(folder) and not (folder / CONFIG).is_file():
            raise UserError(f"RUN: {folder} has no {CONFIG} and no {PLAN}; name a run's folder")
    default = folders[0] / "report.html" if len(folders) == 1 else Path("report.html")
    target = Path(arguments.to) if arguments.to else default
    if target.is_dir():
        raise UserError(f"--to: {target} is a folder; name a file in it")
    try:
        write_page(folders, target)
    except OSError as error:
        raise UserError(f"--to: cannot write {target}: {error.strerror}") from error
    size = target.stat().st_size
    if arguments.json:
        print(json.dumps({"report": str(target), "runs": len(folders), "bytes": size}))
    else:
        print(
            f"{target}: {len(folders)} runs, {size / 2**10:,.0f} KiB"
            if len(folders) > 1
            else f"{target}: {size / 2**10:,.0f} KiB"
        )
    return 0
