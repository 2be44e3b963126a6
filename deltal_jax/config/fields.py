"""Field by field over the schema: plain values into a config, and a description of every field."""

import dataclasses
import difflib
import math
import sys
import types
import typing
from typing import Any, Literal

from deltal_jax.config.schema import Config
from deltal_jax.errors import UserError
from deltal_jax.objective.names import unknown_name


def build(kind: type, tree: Any, prefix: str = "") -> Any:
    """An instance of a config dataclass from a mapping; `prefix` is where errors say it lies."""
    if not isinstance(tree, dict):
        raise UserError(f"{prefix.rstrip('.')}: expected a section of fields, got {tree!r}")
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in tree:
        if key not in fields:
            raise UserError(f"{prefix}{key}: no such field{_suggest(prefix, str(key), fields)}")
    values = {}
    for name, value in tree.items():
        path = prefix + name
        if dataclasses.is_dataclass(hints[name]):
            values[name] = build(hints[name], value if value is not None else {}, f"{path}.")
        elif fields[name].default == () and value == []:  # only here is an empty list something
            values[name] = ()
        else:
            if isinstance(value, bool):
                value = fields[name].metadata["former"].get(value, value)
            values[name] = _convert(hints[name], value, path)
            _bound(values[name], fields[name].metadata, path)
    return kind(**values)


def describe_fields(kind: type = Config, prefix: str = "") -> list[tuple[str, str, Any, str]]:
    """(dotted name, type, default, help) of every field."""
    rows = []
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        name = prefix + field.name
        if dataclasses.is_dataclass(hints[field.name]):
            rows += describe_fields(hints[field.name], f"{name}.")
        else:
            rows.append((name, _spell(hints[field.name]), field.default, field.metadata["help"]))
    return rows


def _convert(hint: Any, value: Any, path: str) -> Any:
    """The value as the field's type, or an error that names both."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value in args:
            return value
        raise UserError(unknown_name(path, value, args))
    if origin in (typing.Union, types.UnionType):
        return _alternative(hint, value, path)
    if origin is dict:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise UserError(f"{path}: expected {_spell(hint)}, got {value!r}")
        return {key: _convert(args[1], item, f"{path}.{key}") for key, item in value.items()}
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or not value:
            examples = {int: "[32, 64]", float: "[0.2, 0.1]", str: "[one, two]"}
            example = examples.get(args[0]) or f"[{typing.get_args(args[0])[0]}]"
            raise UserError(f"{path}: expected a list such as {example}, got {value!r}")
        return tuple(_convert(args[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) > sys.float_info.max:
            raise UserError(f"{path}: too large for a float")
        return float(value)
    if isinstance(value, bool) is (hint is bool) and isinstance(value, hint):
        return value
    raise UserError(f"{path}: expected {_spell(hint)}, got {value!r}")


def _alternative(hint: Any, value: Any, path: str) -> Any:
    """The value of a field that may also be null, or a number that may also be a word."""
    kind, other = typing.get_args(hint)
    if value in ((None,) if other is type(None) else typing.get_args(other)):
        return value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if other is type(None) or number:
        return _convert(kind, value, path)
    raise UserError(f"{path}: expected {_spell(hint)}, got {value!r}")


def _bound(value: Any, metadata: Any, path: str) -> None:
    low, high = metadata["low"], metadata["high"]
    if isinstance(value, dict):
        for name, item in value.items():
            _bound(item, metadata, f"{path}.{name}")
        return
    for item in value if isinstance(value, tuple) else (value,):
        if isinstance(item, str):  # a word where there are also numbers
            continue
        if isinstance(item, float) and not math.isfinite(item):
            raise UserError(f"{path}: must be finite, got {item}")
        if low is not None and item is not None and item < low:
            raise UserError(f"{path}: must be at least {low}, got {item}")
        if high is not None and item is not None and item > high:
            raise UserError(f"{path}: must be at most {high}, got {item}")


def _suggest(prefix: str, key: str, fields: dict) -> str:
    everywhere = [name for name, *_ in describe_fields()]
    elsewhere = [name for name in everywhere if name.rsplit(".", 1)[-1] == key]
    near = difflib.get_close_matches(key, list(fields), n=1, cutoff=0.5)
    if elsewhere:
        return f"; did you mean {' or '.join(elsewhere)}?"
    if near:
        return f"; did you mean {prefix}{near[0]}?"
    return f"; the fields here are {', '.join(fields)}"


def _spell(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "|".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if a is type(None) else _spell(a) for a in args)
    if origin is tuple:
        return f"list of {_spell(args[0])}"
    if origin is dict:
        return f"{_spell(args[1])} by name"
    return {int: "int", float: "float", str: "text", bool: "true|false"}[hint]
