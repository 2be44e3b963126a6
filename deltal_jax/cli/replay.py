"""Run a step that a run has dumped again, and say what in it is not finite."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from deltal_jax.config import parse_overrides

if TYPE_CHECKING:
    from deltal_jax.guard.dumps import Dump
    from deltal_jax.guard.replay import Replayed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("dump", metavar="DUMP", type=Path, help="a folder in RUN/dumps")
    parser.add_argument(
        "items",
        nargs="*",
        default=[],  # or argparse says that they are required
        metavar="key.sub=value",
        help="how to compute it instead, such as model.compute_dtype=float32",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")


def run(arguments: argparse.Namespace) -> int:
    """Replay; the exit code, which is 1 where bits differ that should not."""
    from deltal_jax.guard.dumps import load_dump
    from deltal_jax.guard.replay import as_json, replay

    dump = load_dump(arguments.dump, parse_overrides(arguments.items))
    found = replay(dump)
    if arguments.json:
        print(json.dumps({"step": dump.record.step, "exact": dump.exact} | as_json(found)))
    else:
        _print(dump, found)
    return 1 if dump.exact and found.differing else 0


def _print(dump: "Dump", found: "Replayed") -> None:
    for number, report in enumerate(found.reports, start=found.first):
        epoch, minibatch = divmod(number, found.updates_per_epoch)
        norm = report.norms["optim/grad_norm"]
        print(
            f"RL step {dump.record.step}, update {number + 1} (epoch {epoch + 1}, mini-batch "
            f"{minibatch + 1}): loss {report.loss:.9g}, gradient norm {norm:.9g}"
            + (f"; skipped: {report.skipped}" if report.skipped else "")
        )
    print(f"\n{_verdict(dump, found)}\n")
    print(f"{'':44}{'recorded':>18}{'replayed':>18}")
    first = f"update {found.looked_at + 1}: "
    for name, (was, now) in found.figures.items():
        differs = name in found.differing
        if name.startswith("update ") and not name.startswith(first) and not differs:
            continue
        print(
            f"{name:44}{'' if was is None else f'{was:.9g}':>18}{now:>18.9g}"
            + "  differs" * differs
        )
    print(f"\nmicro-batches of update {found.looked_at + 1}")
    for number, bucket in enumerate(found.buckets):
        state = "finite" if bucket.health.finite else "NOT FINITE"
        print(
            f"  bucket {number}: {bucket.rows} rows of {bucket.width} tokens, loss "
            f"{bucket.health.loss:.9g}, {state}"
        )
        for response, bad in bucket.responses.items():
            said = ", ".join(f"{name} {value:g}" for name, value in bad.items())
            print(f"    response {response}: {said}")
    print(f"\n{'parameter':44}{'gradient norm':>18}{'not finite':>18}")
    for path, (norm, count) in found.health.parameters.items():
        print(f"{path:44}{norm:>18.9g}{count:>18}")


def _verdict(dump: "Dump", found: "Replayed") -> str:
    compared = sum(was is not None for was, _ in found.figures.values())
    if not compared:
        return "nothing to compare with: the run ended before these updates did"
    if dump.inexact:
        return f"{dump.inexact} equal to rounding at best; {len(found.differing)} differ"
    if found.differing:
        return f"{len(found.differing)} of {compared} figures differ from those recorded"
    return f"all {compared} figures are bit for bit those recorded"
