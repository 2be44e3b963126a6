"""The table of mathematical answers that people judged, and what verifiers make of it."""

import collections
import csv
import dataclasses
import functools
from pathlib import Path

from deltal_jax.tasks.math.rules import WARM_UP, judge
from deltal_jax.tasks.workers import Limits, Workers

TABLE = Path(__file__).parent / "data" / "math_answers.tsv"
VERIFIERS = ("reference", "math_verify")


@dataclasses.dataclass(frozen=True)
class Row:
    """An answer, the known one, and whether people call it right.

    `differs` has, by verifier, why it is known to judge otherwise.
    """

    kind: str
    answer: str
    gold: str
    right: bool
    differs: dict[str, str]


def read_table() -> list[Row]:
    with TABLE.open(encoding="utf-8", newline="") as file:
        lines = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [
            Row(
                line["kind"],
                line["answer"],
                line["gold"],
                line["verdict"] == "right",
                {name: line[name] for name in VERIFIERS if line[name]},
            )
            for line in lines
        ]


def judgements(verifier: str, rows: list[Row]) -> list[str]:
    """What a verifier says of each row: correct, wrong, unparsed, or how its call ended."""
    warm_up = [(verifier, *call) for call in WARM_UP]
    function = f"{judge.__module__}:{judge.__name__}"
    with Workers(function, 2, limits=Limits(timeout=5), warm_up=warm_up) as workers:
        outcomes = workers.map((verifier, f"\\boxed{{{row.answer}}}", row.gold) for row in rows)
    return [x.value[0] if x.status == "done" else x.status for x in outcomes]


@functools.cache
def table_judgements() -> dict[str, list[str]]:
    """Those of every verifier on the whole table."""
    return {verifier: judgements(verifier, read_table()) for verifier in VERIFIERS}


def agreement() -> str:
    """A table of how often each verifier agrees with people, and the two with each other; then
    every known difference, with its reason."""
    rows = read_table()
    said = table_judgements()
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for row, *verdicts in zip(rows, *said.values(), strict=True):
        for kind in ("all", row.kind):
            counts[kind]["rows"] += 1
            counts[kind]["apart"] += (verdicts[0] == "correct") != (verdicts[1] == "correct")
            for verifier, verdict in zip(VERIFIERS, verdicts, strict=True):
                counts[kind][verifier] += (verdict == "correct") == row.right
                counts[kind][f"{verifier} unparsed"] += verdict == "unparsed"
    columns = ["rows", *VERIFIERS, *(f"{name} unparsed" for name in VERIFIERS), "apart"]
    lines = [f"{'agrees with people':20}" + "".join(f"{name:>22}" for name in columns)]
    for kind, found in counts.items():
        lines.append(f"{kind:20}" + "".join(f"{found[name]:>22}" for name in columns))
    lines += ["", f"{'answer':40}{'known answer':40}{'people':10}who differs"]
    for row in rows:
        said_by_people = "right" if row.right else "wrong"
        for verifier, reason in row.differs.items():
            pair = f"{row.answer:40}{row.gold:40}{said_by_people:10}"
            lines.append(f"{pair}{verifier}: {reason}")
    return "\n".join(lines)
