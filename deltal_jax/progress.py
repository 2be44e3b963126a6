"""What a person sees while a run goes on: a live bar on a terminal, plain lines elsewhere.

All of it goes to standard error; standard output is for results.
"""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

#: Seconds between plain lines when the output is not a terminal.
PLAIN_INTERVAL = 10.0


class ProgressDisplay:
    """Shows one phase at a time. `quiet` shows nothing."""

    def __init__(self, *, quiet: bool = False):
        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task: Any = None
        self._phase = ""
        self._total = 0
        self._started = self._last = 0.0
        self._first = 0

    def say(self, text: str) -> None:
        """One line above the bar."""
        self.console.print(text, markup=False)

    def start(self, phase: str, done: int, total: int) -> None:
        """Begin a phase of `total` steps, `done` of them finished before."""
        self.stop()
        self._phase, self._total, self._first = phase, total, done
        self._started = self._last = time.monotonic()
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[shown]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._bar.add_task(phase, total=total, completed=done, shown="")
            self._bar.start()

    def update(self, done: int, metrics: dict[str, float]) -> None:
        """`done` steps are finished; show these figures."""
        shown = "  ".join(f"{name} {_figure(value)}" for name, value in metrics.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=done, shown=shown)
            return
        now = time.monotonic()
        if now - self._last >= PLAIN_INTERVAL or done == self._total:
            self._last = now
            left = (now - self._started) / max(done - self._first, 1) * (self._total - done)
            self.say(f"{self._phase} {done}/{self._total}  {shown}  {left:.0f} s left")

    def stop(self) -> None:
        """End the phase's bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _figure(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
