"""Small real parts that the tests share: models, prompts and rollouts of known content."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deltal_jax.model.transformer import Architecture, init_model, split_model
from deltal_jax.types import Prompts, Rollout

PLAIN = Architecture(vocab=23, layers=2, d_model=16, heads=2, kv_heads=2, head_dim=8, d_ff=24)
#: Soon compiled, for laws that need many shapes.
SHALLOW = dataclasses.replace(PLAIN, layers=1, kv_heads=1, remat=False)
#: Everything that may differ: grouped heads, a head_dim of its own, tied embeddings, remat off.
GROUPED = Architecture(
    vocab=23,
    layers=5,
    d_model=16,
    heads=4,
    kv_heads=2,
    head_dim=6,
    d_ff=24,
    tied_embeddings=True,
    rope_theta=500.0,
    remat=False,
)
EOS = 2


@functools.cache
def model(arch: Architecture, seed: int = 0) -> tuple[nnx.GraphDef, Any]:
    """A model whose logits are far from flat, so that sampling has something to decide."""
    graphdef, params = split_model(init_model(arch, jax.random.key(seed)))
    return graphdef, jax.tree.map(lambda x: x * 1.4 if x.ndim > 1 else x, params)


@functools.cache
def _forward(arch: Architecture) -> Any:
    graphdef = model(arch)[0]

    def logits(params: Any, tokens: Any, positions: Any, segments: Any) -> Any:
        transformer = nnx.merge(graphdef, params)
        return transformer.logits(transformer.hidden(tokens, positions, segments))

    return jax.jit(logits)


def forward(
    arch: Architecture,
    params: Any,
    tokens: np.ndarray,
    positions: np.ndarray | None = None,
    segments: np.ndarray | None = None,
) -> np.ndarray:
    """Logits of whole rows; one segment a row unless said otherwise."""
    if positions is None:
        positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    if segments is None:
        segments = np.zeros_like(tokens)
    rows = (jnp.asarray(x) for x in (tokens, positions, segments))
    return np.asarray(_forward(arch)(params, *rows))


def prompts(count: int, width: int = 6, vocab: int = 23, seed: int = 0, start: int = 0) -> Prompts:
    """Prompts of different lengths."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, width + 1, count).astype(np.int32)
    tokens = rng.integers(3, vocab, (count, width)).astype(np.int32)
    tokens[np.arange(width)[None, :] >= lengths[:, None]] = 0
    positions = np.arange(start, start + count, dtype=np.int32)
    return Prompts(tokens=tokens, lengths=lengths, positions=positions)


def rollout(count: int, longest: int = 30, vocab: int = 23, seed: int = 0) -> Rollout:
    """Responses of very different lengths; every third has a hole in its loss mask."""
    rng = np.random.default_rng(seed)
    prompt_lengths = rng.integers(1, 5, count).astype(np.int32)
    responses = np.clip(np.exp(rng.normal(1.8, 1.0, count)), 1, longest - 5).astype(np.int32)
    lengths = prompt_lengths + responses
    at = np.arange(longest)[None, :]
    mask = (at >= prompt_lengths[:, None]) & (at < lengths[:, None])
    for row in range(0, count, 3):
        if responses[row] > 4:
            mask[row, prompt_lengths[row] + 1 : prompt_lengths[row] + 3] = False
    tokens = np.where(at < lengths[:, None], rng.integers(3, vocab, (count, longest)), 0)
    return Rollout(
        tokens=tokens.astype(np.int32),
        prompt_lengths=prompt_lengths,
        lengths=lengths,
        loss_mask=mask,
        logprobs=np.where(mask, -2.0 + 0.3 * rng.normal(size=mask.shape), 0.0).astype(np.float32),
        truncated=np.zeros(count, bool),
        group_ids=(np.arange(count) // 4).astype(np.int32),
    )
