"""How a field is declared."""

import dataclasses
from typing import Any


def field(default: Any, help_: str, *, low: float | None = None, high: float | None = None) -> Any:
    """A documented field; `low` and `high` are inclusive bounds."""
    metadata = {"help": help_, "low": low, "high": high}
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)
