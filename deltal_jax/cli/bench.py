"""Measure this installation: ratios against a peer, or against the machine's own limit."""

import argparse
import json
from typing import Any

from deltal_jax.errors import UserError

#: Subjects that write files.
WRITING = ("loading", "data", "checkpoint")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "subject",
        choices=(
            *("objective", "update", "rollout", "model", "loading", "grading", "data"),
            *("checkpoint", "gpu"),
        ),
        help="objective: weights and aggregation; update: one policy update of a fixed load; "
        "rollout: sampling of a fixed load; "
        "model: forward and backward against a matrix product; loading: a checkpoint of 2 GB "
        "against a plain read; grading: verdicts on mathematical answers; data: the start of a run "
        "on a million problems; checkpoint: how long a save of 1 GB stalls training, against a "
        "plain write; gpu: MFU of the update and bandwidth of decoding at real sizes",
    )
    parser.add_argument(
        "--shape",
        action="append",
        choices=("tiny", "0.5b", "3b"),
        help="gpu: of which size the model is; several may be named (default: 0.5b and 3b)",
    )
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="[NAME=]PYTHON",
        help="update: the Python of an environment with google-tunix, to be run in turn with ours; "
        "rollout: tunix=PYTHON, transformers=PYTHON, or both",
    )
    parser.add_argument(
        "--folder",
        help="loading, data, checkpoint: where to write files, on the disk to be measured "
        "(default: TMPDIR)",
    )
    parser.add_argument("--rounds", type=int, default=9, help="repetitions; medians are printed")
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")


def run(arguments: argparse.Namespace) -> int:
    """Measure; the exit code."""
    if arguments.rounds < 3:
        raise UserError(f"--rounds: a median needs at least 3, got {arguments.rounds}")
    peers = _peers(arguments.peer, arguments.subject)
    if arguments.folder and arguments.subject not in WRITING:
        said = ", ".join(f"`{name}`" for name in WRITING)
        raise UserError(f"--folder: of `deltal bench` only {said} write files")

    if arguments.shape and arguments.subject != "gpu":
        raise UserError("--shape: of `deltal bench` only `gpu` has models of several sizes")

    import jax

    if arguments.subject == "objective":
        from deltal_jax.bench.objective import benchmark_objective

        figures = benchmark_objective(arguments.rounds)
    elif arguments.subject == "model":
        from deltal_jax.bench.model import benchmark_model

        figures = benchmark_model(arguments.rounds)
    elif arguments.subject == "rollout":
        from deltal_jax.bench.rollout import benchmark_rollout

        figures = benchmark_rollout(arguments.rounds, peers)
    elif arguments.subject == "grading":
        from deltal_jax.bench.grading import benchmark_grading

        figures = benchmark_grading(arguments.rounds)
    elif arguments.subject == "data":
        from deltal_jax.bench.data import benchmark_data

        figures = benchmark_data(arguments.rounds, arguments.folder)
    elif arguments.subject == "checkpoint":
        from deltal_jax.bench.checkpoint import benchmark_checkpoint

        figures = benchmark_checkpoint(arguments.rounds, arguments.folder)
    elif arguments.subject == "loading":
        from deltal_jax.bench.loading import benchmark_loading

        figures = benchmark_loading(arguments.rounds, arguments.folder)
    elif arguments.subject == "gpu":
        from deltal_jax.bench.gpu import benchmark_gpu

        figures = benchmark_gpu(arguments.rounds, arguments.shape or ["0.5b", "3b"])
    else:
        from deltal_jax.bench.update import benchmark_update, head_memory

        figures = benchmark_update(arguments.rounds, peers.get("tunix"))
        figures["memory at 3B, 8,192 tokens"] = head_memory()
    figures["jax"] = {"version": jax.__version__, "backend": jax.default_backend()}
    print(json.dumps(figures) if arguments.json else _table(figures))
    return 0


def _peers(given: list[str], subject: str) -> dict[str, str]:
    """The Python of each peer's environment, by the peer's name; Tunix where none is given."""
    known = {"update": ("tunix",), "rollout": ("tunix", "transformers")}.get(subject, ())
    if given and not known:
        raise UserError(f"--peer: `deltal bench {subject}` has no peer")
    found = {}
    for item in given:
        name, _, python = item.rpartition("=")
        name = name or "tunix"
        if name not in known:
            raise UserError(f"--peer: {name} is not one of {', '.join(known)}")
        found[name] = python
    return found


def _table(figures: dict[str, Any], prefix: str = "") -> str:
    lines = []
    for name, value in figures.items():
        if isinstance(value, dict):
            lines += ["", f"{prefix}{name}", _table(value, prefix + "  ")]
        else:
            shown = f"{value:>14.4g}" if isinstance(value, float) else f"{value:>14}"
            lines.append(f"{prefix + name:44}{shown}")
    return "\n".join(lines)
