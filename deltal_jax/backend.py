"""How JAX is set up before anything compiles."""

import os
from pathlib import Path

import jax


def enable_compile_cache() -> Path:
    """Keep compiled programs in the user's cache folder, so that a second run starts at once.

    `JAX_COMPILATION_CACHE_DIR` moves it.
    """
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or Path(home) / "deltal_jax" / "xla")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    return folder
