"""The policy update, against a peer's on the same batches, and against its own limits."""

import statistics
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from deltal_jax.bench import workload
from deltal_jax.bench.measure import Timing, in_turn, ratio
from deltal_jax.bench.peer import Peer
from deltal_jax.config import Config, RolloutConfig
from deltal_jax.model.architecture import Architecture, attention_work
from deltal_jax.model.transformer import (
    abstract_params,
    init_model,
    make_graphdef,
    parameter_count,
    split_model,
)
from deltal_jax.objective.aggregation import token_mean
from deltal_jax.objective.surrogate import clipped
from deltal_jax.training.buckets import make_buckets, padding_fraction
from deltal_jax.training.loss import LossTerms
from deltal_jax.training.step import Update
from deltal_jax.types import Bucket, Rollout, TrainState

BUDGET = 640  # tokens of a micro-batch


def benchmark_update(rounds: int, peer: str | None) -> dict[str, Any]:
    """Every figure of `deltal bench update`; `peer` is the Python of an environment with Tunix."""
    seeds = list(range(rounds))
    ours = {
        "buckets": _Side(workload.LIMIT, pack=False),
        "packed": _Side(workload.LIMIT, pack=True),
        "packed, doubled limit": _Side(2 * workload.LIMIT, pack=True),
        "buckets, doubled limit": _Side(2 * workload.LIMIT, pack=False),
    }
    for side in ours.values():  # compile every shape beforehand
        for seed in seeds:
            side.step(seed)
    timings: dict[str, Timing] = {name: Timing() for name in ours}
    with Peer(peer, "tunix_update.py", "Tunix", seeds) if peer else nullcontext() as theirs:
        for seed in seeds:
            for name, side in ours.items():
                timings[name].call(lambda side=side, seed=seed: side.step(seed))
            if theirs is not None:
                theirs.ask(seed)
    figures: dict[str, Any] = {name: timings[name].summary() for name in ours}
    tokens = [int(workload.batch_arrays(seed)["lengths"].sum()) for seed in seeds]
    for name, side in ours.items():
        speeds = [n / t for n, t in zip(tokens, timings[name].wall, strict=True)]
        figures[name] |= {
            "useful_tokens_per_s": statistics.median(speeds),
            "padding_frac": statistics.median(side.padding(seed) for seed in seeds),
        }
    for name in ("buckets", "packed"):
        doubled = timings[f"{name}, doubled limit"]
        figures[name]["doubled_limit_over_limit"] = ratio(doubled, timings[name])
    if theirs is not None:
        speeds = [n / t for n, t in zip(tokens, theirs.timing.wall, strict=True)]
        figures["tunix, padded"] = theirs.timing.summary() | {
            "useful_tokens_per_s": statistics.median(speeds)
        }
        for name in ("buckets", "packed"):
            figures[name]["speed_over_tunix"] = ratio(theirs.timing, timings[name])
            figures[name]["tunix_cpu_over_ours"] = statistics.median(
                a / b for a, b in zip(theirs.timing.cpu, timings[name].cpu, strict=True)
            )
    figures["machine"] = _against_matmul(tokens, timings["packed"])
    return figures


class _Side:
    """Our update of the load, as a run with this response limit does it: layout, transfer,
    gradient, AdamW."""

    def __init__(self, limit: int, *, pack: bool):
        self.architecture = Architecture(**workload.SIZES, remat="none")
        graphdef, params = split_model(init_model(self.architecture, jax.random.key(0)))

        def token_loss(logprobs: jax.Array, advantages: jax.Array, bucket: Bucket) -> jax.Array:
            clips = {"clip_low": workload.CLIP_LOW, "clip_high": workload.CLIP_HIGH}
            return clipped(logprobs, bucket.old_logprobs, advantages, **clips)

        optimizer = optax.adamw(workload.LEARNING_RATE, weight_decay=0.0)
        self.update = Update(graphdef, optimizer, LossTerms(token_loss))
        self.state: TrainState = self.update.init(params, jax.random.key(0))
        rollout = RolloutConfig(max_prompt_length=workload.PROMPT, max_response_length=limit)
        self.edges = Config(rollout=rollout).bucket_edges
        self.pack = pack

    def buckets(self, seed: int) -> list[Bucket]:
        arrays = workload.batch_arrays(seed)
        advantages = arrays.pop("advantages")
        rollout = Rollout(**arrays)
        return make_buckets(
            rollout,
            np.arange(workload.RESPONSES),
            advantages=advantages,
            weights=np.asarray(token_mean(jnp.asarray(rollout.response_lengths))),
            edges=self.edges,
            tokens_per_microbatch=BUDGET,
            pack=self.pack,
            attention=attention_work(self.architecture),
        )

    def padding(self, seed: int) -> float:
        return padding_fraction(self.buckets(seed))

    def step(self, seed: int) -> Any:
        self.state, _ = self.update(self.state, self.buckets(seed))
        return self.state.params


def _against_matmul(tokens: list[int], timing: Timing) -> dict[str, float]:
    """Useful floating-point operations of the update against a plain matrix product's."""
    size = 1024
    square = jnp.ones((size, size), jnp.float32)
    product = jax.jit(lambda a: a @ a)
    seconds = in_turn({"matmul": lambda: product(square)}, 15)["matmul"].summary()["wall_s"]
    peak = 2 * size**3 / seconds
    parameters = parameter_count(Architecture(**workload.SIZES))
    done = statistics.median(
        6 * parameters * n / t for n, t in zip(tokens, timing.wall, strict=True)
    )
    return {"matmul_gflops": peak / 1e9, "update_gflops": done / 1e9, "share": done / peak}


def head_memory(layers: int = 36, tokens: int = 8192) -> dict[str, float]:
    """Bytes of temporaries of the gradient at 3B shape, one row, with a large and a small
    vocabulary; from the compiled program alone, nothing is allocated."""
    found = {}
    for vocab in (152_064, 1_024):
        architecture = Architecture(
            vocab=vocab,
            layers=layers,
            d_model=2048,
            heads=16,
            kv_heads=2,
            head_dim=128,
            d_ff=11_008,
            tied_embeddings=True,
            rope_theta=1_000_000.0,
        )
        found[f"vocabulary_{vocab}"] = float(_temporaries(architecture, tokens))
    large, small = found.values()
    return found | {"ratio": large / small}


def _temporaries(architecture: Architecture, tokens: int) -> int:
    graphdef, params = make_graphdef(architecture), abstract_params(architecture)

    def token_loss(logprobs: jax.Array, advantages: jax.Array, bucket: Bucket) -> jax.Array:
        return clipped(logprobs, bucket.old_logprobs, advantages)

    update = Update(graphdef, optax.sgd(1.0), LossTerms(token_loss))
    row, one = (1, tokens), (1,)
    shapes: dict[str, Any] = {
        "tokens": (row, jnp.int32),
        "positions": (row, jnp.int32),
        "segment_ids": (row, jnp.int32),
        "loss_mask": (row, bool),
        "sampler_logprobs": (row, jnp.float32),
        "old_logprobs": (row, jnp.float32),
        "advantages": (one, jnp.float32),
        "weights": (one, jnp.float32),
        "auxiliary_weights": (one, jnp.float32),
    }
    fields: dict[str, Any] = {k: jax.ShapeDtypeStruct(*shape) for k, shape in shapes.items()}
    bucket = Bucket(**fields)
    compiled = jax.jit(update.gradient).lower(params, bucket).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes
