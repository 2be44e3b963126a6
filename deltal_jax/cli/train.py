"""Run an experiment: warm-up, reinforcement learning, evaluation, report."""

import argparse
import json
import os
import re
import sys

from deltal_jax.cli.options import add_config, split_items
from deltal_jax.config import load_config
from deltal_jax.errors import UserError
from deltal_jax.guard import signals, supervise


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_config(parser)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint of run.dir, or of the newest run of CONFIG",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="resolve and validate, print batch arithmetic and memory, stop before any compile",
    )
    parser.add_argument(
        "--profile", metavar="START:STOP", help="write a jax.profiler trace of these RL steps"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")


def run(arguments: argparse.Namespace) -> int:
    """Train; the exit code."""
    names, overrides = split_items(arguments.items)
    if len(names) > 1:
        raise UserError(f"expected one config, got {' and '.join(names)}")
    name = names[0] if names else None
    if name is None and not arguments.resume:
        raise UserError("config: name an experiment, such as countdown-tiny; see `deltal configs`")
    profile = _parse_profile(arguments.profile)
    if arguments.dry_run and arguments.resume:
        raise UserError("--dry-run: checks a new run; leave out --resume")
    if arguments.dry_run:
        return _dry_run(name, overrides, as_json=arguments.json)

    stopped = signals.stopped_code()
    if supervise.wanted():
        return supervise.supervise(
            [sys.executable, "-m", "deltal_jax.cli.main", *_again(arguments)]
        )
    supervise.follow_parent()
    if arguments.json and supervise.CHILD in os.environ:
        _keep_stdout()
    with signals.listening(at_once=True):
        from deltal_jax.parallel.processes import PeerError, is_first
        from deltal_jax.training.loop import train

        try:
            result = train(name, overrides, resume=arguments.resume, profile=profile)
        except PeerError as error:
            print(f"deltal: {error}", file=sys.stderr)
            return 1
    code = stopped if result.status == "interrupted" else 0
    if not is_first():
        return code
    if arguments.json:
        print(json.dumps(result.as_dict()))
    elif result.status == "done" or result.after:
        _print_table(result)
    return code


def _keep_stdout() -> None:
    """Have all that writes to standard output without asking Python, as Gloo does, write to
    standard error."""
    sys.stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)


def _again(arguments: argparse.Namespace) -> list[str]:
    """The command line that says the same."""
    given = ["train", *arguments.items]
    given += [f"--{name}" for name in ("resume", "json") if getattr(arguments, name)]
    return given + (["--profile", arguments.profile] if arguments.profile else [])


def _parse_profile(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None or not 1 <= int(match.group(1)) <= int(match.group(2)):
        raise UserError(f"--profile: {text!r} is not START:STOP with 1 ≤ START ≤ STOP, such as 3:5")
    return int(match.group(1)), int(match.group(2))


def _dry_run(name: str | None, overrides: dict, *, as_json: bool) -> int:
    from deltal_jax.config import config_files, dump_config
    from deltal_jax.training.describe import (
        batch_arithmetic,
        describe_model,
        describe_sampling,
        describe_task,
        formula,
        memory_estimate,
    )
    from deltal_jax.training.plan import make_plan
    from deltal_jax.training.run_folder import check_run_folder

    if name is None:
        raise UserError("config: --dry-run needs an experiment")
    config = load_config(name, overrides)
    check_run_folder(config)
    plan = make_plan(config)
    config = plan.config
    files = [str(file) for file in config_files(name)]
    counts = batch_arithmetic(config)
    memory = memory_estimate(config, plan.architecture, plan.mesh)
    if as_json:
        facts = {"files": files, "notes": plan.notes, "formula": formula(config)}
        print(json.dumps(facts | {"batch": counts, "memory_bytes": memory}, ensure_ascii=False))
        return 0
    print("# " + "\n#   over ".join(reversed(files)))
    print(dump_config(config))
    for note in plan.notes:
        print(note, end="\n\n")
    print(f"{describe_model(config, plan.architecture, plan.mesh)}\n")
    if plan.task is not None and (found := describe_task(plan.task)):
        print(found, end="\n\n")
    print(formula(config), end="\n\n")
    if sampling := describe_sampling(config):
        print(sampling, end="\n\n")
    for key, value in counts.items():
        print(f"{key.replace('_', ' '):32}{value:>14,}")
    print()
    for key, value in memory.items():
        print(f"{'memory, ' + key.replace('_', ' '):32}{value / 2**20:>14,.1f} MiB")
    return 0


def _print_table(result) -> None:
    step = result.after.get("step", 0)
    now = f"now (step {step})" if result.status == "done" else f"last evaluation (step {step})"
    width = max(18, len(now) + 2)
    print(f"\n{'':24}{'warm-up':>16}{now:>{width}}")
    rows = (("accuracy (avg@k)", "avg_at_k"), ("pass@k", "pass_at_k"), ("length", "length"))
    for label, key in (*rows, ("truncated", "truncated_frac")):
        if key in result.before:
            figures = (
                f"{r[key]:.1f}" if key == "length" else f"{r[key]:.3f}" for r in both(result)
            )
            print(f"{label:24}{next(figures):>16}{next(figures):>{width}}")
    if result.after:
        ends = [[r.get(f"avg_at_k_{end}") for end in ("low", "high")] for r in both(result)]
        shown = ["unknown" if None in pair else "{:.3f} – {:.3f}".format(*pair) for pair in ends]
        print(f"{'95 % interval':24}{shown[0]:>16}{shown[1]:>{width}}")
    for name, order in result.monotonicity.items():
        if order is not None:
            label = f"monotonicity, {name}"
            print(f"{label:24} {order:>{max(15 + width - max(len(label) - 24, 0), 6)}.3f}")
    print(f"\nwall time  {result.seconds:.0f} s\nrun        {result.run_dir}")
    if result.report is not None:
        print(f"report     {result.report}")


def both(result) -> tuple[dict[str, float], dict[str, float]]:
    """The evaluations before and after RL."""
    return result.before, result.after
