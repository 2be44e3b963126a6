"""The guide of metrics is complete and true: a line for each metric of the code, and none for what
no run writes."""

import ast
import dataclasses
import functools
import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import deltal_jax
from deltal_jax.analysis.guide import GUIDE, find_entry, load_guide, matching
from deltal_jax.cli.main import main
from deltal_jax.config import Config
from deltal_jax.objective.diagnostics import aggregation_diagnostics
from deltal_jax.objective.surrogate import ratio_diagnostics
from deltal_jax.tasks.base import Verdict
from deltal_jax.tasks.grading import MISSING, Grades
from deltal_jax.training.evaluate import accuracy_metrics

PACKAGE = Path(deltal_jax.__file__).parent
#: Packages whose code makes metrics of a run.
MAKERS = ("guard", "objective", "rollout", "tasks", "training")


def literal(node: ast.expr) -> str | None:
    """A metric's name as the code spells it, each part that it fills in as `<>`."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    texts = [p.value if isinstance(p, ast.Constant) else "<>" for p in parts]
    if not all(isinstance(text, str) for text in texts):
        return None
    name = "".join(map(str, texts))
    return name if re.fullmatch(r"[a-z]+/[a-z0-9_/<>]{2,}", name) else None


def literals() -> set[str]:
    """Names that are keys of a dictionary in the code that runs a training."""
    found: set[str | None] = set()
    for package in MAKERS:
        for path in (PACKAGE / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Dict):
                    found |= {literal(key) for key in node.keys if key is not None}
                elif isinstance(node, ast.DictComp):
                    found.add(literal(node.key))
                elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
                    found.add(literal(node.slice))
    return {name for name in found if name is not None}


def figures() -> set[str]:
    """Of an evaluation of 4 responses to each of 2 problems, every cause of a missing verdict among
    them."""
    verdicts = [Verdict(None, False, "", missing=cause) for cause in MISSING[1:]]
    verdicts += [Verdict(1.0, True, "", "a")] * 5
    rewards = np.asarray([np.nan if v.missing else 1.0 for v in verdicts])
    correct = np.asarray([v.correct for v in verdicts])
    return set(accuracy_metrics(Grades(rewards, correct, verdicts, {}), ["p", "q"]))


def filled() -> dict[str, set[str]]:
    """What the code puts into the names that it makes."""
    one = jnp.ones(1)
    ratios = set(ratio_diagnostics(one, one, one, clip_low=0.2, clip_high=0.2)) - {"ratio"}
    weights = aggregation_diagnostics(one, one, one, normalizer=1.0)
    # `evaluate` adds the last two beside those of `accuracy_metrics`.
    evaluation = figures() | {"length", "truncated_frac"}
    return {
        "aggregation/<>": {f"aggregation/{name}" for name in weights},
        "advantage/<>": {f"advantage/{name}" for name in ("mean", "min", "max")},
        "policy/<>": {f"policy/{name}" for name in ratios},
        "reward/<>/mean": {"reward/<part>/mean"},
        "reward/missing_<>": {f"reward/missing_{cause}" for cause in MISSING[1:]},
        "eval/<>/<>": {f"eval/countdown/{name}" for name in evaluation},
        "eval/<>/macro_<>": {f"eval/math/x/macro_{name}" for name in ("avg_at_k", "pass_at_k")},
    }


@functools.cache
def of_the_code() -> set[str]:
    """Every name that a run may write."""
    names, fills = literals(), filled()
    templates = {name for name in names if "<>" in name}
    assert templates == fills.keys(), "say in `filled` what the code puts into a new name"
    return (names - templates).union(*fills.values())


def test_every_metric_of_the_code_has_a_line():
    """Those that a run writes are checked beside it: tests/test_doctor.py."""
    names = of_the_code()
    assert {"policy/kl", "policy/clip_frac_dual", "optim/lr", "sft/loss"} <= names
    assert len(names) > 90
    assert not [name for name in sorted(names) if find_entry(name) is None]


def test_every_line_is_of_a_metric_that_exists():
    names = of_the_code()
    assert not [x.name for x in load_guide() if not any(map(x.describes, names))]


def test_a_metric_without_a_line_and_a_line_without_a_metric_are_found():
    assert find_entry("policy/vigour") is None and find_entry("eval/countdown/vigour") is None
    (entry,) = matching("policy/entropy")
    old = dataclasses.replace(entry, name="policy/vigour")
    assert not any(map(old.describes, of_the_code()))


def test_a_form_describes_its_own_and_no_other():
    cases = {
        "eval/math/MATH500/avg_at_k": "eval/<data set>/avg_at_k",
        "eval/math/pass_at_k": "eval/<data set>/pass_at_k",
        "eval/math/pass_at_16": "eval/<data set>/pass_at_<j>",
        "eval/math/macro_avg_at_k": "eval/<data set>/macro_avg_at_k",
        "reward/overlong/mean": "reward/<part>/mean",
        "reward/mean": "reward/mean",
        "reward/missing": "reward/missing",
        "reward/missing_timeout": "reward/missing_<cause>",
    }
    for metric, name in cases.items():
        assert [entry.name for entry in load_guide() if entry.describes(metric)] == [name]


def test_every_line_is_whole_and_names_fields_that_exist():
    names = [entry.name for entry in load_guide()]
    assert len(names) == len(set(names)) > 90
    assert all(all(dataclasses.astuple(entry)) for entry in load_guide())
    text = GUIDE.read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert sum(len(re.findall("`[^`]+`", row.split(" | ")[0])) for row in rows) == len(names)
    fields = set(re.findall(r"`([a-z_]+(?:\.[a-z_0-9]+)+)(?:=[^`]*)?`", text))
    unknown = {field for field in fields if not exists(field)}
    assert fields and unknown == {"metrics.jsonl"}


def exists(field: str) -> bool:
    """Whether a config has it."""
    section = Config()
    for part in field.split("."):
        if part not in {f.name for f in dataclasses.fields(section)}:
            return False
        section = getattr(section, part)
    return True


def test_metrics_that_the_text_speaks_of_have_lines():
    text = GUIDE.read_text(encoding="utf-8")
    spoken = {n for n in re.findall(r"`([a-z]+/[^`]+)`", text) if not n.startswith("samples")}
    names = {entry.name for entry in load_guide()}
    assert {name for name in spoken if name not in names} == {"time/…"}


def test_the_command_prints_a_line_each(capsys):
    assert main(["debug", "metrics"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(load_guide())
    assert main(["debug", "metrics", "eval/countdown/avg_at_k", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["name"] == "eval/<data set>/avg_at_k" and "rises" in found["health"]
    assert main(["debug", "metrics", "clip_frac"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in out] == [
        f"policy/clip_frac_{which}" for which in ("high", "low", "dual")
    ]
    assert main(["debug", "metrics", "polcy/entropy"]) == 2
    assert capsys.readouterr().err == (
        "deltal: NAME: no metric has 'polcy/entropy' in its name; did you mean 'policy/entropy'?\n"
    )
