"""Where compiled programs are kept."""

from pathlib import Path

import jax
import pytest

from deltal_jax.backend import enable_compile_cache


@pytest.fixture
def restored():
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_the_cache_is_in_the_users_cache_folder(monkeypatch, restored):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere/cache")
    assert enable_compile_cache() == Path("/somewhere/cache/deltal_jax/xla")
    assert jax.config.jax_compilation_cache_dir == "/somewhere/cache/deltal_jax/xla"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert enable_compile_cache() == Path.home() / ".cache" / "deltal_jax" / "xla"


def test_jaxs_own_variable_wins(monkeypatch, restored):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    assert enable_compile_cache() == Path("/elsewhere")
