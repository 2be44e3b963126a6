"""CountDown's problems from files: JSON, JSON lines or Parquet.

Countdown-Tasks-3to4, and ours   {"nums": [6, 3, 8], "target": 42}
verl                             {"prompt": [{"role": "user", "content": …}], "reward_model":
                                 {"ground_truth": {"numbers": …, "target": …}}, "data_source": …};
                                 the prompt is used as it is
"""

import dataclasses
from pathlib import Path
from typing import Any

from deltal_jax.data.rows import NotJson, Rows, open_rows
from deltal_jax.errors import UserError
from deltal_jax.tasks.countdown_problems import identity
from deltal_jax.tasks.math_data import Dropped


@dataclasses.dataclass(frozen=True)
class Example:
    """One problem. `prompt` is empty where the row has none of its own."""

    numbers: tuple[int, ...]
    target: int
    prompt: str = ""

    def row(self) -> dict[str, Any]:
        """One line of our own format."""
        row = {"nums": list(self.numbers), "target": self.target}
        return row | {"prompt": self.prompt} if self.prompt else row


@dataclasses.dataclass(frozen=True)
class Given:
    """Problems to train on and held-out ones, the `identity` of each of the latter, and what of the
    files was dropped."""

    train: list[Example]
    held_out: list[Example]
    known: frozenset[tuple[tuple[int, ...], int]]
    dropped: Dropped


class _DropError(Exception):
    """Why a row is no problem."""


def read_given(train: Path, train_rows: int, held_out: Path | None, held_out_rows: int) -> Given:
    """The first `train_rows` of a file to train on, and the next `held_out_rows`, or the first ones
    of a file of their own, to evaluate on. A problem of the latter is never trained on.

    Raises UserError where a file can't be read, or where either part has no problem.
    """
    rows, field = open_rows(train, "task.countdown.train"), "task.countdown.train"
    examples, dropped = read_examples(rows, 0, train_rows)
    if held_out is None:
        kept, bad = read_examples(rows, train_rows, held_out_rows)
    else:
        field = "task.countdown.eval"
        kept, bad = read_examples(open_rows(held_out, field), 0, held_out_rows)
    if not kept:
        why = f"{held_out or train} has no problem"
        if held_out is None:
            why += f" after its first {train_rows:,} rows; lower task.countdown.train_rows, or set"
            why += " task.countdown.eval"
        raise UserError(f"{field}: {why}")
    known = frozenset(identity(x.numbers, x.target) for x in kept)
    trained = []
    for number, example in enumerate(examples):
        if identity(example.numbers, example.target) in known:
            dropped.add("also held out", example.row(), number)
        else:
            trained.append(example)
    if not trained:
        raise UserError(f"task.countdown.train: {train} has no problem to train on")
    dropped.counts += bad.counts
    dropped.first = bad.first | dropped.first
    return Given(trained, kept, known, dropped)


def read_examples(rows: Rows, start: int, count: int | None) -> tuple[list[Example], Dropped]:
    """The problems of rows start … start + count − 1, or of all from `start`; what was dropped."""
    examples, dropped = [], Dropped()
    stop = len(rows) if count is None else min(start + count, len(rows))
    for number in range(start, stop):
        row = rows[number]
        try:
            examples.append(_example(row))
        except _DropError as reason:
            dropped.add(str(reason), row, number)
    return examples, dropped


def _example(row: Any) -> Example:
    if isinstance(row, NotJson):
        raise _DropError("not JSON")
    if not isinstance(row, dict):
        raise _DropError("not an object")
    model = row.get("reward_model")
    truth = model.get("ground_truth") if isinstance(model, dict) else row
    if not isinstance(truth, dict):
        raise _DropError("no numbers and target")
    numbers = truth.get("numbers", truth.get("nums"))
    if not isinstance(numbers, list) or len(numbers) < 2:
        raise _DropError("not two numbers or more")
    target = _whole(truth.get("target"))
    return Example(tuple(map(_whole, numbers)), target, _prompt(row.get("prompt")))


def _whole(value: Any) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 10**9:
        raise _DropError("a number or target that is no whole number from 0 to 999,999,999")
    return value


def _prompt(value: Any) -> str:
    """The text of a prompt, or of the turns that one has."""
    if value is None:
        return ""
    turns = [{"content": value}] if isinstance(value, str) else value
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise _DropError("a prompt that is no text")
    contents = [text for turn in turns if isinstance(text := turn.get("content"), str)]
    if len(contents) < len(turns):
        raise _DropError("a prompt that is no text")
    if any(turn.get("role") == "assistant" for turn in turns):
        raise _DropError("a conversation of several turns")
    return "\n\n".join(contents)
