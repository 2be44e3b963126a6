"""Problems to padded prompts, addressed by their position in a stream, so that order resumes
exactly."""

from collections.abc import Sequence
from itertools import islice

import numpy as np

from deltal_jax.data.chat import encode_chat
from deltal_jax.data.tokenizer import Tokenizer, train_text_tokenizer, train_word_tokenizer
from deltal_jax.errors import UserError
from deltal_jax.tasks.base import Problem, Task
from deltal_jax.types import Prompts

#: Demonstrations that a tokenizer of free text is trained on.
TOKENIZER_TEXTS = 300


def training_problems(task: Task, seed: int, start: int, count: int) -> list[Problem]:
    """The problems at positions start … start + count − 1 of the training stream."""
    return [task.problem(seed, position) for position in range(start, start + count)]


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
    problems: Sequence[Problem],
    tokenizer: Tokenizer,
    width: int,
    start: int = 0,
    *,
    chat: bool = False,
) -> Prompts:
    """The `prompt_ids` of each, padded on the right to `width`; `start` is the first position.

    Raises UserError for a prompt over `width` tokens.
    """
    tokens = np.zeros((len(problems), width), np.int32)
    lengths = np.zeros(len(problems), np.int32)
    for row, problem in enumerate(problems):
        ids = prompt_ids(problem.prompt, tokenizer, chat=chat)
        if len(ids) > width:
            raise UserError(
                f"rollout.max_prompt_length: {width} is too short for {problem.prompt!r}, which "
                f"takes {len(ids)} tokens"
            )
        tokens[row, : len(ids)] = ids
        lengths[row] = len(ids)
    positions = np.arange(start, start + len(problems), dtype=np.int32)
    return Prompts(tokens=tokens, lengths=lengths, positions=positions)
