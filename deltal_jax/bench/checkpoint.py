"""Saving a state while training goes on, against a plain write of the same bytes to the disk."""

import gc
import os
import statistics
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deltal_jax.checkpoints.manifest import Position
from deltal_jax.checkpoints.reader import SavedSteps, abstract_state
from deltal_jax.checkpoints.store import Checkpoints
from deltal_jax.errors import UserError
from deltal_jax.types import TrainState

#: Arrays of parameters and of two moments, each of so many rows and columns: 1 GB in float32.
LAYERS, ROWS, COLUMNS = 8, 10_417, 1000
#: Bytes of one plain write.
CHUNK = 2**24


def benchmark_checkpoint(
    rounds: int, folder: str | None = None, rows: int = ROWS
) -> dict[str, Any]:
    """Every figure of `deltal bench checkpoint`; files go to `folder`, else where temporary files
    go, and are removed at the end.

    Each round writes the bytes of the state plainly, with one fsync, and then saves it. `stall` is
    what the loop loses: the seconds that `save` takes, with those by which the first update after
    it, which takes over the memory of the state, is slower than one without a save. `background`
    is from the return of `save` until the checkpoint exists, `restore` a restore whose files are
    all verified.
    """
    try:
        with tempfile.TemporaryDirectory(dir=folder) as name:
            return _measure(rounds, Path(name), rows)
    except OSError as error:
        raise UserError(f"--folder: {error}") from error


def _measure(rounds: int, folder: Path, rows: int) -> dict[str, Any]:
    update = jax.jit(
        lambda state: jax.tree.map(lambda x: x * 0.999 if x.ndim else x, state), donate_argnums=0
    )
    state = _state(rows)
    content = np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(state.params)])
    size = sum(x.nbytes for x in jax.tree.leaves((state.params, state.opt_state)))
    found: dict[str, list[float]] = {}

    def note(name: str, started: float) -> float:
        seconds = time.perf_counter() - started
        found.setdefault(name, []).append(seconds)
        return seconds

    with closing(Checkpoints(folder / "checkpoints")) as checkpoints:
        for number in range(rounds + 1):  # the first round compiles, and finds the memory
            state = jax.block_until_ready(update(state))
            started = time.perf_counter()
            state = jax.block_until_ready(update(state))
            alone = note("update", started)
            started = time.perf_counter()
            plain_write(folder / "plain", content, size)
            plain = note("plain write", started)
            (folder / "plain").unlink()
            os.sync()
            started = time.perf_counter()
            checkpoints.save(number, state, Position("rl", number, 0, 0))
            blocked = note("save", started)
            started = returned = time.perf_counter()
            state = jax.block_until_ready(update(state))
            stall = blocked + max(0.0, note("update after it", started) - alone)
            checkpoints.wait()
            note("background", returned)
            found.setdefault("stall", []).append(stall)
            found.setdefault("stall over plain write", []).append(stall / plain)
            started = time.perf_counter()
            like = abstract_state(lambda state=state: state)
            restored = SavedSteps(folder / "checkpoints").read_state(number, like)
            jax.block_until_ready(restored)
            note("restore", started)
            del restored
            gc.collect()
    figures = {"state": {"bytes": size}}
    return figures | {
        name: statistics.median(seconds[1:])
        if name.count("over")
        else {"wall_s": statistics.median(seconds[1:]), "first_s": seconds[0]}
        for name, seconds in found.items()
    }


def _state(rows: int) -> TrainState:
    """Random parameters and moments: three arrays of the same shape for each layer."""
    rng = np.random.default_rng(0)

    def arrays() -> dict[str, jax.Array]:
        shape = (rows, COLUMNS)
        return {
            f"layer_{i}": jnp.asarray(rng.standard_normal(shape, np.float32)) for i in range(LAYERS)
        }

    key = jax.random.key(0, impl="threefry2x32")
    return TrainState(arrays(), {"mu": arrays(), "nu": arrays()}, jnp.asarray(0), key)


def plain_write(path: Path, content: np.ndarray, size: int) -> None:
    """Write `size` bytes, the content again and again, and have them on the disk."""
    view = content.view(np.uint8).data
    with open(path, "wb", buffering=0) as file:
        while size:
            count = min(size, len(view))
            for start in range(0, count, CHUNK):
                file.write(view[start : min(start + CHUNK, count)])
            size -= count
        os.fsync(file.fileno())
