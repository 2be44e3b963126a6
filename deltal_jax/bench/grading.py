"""Verdicts on mathematical answers a second, through the worker processes that training uses."""

import random
import time
from typing import Any

from deltal_jax.tasks.math_rules import WARM_UP, judge
from deltal_jax.tasks.workers import Workers

WORKERS = 2
PROBLEMS, SAMPLES = 128, 8


def benchmark_grading(rounds: int) -> dict[str, Any]:
    """Every figure of `deltal bench grading`.

    `all different`: no two answers are alike, so that nothing is remembered; `groups`: 8 responses
    to a problem, half of them right, as training sees them. The best of the rounds, each of other
    numbers; the workers have started before.
    """
    figures: dict[str, Any] = {"load": {"calls": PROBLEMS * SAMPLES, "workers": WORKERS}}
    function = f"{judge.__module__}:{judge.__name__}"
    for verifier in ("reference", "math_verify"):
        warm_up = [(verifier, *call) for call in WARM_UP]
        with Workers(function, WORKERS, warm_up=warm_up) as workers:
            workers.map([warm_up[0]] * 4 * WORKERS)
            figures[verifier] = {
                f"{name}, a second": max(_rate(workers, verifier, n, groups) for n in range(rounds))
                for name, groups in (("all different", False), ("groups", True))
            }
        figures[verifier]["missing"] = workers.counts.total() - workers.counts["done"]
    return figures


def _rate(workers: Workers, verifier: str, seed: int, groups: bool) -> float:
    calls = [(verifier, *pair) for pair in load(seed, groups)]
    started = time.perf_counter()
    workers.map(calls)
    return len(calls) / (time.perf_counter() - started)


def load(seed: int, groups: bool) -> list[tuple[str, str]]:
    """(response, known answer) pairs: of twenty answers twelve are whole numbers, four fractions,
    two radicals, one a polynomial and one a pair."""
    rng, pairs = random.Random(f"grading/{seed}/{groups}"), []
    while len(pairs) < PROBLEMS * SAMPLES:
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
