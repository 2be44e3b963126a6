"""The rows of a file to train on, as examples."""

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from deltal_jax.data.epochs import epochs, order_fingerprint
from deltal_jax.data.rows import DropError, Dropped, Rows, nothing_in

Example = TypeVar("Example")
#: Rows that are looked at before a run begins, to say what is dropped.
LOOKED_AT = 10_000


class TrainingRows(Generic[Example]):
    """What `make(row, number)` makes of a file's first `count` rows, or of all, one epoch after the
    other. A row is read when its turn comes.

    `make` raises DropError for what is no example. Raises UserError, naming the `field` that said
    which file, where none is.
    """

    def __init__(
        self,
        rows: Rows,
        make: Callable[[Any, int], Example],
        field: str,
        *,
        count: int | None = None,
    ):
        self._rows, self._make = rows, make
        self.count = len(rows) if count is None else min(count, len(rows))
        self._streams: dict[int, Sequence[Example | None]] = {}
        self._looked_at, self.dropped = self._look(field)

    def _look(self, field: str) -> tuple[int, Dropped]:
        """How many of the first rows were looked at, and what of them is dropped."""
        dropped = Dropped()
        for number in range(self.count):
            if number >= LOOKED_AT and dropped.counts.total() < number:
                return number, dropped
            row = self._rows[number]
            try:
                self._make(row, number)
            except DropError as reason:
                dropped.add(str(reason), row, number)
        if dropped.counts.total() == self.count:
            raise nothing_in(self._rows.path, dropped, field)
        return self.count, dropped

    def at(self, seed: int, position: int) -> Example | None:
        """Every row once an epoch, in an order of the seed and the epoch; None where it is no
        example."""
        if seed not in self._streams:
            self._streams[seed] = epochs(self.count, seed, self._read)
        return self._streams[seed][position]

    def summary(self, held_out: int) -> str:
        """How many problems there are, beside those held out, and what of the rows is dropped."""
        reasons = [f"{count:,} {reason}" for reason, count in self.dropped.counts.most_common()]
        kept = f"{held_out:,} held out"
        if self._looked_at < self.count:
            said = f"task: {self.count:,} rows to train on, {kept}"
            return (
                f"{said}; of the first {self._looked_at:,} dropped: {', '.join(reasons) or 'none'}"
            )
        said = f"task: {self.count - self.dropped.counts.total():,} problems to train on, {kept}"
        return f"{said}; dropped: {', '.join(reasons)}" if reasons else said

    @property
    def order(self) -> str:
        """A fingerprint of the order."""
        return order_fingerprint(self.count)

    def _read(self, number: int) -> Example | None:
        try:
            return self._make(self._rows[number], number)
        except DropError:
            return None
