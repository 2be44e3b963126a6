"""What cannot be sampled is refused before anything compiles."""

import jax
import jax.numpy as jnp
import numpy as np

from deltal_jax.errors import UserError
from deltal_jax.model.cache import cache_bytes
from deltal_jax.model.transformer import Architecture
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
        if not 0.0 <= value <= high or (name == "top_p" and value == 0.0):
            raise UserError(f"rollout.{name}: {value} is out of its range")
    unknown = [i for i in options.eos_ids if not 0 <= i < arch.vocab]
    if unknown:
        raise UserError(f"eos_ids: {unknown[0]} is no id of a vocabulary of {arch.vocab}")
    lengths, width = np.asarray(prompts.lengths), prompts.tokens.shape[1]
    if len(lengths) == 0 or lengths.min() < 1:
        which = "there is none" if len(lengths) == 0 else f"number {int(lengths.argmin())} is empty"
        raise UserError(f"prompts: {which}; a response needs a token to begin from")
    if lengths.max() > width:
        raise UserError(f"rollout.max_prompt_length: {width}, but a prompt takes {lengths.max()}")


def check_memory(
    options: SamplingOptions, arch: Architecture, prompt_width: int, shards: int = 1
) -> None:
    """Raises UserError where a device's part of the widest cache is more than it has free."""
    free = free_memory()
    itemsize = jnp.dtype(arch.compute_dtype or "float32").itemsize
    time = prompt_width + options.max_response_length
    one = cache_bytes(arch.layers, 1, arch.kv_heads, time, arch.head_dim, itemsize)
    if free is not None and one * options.slots > free * shards:
        raise UserError(
            f"rollout.slots: the cache of {options.slots} slots of {time} tokens takes "
            f"{one * options.slots / 2**30:.1f} GiB, and {free * shards / 2**30:.1f} GiB are free; "
            f"{max(free // one, 0) * shards} slots would fit"
        )


def free_memory() -> int | None:
    """Bytes that a device here has free; None where it does not say, as CPUs."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
