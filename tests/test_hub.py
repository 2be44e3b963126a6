"""A checkpoint is a folder, or a copy in the hub's cache."""

import builtins

import huggingface_hub.constants
import pytest

from deltal_jax.errors import UserError
from deltal_jax.model.hub import find_checkpoint, is_here, pinned
from deltal_jax.model.huggingface import read_config
from tests import fakes

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The hub's own cache with one repository in it, and no way to fetch more."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--some--model-1.5B"
    fakes.write_checkpoint(repository / "snapshots" / COMMIT, fakes.CONFIGS["qwen2"])
    (repository / "refs").mkdir()
    for name in ("main", "v1"):
        (repository / "refs" / name).write_text(COMMIT)
    return tmp_path


def test_a_folder_is_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_checkpoint(str(tmp_path)) == tmp_path
    assert find_checkpoint("~") == tmp_path
    with pytest.raises(UserError, match=r"model\.revision: .* is a folder, which has none"):
        find_checkpoint(str(tmp_path), "main")


@pytest.mark.parametrize("revision", [None, "main", "v1", COMMIT])
def test_a_hub_id_is_found_in_the_cache_at_its_revision(cache, revision):
    found = find_checkpoint("some/model-1.5B", revision)
    assert found.name == COMMIT and read_config(found) == fakes.CONFIGS["qwen2"]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("no/such-model", r"model\.path: no folder no/such-model, and the hub does not give it: "),
        ("/no/such/folder", r"no folder /no/such/folder, and it is no hub id"),
        ("plain", r"no folder plain, and it is no hub id \(organization/name\)"),
    ],
)
def test_what_is_nowhere_is_named_in_one_line(cache, path, said):
    with pytest.raises(UserError, match=said) as caught:
        find_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_a_revision_that_is_not_there_is_refused(cache):
    with pytest.raises(UserError, match="the hub does not give it"):
        find_checkpoint("some/model-1.5B", "v2")


def test_without_the_hubs_package_the_line_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def absent(name, *arguments, **options):
        if name == "huggingface_hub":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        find_checkpoint("some/model")


def test_pinned_means_the_same_for_ever(cache, tmp_path, monkeypatch):
    assert pinned("some/model-1.5B", "v1") == ("some/model-1.5B", COMMIT)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert pinned("here", None) == (str(tmp_path / "here"), None)


@pytest.mark.parametrize("path", ["x" * 300, "~nobody-of-that-name/x", "a\0b"])
def test_what_can_be_no_path_is_refused_in_one_line(path):
    said = r"model\.path: .* cannot be a folder|it is no hub id"
    with pytest.raises(UserError, match=said) as caught:
        find_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_what_is_here_needs_no_fetching(cache, tmp_path):
    assert (
        is_here(str(tmp_path)) and is_here("some/model-1.5B") and is_here("some/model-1.5B", "v1")
    )
    assert (
        not is_here("some/model-1.5B", "v2") and not is_here("some/other") and not is_here("a\0b")
    )
