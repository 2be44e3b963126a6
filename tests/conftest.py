"""A strict JAX for the whole suite: eight virtual devices, checked shapes, no rank promotion."""

import functools
import os
from pathlib import Path

from tests.processes import QUICK

os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling is most of the suite's time. Flags that were set before win, so that one run may test
# what users run:
# XLA_FLAGS="--xla_backend_optimization_level=3 --xla_cpu_use_fusion_emitters=true".
os.environ["XLA_FLAGS"] = " ".join(
    (
        QUICK,
        "--xla_force_host_platform_device_count=8",
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
        os.environ.get("XLA_FLAGS", ""),
    )
).strip()

# Both workers, and the next run, share what was compiled.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "xla")
)

import hypothesis
import jax
import pytest
from jaxtyping import install_import_hook

from deltal_jax.backend import enable_compile_cache

install_import_hook(["deltal_jax.objective", "deltal_jax.model"], "beartype.beartype")
enable_compile_cache()
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("suite")


@pytest.fixture(scope="session")
def listening():
    """A server that samples; what it has compiled serves all tests."""
    from tests import served
    from tests.completions_server import serving

    server = served.make_server()
    with serving(server):
        yield server


@pytest.fixture
def server(listening):
    """The server: well behaved, with other weights than any test's, unknown to engines."""
    from deltal_jax.rollout.served import weights_of

    weights_of.cache_clear()
    listening.start_anew()
    return listening


@pytest.fixture
def make(server, tmp_path):
    """Makes engines that sample by the server."""
    from tests import served

    return functools.partial(served.http_engine, server.url, tmp_path / "served")
