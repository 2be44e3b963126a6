"""What cells start from: warm-up checkpoints that are made once, runs, or a pretrained model."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np

from deltal_jax.checkpoints.manifest import NAME
from deltal_jax.checkpoints.reader import SavedSteps
from deltal_jax.compare.plan import Plan, chosen
from deltal_jax.config import Config
from deltal_jax.errors import UserError
from deltal_jax.model import huggingface
from deltal_jax.model.tensor_files import fingerprint, read_object
from deltal_jax.training import run_folder
from deltal_jax.training.setup import (
    Setup,
    exported_files,
    find_base,
    init_params,
    load_checkpoint,
    make_update,
)
from deltal_jax.training.sft import demonstration_batches
from deltal_jax.training.trained import load_trained, root_key

#: In the folder of a warm-up: what it was made by.
FACTS = "warmup.json"
#: Where something lies, which is known by what it holds.
PLACES = ("model.path", "model.revision")
#: Steps between two looks at how it goes.
LOOK = 100


def identity(setup: Setup, plan: Plan, number: int) -> str:
    """What decides the parameters of a warm-up, as a hash; a warm-up need not exist for it."""
    config = setup.config
    if isinstance(plan.warmups, tuple):
        return digest(_newest(Path(plan.warmups[number]))[1])
    facts: dict[str, Any] = {"base": None}
    if config.model.path is not None:
        facts["base"] = fingerprint(find_base(setup))
    if plan.warmups:
        facts |= {"number": number, "config": deciding(config)}
    return digest(facts)


def deciding(config: Config) -> dict[str, Any]:
    """The fields that a warm-up depends on."""
    kept = {
        name: value
        for name, value in chosen(config).items()
        if name.startswith(("task.", "data.", "model.", "sft.")) and name not in PLACES
    }
    return kept | {"edges": config.bucket_edges}


def digest(facts: Any) -> str:
    """A hash of plain JSON, the same for ever."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def load_warmup(setup: Setup, plan: Plan, number: int, folder: Path) -> Any:
    """The parameters that a cell starts from, in the host's memory; `folder` is the warm-up's own.

    Raises UserError where it was made by another plan, or a run has another model.
    """
    if isinstance(plan.warmups, tuple):
        return _of_run(setup, Path(plan.warmups[number]))
    if not plan.warmups:
        # Fresh adapters, where the config has some, are the same for all cells.
        return _host(init_params(setup, jax.random.split(root_key(0))[0]))
    check_warmup(folder, identity(setup, plan, number))
    own = dataclasses.replace(setup.config.model, path=str(folder.resolve()), revision=None)
    described = huggingface.read_config(folder)
    there = dataclasses.replace(
        setup,
        config=dataclasses.replace(setup.config, model=own),
        checkpoint_config=described,
        base_fingerprint=None,
    )
    try:
        return _host(load_checkpoint(there))
    except UserError as error:
        raise UserError(
            f"warmups: {folder} is damaged ({error}); delete it, and it is made again"
        ) from error


def check_warmup(folder: Path, wanted: str) -> None:
    """Raises UserError where a warm-up was made by other fields than the plan has."""
    if read_object(folder / FACTS).get("fingerprint") != wanted:
        raise UserError(
            f"warmups: {folder} was made by another plan; choose another --to, or delete it"
        )


def make_warmup(
    setup: Setup, plan: Plan, number: int, folder: Path, show: Callable[[int, float], None]
) -> None:
    """Warm up a model, whose parameters and demonstrations are those of a run with this number as
    its seed, and keep it as a Hugging Face folder, as a whole or not at all. `show` is told the
    step and the loss now and then.

    Raises UserError where the loss is not finite in the end.
    """
    config = dataclasses.replace(setup.config, seed=number)
    setup = dataclasses.replace(setup, config=config)
    update, steps = make_update(setup, "sft"), config.sft.steps
    init_key, run_key = jax.random.split(root_key(number))
    state = update.init(init_params(setup, init_key), run_key, donate=True)
    batches = demonstration_batches(config, setup.task, setup.tokenizer, update.row_multiple)
    loss = 0.0
    for step, batch in enumerate(islice(batches, steps), start=1):
        state, metrics = update.single(state, update.place(batch))
        if step % LOOK == 0 or step == steps:
            loss = float(metrics["loss"])
            show(step, loss)
    if not np.isfinite(loss):
        raise UserError(f"sft: the loss of warm-up {number} is {loss}; lower sft's learning rate")
    shutil.rmtree(folder, ignore_errors=True)
    facts = {"fingerprint": identity(setup, plan, number), "loss": loss}
    huggingface.export(
        folder,
        state.params,
        setup.architecture,
        config=setup.checkpoint_config,
        files=exported_files(setup) | {FACTS: (json.dumps(facts) + "\n").encode()},
        dtype=config.model.param_dtype,
    )


def _newest(folder: Path) -> tuple[int, dict[str, Any]]:
    """The newest intact checkpoint of a run, and what is in it."""
    try:
        config = run_folder.load_run_config(folder)
    except UserError as error:
        raise UserError(f"warmups: {error}") from error
    saved = SavedSteps(run_folder.checkpoints_folder(folder, config))
    number, _ = saved.newest_intact()
    if number is None:
        raise UserError(f"warmups: {folder} has no checkpoint yet")
    manifest = json.loads((saved.path(number) / NAME).read_text())
    return number, {name: manifest[name] for name in ("arrays", "files", "position")}


def _of_run(setup: Setup, folder: Path) -> Any:
    trained = load_trained(folder, {})
    ours, theirs = setup.architecture, trained.setup.architecture
    same = dataclasses.replace(
        theirs, remat=ours.remat, compute_dtype=ours.compute_dtype, attention=ours.attention
    )
    if same != ours or trained.setup.tokenizer.files() != setup.tokenizer.files():
        raise UserError(f"warmups: {folder} holds another model or tokenizer than the experiment")
    return _host(trained.params)


def _host(params: Any) -> Any:
    return jax.tree.map(np.asarray, params)
