"""Methods measured at the checkpoints that cells start from: on one batch, resumable, in words."""

import json
import math

import pytest

from deltal_jax.analysis import paired
from deltal_jax.compare.findings import find, load_frozen, write_findings
from deltal_jax.compare.plan import load_plan
from deltal_jax.compare.runner import Comparison
from deltal_jax.compare.sentences import markdown
from deltal_jax.errors import UserError
from deltal_jax.progress import ProgressDisplay
from tests import runs
from tests.cells import STEPS, make_cell, make_plan, write_cells

METHODS = {
    "delta-l": {},
    "scaled": {"objective.normalizer": 3.0},
    "half": {"objective.alpha": 0.5},
    "grpo": {"objective.aggregation": "sequence_mean"},
    "dapo": {"objective.aggregation": "token_mean"},
    "beta": {"objective.alpha": "beta"},
    "by-group": {"objective.scope": "group"},
    "hot": {"rollout.temperature": 1.5},
    "shuffled": {"weights": "permuted"},
    "smaller": {"rl.prompts_per_step": 2},
}
PLAN = {
    "experiment": "countdown-tiny",
    "set": runs.TINY | {"task.rewards": [f"{runs.__file__}:mixed_reward"], "rl.steps": 1},
    "seeds": [0],
    "methods": METHODS,
    "frozen": {"groups": 12},
}
ENDS = ("", "_low", "_high")
FIGURES = ("cv", "bias_cosine", "cosine", "true_cosine", "relative_variance")


def comparison(folder, **changes):
    path = folder.parent / "trial.yaml"
    path.write_text(json.dumps(PLAN))
    plan = load_plan(path, changes)
    return Comparison(plan, folder, ProgressDisplay(quiet=True), "deltal compare trial.yaml")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a warm-up and its measurement, no cell."""
    study = comparison(tmp_path_factory.mktemp("frozen") / "study")
    study._open()
    study._measure(0)
    return study


@pytest.fixture(scope="module")
def measured(whole):
    (found,) = load_frozen(whole.folder)
    return found


def close(value):
    """To rounding; None, which is not resolvable, is itself."""
    return None if value is None else pytest.approx(value, rel=1e-4)


def test_a_method_has_the_figures_that_the_laboratory_gives_its_aggregation(measured):
    """One from scores times the method's own advantages, the other from gradients of the loss."""
    rows = {row["name"]: row for row in measured["methods"]}
    theirs = {row["name"]: row for row in measured["aggregations"]}
    assert list(rows) == list(METHODS)
    beta = measured["gradients"]["advantage"]["fit"]["beta"]
    same = {
        "delta-l": "ΔL α=1",
        "half": "ΔL α=0.5",
        "grpo": "GRPO (sequence_mean)",
        "dapo": "DAPO (token_mean)",
        "beta": f"1/Var, β={beta:.2f}",
    }
    for name, other in same.items():
        for figure in ("variance", *FIGURES):
            assert rows[name][figure] == close(theirs[other][figure])
    assert rows["beta"]["row"] == f"1/Var, β={beta:.2f}; group_standardize"
    for figure in FIGURES:  # a factor of the weights changes nothing
        assert rows["scaled"][figure] == close(rows["delta-l"][figure])
    assert rows["by-group"]["variance"] != pytest.approx(rows["delta-l"]["variance"], rel=1e-3)
    assert rows["hot"]["reason"] == "its responses are sampled, chosen or rewarded otherwise"
    assert rows["shuffled"]["reason"] == "its weights are permuted"
    assert rows["smaller"]["reason"] == "its batches have another size"


def test_it_is_made_once_by_one_process_and_anew_for_other_methods(whole):
    path = whole.folder / "frozen" / "warmup-0.json"
    before = path.read_bytes()
    assert whole._unmeasured() == []
    path.unlink()
    with whole._claimed("frozen-0"):
        comparison(whole.folder)._measure(0)
    assert not path.exists()
    whole._measure(0)
    assert path.read_bytes() == before
    fewer = {name: METHODS[name] for name in ("delta-l", "dapo")}
    assert comparison(whole.folder, methods=fewer)._unmeasured() == [0]
    assert comparison(whole.folder, frozen=None)._unmeasured() == []
    path.write_text("{")
    with pytest.raises(UserError, match=f"^{path}: empty or damaged; delete it$"):
        comparison(whole.folder)._unmeasured()
    path.write_bytes(before)


def test_cells_do_not_know_whether_it_is_measured(whole):
    assert comparison(whole.folder, frozen=None)._fingerprints == whole._fingerprints


@pytest.mark.parametrize(
    ("frozen", "said"),
    [
        ({"groups": 7}, "frozen.groups: 7 are fewer than 8, what two batches of rl.prompts_per"),
        ({"groups": "x"}, "frozen: expected {groups: N}, or null, got {'groups': 'x'}"),
        ({"prompts": 9}, "frozen: expected {groups: N}, or null, got {'prompts': 9}"),
        (9, "frozen: expected {groups: N}, or null, got 9"),
    ],
)
def test_what_is_refused(tmp_path, frozen, said):
    path = tmp_path / "trial.yaml"
    path.write_text(json.dumps(PLAN | {"frozen": frozen}))
    with pytest.raises(UserError) as refused:
        load_plan(path)
    assert str(refused.value).startswith(said) and "\n" not in str(refused.value)


def test_a_plan_written_keeps_it(tmp_path):
    path = tmp_path / "trial.yaml"
    path.write_text(json.dumps(PLAN))
    plan = load_plan(path)
    path.write_text(plan.dump())
    assert load_plan(path) == plan and plan.frozen == 12
    assert load_plan(path, {"frozen": None}).frozen is None


def test_findings_have_a_table_by_warm_up_a_plot_and_the_same_bytes(
    tmp_path, measured, monkeypatch
):
    monkeypatch.setattr(paired, "RESAMPLES", 20)  # of intervals that are not looked at
    names = list(METHODS)
    plan = make_plan({name: {"set": {}} for name in names}, [0, 1]) | {"frozen": {"groups": 12}}
    cells = {name: {s: make_cell(name, s) for s in (0, 1)} for name in names}
    write_cells(tmp_path, plan, cells)
    (tmp_path / "frozen").mkdir()
    unresolved = [
        row | dict.fromkeys(row.keys() & {"cv", "cv_low", "cv_high"}) for row in measured["methods"]
    ]
    for number, rows in ((0, measured["methods"]), (1, unresolved)):
        one = measured | {"warmup": number, "methods": rows}
        (tmp_path / "frozen" / f"warmup-{number}.json").write_text(json.dumps(one))
    write_findings(tmp_path)
    files = ("findings.json", "findings.md", "plots/frozen.svg")
    before = [(tmp_path / name).read_bytes() for name in files]
    write_findings(tmp_path)
    assert [(tmp_path / name).read_bytes() for name in files] == before
    page = before[1].decode()
    lines = [x for x in page.splitlines() if x.startswith(("| 0 ", "| 1 "))]
    assert len(lines) == 2 * len(names)
    for line, row in zip(lines, [*measured["methods"], *unresolved], strict=True):
        if "reason" in row:
            assert f"not measured: {row['reason']}" in line
            continue
        told = [x.strip() for x in line.split("|")]
        cv, variance = ([row[f"{x}{end}"] for end in ENDS] for x in ("cv", "relative_variance"))
        assert told[8] == "{:.3f} [{:.3f}, {:.3f}]".format(*variance)
        assert (told[4] == "not resolvable") == (cv[0] is None)
        assert told[4].startswith("not" if cv[0] is None else f"{cv[0]:.3f}")
    fit = measured["gradients"]["score"]["fit"]
    assert f"Warm-up 1: β of Var ∝ L^β of the score gradient {fit['beta']:.3f}" in page
    assert page.count("plots/frozen.svg") == 2  # of one picture
    (tmp_path / "frozen" / "warmup-1.json").write_text("{}")
    with pytest.raises(UserError, match=r"no measurement of format 1; delete it$"):
        write_findings(tmp_path)


def test_exponents_that_were_measured_or_moved_are_said():
    plan = make_plan({"fixed": {"set": {}}, "follows": {"set": {}}}, [0, 1])
    cells = {name: {s: make_cell(name, s) for s in (0, 1)} for name in plan["methods"]}
    for seed, cell in cells["follows"].items():
        cell["train"]["variance/beta"] = [None] * (STEPS - 4) + [1.2 + 0.2 * seed] * 4
        cell["train"]["aggregation/alpha"] = [1.0] * 10 + [1.1 + 0.2 * seed] * 10
        cells["fixed"][seed]["train"]["aggregation/alpha"] = [1.0] * STEPS
    found = find(cells, plan)
    assert list(found["exponents"]) == ["follows"]
    one = found["exponents"]["follows"]
    assert math.isclose(one["beta"]["mean"], 1.3) and one["alpha"]["first"] == 1.0
    page = markdown(found, [])
    assert "| follows | 1.30 (1.20 – 1.40) | 1.00 → 1.20 (1.10 – 1.30) |" in page
    assert "## Frozen checkpoints" not in page
