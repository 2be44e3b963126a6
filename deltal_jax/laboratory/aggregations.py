"""What each aggregation makes of the same responses: direction, variance, CV, and the cosine of a
batch.

A batch is P whole groups, and its gradient ĝ = Σ_i w_i g_i has weights by the lengths of that very
batch. Two batches without a common group are independent, so with A and B disjoint

    ‖E ĝ‖² = E ⟨ĝ_A, ĝ_B⟩        tr Var ĝ = E ‖ĝ_A‖² − E ⟨ĝ_A, ĝ_B⟩

without bias, however small the pool is; the same of two aggregations gives the angle between their
means. Batches come from permutations of the pool, cut into batches of P. Each product of two
batches is a sum over pairs of groups, and each pair counts alike whatever the permutations were: so
a figure is a function of means over pairs, and its interval comes from leaving out one group after
the other (the jackknife, Efron & Tibshirani 1993, chapter 11).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Num

from deltal_jax.analysis.paired import t_quantile
from deltal_jax.objective.aggregation import (
    balanced,
    constant_length,
    delta_l,
    inverse_variance,
    local_token_mean,
    prompt_mean,
    sequence_mean,
    token_mean,
)

#: Exponents of ΔL that are compared, and permutations of the pool.
ALPHAS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
ROUNDS = 200
#: What the others are compared with.
REFERENCE = "ΔL α=1"
UNWEIGHTED = "Dr. GRPO (constant_length)"
#: Responses of a micro-batch of `local_token_mean`, as in the reference of arXiv 2509.07558.
MICROBATCH = 4

#: Weights from lengths, advantages, group ids and which responses count, each [B].
Weigh = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class Method:
    """An aggregation with its options."""

    name: str
    aggregation: str
    weigh: Weigh
    alpha: float | None = None


@dataclasses.dataclass(frozen=True)
class Pool:
    """Responses of groups of one size, group after group; `kept` says which count."""

    lengths: Int[np.ndarray, " N"]
    advantages: Float[np.ndarray, " N"]
    kept: Bool[np.ndarray, " N"]
    groups: int

    @property
    def samples(self) -> int:
        """Responses of a group."""
        return len(self.lengths) // self.groups


@dataclasses.dataclass(frozen=True)
class Batches:
    """R permutations of the pool, each cut into n batches: the groups of each, Int[R·n, P]."""

    chosen: Int[np.ndarray, "M P"]
    rounds: int

    def rows(self, samples: int) -> Int[np.ndarray, "M B"]:
        """The responses of each batch."""
        rows = self.chosen[..., None] * samples + np.arange(samples)
        return rows.reshape(len(rows), -1)


def methods(beta: float | None) -> list[Method]:
    """All that are compared; with the weights of least variance where β is known."""
    found = [
        Method(f"ΔL α={a:g}", "delta_l", lambda x, adv, ids, w, a=a: delta_l(x, a, where=w), a)
        for a in ALPHAS
    ]
    found += [
        Method("GRPO (sequence_mean)", "sequence_mean", _plain(sequence_mean)),
        Method("DAPO (token_mean)", "token_mean", _plain(token_mean)),
        Method(UNWEIGHTED, "constant_length", _plain(constant_length)),
        Method("DAPO Norm (local_token_mean)", "local_token_mean", _local),
        Method("prompt_mean", "prompt_mean", lambda x, adv, ids, w: prompt_mean(x, ids, where=w)),
        Method("balanced", "balanced", lambda x, adv, ids, w: balanced(x, adv, where=w)),
    ]
    if beta is not None:
        found.append(
            Method(
                f"1/Var, β={beta:.2f}",
                "inverse_variance",
                lambda x, adv, ids, w: inverse_variance(x, {"beta": beta}, where=w),
                beta,
            )
        )
    return found


def draw_batches(groups: int, size: int, rounds: int = ROUNDS) -> Batches:
    """Batches of `size` groups, of a fixed seed. Raises ValueError where the pool has not two."""
    if groups < 2 * size:
        raise ValueError(f"{groups} groups are fewer than two batches of {size}")
    rng, each = np.random.default_rng(0), groups // size
    orders = np.stack([rng.permutation(groups)[: each * size] for _ in range(rounds)])
    return Batches(orders.reshape(rounds * each, size), rounds)


def batch_weights(pool: Pool, batches: Batches, weigh: Weigh) -> Float[np.ndarray, "M N"]:
    """The weight of each response of the pool in each batch, 0 where it is not in it; 1 in sum, on
    average over the batches."""
    rows = batches.rows(pool.samples)
    ids = jnp.repeat(jnp.arange(batches.chosen.shape[1]), pool.samples)
    of_batch = jax.vmap(lambda lengths, adv, kept: weigh(lengths, adv, ids, kept))
    given = (jnp.asarray(x[rows]) for x in (pool.lengths, pool.advantages, pool.kept))
    found = np.asarray(of_batch(*given), float)
    return scatter(found, rows, len(pool.lengths)) / (found.sum(1).mean() or 1.0)


def scatter(
    values: Float[np.ndarray, "M B"], rows: Int[np.ndarray, "M B"], count: int
) -> Float[np.ndarray, "M N"]:
    """Values of the responses of each batch, 0 for the others of the pool."""
    found = np.zeros((len(rows), count))
    np.put_along_axis(found, rows, values, axis=1)
    return found


def compare(
    gram: Float[np.ndarray, "N N"], pool: Pool, size: int, beta: float | None
) -> list[dict[str, Any]]:
    """The figures of every aggregation, of batches of `size` groups."""
    batches = draw_batches(pool.groups, size)
    rows, named = batches.rows(pool.samples), methods(beta)
    weights = {m.name: batch_weights(pool, batches, m.weigh) for m in named}
    pairs = {
        name: Pairs.of([gram], [own], [weights[UNWEIGHTED]], batches, pool.groups)
        for name, own in weights.items()
    }
    found = []
    for method in named:
        row = {"name": method.name, "aggregation": method.aggregation, "alpha": method.alpha}
        row |= figures(pairs, method.name, UNWEIGHTED, REFERENCE)
        row["cosine"] = batch_cosine(gram, rows, weights[method.name], pool.kept)
        found.append(row)
    return found


def figures(
    pairs: Mapping[str, "Pairs"], name: str, unweighted: str, reference: str
) -> dict[str, float | None]:
    """Bias, variance and cosine of an aggregation with intervals; None where it is not resolvable:
    where a mean's square is not two standard errors above 0. `relative_variance` and `gain`, of the
    true cosine, are against the aggregation `reference`."""
    own, base, other = pairs[name], pairs[unweighted], pairs[reference]
    found: dict[str, float | None] = {"variance": float(own.variance[0])}
    found["mean_norm"] = float(own.mean[0]) ** 0.5 if _resolved(own.mean) else None
    ratio = own.variance / np.where(other.variance > 0, other.variance, np.nan)
    found |= _with_interval("relative_variance", ratio, logarithm=True)
    known, base_known = _resolved(own.mean), _resolved(base.mean)
    found |= _with_interval("cv", _root(own.variance, own.mean), known, logarithm=True)
    direction = own.cross * _root(1.0, own.mean) * _root(1.0, base.mean)
    found |= _with_interval("bias_cosine", direction, known and base_known)
    found |= _with_interval("true_cosine", _aligned(own, base), base_known)
    gain = _aligned(own, base) - _aligned(other, base)
    return found | _with_interval("gain", gain, base_known)


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Means over pairs of groups, in units of a batch's gradient: the first number of each of the
    whole pool, then of those without one group, Float[1 + G]."""

    second: np.ndarray
    mean: np.ndarray
    #: ⟨E ĝ, E ĝ'⟩ with the aggregation that it is compared with.
    cross: np.ndarray

    @property
    def variance(self) -> np.ndarray:
        """tr Var ĝ."""
        return self.second - self.mean

    @classmethod
    def of(
        cls,
        grams: Sequence[np.ndarray],
        weights: Sequence[np.ndarray],
        others: Sequence[np.ndarray],
        batches: Batches,
        groups: int,
    ) -> "Pairs":
        """Of a gradient in blocks, each with weights of its own, [M N]."""
        size = batches.chosen.shape[1]
        inside = np.zeros((len(batches.chosen), groups))
        np.put_along_axis(inside, batches.chosen, 1.0, axis=1)
        together, apart = inside.T @ inside, _apart(inside, inside, batches.rounds)
        same, mean, cross = np.zeros((3, groups, groups))
        for gram, own, other in zip(grams, weights, others, strict=True):
            same += _by_group(gram * (own.T @ own), groups)
            mean += _by_group(gram * _apart(own, own, batches.rounds), groups)
            cross += _by_group(gram * _apart(own, other, batches.rounds), groups)
        single = np.diag(same) / np.maximum(np.diag(together), 1)
        within = size * _without_one(single)
        between = size * (size - 1) * _pair_means(same, together) if size > 1 else 0.0
        return cls(
            second=within + between,
            mean=size**2 * _pair_means(mean, apart),
            cross=size**2 * _pair_means((cross + cross.T) / 2, apart),
        )


def _apart(own: np.ndarray, other: np.ndarray, rounds: int) -> np.ndarray:
    """Σ over the pairs of different batches of a permutation of w_A w_Bᵀ, [N N]."""
    totals = (x.reshape(rounds, -1, x.shape[1]).sum(1) for x in (own, other))
    left, right = totals
    return left.T @ right - own.T @ other


def _by_group(values: Float[np.ndarray, "N N"], groups: int) -> Float[np.ndarray, "G G"]:
    samples = len(values) // groups
    return values.reshape(groups, samples, groups, samples).sum((1, 3))


def _pair_means(sums: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """The mean over pairs of different groups that occurred, of all and without each group."""
    apart = (numbers > 0.5) & ~np.eye(len(sums), dtype=bool)
    values = np.where(apart, sums / np.maximum(numbers, 1.0), 0.0)
    total = values.sum() - np.concatenate([[0.0], 2 * values.sum(1)])
    return total / (apart.sum() - np.concatenate([[0.0], 2.0 * apart.sum(1)]))


def _without_one(values: np.ndarray) -> np.ndarray:
    total = values.sum() - np.concatenate([[0.0], values])
    return total / (len(values) - np.concatenate([[0.0], np.ones(len(values))]))


def _root(above: np.ndarray | float, below: np.ndarray) -> np.ndarray:
    """√(above / below), NaN where that is none."""
    ratio = above / np.where(below > 0, below, np.nan)
    return np.sqrt(np.where(ratio >= 0, ratio, np.nan))


def _aligned(own: Pairs, base: Pairs) -> np.ndarray:
    """⟨E ĝ, E ĝ₀⟩ / √(E‖ĝ‖² ‖E ĝ₀‖²): the root mean square's cosine with the true unweighted
    mean."""
    return own.cross * _root(1.0, own.second) * _root(1.0, base.mean)


def jackknife_error(values: Float[np.ndarray, " n"]) -> float:
    """The standard error, of the figure of the whole pool and then those without one group."""
    left = values[1:]
    return math.sqrt((len(left) - 1) * float(np.mean((left - left.mean()) ** 2)))


def _resolved(values: np.ndarray) -> bool:
    return bool(values[0] > 2 * jackknife_error(values))


def _with_interval(
    name: str, values: np.ndarray, known: bool = True, *, logarithm: bool = False
) -> dict[str, float | None]:
    """A figure with its 95 % interval, symmetric on a logarithmic scale where said so; None where
    it is not known."""
    found: dict[str, float | None] = dict.fromkeys((name, f"{name}_low", f"{name}_high"))
    if not known or not np.isfinite(values[0]):
        return found
    found[name] = value = float(values[0])
    if np.isfinite(values).all() and not (logarithm and (values <= 0).any()):
        scale = np.log(values) if logarithm else values
        half = t_quantile(0.975, len(values) - 2) * jackknife_error(scale)
        low, high = (scale[0] - half, scale[0] + half)
        found[f"{name}_low"] = float(np.exp(low) if logarithm else low) if half else value
        found[f"{name}_high"] = float(np.exp(high) if logarithm else high) if half else value
    return found


def batch_cosine(
    gram: Float[np.ndarray, "N N"],
    rows: Int[np.ndarray, "M B"],
    weights: Float[np.ndarray, "M N"],
    unweighted: Num[np.ndarray, " N"] | Bool[np.ndarray, " N"],
) -> float | None:
    """The mean cosine of a batch's gradient with the unweighted one of all groups not in it."""
    target = np.broadcast_to(unweighted.astype(float), weights.shape).copy()
    np.put_along_axis(target, rows, 0.0, axis=1)
    own, theirs = weights @ gram, target @ gram
    square = (own * weights).sum(1) * (theirs * target).sum(1)
    good = square > 0
    if not good.any():
        return None
    return float(np.mean((own * target).sum(1)[good] / np.sqrt(square[good])))


def _local(lengths: jax.Array, adv: jax.Array, ids: jax.Array, where: jax.Array) -> jax.Array:
    return local_token_mean(lengths, jnp.arange(len(lengths)) // MICROBATCH, where=where)


def _plain(function: Callable[..., jax.Array]) -> Weigh:
    return lambda x, adv, ids, w: function(x, where=w)
