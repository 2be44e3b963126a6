"""From what the slots wrote to a rollout."""

import dataclasses

import jax
import numpy as np

from deltal_jax.rollout.schedule import RolloutStats, ideal_steps
from deltal_jax.rollout.slots import Counts
from deltal_jax.types import Prompts, Rollout


@dataclasses.dataclass(frozen=True)
class Results:
    """What has been written, in host memory: fields of `Slots`."""

    tokens: np.ndarray
    logprobs: np.ndarray
    raw_logprobs: np.ndarray | None
    lengths: np.ndarray
    ended: np.ndarray
    counts: Counts


def stats(results: Results, lengths: np.ndarray, slots: int) -> RolloutStats:
    """How full so many slots were for responses of these lengths."""
    counts = jax.tree.map(lambda x: int(np.sum(x)), results.counts)
    return RolloutStats(
        slot_steps=counts.slot_steps,
        useful_steps=counts.useful,
        slot_steps_queued=counts.slot_steps_queued,
        useful_steps_queued=counts.useful_queued,
        ideal_slot_steps=ideal_steps(lengths, slots) * slots,
    )


def assemble(prompts: Prompts, groups: np.ndarray, out: Results) -> Rollout:
    """Join prompts and responses into rows without padding between them."""
    B = len(groups)  # what follows belongs to no prompt
    response, counts = out.tokens[:B], out.lengths[:B]
    prompt_lengths = np.asarray(prompts.lengths)[groups]
    R = response.shape[1]
    width = prompts.tokens.shape[1] + R
    at = np.arange(width)[None, :] - prompt_lengths[:, None]
    mask = (at >= 0) & (at < counts[:, None])
    index = np.clip(at, 0, R - 1)

    def placed(values: np.ndarray) -> np.ndarray:
        return np.where(mask, np.take_along_axis(values[:B], index, axis=1), np.float32(0))

    tokens = np.zeros((B, width), np.int32)
    tokens[:, : prompts.tokens.shape[1]] = np.asarray(prompts.tokens)[groups]
    tokens = np.where(at >= 0, np.take_along_axis(response, index, axis=1), tokens)
    return Rollout(
        tokens=np.where(at < counts[:, None], tokens, 0),
        prompt_lengths=prompt_lengths,
        lengths=(prompt_lengths + counts).astype(np.int32),
        loss_mask=mask,
        logprobs=placed(out.logprobs),
        truncated=~out.ended[:B],
        group_ids=groups,
        raw_logprobs=None if out.raw_logprobs is None else placed(out.raw_logprobs),
    )
