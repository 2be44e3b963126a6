"""Configs as YAML: files, the experiments that come with the package, `key.sub=value` overrides."""

import dataclasses
import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from deltal_jax.config.fields import build
from deltal_jax.config.rules import check
from deltal_jax.config.schema import Config
from deltal_jax.errors import UserError

#: The key of a file that names those below it, and the folder of shipped ones that are no
#: experiments themselves.
BASE, BASES = "base", "bases"
#: The key of a file that is a plan of `deltal compare`, not an experiment.
METHODS = "methods"


def load_config(
    name: str | Path, overrides: dict[str, Any] | None = None, *, gone: Iterable[str] = ()
) -> Config:
    """Read a YAML config by path or name, over the files that its `base` names, and apply dotted
    overrides, `{"rl.steps": 10}`. Fields that are `gone` are left out of what the files say."""
    path, tree = find_config(str(name)), {}
    layers = _layers(path)
    if any(METHODS in layer for layer in layers.values()):
        raise UserError(f"config: {path} is a plan; run it with `deltal compare {path}`")
    for file, layer in layers.items():
        if len(layers) > 1:
            _name_file(file, layer)
        tree = _over(tree, layer)
    if tree.get("run") is None:
        tree["run"] = {}
    if isinstance(tree["run"], dict):
        tree["run"].setdefault("name", path.stem)
    for key in gone:
        section, _, field = key.rpartition(".")
        if isinstance(tree.get(section), dict):
            tree[section].pop(field, None)
    for key, value in (overrides or {}).items():
        _set(tree, key, value)
    config = build(Config, tree)
    check(config)
    return config


def read_tree(path: Path) -> dict[str, Any]:
    """What a file says over the files that its `base` names, whatever it is of."""
    tree: dict[str, Any] = {}
    for layer in _layers(path).values():
        tree = _over(tree, layer)
    return tree


def config_files(name: str | Path) -> list[Path]:
    """The files that a config is made of, in the order in which they are laid over one another:
    what its `base` names, then itself."""
    return list(_layers(find_config(str(name))))


def _layers(path: Path, above: tuple[Path, ...] = ()) -> dict[Path, dict]:
    """The tree of each file, bases first; one that is reached twice has its first place.

    `base` is one file or a list of them, relative to the file that names them; each is laid over
    those before it. Raises UserError, naming the file, for a circle.
    """
    if path.resolve() in [file.resolve() for file in above]:
        circle = " → ".join(file.name for file in (*above, path))
        raise UserError(f"{path}: base: the files name each other in a circle, {circle}")
    tree, found = _read(path), {}
    bases = tree.pop(BASE, None)
    names = [bases] if isinstance(bases, str) else [] if bases is None else bases
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: base: expected a file or a list of files, got {bases!r}")
    for name in names:
        below = Path(os.path.normpath(path.parent / name))
        if not _is_file(below):
            raise UserError(f"{path}: base: no file {below}")
        for file, layer in _layers(below, (*above, path)).items():
            found.setdefault(file, layer)
    return found | {path: tree}


def _read(path: Path) -> dict:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except (yaml.YAMLError, ValueError) as error:  # a date that is none is a ValueError
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of sections, got {type(tree).__name__}")
    return tree


def _name_file(path: Path, layer: dict) -> None:
    """Raises UserError for what no file may say, with the file's name: there are several."""
    try:
        build(Config, layer)
    except UserError as error:
        raise UserError(f"{error} (in {path})") from error


def _over(below: Any, above: Any) -> Any:
    """Field by field; a section that is null is an empty one."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return below if isinstance(below, dict) and above is None else above
    return below | {key: _over(below.get(key), value) for key, value in above.items()}


def dump_config(config: Config) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal one."""
    tree = _plain(dataclasses.asdict(config))
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, width=100)


def parse_overrides(items: list[str]) -> dict[str, Any]:
    """`["rl.steps=10"]` to `{"rl.steps": 10}`; values are YAML."""
    overrides = {}
    for item in items:
        key, separator, text = item.partition("=")
        if not separator or not key:
            raise UserError(f"override {item!r}: expected key.sub=value, such as rl.steps=10")
        try:
            overrides[key] = yaml.load(text, _Loader)
        except (yaml.YAMLError, ValueError) as error:
            raise UserError(f"{key}: {text[:60]!r} is not valid YAML") from error
    return overrides


def find_config(name: str) -> Path:
    """The file of a config: a path, or the name of one that comes with the package."""
    for path in (Path(name), config_folder() / f"{name.removesuffix('.yaml')}.yaml"):
        if _is_file(path):
            return path
    raise UserError(
        f"config: no file {name!r} and no config of that name"
        f"{_nearest(name, list(shipped_configs()))}; `deltal configs` lists them"
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long, or with a NUL
        return False


def shipped_configs() -> dict[str, Path]:
    """The experiments that come with the package, by name: those of the folder itself first."""
    return {name: path for name, path in _shipped().items() if not _is_plan(path)}


def shipped_plans() -> dict[str, Path]:
    """The plans of `deltal compare` that come with the package, by name."""
    return {name: path for name, path in _shipped().items() if _is_plan(path)}


def _is_plan(path: Path) -> bool:
    """Whether it, or a file below it, has the key at the top; a hundred files are not parsed for
    that."""
    text = path.read_text(encoding="utf-8")
    if re.search(rf"^{METHODS}:", text, re.MULTILINE):
        return True
    below = re.search(rf"^{BASE}:(.*)", text, re.MULTILINE)
    names = re.findall(r"[^\s,\[\]]+\.yaml", below[1]) if below else []
    return any(_is_plan(path.parent / name) for name in names)


def _shipped() -> dict[str, Path]:
    folder = config_folder()
    found = [path.relative_to(folder) for path in folder.rglob("*.yaml")]
    found = sorted((path for path in found if path.parts[0] != BASES), key=lambda p: p.parts)
    found.sort(key=lambda path: len(path.parts))
    return {path.with_suffix("").as_posix(): folder / path for path in found}


def config_folder() -> Path:
    """The folder of the experiments that come with the package: inside it where it is installed,
    beside it in a checkout."""
    package = Path(__file__).parent.parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 3e-4 as a number (YAML 1.1 wants 3.0e-4) and refuses repeated keys."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        repeated = next((key for key in keys if keys.count(key) > 1), None)
        if repeated is not None:
            raise yaml.YAMLError(f"key {repeated!r} appears twice")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what the loader would read as a number."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"),
        list("-+0123456789"),
    )


def _set(tree: dict, key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise UserError(f"{key}: {parent} is a value, not a section")
    # A whole section goes field by field, so that the others stay.
    tree[last] = _over(tree.get(last), value) if isinstance(value, dict) else value


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value
