"""Verdicts on mathematical answers a second, through the worker processes that training uses, and
how much of them sampling hides."""

import dataclasses
import os
import random
import statistics
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax

from deltal_jax.bench.measure import Timing, ratio
from deltal_jax.config import load_config
from deltal_jax.tasks.base import Verdict
from deltal_jax.tasks.countdown.trace import CountDown
from deltal_jax.tasks.math.rules import WARM_UP, judge
from deltal_jax.tasks.workers import Outcome, Workers
from deltal_jax.training.collect import RolloutStream
from deltal_jax.training.setup import init_params, make_engine, make_setup

WORKERS = 2
PROBLEMS, SAMPLES = 128, 8
FUNCTION = f"{judge.__module__}:{judge.__name__}"
#: What is sampled where sampling and grading overlap: 512 responses a step, of 30 tokens or so.
SAMPLED: dict[str, Any] = {
    "model.d_model": 128,
    "model.d_ff": 512,
    "rollout.slots": 32,
    "rl.prompts_per_step": 64,
}


def benchmark_grading(rounds: int) -> dict[str, Any]:
    """Every figure of `deltal bench grading`.

    `all different`: no two answers are alike, so that nothing is remembered; `groups`: 8 responses
    to a problem, half of them right, as training sees them. Medians of the rounds, each of other
    numbers, by the clock and by the CPU time of the workers, who have started before.
    """
    figures: dict[str, Any] = {"load": {"calls": PROBLEMS * SAMPLES, "workers": WORKERS}}
    for verifier in ("reference", "math_verify"):
        with _workers(verifier) as workers:
            figures[verifier] = {}
            for name, groups in (("all different", False), ("groups", True)):
                rates = [_rates(workers, verifier, seed, groups) for seed in range(rounds)]
                wall, cpu = (statistics.median(of) for of in zip(*rates, strict=True))
                figures[verifier] |= {
                    f"{name}, a second": wall,
                    f"{name}, a second of both CPUs": cpu,
                }
        figures[verifier]["missing"] = workers.counts.total() - workers.counts["done"]
    figures["overlap"] = benchmark_overlap(rounds)
    return figures


def benchmark_overlap(rounds: int) -> dict[str, float]:
    """Rollout batches, sampled by the engine and judged by math-verify: after sampling, and while
    others are sampled. The sides take turns; seconds are medians, of ratios a round."""
    with _workers("math_verify") as after, _workers("math_verify") as early:
        sides = {"after": _Side(_Judged(after)), "early": _Side(_JudgedEarly(early))}
        for step in range(rounds + 1):
            for side in sides.values():
                side.step(step)
    plain, listened = sides["after"], sides["early"]
    return {
        "responses": float(plain.responses),
        "step, s": plain.timing.summary()["wall_s"],
        "step with overlap, s": listened.timing.summary()["wall_s"],
        "step with over without": ratio(listened.timing, plain.timing),
        "waiting for verdicts, s": plain.median("time/reward"),
        "waiting with overlap, s": listened.median("time/reward"),
        "sampling, s": plain.median("time/rollout"),
        "sampling with overlap, s": listened.median("time/rollout"),
        "verdicts there before": listened.median("overlap/verdicts_early"),
    }


class _Judged(CountDown):
    """Its prompts; the verdict is math-verify's on an answer of the load that the response draws,
    as an untrained model writes none."""

    def __init__(self, workers: Workers):
        super().__init__()
        self._workers = workers

    def _begin(self, response: str, answer: Any) -> Future[Verdict]:
        pairs = load(zlib.crc32(str(answer).encode()), groups=False, count=16)
        said, gold = pairs[zlib.crc32(response.encode()) % len(pairs)]
        return self._workers.submit("math_verify", said, gold, then=_verdict)

    def verify_batch(self, pairs: Sequence[tuple[str, Any]]) -> list[Verdict]:
        return [future.result() for future in [self._begin(*pair) for pair in pairs]]


class _JudgedEarly(_Judged):
    def submit(self, response: str, answer: Any) -> Future[Verdict]:
        return self._begin(response, answer)


class _Side:
    """Batches of one task."""

    def __init__(self, task: _Judged):
        setup = dataclasses.replace(make_setup(load_config("countdown-tiny", SAMPLED)), task=task)
        engine = make_engine(setup, temperature=1.0, training=True)
        key = jax.random.key(0, impl="threefry2x32")
        self._stream, self._params = RolloutStream(setup, engine, key), init_params(setup, key)
        self._metrics: list[dict[str, float]] = []
        self.timing, self.responses = Timing(), 0

    def step(self, number: int) -> None:
        """Sample and judge a batch; the first one compiles, and is not counted."""
        timing = self.timing if number else Timing()
        timing.call(lambda: self._sample(number))

    def _sample(self, number: int) -> None:
        batch = self._stream.next(self._params, number)
        self.responses = len(batch.rewards)
        self._metrics.append(batch.metrics)

    def median(self, name: str) -> float:
        """Of a metric, over what is counted."""
        return statistics.median(metrics[name] for metrics in self._metrics[1:])


def _verdict(outcome: Outcome) -> Verdict:
    correct = outcome.status == "done" and outcome.value[0] == "correct"
    return Verdict(float(correct), correct, "")


def _workers(verifier: str) -> Workers:
    """They have started."""
    workers = Workers(FUNCTION, WORKERS, warm_up=[(verifier, *call) for call in WARM_UP])
    workers.map([(verifier, *WARM_UP[0])] * 4 * WORKERS)
    return workers


def _rates(workers: Workers, verifier: str, seed: int, groups: bool) -> tuple[float, float]:
    """Verdicts a second, and a second of CPU time of each worker."""
    calls = [(verifier, *pair) for pair in load(seed, groups)]
    cpu, started = _children_seconds(), time.perf_counter()
    workers.map(calls)
    seconds, used = time.perf_counter() - started, _children_seconds() - cpu
    return len(calls) / seconds, WORKERS * len(calls) / max(used, 1e-9)


def _children_seconds() -> float:
    """CPU seconds of the processes that this one has started; 0 where nobody says."""
    ticks = 0
    for listed in Path("/proc/self/task").glob("*/children"):
        for child in listed.read_text().split():
            fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def load(seed: int, groups: bool, count: int = PROBLEMS * SAMPLES) -> list[tuple[str, str]]:
    """(response, known answer) pairs: of twenty answers twelve are whole numbers, four fractions,
    two radicals, one a polynomial and one a pair."""
    rng, pairs = random.Random(f"grading/{seed}/{groups}"), []
    while len(pairs) < count:
        gold, others = _problem(rng)
        if not groups:
            pairs.append((_response(rng.choice(others)), gold))
            continue
        drawn = [rng.choice([gold, rng.choice(others)]) for _ in range(SAMPLES)]
        pairs += [(_response(answer), gold) for answer in drawn]
    return pairs


def _response(answer: str) -> str:
    return f"{'We add the two and simplify. ' * 60}So the answer is $\\boxed{{{answer}}}$."


def _problem(rng: random.Random) -> tuple[str, list[str]]:
    """A known answer, and others: the same in another form, and wrong ones."""
    a, b, c = rng.randint(2, 99_999), rng.randint(2, 99_999), rng.randint(2, 9)
    kind = rng.randrange(20)
    if kind < 12:
        return f"{a}", [f"{a}.0", f"{a + c}", f"{b}"]
    if kind < 16:
        return f"\\frac{{{a}}}{{{b}}}", [f"\\frac{{{a * c}}}{{{b * c}}}", f"\\frac{{{b}}}{{{a}}}"]
    if kind < 18:
        return f"{c}\\sqrt{{{a}}}", [f"\\sqrt{{{c * c * a}}}", f"{c}\\sqrt{{{a + 1}}}"]
    if kind == 18:
        return f"{a}x^2+{b}x", [f"x({a}x+{b})", f"{b}x^2+{a}x"]
    return f"({a},{b})", [f"({a}, {b}.0)", f"({b},{a})"]
