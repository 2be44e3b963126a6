"""SIGINT and SIGTERM: a run saves what it has and ends, within a grace period.

The first signal asks. Before there is anything to save it ends the run at once; after that the step
is finished where the grace period has room for it, and given up where it has not, as none of an
unfinished rollout or evaluation is needed to do it again exactly. A second signal ends the run at
once, whatever it does: a checkpoint exists as a whole or not at all.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import Any, NoReturn

from deltal_jax.errors import UserError
from deltal_jax.guard import pulse

SIGNALS = (signal.SIGINT, signal.SIGTERM)
#: What interrupts the main thread, in code that never asks.
INTERRUPT = signal.SIGUSR2
#: Seconds within which several signals are one: a terminal or a launcher may send it to a process
#: and to its parent, who hands it on.
APART = 1.0
#: Seconds between two looks at whether what others do takes too long.
LOOK = 1.0
#: Of the grace period this part is for saving.
RESERVE = 1 / 3
#: The exit code of a run that a signal stopped and of which all is saved, if not 0: what starts it
#: again has to know it from one that is done.
STOPPED_EXIT = "DELTAL_STOPPED_EXIT"


class Stopped(KeyboardInterrupt):
    """A signal ended the run at once; the message says what is saved. `code`: `stopped_code()`
    where that is all there was to save, otherwise 128 + the signal's number, as a shell has it."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


class Abandoned(Exception):
    """The unfinished step was given up, as the grace period is for saving now."""


def stopped_code() -> int:
    """The exit code of a run that was stopped and saved. Raises UserError where the variable that
    sets it is no exit code."""
    given = os.environ.get(STOPPED_EXIT) or "0"
    if not given.isdecimal() or int(given) > 255:
        raise UserError(f"{STOPPED_EXIT}: {given!r} is no exit code; set it to 75, or unset it")
    return int(given)


class Stop:
    """What signals ask of a run. `agree(flag)` is true where it is in any of the run's processes:
    all of them call it at the same places, so that all stop after the same step."""

    def __init__(self, *, at_once: bool):
        #: Seconds between the first signal and the end; None: the step is finished.
        self.grace: float | None = None
        self.agree: Callable[[bool], bool] = lambda flag: flag
        self.alone = True  # the only process
        self.say: Callable[[str], None] = _say
        #: Whether there is something new to save, and whether all is saved.
        self.serving = self.saved = False
        #: What is saved and how to go on, in words, and whether anything is.
        self.kept: Callable[[], tuple[str, bool]] = lambda: (
            "nothing was saved yet; start again with the same command",
            False,
        )
        #: Seconds that the last update took.
        self.update_seconds = 0.0
        self.asked_by: signal.Signals | None = None
        #: Where the run was then, in words.
        self.where = ""
        self.at_once = at_once
        self._asked_at, self._agreed = 0.0, False

    def hear(self, number: signal.Signals) -> None:
        """A signal came. Raises Stopped, or ends the process, where it ends the run at once."""
        now = time.monotonic()
        if self.asked_by is None:
            self.asked_by, self._asked_at, self.where = number, now, pulse.here()
            if not self.serving:
                self._end(number, lossless=True)
            self.say(f"{number.name} {self.where}: {self._plan()}; again: end at once")
        elif now - self._asked_at >= APART:
            self._end(number, lossless=False)

    def asked(self) -> bool:
        """Whether to save and stop, after the step at hand."""
        if not self._agreed and self.agree(self.asked_by is not None):
            self._agreed = True
            if self.asked_by is None:  # another process's
                self.asked_by, self._asked_at = signal.SIGTERM, time.monotonic()
                self.where = pulse.here()
        return self._agreed

    def spare(self) -> float:
        """Seconds before saving has to begin."""
        if self.grace is None or self.asked_by is None:
            return float("inf")
        return self._asked_at + (1 - RESERVE) * self.grace - time.monotonic()

    def check(self) -> None:
        """Raises Abandoned where it is time to save. Called where a step may be given up: by the
        thread that does it, and in each process as often as in the others."""
        if not self.alone and threading.current_thread() is not threading.main_thread():
            return  # the processes' other threads keep no common order, so they finish
        if self.agree(self.spare() <= 0):
            raise Abandoned

    def check_update(self) -> None:
        """Raises Abandoned where another update would take too long. It can't be given up."""
        if self.asked() and self.agree(self.spare() < self.update_seconds):
            raise Abandoned

    def _plan(self) -> str:
        if self.saved:
            return "all is saved already, ending soon"
        if self.grace is None:
            return "saving after this step"
        return f"saving after this step, or in {max(self.spare(), 0):.0f} s without it"

    def _end(self, number: signal.Signals, *, lossless: bool) -> NoReturn:
        kept, something = self.kept()
        code = stopped_code() if lossless and something else 128 + number
        text = f"{number.name} {pulse.here()}: ended at once; {kept}"
        if not self.at_once:
            raise Stopped(text, code)
        leave(f"deltal: {text}", code)


#: The one that listens, if there is one.
_listening: list[Stop] = []


def check(*, together: bool = True) -> None:
    """`Stop.check` of the run in this process, if there is one that listens; with `together=False`
    only where it is the run's only one, as others may not come here as often."""
    for stop in _listening:
        if together or stop.alone:
            stop.check()


def check_update() -> None:
    """`Stop.check_update` likewise."""
    for stop in _listening:
        stop.check_update()


def result_of(future: "Future[Any]") -> Any:
    """The future's result; raises Abandoned where it takes too long for a run that has to stop."""
    while True:
        done, _ = wait([future], LOOK)
        if done:
            return future.result()
        check(together=False)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Code that never asks, such as a user's, in the main thread of the run's only process:
    Abandoned is raised inside of it where it takes too long for a run that has to stop, and again
    at its end, whatever the code made of it. No native code is cut off."""
    main = threading.main_thread()
    stop = next((stop for stop in _listening if stop.alone), None)
    if stop is None or threading.current_thread() is not main:
        yield
        return
    closed, given_up = threading.Event(), threading.Event()

    def interrupt(number: int, frame: Any) -> None:
        del number, frame
        if not closed.is_set():
            given_up.set()
            raise Abandoned

    def look() -> None:
        while not closed.wait(LOOK):
            if stop.spare() <= 0:
                signal.pthread_kill(main.ident or 0, INTERRUPT)

    previous = signal.signal(INTERRUPT, interrupt)
    thread = threading.Thread(target=look, name="interrupt", daemon=True)
    thread.start()
    try:
        try:
            yield
        finally:
            closed.set()
    except Exception:
        if not given_up.is_set():
            raise
    finally:  # again, as the last interrupt may have come before the first
        closed.set()
        thread.join()
        signal.signal(INTERRUPT, previous)
    if given_up.is_set():
        raise Abandoned


@contextlib.contextmanager
def listening(*, at_once: bool = False) -> Iterator[Stop]:
    """Hear signals, in the main thread; elsewhere the caller's own handling applies. Inside another
    `listening` it is the same.

    `at_once` is for a command: what ends the run at once ends the process, even where the main
    thread is inside a compiled program and would not hear of it. Otherwise Stopped is raised.
    """
    if _listening:
        yield _listening[0]
        return
    stop = Stop(at_once=at_once)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {number: signal.getsignal(number) for number in SIGNALS}
    _listening.append(stop)
    try:
        with _ear(stop) if at_once else contextlib.nullcontext():
            listen_anew()
            yield stop
    finally:
        _listening.remove(stop)
        for number, handler in previous.items():
            signal.signal(number, handler)


def listen_anew() -> None:
    """Again after `jax.distributed` began, which takes SIGTERM for itself: its notice of preemption
    reaches the processes of a pod alike, but knows no SIGINT, no grace period and no rollout to
    give up."""

    def handle(number: int, frame: Any) -> None:
        del frame
        for stop in _listening:
            if not stop.at_once:  # otherwise the ear has heard it
                stop.hear(signal.Signals(number))

    for number in SIGNALS if _listening else ():
        signal.signal(number, handle)


@contextlib.contextmanager
def _ear(stop: Stop) -> Iterator[None]:
    """A thread that hears what comes, whatever the main thread is inside of."""
    here, there = socket.socketpair()
    there.setblocking(False)
    before = signal.set_wakeup_fd(there.fileno(), warn_on_full_buffer=False)

    def serve() -> None:
        while numbers := here.recv(16):
            for number in numbers:
                if number in SIGNALS:
                    stop.hear(signal.Signals(number))

    thread = threading.Thread(target=serve, name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        there.close()
        thread.join()
        here.close()


def leave(text: str, code: int) -> NoReturn:
    """End the process with a last line: nothing is waited for, no thread and no other process."""
    _say(text)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        if sys.stderr.isatty():
            text = f"\r\033[K\033[?25h{text}"  # over a bar that is still there, with its cursor
        print(text, file=sys.stderr, flush=True)
