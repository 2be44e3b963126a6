"""Timing of two sides in turn: medians of wall seconds, and CPU seconds beside them."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


@dataclasses.dataclass
class Timing:
    """Seconds of repeated calls."""

    wall: list[float] = dataclasses.field(default_factory=list)
    cpu: list[float] = dataclasses.field(default_factory=list)

    def call(self, function: Callable[[], Any]) -> None:
        """Run once, to the end of its device work, and note the time."""
        cpu, wall = time.process_time(), time.perf_counter()
        jax.block_until_ready(function())
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)

    def summary(self) -> dict[str, float]:
        """Medians."""
        return {"wall_s": statistics.median(self.wall), "cpu_s": statistics.median(self.cpu)}


def in_turn(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Timing]:
    """Each side once a round, after one call that compiles: what disturbs one disturbs both."""
    for side in sides.values():
        jax.block_until_ready(side())
    timings = {name: Timing() for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            timings[name].call(side)
    return timings


def ratio(numerator: Timing, denominator: Timing) -> float:
    """The median of the rounds' ratios of wall seconds."""
    pairs = zip(numerator.wall, denominator.wall, strict=True)
    return statistics.median(a / b for a, b in pairs)
