"""The plan's methods at the checkpoints that all cells start from: along the cells' own paths they
would be measured at different parameters."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from deltal_jax.compare.cells import decides
from deltal_jax.compare.plan import Plan
from deltal_jax.compare.warmups import digest
from deltal_jax.laboratory.measure import Settings, measure
from deltal_jax.training.opening import data_fingerprint
from deltal_jax.training.setup import Setup
from deltal_jax.training.trained import root_key

#: The folder of the measurements.
FROZEN = "frozen"
#: Of a measurement's file. Raise it when the same fields would give another result.
FORMAT = 1


def frozen_path(folder: Path, number: int) -> Path:
    """Where the measurement of a warm-up lies in a comparison's folder."""
    return folder / FROZEN / f"warmup-{number}.json"


def frozen_fingerprint(setup: Setup, plan: Plan, warmup: str) -> str:
    """A hash of all that decides a measurement; `warmup` is the identity of the checkpoint."""
    methods = [method for method in plan.methods if not method.control]
    facts = {
        "format": FORMAT,
        "groups": plan.frozen,
        "shared": decides(plan.config(plan.method(plan.reference))),
        "methods": {m.name: [decides(plan.config(m)), m.permuted] for m in methods},
        "data": data_fingerprint(setup.task),
        "warmup": warmup,
    }
    return digest(facts)


def measure_frozen(setup: Setup, plan: Plan, number: int, start: Any, known: str) -> dict[str, Any]:
    """What the laboratory says of the parameters `start`, and of each method there, with one batch
    of responses for all: sampled and graded as the plan's reference asks. Returns the content of
    its file; `known` is its fingerprint."""
    methods = [method for method in plan.methods if not method.control]
    found = measure(
        dataclasses.replace(setup, config=plan.config(plan.method(plan.reference))),
        jax.tree.map(jnp.asarray, start),
        root_key(number),
        settings=Settings(groups=plan.frozen, exponents=False),
        configs={m.name: plan.config(m) for m in methods if not m.permuted},
    )
    rows = {row["name"]: row for row in found["methods"]}
    for method in methods:
        if method.permuted:
            rows[method.name] = {"name": method.name, "reason": "its weights are permuted"}
    found["methods"] = [rows[method.name] for method in methods]
    return {"format": FORMAT, "warmup": number, "fingerprint": known, **found}
