"""A run that is killed again and again and goes on each time, beside one that nobody kills: they
end alike.

    scripts/soak kill --count 100 --processes 2

Processes are forked from this one, which has imported what they need and started no backend: that
halves what a restart costs. They are killed by SIGKILL, from outside at moments drawn with a seed,
and by themselves at each fail-point. Of two, one is killed or both; who is left has to end by
itself. Each is what `deltal train` starts as a child: `tests/test_train_on_meshes.py` has the
parents.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import os
import random
import re
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.processes import HEARTBEAT, QUICK, among, reserved_port

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# A process other than the first compiles everything each time: jax keeps what the first compiles.
os.environ.setdefault("XLA_FLAGS", QUICK)

import jax

import deltal_jax.training.loop  # noqa: F401 imported here once, not in every process
from deltal_jax.checkpoints.reader import SavedSteps
from deltal_jax.cli.main import main as deltal
from deltal_jax.guard import supervise
from deltal_jax.guard.failpoints import POINTS, VARIABLE
from deltal_jax.parallel.mesh import start_distributed
from deltal_jax.training.run_folder import CHECKPOINTS
from tests.runs import TINY, assert_same, newest_verified

ROOT = Path(__file__).parent.parent
#: Seconds after which a process that should have ended or died is a failure.
PATIENCE = 900.0
#: Likewise where another process has died.
SURVIVAL = HEARTBEAT + 60.0
#: What a process says as soon as all have met.
JOINED = "joined"
#: How a process ends that has lost another.
LOST = "lost another"
#: How often a byte of the newest checkpoint is damaged before a restart.
FLIPS = 0.1
#: Lines of metrics that a restart may write before it is killed, and seconds after the last.
LINES, DELAY = 6, 0.3
#: Everything that one step leaves to the next, and a checkpoint after every other step.
OPTIONS = TINY | {
    "rl.updates_per_rollout": 2,
    "rl.optimizer.learning_rate": 1e-2,
    "objective.kl_coefficient": 0.05,
    "rollout.dynamic_sampling": "reward",
    "rollout.oversampling": 2.0,
    "rollout.partial": True,
    "task.rewards": [f"{ROOT / 'tests' / 'runs.py'}:mixed_reward"],
    "evaluate.every": 3,
    "checkpoint.every": 2,
    "checkpoint.keep_last": 2,
}


@dataclasses.dataclass
class Job:
    """One start of a run: its processes, and where they say what they do."""

    pids: list[int]
    errors: list[Path]
    codes: dict[int, int] = dataclasses.field(default_factory=dict)

    def poll(self) -> dict[int, int]:
        """The wait status of the processes that have ended."""
        for number, pid in enumerate(self.pids):
            if number not in self.codes and (found := os.waitpid(pid, os.WNOHANG))[0]:
                self.codes[number] = found[1]
        return self.codes

    def kill(self, number: int) -> None:
        """A process with all that it has started, unless it has ended."""
        if number not in self.poll():
            os.killpg(self.pids[number], signal.SIGKILL)

    def wait(self) -> list[int]:
        """The wait status of all processes."""
        until(lambda: len(self.poll()) == len(self.pids), self)
        return [self.codes[number] for number in range(len(self.pids))]

    def said(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in self.errors)


@dataclasses.dataclass
class Soak:
    """What is killed, and what came of it."""

    folder: Path
    processes: int
    steps: int
    rng: random.Random
    port: int  # of process 0
    #: How often a process died, by where: a fail-point, or what a random kill left half done.
    kills: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    #: Processes that ended by themselves when another was killed, and after how many seconds.
    survivors: int = 0
    slowest: float = 0.0
    restarts: int = 0  # that went on from the newest complete checkpoint
    job: Job | None = None  # that of the last start
    #: Complete checkpoints that were damaged on purpose, and those that were found damaged.
    flipped: set[tuple[str, int]] = dataclasses.field(default_factory=set)
    damaged: set[tuple[str, int]] = dataclasses.field(default_factory=set)

    @property
    def options(self) -> dict[str, Any]:
        ahead = {"rollout.ahead": 1} if self.processes == 1 else {}
        return OPTIONS | {"rl.steps": self.steps} | ahead


def until(done: Callable[[], bool], job: Job, seconds: float = PATIENCE) -> None:
    """Wait; raises AssertionError with what the processes said if it takes too long."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            for number in range(len(job.pids)):
                job.kill(number)
            raise AssertionError(f"no end after {seconds:.0f} s:\n{job.said()[-4000:]}")
        time.sleep(0.005)


def fork(function: Callable[[], int], errors: Path, environment: dict[str, str]) -> int:
    """Call `function` in a process, and a process group, of its own; its id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX's: its threads begin with its backend
        pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        for number, path in ((0, os.devnull), (1, os.devnull), (2, errors)):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
        os.environ |= environment
        code = function()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def start(soak: Soak, run: Path, *, fail: str = "") -> Job:
    """A new run, or the next part of one. `fail`: a fail-point and its visit."""
    options = soak.options | {"run.dir": str(run)}
    items = ["countdown-tiny", *(f"{key}={json.dumps(value)}" for key, value in options.items())]
    if (run / "config.yaml").is_file():
        items = [f"run.dir={run}", "--resume"]
    job = soak.job = Job([], [])
    for number in range(soak.processes):
        environment = {VARIABLE: fail if number == 0 else ""}
        if soak.processes > 1:
            environment |= among(soak.port, soak.processes, number)
            environment |= {supervise.CHILD: f"-1:{os.getpid()}"}  # nobody reads what it tells
        errors = run.with_name(f"{run.name}.{number}.stderr")
        errors.write_text("")
        job.errors.append(errors)
        job.pids.append(fork(functools.partial(train, items), errors, environment))
    return job


def train(items: list[str]) -> int:
    """In a process: the command. One of several says when all have met, and leaves with them."""
    start_distributed()
    if jax.distributed.is_initialized():
        print(JOINED, file=sys.stderr, flush=True)
    code = deltal(["train", *items])
    jax.distributed.shutdown()  # as at an ordinary exit
    return code


def expected(soak: Soak, run: Path) -> str:
    """What a restart has to say: the newest complete step, whose contents are verified here."""
    if not (run / "config.yaml").is_file():
        return ""
    position, damaged = newest_verified(run)
    soak.damaged |= {(run.name, number) for number in damaged}
    return "" if position is None else f"resumed after {position.step} steps of {position.phase}"


def resumed(job: Job) -> str:
    """What a restart says."""
    found = re.search(r"resumed after \d+ steps of \w+", job.errors[0].read_text(errors="replace"))
    return found[0] if found else ""


def last_line(run: Path) -> int:
    """The last RL step of which there is a line of metrics."""
    path = run / "metrics.jsonl"
    text = path.read_text(errors="replace") if path.exists() else ""
    steps = re.findall(r'^{"step": (\d+), "phase": "rl"', text, re.MULTILINE)
    return int(steps[-1]) if steps else 0


def begun(job: Job) -> bool:
    """Whether process 0 has cut the metrics back, and goes on from there; or has ended."""
    return bool(job.poll()) or "run folder: " in job.errors[0].read_text(errors="replace")


def joined(job: Job) -> bool:
    """Whether all processes have met."""
    return all(JOINED in path.read_text(errors="replace") for path in job.errors)


def kill_somewhere(soak: Soak, run: Path, job: Job) -> bool:
    """Kill a run at a random moment; whether it was still there."""
    lines = soak.rng.randrange(LINES)
    if lines:
        until(lambda: begun(job), job)
        first = last_line(run)
        until(lambda: last_line(run) >= first + lines or bool(job.poll()), job)
        time.sleep(soak.rng.uniform(0, DELAY))
    else:  # also while it starts
        time.sleep(soak.rng.uniform(0, 10 * DELAY))
    victims = list(range(soak.processes))
    if soak.processes > 1 and soak.rng.random() < 0.5:  # one of them: the others see to themselves
        victims = [soak.rng.choice(victims)]
        until(lambda: joined(job) or bool(job.poll()), job)  # before, they wait for a late one
    alive = not job.poll()
    for victim in victims:
        job.kill(victim)
    return alive


def half_done(run: Path) -> str:
    """What a killed run has left: where it was."""
    names = [path.name for path in (run / CHECKPOINTS).glob("[0-9]*")]
    whole = set(SavedSteps(run / CHECKPOINTS).all())
    half = {int(name.split(".")[0]) for name in names if ".damaged" not in name} - whole
    if half:
        return "random, saving" if max(half) > max(whole, default=-1) else "random, deleting"
    with contextlib.suppress(OSError):
        if not (run / "metrics.jsonl").read_bytes().endswith(b"\n"):
            return "random, starting or writing metrics"
    return "random, between"


def flip(soak: Soak, run: Path) -> None:
    """Now and then damage a byte of the newest checkpoint, if it is whole and not the only one."""
    steps = SavedSteps(run / CHECKPOINTS)
    if len(steps.all()) < 2 or soak.rng.random() > FLIPS or newest_verified(run)[1]:
        return
    files = sorted(x for x in Path(steps.path(steps.all()[-1])).rglob("*") if x.is_file())
    path = soak.rng.choice([x for x in files if x.stat().st_size])
    content = bytearray(path.read_bytes())
    content[soak.rng.randrange(len(content))] ^= 1 << soak.rng.randrange(8)
    path.write_bytes(content)
    soak.flipped.add((run.name, steps.all()[-1]))


def wait(soak: Soak, job: Job) -> list[str]:
    """How all processes have ended. When one has died, the others have `SURVIVAL` seconds."""
    until(lambda: bool(job.poll()), job)
    clock = time.monotonic()
    until(lambda: len(job.poll()) == soak.processes, job, SURVIVAL)
    ends = [how_ended(job.codes[number]) for number in range(soak.processes)]
    if LOST in ends:
        soak.survivors += ends.count(LOST)
        soak.slowest = max(soak.slowest, time.monotonic() - clock)
    return ends


def how_ended(status: int) -> str:
    if status == 0:
        return "done"
    if os.WTERMSIG(status) == signal.SIGKILL:
        return "killed"
    lost = os.WTERMSIG(status) == signal.SIGABRT or os.waitstatus_to_exitcode(status) == 1
    return LOST if lost else f"wait status {status}"


def kill_until_done(soak: Soak, run: Path, points: Iterator[str], count: int) -> None:
    """Start a run, kill it, and again, until it is done; no more often than `count` in all."""
    while True:
        flip(soak, run)
        wanted = expected(soak, run)
        killing = soak.kills.total() < count
        point = next(points, "") if killing else ""
        job = start(soak, run, fail=point)
        alive = killing and not point and kill_somewhere(soak, run, job)
        ends = wait(soak, job)
        done = set(ends) == {"done"}
        if said := resumed(job):
            assert said == wanted, f"{said}, not {wanted}"
            soak.restarts += 1
        assert said or point or alive or not wanted, job.said()[-4000:]
        if done:
            return
        # Those that lose another process end by themselves; nobody else may.
        assert "killed" in ends and set(ends) <= {"killed", LOST, "done"}, job.said()[-4000:]
        if point or alive:
            soak.kills[point or half_done(run)] += 1


def compare(run: Path, whole: Path) -> None:
    """Raises AssertionError where two runs differ; in a process of its own, as it needs a
    backend."""

    def same() -> int:
        assert_same(run, whole)
        return 0

    errors = run.with_name("compare.stderr")
    job = Job([fork(same, errors, {})], [errors])
    assert job.wait() == [0], job.said()[-4000:]


def soak_kill(
    folder: Path, *, count: int, processes: int = 1, steps: int = 24, seed: int = 0
) -> dict[str, Any]:
    """Kill runs so often, first at every fail-point, then anywhere; what came of it.

    Raises AssertionError where a restart goes on from another step than the newest complete one,
    or where a run that was killed differs in the end from one that was not.
    """
    started = time.monotonic()
    with reserved_port() as port:
        soak = Soak(folder, processes, steps, random.Random(seed), port)
        try:
            runs = _soak(soak, count)
        finally:
            for number in range(len(soak.job.pids) if soak.job else 0):
                soak.job.kill(number)
    return {
        "processes": processes,
        "runs": runs,
        "steps_each": steps,
        "kills": dict(soak.kills),
        "killed": soak.kills.total(),
        "restarts": soak.restarts,
        "survivors_ended": soak.survivors,
        "slowest_of_them_s": round(soak.slowest, 1),
        "bytes_flipped": len(soak.flipped),
        "damaged_steps": len(soak.damaged),
        "all_equal_to_the_unkilled": True,
        "seconds": round(time.monotonic() - started),
    }


def _soak(soak: Soak, count: int) -> int:
    """How many runs that took."""
    whole, runs, points = soak.folder / "whole", 0, iter(POINTS)
    job = start(soak, whole)
    assert not any(job.wait()), job.said()[-4000:]
    while soak.kills.total() < count:
        runs += 1
        run = soak.folder / f"killed-{runs}"
        kill_until_done(soak, run, points, count)
        compare(run, whole)
        assert soak.damaged == soak.flipped, f"{soak.damaged} is not {soak.flipped}"
        shutil.rmtree(run)
    return runs
