"""Metrics to a JSON-lines file, and to whom else they are shown."""

import contextlib
import json
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from deltal_jax.errors import UserError
from deltal_jax.guard.failpoints import die, fails

FILE_NAME = "metrics.jsonl"


class Sink(Protocol):
    """Takes the lines of metrics.jsonl in order: on resume from the first on, so that it may fill
    up what it lacks; a value that is not finite is None."""

    def show(self, step: int, phase: str, values: dict[str, float | None]) -> None:
        """Take one line."""

    def close(self) -> None:
        """Flush, and end."""


class MetricsWriter:
    """Appends one object a line: `step`, `phase`, then the metrics; a value that is not finite is
    null. `sinks` are shown each line, and at first those that are there.

    `keep_bytes` cuts an existing file back to a checkpoint's position, so that a resumed run does
    not repeat lines. `folder` None: nothing is written, as by all processes but one.
    """

    def __init__(self, folder: Path | None, *, keep_bytes: int = 0, sinks: Sequence[Sink] = ()):
        self._file: Any = None
        self._sinks = sinks
        if folder is None:
            return
        path = folder / FILE_NAME
        if (size := metrics_size(folder)) < keep_bytes:
            raise UserError(f"{path}: {size} bytes, where a checkpoint goes on after {keep_bytes}")
        self._file = path.open("ab")
        self._file.truncate(keep_bytes)
        self._file.seek(0, os.SEEK_END)
        for line in load_metrics(path) if sinks else ():
            self._show(line.pop("step"), line.pop("phase"), line)

    @property
    def bytes_written(self) -> int:
        """Size of the file so far; 0 where there is none."""
        return 0 if self._file is None else self._file.tell()

    def write(self, step: int, phase: str, metrics: dict[str, float]) -> None:
        """Append one line and flush it."""
        if self._file is None:
            return
        values = {name: finite(value) for name, value in metrics.items()}
        line = json.dumps({"step": step, "phase": phase, **values}).encode()
        if fails("metrics.append"):
            self._file.write(line[: len(line) // 2])
            self._file.flush()
            die()
        self._file.write(line + b"\n")
        self._file.flush()
        self._show(step, phase, values)

    def _show(self, step: int, phase: str, values: dict[str, float | None]) -> None:
        for sink in self._sinks:
            sink.show(step, phase, values)

    def sync(self) -> None:
        """Have what was written survive a power failure."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close all."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # `write` has raised it, of the same bytes
                self._file.close()
        for sink in self._sinks:
            sink.close()


def metrics_size(folder: Path) -> int:
    """Bytes of the metrics of a run."""
    path = folder / FILE_NAME
    return path.stat().st_size if path.exists() else 0


def finite(value: float) -> float | None:
    """The value as JSON has it: null for what is not finite."""
    value = float(value)
    return value if math.isfinite(value) else None


def load_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON objects, one a line.

    A last line that is not a whole object is one still being written: it is left out. Any other
    such line (a run was killed inside it and later resumed) is left out with a warning.
    Raises FileNotFoundError when there is no such file.
    """
    # str.splitlines would also cut at U+2028 and its like, which a JSON string may hold.
    lines = path.read_bytes().decode("utf-8", "replace").rstrip("\n").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif number < len(lines):
            warnings.warn(f"{path}, line {number}: not a JSON object, left out", stacklevel=2)
    return rows
