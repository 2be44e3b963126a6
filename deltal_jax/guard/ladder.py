"""What the doctor finds: a rung for each question, of figures that each have a bound and a
verdict."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

Verdict = Literal["n/a", "ok", "look", "failed"]
#: From the least to the most that has to be done.
VERDICTS: tuple[Verdict, ...] = ("n/a", "ok", "look", "failed")


@dataclasses.dataclass(frozen=True)
class Figure:
    """One thing that was measured. `bound` is in words; `remedy` is what to do where it is not
    ok."""

    name: str
    value: float | str | None
    bound: str = ""
    verdict: Verdict = "ok"
    remedy: str = ""


@dataclasses.dataclass(frozen=True)
class Rung:
    """One question of the ladder and what was found. `reason` says why it is not applicable, where
    it is not."""

    name: str
    asks: str
    figures: Sequence[Figure] = ()
    notes: Sequence[str] = ()
    reason: str = ""

    @property
    def verdict(self) -> Verdict:
        """The worst of its figures."""
        if self.reason:
            return "n/a"
        return VERDICTS[max((VERDICTS.index(x.verdict) for x in self.figures), default=1)]


def begin_with(rungs: Sequence[Rung]) -> Rung | None:
    """The first that failed: those after it stand on it. None where none has."""
    return next((rung for rung in rungs if rung.verdict == "failed"), None)


def at_most(
    name: str, value: float, ok: float, failed: float = math.inf, *, remedy: str = ""
) -> Figure:
    """A figure that is ok up to one bound, and has failed over another or where it is not
    finite."""
    bound = f"≤ {ok:g}" if math.isfinite(ok) else "finite"
    return _judged(name, value, value <= ok, value > failed, bound, remedy)


def at_least(
    name: str, value: float, ok: float, failed: float = -math.inf, *, remedy: str = ""
) -> Figure:
    """A figure that is ok from one bound on, and has failed under another or where it is not
    finite."""
    return _judged(name, value, value >= ok, value < failed, f"≥ {ok:g}", remedy)


def _judged(name: str, value: float, ok: bool, failed: bool, bound: str, remedy: str) -> Figure:
    verdict: Verdict = "look"
    if ok and math.isfinite(value):
        verdict = "ok"
    elif failed or not math.isfinite(value):
        verdict = "failed"
    return Figure(name, value, bound, verdict, "" if verdict == "ok" else remedy)
