"""Say whether an experiment fits on a TPU slice, and how fast it can be, without one."""

import argparse
import json
import re
import sys

from deltal_jax.cli.options import add_config, split_items
from deltal_jax.config import load_config
from deltal_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_config(parser)
    parser.add_argument(
        "--topology",
        metavar="SLICE",
        help="chips of a slice, such as v5e:8x8, v5p:2x2x2, v6e:4x8; gpu:h100x8 by arithmetic "
        "alone; default: what configs/bases/topologies.yaml says of CONFIG",
    )
    parser.add_argument(
        "--mesh", metavar="AXIS=N[,…]", help="instead of the config's, such as fsdp=16,tensor=4"
    )
    parser.add_argument(
        "--lengths",
        metavar="MEAN,P95",
        help="response tokens of a step; default: a third of the limit, and the limit",
    )
    parser.add_argument(
        "--all", action="store_true", help="every shape of micro-batch, not two of them"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; 1 where it does not fit."""
    names, overrides = split_items(arguments.items)
    if len(names) != 1:
        raise UserError("config: name one experiment, such as gsm8k-0.5b-v5e8")
    from deltal_jax.planning.topology import parse_topology

    if arguments.topology is None:
        from deltal_jax.planning.several import slices_of

        found = slices_of(names[0])
        if not found:
            raise UserError("--topology: name a slice, such as v5e:8x8")
        topology, overrides = parse_topology(found[0].topology), found[0].overrides | overrides
    else:
        topology = parse_topology(arguments.topology)
    config = load_config(names[0], overrides | _mesh(arguments.mesh))
    lengths = _lengths(arguments.lengths, config.rollout.max_response_length)

    import jax

    jax.config.update("jax_platforms", "cpu")  # nothing runs, and no device is taken
    from deltal_jax.planning.estimate import make_estimate
    from deltal_jax.planning.plan import make_plan
    from deltal_jax.planning.table import show

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if topology.chip.platform == "gpu":
        plan = make_estimate(config, topology, lengths)
    else:
        plan = make_plan(config, topology, lengths, every=arguments.all, say=say)
    print(json.dumps({"config": names[0], **plan}) if arguments.json else show(plan))
    return 0 if plan["fits"] else 1


def _mesh(text: str | None) -> dict[str, int]:
    """Overrides of the config's mesh. Raises UserError for an axis or a size that is none."""
    if text is None:
        return {}
    from deltal_jax.parallel.mesh import AXES

    sizes: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"(\w+)=(-1|[1-9]\d{0,5})", part)
        if match is None or match[1] not in AXES or f"mesh.{match[1]}" in sizes:
            raise UserError(
                f"--mesh: {part!r} in {text!r}; give sizes of {', '.join(AXES)}, each once, such "
                "as fsdp=16,tensor=4"
            )
        sizes[f"mesh.{match[1]}"] = int(match[2])
    return {f"mesh.{axis}": 1 for axis in AXES} | sizes


def _lengths(text: str | None, limit: int):
    from deltal_jax.planning.lengths import Lengths

    if text is None:
        return Lengths(limit / 3, limit)
    match = re.fullmatch(r"(\d+(?:\.\d+)?),(\d+(?:\.\d+)?)", text)
    mean, p95 = (float(x) for x in match.groups()) if match else (0.0, 0.0)
    if not 1 <= mean <= p95 <= limit:
        raise UserError(
            f"--lengths: {text!r} is not MEAN,P95 with 1 ≤ MEAN ≤ P95 ≤ {limit}, the limit"
        )
    return Lengths(mean, p95)
