"""Functions that tests run in worker processes."""

import os
import resource
import sys


def heavy_modules(*_: object) -> list[str]:
    """Which modules that take long, or start threads, this process has imported."""
    return sorted(
        set(sys.modules) & {"jax", "flax", "numpy", "torch", "sympy", "deltal_jax.config"}
    )


def write_and_read(path: str) -> list[str]:
    """Print, read standard input, and try to write a file."""
    print("noise" * 10_000, flush=True)
    os.write(1, b"noise")
    read = sys.stdin.read(1)
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write("x")
    except OSError as error:
        return [read, type(error).__name__]
    return [read, "written"]


def even_words(text: str) -> bool:
    return len(text.split()) % 2 == 0


def swallow(seconds: float) -> str:
    """Sleep although it is interrupted by what is an Exception."""
    import time

    try:
        time.sleep(seconds)
    except Exception:
        return "swallowed"
    return "slept"


def spin(seconds: float) -> None:
    """Use so many seconds of CPU time."""
    import time

    while time.process_time() < seconds:
        pass


def deaf(seconds: float) -> None:
    """Sleep where no signal interrupts it."""
    import signal
    import time

    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    time.sleep(seconds)


def limits() -> list[int]:
    return [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_CORE)]


def reply_and_die(text: str) -> None:
    """Write half a message where replies go, and end."""
    for descriptor in range(3, 20):
        try:
            os.write(descriptor, b"\x00\x00\x00\x50half")
        except OSError:
            continue
    os._exit(7)


def set_order(*words: str) -> list[str]:
    """A set as it is walked through."""
    return list(set(words))
