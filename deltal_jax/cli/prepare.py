"""Convert a published file of problems to JSON lines, and say what of it was dropped."""

import argparse
import json
import os
from pathlib import Path

from deltal_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "name", metavar="NAME", help="what the data are called, such as math500: their source"
    )
    parser.add_argument(
        "--from",
        dest="source",
        required=True,
        metavar="FILE",
        help=".json, .jsonl or .parquet, in the format of ORZ-57k, MATH500, AIME24, AMC, Minerva, "
        "GSM8K or verl; or, with --task countdown, of Countdown-Tasks-3to4 or verl",
    )
    parser.add_argument(
        "--task", choices=("math", "countdown"), default="math", help="what the problems are of"
    )
    parser.add_argument(
        "--to", dest="target", required=True, metavar="FILE", help="a new .jsonl file"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")


def run(arguments: argparse.Namespace) -> int:
    """Convert; the exit code."""
    from deltal_jax.data.rows import Dropped, examples, nothing_in, open_rows
    from deltal_jax.tasks.countdown import data as countdown_data
    from deltal_jax.tasks.math import data as math_data

    target = Path(arguments.target)
    if target.suffix != ".jsonl":
        raise UserError(f"--to: {target} does not end in .jsonl")
    if target.exists():
        raise UserError(f"--to: {target} exists; name a new file")
    data = countdown_data if arguments.task == "countdown" else math_data
    rows, dropped = open_rows(Path(arguments.source), "--from"), Dropped()
    count = 0
    # Under another name until it is whole.
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with partial.open("x", encoding="utf-8") as file:
            for example in examples(rows, data.maker(rows), dropped):
                file.write(json.dumps(example.row() | {"source": arguments.name}) + "\n")
                count += 1
        if not count:
            raise nothing_in(rows.path, dropped, "--from")
        partial.rename(target)
    except OSError as error:
        raise UserError(f"--to: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    if arguments.json:
        found = {"problems": count, "dropped": dropped.counts, "first": dropped.first}
        print(json.dumps(found, ensure_ascii=False))
        return 0
    print(f"{target}: {count} problems, {dropped.counts.total()} rows dropped")
    for reason, count in dropped.counts.most_common():
        print(f"  {count:>7}  {reason}\n           first {dropped.first[reason]}")
    return 0
