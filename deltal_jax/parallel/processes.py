"""What the processes of a run do together on their hosts: agree, tell, and fail.

All of it is called by every process at the same point of the run, from the main thread. A single
process needs none of it, and nothing is sent.
"""

import itertools
import json
import os
import sys
import traceback
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src.distributed import global_state  # the only way to a barrier with a time limit
from jax.experimental.multihost_utils import broadcast_one_to_all, process_allgather
from jaxtyping import Bool, Int, UInt8

from deltal_jax.errors import UserError
from deltal_jax.guard import supervise

T = TypeVar("T")
#: Seconds that a process which fails waits for the others to fail at the same point.
PATIENCE = 5.0
#: What an error of jax has in it where another process is gone: how it reached that one.
CONNECTIONS = ("Gloo", "NCCL", "coordination service")
#: Characters of an error of jax that are said.
LONGEST = 300
#: Bytes that are exchanged at least: sizes double, so that few programs are compiled.
LEAST_BYTES = 1024

_failures = itertools.count()


class PeerError(RuntimeError):
    """Another process failed, and the message is its own; or has other numbers than this one."""


def is_first() -> bool:
    """Whether this is process 0, which alone writes what people read."""
    return jax.process_index() == 0


def agree(flag: bool) -> bool:
    """Whether the flag is set in any process; the same in all."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(process_allgather(np.asarray(flag))))


def gather(value: Any) -> list[Any]:
    """The values of all processes, in their order; plain JSON, numbers as they are."""
    if jax.process_count() == 1:
        return [value]
    sent = _encoded(value)
    sizes = process_allgather(np.asarray(len(sent), np.int32)).reshape(-1)
    found = process_allgather(np.pad(sent, (0, _room(sizes.max()) - len(sent))))
    pairs = zip(found, sizes, strict=True)
    return [json.loads(row[:size].tobytes()) for row, size in pairs]


def check_alike(what: str, *arrays: np.ndarray) -> None:
    """Raises PeerError, in all processes, where these arrays are not the same in each, bit for bit.
    One number is exchanged."""
    if jax.process_count() == 1:
        return
    digest = 0
    for array in arrays:
        digest = zlib.crc32(np.ascontiguousarray(array).tobytes(), digest)
    found = process_allgather(np.asarray(digest, np.uint32)).reshape(-1)
    others = np.flatnonzero(found != found[0])
    if len(others):
        raise PeerError(
            f"{what}: process {others[0]} has others than process 0; the processes of a run need "
            "the same software, and accelerators of one kind"
        )


def on_each(function: Callable[[], T]) -> T:
    """`function()`, which exchanges nothing, in each process; where it fails in one it fails in
    all, so that none goes on and waits for the others.

    Raises the process's own error, or else, as PeerError or UserError, that of the first other.
    """
    if jax.process_count() == 1:
        return function()
    result: Any = None
    failure: Exception | None = None
    try:
        result = function()
    except Exception as error:
        failure = error
    _fail_alike(failure)
    return result


def on_first(function: Callable[[], T]) -> T:
    """`function()` of process 0 alone, whose result, plain JSON, all get. Raises as `on_each`."""
    found: Any = on_each(lambda: function() if is_first() else None)
    if jax.process_count() == 1:
        return found
    sent = _encoded(found)  # what others send is not heard, and no longer than "null"
    size = int(broadcast_one_to_all(np.asarray(len(sent), np.int32)))
    heard = broadcast_one_to_all(np.pad(sent, (0, _room(size) - len(sent))))
    return json.loads(np.asarray(heard)[:size].tobytes())


def _encoded(value: Any) -> UInt8[np.ndarray, " n"]:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def _room(size: int) -> int:
    """The next power of two."""
    return max(LEAST_BYTES, 1 << (int(size) - 1).bit_length())


def own_share(numbers: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """Which of the things with these numbers are this process's part of the work."""
    return np.asarray(numbers) % jax.process_count() == jax.process_index()


@contextmanager
def ending_together() -> Iterator[None]:
    """A process that fails in here where others do not ends at once, with its line and exit code:
    left to itself its end would wait for theirs, and theirs, in a collective, for it."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if not all_failed(error):
            _end(error)
        raise


def all_failed(error: BaseException) -> bool:
    """Whether the others fail at this point too, within `PATIENCE`: then all may still do something
    together. To be called where an error was caught."""
    if jax.process_count() == 1:
        return True
    if _is_loss(error):
        return False
    try:
        name = f"deltal_jax failure {next(_failures)}"
        client: Any = global_state.client
        client.wait_at_barrier(name, int(PATIENCE * 1000))
    except Exception:  # too late, or the service of process 0 is gone
        return False
    return True


def _fail_alike(own: Exception | None) -> None:
    known = isinstance(own, UserError)
    said = own and [known, str(own) if known else f"{type(own).__name__}: {own}"]
    failures = gather(said)
    if own is not None:
        raise own
    for number, failure in enumerate(failures):
        if failure is not None:
            kind = UserError if failure[0] else PeerError
            raise kind(f"{failure[1]} (in process {number})")


def _is_loss(error: BaseException) -> bool:
    """Whether another process is gone. What jax's runtime says of that is a ValueError where a
    program that was called before is called again."""
    kinds = (jax.errors.JaxRuntimeError, ValueError)
    return isinstance(error, kinds) and any(name in str(error) for name in CONNECTIONS)


def _end(error: BaseException) -> None:
    index = jax.process_index()
    if isinstance(error, (UserError, ArithmeticError)):
        print(f"deltal: {error} (in process {index}, which ends)", file=sys.stderr)
    elif _is_loss(error):
        what = " ".join(str(error).split())[:LONGEST]
        if not supervise.tell(process=index, lost=what):  # otherwise the parent says it
            print(f"deltal: process {index} lost another one and ends: {what}", file=sys.stderr)
    else:
        traceback.print_exception(error)
        print(f"deltal: process {index} failed and ends", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2 if isinstance(error, UserError) else 1)
