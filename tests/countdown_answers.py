"""The table of CountDown answers that were judged by hand, and what the grammars make of it."""

import collections
import csv
import dataclasses
from pathlib import Path

from deltal_jax.tasks.base import Verdict
from deltal_jax.tasks.countdown.rules import GRAMMARS
from deltal_jax.tasks.countdown.text import CountDownText

TABLE = Path(__file__).parent / "data" / "countdown_answers.tsv"


@dataclasses.dataclass(frozen=True)
class Row:
    """A response, the problem, and whether the task as it is told to a person is solved.

    `differs` has, by grammar, why it is known to judge otherwise.
    """

    kind: str
    response: str
    numbers: tuple[int, ...]
    target: int
    right: bool
    differs: dict[str, str]


def read_table() -> list[Row]:
    """In the file, `\\n`, `\\r`, `\\t` and `\\u0663` stand for what they are in Python."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        lines = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [
            Row(
                line["kind"],
                line["response"].encode("ascii").decode("unicode_escape"),
                tuple(map(int, line["numbers"].split())),
                int(line["target"]),
                line["verdict"] == "right",
                {name: line[name] for name in GRAMMARS if line[name]},
            )
            for line in lines
        ]


def verdicts(row: Row) -> dict[str, Verdict]:
    """What each grammar says."""
    answer = {"numbers": list(row.numbers), "target": row.target}
    return {name: CountDownText(grammar=name).verify(row.response, answer) for name in GRAMMARS}


def agreement() -> str:
    """A table of how often each grammar agrees with people, and how often the two differ; then
    every known difference, with its reason."""
    rows = read_table()
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for row in rows:
        said = {name: verdict.correct for name, verdict in verdicts(row).items()}
        for kind in ("all", row.kind):
            counts[kind]["rows"] += 1
            counts[kind]["apart"] += len(set(said.values())) > 1
            for name, correct in said.items():
                counts[kind][name] += correct == row.right
    columns = ["rows", *GRAMMARS, "apart"]
    lines = [f"{'agrees with people':20}" + "".join(f"{name:>12}" for name in columns)]
    for kind, found in counts.items():
        lines.append(f"{kind:20}" + "".join(f"{found[name]:>12}" for name in columns))
    lines += ["", f"{'response':50}{'problem':20}{'people':10}who differs"]
    for row in rows:
        problem = f"{' '.join(map(str, row.numbers))} -> {row.target}"
        for name, reason in row.differs.items():
            said = "right" if row.right else "wrong"
            lines.append(f"{row.response!r:50}{problem:20}{said:10}{name}: {reason}")
    return "\n".join(lines)
