"""What cannot be sampled is refused before anything compiles."""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deltal_jax.errors import UserError
from deltal_jax.model.architecture import Architecture
from deltal_jax.model.cache import cache_bytes
from deltal_jax.model.transformer import cast_weights, take_apart
from deltal_jax.rollout.pools import NARROWEST_PROMPT, doubled, pool_prompts
from deltal_jax.rollout.slots import SamplingOptions
from deltal_jax.types import Prompts


def check_request(
    options: SamplingOptions, arch: Architecture, prompts: Prompts, samples: int
) -> None:
    """Raises UserError, naming the field, for what cannot be sampled."""
    if options.slots < 1 or samples < 1:
        raise UserError("rollout.slots: needs at least one slot and one sample a prompt")
    if options.max_response_length < 1:
        raise UserError(
            f"rollout.max_response_length: must be at least 1, got {options.max_response_length}"
        )
    if options.top_k is not None and options.top_k < 1:
        raise UserError(f"rollout.top_k: must be at least 1, got {options.top_k}")
    for name, value, high in (
        ("temperature", options.temperature, np.inf),
        ("top_p", options.top_p, 1.0),
        ("min_p", options.min_p, 1.0),
    ):
        finite = 0.0 <= value <= high and value < np.inf
        if not finite or (name == "top_p" and value == 0.0):
            raise UserError(f"rollout.{name}: {value} is out of its range")
    unknown = [i for i in options.eos_ids if not 0 <= i < arch.vocab]
    if unknown:
        raise UserError(f"eos_ids: {unknown[0]} is no id of a vocabulary of {arch.vocab}")
    lengths, tokens = np.asarray(prompts.lengths), np.asarray(prompts.tokens)
    width = tokens.shape[1]
    if len(lengths) != len(tokens):
        raise UserError(f"prompts: {len(tokens)} of them have {len(lengths)} lengths")
    if len(lengths) == 0 or lengths.min() < 1:
        which = "there is none" if len(lengths) == 0 else f"number {int(lengths.argmin())} is empty"
        raise UserError(f"prompts: {which}; a response needs a token to begin from")
    if lengths.max() > width:
        raise UserError(f"rollout.max_prompt_length: {width}, but a prompt takes {lengths.max()}")
    real = tokens[np.arange(width) < lengths[:, None]]
    if real.min() < 0 or real.max() >= arch.vocab:
        wrong = real[(real < 0) | (real >= arch.vocab)][0]
        raise UserError(f"prompts: {wrong} is no id of a vocabulary of {arch.vocab}")


def sampling_memory(
    options: SamplingOptions,
    arch: Architecture,
    params: Any,
    prompts: tuple[int, int],
    samples: int,
    *,
    carried: bool = False,
    shards: int = 1,
    tensor: int = 1,
) -> dict[str, int]:
    """Bytes that sampling takes on each of `shards` devices, beside the parameters themselves, by
    part: at most, as if every response ran to the limit. `prompts` is how many and how wide;
    `params` are arrays or shapes; `carried`: whether some responses were begun before, one a slot
    at most; heads are split over `tensor` devices."""
    count, width = prompts
    time, slots = width + options.max_response_length, options.slots // shards
    heads = arch.kv_heads // tensor if arch.kv_heads % tensor == 0 else arch.kv_heads
    abstract = jax.eval_shape(lambda x: x, params)
    dtype = arch.compute_dtype
    rest, layers = jax.eval_shape(lambda x: take_apart(cast_weights(x, dtype)), abstract)
    before, after = jax.tree.leaves(abstract), jax.tree.leaves(rest)
    copies = sum(_bytes(b) for a, b in zip(before, after, strict=True) if a.dtype != b.dtype)
    apart = sum(_bytes(x) for x in jax.tree.leaves(layers))
    itemsize = jnp.dtype(dtype or before[0].dtype).itemsize
    cache = functools.partial(
        cache_bytes, arch.layers, kv_heads=heads, head_dim=arch.head_dim, itemsize=itemsize
    )
    each = math.ceil(count / shards)
    pool = pool_prompts(each, slots, samples)
    prompt_cache = cache(slots=pool, time=doubled(width, NARROWEST_PROMPT))
    if carried:  # prefilled with what they have
        again = cache(slots=doubled(slots, 1), time=doubled(time, NARROWEST_PROMPT))
        prompt_cache = max(prompt_cache, again)
    written = 3 if options.raw_logprobs else 2
    return {
        "sampling_weights": (copies + apart) // tensor,
        "kv_cache": cache(slots=slots, time=time),
        "prompt_cache": prompt_cache,
        "responses": each * samples * options.max_response_length * written * 4,
    }


def check_memory(slots: int, memory: dict[str, int], free: int | None) -> None:
    """Raises UserError where sampling with so many slots takes more than the bytes that a device
    has free (None: unknown)."""
    if free is None or sum(memory.values()) <= free:
        return
    one = memory["kv_cache"] / slots
    others = sum(memory.values()) - memory["kv_cache"]
    fit = max(int((free - others) / one), 0)
    parts = ", ".join(f"{k.replace('_', ' ')} {v / 2**30:.2f}" for k, v in memory.items())
    total = sum(memory.values()) / 2**30
    raise UserError(
        f"rollout.slots: sampling with {slots} takes {total:.2f} GiB on each device "
        f"({parts}), and {free / 2**30:.2f} GiB are free; {fit} slots would fit"
    )


def free_memory(devices: Sequence[Any] | None = None) -> int | None:
    """Bytes that the fullest of these devices has free (None: all of this process); CPU devices
    share what the machine has. None where nothing says."""
    devices = list(devices or jax.local_devices())
    if devices[0].platform == "cpu":
        available = _available_memory()
        return None if available is None else available // len(devices)
    try:
        stats = [device.memory_stats() or {} for device in devices]
    except (jax.errors.JaxRuntimeError, NotImplementedError):  # devices behind a proxy
        return None
    if not all("bytes_limit" in own for own in stats):
        return None
    return min(own["bytes_limit"] - own.get("bytes_in_use", 0) for own in stats)


def _available_memory() -> int | None:
    """Bytes that this machine can give without swapping, as Linux estimates it."""
    path = Path("/proc/meminfo")
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _bytes(x: Any) -> int:
    return x.size * x.dtype.itemsize
