"""The process in which `workers.py` runs a function: limits first, then one call after the other.

Nothing heavy is imported here, least of all JAX. Messages are a length of 4 bytes and JSON.
"""

import importlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, BinaryIO


class _TimedOutError(BaseException):
    """Not an Exception, so that what is called does not swallow it."""


class _Alarm:
    """Raises in the main thread after so many seconds, of CPU time or of any, again and again until
    it is disarmed."""

    def __init__(self, cpu: float, wall: float) -> None:
        self.armed = False
        self._seconds = {signal.ITIMER_PROF: cpu, signal.ITIMER_REAL: wall}
        for number in (signal.SIGPROF, signal.SIGALRM):
            signal.signal(number, self._ring)

    def arm(self) -> None:
        self.armed = True
        for timer, seconds in self._seconds.items():
            signal.setitimer(timer, seconds, seconds / 4)

    def disarm(self) -> None:
        self.armed = False
        for timer in self._seconds:
            signal.setitimer(timer, 0)

    def _ring(self, signum: int, frame: FrameType | None) -> None:
        if self.armed:
            raise _TimedOutError


def main(options: dict[str, Any]) -> None:
    """Serve calls from standard input until it ends, which it does where the parent dies.

    `options` are `function` ("module:name"), `warm_up` (the arguments of calls to begin with),
    `memory` in bytes, and in seconds a call: `timeout` (of CPU time) and `wall`, after which it is
    interrupted, and `cpu`, after which it is killed.
    """
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):  # what is called may read and print
        os.dup2(nowhere, descriptor)
    for kind, limit in (
        (resource.RLIMIT_AS, options["memory"]),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),  # no file ever gets a byte
    ):
        resource.setrlimit(kind, (limit, limit))
    module, _, name = options["function"].partition(":")
    function = getattr(importlib.import_module(module), name)
    for arguments in options["warm_up"]:
        function(*arguments)
    alarm = _Alarm(options["timeout"], options["wall"])
    _send(replies, _encoded("ready"))
    while (message := _receive(requests)) is not None:
        _limit_cpu(options["cpu"])
        _send(replies, _call(function, message, alarm))


def _call(function: Callable, arguments: list, alarm: _Alarm) -> bytes:
    """What became of one call, and its result or what it raised."""
    try:
        try:
            alarm.arm()
            return _encoded("done", function(*arguments))
        finally:
            alarm.disarm()
    except _TimedOutError:
        alarm.disarm()  # it may have rung in the `finally` itself
        return _encoded("timeout", "inner")
    except MemoryError:
        return _encoded("memory")
    except Exception as error:
        return _encoded("error", type(error).__name__)


def _limit_cpu(seconds: float) -> None:
    """The kernel kills this process once it has used so many seconds more."""
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + seconds) + 1, hard))


def _receive(stream: BinaryIO) -> list | None:
    header = stream.read(4)
    if len(header) < 4:
        return None
    return json.loads(stream.read(int.from_bytes(header, "big")))


def _encoded(status: str, value: Any = None) -> bytes:
    return json.dumps([status, value]).encode()


def _send(stream: BinaryIO, body: bytes) -> None:
    stream.write(len(body).to_bytes(4, "big") + body)
    stream.flush()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
