"""What a checkpoint needs of a file system, over paths that may be remote."""

import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from etils import epath

AnyPath = TypeVar("AnyPath", Path, epath.Path)

#: Bytes of one read.
CHUNK = 2**22


def is_local(path: epath.Path) -> bool:
    """Whether it lies on a file system of this machine: there are renames and fsync."""
    return "://" not in os.fspath(path)


def is_there(path: epath.Path) -> bool:
    """Whether there is such a file. Raises OSError where that cannot be known: `exists` says no
    then, and what a sick disk hides would be taken for debris."""
    if not is_local(path):
        return path.exists()
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def children(folder: epath.Path) -> list[epath.Path]:
    """What is in a folder, by name; nothing where there is none, as an empty one in an object
    store."""
    if not is_local(folder):
        _forget_listings(folder)
    try:
        return sorted(folder.iterdir(), key=lambda path: path.name)
    except FileNotFoundError:
        return []


def _forget_listings(folder: epath.Path) -> None:
    """TensorStore writes past the file system that fsspec keeps listings of."""
    import fsspec

    scheme = os.fspath(folder).partition("://")[0]
    for system in fsspec.get_filesystem_class(scheme)._cache.values():
        system.invalidate_cache()


def files_under(folder: epath.Path) -> Iterator[tuple[str, epath.Path]]:
    """Every file below a folder, by its name relative to it."""
    for path in children(folder):
        if path.is_dir():
            for name, file in files_under(path):
                yield f"{path.name}/{name}", file
        else:
            yield path.name, path


def checksum(path: epath.Path) -> tuple[int, int]:
    """Size and CRC-32 of a file.

    CRC-32 finds every burst of errors up to 32 bits, so every flipped byte, and others but for one
    in 2^32. Of the standard library only Adler-32, which is weak on small files, was faster (2.7
    and 3.4 GB/s; SHA-256, which nobody needs against accidents, 1.6); all release the GIL.
    """
    size = crc = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return size, crc


def sync(path: epath.Path) -> None:
    """Have a file, or the names in a folder, survive a power failure. An object store's do."""
    if not is_local(path):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folders(folder: epath.Path) -> None:
    """`sync` a folder and all below it."""
    if is_local(folder):
        for path, _, _ in os.walk(folder):
            sync(epath.Path(path))


def unused(path: AnyPath) -> AnyPath:
    """The path, or with a number behind it the first that is not there yet."""
    candidate, number = path, 2
    while candidate.exists():
        candidate, number = path.parent / f"{path.name}-{number}", number + 1
    return candidate


def unfinished(name: str) -> str:
    """What a file is called as long as `replace` writes it."""
    return f".{name}.tmp"


def replace(path: epath.Path, content: bytes, almost: Callable[[], None]) -> None:
    """Write a file that is whole or not there; calls `almost` right before it is."""
    if not is_local(path):  # an object is there when it is whole
        almost()
        path.write_bytes(content)
        return
    temporary = path.parent / unfinished(path.name)
    temporary.write_bytes(content)
    sync(temporary)
    almost()
    temporary.replace(path)
    sync(path.parent)
