"""Long checks that the suite has in small: `scripts/soak verifier`, `tasks`, `agreement`, …"""

import argparse
import collections
import contextlib
import itertools
import json
import resource
import sys
import tempfile
import threading
import time
from pathlib import Path

from deltal_jax.tasks.base import Problem, Task
from deltal_jax.tasks.countdown.rules import GRAMMARS
from deltal_jax.tasks.countdown.text import CountDownText
from deltal_jax.tasks.countdown.trace import CountDown
from deltal_jax.tasks.math.rules import WARM_UP, judge
from deltal_jax.tasks.paths import Paths
from deltal_jax.tasks.procedural import KINDS
from deltal_jax.tasks.procedural.generated import Generated
from deltal_jax.tasks.workers import Limits, Workers
from tests.countdown_answers import agreement as countdown_agreement
from tests.hostile import GOLD, hostile
from tests.math_answers import VERIFIERS, agreement

MAX_RESPONSE = 4000
#: Seconds that a verifier in this process may take for one response, megabytes included.
MAX_SECONDS = 1.0
#: What hostile responses may say by chance: an answer of these alone is none to be soaked with.
BY_CHANCE = set("123+-. ")


def soak_verifier(verifier: str, count: int, limits: Limits) -> dict:
    """Hostile responses on two workers, with good ones among them; raises where a law is broken."""
    function = f"{judge.__module__}:{judge.__name__}"
    warm_up = [(verifier, *call) for call in WARM_UP]
    good = (verifier, f"so \\boxed{{{GOLD}}}", GOLD)
    with (
        tempfile.TemporaryDirectory() as folder,
        Workers(function, 2, limits=limits, warm_up=warm_up) as workers,
    ):
        canary = Path(folder) / "executed"
        alone = _rate(workers, [(*good[:1], f"so \\boxed{{{n}}}", GOLD) for n in range(1000)])
        peak, done = [0], threading.Event()
        watcher = threading.Thread(target=_watch, args=(peak, done), daemon=True)
        watcher.start()
        started, slowest = time.perf_counter(), 0.0
        verdicts, beside = collections.Counter(), collections.Counter()
        responses = hostile(0, count, canary)
        while batch := list(itertools.islice(responses, 32)):
            clock = time.perf_counter()
            bad = [(verifier, response[-MAX_RESPONSE:], GOLD) for response in batch]
            said = _verdicts(workers, [call for each in bad for call in (each, good)])
            slowest = max(slowest, time.perf_counter() - clock)
            verdicts.update(said[::2])
            beside.update(said[1::2])
        seconds = time.perf_counter() - started
        done.set()
        watcher.join()
        after = _rate(workers, [(*good[:1], f"so \\boxed{{{-n}}}", GOLD) for n in range(1, 1001)])
        if canary.exists():
            raise AssertionError("a response was executed")
        if verdicts["correct"]:
            raise AssertionError(f"{verdicts['correct']} hostile responses were called right")
        if set(beside) != {"correct"}:
            raise AssertionError(f"good responses beside hostile ones were called {dict(beside)}")
        if peak[0] > limits.memory:
            raise AssertionError(f"a worker had {peak[0]:,} bytes")
    return {
        "verifier": verifier,
        "hostile": count,
        "verdicts": dict(verdicts),
        "calls": dict(workers.counts),
        "seconds": round(seconds, 1),
        "slowest_batch_of_64_s": round(slowest, 2),
        "good_per_s_before": round(alone),
        "good_per_s_after": round(after),
        "peak_worker_mb": round(peak[0] / 1e6),
        "own_peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000,
    }


def soak_tasks(count: int) -> dict:
    """Hostile responses to every task whose verifier runs in this process."""
    tasks: list[Task] = [CountDown(), Paths(), *map(Generated, KINDS)]
    tasks += [CountDownText(grammar=grammar) for grammar in GRAMMARS]
    problems = [(task, _unlike_hostile(task)) for task in tasks]
    slowest, slowest_name, reasons = 0.0, "", collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        canary = Path(folder) / "executed"
        started = time.perf_counter()
        for response in hostile(0, count, canary):
            for task, problem in problems:
                tag = "a" if isinstance(task, (CountDown, Paths)) else "answer"
                said = f"<{tag}>{response}</{tag}>"
                clock = time.perf_counter()
                verdict = task.verify(said, problem.answer)
                seconds = time.perf_counter() - clock
                if verdict.reward != 0.0:
                    raise AssertionError(f"{task.name}: {response[:80]!r} gave {verdict}")
                reasons[verdict.reason] += 1
                if seconds > slowest:
                    slowest, slowest_name = seconds, task.name
        if canary.exists():
            raise AssertionError("a response was executed")
    if slowest > MAX_SECONDS:
        raise AssertionError(f"{slowest_name} took {slowest:.2f} s")
    return {
        "tasks": len(tasks),
        "hostile": count,
        "verdicts": reasons.total(),
        "of_them_read": reasons["not a solution"],
        "seconds": round(time.perf_counter() - started, 1),
        "slowest_ms": round(slowest * 1000, 1),
        "slowest_task": slowest_name,
        "own_peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000,
    }


def soak_kill(arguments: argparse.Namespace) -> dict:
    """Runs of training that are killed; raises where one is not as if nobody had."""
    from tests.kill import soak_kill  # imports all that trains

    with tempfile.TemporaryDirectory() as folder:
        options = {name: getattr(arguments, name) for name in ("count", "processes", "steps")}
        return soak_kill(Path(folder), **options, seed=arguments.seed)


def _unlike_hostile(task: Task) -> Problem:
    """A problem whose answer no hostile response has by chance."""
    drawn = (task.problem(0, position) for position in range(100))
    return next(p for p in drawn if p and set(p.answer.get("example", "?")) - BY_CHANCE)


def _verdicts(workers: Workers, calls: list) -> list[str]:
    outcomes = workers.map(calls)
    return [x.value[0] if x.status == "done" else x.status for x in outcomes]


def _rate(workers: Workers, calls: list) -> float:
    workers.map(calls[:100])  # they have started
    clock = time.perf_counter()
    workers.map(calls)
    return len(calls) / (time.perf_counter() - clock)


def _watch(peak: list[int], done: threading.Event) -> None:
    """The most resident memory of any child process, in bytes."""
    while not done.wait(0.1):
        for listed in Path("/proc/self/task").glob("*/children"):
            for child in listed.read_text().split():
                with contextlib.suppress(OSError, StopIteration):  # it may be gone
                    lines = Path(f"/proc/{child}/status").read_text().splitlines()
                    used = next(line.split()[1] for line in lines if line.startswith("VmHWM:"))
                    peak[0] = max(peak[0], int(used) * 1024)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    verifier = commands.add_parser("verifier", help="hostile responses, judged by both verifiers")
    verifier.add_argument("--count", type=int, default=10_000, help="hostile responses each")
    verifier.add_argument("--timeout", type=float, default=1.0, help="seconds of one call")
    tasks = commands.add_parser("tasks", help="hostile responses, judged by the other tasks")
    tasks.add_argument("--count", type=int, default=10_000, help="hostile responses")
    kill = commands.add_parser("kill", help="runs that are killed at any moment and go on")
    kill.add_argument("--count", type=int, default=100, help="kills")
    kill.add_argument("--processes", type=int, default=1, help="of each run")
    kill.add_argument("--steps", type=int, default=24, help="of RL, of each run")
    kill.add_argument("--seed", type=int, default=0, help="of the moments")
    commands.add_parser("agreement", help="verifiers and grammars against the tables of answers")
    arguments = parser.parse_args()
    if arguments.command == "agreement":
        print(agreement(), countdown_agreement(), sep="\n\n")
        return 0
    if arguments.command == "kill":
        print(json.dumps(soak_kill(arguments)), flush=True)
        return 0
    if arguments.command == "tasks":
        print(json.dumps(soak_tasks(arguments.count)), flush=True)
        return 0
    for name in VERIFIERS:
        limits = Limits(timeout=arguments.timeout, grace=0.5)
        print(json.dumps(soak_verifier(name, arguments.count, limits)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
