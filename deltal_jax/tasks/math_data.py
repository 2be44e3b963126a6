r"""Problems of mathematics from files: JSON, JSON lines or Parquet, in the formats they come in.

ORZ-57k          [{"from": "human", "value": …}, {"from": …, "ground_truth": {"value": …}}]
its test sets    {"prompt": [{"from": "user", "value": …}], "final_answer": …}
verl             {"prompt": [{"role": "user", "content": …}], "reward_model":
                 {"ground_truth": …}, "data_source": …}; the prompt is used as it is
GSM8K            {"question": …, "answer": "… #### 42"}
MATH500, AIME24, AMC, Minerva, and ours
                 {"problem" or "question": …, "answer": …, "source": …, "id": …}
MATH             {"problem": …, "solution": "… \boxed{42} …"}
"""

import collections
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deltal_jax.errors import UserError
from deltal_jax.tasks.math_rules import MAX_ANSWER_LENGTH, boxed

_PROBLEM = ("problem", "Problem", "question", "Question", "prompt")
_ANSWER = ("answer", "Answer", "final_answer")
_ID = ("id", "ID", "unique_id")
_SOURCE = ("source", "data_source")
_PROMPTING = ("user", "human", "system")


@dataclasses.dataclass(frozen=True)
class Example:
    """One problem with its answer. `complete`: the text is a whole prompt, without a template."""

    text: str
    answer: str
    source: str
    id: str
    complete: bool = False

    def row(self) -> dict[str, str]:
        """One line of our own format."""
        kind = "prompt" if self.complete else "problem"
        return {kind: self.text, "answer": self.answer, "source": self.source, "id": self.id}


@dataclasses.dataclass
class Dropped:
    """Rows that are no problem: how many by reason, and the first of each."""

    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    first: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(self, reason: str, row: Any, number: int) -> None:
        self.counts[reason] += 1
        self.first.setdefault(reason, f"row {number}: {' '.join(repr(row).split())[:120]}")


class _DropError(Exception):
    """Why a row is no problem."""


def read_examples(path: Path, field: str) -> tuple[list[Example], Dropped]:
    """The problems of a file, in its order, and what of it was dropped.

    Raises UserError, naming the `field` that said so, where the file can't be read or has none.
    """
    examples, dropped = [], Dropped()
    for number, row in enumerate(_rows(path, field)):
        try:
            examples.append(_example(row, path.stem, number))
        except _DropError as reason:
            dropped.add(str(reason), row, number)
    if not examples:
        why = ", ".join(f"{reason}: {count}" for reason, count in dropped.counts.items())
        raise UserError(f"{field}: {path} has no problem with an answer ({why or 'it is empty'})")
    return examples, dropped


def _rows(path: Path, field: str) -> Iterator[Any]:
    try:
        if path.suffix == ".parquet":
            yield from _parquet_rows(path, field)
            return
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{field}: {path} can't be read: {error}") from error
    if path.suffix == ".json":
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{field}: {path} is not JSON: {error}; JSON lines end in .jsonl"
            ) from error
        if not isinstance(rows, list):
            raise UserError(f"{field}: {path} is no list of problems")
        yield from rows
        return
    if path.suffix != ".jsonl":
        raise UserError(f"{field}: {path} ends neither in .json, .jsonl nor .parquet")
    for line in text.split("\n"):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                yield _NotJson(line)


class _NotJson(str):
    """A line that is none."""


def _parquet_rows(path: Path, field: str) -> Iterator[Any]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise UserError(
            f"{field}: Parquet needs pyarrow; pip install 'deltal-jax[math]'"
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except ArrowInvalid as error:
        raise UserError(
            f"{field}: {path} is not Parquet: {' '.join(str(error).split())}"
        ) from error


def _example(row: Any, stem: str, number: int) -> Example:
    if isinstance(row, _NotJson):
        raise _DropError("not JSON")
    if isinstance(row, list):
        return _conversation(row, stem, number)
    if not isinstance(row, dict):
        raise _DropError("neither an object nor a conversation")
    extra = row.get("extra_info")
    index = extra.get("index") if isinstance(extra, dict) else None
    name = _first(row, _ID)
    source = _first(row, _SOURCE)
    text, complete = _prompt(row)
    return Example(
        text,
        _answer(row),
        stem if source is None else str(source),
        str(number if name is None and index is None else index if name is None else name),
        complete,
    )


def _conversation(turns: list, stem: str, number: int) -> Example:
    """A row of ORZ-57k: a question, and a turn that has the known answer."""
    if len(turns) != 2 or not all(isinstance(turn, dict) for turn in turns):
        raise _DropError("a conversation of several turns")
    text, truth = turns[0].get("value"), turns[1].get("ground_truth")
    if not isinstance(text, str) or not text.strip():
        raise _DropError("no problem")
    if not isinstance(truth, dict):
        raise _DropError("no answer")
    return Example(text.strip(), _clean(truth.get("value")), stem, str(number))


def _prompt(row: dict) -> tuple[str, bool]:
    """The text of a row, and whether it is a whole prompt."""
    whole = "reward_model" in row or ("prompt" in row and "source" in row)
    value = _first(row, ("prompt", *_PROBLEM) if whole else _PROBLEM)
    if isinstance(value, list):
        turns = [turn for turn in value if isinstance(turn, dict)]
        if len(turns) < len(value) or any(_role(turn) not in _PROMPTING for turn in turns):
            raise _DropError("a conversation of several turns")
        value = "\n\n".join(str(turn.get("content", turn.get("value", ""))) for turn in turns)
    if not isinstance(value, str) or not value.strip():
        raise _DropError("no problem")
    return (value, True) if whole and "prompt" in row else (value.strip(), False)


def _role(turn: dict) -> Any:
    return turn.get("role", turn.get("from"))


def _answer(row: dict) -> str:
    model = row.get("reward_model")
    if isinstance(model, dict):
        return _clean(model.get("ground_truth"))
    value = _first(row, _ANSWER)
    if isinstance(value, str) and "####" in value:
        return _clean(value.rpartition("####")[2].replace(",", ""))
    if value is None and isinstance(row.get("solution"), str):
        value = boxed(row["solution"])
    return _clean(value)


def _clean(value: Any) -> str:
    """The answer as text; the first where there are several."""
    if isinstance(value, list):
        value = value[0] if value else None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise _DropError("no answer")
    value = value.strip()
    if value[0] == value[-1] == "$" and value.count("$") == 2:
        value = value[1:-1].strip()
    if len(value) > MAX_ANSWER_LENGTH:
        raise _DropError(f"an answer of over {MAX_ANSWER_LENGTH} characters")
    if not value:
        raise _DropError("no answer")
    return value


def _first(row: dict, names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)
