"""A data set in a new order each epoch, by position, so that nothing has to be kept to go on."""

from collections.abc import Callable, Sequence
from typing import TypeVar, cast

Item = TypeVar("Item")
#: Positions whose rows a fingerprint of the order is made of.
PROBE = 8


def epochs(count: int, seed: int, read: Callable[[int], Item]) -> Sequence[Item]:
    """An endless sequence: read(i) of every i < count once in the positions e·count … e·count +
    count − 1, in an order of the seed and the epoch e.

    Grain computes each place of an order by itself, so a long one takes no memory. Its own state
    would hold neither the seed nor which data they are: the position is kept with a run's
    checkpoint, the seed with its config, and the data's fingerprint with its summary.
    """
    import grain

    order = grain.MapDataset.range(count).seed(seed).shuffle().repeat().map(read)
    return cast(Sequence[Item], order)


def order_fingerprint(count: int) -> str:
    """The beginning of an order: another version of Grain may have others."""
    order = epochs(count, 0, int)
    return " ".join(str(order[position]) for position in range(PROBE))
