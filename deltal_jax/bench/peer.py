"""A peer in a process of its own, in an environment of its own, asked for one run at a time."""

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from deltal_jax.bench.measure import Timing
from deltal_jax.errors import UserError


class Peer:
    """A script of this folder that answers a seed on its standard input by one line of JSON, with
    `wall` and `cpu` seconds; ends where its `with` does. Raises UserError where it does not run."""

    def __init__(self, python: str, script: str, name: str, seeds: list[int]):
        self.name = name
        try:
            # A pipe that nobody reads would fill up and stop it.
            self.errors = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115
            self.process = subprocess.Popen(
                [python, str(Path(__file__).with_name(script))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
                text=True,
            )
        except OSError as error:
            raise UserError(f"--peer: cannot run {python}: {error.strerror}") from error
        self.timing = Timing()
        try:
            self._read()
            for seed in seeds[:2]:  # compiles
                self.ask(seed)
        except BaseException:
            self.__exit__()
            raise
        self.timing = Timing()

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        with self.process, self.errors:  # closes the pipes, and waits
            self.process.kill()

    def ask(self, seed: int) -> dict[str, Any]:
        """One run of a seed: what it says, its seconds noted in `timing`."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seed}\n")
        self.process.stdin.flush()
        found = self._read()
        self.timing.wall.append(found["wall"])
        self.timing.cpu.append(found["cpu"])
        return found

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            last = self.errors.read().strip().split("\n")[-1]
            raise UserError(f"--peer: {self.name} did not run: {last}")
        return json.loads(line)
