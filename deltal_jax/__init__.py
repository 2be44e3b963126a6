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
    "segment_means": "objective.aggregation",
    "policy_gradient_loss": "objective.aggregation",
    "prompt_mean": "objective.aggregation",
    "local_token_mean": "objective.aggregation",
    "token_sum": "objective.aggregation",
    "sequence_sum": "objective.aggregation",
    "balanced": "objective.aggregation",
    "inverse_variance": "objective.aggregation",
    "AGGREGATIONS": "objective.aggregation",
    "group_standardize": "objective.advantages",
    "group_center": "objective.advantages",
    "leave_one_out": "objective.advantages",
    "batch_standardize": "objective.advantages",
    "length_weighted_baseline": "objective.advantages",
    "max_rl": "objective.advantages",
    "ADVANTAGES": "objective.advantages",
    "clipped": "objective.surrogate",
    "reinforce": "objective.surrogate",
    "gspo": "objective.surrogate",
    "gspo_token": "objective.surrogate",
    "cispo": "objective.surrogate",
    "gmpo": "objective.surrogate",
    "sapo": "objective.surrogate",
    "dppo": "objective.surrogate",
    "SURROGATES": "objective.surrogate",
    "kl_k1": "objective.divergence",
    "kl_k2": "objective.divergence",
    "kl_k3": "objective.divergence",
    "kl_k3_straight_through": "objective.divergence",
    "entropy": "objective.divergence",
    "DIVERGENCES": "objective.divergence",
    "token_truncate": "objective.correction",
    "token_mask": "objective.correction",
    "sequence_mask": "objective.correction",
    "CORRECTIONS": "objective.correction",
    "token_logprobs": "objective.logprobs",
    "chunked_logprobs": "objective.logprobs",
    "aggregation_diagnostics": "objective.diagnostics",
    "Reward": "tasks.grading",
    "TrainResult": "training.loop",
    "TrainingError": "training.run",
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
