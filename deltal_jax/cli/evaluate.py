"""Evaluate a run's checkpoints, or a Hugging Face folder, on held-out problems."""

import argparse
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltal_jax.cli.options import check_seed, parse_steps
from deltal_jax.config import parse_overrides
from deltal_jax.errors import UserError

if TYPE_CHECKING:
    from deltal_jax.training.evaluate import Evaluation
    from deltal_jax.training.trained import Trained

#: Where the results of a run go, in its folder.
EVALUATIONS = "evaluations"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "run", metavar="RUN", help="a run folder; with --config a Hugging Face folder or hub id"
    )
    parser.add_argument(
        "items",
        nargs="*",
        default=[],  # or argparse says that they are required
        metavar="key.sub=value",
        help="such as evaluate.samples_per_problem=8 or evaluate.temperature=0",
    )
    parser.add_argument(
        "--config",
        metavar="CONFIG",
        help="the experiment whose task and settings a Hugging Face folder is evaluated by",
    )
    parser.add_argument(
        "--step",
        metavar="N[,N…]|all|best",
        help="checkpoints after these RL steps of the run, or the best by its own evaluations; "
        "default: the newest",
    )
    parser.add_argument(
        "--to",
        metavar="FOLDER",
        help="write results and responses there; default: evaluations/ in the run folder",
    )
    parser.add_argument(
        "--seed", type=int, default=None, help="sample anew; default: the run's own"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")


def run(arguments: argparse.Namespace) -> int:
    """Evaluate; the exit code."""
    import jax

    from deltal_jax.metrics import finite
    from deltal_jax.training.evaluate import evaluate, samples_name
    from deltal_jax.training.setup import make_local_engine

    if arguments.seed is not None:
        check_seed(arguments.seed)
    to = _folder(arguments)
    engine, results = None, []
    for trained in _trained(arguments):
        setup = trained.setup
        config = setup.config.evaluate
        if engine is None:
            engine = make_local_engine(setup, temperature=config.temperature)
            _make(to, "run.dir" if arguments.to is None else "--to")
        key = trained.key if arguments.seed is None else jax.random.key(arguments.seed)
        found = evaluate(setup, engine, trained.params, key)
        metrics = {name: finite(value) for name, value in found.metrics.items()}
        step = None if arguments.config else trained.position.step
        kind = "model" if step is None else "run"
        results.append({kind: arguments.run, "step": step} | metrics)
        if to is not None:
            settings = {"seed": arguments.seed, "evaluate": dataclasses.asdict(config)}
            name = kind if step is None else samples_name(step)
            _write(to, name, results[-1] | settings, found, config.rows)
        if not arguments.json:
            where = f", {trained.position.phase} step {step}" if step is not None else ""
            print(f"{arguments.run}{where}, temperature {config.temperature:g}", flush=True)
            print("\n".join(table(metrics)), flush=True)
    order = {} if arguments.config else _monotonicity(Path(arguments.run))
    if arguments.json:
        several = {"run": arguments.run, "evaluations": results}
        print(json.dumps((results[0] if len(results) == 1 else several) | {"monotonicity": order}))
        return 0
    for name, value in order.items():
        if value is not None:
            print(f"monotonicity over the run's evaluations, {name}: {value:.3f}")
    if to is not None:
        print(f"written to {to}")
    return 0


def table(metrics: dict[str, float | None]) -> list[str]:
    """A row for each data set, and notes, of the metrics of one evaluation."""
    found = (re.fullmatch("eval/(.+)/avg_at_k", key) for key in metrics)
    names = [match[1] for match in found if match]
    sets = {name: _of(metrics, name) for name in names}
    samples = next(iter(sets.values()))["k"]
    between = [2**i for i in range(1, 20) if 2**i < samples]
    head = ["data set", "problems", "distinct", f"avg@{samples:.0f}", "95 % interval"]
    if samples > 1:
        head += [f"pass@{k}" for k in between] + [f"pass@{samples:.0f}", "95 % interval"]
        head += [f"maj@{samples:.0f}"]
    rows = [[*head, "length", "truncated", "no verdict"]]
    for name, found in sets.items():
        row = [name, f"{found['problems']:.0f}", f"{found['distinct']:.0f}"]
        row += [_figure(found["avg_at_k"]), _interval(found, "avg_at_k")]
        if samples > 1:
            row += [_figure(found[f"pass_at_{k}"]) for k in between]
            row += [_figure(found["pass_at_k"]), _interval(found, "pass_at_k")]
            row += [_figure(found["maj_at_k"])]
        row += [f"{found['length']:.1f}", _figure(found["truncated_frac"])]
        rows.append([*row, _figure(found["missing_frac"])])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    for name, found in sets.items():
        if "macro_avg_at_k" in found:
            lines.append(f"{name}, mean of its sets: avg@k {_figure(found['macro_avg_at_k'])}")
    if samples > 1:
        best = ", ".join(
            f"{n} {_figure(found['best_at_k_bootstrap'])}" for n, found in sets.items()
        )
        label = f"best@{samples:.0f} with replacement"
        lines.append(f"{label}, for comparison with published numbers only: {best}")
    whole = sets[names[-1]]
    if whole["missing_frac"]:
        causes = [f"{k[8:]} {v:.0f}" for k, v in whole.items() if re.match("missing_(?!frac)", k)]
        lines.append(f"no verdict counts as not correct: {', '.join(causes) or 'no known cause'}")
    return lines


def _of(metrics: dict[str, float | None], name: str) -> dict[str, Any]:
    """The figures of a data set, not those of its parts."""
    prefix = f"eval/{name}/"
    own = {k.removeprefix(prefix): v for k, v in metrics.items() if k.startswith(prefix)}
    return {k: v for k, v in own.items() if "/" not in k}


def _figure(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"


def _interval(found: dict[str, Any], name: str) -> str:
    low, high = (found[f"{name}_{end}"] for end in ("low", "high"))
    return "unknown" if None in (low, high) else f"{low:.3f} – {high:.3f}"


def _trained(arguments: argparse.Namespace) -> Iterator["Trained"]:
    """What is evaluated, one after the other. Raises UserError where it is nothing."""
    from deltal_jax.model.huggingface import CONFIG as MODEL_CONFIG
    from deltal_jax.training import run_folder
    from deltal_jax.training.trained import load_pretrained, load_steps

    overrides, folder = parse_overrides(arguments.items), Path(arguments.run)
    of_run = (folder / run_folder.CONFIG).is_file()
    if arguments.config is not None:
        if of_run:
            raise UserError(f"--config: {folder} is a run, which has its own; leave it out")
        if arguments.step is not None:
            raise UserError("--step: only a run has steps; leave it out")
        yield load_pretrained(arguments.run, arguments.config, overrides)
        return
    if (folder / MODEL_CONFIG).is_file():
        raise UserError(f"--config: {folder} is a model; name the experiment that has its task")
    if folder.parent.name == run_folder.CHECKPOINTS:
        raise UserError(f"--step: name the run, {folder.parent.parent}, and its step")
    if not of_run:
        raise UserError(
            f"run.dir: {folder} is not a run folder (it has no {run_folder.CONFIG}), nor that of a "
            f"model (it has no {MODEL_CONFIG})"
        )
    yield from load_steps(folder, overrides, parse_steps(arguments.step))


def _folder(arguments: argparse.Namespace) -> Path | None:
    """Where the results go, if anywhere."""
    if arguments.to is not None:
        return Path(arguments.to)
    return None if arguments.config else Path(arguments.run) / EVALUATIONS


def _make(to: Path | None, field: str) -> None:
    """The folder of the results, before anything is sampled for them."""
    try:
        if to is not None:
            to.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{field}: cannot write to {to}: {error.strerror}") from error


def _write(to: Path, name: str, result: dict[str, Any], found: "Evaluation", rows: int) -> None:
    """`<name>.json` with the figures, beside the responses."""
    from deltal_jax.training.evaluate import write_samples

    write_samples(to, name, found, rows)
    text = json.dumps(result, indent=1, ensure_ascii=False)
    (to / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def _monotonicity(folder: Path) -> dict[str, float | None]:
    """Of the evaluations that the run itself made."""
    from deltal_jax.analysis.accuracy import monotonicity
    from deltal_jax.metrics import FILE_NAME, load_metrics

    path = folder / FILE_NAME
    return monotonicity(load_metrics(path)) if path.is_file() else {}
