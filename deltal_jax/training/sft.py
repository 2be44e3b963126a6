"""Supervised warm-up: next-token loss on a task's demonstrations, batches of one padded length
each."""

import bisect
import math
from collections.abc import Iterator

import numpy as np

from deltal_jax.config import Config
from deltal_jax.data.chat import turn_end
from deltal_jax.data.prompts import prompt_ids
from deltal_jax.data.tokenizer import Tokenizer
from deltal_jax.errors import UserError
from deltal_jax.tasks.base import Task
from deltal_jax.training.buckets import bucket_rows, make_buckets
from deltal_jax.types import Bucket, Rollout

Row = tuple[list[int], int]  # token ids, prompt length
#: Demonstrations that may be too long one after the other.
MAX_SKIPPED = 10_000


def demonstration_batches(
    config: Config, task: Task, tokenizer: Tokenizer, row_multiple: int = 1
) -> Iterator[Bucket]:
    """An endless, deterministic stream of batches of about `sft.tokens_per_batch` padded tokens,
    filled up with empty rows to a multiple of `row_multiple`.

    Demonstrations wait in one list for each bucket until they fill a batch; its loss is the mean
    over its response tokens. Rows longer than the last bucket are left out.
    """
    edges, budget = config.bucket_edges, config.sft.tokens_per_batch
    chat = config.data.chat_template
    end = turn_end(tokenizer) if chat else tokenizer.eos_ids[0]
    waiting: dict[int, list[Row]] = {edge: [] for edge in edges}
    skipped = 0
    for prompt, response in task.demonstrations(config.seed):
        head = prompt_ids(prompt, tokenizer, chat=chat)
        ids = [*head, *tokenizer.encode(response), end]
        at = bisect.bisect_left(edges, len(ids))
        if at == len(edges):
            skipped += 1
            if skipped > MAX_SKIPPED:
                raise UserError(
                    f"length_buckets: {MAX_SKIPPED} demonstrations in a row are longer than the "
                    f"last, {edges[-1]}; raise it"
                )
            continue
        skipped = 0
        rows = waiting[edges[at]]
        rows.append((ids, len(head)))
        if len(rows) == bucket_rows(edges[at], budget):
            yield _batch(rows, edges[at], row_multiple)
            rows.clear()


def _batch(rows: list[Row], edge: int, row_multiple: int) -> Bucket:
    tokens = np.zeros((len(rows), edge), np.int32)
    for line, (ids, _) in zip(tokens, rows, strict=True):
        line[: len(ids)] = ids
    lengths = np.asarray([len(ids) for ids, _ in rows], np.int32)
    prompts = np.asarray([prompt for _, prompt in rows], np.int32)
    at = np.arange(edge)[None, :]
    mask = (at >= prompts[:, None]) & (at < lengths[:, None])
    zeros = np.zeros(tokens.shape, np.float32)
    everything = np.arange(len(rows))
    demonstrations = Rollout(
        tokens=tokens,
        prompt_lengths=prompts,
        lengths=lengths,
        loss_mask=mask,
        logprobs=zeros,
        truncated=np.zeros(len(rows), bool),
        group_ids=everything.astype(np.int32),
    )
    (bucket,) = make_buckets(
        demonstrations,
        everything,
        advantages=np.ones(len(rows), np.float32),
        weights=np.full(len(rows), 1.0 / mask.sum(), np.float32),
        edges=(edge,),
        tokens_per_microbatch=edge * math.ceil(len(rows) / row_multiple) * row_multiple,
        row_multiple=row_multiple,
    )
    return bucket
