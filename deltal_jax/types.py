"""The pytrees that flow through a step. No logic beyond derived shapes.

Alphabet: P prompts, G samples a prompt, B = P·G responses, N rows, T tokens, V vocabulary.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped, UInt32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompts:
    """Tokenised prompts, padded on the right; in host memory."""

    tokens: Int[np.ndarray, "P Tp"]
    lengths: Int[np.ndarray, " P"]
    #: Position of each prompt in the data stream: the counter that sampling randomness is keyed by.
    positions: Int[np.ndarray, " P"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Responses:
    """Responses to prompts, finished or not, in prompt order; R is the length limit. In host
    memory."""

    prompts: Prompts
    #: Row of `prompts` that each response answers, ascending.
    group_ids: Int[np.ndarray, " B"]
    #: Of the random numbers of each; fixed when it begins.
    keys: UInt32[np.ndarray, "B 2"]
    #: What was sampled so far; 0 elsewhere.
    tokens: Int[np.ndarray, "B R"]
    #: Of each token, under the distribution that it was drawn from.
    logprobs: Float[np.ndarray, "B R"]
    #: How many tokens were sampled so far.
    lengths: Int[np.ndarray, " B"]
    #: Whether the last one is an end-of-sequence token.
    ended: Bool[np.ndarray, " B"]
    #: Under softmax(logits); kept where they were asked for.
    raw_logprobs: Float[np.ndarray, "B R"] | None = None

    @property
    def finished(self) -> Bool[np.ndarray, " B"]:
        """Whether nothing is left to sample."""
        return self.ended | (self.lengths == self.tokens.shape[1])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollout:
    """Sampled responses, each row `prompt tokens, response tokens, padding`; in host memory.

    `loss_mask` marks the tokens that the policy sampled and that are trained (EOS included). It may
    have holes: tool or environment tokens are attended to, never trained, never counted in L_i.
    """

    tokens: Int[np.ndarray, "B T"]
    prompt_lengths: Int[np.ndarray, " B"]
    #: Prompt plus response: everything that is attended to.
    lengths: Int[np.ndarray, " B"]
    loss_mask: Bool[np.ndarray, "B T"]
    #: Log-probability of each sampled token under the distribution it was drawn from; 0 elsewhere.
    logprobs: Float[np.ndarray, "B T"]
    #: Whether the response reached the length limit without an end-of-sequence token.
    truncated: Bool[np.ndarray, " B"]
    #: Row of `Prompts` that each response answers.
    group_ids: Int[np.ndarray, " B"]
    #: Log-probability of each sampled token under softmax(logits); kept where it was asked for.
    raw_logprobs: Float[np.ndarray, "B T"] | None = None

    @property
    def response_lengths(self) -> Int[np.ndarray, " B"]:
        """L_i: the number of trained tokens of each response."""
        return self.loss_mask.sum(axis=1, dtype=np.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bucket:
    """One micro-batch of a fixed shape: rows of tokens, one response or several in each.

    A token's segment is its response's number in the whole rollout, so the arrays over responses
    are the rollout's own, whatever the split; padding belongs to segment B, out of range, and every
    segment reduction drops it. Positions count from the start of each response's prompt. Built in
    host memory (NumPy); `training.step.Update.place` puts it on the devices.
    """

    tokens: Int[jax.Array, "N T"]
    positions: Int[jax.Array, "N T"]
    segment_ids: Int[jax.Array, "N T"]
    loss_mask: Bool[jax.Array, "N T"]
    sampler_logprobs: Float[jax.Array, "N T"]
    old_logprobs: Float[jax.Array, "N T"]
    advantages: Float[jax.Array, " B"]
    weights: Float[jax.Array, " B"]
    #: Weights of the KL and entropy terms, which keep an aggregation of their own.
    auxiliary_weights: Float[jax.Array, " B"]
    #: Of the reference model, where there is a KL term.
    reference_logprobs: Float[jax.Array, "N T"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that an update changes. `key` is the root of all randomness and stays constant:
    draws are keyed by counters (step, round, prompt position, sample, token), never by history."""

    params: Any
    opt_state: Any
    #: Optimizer updates done in this phase.
    updates: Int[jax.Array, ""]
    key: Shaped[jax.Array, ""]
    #: Parameters of the reference model that training changes (`lora.trained`), where there is a KL
    #: term; they never change.
    reference: Any = None
    #: Running mean of past gradients, where the exponent looks to them (`objective.alpha: mse`).
    direction: Any = None
