"""Loading a random checkpoint, against a plain read of its files, both from the disk."""

import contextlib
import gc
import json
import math
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from deltal_jax.bench.measure import Timing, ratio
from deltal_jax.errors import UserError
from deltal_jax.model.architecture import Architecture
from deltal_jax.model.families import config_of
from deltal_jax.model.huggingface import CONFIG, INDEX, load_params, stored_shapes

#: The shapes of Qwen2.5-1.5B with 16 of its 28 layers: 1.96 GB in bfloat16.
ARCHITECTURE = Architecture(
    vocab=151_936,
    layers=16,
    d_model=1536,
    heads=12,
    kv_heads=2,
    head_dim=128,
    d_ff=8960,
    tied_embeddings=True,
    qk_norm=True,
)
SHARD_BYTES = 400 * 10**6
#: Bytes of one plain read. Larger ones were slower: they bypass the kernel's own reading ahead.
CHUNK_BYTES = 2**20
TYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}


def benchmark_loading(
    rounds: int, folder: str | None = None, arch: Architecture = ARCHITECTURE
) -> dict[str, Any]:
    """Every figure of `deltal bench loading`; the checkpoint is written in `folder`, else where
    temporary files go, and removed at the end.

    `share_of_plain_read` is the seconds of the plain read, into one small buffer, over those of
    loading; `from_disk` the bytes that the kernel fetched over those of the files, 1 where dropping
    them from its cache worked; `extra_bytes` the most anonymous memory beside the parameters.
    `fresh memory` is what writing once to memory of the size of the files costs. Before every turn,
    untimed, as much memory as the largest side takes is touched and given back, so that no side
    waits for the host of a virtual machine to find it.
    """
    if not (hasattr(os, "posix_fadvise") and Path("/proc/self/io").exists()):
        raise UserError("bench loading: only on Linux can files be dropped from the page cache")
    try:
        with tempfile.TemporaryDirectory(dir=folder) as name:
            return _measure(rounds, Path(name), arch)
    except OSError as error:
        raise UserError(f"--folder: {error}") from error


def _measure(rounds: int, folder: Path, arch: Architecture) -> dict[str, Any]:
    files = write_checkpoint(folder, arch)
    size = sum(file.stat().st_size for file in files)
    sides: dict[str, Callable[[], Any]] = {"plain read": lambda: plain_read(files)}
    for name, dtype in TYPES.items():
        sides[name] = lambda dtype=dtype: load_params(folder, arch, dtype=dtype)
    sides["fresh memory"] = lambda: np.empty(size, np.uint8).fill(0)
    timings = {name: Timing() for name in sides}
    fetched: dict[str, list[int]] = {name: [] for name in sides}
    extra = {name: _extra_memory(sides[name]) for name in TYPES}  # also compiles what there is
    for _ in range(rounds):
        for name, side in sides.items():
            gc.collect()
            np.empty(2 * size, np.uint8).fill(1)
            drop(files)
            before = _fetched()
            timings[name].call(side)
            fetched[name].append(_fetched() - before)
    figures: dict[str, Any] = {"checkpoint": {"bytes": size, "files": len(files)}}
    for name, timing in timings.items():
        figures[name] = timing.summary()
        if name != "fresh memory":
            figures[name]["mb_per_s"] = size / figures[name]["wall_s"] / 1e6
            figures[name]["from_disk"] = min(fetched[name]) / size
        if name in TYPES:
            figures[name]["share_of_plain_read"] = ratio(timings["plain read"], timing)
            figures[name]["extra_bytes"] = extra[name]
    return figures


def write_checkpoint(folder: Path, arch: Architecture) -> list[Path]:
    """A folder of random bfloat16 bits in shards of about `SHARD_BYTES`, layer by layer as others
    write them, on the disk; the shards."""
    rng = np.random.default_rng(0)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, shape in sorted(stored_shapes(arch).items()):
        if size + 2 * math.prod(shape) > SHARD_BYTES and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += 2 * math.prod(shape)
    weight_map, files = {}, []
    for number, shard in enumerate(shards):
        files.append(folder / f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors")
        drawn = {name: rng.bytes(2 * math.prod(shape)) for name, shape in shard}
        bits = {name: np.frombuffer(drawn[name], ml_dtypes.bfloat16) for name in drawn}
        save_file({name: bits[name].reshape(shape) for name, shape in shard}, files[-1])
        weight_map |= dict.fromkeys(drawn, files[-1].name)
        with open(files[-1], "rb") as file:
            os.fsync(file.fileno())  # what is not on the disk cannot be dropped
    (folder / CONFIG).write_text(json.dumps(config_of(arch)), encoding="utf-8")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return files


def plain_read(files: list[Path]) -> None:
    """Read all bytes, one after the other, into the same memory."""
    buffer = bytearray(CHUNK_BYTES)
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def drop(files: list[Path]) -> None:
    """Ask the kernel to forget what it holds of files that are on the disk."""
    for path in files:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _fetched() -> int:
    """Bytes that this process had fetched from disks so far."""
    return _kernel_count("/proc/self/io", "read_bytes:")


def _anonymous() -> int:
    """Bytes of this process's memory that no file stands behind."""
    return _kernel_count("/proc/self/status", "RssAnon:") * 1024


def _kernel_count(path: str, key: str) -> int:
    lines = Path(path).read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def _extra_memory(load: Callable[[], Any]) -> int:
    """The most anonymous bytes while it loads beside those of what it returns."""
    gc.collect()
    before = _anonymous()
    with _peak() as peak:
        params = jax.block_until_ready(load())
    # What older arrays left behind may go meanwhile: then there is less than nothing beside them.
    return max(peak) - before - sum(x.nbytes for x in jax.tree.leaves(params))


@contextlib.contextmanager
def _peak() -> Iterator[list[int]]:
    """Samples of the anonymous memory, every 2 ms."""
    samples, done = [_anonymous()], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            samples.append(_anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield samples
    finally:
        done.set()
        watcher.join()
        samples.append(_anonymous())
