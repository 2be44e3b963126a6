"""`deltal`: parse, dispatch, and turn errors into one line and an exit code."""

import argparse
import os
import sys

from deltal_jax import __version__
from deltal_jax.cli import (
    bench,
    compare,
    configs,
    debug,
    evaluate,
    export,
    plan,
    prepare,
    report,
    sample,
    train,
    variance,
    weights,
)
from deltal_jax.errors import UserError

COMMANDS = {
    "train": train,
    "evaluate": evaluate,
    "compare": compare,
    "sample": sample,
    "report": report,
    "export": export,
    "prepare": prepare,
    "variance": variance,
    "plan": plan,
    "weights": weights,
    "bench": bench,
    "debug": debug,
    "configs": configs,
}

EPILOG = """\
examples:
  deltal train countdown-tiny                        run an experiment that comes with the package
  deltal train my.yaml rl.steps=200 seed=1           any field can be set as key.sub=value
  deltal train my.yaml --dry-run                     check everything, compile nothing
  deltal train run.dir=runs/x --resume               go on from the newest checkpoint
  deltal sample runs/x "7 1 5 -> 40"                 ask a trained model one problem
  deltal report runs/x runs/y                        one page about both, to look at or to send
  deltal plan my.yaml --topology v5e:8x8             does it fit there, how fast can it be
  deltal weights lengths.json --alpha 0.5,1          every aggregation's weights for your lengths

exit codes: 0 done, 1 the run failed, 2 bad input (one line says which field and what to do)
"""


def make_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="deltal",
        description="Train language models with verifiable rewards, under ΔL Normalization.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"deltal-jax {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").strip().split("\n")[0]
        command = commands.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code."""
    parser = make_parser()
    parsed, rest = parser.parse_known_args(arguments)
    # argparse takes no positional after an option; `train NAME --json rl.steps=3` should work.
    if len(rest) == 1 and getattr(parsed, "problem", "") is None and not rest[0].startswith("-"):
        parsed.problem = rest.pop()
    if rest and (not hasattr(parsed, "items") or any(item.startswith("-") for item in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        parsed.items += rest
    try:
        return COMMANDS[parsed.command].run(parsed)
    except UserError as error:
        print(f"deltal: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("deltal: stopped", file=sys.stderr)
        return 130
    except ArithmeticError as error:
        print(f"deltal: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
