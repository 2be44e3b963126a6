"""Long checks that the suite has in small: `scripts/soak verifier` and `scripts/soak agreement`."""

import argparse
import collections
import contextlib
import json
import resource
import sys
import tempfile
import threading
import time
from pathlib import Path

from deltal_jax.tasks.math_rules import WARM_UP, judge
from deltal_jax.tasks.workers import Limits, Workers
from tests.countdown_answers import agreement as countdown_agreement
from tests.hostile import GOLD, hostile
from tests.math_answers import VERIFIERS, agreement

MAX_RESPONSE = 4000


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
        verdicts: collections.Counter = collections.Counter()
        wrong_good, batch = 0, []

        def judge_batch() -> None:
            nonlocal wrong_good
            futures = [(kind, workers.submit(*call)) for kind, call in batch]
            for kind, future in futures:
                outcome = future.result()
                verdict = outcome.value[0] if outcome.status == "done" else outcome.status
                if kind == "good":
                    wrong_good += verdict != "correct"
                    continue
                verdicts[verdict] += 1
                if verdict == "correct":
                    raise AssertionError(f"a hostile response was called right: {outcome}")

        for number, response in enumerate(hostile(0, count, canary)):
            batch.append(("hostile", (verifier, response[-MAX_RESPONSE:], GOLD)))
            batch.append(("good", good))
            if len(batch) >= 64 or number == count - 1:
                clock = time.perf_counter()
                judge_batch()
                slowest = max(slowest, time.perf_counter() - clock)
                batch.clear()
        seconds = time.perf_counter() - started
        after = _rate(workers, [(*good[:1], f"so \\boxed{{{-n}}}", GOLD) for n in range(1, 1001)])
        done.set()
        watcher.join()
        if canary.exists():
            raise AssertionError("a response was executed")
        if wrong_good:
            raise AssertionError(f"{wrong_good} good responses beside hostile ones were not right")
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


def _rate(workers: Workers, calls: list) -> float:
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
    commands.add_parser("agreement", help="verifiers and grammars against the tables of answers")
    arguments = parser.parse_args()
    if arguments.command == "agreement":
        print(agreement(), countdown_agreement(), sep="\n\n")
        return 0
    for name in VERIFIERS:
        limits = Limits(timeout=arguments.timeout, grace=0.5)
        print(json.dumps(soak_verifier(name, arguments.count, limits)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
