"""People's own tasks and rewards, from Python files."""

import dataclasses
import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deltal_jax.config import TaskConfig, config_folder
from deltal_jax.config.tasks import SECTIONS, MathConfig
from deltal_jax.errors import UserError
from deltal_jax.tasks.grading import Reward
from deltal_jax.tasks.math.task import TEMPLATES

#: What a run calls, sooner or later: `base.Task`.
METHODS = ("vocabulary", "problem", "held_out", "demonstrations", "parse_problem", "verify")
_REWARD = re.compile(
    r"(?:([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)\s*\*\s*)?([^*]+\.py:\w+)",
    re.ASCII | re.IGNORECASE,
)


def load_rewards(names: Sequence[str] | None) -> list[Reward | str]:
    """What the field `task.rewards` names: "task", or functions in files with their weights."""
    rewards: list[Reward | str] = []
    for name in names or ("task",):
        match = _REWARD.fullmatch(name.strip())
        if name.strip() == "task":
            rewards.append("task")
        elif match is None:
            raise UserError(
                f"task.rewards: {name!r} is not task, file.py:function or 0.1 * file.py:function"
            )
        else:
            weight = float(match[1] or 1.0)
            rewards.append(Reward(load_object(match[2], "task.rewards"), weight=weight))
    return rewards


def pin_files(task: TaskConfig) -> TaskConfig:
    """The config with whole paths, so that it means the same in another folder."""
    mixture = {absolute(name): weight for name, weight in (task.mixture or {}).items()}
    rewards = tuple(absolute(name) for name in task.rewards or ())
    return dataclasses.replace(
        task,
        name=absolute(task.name),
        mixture=mixture or None,
        rewards=rewards or None,
        math=_pin_template(_pin_data(task.math)),
        countdown=_pin_data(task.countdown),
    )


def _pin_data(section: Any) -> Any:
    """The same with the whole paths of its files of problems."""
    given = {name: getattr(section, name) for name in ("train", "eval")}
    whole = {
        name: _whole_path(value) if isinstance(value, str) else tuple(map(_whole_path, value))
        for name, value in given.items()
        if value is not None
    }
    return dataclasses.replace(section, **whole)


def _pin_template(section: MathConfig) -> MathConfig:
    if section.template in TEMPLATES:
        return section
    return dataclasses.replace(section, template=str(Path(section.template).absolute()))


def _whole_path(name: str) -> str:
    return str(find_data(name).absolute())


def find_data(name: str) -> Path:
    """A file of problems: a path, or that of one that comes with the package."""
    path, shipped = Path(name).expanduser(), config_folder() / name
    return shipped if shipped.is_file() and not path.is_file() else path


def missing_files(task: TaskConfig) -> list[str]:
    """Files of problems that the config names and that are not there."""
    found: list[str] = []
    for name in {task.name, *(task.mixture or {})}.intersection(SECTIONS):
        for field in ("train", "eval"):
            given = getattr(getattr(task, name), field, None)
            found += [given] if isinstance(given, str) else given or ()
    return [name for name in found if not find_data(name).is_file()]


def absolute(name: str) -> str:
    """`0.1 * file.py:name` with the file's whole path; any other name as it is."""
    match = _REWARD.fullmatch(name.strip())
    if match is None:
        return name
    path, _, attribute = match[2].rpartition(":")
    whole = f"{Path(path).expanduser().absolute()}:{attribute}"
    return f"{match[1]} * {whole}" if match[1] else whole


def load_task(name: str) -> Any:
    """The task whose class, called without arguments, is `path/to/file.py:Class`."""
    found = load_object(name, "task.name")
    try:
        task = found()
    except Exception as error:
        raise UserError(f"task.name: {name}() fails: {_said(error)}") from error
    if not isinstance(getattr(task, "name", None), str):
        raise UserError(f"task.name: {name} has no name; see deltal_jax/tasks/base.py")
    for method in METHODS:
        if not callable(getattr(task, method, None)):
            raise UserError(f"task.name: {name} has no {method}; see deltal_jax/tasks/base.py")
    return task


def load_object(name: str, field: str) -> Any:
    """The function or class of `path/to/file.py:name`. It runs the file, as an import would."""
    path, _, attribute = name.rpartition(":")
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{field}: no file {path}")
    module_name = f"deltal_jax_file_{file.stem}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{field}: {path} fails: {_said(error)}") from error
    found = getattr(module, attribute, None)
    if not callable(found):
        raise UserError(f"{field}: {path} has no function or class {attribute!r}")
    return found


def _said(error: Exception) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
