"""Reinforcement learning with verifiable rewards for language models, with ΔL Normalization, in
JAX.

    import deltal_jax
    result = deltal_jax.train("countdown-tiny", overrides={"rl.steps": 20})

    weights = deltal_jax.delta_l(lengths, alpha=1.0, normalizer=8192)

Names are imported on first use, so that the command line starts at once.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "delta_l": "objective.aggregation",
    "constant_length": "objective.aggregation",
    "sequence_mean": "objective.aggregation",
    "token_mean": "objective.aggregation",
    "segment_sums": "objective.aggregation",
    "policy_gradient_loss": "objective.aggregation",
    "AGGREGATIONS": "objective.aggregation",
    "group_standardize": "objective.advantages",
    "group_center": "objective.advantages",
    "ADVANTAGES": "objective.advantages",
    "clipped": "objective.surrogate",
    "reinforce": "objective.surrogate",
    "SURROGATES": "objective.surrogate",
    "aggregation_diagnostics": "objective.diagnostics",
    "Reward": "tasks.grading",
    "TrainResult": "training.loop",
    "TrainingError": "training.loop",
    "UserError": "errors",
    "train": "training.loop",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return ["__version__", *_HOME]
