"""Runs the cells of a plan that are missing, one after the other, in one process that compiles
once; another process may work on the same folder beside it."""

import contextlib
import dataclasses
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from deltal_jax.backend import enable_compile_cache
from deltal_jax.compare.cells import evaluates, fingerprint, run_cell, save_result
from deltal_jax.compare.frozen import (
    FROZEN,
    frozen_fingerprint,
    frozen_path,
    measure_frozen,
)
from deltal_jax.compare.plan import Cell, Plan
from deltal_jax.compare.warmups import check_warmup, identity, load_warmup, make_warmup
from deltal_jax.errors import UserError
from deltal_jax.guard import signals
from deltal_jax.guard.pulse import phase
from deltal_jax.progress import ProgressDisplay
from deltal_jax.tasks.base import close
from deltal_jax.training.run_folder import load_json, model_files, write_text
from deltal_jax.training.setup import Setup, check_setup, make_setup

#: What is in the folder of a comparison.
PLAN, CELLS, WARMUPS, LOCKS = "plan.yaml", "cells", "warmups", ".locks"
#: Figures of a step that are shown as a cell goes on.
SHOWN = ("accuracy", "reward/mean", "length/mean")


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a comparison is."""

    folder: Path
    cells: int
    done: int
    #: That another process works on.
    elsewhere: int = 0

    @property
    def complete(self) -> bool:
        """Whether every cell is there."""
        return self.done == self.cells


class Comparison:
    """A plan with its folder: which cells are there, and those that are missing, made."""

    def __init__(self, plan: Plan, folder: Path, display: ProgressDisplay, command: str):
        """Nothing is written. `command` is what goes on with it.

        Raises UserError for what only the parts of the experiment can tell, and for a cell or
        warm-up in the folder that another plan made.
        """
        enable_compile_cache()
        self.plan, self.folder, self.display, self.command = plan, folder, display, command
        self.cells = plan.cells()
        self.setup = _setup_of(plan)
        for method in plan.methods:
            try:
                check_setup(self._with(plan.config(method)))
            except UserError as error:
                raise UserError(f"methods.{method.name}: {error}") from error
        count = plan.warmups if isinstance(plan.warmups, int) else len(plan.warmups)
        self._identities = [identity(self.setup, plan, number) for number in range(max(count, 1))]
        self._fingerprints = {
            cell.name: fingerprint(self.setup, cell, self._identities[cell.warmup])
            for cell in self.cells
        }
        #: Of the measurement at each warm-up; none where the plan asks for none.
        self._frozen = {
            number: frozen_fingerprint(self.setup, plan, self._identities[number])
            for number in sorted({cell.warmup for cell in self.cells})
            if plan.frozen is not None
        }
        self._starts: dict[int, Any] = {}
        for number in self._made():
            if self._warmup(number).is_dir():
                check_warmup(self._warmup(number), self._identities[number])
        self.missing()

    def path(self, cell: Cell) -> Path:
        """Where the result of a cell is, once it is there."""
        return self.folder / CELLS / f"{cell.name}.json"

    def missing(self) -> list[Cell]:
        """The cells that are not there yet, in their order. Raises UserError for one that is there
        and was made by another plan."""
        missing = []
        for cell in self.cells:
            path = self.path(cell)
            if not path.is_file():
                missing.append(cell)
                continue
            found = load_json(path, "delete it")
            if found.get("fingerprint") != self._fingerprints[cell.name]:
                raise UserError(
                    f"{path}: made by another plan, experiment or version; choose another --to, "
                    "or delete it"
                )
        return missing

    def describe(self) -> dict[str, Any]:
        """The plan in plain data: its methods, and what is to be done."""
        missing = self.missing()
        methods = [
            {
                "name": method.name,
                "control": method.control,
                "set": method.overrides,
                "weights": "permuted" if method.permuted else None,
                "of": method.of,
                "kind": method.kind,
                "expect": method.expect,
                "seeds": list(method.seeds),
                "done": sum(self.path(c).is_file() for c in self.cells if c.method == method),
            }
            for method in self.plan.methods
        ]
        sizes = {"cells": len(self.cells), "cells that are missing": len(missing)}
        return {"methods": methods, "sizes": sizes | self._sizes(missing)}

    def _sizes(self, missing: list[Cell]) -> dict[str, int]:
        """Of the missing cells together, at most."""
        made = [n for n in self._made() if not self._warmup(n).is_dir()]
        shared = self.setup.config
        k, problems = shared.evaluate.samples_per_problem, shared.evaluate.problems
        looks = sum(evaluates(shared, step) for step in range(shared.rl.steps + 1))
        batches = [cell.config.rl for cell in missing]
        return {
            "RL steps": sum(rl.steps for rl in batches),
            "sampled training responses": sum(
                rl.steps * rl.prompts_per_step * rl.samples_per_prompt for rl in batches
            ),
            "evaluations": len(missing) * looks,
            "sampled evaluation responses": len(missing)
            * looks
            * k
            * len(self.setup.task.held_out(problems)),
            "measurements at warm-ups": len(self._unmeasured()),
            "warm-ups to make": len(made),
            "warm-up steps": len(made) * shared.sft.steps,
        }

    def run(self, limit: int | None = None) -> Progress:
        """Make the missing cells, or so many of them."""
        self._open()
        with signals.listening() as stop:
            stop.kept = self._kept
            try:
                others = self._run(limit)
            finally:
                self.display.stop()
                close(self.setup.task)
        missing = self.missing()
        left, elsewhere = len(missing), sum(cell in others for cell in missing)
        if left:
            there = f", {elsewhere} of them with another process" if elsewhere else ""
            self.display.say(f"{left} cells are left{there}; go on with: {self.command}")
        return Progress(self.folder, len(self.cells), len(self.cells) - left, elsewhere)

    def _run(self, limit: int | None) -> list[Cell]:
        """Returns the cells that other processes were at."""
        made, others = 0, []
        began, before = 0.0, len(self.missing())
        for cell in self.missing():
            if limit is not None and made >= limit:
                break
            with self._claimed(cell.name) as claimed:
                if claimed is None:
                    others.append(cell)
                    continue
                if self.path(cell).is_file():  # made meanwhile
                    continue
                start = self._start(cell.warmup)
                self._measure(cell.warmup)
                began = began or time.perf_counter()
                self._make(cell, start)
            made += 1
            left = len(self.missing())
            rate = (time.perf_counter() - began) / (before - left)
            self.display.say(
                f"    {len(self.cells) - left}/{len(self.cells)} cells done"
                + (f", about {_spoken(rate * left)} left" if left else "")
            )
        for number in {cell.warmup: None for cell in self.cells} if limit is None else ():
            self._measure(number)
        return others

    def _make(self, cell: Cell, start: Any) -> None:
        """One cell, with a line about it."""
        steps = cell.config.rl.steps
        terminal = self.display.console.is_terminal
        if terminal:
            self.display.start(cell.name, 0, steps)

        def show(step: int, metrics: dict[str, float]) -> None:
            if terminal:
                self.display.update(step, {k: metrics[k] for k in SHOWN if k in metrics})

        known = self._fingerprints[cell.name]
        with phase("start-up", f"cell {cell.name}"):
            content = run_cell(self.setup, cell, start, known, show)
        self.display.stop()
        save_result(self.path(cell), content)
        first, last = content["evaluations"][0], content["evaluations"][-1]
        self.display.say(
            f"{cell.method.name}  seed {cell.seed}  Avg@{content['k']} {first['avg_at_k']:.3f} → "
            f"{last['avg_at_k']:.3f}  {content['seconds']:.0f} s ({last['seconds']:.0f} s training,"
            f" {content['cpu_seconds']:.0f} CPU s)"
        )

    def _start(self, number: int) -> Any:
        """The parameters of a warm-up, which is made first where it is missing; kept."""
        if number not in self._starts:
            folder = self._warmup(number)
            if number in self._made() and not folder.is_dir():
                with self._claimed(f"warmup-{number}", wait=True):
                    if not folder.is_dir():  # not made meanwhile
                        self._warm_up(number)
            self._starts[number] = load_warmup(self.setup, self.plan, number, folder)
        return self._starts[number]

    def _warm_up(self, number: int) -> None:
        began, cpu = time.perf_counter(), time.process_time()
        self.display.start(f"warm-up {number}", 0, self.setup.config.sft.steps)
        with phase("update", f"warm-up {number}"):
            make_warmup(
                self.setup,
                self.plan,
                number,
                self._warmup(number),
                lambda step, loss: self.display.update(step, {"loss": loss}),
            )
        self.display.stop()
        self.display.say(
            f"warm-up {number} of {self.plan.warmups}: {time.perf_counter() - began:.0f} s "
            f"({time.process_time() - cpu:.0f} CPU s)"
        )

    def _measure(self, number: int) -> None:
        """The plan's methods at a warm-up, where the plan asks for it and it is not there."""
        if number not in self._unmeasured():
            return
        with self._claimed(f"{FROZEN}-{number}") as claimed:
            if claimed is None or number not in self._unmeasured():  # another process does, or did
                return
            began, cpu = time.perf_counter(), time.process_time()
            start, known = self._start(number), self._frozen[number]
            with phase("start-up", f"measurement of warm-up {number}"):
                found = measure_frozen(self.setup, self.plan, number, start, known)
            save_result(frozen_path(self.folder, number), found)
            self.display.say(
                f"warm-up {number}, frozen: {found['groups']} prompts measured, "
                f"{time.perf_counter() - began:.0f} s ({time.process_time() - cpu:.0f} CPU s)"
            )

    def _unmeasured(self) -> list[int]:
        """The warm-ups whose measurement the plan asks for and that are not there, or are of other
        methods: these are measured anew."""
        return [
            number
            for number, known in self._frozen.items()
            if not (path := frozen_path(self.folder, number)).is_file()
            or load_json(path, "delete it").get("fingerprint") != known
        ]

    def _made(self) -> range:
        """The numbers of the warm-ups that are made here."""
        return range(self.plan.warmups if isinstance(self.plan.warmups, int) else 0)

    def _warmup(self, number: int) -> Path:
        return self.folder / WARMUPS / str(number)

    def _with(self, config: Any) -> Setup:
        return dataclasses.replace(self.setup, config=config)

    def _open(self) -> None:
        """The folder, with the plan as it is now."""
        try:
            (self.folder / LOCKS).mkdir(parents=True, exist_ok=True)
            write_text(self.folder / PLAN, self.plan.dump())
        except OSError as error:
            raise UserError(f"--to: cannot write to {self.folder}: {error.strerror}") from error
        names = {cell.name for cell in self.cells}
        there = sorted((self.folder / CELLS).glob("*/seed-*.json"))
        others = [path for path in there if f"{path.parent.name}/{path.stem}" not in names]
        if others:
            self.display.say(f"note: {len(others)} cells there are not of the plan: {others[0]}, …")

    @contextlib.contextmanager
    def _claimed(self, name: str, *, wait: bool = False) -> Iterator[IO[str] | None]:
        """Have a cell or warm-up for this process until it ends or leaves this; None where another
        has it."""
        path = self.folder / LOCKS / name.replace("/", "-")
        with path.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield None
                return
            yield file

    def _kept(self) -> tuple[str, bool]:
        done = len(self.cells) - len(self.missing())
        return f"{done} of {len(self.cells)} cells are done; go on with: {self.command}", False


def _setup_of(plan: Plan) -> Setup:
    """What all cells share; of runs, their tokenizer and the config of their model."""
    config = plan.config()
    if isinstance(plan.warmups, int):
        return make_setup(config)
    return make_setup(config, model_files(Path(plan.warmups[0])))


def _spoken(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
