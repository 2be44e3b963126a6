"""Measure how gradients of a run's responses vary with length, and what aggregations make of it."""

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

from deltal_jax.cli.options import add_step, check_seed, parse_steps
from deltal_jax.config import parse_overrides
from deltal_jax.errors import UserError

#: Where the results of a run go, in its folder.
FOLDER = "variance"
#: Lowest values of the options that are whole numbers.
LOWEST = {"groups": 1, "bins": 2, "min_length": 1, "project": 16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument(
        "items",
        nargs="*",
        default=[],  # or argparse says that they are required
        metavar="key.sub=value",
        help="such as rl.prompts_per_step=8",
    )
    add_step(parser)
    parser.add_argument(
        "--groups",
        type=int,
        metavar="P",
        help="prompts, each with rl.samples_per_prompt responses; more of them resolve more; "
        "default: 64, or two batches if that is more",
    )
    parser.add_argument("--bins", type=int, default=6, metavar="N", help="of lengths; default: 6")
    parser.add_argument(
        "--min-length",
        type=int,
        default=1,
        metavar="L",
        help="set responses of fewer trained tokens apart, such as direct answers",
    )
    parser.add_argument(
        "--drop-truncated", action="store_true", help="set truncated responses apart"
    )
    parser.add_argument(
        "--subsets",
        action="store_true",
        help="beside all: without truncated responses, without the shortest (under --min-length, "
        "or the first bin), and without both",
    )
    parser.add_argument(
        "--project",
        type=int,
        metavar="K",
        help="random projections of each layer's matrices to K numbers, √(2/K) off; default: exact "
        "gradients where they take under 2 GiB, else 1024",
    )
    parser.add_argument(
        "--seed", type=int, default=None, help="sample anew; default: the run's own"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")


def run(arguments: argparse.Namespace) -> int:
    """Measure; the exit code."""
    import jax

    from deltal_jax.laboratory.measure import Settings, measure
    from deltal_jax.laboratory.plots import write_plots
    from deltal_jax.training.trained import load_trained

    names = ("groups", "bins", "min_length", "drop_truncated", "subsets", "project")
    settings = Settings(**{name: getattr(arguments, name) for name in names})
    _check(arguments)
    clock, folder = time.perf_counter(), Path(arguments.run)
    steps = parse_steps(arguments.step, several=False)
    trained = load_trained(folder, parse_overrides(arguments.items), steps)
    position = trained.position
    to = folder / FOLDER
    try:
        to.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"run.dir: cannot write to {to}: {error.strerror}") from error
    step = position.step if position.phase == "rl" else 0
    key = trained.key if arguments.seed is None else jax.random.key(arguments.seed)
    head = {"run": arguments.run, "step": step}
    found = measure(
        trained.setup, trained.params, key, start=position.next_prompt, settings=settings
    )
    found["settings"] |= {"seed": arguments.seed}
    result = head | found
    text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
    name = _keep(to, step, text + "\n")
    plots = write_plots(to, name, result)
    if arguments.json:
        print(text)
        return 0
    print("\n".join(table(result)))
    print(f"\n{time.perf_counter() - clock:.0f} s; written to {to}: {name}.json", end="")
    print("".join(f", {path.name}" for path in plots))
    return 0


def _keep(folder: Path, step: int, text: str) -> str:
    """Write a measurement beside others of its step; the file's name without its ending."""
    first = f"step-{step:06d}"
    names = itertools.chain([first], (f"{first}-{number}" for number in itertools.count(2)))
    paths = (folder / f"{name}.json" for name in names)
    free = (p for p in paths if not p.exists() or p.read_text("utf-8", "replace") == text)
    path = next(free)
    path.write_text(text, encoding="utf-8")
    return path.stem


def _check(arguments: argparse.Namespace) -> None:
    """Raises UserError for an option out of bounds."""
    if arguments.seed is not None:
        check_seed(arguments.seed)
    for name, lowest in LOWEST.items():
        value = getattr(arguments, name)
        if value is not None and value < lowest:
            option = "--" + name.replace("_", "-")
            raise UserError(f"{option}: must be at least {lowest}, got {value}")


def table(result: dict[str, Any]) -> list[str]:
    """What is measured, in lines."""
    shortest, *_, longest = result["lengths"]
    projected = result["projected"]
    how = f"projected, {result['projection_error']:.1%} off" if projected else "exact"
    lines = [
        f"{result['run']}, RL step {result['step']}: {result['responses']} responses to "
        f"{result['groups']} prompts, {result['counted']} counted; lengths {shortest:.0f} – "
        f"{longest:.0f}, truncated {result['truncated_frac']:.1%}",
        f"{result['parameters']:,} parameters, gradients {how}",
    ]
    for name, found in result["gradients"].items():
        if found is None:
            lines += ["", f"{name}: none, {result['reason']}"]
            continue
        lines += ["", f"{name} gradient: Var(g) ∝ L^β, β = {_power(found['fit'])}"]
        lines += _aligned(
            [
                ["length", "from", "to", "count", "E‖g‖²", "variance", "‖E g‖"],
                *(
                    [
                        f"{row['length']:.1f}",
                        *(str(row[key]) for key in ("low", "high", "count")),
                        *(_figure(row[key]) for key in ("second_moment", "variance", "mean_norm")),
                    ]
                    for row in found["bins"]
                ),
            ]
        )
        for part in ("layers", "kinds"):
            each = (f"{name} {_short(fit)}" for name, fit in found[part].items())
            lines.append(f"β by {part[:-1]}: {', '.join(each)}")
    for name, found in result.get("subsets", {}).items():
        fits = [f"{k} {_power(v and v['fit'])}" for k, v in found["gradients"].items()]
        lines += [""] if name == "all" else []
        lines.append(f"{name} ({found['counted']}): β of {', '.join(fits)}")
    return lines + _aggregations(result)


def _aggregations(result: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    if result["aggregations"]:
        lines += ["", f"aggregations, of batches of {result['batch_groups']} prompts"]
        lines += _methods(result["aggregations"], cosine=True)
    if result["exponents"] is not None:
        found = result["exponents"]
        lines += [
            "",
            f"exponents fitted on {found['held_out_groups']} prompts, applied to batches of "
            f"{found['batch_groups']} others; both ways",
            *_methods(found["rows"], cosine=False),
        ]
    if any(row["cv"] is None for row in result["aggregations"]):
        needed = [row["groups_needed"] for row in result["aggregations"] if row["groups_needed"]]
        wanted = f"{min(needed)} may do" if needed else "twice as many may not do"
        lines.append(f"- is not resolvable: the mean is under the noise; raise --groups, {wanted}")
    return lines


def _methods(rows: list[dict[str, Any]], *, cosine: bool) -> list[str]:
    heads = {
        "relative_variance": "variance / ΔL1",
        "cv": "CV",
        "bias_cosine": "bias cosine",
        "true_cosine": "true cosine",
        "gain": "gain",
    }
    lines = [["", *heads.values(), *(["cosine"] if cosine else [])]]
    for row in rows:
        cells = [_with_ends(row, key) for key in heads]
        lines.append([row["name"], *cells, *([_figure(row["cosine"])] if cosine else [])])
    return _aligned(lines)


def _with_ends(row: dict[str, Any], key: str) -> str:
    value, low, high = (row[f"{key}{end}"] for end in ("", "_low", "_high"))
    if value is None:
        return "-"
    ends = "" if low is None else f" ({_figure(low)} – {_figure(high)})"
    return _figure(value) + ends


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _power(fit: dict[str, float | None] | None) -> str:
    if fit is None:
        return "unknown"
    low, high, r2 = fit["low"], fit["high"], fit["r2"]
    ends = "" if low is None else f" ({low:.2f} – {high:.2f})"
    return f"{fit['beta']:.2f}{ends}" + ("" if r2 is None else f", r² {r2:.2f}")


def _short(fit: dict[str, float | None] | None) -> str:
    return "-" if fit is None else f"{fit['beta']:.2f}"


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]
