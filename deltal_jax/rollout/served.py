"""Which weights a server samples from, and how it gets new ones."""

import functools
import re
import shutil
import threading
import uuid
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from deltal_jax.errors import UserError
from deltal_jax.rollout.client import Client
from deltal_jax.rollout.dialects import Speech

#: Bytes that the answer may have.
ANSWER_BYTES = 2**20
#: Folders of weights; nothing else is called so.
FOLDER = re.compile(r"weights-[0-9a-f]{32}")


class ServedWeights:
    """What one server has been told to serve. Holds no parameter, so donation stays free."""

    def __init__(self) -> None:
        #: A rollout holds it to its end, or another's parameters would be served half way.
        self.lock = threading.Lock()
        #: Of the weights that were written last, new each time.
        self.version = ""
        self._path = Path()
        self._served = False
        self._leaves: list[weakref.ref[Any]] = []

    def update(
        self,
        client: Client,
        speech: Speech,
        params: Any,
        write: Callable[[Path, Any], None],
        folder: Path,
    ) -> None:
        """Have the server load `params`, unless it has: a new folder beneath `folder`, in which
        older ones are removed afterwards. One that does not say which weights it samples from
        is told each time: it may have started anew since.

        Raises UserError where the server does not take them.
        """
        if not self._are(params):
            self._served, self._leaves = False, []
            self.version = uuid.uuid4().hex
            self._path = folder / f"weights-{self.version}"
            try:
                write(self._path, params)
            except OSError as error:
                raise UserError(
                    f"rollout.server.weights_dir: cannot write {self._path}: {error.strerror}"
                ) from error
            self._leaves = [weakref.ref(leaf) for leaf in jax.tree.leaves(params)]
        if self._served and speech.says_version:
            return
        path, body = speech.update(self._path, self.version)
        try:
            client.post(path, body, limit=ANSWER_BYTES)
        except UserError as error:
            raise UserError(f"{error}; for new weights {speech.update_fix}") from error
        self._served = True
        for other in self._path.parent.iterdir():  # the newest stays: it may be looked at again
            if FOLDER.fullmatch(other.name) and other != self._path:
                shutil.rmtree(other, ignore_errors=True)

    def lost(self) -> None:
        """The server may have started anew with other weights."""
        self._served = False

    def _are(self, params: Any) -> bool:
        """Whether these very arrays were written last; copies of them count as new."""
        leaves = jax.tree.leaves(params)
        return len(leaves) == len(self._leaves) and all(
            ref() is leaf for ref, leaf in zip(self._leaves, leaves, strict=True)
        )


@functools.cache
def weights_of(url: str) -> ServedWeights:
    """The one of a server, for all engines of this process that speak to it."""
    del url
    return ServedWeights()
