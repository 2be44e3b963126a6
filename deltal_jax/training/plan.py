"""What a run would be, before what it needs is there."""

import dataclasses

from jax.sharding import AbstractMesh, Mesh

from deltal_jax.config import Config, MeshConfig
from deltal_jax.errors import UserError
from deltal_jax.model import huggingface
from deltal_jax.model.architecture import Architecture
from deltal_jax.model.hub import find_checkpoint, is_here
from deltal_jax.model.published import PUBLISHED
from deltal_jax.tasks.base import Task
from deltal_jax.tasks.catalog import make_task
from deltal_jax.tasks.files import missing_files
from deltal_jax.trackers import check_trackers
from deltal_jax.training.devices import (
    choose_training_mesh,
    lacking_devices,
    make_training_mesh,
    shape_of_mesh,
)
from deltal_jax.training.setup import check_config, check_setup, make_architecture, make_setup


@dataclasses.dataclass(frozen=True)
class Plan:
    """The parts of a run that describe it."""

    config: Config
    architecture: Architecture
    #: None where its files are not here.
    task: Task | None
    #: What is not here, and so was not checked; a line each.
    notes: list[str]
    #: The devices that train, if it is not one.
    mesh: Mesh | AbstractMesh | None = None


def make_plan(config: Config) -> Plan:
    """Everything that a run checks before it begins, as far as what it needs is on this machine.

    Nothing is fetched for a published model whose shape is known. Raises UserError for what a run
    would refuse, and where a new model's tokenizer needs files that are not here.
    """
    model, notes, mesh = config.model, [], None
    missing = missing_files(config.task)
    if missing:
        notes.append(f"note: not here, so not checked: {', '.join(missing)}")
    try:
        check_trackers(config)
    except UserError as error:
        notes.append(f"note: {error}")
    away = model.path is not None and not is_here(model.path, model.revision)
    published = PUBLISHED.get(model.path or "") if away else None
    if published is not None:
        notes.append(f"note: {model.path} is not here; its shape is known, a run fetches the rest")
    here = config
    if lacking := lacking_devices(config):  # a plan for another machine
        rest = "; -1, the rest, counts as 1" if -1 in config.mesh.sizes.values() else ""
        notes.append(f"note: not {lacking} devices here, so their memory is not checked{rest}")
        mesh = shape_of_mesh(config)
        alone = dataclasses.replace(config.rollout, devices=None)
        here = dataclasses.replace(config, mesh=MeshConfig(), rollout=alone)
    if model.path is None or not (missing or published):
        setup = make_setup(here)
        check_setup(setup, memory=not lacking)
        slots = config if lacking else setup.config
        notes += [setup.chosen] if setup.chosen else []
        return Plan(slots, setup.architecture, setup.task, notes, mesh or setup.mesh)
    if published is None:
        published = huggingface.read_config(find_checkpoint(model.path, model.revision))
    check_config(config, published)
    architecture = make_architecture(config, 0, published)
    if config.mesh.auto and not lacking:
        config, mesh, chosen = choose_training_mesh(config, architecture)
        notes.append(chosen)
    elif not lacking:
        mesh = make_training_mesh(config)
    task = None if missing else make_task(config.task)
    return Plan(config, architecture, task, notes, mesh)
