"""List the experiments that come with the package, or every config field."""

import argparse
import json

from deltal_jax.config import config_folder, describe_fields


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--fields", action="store_true", help="every field: type, default, meaning")
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")


def run(arguments: argparse.Namespace) -> int:
    """Print the list; the exit code."""
    if arguments.fields:
        fields = describe_fields()
        if arguments.json:
            keys = ("name", "type", "default", "help")
            described = [dict(zip(keys, field, strict=True)) for field in fields]
            print(json.dumps({"fields": described}))
            return 0
        for name, kind, default, help_ in fields:
            shown = "null" if default is None else default
            print(f"{name}\n    {kind}, default {shown}: {help_}")
        return 0
    found = {}
    for path in sorted(config_folder().rglob("*.yaml")):
        header = path.read_text(encoding="utf-8").split("\n", 1)[0]
        name = path.relative_to(config_folder()).with_suffix("").as_posix()
        found[name] = header.lstrip("# ").strip()
    if arguments.json:
        print(json.dumps(found, ensure_ascii=False))
        return 0
    for name, summary in found.items():
        print(f"{name:24}{summary}")
    return 0
