"""The tensors of a checkpoint folder on disk: safetensors files, read by slices, cast and turned.

What the `safetensors` library itself gives is copied once more and turned by NumPy at a tenth of
the disk's speed; here a few threads fill the memory in which the arrays will live.
"""

import dataclasses
import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from deltal_jax.errors import UserError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
#: Bytes of a tensor that one thread reads in a row; with shorter runs the kernel reads less ahead.
PIECE_BYTES = 64 * 2**20
#: Bytes of one request. Larger ones bypass the kernel's own reading ahead and cost more CPU time.
REQUEST_BYTES = 2**20
#: Rows, or more up to a request, that are turned together, and bytes of the tiles of it, which stay
#: in a core's cache.
TURNED_ROWS, TILE_BYTES = 128, 256 * 1024
#: Places of a file that its fingerprint sees, and bytes of each.
SAMPLES, SAMPLE_BYTES = 256, 4096

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


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
            index = read_object(folder / INDEX).get("weight_map")
            if not isinstance(index, dict) or not all(isinstance(x, str) for x in index.values()):
                raise UserError(f"model.path: {folder / INDEX} has no weight_map of file names")
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


def fingerprint(folder: Path) -> dict[str, str]:
    """A hash of each safetensors file of a folder: of its size and of `SAMPLES` places in it, the
    header among them. Tells other weights from the same ones without reading them all; a single
    damaged byte may escape it."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        with open(path, "rb") as file:
            for number in range(SAMPLES):
                file.seek(size * number // SAMPLES)
                digest.update(file.read(SAMPLE_BYTES))
        found[path.name] = digest.hexdigest()
    return found


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: {path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"model.path: {path} holds no JSON object")
    return found
