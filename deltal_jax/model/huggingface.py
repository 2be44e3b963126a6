"""Hugging Face checkpoint folders, in and out, without torch: config.json and safetensors.

Reading goes straight into (sharded) arrays: each process copies only the slices that its own
devices need, a few threads at once, and casts and turns them on the way. A stacked parameter of
ours is one tensor a layer on disk; matrices are stored as [out, in], the transpose of ours.
"""

import collections
import dataclasses
import json
import math
import os
import re
import shutil
import struct
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from deltal_jax.errors import UserError
from deltal_jax.model.families import TensorName, architecture_of, config_of, tensor_names
from deltal_jax.model.transformer import Architecture, abstract_params
from deltal_jax.parallel.sharding import parameter_shardings

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
#: Tensors that some exporters write although they are computed: rotary tables.
COMPUTED = re.compile(r"\.rotary_emb\.")
SHARD_BYTES = 5 * 10**9

#: Threads that read: while some wait for the disk, others cast and turn.
READERS = 4
#: Host bytes of parameters that are being read and not yet on their devices, unless one alone is
#: larger.
AHEAD_BYTES = 512 * 2**20
#: Bytes of a tensor that one thread reads in a row; with shorter runs the kernel reads less ahead.
PIECE_BYTES = 64 * 2**20
#: Bytes of one request. Larger ones bypass the kernel's own reading ahead and cost more CPU time.
REQUEST_BYTES = 2**20
#: Rows, or more up to a request, that are turned together, and bytes of the tiles of it, which stay
#: in a core's cache.
TURNED_ROWS, TILE_BYTES = 128, 256 * 1024

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a checkpoint folder. Raises UserError where there is none, or no JSON."""
    if not (folder / CONFIG).exists():
        raise UserError(f"model.path: {folder} has no {CONFIG}")
    return _read_object(folder / CONFIG)


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: {path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"model.path: {path} holds no JSON object")
    return found


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor lies: bytes from `offset` on, row by row."""

    path: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]


class TensorFiles:
    """The tensors of a checkpoint folder, in one safetensors file or in the shards of an index."""

    def __init__(self, folder: Path):
        self.folder = folder
        names = [SINGLE]
        if (folder / INDEX).is_file():
            index = _read_object(folder / INDEX).get("weight_map")
            if not isinstance(index, dict):
                raise UserError(f"model.path: {folder / INDEX} has no weight_map")
            names = sorted(set(index.values()))
        elif not (folder / SINGLE).is_file():
            raise UserError(f"model.path: {folder} has neither {SINGLE} nor {INDEX}")
        self._home: dict[str, Stored] = {}
        for name in names:
            try:
                self._home |= _header(folder / name)
            except (OSError, SafetensorError) as error:
                raise UserError(f"model.path: {folder / name} cannot be read: {error}") from error

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape, from the headers alone."""
        return {name: stored.shape for name, stored in self._home.items()}

    def dtype(self, name: str) -> np.dtype:
        """A tensor's type on disk."""
        stored = self._home[name]
        if stored.dtype not in DTYPES:
            raise UserError(
                f"model.path: {stored.path}: {name} is of type {stored.dtype}; supported are "
                f"{', '.join(DTYPES)}"
            )
        return DTYPES[stored.dtype]

    def pieces(
        self, name: str, index: tuple[slice, ...], into: np.ndarray
    ) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
        """A slice of a tensor, and where it goes, in rows of about `PIECE_BYTES`."""
        shape = self._home[name].shape
        start, stop, _ = index[0].indices(shape[0])
        step = max(TURNED_ROWS, PIECE_BYTES // (math.prod(shape[1:]) * self.dtype(name).itemsize))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            yield (slice(first, last), *index[1:]), into[first - start : last - start]

    def read(self, name: str, index: tuple[slice, ...], into: np.ndarray) -> None:
        """Fill `into`, which may be a transposed view, with a slice of a tensor, cast to its type.

        Takes memory for one request, or for `TURNED_ROWS` rows, and for two tiles beside `into`.
        Rows are fetched whole, as the kernel does by pages; of them only the slice is copied.
        """
        stored, dtype = self._home[name], self.dtype(name)
        start, stop, _ = index[0].indices(stored.shape[0])
        columns = tuple(
            own.indices(n)[:2] for own, n in zip(index[1:], stored.shape[1:], strict=True)
        )
        whole = all(own == (0, n) for own, n in zip(columns, stored.shape[1:], strict=True))
        row = math.prod(stored.shape[1:]) * dtype.itemsize
        straight = whole and into.dtype == dtype and into.flags.c_contiguous
        step = max(TURNED_ROWS if into.ndim == 2 else 1, REQUEST_BYTES // row)
        shape = (min(step, stop - start), *stored.shape[1:])
        buffer = np.empty((0,) if straight else shape, dtype)
        with open(stored.path, "rb", buffering=0) as file:
            for first in range(start, stop, step):
                target = into[first - start : first - start + step]
                strip = target if straight else buffer[: len(target)]
                _fill(file, strip, stored.offset + first * row)
                if not straight:
                    _copy(strip[:, *(slice(*own) for own in columns)], target)


def _header(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file: 8 bytes that say the length of a JSON object, this object,
    and the tensors, whose `data_offsets` count from there."""
    with safe_open(path, framework="numpy"):  # raises where anything does not fit the file
        pass
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: Stored(path, 8 + length + x["data_offsets"][0], x["dtype"], tuple(x["shape"]))
        for name, x in header.items()
    }


def _fill(file: BinaryIO, target: np.ndarray, offset: int) -> None:
    """Read contiguous memory full, from a place of a file."""
    raw = target.reshape(-1).view(np.uint8).data
    while raw:
        count = os.preadv(file.fileno(), [raw[:REQUEST_BYTES]], offset)
        if count == 0:
            raise UserError(f"model.path: {file.name} ended while it was read")
        raw, offset = raw[count:], offset + count


def _copy(source: np.ndarray, target: np.ndarray) -> None:
    """Copy and cast, where the target may be a transposed view."""
    if source.dtype == target.dtype:  # numpy has no fast copies of bfloat16
        source, target = (x.view(f"u{x.itemsize}") for x in (source, target))
    wide = 16 // source.itemsize
    if source.ndim < 2 or target.flags.c_contiguous or source.shape[1] % wide:
        np.copyto(target, source, casting="unsafe")
        return
    # One after the other, NumPy turns elements of 16 bytes as fast as those of 2: so first these,
    # then what is inside of them, both in cache.
    rows, columns = source.shape
    step = max(1, TILE_BYTES // (16 * rows)) * wide
    for first in range(0, columns, step):
        tile = source[:, first : first + step].view(np.complex128)
        turned = np.ascontiguousarray(tile.T).view(source.dtype)
        inner = turned.reshape(-1, rows, wide).transpose(0, 2, 1)
        own = target.T[first : first + step].reshape(-1, wide, rows)
        if source.dtype != target.dtype:
            bits = inner.view(f"u{source.itemsize}")
            inner = np.ascontiguousarray(bits).view(source.dtype)
        np.copyto(own, inner, casting="unsafe")


def load_architecture(folder: Path) -> Architecture:
    """The architecture of a checkpoint folder."""
    return architecture_of(read_config(folder))


def load_params(
    folder: Path, arch: Architecture, *, mesh: Mesh | None = None, dtype: Any = jnp.float32
) -> Any:
    """The parameters of a checkpoint folder as our pytree, on the mesh or on the default device.

    On their way to other devices, at most `AHEAD_BYTES` of parameters (or the largest one's slices)
    are in the host's memory at a time, and a few megabytes a reader. A CPU device takes that memory
    over, none is needed beside it; the first program that donates it copies it.

    Raises one UserError that lists all missing, extra and misshapen tensors.
    """
    files = TensorFiles(folder)
    abstract = abstract_params(arch)
    names = tensor_names(arch)
    _check(folder, files.shapes(), abstract, names, arch)
    if mesh is None:
        device = SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: device, abstract)
    else:
        shardings = parameter_shardings(mesh, abstract)
    leaves, tree = jax.tree.flatten_with_path(abstract)
    done: list[jax.Array] = []
    reading: collections.deque[_Reading] = collections.deque()
    pool = ThreadPoolExecutor(READERS)
    try:
        for (path, shape), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True):
            begun, bound = _Reading(shape.shape, sharding, dtype), _ahead(sharding)
            while reading and begun.bytes + sum(x.bytes for x in reading) > bound:
                done.append(reading.popleft().array())
            begun.start(pool, files, names[_name(path)])
            reading.append(begun)
        done += [x.array() for x in reading]
    finally:
        pool.shutdown(cancel_futures=True)  # after an error nothing more needs to be read
    return jax.tree.unflatten(tree, done)


def _ahead(sharding: Any) -> float:
    """Bytes that may be on their way: what is read for a CPU device is already in its place."""
    on_cpu = all(device.platform == "cpu" for device in sharding.device_set)
    return math.inf if on_cpu else AHEAD_BYTES


class _Reading:
    """A parameter on its way from the disk: the slices that this process's devices hold."""

    def __init__(self, shape: tuple[int, ...], sharding: Any, dtype: Any):
        self.shape, self.sharding, self.dtype = shape, sharding, np.dtype(dtype)
        indices = sharding.addressable_devices_indices_map(shape).values()
        # Devices that hold the same slice share one read.
        self.indices = {str(index): index for index in indices}
        lengths = [
            [len(range(*own.indices(n))) for own, n in zip(index, shape, strict=True)]
            for index in self.indices.values()
        ]
        self.sizes = dict(zip(self.indices, lengths, strict=True))
        self.bytes = sum(math.prod(size) for size in lengths) * self.dtype.itemsize

    def start(self, pool: ThreadPoolExecutor, files: TensorFiles, tensor: TensorName) -> None:
        """Allocate, and let the pool read."""
        self.parts = {key: _aligned(size, self.dtype) for key, size in self.sizes.items()}
        self.pending: list[Future] = []
        for key, index in self.indices.items():
            for name, own, into in self._tensors(tensor, index, self.parts[key]):
                for rows, piece in files.pieces(name, own, into):
                    self.pending.append(pool.submit(files.read, name, rows, piece))

    def _tensors(
        self, tensor: TensorName, index: tuple[slice, ...], part: np.ndarray
    ) -> Iterator[tuple[str, tuple[slice, ...], np.ndarray]]:
        """The tensors on disk that a slice of ours comes from, which slice of them, and where it
        goes."""
        if "{layer}" in tensor.name:
            layers = range(*index[0].indices(self.shape[0]))
            parts = [(tensor.name.format(layer=layer), index[1:]) for layer in layers]
            targets: Any = part
        else:
            parts, targets = [(tensor.name, index)], [part]
        for (name, own), into in zip(parts, targets, strict=True):
            yield (name, own[::-1], into.T) if tensor.transposed else (name, own, into)

    def array(self) -> jax.Array:
        """Wait for the disk, then for the devices: the host's copy is not needed any more."""
        for piece in self.pending:
            piece.result()
        found = jax.make_array_from_callback(
            self.shape, self.sharding, lambda index: self.parts[str(index)]
        )
        return jax.block_until_ready(found)


def _aligned(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """Memory that a CPU device takes over as it is: it copies what does not start at a multiple of
    64 bytes."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def save_params(
    folder: Path, params: Any, arch: Architecture, *, dtype: Any = jnp.bfloat16
) -> None:
    """Write parameters as safetensors shards of at most 5 GB with their index, in a folder that
    exists."""
    written: list[list[str]] = []  # names of the tensors of each shard
    shard: dict[str, np.ndarray] = {}
    size, total = 0, 0

    def write() -> None:
        # How many there will be, which their names say, is known only at the end.
        _save(shard, folder / f"{len(written)}.part")
        written.append(list(shard))
        shard.clear()

    for name, tensor in _tensors(params, arch, dtype):
        if size and size + tensor.nbytes > SHARD_BYTES:
            write()
            size = 0
        shard[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    write()
    if len(written) == 1:
        (folder / "0.part").rename(folder / SINGLE)
        return
    weight_map = {}
    for number, names in enumerate(written):
        file = f"model-{number + 1:05d}-of-{len(written):05d}.safetensors"
        (folder / f"{number}.part").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _save(tensors: dict[str, np.ndarray], path: Path) -> None:
    """A safetensors file that others may read: the library makes it for its owner alone."""
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(path.parent.stat().st_mode & 0o666)


def export(
    folder: Path,
    params: Any,
    arch: Architecture,
    *,
    config: dict[str, Any] | None = None,
    files: dict[str, bytes] | None = None,
    dtype: Any = jnp.bfloat16,
) -> None:
    """A new checkpoint folder, as a whole or not at all: weights, config and other `files`.

    `config` is that of the checkpoint that the model came from; None describes the architecture.
    Raises UserError where the folder exists.
    """
    if folder.exists():
        raise UserError(f"--to: {folder} exists; name a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        described = dict(config_of(arch) if config is None else config)
        described.pop("torch_dtype", None)
        described["dtype"] = jnp.dtype(dtype).name
        (partial / CONFIG).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        for name, content in (files or {}).items():
            (partial / name).write_bytes(content)
        save_params(partial, params, arch, dtype=dtype)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check(
    folder: Path,
    found: dict[str, tuple[int, ...]],
    abstract: Any,
    names: dict[str, TensorName],
    arch: Architecture,
) -> None:
    wanted = {}
    for path, shape in jax.tree.leaves_with_path(abstract):
        tensor, stacked = names[_name(path)], _name(path).startswith("blocks/")
        own = shape.shape[1:] if stacked else shape.shape
        for layer in range(arch.layers if stacked else 1):
            wanted[tensor.name.format(layer=layer)] = own[::-1] if tensor.transposed else own
    extra = {name for name in set(found) - set(wanted) if not COMPUTED.search(name)}
    if arch.tied_embeddings:
        extra.discard("lm_head.weight")  # some exporters write the embedding twice
    problems = [f"missing {name} {wanted[name]}" for name in sorted(set(wanted) - set(found))]
    problems += [f"unknown {name} {found[name]}" for name in sorted(extra)]
    problems += [
        f"{name} has shape {found[name]}, expected {shape}"
        for name, shape in sorted(wanted.items())
        if name in found and found[name] != shape
    ]
    if problems:
        raise UserError(f"model.path: {folder} does not fit its config: {'; '.join(problems)}")


def _tensors(params: Any, arch: Architecture, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Each tensor as it is on disk; one parameter at a time is in host memory."""
    names = tensor_names(arch)
    for path, value in jax.tree.leaves_with_path(params):
        tensor, host = names[_name(path)], np.asarray(jnp.asarray(value).astype(dtype))
        layered = "{layer}" in tensor.name
        for layer, own in enumerate(host if layered else [host]):
            # safetensors writes the memory as it lies: a transposed view would come out wrong.
            own = np.ascontiguousarray(own.T if tensor.transposed else own)
            yield tensor.name.format(layer=layer), own


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
