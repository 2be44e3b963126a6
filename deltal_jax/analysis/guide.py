"""The guide of metrics, METRICS.md, as data: what each is, what health and trouble look like, and
what to do."""

import dataclasses
import functools
import re
from pathlib import Path

GUIDE = Path(__file__).with_name("METRICS.md")
#: Cells of a row: the metrics, and the fields of `Entry` behind its name.
_CELLS = 5


@dataclasses.dataclass(frozen=True)
class Entry:
    """One metric, or all whose names have the form of its own: `<…>` stands for any text, `<j>` for
    a number."""

    name: str
    what: str
    health: str
    trouble: str
    remedy: str

    def describes(self, metric: str) -> bool:
        """Whether a metric of a run is this one."""
        pattern = re.escape(self.name).replace("<j>", r"\d+")
        return re.fullmatch(re.sub("<[^>]+>", ".+", pattern), metric) is not None

    @property
    def line(self) -> str:
        """All of it in one line."""
        return (
            f"{self.name}: {self.what}; health: {self.health}; trouble: {self.trouble}; "
            f"do: {self.remedy}"
        )


@functools.cache
def load_guide() -> tuple[Entry, ...]:
    """Every line of the guide's tables of metrics, in order."""
    entries = []
    for line in GUIDE.read_text(encoding="utf-8").splitlines():
        names, *cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| `") and len(cells) == _CELLS - 1:
            plain = [cell.replace("`", "") for cell in cells]
            entries += [Entry(name, *plain) for name in re.findall(r"`([^`]+)`", names)]
    return tuple(entries)


def find_entry(metric: str) -> Entry | None:
    """The line of a run's metric, if there is one."""
    return next((entry for entry in load_guide() if entry.describes(metric)), None)


def matching(text: str) -> list[Entry]:
    """The lines of the metric `text`, or else those whose names contain it."""
    own = find_entry(text)
    return [own] if own else [entry for entry in load_guide() if text in entry.name]
