"""Models of real size on one accelerator: model FLOPs utilization of the update, what decoding
takes of the memory's bandwidth, and where the time of an RL step goes.

Weights and tokens are random; types, kernels, surrogate and optimizer are those of the experiment
`gsm8k-0.5b-24gb`. Nothing is padded: every row is as long as the bucket.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deltal_jax.bench.measure import Timing, in_turn
from deltal_jax.bench.model import layer_flops
from deltal_jax.config import Config, load_config
from deltal_jax.model.architecture import Architecture, matrix_size
from deltal_jax.model.published import PUBLISHED
from deltal_jax.model.transformer import init_model, make_graphdef, split_model
from deltal_jax.rollout.engine import Engine, SamplingOptions
from deltal_jax.training.buckets import make_buckets
from deltal_jax.training.objective import make_loss
from deltal_jax.training.optimizer import make_optimizer
from deltal_jax.training.setup import make_architecture
from deltal_jax.training.step import Update
from deltal_jax.types import Bucket, Prompts, Rollout

CONFIG = "gsm8k-0.5b-24gb"
#: Part of a device's kind → floating-point operations a second in bfloat16, dense, with sums in
#: float32, and bytes a second of its memory; from NVIDIA's data sheets. The longest part that fits.
PEAKS: dict[str, tuple[float, float]] = {
    "A10G": (70e12, 600e9),
    "A100": (312e12, 2.039e12),
    "A100-SXM4-40GB": (312e12, 1.555e12),
    "A100-PCIE-40GB": (312e12, 1.555e12),
    "A100 80GB PCIe": (312e12, 1.935e12),
    "B200": (2.25e15, 8e12),
    "GeForce RTX 3090": (71e12, 936e9),
    "GeForce RTX 4090": (165e12, 1.008e12),
    "H100": (989e12, 3.35e12),
    "H100 PCIe": (756e12, 2.0e12),
    "H200": (989e12, 4.8e12),
    "L4": (121e12, 300e9),
    "L40S": (362e12, 864e9),
}


@dataclasses.dataclass(frozen=True)
class Load:
    """A model, and how much of what it is given."""

    fields: dict[str, Any]  # of the experiment, that are other
    rows: int  # of a micro-batch
    tokens: int  # of a row: prompt and response
    microbatches: int  # of an update
    #: Responses are sampled up to these many tokens; a step's are of the second.
    lengths: tuple[int, int]
    vocab: int = 151_936

    @property
    def responses(self) -> int:
        """Of a step; each has its slot."""
        return self.rows * self.microbatches


#: 4,096 tokens a micro-batch, 64 responses of 512 tokens to prompts of 512.
_REAL: dict[str, Any] = dict(rows=4, tokens=1024, microbatches=16, lengths=(128, 512))
_TINY = {"path": None, "layers": 2, "d_model": 64, "heads": 4, "head_dim": 16, "d_ff": 128}
LOADS = {
    "tiny": Load(
        {f"model.{name}": value for name, value in _TINY.items()}
        | {"model.compute_dtype": "float32", "model.tied_embeddings": True},
        rows=2,
        tokens=64,
        microbatches=2,
        lengths=(16, 48),
        vocab=512,
    ),
    "0.5b": Load({"model.path": "Qwen/Qwen2.5-0.5B"}, **_REAL),
    "3b": Load({"model.path": "Qwen/Qwen2.5-3B"}, **_REAL),
}


def benchmark_gpu(rounds: int, shapes: list[str]) -> dict[str, Any]:
    """Every figure of `deltal bench gpu`: medians over the rounds, for each of the shapes. One that
    the memory has no room for says so."""
    figures: dict[str, Any] = {"device": device_limits(rounds)}
    for shape in shapes:
        try:
            figures[shape] = _measure(rounds, LOADS[shape], figures["device"])
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            figures[shape] = {"missing": "the device's memory has no room for it"}
    return figures


def device_limits(rounds: int) -> dict[str, Any]:
    """What the device can do: by the table, and for one that is not in it as measured here, by the
    product of two matrices and the copy of an array."""
    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    size, dtype = (1024, jnp.float32) if on_cpu else (8192, jnp.bfloat16)
    square, long = jnp.ones((size, size), dtype), jnp.ones((2**25 if on_cpu else 2**30,), dtype)
    product = jax.jit(lambda a: a @ a)
    change = jax.jit(lambda a: a + 1, donate_argnums=0)  # new memory is slow on a CPU

    def copy() -> jax.Array:
        nonlocal long
        long = change(long)
        return long

    timings = in_turn({"product": lambda: product(square), "copy": copy}, rounds)
    found = {
        "kind": device.device_kind,
        "measured_flops": 2 * size**3 / timings["product"].summary()["wall_s"],
        "measured_bytes_per_s": 2 * long.nbytes / timings["copy"].summary()["wall_s"],
    }
    known = known_peaks(device.device_kind)
    flops, rate = known or (found["measured_flops"], found["measured_bytes_per_s"])
    source = "data sheet" if known else "measured"
    return found | {"peak_flops": flops, "peak_bytes_per_s": rate, "peaks_from": source}


def known_peaks(kind: str) -> tuple[float, float] | None:
    """Operations and bytes a second of a device's kind, where the table has it."""
    parts = [part for part in PEAKS if part in kind]
    return PEAKS[max(parts, key=len)] if parts else None


def update_flops(arch: Architecture, rows: int, tokens: int) -> float:
    """Useful operations of the gradient of a bucket: 6 N a token, N the parameters that it is
    multiplied with, and the two products of attention below its causal mask. Neither what is
    computed twice to save memory, nor masked scores."""
    head = 2.0 * rows * tokens * arch.d_model * arch.vocab
    return 3.0 * (sum(layer_flops(arch, rows, tokens, masked=False).values()) + head)


def step_bytes(arch: Architecture, slots: int, position: float) -> dict[str, float]:
    """Bytes that decoding one token in each slot has to read: the matrices once, and of each slot's
    cache the keys and values before `position`."""
    assert arch.compute_dtype is not None
    size = jnp.dtype(arch.compute_dtype).itemsize
    weights = arch.layers * matrix_size(arch) + arch.d_model * arch.vocab
    cache = slots * arch.layers * 2 * arch.kv_heads * arch.head_dim * position
    return {"weights": float(size * weights), "cache": float(size * cache)}


def make_parts(load: Load) -> tuple[Config, Architecture, Update]:
    """The experiment, its model's shape and its update, without allocating anything."""
    config = load_config(CONFIG, load.fields)
    published = PUBLISHED.get(config.model.path or "")
    arch = make_architecture(config, load.vocab, published)
    optimizer = make_optimizer(config.rl.optimizer, 0)
    return config, arch, Update(make_graphdef(arch), optimizer, make_loss(config))


class _Model:
    """A model with random weights, as an experiment of this config trains it."""

    def __init__(self, load: Load):
        self.load = load
        config, self.arch, self.update = make_parts(load)

        def fresh(key: jax.Array) -> Any:
            params = split_model(init_model(self.arch, key))[1]
            return jax.tree.map(lambda x: x.astype(config.model.param_dtype), params)

        key = jax.random.key(0, impl="threefry2x32")
        self.state = self.update.init(jax.jit(fresh)(key), key, donate=True)
        self.buckets = make_load(load, config)
        self.prompts = _prompts(load)
        options = {"slots": load.responses, "eos_ids": ()}
        self.engines = [
            Engine(make_graphdef(self.arch), SamplingOptions(max_response_length=length, **options))
            for length in load.lengths
        ]

    def sample(self, which: int) -> None:
        """A response in every slot, of the first or the second length."""
        key = jax.random.key(1, impl="threefry2x32")
        self.engines[which].generate(self.state.params, self.prompts, key, samples=1)

    def logprobs(self) -> list[jax.Array]:
        """Of all tokens, as they are recomputed before the first update."""
        place = self.update.place
        return [self.update.logprobs(self.state.params, place(b)) for b in self.buckets]

    def gradients(self) -> Any:
        """Of all micro-batches, added."""
        return self.update.accumulate(self.state.params, self.buckets)

    def step(self) -> Any:
        """The same, and the optimizer's step."""
        self.state, _ = self.update(self.state, self.buckets)
        return self.state.params


def _prompts(load: Load) -> Prompts:
    count, width = load.responses, load.tokens - load.lengths[1]
    tokens = np.random.default_rng(0).integers(3, load.vocab, (count, width), dtype=np.int32)
    lengths = np.full(count, width, np.int32)
    return Prompts(tokens=tokens, lengths=lengths, positions=np.arange(count, dtype=np.int32))


def make_load(load: Load, config: Config) -> list[Bucket]:
    """Rows without padding; weights and advantages of no consequence for the time."""
    rng, count = np.random.default_rng(1), load.responses
    shape, prompt = (count, load.tokens), load.tokens - load.lengths[1]
    mask = np.broadcast_to(np.arange(load.tokens) >= prompt, shape)
    logprobs = np.where(mask, -np.log(load.vocab), 0.0).astype(np.float32)
    rollout = Rollout(
        tokens=rng.integers(3, load.vocab, shape, dtype=np.int32),
        prompt_lengths=np.full(count, prompt, np.int32),
        lengths=np.full(count, load.tokens, np.int32),
        loss_mask=np.array(mask),
        logprobs=logprobs,
        truncated=np.ones(count, bool),
        group_ids=np.arange(count, dtype=np.int32),
    )
    return make_buckets(
        rollout,
        np.arange(count),
        advantages=rng.normal(size=count).astype(np.float32),
        weights=np.full(count, 1 / mask.sum(), np.float32),
        old_logprobs=logprobs,
        edges=(load.tokens,),
        tokens_per_microbatch=load.rows * load.tokens,
        pack=config.rl.pack,
    )


def _measure(rounds: int, load: Load, device: dict[str, Any]) -> dict[str, Any]:
    model = _Model(load)
    sides = {
        "sampling, shorter": lambda: model.sample(0),
        "sampling": lambda: model.sample(1),
        "old_logprobs": model.logprobs,
        "gradients": model.gradients,
        "update": model.step,
    }
    timings = in_turn(sides, rounds)
    seconds = {name: timing.summary()["wall_s"] for name, timing in timings.items()}
    tokens = load.responses * load.tokens
    done = load.microbatches * update_flops(model.arch, load.rows, load.tokens)
    optimizer = max(seconds["update"] - seconds["gradients"], 0.0)
    split = {name: seconds[name] for name in ("sampling", "old_logprobs", "gradients")}
    split["optimizer"] = optimizer
    whole = sum(split.values())
    return {
        "model": {
            "attention": model.arch.attention,
            "compute_dtype": model.arch.compute_dtype,
            "parameters": sum(x.size for x in jax.tree.leaves(model.state.params)),
        },
        "update": {
            "wall_s": seconds["update"],
            "tokens_per_s": tokens / seconds["update"],
            "useful_flops": done / seconds["update"],
            "mfu": done / seconds["update"] / device["peak_flops"],
            "mfu_gradients": done / seconds["gradients"] / device["peak_flops"],
        },
        "decode": _decode(model, timings, device),
        "step": {f"{name}_s": value for name, value in split.items()}
        | {f"{name}_share": value / whole for name, value in split.items()},
    }


def _decode(model: _Model, timings: dict[str, Timing], device: dict[str, Any]) -> dict[str, float]:
    """One step of all slots: what longer responses take more, a token; prefill is in neither."""
    load, (short, long) = model.load, model.load.lengths
    rounds = zip(timings["sampling"].wall, timings["sampling, shorter"].wall, strict=True)
    step = float(np.median([(a - b) / (long - short) for a, b in rounds]))
    position = load.tokens - long + (short + long) / 2
    read = step_bytes(model.arch, load.responses, position)
    rate = sum(read.values()) / step
    return {
        "step_s": step,
        "tokens_per_s": load.responses / step,
        "weight_bytes": read["weights"],
        "cache_bytes": read["cache"],
        "bytes_per_s": rate,
        "share_of_bandwidth": rate / device["peak_bytes_per_s"],
    }
