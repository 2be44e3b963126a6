"""CountDown's problems from files: JSON, JSON lines or Parquet.

Countdown-Tasks-3to4, and ours   {"nums": [6, 3, 8], "target": 42}
verl                             {"prompt": [{"role": "user", "content": …}], "reward_model":
                                 {"ground_truth": {"numbers": …, "target": …}}, "data_source": …};
                                 the prompt is used as it is
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from deltal_jax.data.epochs import epochs, order_fingerprint
from deltal_jax.data.rows import DropError, Dropped, NotJson, Rows, check_text, open_rows
from deltal_jax.errors import UserError
from deltal_jax.tasks.countdown.problems import identity

#: Rows to train on that are looked at before a run begins, to say what is dropped.
LOOKED_AT = 50_000
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
        field = "task.countdown.train"
        self._train = kept = open_rows(train, field)
        self.count, start = min(train_rows, len(kept)), train_rows
        if held_out is not None:
            field, start = "task.countdown.eval", 0
            kept = open_rows(held_out, field)
        self._files = {"task.countdown.train": self._train, field: kept}
        self.dropped = Dropped()
        self.held_out = list(_examples(kept, start, held_out_rows, self.dropped))
        if not self.held_out:
            where = f" after its first {start:,} rows; lower task.countdown.rows, or set "
            where = f"{where}task.countdown.eval" if start else ""
            raise UserError(f"{field}: {kept.path} has no problem to evaluate on{where}")
        self.known = frozenset(identity(x.numbers, x.target) for x in self.held_out)
        self._streams: dict[int, Sequence[Example | None]] = {}
        usable = 0
        for number in range(min(self.count, LOOKED_AT)):
            try:
                self._usable(number)
                usable += 1
            except DropError as reason:
                self.dropped.add(str(reason), self._train[number], number)
        if not usable:
            raise UserError(f"task.countdown.train: {train} has no problem to train on")

    @property
    def summary(self) -> str:
        """How many problems there are, and what of the rows is dropped."""
        reasons = [f"{count:,} {reason}" for reason, count in self.dropped.counts.most_common()]
        said = f"task: {self.count:,} rows to train on, {len(self.held_out):,} problems held out"
        return f"{said}; dropped: {', '.join(reasons)}" if reasons else said

    def fingerprint(self) -> dict[str, str]:
        """What the problems and their order depend on beside the config."""
        files = {field: rows.fingerprint for field, rows in self._files.items()}
        return files | {"order": order_fingerprint(self.count)}

    def at(self, seed: int, position: int) -> Example | None:
        """Every row once an epoch, in an order of the seed and the epoch; None where it is no
        problem to train on."""
        if seed not in self._streams:
            self._streams[seed] = epochs(self.count, seed, self._read)
        return self._streams[seed][position]

    def _read(self, number: int) -> Example | None:
        try:
            return self._usable(number)
        except DropError:
            return None

    def _usable(self, number: int) -> Example:
        """The problem of a row to train on. Raises DropError where there is none."""
        example = make_example(self._train[number])
        if identity(example.numbers, example.target) in self.known:
            raise DropError(_HELD_OUT)
        return example


def stream_examples(rows: Rows, dropped: Dropped, field: str) -> Iterator[Example]:
    """The problems of all rows one by one; `dropped` grows on the way.

    Raises UserError, naming the `field` that said so, where there is none.
    """
    found = False
    for example in _examples(rows, 0, len(rows), dropped):
        found = True
        yield example
    if not found:
        raise UserError(f"{field}: {rows.path} has no problem of CountDown")


def _examples(rows: Rows, start: int, count: int, dropped: Dropped) -> Iterator[Example]:
    for number in range(start, min(start + count, len(rows))):
        row = rows[number]
        try:
            yield make_example(row)
        except DropError as reason:
            dropped.add(str(reason), row, number)


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
