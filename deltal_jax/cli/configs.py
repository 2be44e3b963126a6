"""List the experiments and plans that come with the package, or every config field."""

import argparse
import itertools
import json

from deltal_jax.config import describe_fields, shipped_configs, shipped_plans


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
    experiments = shipped_configs()
    for name, path in (experiments | shipped_plans()).items():
        header = path.read_text(encoding="utf-8").split("\n", 1)[0]
        found[name] = header.lstrip("# ").strip()
    if arguments.json:
        print(json.dumps(found, ensure_ascii=False))
        return 0
    width = max(map(len, found)) + 2
    for _, group in itertools.groupby(found, key=lambda name: _group(name, name in experiments)):
        print("\n".join(f"{name:{width}}{found[name]}" for name in group), end="\n\n")
    return 0


def _group(name: str, experiment: bool) -> tuple[bool, str]:
    """What is printed together: a folder's experiments, and apart from them its plans."""
    return experiment, name.rpartition("/")[0]
