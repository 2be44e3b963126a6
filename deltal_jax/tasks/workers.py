"""Functions that run in processes which can be killed, for what cannot be trusted to end.

    with Workers("my_module:judge", count=2) as workers:
        outcomes = workers.map([("2/4", "1/2"), ("9**9**9**9", "1")])

A worker is a fresh Python, never a fork of this process and its threads. It has a limit of memory
and of CPU seconds; a call that overruns is first interrupted inside it, then killed with it, and
the next call finds a new worker. Every call gets an `Outcome`.
"""

import collections
import contextlib
import dataclasses
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any, Literal

from deltal_jax.guard.pulse import pulse

#: Bytes of one message to a worker: less than a pipe holds, so that sending never blocks.
MAX_MESSAGE = 60_000
#: Bytes of one reply.
MAX_REPLY = 1_000_000
#: Calls after which a worker makes room for a fresh one, against leaks of what it calls.
MAX_CALLS = 20_000

Status = Literal["done", "timeout", "memory", "error", "crash"]


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of one worker and of one call to it."""

    #: Seconds of CPU time after which the call is interrupted by a signal: what else the machine
    #: does, sampling for one, decides about no verdict.
    timeout: float = 2.0
    #: Seconds after which it is interrupted however little CPU time it had.
    wall: float = 20.0
    #: Seconds more, of either, after which the worker is killed, where the signal did not help.
    grace: float = 1.0
    #: Bytes of the worker's address space.
    memory: int = 1 << 30
    #: Seconds that a worker may take to start.
    start: float = 60.0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one call. `value` is its result where `status` is done; else what is known:
    for an error the name of the exception, for a timeout who ended it."""

    status: Status
    value: Any = None


class WorkerStartError(RuntimeError):
    """No worker can be started: its function can't be imported, or the machine is full."""


class Workers:
    """`count` processes that call `function`, "module:name", with JSON arguments and result.

    At most `waiting` calls wait for a worker: `submit` blocks until there is room. `warm_up` are
    the arguments of calls that each worker begins with, without a limit of time.
    """

    def __init__(
        self,
        function: str,
        count: int = 2,
        *,
        limits: Limits | None = None,
        waiting: int = 256,
        warm_up: Iterable[Sequence[Any]] = (),
    ):
        limits = limits or Limits()
        options = {
            "function": function,
            "warm_up": [list(call) for call in warm_up],
            "memory": limits.memory,
            "timeout": limits.timeout,
            "wall": limits.wall,
            "cpu": limits.timeout + limits.grace,
        }
        #: How many calls had each status so far.
        self.counts: collections.Counter[str] = collections.Counter()
        self._queue: queue.Queue = queue.Queue(waiting)
        self._lock = threading.Lock()
        threads = [
            threading.Thread(
                target=_serve,
                args=(self._queue, _Process(options, limits), self.counts, self._lock),
                daemon=True,
            )
            for _ in range(count)
        ]
        for thread in threads:
            thread.start()
        # Called by `close`, where this object is collected, or where the interpreter ends.
        self._stop = weakref.finalize(self, _stop, self._queue, threads)

    def submit(
        self, *arguments: Any, then: Callable[[Outcome], Any] = lambda outcome: outcome
    ) -> "Future[Any]":
        """Begin a call; the future gives what `then` makes of its outcome, and raises
        WorkerStartError where no worker starts."""
        if not self._stop.alive:
            raise RuntimeError("these workers are closed")
        future: Future[Any] = Future()
        self._queue.put((future, arguments, then))
        return future

    def map(self, calls: Iterable[Sequence[Any]]) -> list[Outcome]:
        """The outcomes of many calls, in order."""
        return [future.result() for future in [self.submit(*call) for call in calls]]

    def close(self) -> None:
        """Finish what runs, cancel what waits, and end the processes."""
        self._stop()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _stop(waiting: queue.Queue, threads: list[threading.Thread]) -> None:
    with contextlib.suppress(queue.Empty):
        while True:
            waiting.get_nowait()[0].cancel()
    for _ in threads:
        waiting.put(None)
    for thread in threads:
        if thread is not threading.current_thread():  # the collector runs in any
            thread.join()


def _serve(
    waiting: queue.Queue,
    process: "_Process",
    counts: collections.Counter,
    lock: threading.Lock,
) -> None:
    """One thread: it hands calls to its process until it is told to stop."""
    try:
        while (item := waiting.get()) is not None:
            future, arguments, then = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                outcome = process.call(arguments)
                with lock:
                    counts[outcome.status] += 1
                future.set_result(then(outcome))
                pulse()
            except Exception as error:
                future.set_exception(error)
    finally:
        process.kill()


class _DiedError(Exception):
    """The process ended, or answered what is none."""


class _Process:
    """One worker process, started at the first call and anew after it was killed."""

    def __init__(self, options: dict[str, Any], limits: Limits):
        self.options, self.limits = options, limits
        self.process: subprocess.Popen | None = None
        self.calls = 0

    def call(self, arguments: Sequence[Any]) -> Outcome:
        body = json.dumps(list(arguments)).encode()
        if len(body) > MAX_MESSAGE:
            return Outcome("error", "TooLarge")
        if self.calls >= MAX_CALLS:
            self.kill()
        for _ in range(2):  # a worker that died while idle says nothing about this call
            process = self._running()
            with contextlib.suppress(OSError):
                os.write(process.stdin.fileno(), len(body).to_bytes(4, "big") + body)
                break
            self.kill()
        self.calls += 1
        try:
            status, value = self._reply(self.limits.wall + self.limits.grace)
        except TimeoutError:
            self.kill()
            return Outcome("timeout", "outer")
        except _DiedError:
            code = self.kill()
            return Outcome("timeout", "cpu") if code == -signal.SIGXCPU else Outcome("crash", code)
        if status == "memory":  # what is left of its heap is no place to go on
            self.kill()
        return Outcome(status, value)

    def kill(self) -> int | None:
        """End the process and reap it; how it ended, if there was one."""
        process, self.process, self.calls = self.process, None, 0
        if process is None:
            return None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.02)  # it may be about to end by itself, and its own code says why
        process.kill()
        for stream in filter(None, (process.stdin, process.stdout)):
            with contextlib.suppress(OSError):
                stream.close()
        return process.wait()

    def _running(self) -> Any:
        if self.process is None:
            try:
                self._start()
            except (OSError, _DiedError, TimeoutError) as error:
                code = self.kill()
                raise WorkerStartError(
                    f"no worker for {self.options['function']}: "
                    f"{str(error) or f'it ended with code {code}'}"
                ) from error
        return self.process

    def _start(self) -> None:
        boot = "import sys, json; sys.path[:] = json.loads(sys.argv[2]); "
        boot += "from deltal_jax.tasks import worker; worker.main(json.loads(sys.argv[1]))"
        self.process = subprocess.Popen(
            [sys.executable, "-c", boot, json.dumps(self.options), json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the parent
            env=os.environ | {"PYTHONHASHSEED": "0"},  # sets have one order, and verdicts with them
            bufsize=0,
        )
        self._reply(self.limits.start)

    def _reply(self, seconds: float) -> list:
        """The next message. Raises TimeoutError, or _DiedError where the process ended."""
        assert self.process is not None and self.process.stdout is not None
        descriptor, deadline = self.process.stdout.fileno(), time.monotonic() + seconds
        size = int.from_bytes(_read(descriptor, 4, deadline), "big")
        if size > MAX_REPLY:
            raise _DiedError("its answer is too long")
        try:
            status, value = json.loads(_read(descriptor, size, deadline))
        except ValueError as error:
            raise _DiedError("its answer is none") from error
        return [status, value]


def _read(descriptor: int, size: int, deadline: float) -> bytes:
    """So many bytes of a pipe, before a time of the monotonic clock."""
    poll, found = select.poll(), b""
    poll.register(descriptor, select.POLLIN | select.POLLHUP)
    while len(found) < size:
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            raise TimeoutError
        if not (more := os.read(descriptor, size - len(found))):
            raise _DiedError
        found += more
    return found
