"""What a cell cost: seconds without those in which JAX compiled, and CPU seconds."""

import contextlib
import functools
import time
from collections.abc import Iterator

import jax

#: JAX's own events: a program is traced, lowered and compiled, or taken from the cache.
COMPILED = "/jax/core/compile/backend_compile_duration"
EVENTS = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    COMPILED,
)
#: Of each such event, which may lie inside another: when it began and ended.
_spans: list[tuple[float, float]] = []
_compiled: list[float] = []


@functools.cache
def listen() -> None:
    """Hear of these events from here on; JAX has no way back."""

    def hear(event: str, duration_secs: float, **_: str | int) -> None:
        now = time.perf_counter()
        if event in EVENTS:
            _spans.append((now - duration_secs, now))
        if event == COMPILED:
            _compiled.append(now)

    jax.monitoring.register_event_duration_secs_listener(hear)


def programs_compiled() -> int:
    """How many programs were compiled, or taken from the cache on disk, since `listen`."""
    return len(_compiled)


def compiling(begin: float, end: float) -> float:
    """Seconds of this time, of `time.perf_counter`, in which something was compiled."""
    total, reached = 0.0, begin
    for start, stop in sorted(_spans):
        start, stop = max(start, reached), min(stop, end)
        if stop > start:
            total, reached = total + stop - start, stop
    return total


class Stopwatch:
    """Wall seconds of what is done inside `running`, compiling left out."""

    def __init__(self) -> None:
        listen()
        self.seconds = 0.0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Its clock runs as long as this is open."""
        begin = time.perf_counter()
        yield
        end = time.perf_counter()
        self.seconds += end - begin - compiling(begin, end)
