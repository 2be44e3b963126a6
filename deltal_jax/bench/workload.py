"""A fixed load: one small model, and rollouts whose lengths vary as RLVR's do.

4 layers, width 256, 4 heads over 2 key-value heads, vocabulary 2,048: 4.5 M parameters, float32.
32 responses to prompts of 32 tokens; lengths lognormal around 24 with σ = 1 in 4 … 128, one of them
at the limit. NumPy alone, so that the peer's side, in another environment, sees the same batches.
"""

from typing import Any

import numpy as np

RESPONSES, PROMPT, LIMIT, GROUP = 32, 32, 128, 8
BOS, EOS, FIRST = 1, 2, 3
LEARNING_RATE, CLIP_LOW, CLIP_HIGH = 1e-5, 0.2, 0.28

#: The model, by the names of `model.architecture.Architecture`.
SIZES: dict[str, Any] = dict(
    vocab=2048,
    layers=4,
    d_model=256,
    heads=4,
    kv_heads=2,
    head_dim=64,
    d_ff=1024,
    tied_embeddings=True,
    rope_theta=1_000_000.0,
    norm_epsilon=1e-6,
)

#: Any of these ends a response of the sampling load: an untrained model ends one in 64 tokens.
ENDS = tuple(range(100, 132))


def prompt_tokens(seed: int) -> np.ndarray:
    """The prompts of the sampling load of a seed, Int[32 32]."""
    prompts = np.random.default_rng(seed).integers(FIRST, SIZES["vocab"], (RESPONSES, PROMPT))
    prompts[:, 0] = BOS
    return prompts.astype(np.int32)


def batch_arrays(seed: int) -> dict[str, np.ndarray]:
    """The batch of a seed: the fields of a `types.Rollout`, and `advantages`, Float[B]."""
    vocab = SIZES["vocab"]
    rng = np.random.default_rng(seed)
    prompts = rng.integers(FIRST, vocab, (RESPONSES, PROMPT), dtype=np.int32)
    prompts[:, 0] = BOS
    rng = np.random.default_rng(100 + seed)
    drawn = np.exp(rng.normal(np.log(24), 1.0, RESPONSES)).astype(int)
    lengths = np.clip(drawn, 4, LIMIT)
    lengths[rng.integers(RESPONSES)] = LIMIT
    rng = np.random.default_rng(200 + seed)
    responses = rng.integers(FIRST, vocab, (RESPONSES, LIMIT), dtype=np.int32)
    real = np.arange(LIMIT)[None, :] < lengths[:, None]
    responses[np.arange(RESPONSES), lengths - 1] = EOS
    advantages = rng.normal(size=RESPONSES).astype(np.float32)
    noise = rng.normal(size=real.shape)
    logprobs = np.where(real, -np.log(vocab) + 0.05 * noise, 0.0).astype(np.float32)
    return dict(
        tokens=np.concatenate([prompts, np.where(real, responses, 0)], axis=1).astype(np.int32),
        prompt_lengths=np.full(RESPONSES, PROMPT, np.int32),
        lengths=(PROMPT + lengths).astype(np.int32),
        loss_mask=np.pad(real, ((0, 0), (PROMPT, 0))),
        logprobs=np.pad(logprobs, ((0, 0), (PROMPT, 0))),
        truncated=lengths == LIMIT,
        group_ids=(np.arange(RESPONSES) // GROUP).astype(np.int32),
        advantages=advantages,
    )
