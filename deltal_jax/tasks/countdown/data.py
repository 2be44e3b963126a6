"""CountDown's problems from files: JSON, JSON lines or Parquet.

Countdown-Tasks-3to4, and ours   {"nums": [6, 3, 8], "target": 42}
verl                             {"prompt": [{"role": "user", "content": …}], "reward_model":
                                 {"ground_truth": {"numbers": …, "target": …}}, "data_source": …};
                                 the prompt is used as it is
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deltal_jax.data.rows import DropError, Dropped, NotJson, Rows, check_text, examples, open_rows
from deltal_jax.data.training_rows import TrainingRows
from deltal_jax.errors import UserError
from deltal_jax.tasks.countdown.problems import identity

_HELD_OUT = "also held out"


@dataclasses.dataclass(frozen=True)
class Example:
    """One problem. `messages` are the (role, content) of its prompt where the row has one."""

    numbers: tuple[int, ...]
    target: int
    messages: tuple[tuple[str, str], ...] = ()

    def row(self) -> dict[str, Any]:
        """One line of our own format."""
        row = {"nums": list(self.numbers), "target": self.target}
        turns = [{"role": role, "content": content} for role, content in self.messages]
        return row | {"prompt": turns} if turns else row


class Given:
    """The first `train_rows` of a file to train on, and the next `held_out_rows`, or the first ones
    of a file of their own, to evaluate on.

    Of the former a row is read when its turn comes; the latter are held in memory, and none of them
    is trained on. Raises UserError where a file can't be read, or where either part has no problem.
    """

    def __init__(self, train: Path, train_rows: int, held_out_rows: int, held_out: Path | None):
        field, start = "task.countdown.train", train_rows
        rows = kept = open_rows(train, field)
        if held_out is not None:
            field, start = "task.countdown.eval", 0
            kept = open_rows(held_out, field)
        self._files = {"task.countdown.train": rows, field: kept}
        numbers = range(start, min(start + held_out_rows, len(kept)))
        self.held_out = list(examples(kept, maker(kept), Dropped(), numbers))
        if not self.held_out:
            where = f" after its first {start:,} rows; lower task.countdown.rows, or set "
            where = f"{where}task.countdown.eval" if start else ""
            raise UserError(f"{field}: {kept.path} has no problem to evaluate on{where}")
        self.known = frozenset(identity(x.numbers, x.target) for x in self.held_out)
        self.train = TrainingRows(rows, self._make, "task.countdown.train", count=train_rows)

    @property
    def summary(self) -> str:
        """How many problems there are, and what of the rows is dropped."""
        return self.train.summary(len(self.held_out))

    def fingerprint(self) -> dict[str, str]:
        """What the problems and their order depend on beside the config."""
        files = {field: rows.fingerprint for field, rows in self._files.items()}
        return files | {"order": self.train.order}

    def _make(self, row: Any, _: int) -> Example:
        """The problem of a row to train on. Raises DropError where there is none."""
        example = make_example(row)
        if identity(example.numbers, example.target) in self.known:
            raise DropError(_HELD_OUT)
        return example


def maker(_: Rows) -> Callable[[Any, int], Example]:
    """`make_example` of the rows of a file."""
    return lambda row, _: make_example(row)


def make_example(row: Any) -> Example:
    """The problem of a row. Raises DropError where it is none."""
    if isinstance(row, NotJson):
        raise DropError("not JSON")
    if not isinstance(row, dict):
        raise DropError("not an object")
    model = row.get("reward_model")
    truth = model.get("ground_truth") if isinstance(model, dict) else row
    if not isinstance(truth, dict):
        raise DropError("no numbers and target")
    numbers = truth.get("numbers", truth.get("nums"))
    if not isinstance(numbers, list) or len(numbers) < 2:
        raise DropError("not two numbers or more")
    target = _whole(truth.get("target"))
    prompt = row.get("prompt")
    messages = () if prompt is None else _messages(prompt)
    return Example(tuple(map(_whole, numbers)), target, messages)


def _whole(value: Any) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 10**9:
        raise DropError("a number or target that is no whole number from 0 to 999,999,999")
    return value


def _messages(value: Any) -> tuple[tuple[str, str], ...]:
    """The turns of a prompt; one where it is plain text."""
    turns = [{"content": value}] if isinstance(value, str) else value
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise DropError("a prompt that is no text")
    found = tuple((str(turn.get("role", "user")), turn.get("content")) for turn in turns)
    if not found or not all(isinstance(content, str) for _, content in found):
        raise DropError("a prompt that is no text")
    if any(role not in ("user", "system") for role, _ in found):
        raise DropError("a conversation of several turns")
    messages = tuple((role, str(content)) for role, content in found)
    check_text("".join(content for _, content in messages))
    return messages
