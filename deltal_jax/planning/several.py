"""Plans of all experiments for the slices that they name, and their table.

Programs that are the same in several experiments are compiled once: results are kept by a hash of
the program in a JSON file, so that what was interrupted goes on where it was.
"""

import argparse
import dataclasses
import fnmatch
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from deltal_jax.config import load_config, shipped_configs
from deltal_jax.config.files import config_folder
from deltal_jax.errors import UserError
from deltal_jax.planning.topology import parse_topology

#: Above the table.
HEAD = """\
# What the compiler of TPUs says of the experiments

By `scripts/plan_all`, without a TPU: no run has measured any of it. Memory is that of the fullest
program with all that is kept beside it, against what the compiler may use of a chip. The MFU and
the times are bounds at nominal peak rates, for lengths of a third of the limit on average (95th
percentile: the limit); what they mean is in [planning](../deltal_jax/planning/README.md).

"""
#: Of no slice: an experiment for a CPU.
CPU = "cpu"


@dataclasses.dataclass(frozen=True)
class Slice:
    """One experiment on one slice."""

    name: str
    config: str
    topology: str
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)


def slices_of(config: str) -> list[Slice]:
    """The slice that the experiment of this name, or path, is for; none where it is for a CPU, or
    nothing is known of it."""
    name = config.removesuffix(".yaml")
    for entry in _read()["slices"]:
        patterns = entry["configs"]
        if any(fnmatch.fnmatchcase(f"/{name}", f"*/{own}") for own in patterns):
            if entry["topology"] == CPU:
                return []
            return [Slice(name, config, entry["topology"], entry.get("set") or {})]
    return []


def named() -> set[str]:
    """Experiments of the package that some entry is for, a CPU counted."""
    patterns = [own for entry in _read()["slices"] for own in entry["configs"]]
    names = shipped_configs()
    return {name for name in names if any(fnmatch.fnmatchcase(name, own) for own in patterns)}


def rows(*, everything: bool) -> list[Slice]:
    """Those of the table; `everything`: and all other experiments that name a slice."""
    found = [
        Slice(own["name"], own["config"], own["topology"], own.get("set") or {})
        for own in _read()["table"]
    ]
    if everything:
        found += [own for name in shipped_configs() for own in slices_of(name)]
    return found


def _read() -> dict[str, Any]:
    path = config_folder() / "bases" / "topologies.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def main(arguments: list[str] | None = None) -> int:
    """Write the table; 1 where something does not fit or is refused."""
    parser = argparse.ArgumentParser(description="Plan every experiment for its slice.")
    parser.add_argument("--to", type=Path, default=Path("configs/plans.md"), metavar="FILE")
    parser.add_argument("--cache", type=Path, default=Path("plans.json"), metavar="FILE")
    parser.add_argument(
        "--hlo", type=Path, metavar="FOLDER", help="keep the compiled programs' text"
    )
    parser.add_argument("--only", metavar="TEXT", help="rows whose name or slice has this in it")
    parser.add_argument(
        "--all", action="store_true", help="all experiments, and every shape of micro-batch"
    )
    given = parser.parse_args(arguments)
    wanted = rows(everything=given.all)
    if given.only:
        wanted = [own for own in wanted if given.only in f"{own.name} {own.topology}"]
    return plan_rows(wanted, given.cache, given.to, texts=given.hlo, every=given.all)


def plan_rows(
    wanted: Iterable[Slice], known: Path, to: Path, *, texts: Path | None, every: bool
) -> int:
    """Each row in turn; the table is written anew after each."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    from deltal_jax.planning.compiling import Cache
    from deltal_jax.planning.lengths import Lengths
    from deltal_jax.planning.plan import make_plan
    from deltal_jax.planning.table import markdown, verdict

    cache, done, code = Cache(known, texts), [], 0
    for own in wanted:
        say(f"{own.name} on {own.topology} ({own.config})")
        try:
            config = load_config(own.config, own.overrides)
            limit = config.rollout.max_response_length
            topology = parse_topology(own.topology)
            plan = make_plan(
                config, topology, Lengths(limit / 3, limit), every=every, cache=cache, say=say
            )
        except UserError as error:
            say(f"  {error}")
            code = 1
            continue
        say(f"  {verdict(plan)}")
        code = code or int(not plan["fits"])
        done.append((own.name, plan))
        to.write_text(HEAD + markdown(done), encoding="utf-8")
        to.with_suffix(".json").write_text(json.dumps(dict(rows=done), indent=1), encoding="utf-8")
    return code


def say(line: str) -> None:
    """To people, at once."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
