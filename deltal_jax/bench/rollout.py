"""Sampling, against peers on the same prompts and against a loop of nothing but its products."""

import contextlib
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deltal_jax.bench import workload
from deltal_jax.bench.measure import Timing, ratio
from deltal_jax.bench.peer import Peer
from deltal_jax.model.architecture import Architecture
from deltal_jax.model.attention import attend_cache
from deltal_jax.model.cache import init_cache
from deltal_jax.model.transformer import init_model, split_model, take_apart
from deltal_jax.rollout.engine import Engine, SamplingOptions
from deltal_jax.types import Prompts

#: Peers: what `--peer` runs, and how to get it.
PEERS = {
    "tunix": ("tunix_sampler.py", "pip install google-tunix==0.1.7"),
    "transformers": ("transformers_sampler.py", "pip install torch==2.13.0 transformers"),
}


def benchmark_rollout(rounds: int, pythons: dict[str, str]) -> dict[str, Any]:
    """Every figure of `deltal bench rollout`; `pythons` are those of environments with a peer.

    Two loads of 32 prompts: "geometric", whose responses end after about 50 of at most 128 tokens,
    and "full", which all run to 128. Ours alone: "queued", four geometric responses to each prompt
    on 16 slots, and "limit 1024" and "limit 2048", the geometric load where no response comes near
    the limit. All sides take turns, one seed a round.
    """
    seeds = list(range(rounds))
    sides = {
        "geometric": Side(workload.ENDS),
        "full": Side(()),
        "queued": Side(workload.ENDS, slots=16, samples=4),
        "limit 1024": Side(workload.ENDS, limit=1024),
        "limit 2048": Side(workload.ENDS, limit=2048),
    }
    for side in sides.values():
        for seed in seeds:  # compiles: lengths decide which sizes and windows come up
            side.sample(seed)
        side.forget()
    floor = Floor(sides["full"])
    floor.run()
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in pythons}
    products = Timing()
    with contextlib.ExitStack() as stack:
        peers = {
            name: stack.enter_context(Peer(python, PEERS[name][0], name, seeds))
            for name, python in pythons.items()
        }
        for seed in seeds:
            for side in sides.values():
                side.sample(seed)
            products.call(floor.run)
            for name, peer in peers.items():
                answers[name].append(peer.ask(seed))
    figures: dict[str, Any] = {name: side.figures() for name, side in sides.items()}
    figures["full"]["products_over_ours"] = ratio(products, sides["full"].timing)
    doubled, limited = (sides[name].timing for name in ("limit 2048", "limit 1024"))
    figures["limit 2048"]["over_limit_1024"] = ratio(doubled, limited)
    for name in pythons:
        figures[name] = _peer_figures(answers[name], sides)
    for name in PEERS.keys() - pythons.keys():
        figures[name] = {"missing": f"--peer {name}=PYTHON of an environment: {PEERS[name][1]}"}
    return figures


class Side:
    """Our engine on the load with some ends."""

    def __init__(
        self,
        ends: tuple[int, ...],
        *,
        slots: int = workload.RESPONSES,
        limit: int = workload.LIMIT,
        samples: int = 1,
    ):
        self.samples = samples
        self.architecture = Architecture(**workload.SIZES, remat="none")
        graphdef, self.params = split_model(init_model(self.architecture, jax.random.key(0)))
        options = SamplingOptions(slots=slots, max_response_length=limit, eos_ids=ends)
        self.engine = Engine(graphdef, options)
        self.key = jax.random.key(0, impl="threefry2x32")
        self.forget()

    def forget(self) -> None:
        """Begin to measure."""
        self.timing, self.tokens = Timing(), list[int]()
        self.utilization: list[tuple[float, float]] = []

    def sample(self, seed: int) -> None:
        """Responses to each prompt of a seed."""
        count = workload.RESPONSES
        prompts = Prompts(
            tokens=workload.prompt_tokens(seed),
            lengths=np.full(count, workload.PROMPT, np.int32),
            positions=np.arange(count, dtype=np.int32),
        )
        found: Any = None

        def call() -> None:
            nonlocal found
            found = self.engine.generate(
                self.params, prompts, self.key, samples=self.samples, step=seed
            )

        self.timing.call(call)
        rollout, stats = found
        self.tokens.append(int(rollout.response_lengths.sum()))
        self.utilization.append((stats.utilization, stats.utilization_queued))

    def speeds(self) -> list[float]:
        """Useful tokens a second of each round."""
        return [n / t for n, t in zip(self.tokens, self.timing.wall, strict=True)]

    def figures(self) -> dict[str, float]:
        """Medians over the rounds."""
        return self.timing.summary() | {
            "useful_tokens_per_s": statistics.median(self.speeds()),
            "utilization": statistics.median(whole for whole, _ in self.utilization),
            "utilization_queued": statistics.median(queued for _, queued in self.utilization),
        }


class Floor:
    """As many steps of the same matrix products and reads of the cache, and nothing else."""

    def __init__(self, side: Side):
        arch = side.architecture
        S, T = workload.RESPONSES, workload.PROMPT + workload.LIMIT
        embedding = side.params["embed"]["embedding"]
        layers = take_apart(side.params)[1]
        empty = init_cache(arch.layers, S, arch.kv_heads, T, arch.head_dim, jnp.dtype("float32"))
        caches = jax.tree.map(jnp.ones_like, empty)
        positions = jnp.full((S, 1), T - 1)

        def layer(x: jax.Array, weights: Any, cache: tuple[jax.Array, jax.Array]) -> jax.Array:
            own, mlp = weights["attention"], weights["mlp"]
            q, k, v = (x @ own[name]["kernel"] for name in ("q", "k", "v"))
            heads = q.reshape(S, 1, arch.heads, arch.head_dim)
            found = attend_cache(heads, *cache, positions).reshape(S, -1)
            x = (found + jnp.concatenate([k, v], axis=1)) @ own["o"]["kernel"]
            wide = (x @ mlp["gate"]["kernel"]) * (x @ mlp["up"]["kernel"])
            return wide @ mlp["down"]["kernel"]

        def steps(x: jax.Array, layers: Any, caches: Any, embedding: jax.Array) -> jax.Array:
            def step(_: int, x: jax.Array) -> jax.Array:
                for weights, cache in zip(layers, caches, strict=True):
                    x = layer(x, weights, cache)
                logits = x @ embedding.T
                return logits[:, : arch.d_model] * 1e-3

            return jax.lax.fori_loop(0, workload.LIMIT, step, x)

        self._run = jax.jit(steps)
        self._arguments = jnp.ones((S, arch.d_model)), layers, caches, embedding

    def run(self) -> jax.Array:
        """All steps."""
        return self._run(*self._arguments)


def _peer_figures(answers: list[dict[str, Any]], sides: dict[str, Side]) -> dict[str, Any]:
    loads: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "geometric": lambda answer: answer,
        "full": lambda answer: answer["full"],
    }
    figures: dict[str, Any] = {}
    for load, of in loads.items():
        theirs = [of(answer) for answer in answers]
        speeds = [x["tokens"] / x["wall"] for x in theirs]
        side = sides[load]
        per_cpu = [n / t for n, t in zip(side.tokens, side.timing.cpu, strict=True)]
        figures[load] = {
            "wall_s": statistics.median(x["wall"] for x in theirs),
            "cpu_s": statistics.median(x["cpu"] for x in theirs),
            "useful_tokens_per_s": statistics.median(speeds),
            "ours_over_it": statistics.median(
                a / b for a, b in zip(side.speeds(), speeds, strict=True)
            ),
            "ours_over_it_per_cpu_s": statistics.median(
                a / (x["tokens"] / x["cpu"]) for a, x in zip(per_cpu, theirs, strict=True)
            ),
        }
    return figures
