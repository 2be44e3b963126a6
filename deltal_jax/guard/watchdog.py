"""Notices that nothing moves any more, and says in which phase of which step."""

import contextlib
import datetime
import faulthandler
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from deltal_jax.guard import pulse
from deltal_jax.guard.signals import leave

#: In the run's folder: the stacks of all threads, each time that nothing moved.
STALLS = "stalls.txt"
#: Seconds between two looks at most.
LOOK = 5.0
#: Where a compilation is, at the end of a path and by the name of a function.
COMPILING = ("jax/_src/compiler.py", "backend_compile_and_load")


@contextlib.contextmanager
def watching(
    folder: Path,
    seconds: float | None,
    *,
    stop: bool,
    say: Callable[[str], None],
    kept: Callable[[], tuple[str, bool]],
    written: Callable[[], int] = lambda: 0,
) -> Iterator[None]:
    """Look after the open phases, until the end of the `with`. Where one has not moved for so many
    seconds (None: for ever), say so once, until it moves again; with `stop` end the process with
    exit code 1, as what hangs in compiled code cannot be unwound. `kept` says what is saved, and
    `written` how many bytes are: a save moves as long as they change."""
    if seconds is None:
        yield
        return
    over = threading.Event()

    def look() -> None:
        said: dict[int, float] = {}  # by thread, when what was complained of last moved
        size = -1
        while not over.wait(min(seconds / 4, LOOK)):
            phases, now = pulse.open_phases(), time.monotonic()
            if any(found.name == "save" for found in phases):
                before, size = size, written()
                for found in phases if size != before else ():
                    found.moved = now if found.name == "save" else found.moved
            silent = [
                x for x in phases if now - x.moved > seconds and said.get(x.thread) != x.moved
            ]
            if not silent:
                continue
            said |= {found.thread: found.moved for found in silent}
            line = report(silent, [x for x in phases if x not in silent], now)
            line += f"; stacks of all threads: {folder / STALLS}"
            write_stacks(folder / STALLS, line)
            if stop:
                leave(f"deltal: watchdog: {line}; {kept()[0]}", 1)
            say(f"watchdog: {line}")

    thread = threading.Thread(target=look, name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def report(silent: list[pulse.Phase], others: list[pulse.Phase], now: float) -> str:
    """Which phases have been silent for how long, and which moved, in one line."""
    parts = [
        f"nothing moved in {_named(found)} for {now - found.moved:.0f} s" for found in silent
    ] + [f"{_named(found)} moved {now - found.moved:.0f} s ago" for found in others]
    return "; ".join(parts)


def _named(found: pulse.Phase) -> str:
    return f"{found} (compiling)" if compiles(found.thread) else str(found)


def compiles(thread: int) -> bool:
    """Whether a thread is inside the compiler: that may well be slow, and moves nothing."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if (frame.f_code.co_filename.endswith(COMPILING[0])) and (
            frame.f_code.co_name == COMPILING[1]
        ):
            return True
        frame = frame.f_back
    return False


def write_stacks(path: Path, line: str) -> None:
    """Append the stacks of all threads, under a line."""
    with contextlib.suppress(OSError), path.open("a", encoding="utf-8") as file:
        file.write(f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S} {line}\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
        file.write("\n")
