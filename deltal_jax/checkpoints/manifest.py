"""The manifest of a checkpoint: what it is, every file with size and checksum. It is written last,
and a checkpoint exists from then on."""

import dataclasses
import json
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath

from deltal_jax.checkpoints.disk import (
    checksum,
    files_under,
    is_there,
    replace,
    sync,
    sync_folders,
    unfinished,
)
from deltal_jax.errors import UserError
from deltal_jax.guard.failpoints import fail_point

NAME = "manifest.json"
#: Of the layout of a checkpoint. Raise it when a reader of the present one could not read a new one
#: right, and keep a small checkpoint of the old one in tests/data/.
FORMAT = 1
#: Files that are read at once.
READERS = 4


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a run is: all that is not an array. Plain JSON."""

    phase: str  # "sft" or "rl"
    step: int  # finished steps of that phase
    next_prompt: int  # position in the stream of training problems
    metrics_bytes: int  # size of metrics.jsonl
    #: What else the next steps depend on: counters and running statistics by name.
    running: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What is in a checkpoint."""

    position: Position
    saved_at: float  # seconds since 1970
    #: What an evaluation after that very step found, by name.
    metrics: dict[str, float]
    #: Facts of the run that may not differ when it goes on: by section ("config", "data", …).
    origin: dict[str, dict[str, Any]]
    #: `type[shape]` of every array by its path.
    arrays: dict[str, str]
    #: Size and CRC-32 of every other file by its path in the checkpoint.
    files: dict[str, tuple[int, int]]
    #: Its own; None in those from before this was kept.
    number: int | None = None


class Damaged(Exception):
    """A checkpoint is not what was saved; the message is what is wrong with it."""


class Newer(Exception):
    """A checkpoint is in a format that this version does not know."""


def encode(manifest: Manifest, version: int = FORMAT) -> bytes:
    """JSON whose first line is the checksum of all others."""
    fields = {"format": version} | dataclasses.asdict(manifest)
    body = (json.dumps(fields, indent=1)[2:] + "\n").encode()
    return _header(body) + body


def decode(content: bytes) -> Manifest:
    """Raises Damaged where a byte differs from what was written, and Newer."""
    header, _, body = content.partition(b"\n")
    if header + b"\n" != _header(body):
        raise Damaged(f"{NAME} is {'damaged' if content else 'empty'}")
    fields = json.loads(content)
    fields.pop("crc32")
    if (version := fields.pop("format")) > FORMAT:
        raise Newer(f"it is in format {version}, and this version reads up to {FORMAT}")
    fields["position"] = Position(**fields["position"])
    fields["files"] = {name: tuple(pair) for name, pair in fields["files"].items()}
    return Manifest(**fields)


def _header(body: bytes) -> bytes:
    return b'{"crc32": "%08x",\n' % zlib.crc32(body)


def list_files(step: epath.Path) -> dict[str, tuple[int, int]]:
    """Size and CRC-32 of the files of a checkpoint, which are on the disk from now on."""

    def listed(found: tuple[str, epath.Path]) -> tuple[str, tuple[int, int]]:
        sync(found[1])
        return found[0], checksum(found[1])

    with ThreadPoolExecutor(READERS) as readers:
        files = dict(readers.map(listed, files_under(step)))
    sync_folders(step)
    sync(step.parent)
    return files


def write_manifest(step: epath.Path, manifest: Manifest) -> None:
    """Make a checkpoint, whose files are on the disk, exist."""
    replace(step / NAME, encode(manifest), lambda: fail_point("save.manifest"))


def exists(step: epath.Path) -> bool:
    """Whether it is a checkpoint, and not one that is being saved or deleted, or was."""
    return is_there(step / NAME)


def read_manifest(step: epath.Path) -> Manifest:
    """Raises Damaged, and Newer."""
    try:
        return decode((step / NAME).read_bytes())
    except PermissionError as error:
        raise _forbidden(step, error) from error
    except OSError as error:
        raise Damaged(f"{NAME} cannot be read: {error.strerror or error}") from error


def check_files(step: epath.Path, manifest: Manifest, *, contents: bool) -> None:
    """Compare the files with the manifest, by their sizes or by all of their `contents`.

    Raises Damaged, which names the first that differs and how.
    """
    try:
        ours = NAME, unfinished(NAME)  # the latter of one that was to be replaced
        found = {name: path for name, path in files_under(step) if name not in ours}
        _check_names(found, manifest.files)
        found = {name: found[name] for name in manifest.files}
        for name, path in found.items():
            _check_size(name, path.stat().length, manifest.files[name][0])
        if contents:
            with ThreadPoolExecutor(READERS) as readers:
                for name, sum_ in zip(found, readers.map(checksum, found.values()), strict=True):
                    _check_size(name, sum_[0], manifest.files[name][0])
                    if sum_ != manifest.files[name]:
                        raise Damaged(f"{name} has flipped bytes")
    except PermissionError as error:
        raise _forbidden(step, error) from error
    except OSError as error:
        raise Damaged(f"{error.filename or step} cannot be read: {error.strerror}") from error


def _forbidden(step: epath.Path, error: OSError) -> UserError:
    return UserError(
        f"checkpoint.dir: cannot read {error.filename or step}: {error.strerror}; have this user "
        "own it"
    )


def _check_names(found: Iterable[str], wanted: Iterable[str]) -> None:
    for name in sorted(set(wanted) - set(found)):
        raise Damaged(f"{name} is missing")
    # Hidden files are a desktop's or a file system's own.
    for name in sorted(set(found) - set(wanted)):
        if not name.rpartition("/")[2].startswith("."):
            raise Damaged(f"{name} does not belong to it")


def _check_size(name: str, size: int, wanted: int) -> None:
    if size == 0 < wanted:
        raise Damaged(f"{name} is empty")
    if size != wanted:
        how = "is truncated" if size < wanted else "has grown"
        raise Damaged(f"{name} {how}: {size} bytes, not {wanted}")
