"""Rows of a data file by their number, read when they are asked for: memory is bounded whatever the
file's size.

.jsonl     an index of where lines begin (8 bytes a row), and one read a row
.parquet   copied once into an unlinked temporary file of small blocks: a row group may be the whole
           file, so that one row could cost as much as all
.json      a list; it has to be parsed as a whole, so it is held as a whole
"""

import abc
import collections
import dataclasses
import functools
import hashlib
import json
import os
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar, overload

import numpy as np

from deltal_jax.errors import UserError

Example = TypeVar("Example")
#: Bytes that are searched for line ends at once.
CHUNK = 1 << 22
#: Rows of a Parquet file's copy that are read together, at most.
BLOCK = 64
_NEWLINE, _BOM = 10, b"\xef\xbb\xbf"
_SPACES = np.frombuffer(b" \t\r\v\f", np.uint8)


class NotJson(str):
    """A line that is none."""


@dataclasses.dataclass
class Dropped:
    """Rows that are no problem: how many by reason, and the first of each."""

    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    first: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(self, reason: str, row: Any, number: int) -> None:
        self.counts[reason] += 1
        self.first.setdefault(reason, f"row {number}: {' '.join(repr(row).split())[:120]}")


class DropError(Exception):
    """Why a row is no problem."""


def nothing_in(path: Path, dropped: Dropped, field: str) -> UserError:
    """What to say of a file, which this field named, without problems."""
    why = ", ".join(f"{reason}: {count}" for reason, count in dropped.counts.items())
    return UserError(f"{field}: {path} has no problem with an answer ({why or 'it is empty'})")


def check_text(text: str) -> None:
    """Raises DropError for half a surrogate pair, which JSON can hold and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DropError("text with half a character") from None


class Rows(Sequence[Any], abc.ABC):
    """The rows of a file as plain Python values: `rows[0]`, `len(rows)`, iteration in file order.
    Any thread may read."""

    def __init__(self, path: Path):
        self.path = path

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the file's whole content, so that a run goes on with the same data only."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self._read(i) for i in range(*index.indices(len(self)))]
        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self._read(number)

    @abc.abstractmethod
    def _read(self, number: int) -> Any:
        """One row, 0 ≤ number < len."""


def examples(
    rows: Rows,
    make: Callable[[Any, int], Example],
    dropped: Dropped,
    numbers: range | None = None,
) -> Iterator[Example]:
    """What `make(row, number)` makes of the rows, or of those with these numbers; where it raises
    DropError, `dropped` grows."""
    for number in range(len(rows)) if numbers is None else numbers:
        row = rows[number]
        try:
            yield make(row, number)
        except DropError as reason:
            dropped.add(str(reason), row, number)


def open_rows(path: Path, field: str) -> Rows:
    """The rows of a .json (a list), .jsonl or .parquet file.

    Blank lines are no rows; a line that is not JSON is a `NotJson`. Raises UserError, naming the
    `field` that said so, where the file can't be read.
    """
    kinds = {".json": JsonRows, ".jsonl": JsonLines, ".parquet": ParquetRows}
    if path.suffix not in kinds:
        raise UserError(f"{field}: {path} ends neither in .json, .jsonl nor .parquet")
    try:
        return kinds[path.suffix](path, field)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{field}: {path} can't be read: {error}") from error


class JsonRows(Rows):
    """The elements of a JSON list, in memory."""

    def __init__(self, path: Path, field: str):
        super().__init__(path)
        try:
            rows = json.loads(path.read_text(encoding="utf-8-sig"))
        except UnicodeDecodeError:
            raise
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{field}: {path} is not JSON: {error}; JSON lines end in .jsonl"
            ) from error
        if not isinstance(rows, list):
            raise UserError(f"{field}: {path} is no list of problems")
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def _read(self, number: int) -> Any:
        return self._rows[number]


class JsonLines(Rows):
    """The lines of a file, each by its offset."""

    def __init__(self, path: Path, field: str):
        del field
        super().__init__(path)
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self._starts = _line_starts(self._file)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def _read(self, number: int) -> Any:
        start, end = self._starts[number : number + 2].tolist()
        line = _between(self._file, start, end)
        try:
            return json.loads(line)
        except (ValueError, RecursionError):
            return NotJson(line.decode(errors="replace").strip())


class ParquetRows(Rows):
    """The rows of a Parquet file, by a copy in small blocks."""

    def __init__(self, path: Path, field: str):
        super().__init__(path)
        try:
            import pyarrow as pa
        except ImportError as error:
            raise UserError(
                f"{field}: Parquet needs pyarrow; pip install 'deltal-jax[math]'"
            ) from error
        # It has no name: nothing is left behind, however the process ends.
        with tempfile.TemporaryFile() as copy:
            try:
                self._starts = _copy_blocks(path, copy)
            except pa.ArrowException as error:
                reason = " ".join(str(error).split())
                raise UserError(f"{field}: {path} is not Parquet: {reason}") from error
            source = pa.OSFile(os.dup(copy.fileno()))
        weakref.finalize(self, source.close)
        self._blocks = pa.ipc.open_file(source)
        self._lock = threading.Lock()
        self._number, self._block = -1, None

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __iter__(self) -> Iterator[Any]:
        for number in range(self._blocks.num_record_batches):
            with self._lock:
                block = self._blocks.get_batch(number)
            yield from block.to_pylist()

    def _read(self, number: int) -> Any:
        block = int(np.searchsorted(self._starts, number, side="right")) - 1
        with self._lock:
            if block != self._number or self._block is None:
                self._number, self._block = block, self._blocks.get_batch(block)
            rows = self._block
        return rows.slice(number - int(self._starts[block]), 1).to_pylist()[0]


def _line_starts(file: int) -> np.ndarray:
    """Where each line begins that is not blank, and where the last one ends; Int[rows + 1]."""
    found, spaced = [], []
    offset = len(_BOM) if os.pread(file, len(_BOM), 0) == _BOM else 0
    begins = True  # the next byte begins a line
    while chunk := os.pread(file, CHUNK, offset):
        data = np.frombuffer(chunk, np.uint8)
        starts = np.flatnonzero(data == _NEWLINE) + 1
        if begins:
            starts = np.concatenate([[0], starts])
        begins = len(starts) > 0 and int(starts[-1]) == len(data)
        first = data[starts[: len(starts) - begins]]
        starts = starts[: len(first)][first != _NEWLINE] + offset
        found.append(starts)
        spaced.append(np.isin(first[first != _NEWLINE], _SPACES))
        offset += len(data)
    bounds = np.concatenate([*found, [offset]]).astype(np.int64)
    suspects = np.flatnonzero(np.concatenate([*spaced, [False]]))
    blank = [i for i in suspects if not _between(file, *bounds[i : i + 2].tolist()).strip()]
    return np.delete(bounds, blank)


def _between(file: int, start: int, end: int) -> bytes:
    return os.pread(file, end - start, start)


def _plain(schema: Any) -> Any:
    """The schema without dictionaries, which a file in blocks can't change from block to block."""
    import pyarrow as pa

    fields = [
        field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field
        for field in schema
    ]
    return pa.schema(fields)


def _copy_blocks(path: Path, copy: IO[bytes]) -> np.ndarray:
    """Write a Parquet file's rows as Arrow's own format, in blocks of at most `BLOCK` rows; the
    number of each block's first row, and how many rows there are; Int[blocks + 1]."""
    import pyarrow as pa
    from pyarrow import parquet

    sizes = [0]
    # Without these two, the bytes of a whole row group are held.
    with parquet.ParquetFile(path, pre_buffer=False, buffer_size=CHUNK) as file:
        schema = _plain(file.schema_arrow)
        with pa.ipc.new_file(copy, schema) as target:
            for batch in file.iter_batches(batch_size=128 * BLOCK, use_threads=False):
                plain = batch if batch.schema.equals(schema) else batch.cast(schema)
                for start in range(0, plain.num_rows, BLOCK):
                    block = plain.slice(start, BLOCK)
                    target.write_batch(block)
                    sizes.append(block.num_rows)
    copy.flush()
    return np.cumsum(sizes)
