"""Findings of synthetic cells whose truth is known: noise is no win, an effect is one."""

import json
import math
import re

import numpy as np
import pytest

from deltal_jax.analysis import paired
from deltal_jax.compare.findings import find, load_cells, load_plan, write_findings
from deltal_jax.compare.sentences import markdown, summary
from deltal_jax.errors import UserError
from tests.cells import EVERY, PROBLEMS, STEPS, K, make_cell, make_plan, write_cells

SEEDS = list(range(8))
THREE = {"delta-l": {"set": {}}, "grpo": {"set": {}}, "dr-grpo": {"set": {}}}


def cells_of(effects, seeds=SEEDS, **options):
    return {
        method: {seed: make_cell(method, seed, effect, **options) for seed in seeds}
        for method, effect in effects.items()
    }


def verdicts(found):
    return {name: one["verdict"] for name, one in found["comparisons"].items()}


@pytest.fixture
def quick(monkeypatch):
    """Intervals of few resamples, where only verdicts are looked at."""
    monkeypatch.setattr(paired, "RESAMPLES", 20)


@pytest.fixture(scope="module")
def study():
    """Every kind of control once, and methods that are better, worse, parallel to the reference and
    none of these."""
    methods = {name: {"set": {}} for name in ("delta-l", "grpo", "dr-grpo", "good")}
    other = list(range(100, 108))
    controls = {
        "null-grpo": {"set": {}},
        "null": {"of": "null-grpo", "kind": "null", "expect": "equal to rounding."},
        "broken": {"of": "delta-l", "kind": "null"},
        "again": {"of": "delta-l", "kind": "seeds", "seeds": other},
        "and-again": {"of": "delta-l", "kind": "seeds", "seeds": [seed + 100 for seed in other]},
        "permuted": {"weights": "permuted", "expect": "no better than delta-l"},
        "sgd": {"of": "good", "kind": "sgd"},
        "lr-low": {"of": "delta-l", "kind": "lr", "expect": "less"},
        "grpo-lr-high": {"of": "grpo", "kind": "lr"},
    }
    effects = {"delta-l": 0, "grpo": 0, "dr-grpo": -0.2, "good": 0.2}
    cells = {
        name: {
            s: make_cell(name, s, effect, coefficients=name in ("delta-l", "grpo")) for s in SEEDS
        }
        for name, effect in effects.items()
    }
    # GRPO's weights are those of ΔL but for a factor.
    for cell in cells["grpo"].values():
        cell["first_batch"]["weights"] = [3 * w for w in cell["first_batch"]["weights"]]
    changed = {"broken": 0.2, "sgd": -0.1, "lr-low": -0.2, "grpo-lr-high": 0.2}
    for name, entry in controls.items():
        stream = "null" if name.startswith("null") else None
        cells[name] = {
            seed: make_cell(name, seed, changed.get(name, 0.0), stream=stream)
            for seed in entry.get("seeds", SEEDS)
        }
    return make_plan(methods, SEEDS, controls), cells


@pytest.fixture(scope="module")
def found(study):
    plan, cells = study
    return find(cells, plan)


def test_noise_is_seldom_called_a_difference(quick):
    """Two methods without effect in 60 worlds: the family is wrong in at most 5 % of them, and the
    page never says what the figures do not."""
    wrong = 0
    for world in range(60):
        found = find(cells_of(dict.fromkeys(THREE, 0.0), world=world), make_plan(THREE, SEEDS))
        claims = set(verdicts(found).values()) - {"no difference shown"}
        wrong += bool(claims)
        said = re.search(r"\b(better|worse|best|wins?)\b", summary(found))
        assert bool(said) == bool(claims)
    assert wrong / 60 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 60)


def test_an_effect_is_found_and_has_the_right_sign(found):
    assert verdicts(found) == {
        "grpo": "no difference shown",
        "dr-grpo": "worse",
        "good": "better",
    }
    primary = found["comparisons"]["good"]["endpoints"]["area_by_tokens"]
    assert primary["low"] < 0.1 < primary["high"]  # half of what it gains at the end
    assert primary["p"] == 2 / 2**8
    assert primary["p_holm"] == pytest.approx(3 * 2 / 2**8, rel=1e-5)
    page = markdown(found, [])
    assert "**good** against delta-l: better; +0." in page
    assert "**dr-grpo** against delta-l: worse; -0." in page
    assert re.search(r"\*\*grpo\*\* .*: no difference shown \(smallest detectable: 0\.0", page)


def test_the_figures_by_hand(study, found):
    """The area is the trapezoid of Avg@k up to where the shortest cell ends."""
    _, cells = study
    methods = ("delta-l", "grpo", "dr-grpo", "good")
    horizon = min(cells[m][s]["evaluations"][-1]["tokens"] for m in methods for s in SEEDS)
    areas = {}
    for method in methods:
        areas[method] = []
        for seed in SEEDS:
            evaluations = cells[method][seed]["evaluations"]
            x = np.array([one["tokens"] for one in evaluations], float)
            y = np.array([one["avg_at_k"] for one in evaluations])
            at = np.array([*x[x < horizon], horizon])
            areas[method].append(np.trapezoid(np.interp(at, x, y), at) / horizon)
    for method in methods:
        figure = found["methods"][method]["figures"]["area_by_tokens"]
        assert figure["mean"] == pytest.approx(np.mean(areas[method]), rel=1e-5)
    differences = np.subtract(areas["good"], areas["delta-l"])
    one = found["comparisons"]["good"]
    assert one["endpoints"]["area_by_tokens"]["difference"] == pytest.approx(
        differences.mean(), rel=1e-5
    )
    effect = paired.detectable_effect(8, 0.05 / 3)
    assert one["detectable"] == pytest.approx(effect * differences.std(ddof=1), rel=1e-5)
    last = [cell["evaluations"][-1] for cell in cells["good"].values()]
    final = found["methods"]["good"]["figures"]
    for name in ("avg_at_k", "pass_at_k"):
        expected = np.mean([one[name] for one in last])
        assert final[f"final_{name}"]["mean"] == pytest.approx(expected, rel=1e-5)
    assert found["spans"] == {
        "tokens": [0.0, horizon],
        "updates": [0.0, STEPS],
        "seconds": [0.0, 2 * STEPS],
    }


def test_parallel_coefficients_are_one_direction(found):
    assert found["directions"]["groups"] == [["delta-l", "grpo"], ["dr-grpo", "good"]]
    assert found["comparisons"]["grpo"]["same_direction"]
    assert not found["comparisons"]["good"]["same_direction"]
    cosines = {tuple(c["methods"]): c["cosine"] for c in found["directions"]["coefficient_cosines"]}
    assert cosines["delta-l", "grpo"] == pytest.approx(1)
    lengths = [make_cell("", s)["first_batch"]["lengths"] for s in SEEDS]
    by_hand = [np.sum(1 / np.array(x)) / math.sqrt(16 * np.sum(1 / np.square(x))) for x in lengths]
    assert cosines["delta-l", "good"] == pytest.approx(np.mean(by_hand), rel=1e-5)


def test_an_exponent_that_moves_shares_no_direction(quick):
    cells = cells_of({"delta-l": 0.0, "grpo": 0.0})
    for cell in cells["grpo"].values():
        cell["train"]["aggregation/alpha"] = [1.0] * 8 + [1.25] * 12
    found = find(cells, make_plan({"delta-l": {}, "grpo": {}}, SEEDS))
    assert found["directions"]["groups"] == []
    assert found["directions"]["coefficient_cosines"][0]["cosine"] == pytest.approx(1)


def test_a_win_in_the_same_direction_says_so(quick):
    cells = cells_of({"delta-l": 0.0, "grpo": 0.3})
    found = find(cells, make_plan({"delta-l": {}, "grpo": {}}, SEEDS))
    assert "**grpo** against delta-l: better, though they share a direction" in summary(found)


def test_outcomes_are_those_of_the_first_and_the_last_steps(found):
    """A tenth of 20 steps is two; no right answer at the first."""
    outcomes = found["methods"]["good"]["outcomes"]
    assert outcomes["length_right"] == {"first": 78, "last": 80 - (STEPS - 0.5)}
    assert outcomes["length_wrong"] == {"first": 118.5, "last": 120 - (STEPS - 0.5)}
    assert outcomes["length_ratio"]["last"] == pytest.approx((250 + STEPS - 0.5) / 10, rel=1e-5)


def test_equal_controls_are_equal_and_a_difference_is_a_bug(found):
    null, broken = (found["controls"]["null"][name] for name in ("null", "broken"))
    assert (null["first_difference_step"], null["largest_accuracy_difference"]) == (None, 0)
    assert not null["bug"]
    assert broken["bug"]
    assert broken["first_difference_step"] == 2  # rewards, one update after the first step
    said = summary(found)
    assert "**null** computes the same as null-grpo: no difference at any step" in said
    assert "no win may be claimed. Expected: equal to rounding." in said
    assert "BUG: equal methods differ; largest difference of accuracy 0." in said
    assert "null-grpo" not in found["controls"]["pairs"]


def test_equal_methods_that_differ_before_the_first_update_are_a_bug(quick):
    """However small: nothing but rounding can differ then."""
    cells = cells_of({"a": 0.0, "b": 0.0}, stream="one")
    plan = make_plan({"a": {}}, SEEDS, {"b": {"kind": "null"}})
    assert not find(cells, plan)["controls"]["null"]["b"]["bug"]
    cells["b"][0]["train"]["reward/mean"][3] += 0.01  # a token flipped
    later = find(cells, plan)["controls"]["null"]["b"]
    assert (later["bug"], later["first_difference_step"]) == (False, 4)
    assert later["largest_reward_difference"] == pytest.approx(0.01)
    cells["b"][3]["train"]["reward/mean"][0] += 0.01
    assert find(cells, plan)["controls"]["null"]["b"]["bug"]


def test_new_seeds_are_unpaired_and_counted(found):
    seeds, rate = found["controls"]["seeds"], found["controls"]["false_positives"]
    assert [seeds[name]["runs"] for name in seeds] == [[8, 8], [8, 8]]
    assert all(one["p"] > 0.05 for one in seeds.values())
    assert rate["pairs"] == 3  # of three groups of runs of one method
    assert "of 3 pairs of equal methods" in summary(found)


def test_runs_of_a_method_are_not_compared_with_themselves(quick):
    cells = cells_of({"a": 0.0, "b": 0.0}, SEEDS)
    plan = make_plan({"a": {}}, SEEDS[:5], {"b": {"kind": "seeds", "seeds": SEEDS[3:]}})
    assert find(cells, plan)["controls"]["seeds"]["b"]["runs"] == [3, 5]


def test_controls_of_any_kind_are_a_family_of_their_own(found):
    pairs = found["controls"]["pairs"]
    assert {name: one["of"] for name, one in pairs.items()} == {
        "permuted": "delta-l",
        "sgd": "good",
    }
    assert pairs["sgd"]["verdict"] == "worse"
    assert pairs["sgd"]["smallest_p_holm"] == 2 * 2 / 2**8
    assert "Expected: no better than delta-l." in summary(found)


def test_learning_rates_are_compared_at_each_methods_highest(found):
    lr = found["controls"]["lr"]
    ends = {of: (one["highest"], one["lowest"]) for of, one in lr["sweeps"].items()}
    assert ends == {"delta-l": ("delta-l", "lr-low"), "grpo": ("grpo-lr-high", "grpo")}
    assert lr["at_highest"]["grpo"]["verdict"] == "better"
    said = summary(found)
    assert "selected on the problems of the evaluation and so optimistic" in said
    assert "**grpo-lr-high** against delta-l: better, though they share a direction" in said


@pytest.mark.parametrize(("count", "least"), [(3, 0.5), (6, 0.0625)])
def test_few_pairs_show_nothing_and_say_so(quick, count, least):
    """Whatever the effect: six pairs have p = 0.031, which is no verdict in a family of two."""
    seeds = SEEDS[:count]
    found = find(cells_of({"delta-l": 0, "grpo": 5.0}, seeds), make_plan(THREE, seeds))
    one = found["comparisons"]["grpo"]
    assert (one["verdict"], one["reachable"]) == ("no difference shown", False)
    # Dr. GRPO has no cell, and counts: the family is that of the plan.
    assert one["smallest_p_holm"] == least == 2 * one["endpoints"]["area_by_tokens"]["p"]
    assert verdicts(found)["dr-grpo"] == "no pair yet"
    said = summary(found)
    assert "(smallest detectable: none, 7 pairs are needed)" in said
    assert "so few pairs cannot show one: the smallest possible Holm p is 0." in said


def test_incomplete_pairs_are_left_out_and_counted(quick):
    cells = cells_of({"delta-l": 0, "grpo": 0.3, "dr-grpo": 0.0})
    del cells["grpo"][3], cells["delta-l"][5]
    found = find(cells, make_plan(THREE, SEEDS))
    assert found["comparisons"]["grpo"]["seeds"] == [0, 1, 2, 4, 6, 7]
    assert found["comparisons"]["dr-grpo"]["pairs"] == 7
    assert found["cells"]["missing"] == ["delta-l/seed-5", "grpo/seed-3"]
    assert "22 of 24 cells" in summary(found)
    assert "Interim: delta-l/seed-5, grpo/seed-3 missing" in summary(found)


def test_pairs_that_start_apart_are_named(quick):
    cells = cells_of({"delta-l": 0, "grpo": 0})
    cells["grpo"][2]["warmup"] = 9
    cells["grpo"][4]["first_batch"]["lengths"][0] += 1
    found = find(cells, make_plan({"delta-l": {}, "grpo": {}}, SEEDS))
    assert found["comparisons"]["grpo"]["mismatched"] == [2, 4]
    assert "other first responses or warm-up in seed 2, 4" in summary(found)


def test_findings_are_written_the_same_twice(study, found, tmp_path):
    plan, cells = study
    folder = write_cells(tmp_path, plan, cells)
    said = write_findings(folder)
    names = ["findings.json", "findings.md", "plots/accuracy.svg", "plots/areas.svg"]
    names.append("plots/outcomes.svg")
    first = [(folder / name).read_bytes() for name in names]
    assert write_findings(folder) == said
    assert [(folder / name).read_bytes() for name in names] == first
    assert json.loads(first[0]) == found
    assert found["settings"]["alpha"] == 0.05
    assert all(f"]({name})" in first[1].decode() for name in names[2:])
    for plot in first[2:]:
        assert len(plot) < 100_000
        assert b"delta-l" in plot


def test_a_short_entry_of_a_plan_is_its_set(tmp_path):
    plan = make_plan({"a": {"objective.alpha": 1}, "b": None}, [0], {"c": {"kind": None}})
    folder = write_cells(tmp_path, plan, {})
    found = load_plan(folder)
    assert found["methods"] == {"a": {"set": {"objective.alpha": 1}}, "b": {"set": {}}}
    assert found["controls"] == {"c": {"kind": "null"}}  # as `kind: null` is read


def test_bad_folders_are_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"plan.yaml: no comparison's plan; run"):
        load_plan(tmp_path)
    for text in ("[]", "experiment: x"):
        (tmp_path / "plan.yaml").write_text(text)
        with pytest.raises(UserError, match=r"plan.yaml: no comparison's plan; delete it"):
            load_plan(tmp_path)
    folder = write_cells(tmp_path, make_plan({"a": {}}, [0]), {"a": {0: make_cell("a", 0)}})
    path = folder / "cells" / "a" / "seed-0.json"
    (path.parent / "seed-1.json").write_text("{")  # of another plan
    assert load_cells(folder, load_plan(folder))["a"].keys() == {0}
    for text in ('{"format": 1', '{"format": 2}', "[]"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"seed-0.json: .*; delete it and run it again"):
            load_cells(folder, load_plan(folder))


def test_what_cannot_be_compared_is_refused_in_one_line():
    cells = cells_of({"a": 0.0, "b": 0.0}, [0, 1])
    with pytest.raises(UserError, match=r"controls.b.of: no method or control 'x'"):
        find(cells, make_plan({"a": {}}, [0, 1], {"b": {"of": "x"}}))
    with pytest.raises(UserError, match="cells: none of a method yet"):
        find({}, make_plan({"a": {}}, [0]))
    for evaluation in cells["b"][1]["evaluations"]:
        evaluation["correct"].append(0)
    with pytest.raises(UserError, match=r"cells/b/seed-1.json: evaluated on other problems"):
        find(cells, make_plan({"a": {}, "b": {}}, [0, 1]))
    cells["b"][1]["evaluations"] = make_cell("b", 1)["evaluations"][:2]
    found = find(cells, make_plan({"a": {}, "b": {}}, [0, 1]))
    assert found["shortest"] == "b/seed-1"
    assert found["spans"]["updates"] == [0, EVERY]
    assert (found["k"], found["problems"]) == (K, PROBLEMS)
    del cells["a"][0]["evaluations"][0]
    with pytest.raises(UserError, match=r"no stretch of \w+ that all have in common"):
        find(cells, make_plan({"a": {}, "b": {}}, [0, 1]))
