"""Experiment configuration: frozen dataclasses, filled from YAML and `key.sub=value` overrides.

    config = load_config("countdown-tiny", {"rl.steps": 10})

`schema.py` has every field with its type, default, bounds and meaning, `tasks.py` those of the
tasks; `rules.py` the rules across fields; `fields.py` turns plain values into fields and describes
them; `files.py` finds, reads and writes YAML. Every error names the field and the fix.
"""

from deltal_jax.config.fields import describe_fields
from deltal_jax.config.files import (
    config_files,
    config_folder,
    dump_config,
    find_config,
    load_config,
    parse_overrides,
    read_tree,
    shipped_configs,
    shipped_plans,
)
from deltal_jax.config.rules import SCOPED
from deltal_jax.config.schema import (
    AdaptiveConfig,
    Advantage,
    Aggregation,
    CheckpointConfig,
    Config,
    Correction,
    DataConfig,
    EvaluateConfig,
    GuardConfig,
    LoraConfig,
    MeshConfig,
    MetersConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RlConfig,
    RolloutConfig,
    RunConfig,
    ServerConfig,
    SftConfig,
    Surrogate,
    Tracker,
)
from deltal_jax.config.tasks import TaskConfig

__all__ = [
    "SCOPED",
    "AdaptiveConfig",
    "Advantage",
    "Aggregation",
    "CheckpointConfig",
    "Config",
    "Correction",
    "DataConfig",
    "EvaluateConfig",
    "GuardConfig",
    "LoraConfig",
    "MeshConfig",
    "MetersConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "RlConfig",
    "RolloutConfig",
    "RunConfig",
    "ServerConfig",
    "SftConfig",
    "Surrogate",
    "TaskConfig",
    "Tracker",
    "config_files",
    "config_folder",
    "describe_fields",
    "dump_config",
    "find_config",
    "load_config",
    "parse_overrides",
    "read_tree",
    "shipped_configs",
    "shipped_plans",
]
