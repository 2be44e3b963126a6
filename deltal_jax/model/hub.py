"""Where a checkpoint is: a folder, or a repository of the Hugging Face hub."""

import re
from pathlib import Path

from deltal_jax.errors import UserError

#: What is taken of a repository: no other formats of the same weights.
FILES = ["*.json", "*.safetensors", "*.model", "*.jinja"]


def find_checkpoint(path: str, revision: str | None = None) -> Path:
    """The folder of `model.path`: the path itself, or for a hub id (`organization/name`) the copy
    in the hub's cache, fetched if need be at `revision` (branch, tag or commit).

    HF_HOME moves the cache and HF_HUB_OFFLINE=1 forbids to fetch. Raises UserError where there is
    neither a folder nor a repository.
    """
    try:
        folder = Path(path).expanduser()
        found = folder.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # too long, no such user, a NUL
        raise UserError(f"model.path: {path[:60]!r} cannot be a folder: {error}") from error
    if found:
        if revision is not None:
            raise UserError(f"model.revision: {path} is a folder, which has none; set it to null")
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise UserError(f"model.path: no folder {path}, and it is no hub id (organization/name)")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError(
            f"model.path: no folder {path}; to take it from the hub, pip install huggingface_hub"
        ) from error
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=FILES))
    except Exception as error:  # of the network, the hub, the cache: many kinds, one meaning
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"model.path: no folder {path}, and the hub does not give it: {reason}"
        ) from error


def is_here(path: str, revision: str | None = None) -> bool:
    """Whether `find_checkpoint` needs to fetch nothing: a folder, or in the hub's cache."""
    try:
        if Path(path).expanduser().is_dir():
            return True
        from huggingface_hub import snapshot_download

        snapshot_download(path, revision=revision, allow_patterns=FILES, local_files_only=True)
    except Exception:  # of paths, the hub, its cache, or its package that is not there
        return False
    return True


def pinned(path: str, revision: str | None) -> tuple[str, str | None]:
    """The same path and revision so that they mean the same for ever: the absolute path of a
    folder, or the commit that a hub's branch or tag is at now."""
    folder = find_checkpoint(path, revision)
    local = Path(path).expanduser().is_dir()
    return (str(folder.absolute()), None) if local else (path, folder.name)
