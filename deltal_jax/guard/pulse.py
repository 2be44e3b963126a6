"""Signs of life: what a run is doing, and when that last moved. Imports nothing heavy; a sign costs
less than a microsecond."""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator

#: Phases that threads without one of their own work for: verdicts, and requests to a server.
SHARED = ("rollout", "grading", "evaluation")


@dataclasses.dataclass
class Phase:
    """What one thread is doing. Times are of `time.monotonic`, in seconds."""

    name: str
    #: Such as "RL step 12"; empty where it belongs to none.
    step: str
    thread: int
    moved: float

    def __str__(self) -> str:
        return f"{self.name} of {self.step}" if self.step else self.name


class _Own(threading.local):
    phase: Phase | None = None


_own = _Own()
_open: dict[int, Phase] = {}  # by thread


@contextlib.contextmanager
def phase(name: str, step: str = "") -> Iterator[None]:
    """What this thread does from here on. Inside another phase it takes that one's place, and its
    step where none is given."""
    outer = _own.phase
    if outer is not None and not step:
        step = outer.step
    try:
        _begin(Phase(name, step, threading.get_ident(), time.monotonic()))
        yield
    finally:
        if outer is not None:
            outer.moved = time.monotonic()
            _begin(outer)
        else:
            _own.phase = None
            _open.pop(threading.get_ident(), None)


def _begin(new: Phase) -> None:
    _own.phase = _open[new.thread] = new


def pulse() -> None:
    """Something moved, in any thread."""
    own = _own.phase
    if own is not None:
        own.moved = time.monotonic()
        return
    for found in open_phases():
        if found.name in SHARED:
            found.moved = time.monotonic()


def open_phases() -> list[Phase]:
    """What the threads are doing now, the one that was begun first at the front."""
    return list(_open.values())


def here() -> str:
    """Where the run is, in words."""
    phases = " and ".join(map(str, open_phases()))
    return f"in {phases}" if phases else "between two steps"
