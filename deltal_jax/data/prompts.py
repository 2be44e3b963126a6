"""Problems to padded prompts, addressed by their position in a stream, so that order resumes
exactly."""

import dataclasses
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Literal

import numpy as np

from deltal_jax.data.chat import encode_chat
from deltal_jax.data.tokenizer import Tokenizer, train_text_tokenizer, train_word_tokenizer
from deltal_jax.errors import UserError
from deltal_jax.tasks.base import Problem, Task
from deltal_jax.types import Prompts

#: Demonstrations that a tokenizer of free text is trained on.
TOKENIZER_TEXTS = 300
#: Positions in a row that may give no prompt.
MAX_DROPPED = 10_000
#: Characters of a prompt that a message has at most.
MAX_SHOWN = 80
#: Why a position gives no prompt: its row is no problem, or its prompt is too long.
Drop = Literal["row", "overlong"]


@dataclasses.dataclass(frozen=True)
class Drawn:
    """The next prompts of a training stream."""

    prompts: Prompts
    #: The first position behind the last prompt.
    next_position: int
    #: The positions on the way that gave none.
    dropped: dict[int, Drop]


def draw_prompts(
    task: Task,
    tokenizer: Tokenizer,
    *,
    seed: int,
    start: int,
    count: int,
    width: int,
    chat: bool = False,
    overlong: Literal["drop", "error"] = "drop",
) -> Drawn:
    """The first `count` prompts at positions from `start` on. They depend on nothing else, so that
    every process finds the same ones, and the same again after a resume.

    Raises UserError where `MAX_DROPPED` positions in a row give none, or, with `overlong` = error,
    for a prompt over `width` tokens.
    """
    rows: list[list[int]] = []
    positions: list[int] = []
    dropped: dict[int, Drop] = {}
    position = start
    while len(rows) < count:
        problem = task.problem(seed, position)
        ids = [] if problem is None else problem_ids(problem, tokenizer, chat=chat)
        if problem is None:
            dropped[position] = "row"
        elif len(ids) <= width:
            rows.append(ids)
            positions.append(position)
        elif overlong == "drop":
            dropped[position] = "overlong"
        else:
            raise _too_long(problem, len(ids), width)
        position += 1
        if position - (positions[-1] if positions else start - 1) > MAX_DROPPED:
            raise _no_prompts(dropped, position, width)
    return Drawn(_padded(rows, positions, width), position, dropped)


def problems_at(task: Task, seed: int, positions: Iterable[int]) -> list[Problem]:
    """The problems at positions of a training stream that have one."""
    found = [task.problem(seed, int(position)) for position in positions]
    return [problem for problem in found if problem is not None]


def share(prompts: Prompts, process: int, processes: int) -> Prompts:
    """The part of one of several processes: in their order, the parts are all prompts; none has two
    more than another."""
    part = np.array_split(np.arange(len(prompts.lengths)), processes)[process]
    return Prompts(prompts.tokens[part], prompts.lengths[part], prompts.positions[part])


def problem_ids(problem: Problem, tokenizer: Tokenizer, *, chat: bool = False) -> list[int]:
    """The `prompt_ids` of a problem; its own messages where it has some and `chat` is on."""
    if chat and problem.messages:
        messages = [{"role": role, "content": content} for role, content in problem.messages]
        return encode_chat(tokenizer, messages)
    return prompt_ids(problem.prompt, tokenizer, chat=chat)


def prompt_ids(text: str, tokenizer: Tokenizer, *, chat: bool = False) -> list[int]:
    """BOS and the text's ids, or the text as a user's message in the chat template."""
    if chat:
        return encode_chat(tokenizer, [{"role": "user", "content": text}])
    return tokenizer.encode(text, bos=True)


def train_tokenizer(task: Task) -> Tokenizer:
    """One piece a word where the task has a closed vocabulary; else made from demonstrations."""
    words = task.vocabulary()
    if words is not None:
        return train_word_tokenizer(words)
    shown = islice(task.demonstrations(0), TOKENIZER_TEXTS)
    return train_text_tokenizer([text for pair in shown for text in pair])


def encode_prompts(
    problems: Sequence[Problem], tokenizer: Tokenizer, width: int, *, chat: bool = False
) -> Prompts:
    """The `problem_ids` of each, at positions from 0 on.

    Raises UserError for a prompt over `width` tokens.
    """
    rows = [problem_ids(problem, tokenizer, chat=chat) for problem in problems]
    for problem, ids in zip(problems, rows, strict=True):
        if len(ids) > width:
            raise _too_long(problem, len(ids), width)
    return _padded(rows, range(len(rows)), width)


def _padded(rows: Sequence[list[int]], positions: Sequence[int], width: int) -> Prompts:
    """Rows of ids, padded on the right to `width`."""
    tokens = np.zeros((len(rows), width), np.int32)
    for line, ids in zip(tokens, rows, strict=True):
        line[: len(ids)] = ids
    lengths = np.asarray([len(ids) for ids in rows], np.int32)
    return Prompts(tokens=tokens, lengths=lengths, positions=np.asarray(positions, np.int32))


def _too_long(problem: Problem, length: int, width: int) -> UserError:
    whole = len(problem.prompt) <= MAX_SHOWN
    start = problem.prompt if whole else problem.prompt[:MAX_SHOWN] + " …"
    return UserError(
        f"rollout.max_prompt_length: {width} is too short for {start!r}, which takes "
        f"{length} tokens; raise it"
    )


def _no_prompts(dropped: dict[int, Drop], position: int, width: int) -> UserError:
    last = [dropped[position - 1 - i] for i in range(MAX_DROPPED)]
    if (count := last.count("overlong")) > MAX_DROPPED // 2:
        return UserError(
            f"rollout.max_prompt_length: {width} is too short for {count:,} of the {MAX_DROPPED:,} "
            f"prompts before position {position}; raise it"
        )
    return UserError(
        f"task: none of the {MAX_DROPPED:,} rows before position {position} is a problem to train "
        "on; `deltal prepare` says why and leaves them out"
    )
