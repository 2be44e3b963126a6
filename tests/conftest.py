"""A strict JAX for the whole suite: eight virtual devices, checked shapes, no rank promotion."""

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    )
).strip()

# Both workers, and the next run, share what was compiled.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "xla")
)

import hypothesis
import jax
from jaxtyping import install_import_hook

from deltal_jax.backend import enable_compile_cache

install_import_hook(["deltal_jax.objective", "deltal_jax.model"], "beartype.beartype")
enable_compile_cache()
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("suite")
