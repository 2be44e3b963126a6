"""The objective's own cost: weights of a million responses, and its share of an update."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from deltal_jax.bench import workload
from deltal_jax.bench.measure import in_turn, ratio
from deltal_jax.model.architecture import Architecture
from deltal_jax.model.transformer import init_model, split_model
from deltal_jax.objective.aggregation import (
    constant_length,
    delta_l,
    inverse_variance,
    policy_gradient_loss,
    sequence_mean,
    token_mean,
)
from deltal_jax.training.buckets import make_buckets
from deltal_jax.training.loss import SUPERVISED
from deltal_jax.training.step import Update
from deltal_jax.types import Rollout

RESPONSES = 1_000_000


def benchmark_objective(rounds: int) -> dict[str, Any]:
    """Every figure of `deltal bench objective`."""
    return {"weights": weights_against_power(rounds), "aggregation": share_of_update(rounds)}


def weights_against_power(rounds: int) -> dict[str, Any]:
    """Seconds for the weights of 10^6 responses, and their ratio to a bare `lengths ** -alpha`."""
    rng = np.random.default_rng(0)
    drawn = np.clip(np.exp(rng.normal(6.0, 1.0, RESPONSES)), 1, 8192)
    lengths = jnp.asarray(drawn, jnp.int32)
    alpha = jnp.float32(0.75)  # traced, so that the power is a power
    groups = jnp.asarray(np.arange(RESPONSES) // 8, jnp.int32)
    scoped = jax.jit(lambda n, a, g: delta_l(n, a, scope_ids=g))
    methods = {
        "power": jax.jit(lambda n, a: n.astype(jnp.float32) ** -a),
        "delta_l": jax.jit(delta_l),
        "delta_l, group scope": lambda n, a: scoped(n, a, groups),
        "constant_length": jax.jit(lambda n, a: constant_length(n) * a),
        "sequence_mean": jax.jit(lambda n, a: sequence_mean(n) * a),
        "token_mean": jax.jit(lambda n, a: token_mean(n) * a),
        "inverse_variance": jax.jit(lambda n, a: inverse_variance(n, {"beta": a})),
    }
    sides = {name: lambda f=f: f(lengths, alpha) for name, f in methods.items()}
    timings = in_turn(sides, rounds)
    return {
        name: timing.summary() | {"over_power": ratio(timing, timings["power"])}
        for name, timing in timings.items()
    }


def share_of_update(rounds: int) -> dict[str, float]:
    """Seconds of weights and segment reduction (forward and backward) of one batch, and their
    share of the whole update."""
    graphdef, params = split_model(
        init_model(Architecture(**workload.SIZES, remat="none"), jax.random.key(0))
    )
    arrays = workload.batch_arrays(0)
    advantages = arrays.pop("advantages")
    rollout = Rollout(**arrays)
    everything = np.arange(workload.RESPONSES)
    weights = jax.jit(lambda n: delta_l(n, 0.75, normalizer=workload.LIMIT))
    lengths = rollout.response_lengths
    update = Update(graphdef, optax.adamw(workload.LEARNING_RATE), SUPERVISED)
    buckets = [
        update.place(bucket)
        for bucket in make_buckets(
            rollout,
            everything,
            advantages=advantages,
            weights=np.asarray(weights(lengths)),
            edges=(workload.PROMPT + workload.LIMIT,),
            tokens_per_microbatch=1024,
            pack=True,
        )
    ]

    def reduction(values: jax.Array, weights: jax.Array, ids: jax.Array, mask: jax.Array) -> Any:
        return policy_gradient_loss(values, weights, ids, mask)[0]

    reduce = jax.jit(jax.value_and_grad(reduction))
    state = [update.init(params, jax.random.key(0))]

    def whole() -> Any:
        state[0], _ = update(state[0], buckets)
        return state[0].params

    def aggregate() -> Any:
        found = weights(lengths)
        return [reduce(b.old_logprobs, found, b.segment_ids, b.loss_mask) for b in buckets]

    timings = in_turn({"update": whole, "aggregation": aggregate}, rounds)
    shares = ratio(timings["aggregation"], timings["update"])
    return {
        "update_wall_s": timings["update"].summary()["wall_s"],
        "aggregation_wall_s": timings["aggregation"].summary()["wall_s"],
        "share_of_update": shares,
    }
