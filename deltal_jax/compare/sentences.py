"""Findings in words: tables and sentences that follow from the figures by fixed rules.

"Better" and "worse" are said of a corrected p-value under the level alone, never of the order of
the means.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from deltal_jax.compare.directions import SAME, SAME_BUT
from deltal_jax.compare.endpoints import ENDPOINTS, OUTCOMES, PRIMARY

Found = dict[str, Any]
LABELS = {
    "area_by_tokens": "area by tokens",
    "area_by_updates": "area by updates",
    "area_by_seconds": "area by wall time",
    "final_avg_at_k": "final Avg@k",
    "final_pass_at_k": "final pass@k",
    "length_right": "length, right",
    "length_wrong": "length, wrong",
    "truncated_frac": "truncated",
    "length_ratio": "length p95/p5",
    "length": "length",
    "reward": "reward",
}
#: What a frozen checkpoint tells of a method.
MEASURED = {
    "cv": "CV",
    "bias_cosine": "bias cosine",
    "cosine": "cosine, disjoint",
    "true_cosine": "true cosine",
    "relative_variance": "relative variance",
    "mean_norm": "mean norm",
}
FROZEN_PLOT = "plots/frozen.svg"


def summary(found: Found) -> str:
    """The text to print: the primary endpoint, its verdicts, the controls."""
    parts = [_head(found), _primary_table(found), _verdicts(found)]
    if controls := _controls(found):
        parts += ["Controls:", controls]
    return "\n\n".join(part for part in parts if part)


def markdown(found: Found, plots: Sequence[str]) -> str:
    """The page of findings; `plots` are paths relative to it."""
    parts = [
        f"# Findings: {found['plan']['experiment']}",
        _head(found),
        "## Primary endpoint",
        _primary_table(found),
        _verdicts(found),
        *(f"![{plot}]({plot})" for plot in plots if plot != FROZEN_PLOT),
        *_frozen(found, plots),
        "## Methods that share a direction",
        _directions(found),
        "## Other endpoints",
        _other_endpoints(found),
        "## Outcomes",
        _outcomes(found),
    ]
    if found["exponents"]:
        parts += ["## Exponents", _exponents(found)]
    if controls := _controls(found):
        parts += ["## Controls", controls]
    return "\n\n".join([*parts, "## How", _how(found)]) + "\n"


def _head(found: Found) -> str:
    cells, (_, horizon) = found["cells"], found["spans"]["tokens"]
    lines = [
        f"{len(found['plan']['methods'])} methods, {cells['complete']} of {cells['planned']} cells;"
        f" Avg@{found['k']} on {found['problems']} problems; primary endpoint, fixed beforehand:"
        f" area under Avg@{found['k']} by generated tokens, to {horizon:,.0f} tokens, where"
        f" {found['shortest']} ends."
    ]
    if cells["missing"]:
        lines.append(
            f"Interim: {_several(cells['missing'])} missing; verdicts of unfinished comparisons,"
            " looked at repeatedly, are too often significant."
        )
    if len(found["environments"]) > 1:
        lines.append(f"The cells are of {len(found['environments'])} environments.")
    return "\n".join(lines)


def _primary_table(found: Found) -> str:
    rows = []
    for name in found["plan"]["methods"]:
        method, one = found["methods"].get(name), found["comparisons"].get(name)
        area = method["figures"][PRIMARY] if method else None
        rows.append(
            [
                name,
                str(len(method["seeds"])) if method else "0",
                _interval(area, "mean", "") if area else "–",
                *(_against(one) if one else ["reference", "", "", ""]),
            ]
        )
    against = f"against {found['plan']['reference']}"
    head = ["method", "runs", "area (95 %)", against, "p", "p (Holm)", "smallest detectable"]
    return _table(head, rows)


def _against(one: Found) -> list[str]:
    primary = one["endpoints"].get(PRIMARY)
    if primary is None:
        return ["–", "", "", ""]
    detectable = "–" if one["detectable"] is None else f"{one['detectable']:.3f}"
    return [
        _interval(primary, "difference", "+"),
        _p(primary["p"]),
        _p(primary["p_holm"]),
        detectable,
    ]


def _verdicts(found: Found) -> str:
    reference = found["plan"]["reference"]
    lines = [f"- {_verdict(name, reference, one)}" for name, one in found["comparisons"].items()]
    return "\n".join(lines)


def _verdict(name: str, reference: str, one: Found) -> str:
    """One comparison in a sentence: the verdict, what it rests on, what stands in its way."""
    said = f"**{name}** against {reference}: {one['verdict']}"
    if one["verdict"] == "no difference shown":
        said += f" (smallest detectable: {_detectable(one)})"
    if one.get("same_direction"):
        link = ", though" if one["verdict"] in ("better", "worse") else ";"
        said += f"{link} they share a direction (they {SAME_BUT})"
    if one["pairs"]:
        primary = one["endpoints"][PRIMARY]
        said += f"; {_interval(primary, 'difference', '+')}, Holm p {_p(primary['p_holm'])}"
        said += f", {_count(one['pairs'], 'pair')}"
    if one["pairs"] and not one["reachable"]:
        said += (
            f"; so few pairs cannot show one: the smallest possible Holm p is"
            f" {_p(one['smallest_p_holm'])}"
        )
    if one["mismatched"]:
        seeds = ", ".join(map(str, one["mismatched"]))
        said += f"; other first responses or warm-up in seed {seeds}"
    return said + "."


def _detectable(one: Found) -> str:
    if one["detectable"] is not None:
        return f"{one['detectable']:.3f}"
    if one["pairs_needed"] and one["pairs_needed"] > one["pairs"]:
        return f"none, {one['pairs_needed']} pairs are needed"
    return "none"


def _directions(found: Found) -> str:
    groups = found["directions"]["groups"]
    lines = [
        f"- {', '.join(group)}: same direction ({SAME_BUT}); a difference between them is no"
        " difference of direction."
        for group in groups
    ] or [f"No two methods have a cosine of {SAME} or more."]
    pairs = found["directions"]["coefficient_cosines"]
    cosines = {frozenset(pair["methods"]): pair["cosine"] for pair in pairs}
    names = list(found["methods"])
    rows = [
        [a, *("1" if a == b else _cosine(cosines[frozenset((a, b))]) for b in names)] for a in names
    ]
    note = (
        "Cosine of the coefficients w_i·A_i of the first batch, mean over seeds; not of gradients:"
    )
    return "\n\n".join(["\n".join(lines), note, _table(["", *names], rows)])


def _other_endpoints(found: Found) -> str:
    others = [name for name in ENDPOINTS if name != PRIMARY]
    rows = []
    for name, method in found["methods"].items():
        one = found["comparisons"].get(name, {"endpoints": {}})
        for at, endpoint in enumerate(others):
            figure = _interval(method["figures"][endpoint], "mean", "")
            difference = one["endpoints"].get(endpoint)
            tested = (
                [_interval(difference, "difference", "+"), _p(difference["p_holm"])]
                if difference
                else ["–", ""]
            )
            rows.append(["" if at else name, LABELS[endpoint], figure, *tested])
    note = "Holm's correction is over methods, not over endpoints: no verdicts."
    head = [
        "method",
        "endpoint",
        "mean (95 %)",
        f"against {found['plan']['reference']}",
        "p (Holm)",
    ]
    return f"{note}\n\n{_table(head, rows)}"


def _outcomes(found: Found) -> str:
    head = ["method", *(LABELS[name] for name in OUTCOMES), "tokens a run", "seconds a run"]
    rows = []
    for name, method in found["methods"].items():
        all_of = method["outcomes"]
        cells = [f"{_number(all_of[o]['first'])} → {_number(all_of[o]['last'])}" for o in OUTCOMES]
        totals = [_number(all_of[axis]["last"]) for axis in ("tokens", "seconds")]
        rows.append([name, *cells, *totals])
    note = "Means over runs, of the first and of the last tenth of the steps; lengths in tokens."
    return f"{note}\n\n{_table(head, rows)}"


def _frozen(found: Found, plots: Sequence[str]) -> list[str]:
    """What the methods' gradients are at the checkpoints that all cells start from."""
    if not found["frozen"]:
        return []
    lines, rows = [], []
    for one in found["frozen"]:
        betas = [f"of the {name} gradient {_beta(fit)}" for name, fit in one["beta"].items()]
        lines.append(
            f"- Warm-up {one['warmup']}: β of Var ∝ L^β {', '.join(betas)}; {one['groups']}"
            f" prompts, {one['responses']} responses, batches of {one['batch_groups']} prompts."
        )
        rows += [[str(one["warmup"]), row["name"], *_measured(row)] for row in one["methods"]]
    note = (
        "The same responses for all methods of a warm-up, so nothing here is of diverging paths;"
        " 95 % intervals leave out one prompt after the other. CV: noise to signal of one batch's"
        " gradient. Bias cosine: of its mean with the unweighted mean gradient of the same"
        " advantages; an estimate may exceed 1 by its error. Cosine, disjoint: of one batch with"
        " all prompts not in it; true cosine: with the true unweighted gradient. Relative variance:"
        " against ΔL α=1. Mean norm: ‖E ĝ‖, of weights of 1 in sum. Not resolvable: a mean is under"
        " the noise. An exponent that adapts has no value at a checkpoint: its row is 1/Var with"
        " the β fitted to these responses."
    )
    shown = [f"![{plot}]({plot})" for plot in plots if plot == FROZEN_PLOT]
    table = _table(["warm-up", "method", "measured as", *MEASURED.values()], rows)
    return ["## Frozen checkpoints", "\n".join(lines), table, note, *shown]


def _measured(row: Found) -> list[str]:
    if "reason" in row:
        return [f"not measured: {row['reason']}", *[""] * len(MEASURED)]
    return [row["row"], *(_figure(row, key) for key in MEASURED)]


def _figure(row: Found, key: str) -> str:
    if row[key] is None:
        return "not resolvable"
    ends = {end: row.get(f"{key}_{end}") for end in ("low", "high")}
    return _interval({"value": row[key], **ends}, "value", "")


def _beta(fit: Found | None) -> str:
    return "unknown" if fit is None else _interval(fit, "beta", "")


def _exponents(found: Found) -> str:
    rows = []
    for name, one in found["exponents"].items():
        beta, alpha = one["beta"], one["alpha"]
        rows.append(
            [
                name,
                "–" if beta is None else f"{beta['mean']:.2f} ({_range(beta)})",
                "–"
                if alpha is None
                else f"{alpha['first']:.2f} → {alpha['mean']:.2f} ({_range(alpha)})",
            ]
        )
    note = (
        "β̂ as training measured it, and the exponent that was used: the first, then the mean of"
        " the last 10 steps, with the range over runs. Along each method's own path, so no"
        " comparison."
    )
    return f"{note}\n\n{_table(['method', 'β̂', 'exponent'], rows)}"


def _range(one: Found) -> str:
    return f"{one['least']:.2f} – {one['most']:.2f}"


def _controls(found: Found) -> str:
    controls = found["controls"]
    lines = [f"- {_null(name, one)}{_expected(one)}" for name, one in controls["null"].items()]
    lines += [f"- {_seeds(name, one)}{_expected(one)}" for name, one in controls["seeds"].items()]
    if (rate := controls["false_positives"])["pairs"] > 1:
        lines.append(
            f"- {rate['significant']} of {rate['pairs']} pairs of equal methods with other seeds"
            f" have p < {rate['level']}."
        )
    for name, one in controls["pairs"].items():
        lines.append(f"- {_verdict(name, one['of'], one)}{_expected(one)}")
    lines += [f"- {line}" for line in _sweeps(controls["lr"])]
    return "\n".join(lines)


def _null(name: str, one: Found) -> str:
    said = f"**{name}** computes the same as {one['of']}: "
    if not one["pairs"]:
        return f"{said}no pair yet."
    if one["first_difference_step"] is None:
        seen = "no difference at any step"
    else:
        seen = (
            f"largest difference of accuracy {one['largest_accuracy_difference']:.2g}, of reward"
            f" {one['largest_reward_difference']:.2g}, none before step"
            f" {one['first_difference_step']}"
        )
    seen += f"; p {_p(one['p'])}, {_count(one['pairs'], 'pair')}"
    if one["bug"]:
        return f"{said}BUG: equal methods differ; {seen}."
    return f"{said}{seen}; no win may be claimed."


def _seeds(name: str, one: Found) -> str:
    said = f"**{name}**, {one['of']} with other seeds: "
    if one["p"] is None:
        return f"{said}no runs to compare yet."
    seen = "a false positive" if one["significant"] else "no difference shown"
    runs = " and ".join(map(str, one["runs"]))
    return (
        f"{said}{seen}; difference {one['difference']:+.3f}, unpaired p {_p(one['p'])}"
        f" (smallest possible {_p(one['smallest_p'])}), {runs} runs."
    )


def _sweeps(found: Found) -> Iterable[str]:
    for of, sweep in found["sweeps"].items():
        low, high = (sweep["rates"][sweep[end]] for end in ("lowest", "highest"))
        expected = [found["expect"].get(name) for name in sweep["rates"]]
        expect = "; ".join(dict.fromkeys(text for text in expected if text))
        yield (
            f"**{of}** by learning rate, {_count(len(sweep['seeds']), 'run')} each: highest"
            f" {sweep['highest']} {_interval(high, 'mean', '')}, lowest {sweep['lowest']}"
            f" {_interval(low, 'mean', '')}.{_expected({'expect': expect})}"
        )
    for of, one in found["at_highest"].items():
        yield (
            f"{of} at its highest learning rate, selected on the problems of the evaluation and so"
            f" optimistic: {_verdict(one['chosen'], one['against'], one)}"
        )


def _how(found: Found) -> str:
    settings = found["settings"]
    return (
        "A training run is the unit of replication. Intervals: 95 %, of one figure each,"
        f" {settings['resamples']} bootstrap resamples of seeds × problems. p: two-sided sign-flip"
        f" permutation test over pairs of one seed, exact up to {settings['exact_pairs']} pairs,"
        f" else {settings['permutations']} permutations; Holm's correction over all methods of the"
        f" plan; better and worse: Holm p < {settings['alpha']}. Smallest detectable: the"
        " difference that this test would find at Holm's first step with a power of"
        f" {settings['power']}, if differences are normal and vary as those seen. No checkpoint is"
        " selected on the problems of the evaluation: curves count as a whole, and the last"
        f" evaluation as it is. deltal-jax {found['version']}; settings and all figures:"
        " findings.json."
    )


def _expected(one: Found) -> str:
    return f" Expected: {one['expect'].rstrip('.')}." if one["expect"] else ""


def _interval(one: Found, key: str, sign: str) -> str:
    if one["low"] is None:
        return f"{one[key]:{sign}.3f}"
    return f"{one[key]:{sign}.3f} [{one['low']:{sign}.3f}, {one['high']:{sign}.3f}]"


def _p(p: float) -> str:
    return f"{p:.2g}"


def _cosine(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"


def _several(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) < 4 else f"{len(names)} cells"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown that reads as text too: columns padded to their width."""
    widths = [max(3, *(len(row[at]) for row in (head, *rows))) for at in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    )
