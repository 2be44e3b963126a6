"""How full the slots were, and how full they could have been."""

import dataclasses
import heapq

import numpy as np


@dataclasses.dataclass(frozen=True)
class RolloutStats:
    """Slot-steps (slots times decoding steps), and how many of them gave a token of a response. Of
    a server: microseconds of the places for requests, and how many of them had one.

    "Queued" are those while some response had yet to begin; afterwards the tail runs out.
    """

    slot_steps: int
    useful_steps: int
    slot_steps_queued: int
    useful_steps_queued: int
    #: Of list scheduling: each response begins on the slot that is free first, in the same order.
    ideal_slot_steps: int

    def __add__(self, other: "RolloutStats") -> "RolloutStats":
        """Of both, one after the other."""
        counts = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return RolloutStats(*(a + b for a, b in counts))

    @property
    def utilization(self) -> float:
        """The share of slot-steps that gave a token, tail included."""
        return self.useful_steps / max(self.slot_steps, 1)

    @property
    def utilization_queued(self) -> float:
        """The same while responses were waiting to begin; 1 where none ever was."""
        if self.slot_steps_queued == 0:
            return 1.0
        return self.useful_steps_queued / self.slot_steps_queued

    @property
    def ideal_utilization(self) -> float:
        """What `utilization` is for ideal list scheduling in the order of the queue, with all slots
        to the end; an engine that gives up idle slots in the tail may be above it."""
        return self.useful_steps / max(self.ideal_slot_steps, 1)


def ideal_steps(lengths: np.ndarray, slots: int) -> int:
    """Decoding steps until all responses of these lengths (tokens) are done, each begun as soon as
    a slot is free, in this order, at no cost.

    Source: Graham, "Bounds on multiprocessing timing anomalies", 1969.
    """
    busy = [0] * min(slots, len(lengths))
    for length in lengths:
        heapq.heapreplace(busy, busy[0] + int(length))
    return max(busy, default=0)
