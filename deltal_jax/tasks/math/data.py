r"""Problems of mathematics from files: JSON, JSON lines or Parquet, in the formats they come in.

ORZ-57k          [{"from": "human", "value": …}, {"from": …, "ground_truth": {"value": …}}]
its test sets    {"prompt": [{"from": "user", "value": …}], "final_answer": …}
verl             {"prompt": [{"role": "user", "content": …}], "reward_model":
                 {"ground_truth": …}, "data_source": …}; the prompt is used as it is: its
                 messages by a chat template, or their text where there is none
GSM8K            {"question": …, "answer": "… #### 42"}
MATH500, AIME24, AMC, Minerva, and ours
                 {"problem" or "question": …, "answer": …, "source": …, "id": …}
MATH             {"problem": …, "solution": "… \boxed{42} …"}
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from deltal_jax.data.rows import (
    DropError,
    Dropped,
    NotJson,
    Rows,
    check_text,
    examples,
    nothing_in,
)
from deltal_jax.tasks.math.rules import MAX_ANSWER_LENGTH, boxed

_PROBLEM = ("problem", "Problem", "question", "Question", "prompt")
_ANSWER = ("answer", "Answer", "final_answer")
_ID = ("id", "ID", "unique_id")
_SOURCE = ("source", "data_source")
_PROMPTING = ("user", "human", "system")


@dataclasses.dataclass(frozen=True)
class Example:
    """One problem with its answer. `complete`: the text is a whole prompt, without a template;
    `messages` are its (role, content) where it came as a conversation."""

    text: str
    answer: str
    source: str
    id: str
    complete: bool = False
    messages: tuple[tuple[str, str], ...] = ()

    def row(self) -> dict[str, Any]:
        """One line of our own format."""
        known = {"answer": self.answer, "source": self.source, "id": self.id}
        if self.messages:
            turns = [{"role": role, "content": content} for role, content in self.messages]
            return {"prompt": turns} | known
        return {"prompt" if self.complete else "problem": self.text} | known


def read_examples(rows: Rows, field: str) -> tuple[list[Example], Dropped]:
    """All problems of a file, in its order, and what of it was dropped.

    Raises UserError, naming the `field` that said so, where it has none.
    """
    dropped = Dropped()
    found = list(examples(rows, maker(rows), dropped))
    if not found:
        raise nothing_in(rows.path, dropped, field)
    return found, dropped


def maker(rows: Rows) -> Callable[[Any, int], Example]:
    """`make_example` of the rows of this file, whose name is the source of those that have none."""
    return lambda row, number: make_example(row, rows.path.stem, number)


def make_example(row: Any, stem: str, number: int) -> Example:
    """The problem of a row. Raises DropError where it is none."""
    if isinstance(row, NotJson):
        raise DropError("not JSON")
    if isinstance(row, list):
        example = _conversation(row, stem, number)
    elif isinstance(row, dict):
        example = _object(row, stem, number)
    else:
        raise DropError("neither an object nor a conversation")
    check_text(example.text + example.answer + example.source + example.id)
    return example


def _object(row: dict, stem: str, number: int) -> Example:
    extra = row.get("extra_info")
    index = extra.get("index") if isinstance(extra, dict) else None
    name = _first(row, _ID)
    source = _first(row, _SOURCE)
    text, complete, messages = _prompt(row)
    return Example(
        text,
        _answer(row),
        stem if source is None else str(source),
        str(number if name is None and index is None else index if name is None else name),
        complete,
        messages,
    )


def _conversation(turns: list, stem: str, number: int) -> Example:
    """A row of ORZ-57k: a question, and a turn that has the known answer."""
    if len(turns) != 2 or not all(isinstance(turn, dict) for turn in turns):
        raise DropError("a conversation of several turns")
    text, truth = turns[0].get("value"), turns[1].get("ground_truth")
    if not isinstance(text, str) or not text.strip():
        raise DropError("no problem")
    if not isinstance(truth, dict):
        raise DropError("no answer")
    return Example(text.strip(), _clean(truth.get("value")), stem, str(number))


def _prompt(row: dict) -> tuple[str, bool, tuple[tuple[str, str], ...]]:
    """The text of a row, whether it is a whole prompt, and its messages if it is a conversation."""
    whole = "reward_model" in row or ("prompt" in row and "source" in row)
    value, messages = _first(row, ("prompt", *_PROBLEM) if whole else _PROBLEM), ()
    if isinstance(value, list):
        turns = [turn for turn in value if isinstance(turn, dict)]
        if len(turns) < len(value) or any(_role(turn) not in _PROMPTING for turn in turns):
            raise DropError("a conversation of several turns")
        messages = tuple(
            ("user" if _role(turn) == "human" else _role(turn), _content(turn)) for turn in turns
        )
        value = "\n\n".join(content for _, content in messages)
    if not isinstance(value, str) or not value.strip():
        raise DropError("no problem")
    if whole and "prompt" in row:
        return value, True, messages
    return value.strip(), False, ()


def _content(turn: dict) -> str:
    return str(_first(turn, ("content", "value")) or "")


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
        raise DropError("no answer")
    value = value.strip()
    if value[0] == value[-1] == "$" and value.count("$") == 2:
        value = value[1:-1].strip()
    if len(value) > MAX_ANSWER_LENGTH:
        raise DropError(f"an answer of over {MAX_ANSWER_LENGTH} characters")
    if not value:
        raise DropError("no answer")
    return value


def _first(row: dict, names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)
