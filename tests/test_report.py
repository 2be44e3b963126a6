"""The report of a run: what it says, what it must survive, and what it must never contain."""

import json
import math
import os
import pathlib
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from deltal_jax.metrics import load_metrics
from deltal_jax.report import page as report
from deltal_jax.report import reading
from deltal_jax.report.distributions import weight_against_length

ROOT = pathlib.Path(__file__).parents[1]
HOSTILE = '<script>alert("x")</script>\n<img src="https://evil.test/a.png"> & \x1b[31m \ud800 done'


class Page(HTMLParser):
    """A parsed page: its tags with their attributes, its text, and the text of every <pre>."""

    def __init__(self, path: pathlib.Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.pres, self.open = "", [], []
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)
        if tag == "pre":
            self.pres.append("")

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if "pre" in self.open:
            self.pres[-1] += data
        if "style" not in self.open:
            self.text += data

    def attributes(self, name: str) -> list[str]:
        return [attrs[name] or "" for _, attrs in self.tags if name in attrs]

    def count(self, tag: str) -> int:
        return sum(found == tag for found, _ in self.tags)

    def titles(self) -> list[str]:
        return re.findall("<h3>(.*?)</h3>", self.source)


#: Metrics of a step that only some configs have.
EXTRA = {
    "variance/beta": 1.2,
    "variance/beta_low": 1.0,
    "variance/beta_high": 1.4,
    "variance/cv": 2.0,
    "variance/cv_predicted": 1.5,
    "bias/cosine": 0.97,
    "aggregation/alpha": 0.75,
    "optim/clipped_frac": 0.5,
    "optim/below_eps_frac": 0.01,
    "rollout/staleness": 1.0,
    "overlap/update_idle": 0.2,
    "overlap/rollout_idle": 0.1,
}


def rl_line(step: int, **metrics: float | None) -> dict:
    values = {
        "reward/mean": 0.1 * step,
        "accuracy/mean": 0.05 * step,
        "reward/frac_zero_std": 0.25,
        "length/p5": 10.0,
        "length/p50": 100.0 + step,
        "length/p95": 300.0,
        "length/correct_mean": 90.0,
        "length/wrong_mean": None if step == 1 else 150.0,
        "length/truncated_frac": 0.0,
        "policy/entropy": 1.0 / step,
        "optim/grad_norm": 5.0 * step,
        "aggregation/ess": 8.0,
        "aggregation/weight_min": 0.01,
        "aggregation/weight_max": 0.1,
        "rollout/utilization": 0.9,
        "time/rollout": 30.0,
        "time/update": 20.0,
    }
    return {"step": step, "phase": "rl", **values, **metrics}


def eval_line(step: int, accuracy: float, task: str = "countdown") -> dict:
    bounds = {"avg_at_k_low": accuracy - 0.05, "avg_at_k_high": accuracy + 0.05}
    values = {"avg_at_k": accuracy, "pass_at_k": 0.9, "k": 4, "problems": 25} | bounds
    metrics = {f"eval/{task}/{name}": value for name, value in values.items()}
    return {"step": step, "phase": "eval", **metrics}


def write_metrics(folder: pathlib.Path, lines: list[dict], tail: str = "") -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + tail, encoding="utf-8")


def write_samples(folder: pathlib.Path, step: int, rows: list[dict]) -> None:
    path = folder / "samples" / f"step-{step:06d}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_json(folder: pathlib.Path, name: str, step: int, value: dict) -> None:
    path = folder / name / f"step-{step:06d}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def rollout_record(step: int) -> dict:
    """What training writes of a batch: 8 responses under ΔL with α = 0.75 and M = 40."""
    lengths = np.array([5, 8, 8, 12, 20, 21, 30, 40]) + step
    weights = lengths**-0.75 / np.sum(lengths**-0.75) / 40
    each = {"reward": 1.0, "advantage": 1.5, "weight": float(weights[0]), "length": 5 + step}
    text = {"prompt": "2 + 2?", "response": HOSTILE, "answer": {"is": 4}, "truncated": True}
    return {
        "step": step,
        "lengths": lengths.tolist(),
        "rewards": [1.0, 0.0, None, 0.0, 1.0, 0.0, 0.0, 1.0],
        "advantages": [1.5, -0.5, 0.0, -0.5, 1.0, -1.0, -1.0, 1.0],
        "weights": weights.tolist(),
        "truncated": [False] * 7 + [True],
        "samples": [text | each, text | each | {"advantage": -0.5}],
    }


def variance_record(step: int) -> dict:
    """What `deltal variance` writes, with exponents that are seen in the page."""

    def fit(beta: float) -> dict:
        ends = {"low": beta - 0.1, "high": beta + 0.1}
        return {"beta": beta, "scale": 2.0, "r2": 0.9} | ends

    def gradient(beta: float) -> dict:
        bins = [
            {"length": x, "low": x, "high": x, "count": 9, "variance": 2.0 * x**beta}
            | {"second_moment": 3.0 * x**beta, "mean_norm": None}
            for x in (5.0, 10.0, 20.0, 40.0)
        ]
        kinds = {kind: fit(beta) for kind in ("q", "mlp")}
        heat = [
            {"layer": layer, "kind": kind} | fit(beta + layer / 10)
            for layer in (0, 1)
            for kind in kinds
        ]
        heat.append({"layer": None, "kind": "head"} | fit(beta - 0.9))
        layers = {"0": fit(beta), "1": fit(beta + 0.1)}
        return {"bins": bins, "fit": fit(beta), "layers": layers, "kinds": kinds, "heat": heat}

    found = {"name": "ΔL α=1", "aggregation": "delta_l", "alpha": 1.0, "bias_cosine": None}
    gradients = {"score": gradient(1.0), "advantage": gradient(0.6)}
    settings = {"run": "x", "step": step, "responses": 36, "groups": 9, "counted": 35}
    settings["settings"] = {"min_length": 5, "drop_truncated": True}
    other = {"variance": 0.25, "cv": 3.0, "cosine": 0.5}
    return settings | {"gradients": gradients, "aggregations": [found | other]}


def sample(response: str, **fields) -> dict:
    row = {"prompt": "2 + 2?", "response": response, "answer": "4", "reward": 1.0}
    return row | {"correct": True, "length": 7, "truncated": False} | fields


def fill_run(folder: pathlib.Path) -> None:
    config = "run:\n  name: small <run>\nseed: 3\nrl:\n  steps: 5\nobjective:\n"
    config += "  aggregation: delta_l\n  alpha: 0.75\n"
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    summary = {"formula": "Σ w_i < S_i", "environment": {"jax": "0.10.2"}, "started": "noon"}
    summary["warnings"] = ["RL step 3: update 1: loss < nan"]
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    lines = [{"step": step, "phase": "sft", "sft/loss": 3.0 / step} for step in (1, 2, 3)]
    lines += [eval_line(0, 0.125), rl_line(1, **EXTRA), rl_line(2, **EXTRA), eval_line(2, 0.5)]
    write_metrics(folder, lines, tail='{"step": 3, "pha')
    for step in (1, 2):
        write_json(folder, "rollouts", step, rollout_record(step))
    write_json(folder, "variance", 2, variance_record(2))
    write_samples(folder, 0, [sample("old")])
    write_samples(folder, 2, [sample(HOSTILE, correct=False, truncated=True, reward=None)])


#: Every plot there is, in the order of the page.
PLOTS = """Held-out accuracy, Held-out problems solved, Reward, Response length, Lengths over time,
Truncated responses, Groups without a signal, Entropy, Warm-up loss, Weights, Weight against length,
Effective sample size, Variance exponent, Variance against length, Variation of the gradient,
Direction of the gradient, Gradient norm, What the optimizer changes, Rollout utilization,
Idle time, Staleness, Seconds a step""".replace("\n", " ").split(", ")
TABLES = ["Variance exponents by layer", "Aggregations on the same responses"]
#: Those of other files than metrics.jsonl.
OF_FILES = ["Lengths over time", "Weight against length", "Variance against length"]


@pytest.fixture(scope="module")
def full_run(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("run")
    fill_run(folder)
    report.write_report(folder)
    return folder


@pytest.fixture(scope="module")
def page(full_run) -> Page:
    return Page(full_run / "report.html")


def test_load_metrics_leaves_out_a_torn_last_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"name": "\xce')
    assert load_metrics(path) == [{"step": 1}, {"step": 2}]
    path.write_bytes(b'{"step": 1}\n{"step": 2}')  # whole, only its newline is missing
    assert load_metrics(path) == [{"step": 1}, {"step": 2}]
    path.write_bytes(b"")
    assert load_metrics(path) == []


def test_load_metrics_warns_of_a_torn_line_inside(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st{"step": 2}\n[3]\n{"step": 4}\n', encoding="utf-8")
    with pytest.warns(UserWarning, match="line [23]: not a JSON object") as caught:
        assert load_metrics(path) == [{"step": 1}, {"step": 4}]
    assert len(caught) == 2


def test_load_metrics_splits_at_newlines_only(tmp_path):
    rows = [{"text": "a\u2028b\x85c\u000bd"}, {"text": "e"}]
    path = tmp_path / "metrics.jsonl"
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(text, encoding="utf-8")
    assert load_metrics(path) == rows


def test_missing_files_raise(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_metrics(tmp_path / "metrics.jsonl")
    with pytest.raises(FileNotFoundError):
        report.write_report(tmp_path / "nothing")


def test_headline_states_the_run(page):
    assert "12.5% → 50.0%" in page.text
    assert "before RL: 95% interval 7.5% to 17.5%" in page.text
    assert "step 2: 95% interval 45.0% to 55.0%" in page.text
    assert "bootstrap over distinct problems" in page.text
    assert "monotonicity 0" not in page.text  # two evaluations have none
    assert "RL steps done2of 5 planned" in page.text
    assert "Wall time0:01:40" in page.text
    assert "Median length102tokens, at the last RL step; 101 at the first" in page.text


def test_name_formula_summary_and_config_are_shown(page):
    assert page.text.count("small <run>") == 3  # title, heading, configuration
    assert page.pres[0] == "Σ w_i < S_i"
    assert "environment.jax0.10.2" in page.text and "startednoon" in page.text
    assert "WarningsRL step 3: update 1: loss < nan" in page.text
    assert "seed 3" in page.text and "objective.alpha 0.75" in page.text
    assert page.pres[-1].startswith("run:\n  name: small <run>")
    assert page.count("details") == 1


def test_sections_are_in_order(page):
    names = ["small", "Accuracy, countdown", "Loss", "Learning", "Weights and", "Speed"]
    names += ["Trained responses of step 2", "Held-out samples at step 2", "config.yaml"]
    places = [page.source.index(name, page.source.index("<body>")) for name in names]
    assert places == sorted(places)


def test_every_plot_has_its_card(page):
    speed = PLOTS.index("Rollout utilization")
    assert page.titles() == PLOTS[:speed] + TABLES + PLOTS[speed:]
    assert page.count("svg") == page.count("figcaption") == len(PLOTS)
    assert "rollout 1.0 min" in page.text and "update 0.7 min" in page.text


def test_model_text_is_shown_and_never_interpreted(page):
    assert page.count("script") == page.count("img") == 0
    shown = HOSTILE.replace("\x1b", "␛").replace("\ud800", "?")
    assert shown in page.pres
    assert '<tr class="wrong"><td class="mark">wrong<br>truncated</td>' in page.source
    assert "old" not in page.pres  # a sample of an earlier evaluation


def test_nothing_is_fetched(page):
    links = page.attributes("src") + page.attributes("href") + page.attributes("xlink:href")
    assert links and all(link.startswith("#") for link in links)
    assert page.count("link") == page.count("iframe") == 0
    assert not re.search(r"@import|url\((?!#)", page.source)
    harmless = page.source.replace("https://evil.test/a.png", "")
    assert "http://" not in harmless and "https://" not in harmless
    policy = [attrs["content"] for _, attrs in page.tags if "http-equiv" in attrs]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_ids_are_unique_and_references_meet(page):
    ids = page.attributes("id")
    assert len(ids) == len(set(ids)) > len(PLOTS)
    wanted = set(re.findall(r"url\(#([^)]+)\)", page.source))
    wanted |= {link.removeprefix("#") for link in page.attributes("href")}
    assert wanted == set(ids)


def test_figures_take_the_theme_of_the_page(page):
    figures = page.source[page.source.index("<figure>") :]
    assert "currentColor" in figures and "var(--c0)" in figures
    assert not re.search(r"(fill|stroke): #", figures)  # no colour that only one theme can show
    assert figures.count("<style") == 0  # it would apply to the whole page
    assert 'name="viewport"' in page.source and "prefers-color-scheme:dark" in page.source


def test_same_run_gives_the_same_bytes(full_run):
    before = (full_run / "report.html").read_bytes()
    code = "import pathlib, sys; from deltal_jax.report import page as report; "
    code += "assert 'matplotlib' not in sys.modules; report.write_report(pathlib.Path(sys.argv[1]))"
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, str(full_run)], check=True, env=environment)
    assert (full_run / "report.html").read_bytes() == before


def test_settings_of_the_user_neither_change_nor_are_changed(full_run):
    import matplotlib

    before = (full_run / "report.html").read_bytes()
    with matplotlib.rc_context({"lines.linewidth": 9.0, "axes.facecolor": "red"}):
        assert report.write_report(full_run).read_bytes() == before
        assert matplotlib.rcParams["lines.linewidth"] == 9.0


def test_empty_run(tmp_path):
    path = report.write_report(tmp_path)
    assert path == tmp_path / "report.html"
    page = Page(path)
    assert page.count("svg") == page.count("table") == 0
    assert tmp_path.name in page.text and "RL steps done0" in page.text


def test_unreadable_files_do_not_stop_the_report(tmp_path):
    (tmp_path / "config.yaml").write_text("run: {name: [", encoding="utf-8")
    (tmp_path / "summary.json").write_text('{"formula": "x', encoding="utf-8")
    write_metrics(tmp_path, [], tail='{"st')
    write_samples(tmp_path, 5, [])
    page = Page(report.write_report(tmp_path))
    assert "run: {name: [" in page.pres  # shown as it is
    assert page.count("svg") == 0 and "samples at" not in page.text


def test_warm_up_only(tmp_path):
    write_metrics(tmp_path, [{"step": 1, "phase": "sft", "sft/loss": 2.5}])
    page = Page(report.write_report(tmp_path))
    assert page.titles() == ["Warm-up loss"]
    assert "bootstrap" not in page.text


def test_one_point_of_everything(tmp_path):
    write_metrics(tmp_path, [eval_line(0, 0.25), rl_line(1, **EXTRA)])
    page = Page(report.write_report(tmp_path))
    assert set(page.titles()) == set(PLOTS) - {"Warm-up loss", *OF_FILES}
    assert "25.0%" in page.text and "→" not in page.text


def test_accuracy_without_counts_has_no_interval(tmp_path):
    line = {"step": 40, "phase": "eval", "eval/a/b/avg_at_k": 0.5, "eval/c/avg_at_k": None}
    write_metrics(tmp_path, [line])
    page = Page(report.write_report(tmp_path))
    assert "Accuracy, a/b50.0%step 40: 95% interval unknown" in page.text
    assert "Accuracy, c" not in page.text and "nan" not in page.text


def test_monotonicity_is_that_of_the_evaluations(tmp_path):
    accuracies = [0.1, 0.3, 0.2, 0.4]
    write_metrics(tmp_path, [eval_line(20 * i, value) for i, value in enumerate(accuracies)])
    page = Page(report.write_report(tmp_path))
    assert "monotonicity 0.80, over 4 evaluations" in page.text


def test_resumed_run_counts_a_step_once_but_its_time_twice(tmp_path):
    again = rl_line(2, **{"length/p50": 55.0})
    write_metrics(tmp_path, [rl_line(1), rl_line(2), again])
    page = Page(report.write_report(tmp_path))
    assert "Median length55" in page.text and "RL steps done2" in page.text
    assert "Wall time0:02:30" in page.text  # 3 lines of 50 s


def test_tasks_of_one_step_may_be_on_several_lines(tmp_path):
    tasks = ["b", "e<f", "a", "d", "c", "a-1"]
    lines = [eval_line(0, 0.1 + 0.1 * index, task) for index, task in enumerate(tasks)]
    write_metrics(tmp_path, lines)
    page = Page(report.write_report(tmp_path))
    shown = re.findall(r"Accuracy, (.+?)(\d0\.0%)", page.text)
    expected = [(task, f"{index + 1}0.0%") for index, task in enumerate(tasks)]
    assert shown == sorted(expected)


def test_values_that_are_not_finite_are_reported(tmp_path):
    bad = {"optim/grad_norm": math.inf, "policy/entropy": math.nan, "length/p50": "many"}
    write_metrics(tmp_path, [rl_line(1), rl_line(2, **bad), rl_line(3, **bad)])
    page = Page(report.write_report(tmp_path))
    assert "Not finite, not drawn: optim/grad_norm (2 times)." in page.text
    assert "Not finite, not drawn: policy/entropy (2 times)." in page.text
    assert "Gradient norm" in page.titles() and "Median length101" in page.text


def test_gradient_norm_is_logarithmic_only_over_a_wide_range(tmp_path):
    narrow = [rl_line(step, **{"optim/grad_norm": 1.0 + step}) for step in (1, 2, 3)]
    wide = [rl_line(step, **{"optim/grad_norm": 1000.0**step}) for step in (1, 2, 3)]
    ticks = []
    for lines in (narrow, wide):
        write_metrics(tmp_path, lines)
        source = report.write_report(tmp_path).read_text(encoding="utf-8")
        card = source[source.index("<h3>Gradient norm") : source.index("<h2>Speed")]
        ticks.append(re.findall(">([^<>]+)</text>", card))
    assert {"2.0", "3.0"} <= set(ticks[0])
    assert "1e+07" in ticks[1] and not {"2.0", "3.0"} & set(ticks[1])


def test_long_runs_are_averaged(tmp_path):
    steps = np.arange(1, 1001, dtype=float)
    values = np.where(steps % 2 == 0, steps, np.nan)
    means = reading.average({"step": steps, "x": values, "y": steps**2}, 100)
    np.testing.assert_allclose(means["step"], steps.reshape(100, 10).mean(1))
    np.testing.assert_allclose(means["x"], np.nanmean(values.reshape(100, 10), 1))
    np.testing.assert_allclose(means["y"], (steps**2).reshape(100, 10).mean(1))
    gap = reading.average({"step": steps[:4], "x": np.array([1, 3, np.nan, np.nan])}, 2)
    np.testing.assert_array_equal(gap["x"], [2.0, np.nan])
    write_metrics(tmp_path, [{"step": i, "phase": "sft", "sft/loss": i % 7} for i in range(2000)])
    page = Page(report.write_report(tmp_path))
    assert "averaged, to 400 points" in page.text and len(page.source) < 40_000


def test_samples_are_the_newest_that_exist_and_limited(tmp_path):
    write_samples(tmp_path, 20, [sample(f"response {index}") for index in range(30)])
    write_samples(tmp_path, 9, [sample("early")])
    write_samples(tmp_path, 1000040, [])  # just opened
    page = Page(report.write_report(tmp_path))
    assert "Held-out samples at step 20" in page.text and "The first 24 of 30." in page.text
    responses = [text for text in page.pres if text.startswith("response")]
    assert responses == [f"response {index}" for index in range(24)]
    assert page.source.count('<tr class="right">') == 24


def test_a_failed_write_keeps_the_old_report(tmp_path, monkeypatch):
    (tmp_path / "report.html").write_text("old", encoding="utf-8")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        report.write_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == "old"


def test_the_curve_of_the_weights_is_the_formulas(page):
    """α is the step's own where it was recorded, else the config's; no curve where a weight is no
    power of the length alone."""
    assert "∝ length<sup>-0.75</sup>" in page.source
    record, config = rollout_record(1), {"objective.aggregation": "delta_l"}
    assert "length<sup>-1</sup>" in weight_against_length(record, config, None)
    assert "length<sup>-0.5</sup>" in weight_against_length(record, config, 0.5)
    assert "∝" not in weight_against_length(record, config | {"objective.scope": "group"}, None)
    assert "∝" not in weight_against_length(record, config | {"objective.alpha": "beta"}, None)
    assert "∝" not in weight_against_length(record, {"objective.aggregation": "balanced"}, None)
    flat = weight_against_length(record, {"objective.aggregation": "token_mean"}, None)
    assert "length<sup>-0</sup>" not in flat and "the same for every length" in flat


def test_responses_that_were_trained_are_shown_with_what_became_of_them(page):
    text = page.source[page.source.index("Trained responses of step 2") :]
    assert re.findall('<tr class="(\\w+)"><td class="mark">(\\w+)<br>truncated', text) == [
        ("right", "raised"),
        ("wrong", "lowered"),
        ("wrong", "wrong"),  # of the evaluation
    ]
    weight = f"{rollout_record(2)['weights'][0]:.4g}"
    assert f'class="weight"><pre>{weight}</pre>' in text


def test_exponents_and_fits_are_those_of_the_newest_measurement(page):
    assert "score gradient: β 1.00 (0.90 to 1.10)" in page.text
    assert "advantage gradient: β 0.60 (0.50 to 0.70)" in page.text
    assert re.findall("layer [01]|outside|-?0.[367]0(?=-?0.[456]0 to)", page.text) == [
        *("layer 0", "0.60", "0.60"),
        *("layer 1", "0.70", "0.70"),
        *("outside", "-0.30"),
    ]
    assert "ΔL α=1not resolvable30.250.5" in page.text


def test_damaged_files_of_batches_and_measurements_are_left_out(tmp_path):
    write_metrics(tmp_path, [rl_line(1)])
    write_json(tmp_path, "rollouts", 1, rollout_record(1) | {"weights": [1.0]})
    write_json(tmp_path, "variance", 1, {"gradients": {"score": {"bins": []}}, "step": 1})
    (tmp_path / "rollouts" / "step-000002.json").write_text('{"step": 2, "len')
    assert not {*OF_FILES, *TABLES} & set(Page(report.write_report(tmp_path)).titles())
