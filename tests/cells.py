"""Cells of a comparison with a known true effect, as the runner writes them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

STEPS, EVERY, PROBLEMS, K = 20, 5, 40, 8


def make_cell(
    method: str,
    seed: int,
    effect: float = 0.0,
    *,
    world: int = 0,
    scale: float = 0.02,
    coefficients: float = 0.0,
    stream: str | None = None,
) -> dict[str, Any]:
    """A run whose accuracy rises from 0.3 by 0.3, and by `effect` more, plus its seed's luck.

    `world` is another draw of everything, `scale` the standard deviation of luck between methods,
    `coefficients` the exponent α of its weights L^-α. `stream` names the draws of the method: two
    methods of one stream and effect are the same run.
    """
    shared = np.random.default_rng((world, seed))
    own = np.random.default_rng((world, seed, *(stream or method).encode()))
    problems = np.random.default_rng((world, 99)).normal(0, 0.15, PROBLEMS)
    luck = shared.normal(0, scale) + own.normal(0, scale)
    evaluations, tokens = [], 0
    lengths = shared.integers(20, 200, 16)
    for step in range(0, STEPS + 1, EVERY):
        rise = step / STEPS
        p = np.clip(0.3 + rise * (0.3 + effect + luck) + problems, 0, 1)
        draws = shared if step == 0 else own  # before the first update all methods are one
        correct = draws.binomial(K, p)
        evaluations.append(
            {
                "step": step,
                "updates": step,
                "tokens": tokens,
                "seconds": step * 2.0,
                "avg_at_k": float(correct.mean() / K),
                "pass_at_k": float((correct > 0).mean()),
                "length": 100.0,
                "length_right": 80.0,
                "length_wrong": 120.0,
                "truncated_frac": 0.1,
                "correct": correct.tolist(),
            }
        )
        tokens += 5000 + int(own.integers(500))
    steps = np.arange(1, STEPS + 1)
    reward = np.round(0.3 + steps / STEPS * 0.3 + own.normal(0, 0.02, STEPS), 4)
    reward[0] = 0.3
    return {
        "format": 1,
        "method": method,
        "seed": seed,
        "warmup": seed % 2,
        "fingerprint": "",
        "set": {},
        "k": K,
        "problems": PROBLEMS,
        "evaluations": evaluations,
        "train": {
            "reward/mean": reward.tolist(),
            "length/mean": (100 - steps).tolist(),
            "length/correct_mean": [None, *(80 - steps[1:]).tolist()],
            "length/wrong_mean": (120 - steps).tolist(),
            "length/truncated_frac": (0.1 + 0 * steps).tolist(),
            "length/p5": (10 + 0 * steps).tolist(),
            "length/p95": (250 + steps).tolist(),
        },
        "first_batch": {
            "lengths": lengths.tolist(),
            "weights": (lengths ** -float(coefficients)).tolist(),
            "advantages": np.where(np.arange(16) % 2, -1.0, 1.0).tolist(),
        },
        "seconds": 40.0,
        "cpu_seconds": 60.0,
        "environment": {"jax": "0", "python": "3", "machine": "none"},
    }


def make_plan(
    methods: dict[str, Any], seeds: list[int], controls: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A resolved plan; the first method is the reference."""
    return {
        "experiment": "none",
        "set": {},
        "seeds": seeds,
        "warmups": 2,
        "reference": next(iter(methods)),
        "methods": methods,
        "controls": controls or {},
    }


def write_cells(
    folder: Path, plan: dict[str, Any], cells: dict[str, dict[int, dict[str, Any]]]
) -> Path:
    """The folder that a comparison leaves."""
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False), encoding="utf-8")
    for method, runs in cells.items():
        below = folder / "cells" / method
        below.mkdir(parents=True)
        for seed, cell in runs.items():
            (below / f"seed-{seed}.json").write_text(json.dumps(cell), encoding="utf-8")
    return folder
