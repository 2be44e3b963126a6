"""How a field is declared."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any


def field(
    default: Any,
    help_: str,
    *,
    low: float | None = None,
    high: float | None = None,
    former: Mapping[bool, Any] = MappingProxyType({}),
) -> Any:
    """A documented field; `low` and `high` are inclusive bounds. `former`: by values of true|false
    that it had once, and configs of older runs still have, what they are called today."""
    metadata = {"help": help_, "low": low, "high": high, "former": former}
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)
