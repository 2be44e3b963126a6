"""Verdicts on responses that have ended, while others are still sampled."""

import contextlib
import queue
import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future
from typing import Any

import numpy as np
from jaxtyping import Int

from deltal_jax.tasks.base import Task, Verdict, VerifiesAside
from deltal_jax.tasks.mixture import Mixture

#: Responses that may wait to be read; one that finds no room is judged afterwards.
WAITING = 4096


class EarlyVerdicts:
    """Has responses judged in the background, between `with` and its end.

    A verdict is known by the position of its problem and the response's text, whosever it was meant
    to be, and who finds none here judges for himself: how far this came decides about time alone.
    One thread reads texts and hands them to the task, whose `submit` bounds what is under way.
    Where that fails, the verdict's future says so.
    """

    def __init__(self, task: Task, read: Callable[[Int[np.ndarray, " t"]], str]):
        self._task, self._read = task, read
        self._waiting: queue.Queue = queue.Queue(WAITING)
        self._found: dict[tuple[int, str], Future[Verdict]] = {}
        self._thread: threading.Thread | None = None

    @staticmethod
    def serves(task: Task) -> bool:
        """Whether verdicts of this task take others' time; else it would be this thread's."""
        parts = task.parts.values() if isinstance(task, Mixture) else [task]
        return any(isinstance(part, VerifiesAside) for part in parts)

    def offer(self, position: int, answer: Any, tokens: Int[np.ndarray, " t"]) -> None:
        """A response to the problem at this position, whose answer is known, has ended. Never
        blocks."""
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait((position, answer, tokens))

    def find(self, position: int, response: str) -> Future[Verdict] | None:
        """The verdict, if it was begun."""
        return self._found.get((position, response))

    def keep(self, positions: Collection[int]) -> None:
        """Forget those on problems at other positions."""
        kept = set(positions)
        self._found = {key: value for key, value in self._found.items() if key[0] in kept}

    def __enter__(self) -> "EarlyVerdicts":
        self._thread = threading.Thread(target=self._serve, name="verdicts", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """What nobody works at yet is left: it has its turn when somebody wants it."""
        assert self._thread is not None
        with contextlib.suppress(queue.Empty):
            while True:
                self._waiting.get_nowait()
        self._waiting.put(None)
        for future in list(self._found.values()):
            future.cancel()
        self._thread.join()
        self._found = {k: future for k, future in self._found.items() if not future.cancel()}

    def _serve(self) -> None:
        while (item := self._waiting.get()) is not None:
            position, answer, tokens = item
            key = position, self._read(tokens)
            if key not in self._found:
                future = self._begin(key[1], answer)
                if future is not None:
                    self._found[key] = future

    def _begin(self, response: str, answer: Any) -> Future[Verdict] | None:
        assert isinstance(self._task, VerifiesAside)
        try:
            return self._task.submit(response, answer)
        except Exception as error:
            failed: Future[Verdict] = Future()
            failed.set_exception(error)
            return failed
