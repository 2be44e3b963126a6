"""The gradient of each response of a rollout, by layer and kind of parameter, reduced to Gram
matrices.

Two gradients of a response: of its score Σ_t log π(o_it), and of its loss Σ_t ℓ_it by the terms of
training where the ratio is 1 (−A_i times the score for most surrogates). Nothing is kept of either
but inner products between responses, from which all moments follow (`moments.py`).
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jaxtyping import Array, Float

from deltal_jax.guard.pulse import pulse
from deltal_jax.model.lora import overlay, trained
from deltal_jax.model.precision import ROUND_ALIKE
from deltal_jax.objective.aggregation import policy_gradient_loss
from deltal_jax.parallel.sharding import PARAMETER_AXES
from deltal_jax.training.buckets import make_buckets
from deltal_jax.training.loss import LossTerms, bucket_logprobs
from deltal_jax.training.objective import make_loss
from deltal_jax.training.optimizer import widen
from deltal_jax.training.setup import Setup
from deltal_jax.types import Bucket, Rollout

KINDS = ("q", "k", "v", "o", "mlp", "embed", "head", "norm")
#: Bytes that exact gradients of all responses may take; more of them are projected.
MEMORY = 2**31
#: Bytes that one micro-batch's gradients may take while they are computed.
MICROBATCH = 2**28
#: Dimension of each block's projection: its squared norms are off by √(2/1024), 4.4 %.
PROJECTED = 1024

#: A layer, or OUTSIDE of them, and a kind.
Block = tuple[int, str]
OUTSIDE = -1


@dataclasses.dataclass(frozen=True)
class Grams:
    """K_ij = ⟨g_i, g_j⟩ of each block's parameters, Float[N N]; those of all parameters are their
    sum."""

    score: dict[Block, np.ndarray]
    loss: dict[Block, np.ndarray]
    #: Trained parameters.
    parameters: int
    #: Dimension of each block's projection; None: exact.
    projected: int | None


def kind_of(path: str) -> str:
    """The kind of a parameter by its path; adapters have that of their matrix.

    Raises KeyError for a path that is none of `parallel.sharding.PARAMETER_AXES`.
    """
    if path not in PARAMETER_AXES:
        raise KeyError(f"{path}: not a parameter of PARAMETER_AXES (parallel/sharding.py)")
    parts = path.split("/")
    if parts[-1] == "scale":
        return "norm"
    if parts[0] != "blocks":
        return parts[0]
    return "mlp" if parts[1] == "mlp" else parts[2]


def measure_gradients(
    setup: Setup,
    params: Any,
    rollout: Rollout,
    advantages: Float[np.ndarray, " B"],
    key: jax.Array,
    project: int | None = None,
) -> Grams:
    """Gram matrices of the responses' gradients, one response a row, in micro-batches.

    `project` is the dimension of each block's projection, whose signs and shifts are drawn by
    `key`; None: exact, or `PROJECTED` where the gradients would take more than MEMORY.
    """
    count = sum(x.size for x in jax.tree.leaves(trained(params)))
    responses = len(rollout.lengths)
    if project is None and 8 * responses * count > MEMORY:
        project = PROJECTED
    terms, most = make_loss(setup.config), max(1, MICROBATCH // (8 * count))
    found: dict[tuple[str, Block], np.ndarray] = {}
    for numbers, rows in _microbatches(setup, rollout, advantages, most):
        real = numbers < responses
        for name, values in _gradients(setup.graphdef, terms, params, rows).items():
            if project is not None:
                layer, kind = name[1]
                own = jax.random.fold_in(key, len(KINDS) * (layer + 1) + KINDS.index(kind))
                values = sketch(values, own, project)
            if name not in found:
                found[name] = np.zeros((responses, values.shape[1]), np.float32)
            found[name][numbers[real]] = np.asarray(values)[real]
        pulse()
    grams: dict[str, dict[Block, np.ndarray]] = {"score": {}, "loss": {}}
    for name, block in list(found):
        grams[name][block] = _gram(found.pop((name, block)))
    return Grams(grams["score"], grams["loss"], count, project)


def _microbatches(
    setup: Setup, rollout: Rollout, advantages: Float[np.ndarray, " B"], most: int
) -> Iterator[tuple[np.ndarray, Bucket]]:
    """At most so many rows at a time, by the widths of training: the number of each row's response,
    B where it is empty, and each row as a bucket of its own, fields [m, 1, T] and [m, 1]."""
    config, count = setup.config, len(rollout.lengths)
    for bucket in make_buckets(
        rollout,
        np.arange(count),
        advantages=advantages,
        weights=np.ones(count, np.float32),
        edges=config.bucket_edges,
        tokens_per_microbatch=config.rl.tokens_per_microbatch,
    ):
        segments = np.asarray(bucket.segment_ids)
        for start in range(0, len(segments), most):
            ids = segments[start : start + most]
            numbers = ids.min(axis=1)
            yield numbers, _alone(bucket, slice(start, start + most), numbers)


def _alone(bucket: Bucket, rows: slice, numbers: np.ndarray) -> Bucket:
    count = len(bucket.weights)

    def cut(x: Any) -> np.ndarray:
        x = np.asarray(x)
        return x[rows][:, None] if x.ndim == 2 else x[np.minimum(numbers, count - 1)][:, None]

    fields = jax.tree.map(cut, bucket)
    padding = (fields.segment_ids == count).astype(np.int32)
    return dataclasses.replace(fields, segment_ids=padding)


def response_gradients(
    graphdef: nnx.GraphDef, terms: LossTerms, params: Any, bucket: Bucket
) -> tuple[Any, Any]:
    """Of a bucket with one response: the gradients of its score and of w Σ_t ℓ_it at the ratio 1,
    by the trained parameters. KL and entropy terms have weights of their own and are left out."""

    def logprobs(part: Any) -> Array:
        return bucket_logprobs(graphdef, overlay(params, part), bucket, terms)[0]

    values, pull = jax.vjp(logprobs, trained(params))
    fixed = dataclasses.replace(bucket, old_logprobs=values)
    advantages = jnp.pad(bucket.advantages, (0, 1))[bucket.segment_ids]

    def loss(values: Array) -> Array:
        losses = terms.token_loss(values, advantages, fixed)
        ids, mask = bucket.segment_ids, bucket.loss_mask
        return policy_gradient_loss(losses, bucket.weights, ids, mask)[0]

    (score,) = pull(bucket.loss_mask.astype(values.dtype))
    (weighted,) = pull(jax.grad(loss)(values))
    return widen(score), widen(weighted)


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=ROUND_ALIKE)
def _gradients(
    graphdef: nnx.GraphDef, terms: LossTerms, params: Any, rows: Bucket
) -> dict[tuple[str, Block], Float[Array, "m P"]]:
    both = jax.vmap(functools.partial(response_gradients, graphdef, terms, params))(rows)
    return {
        (name, block): jnp.concatenate([x.reshape(len(x), -1) for x in parts.values()], axis=1)
        for name, grads in zip(("score", "loss"), both, strict=True)
        for block, parts in blocks_of(grads).items()
    }


def blocks_of(grads: Any) -> dict[Block, dict[str, Float[Array, "m *shape"]]]:
    """Gradients of m responses, leaves [m, …] or [m, layers, …], by block and path."""
    found: dict[Block, dict[str, Array]] = {}
    for path, leaf in sorted(traverse_util.flatten_dict(grads, sep="/").items()):
        kind = kind_of(path)
        stacked = PARAMETER_AXES[path][0] == "layers"
        for layer in range(leaf.shape[1]) if stacked else (OUTSIDE,):
            part = leaf[:, layer] if stacked else leaf
            found.setdefault((layer, kind), {})[path] = part
    return found


@functools.partial(jax.jit, static_argnums=2)
def sketch(x: Float[Array, "m P"], key: Array, size: int) -> Float[Array, "m k"]:
    """A random projection to k = `size` numbers that keeps inner products, for one pass over x.

    x is cut into lines of k numbers; each number gets a random sign, each line is rolled by a
    random shift, and the lines are added: a count sketch (Charikar et al. 2002) in which two
    numbers meet with probability 1/k, or never. So ⟨Sx, Sy⟩ is unbiased, and ‖Sx‖² has a relative
    standard deviation of at most √(2/k).
    """
    lines = -(-x.shape[1] // size)
    signs, shifts = jax.random.split(key)
    x = jnp.pad(x, ((0, 0), (0, lines * size - x.shape[1]))).reshape(-1, lines, size)
    x = x * jax.random.rademacher(signs, (1, lines, size), x.dtype)
    shift = jax.random.randint(shifts, (lines, 1), 0, size)
    at = (jnp.arange(size)[None, :] + shift) % size
    return jnp.take_along_axis(x, at[None], axis=2).sum(axis=1)


def _gram(x: Float[np.ndarray, "N d"], columns: int = 2**15) -> Float[np.ndarray, "N N"]:
    total = np.zeros((len(x), len(x)))
    for start in range(0, x.shape[1], columns):
        part = x[:, start : start + columns].astype(np.float64)
        total += part @ part.T
    return total
