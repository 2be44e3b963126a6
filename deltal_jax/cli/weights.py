"""Print the weights of every aggregation, and what they mean, for your own lengths: no training."""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deltal_jax.errors import UserError

#: The largest length of a file, and the range of exponents.
LARGEST_LENGTH = 2**31 - 1
EXPONENTS = (-1.0, 3.0)
#: The largest batch whose weights are printed too.
PRINTED = 20
FIELDS = ("lengths", "advantages", "group_ids")
COLUMNS = {
    "bias_factor": "Σw·M",
    "predicted_cv": "CV",
    "ess": "ESS",
    "weight_shortest_decile": "shortest",
    "weight_longest_decile": "longest",
    "zero_advantage_weight": "A = 0",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "file",
        metavar="FILE",
        help="JSON: a list of lengths (trained tokens a response), or an object with lengths and "
        "perhaps advantages and group_ids; - reads standard input",
    )
    parser.add_argument(
        "--alpha",
        action="append",
        metavar="A[,A…]",
        help="exponents of delta_l, repeatable (write --alpha=-1 for a negative one); "
        "default: 0.75,1",
    )
    parser.add_argument("--normalizer", metavar="M", help="default: the largest length of the file")
    parser.add_argument(
        "--beta", default="1", metavar="B", help="Var(g_i) ∝ L_i^B, for the CV; default: 1"
    )
    parser.add_argument(
        "--microbatch-size", metavar="N", help="also show local_token_mean, N responses at a time"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")


def run(arguments: argparse.Namespace) -> int:
    """Print the table; the exit code."""
    name = "standard input" if arguments.file == "-" else arguments.file
    batch = _parse(name, _load(arguments.file, name))
    lengths = batch["lengths"]
    given = arguments.normalizer is not None
    normalizer = _number("--normalizer", arguments.normalizer) if given else float(max(lengths))
    if normalizer <= 0:
        raise UserError(f"--normalizer: must be above 0, got {normalizer:g}")
    beta = _number("--beta", arguments.beta, *EXPONENTS)
    texts = ",".join(arguments.alpha or ["0.75,1"]).split(",")
    alphas = list(dict.fromkeys(_number("--alpha", text, *EXPONENTS) for text in texts))
    size = arguments.microbatch_size
    if size is not None and re.fullmatch(r"[1-9]\d{0,8}", size) is None:
        raise UserError(f"--microbatch-size: expected a whole number in 1 … 999999999, got {size}")
    rows = _weigh(batch, alphas, normalizer, beta, None if size is None else int(size))
    origin = "given" if given else "the largest length"
    if arguments.json:
        head = {"responses": len(lengths), "normalizer": normalizer, "normalizer_is": origin}
        print(json.dumps(head | {"beta": beta, "methods": rows}, ensure_ascii=False))
    else:
        where = "" if given else "; set it with --normalizer"
        print(f"{len(lengths)} responses, M = {normalizer:g} ({origin}{where}), β = {beta:g}")
        _print_tables(lengths, rows)
    return 0


def _load(file: str, name: str) -> Any:
    try:
        raw = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{name}: no such file; name one that holds a JSON list") from None
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})") from None
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        raise UserError(f"{name}: not JSON; expected a list such as [312, 87, 1024]") from None


def _parse(name: str, found: Any) -> dict[str, list]:
    """Lists of one size, by field; every error names the field and the fix."""
    fields = {"lengths": found} if isinstance(found, list) else found
    if not isinstance(fields, dict):
        raise UserError(f"{name}: expected a list of lengths, or an object with {FIELDS[0]!r}")
    for field in fields:
        if field not in FIELDS:
            raise UserError(f"{name}: no field {field!r}; the fields are {', '.join(FIELDS)}")
    if "lengths" not in fields:
        raise UserError(f"{name}: lengths: missing; give the trained tokens of each response")
    for field, values in fields.items():
        if not isinstance(values, list):
            raise UserError(f"{name}: {field}: expected a list, got {_shown(values)}")
    size = len(fields["lengths"])
    for field, values in fields.items():
        if len(values) != size:
            raise UserError(
                f"{name}: {field}: has {len(values)} values for {size} lengths; give one a response"
            )
        check, wanted = CHECKS[field]
        for i, value in enumerate(values):
            if isinstance(value, bool) or not isinstance(value, int | float) or not check(value):
                raise UserError(f"{name}: {field}[{i}]: expected {wanted}, got {_shown(value)}")
    if not any(fields["lengths"]):
        raise UserError(f"{name}: lengths: no response has a token; give at least one above 0")
    return fields


def _is_whole(value: float) -> bool:
    return isinstance(value, int) or value.is_integer()


CHECKS: dict[str, tuple[Callable[[float], bool], str]] = {
    "lengths": (
        lambda value: 0 <= value <= LARGEST_LENGTH and _is_whole(value),
        f"a whole number in 0 … {LARGEST_LENGTH}",
    ),
    "advantages": (lambda value: abs(value) <= sys.float_info.max, "a finite number"),
    "group_ids": (lambda value: abs(value) < 2**63 and _is_whole(value), "a whole number"),
}


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}…"


def _number(option: str, text: str, low: float = -math.inf, high: float = math.inf) -> float:
    try:
        value = float(text)
    except ValueError:
        raise UserError(f"{option}: expected a number, got {text!r}") from None
    if not math.isfinite(value):
        raise UserError(f"{option}: must be finite, got {text}")
    if not low <= value <= high:
        raise UserError(f"{option}: must be in {low:g} … {high:g}, got {text}")
    return value


def _weigh(
    batch: dict[str, list],
    alphas: list[float],
    normalizer: float,
    beta: float,
    microbatch_size: int | None,
) -> list[dict[str, Any]]:
    """One row a method: its name, its option, the meters and the weights, in float64."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from deltal_jax.objective.aggregation import AGGREGATIONS
    from deltal_jax.objective.diagnostics import aggregation_diagnostics

    methods: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("delta_l", {"alpha": alpha}, {"normalizer": normalizer}) for alpha in alphas
    ]
    methods += [
        ("inverse_variance", {"variance": {"beta": beta}}, {"normalizer": normalizer}),
        ("constant_length", {}, {"normalizer": normalizer}),
        ("sequence_mean", {}, {}),
        ("token_mean", {}, {}),
    ]
    with jax.enable_x64(True):
        lengths = jnp.asarray(batch["lengths"], int)
        advantages = jnp.asarray(batch.get("advantages", np.ones(len(lengths))), float)
        if "group_ids" in batch:
            groups = np.unique(np.asarray(batch["group_ids"], int), return_inverse=True)[1]
            methods.append(("prompt_mean", {}, {"group_ids": jnp.asarray(groups)}))
        if microbatch_size is not None:
            ids = jnp.arange(len(lengths)) // microbatch_size
            methods.append(("local_token_mean", {}, {"microbatch_ids": ids}))
        if "advantages" in batch:
            methods.append(("balanced", {}, {"advantages": advantages}))
        methods += [("sequence_sum", {}, {}), ("token_sum", {}, {})]
        rows = []
        for name, shown, hidden in methods:
            weights = AGGREGATIONS[name](lengths, **shown, **hidden)
            meters = aggregation_diagnostics(
                weights, lengths, advantages, normalizer=normalizer, beta=beta
            )
            wanted = [key for key in COLUMNS if key in meters]
            if "advantages" not in batch:
                wanted.remove("zero_advantage_weight")
            figures = {key: float(meters[key]) for key in wanted}
            rows.append({"method": name, **shown, **figures, "weights": weights.tolist()})
    return rows


def _label(row: dict[str, Any]) -> str:
    if "alpha" in row:
        return f"{row['method']} {row['alpha']:g}"
    return f"{row['method']} {row['variance']['beta']:g}" if "variance" in row else row["method"]


def _print_tables(lengths: list[int], rows: list[dict[str, Any]]) -> None:
    keys = [key for key in COLUMNS if key in rows[0]]
    print(f"\n{'':20}{''.join(f'{COLUMNS[key]:>12}' for key in keys)}")
    for row in rows:
        print(f"{_label(row):20}{''.join(f'{row[key]:>12.4g}' for key in keys)}")
    print("\nCV in units of √V/‖∇J‖; shortest, longest: share of the weight on that tenth of them")
    if len(lengths) > PRINTED:
        print(f"the weights themselves: add --json (printed here up to {PRINTED} responses)")
        return
    widths = [max(len(_label(row)), 9) + 2 for row in rows]
    titles = (f"{_label(row):>{width}}" for row, width in zip(rows, widths, strict=True))
    print(f"\n{'length':>10}{''.join(titles)}")
    for i, length in enumerate(lengths):
        cells = (f"{r['weights'][i]:>{width}.4g}" for r, width in zip(rows, widths, strict=True))
        print(f"{length:>10}{''.join(cells)}")
