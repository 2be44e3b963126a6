"""Verdicts that were given, for steps that a resumed run repeats.

Where a limit of time or memory cuts a verifier off, it ends elsewhere the next time. A run that
goes on from a checkpoint repeats the steps after it, and what it said of them once stays so: all
verdicts are kept, also those that were not cut off, as the second time they may be.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deltal_jax.tasks.base import Verdict
from deltal_jax.training.run_folder import write_text


@dataclasses.dataclass(frozen=True)
class VerdictJournal:
    """A folder with one small file for each call that judged, `<phase>-<step>-<digest>.json`: there
    as a whole or not at all. The digest is of all that the verdicts depend on, so that nobody needs
    to count the calls of a step, and each of several processes keeps those on its share.
    """

    folder: Path

    def of(self, phase: str, step: int) -> Callable[..., list[Verdict]]:
        """`judge` of a step of a phase, as `grade` wants it."""
        return functools.partial(self.judge, f"{phase}-{step:06d}")

    def judge(
        self,
        step: str,
        pairs: Sequence[tuple[str, Any]],
        judge: Callable[[], list[Verdict]],
    ) -> list[Verdict]:
        """The verdicts on (response, answer) pairs: known ones, or what `judge` says, kept."""
        said = json.dumps(pairs, sort_keys=True).encode()
        path = self.folder / f"{step}-{hashlib.sha256(said).hexdigest()[:16]}.json"
        with contextlib.suppress(FileNotFoundError, ValueError):  # empty, where the machine died
            return [Verdict(*fields) for fields in json.loads(path.read_bytes())]
        verdicts = judge()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps([dataclasses.astuple(verdict) for verdict in verdicts]))
        return verdicts

    def drop(self, step: int) -> None:
        """Forget the steps before this one, which no resume repeats any more."""
        for path in self.folder.glob("*-[0-9]*-*"):  # and what a killed one left of such a file
            if int(path.name.split("-")[1]) < step:
                path.unlink(missing_ok=True)
