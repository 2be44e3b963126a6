"""Evaluate the newest checkpoint of a run on held-out problems."""

import argparse
import json
from pathlib import Path

from deltal_jax.cli.options import check_seed
from deltal_jax.config import parse_overrides


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument(
        "items",
        nargs="*",
        metavar="key.sub=value",
        help="such as evaluate.samples_per_problem=8 or evaluate.temperature=0",
    )
    parser.add_argument(
        "--seed", type=int, default=None, help="sample anew; default: the run's own"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")


def run(arguments: argparse.Namespace) -> int:
    """Evaluate; the exit code."""
    import jax

    from deltal_jax.analysis.statistics import wilson_interval
    from deltal_jax.training.evaluate import evaluate
    from deltal_jax.training.setup import make_local_engine
    from deltal_jax.training.trained import load_trained

    if arguments.seed is not None:
        check_seed(arguments.seed)
    trained = load_trained(Path(arguments.run), parse_overrides(arguments.items))
    config = trained.setup.config.evaluate
    key = trained.key if arguments.seed is None else jax.random.key(arguments.seed)
    engine = make_local_engine(trained.setup, temperature=config.temperature)
    metrics = evaluate(trained.setup, engine, trained.params, key).metrics
    if arguments.json:
        print(json.dumps({"run": arguments.run, "step": trained.position.step} | metrics))
        return 0
    print(f"{arguments.run}, {trained.position.phase} step {trained.position.step}")
    for name, value in metrics.items():
        print(f"  {name:36}{value:>10.4g}")
    prefix = f"eval/{trained.setup.task.name}"
    low, high = wilson_interval(
        metrics[f"{prefix}/avg_at_k"], metrics[f"{prefix}/problems"] * metrics[f"{prefix}/k"]
    )
    print(f"  {'avg_at_k, 95 % interval':36}{low:>10.3f} – {high:.3f}")
    return 0
