"""Pages of several runs and of comparisons, and the command that writes them."""

import pathlib
import re

import numpy as np
import pytest

from deltal_jax.cli.main import main
from deltal_jax.report import page as report
from deltal_jax.report import reading, several
from deltal_jax.report.markup import markdown
from tests.test_report import Page, eval_line, write_metrics


def seed_run(
    folder: pathlib.Path, seed: int, alpha: float, accuracies: list[float]
) -> pathlib.Path:
    folder.mkdir()
    config = f"run:\n  name: tiny\n  dir: {folder}\nseed: {seed}\nobjective:\n  alpha: {alpha}\n"
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    lines = [eval_line(20 * at, value) for at, value in enumerate(accuracies)]
    rewards = {"step": 1, "phase": "rl", "reward/mean": accuracies[0]}
    write_metrics(folder, [*lines, rewards])
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[pathlib.Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [
        seed_run(folder / "a0", 0, 1.0, [0.1, 0.4, 0.6]),
        seed_run(folder / "b<0>", 0, 0.0, [0.1, 0.3]),
        seed_run(folder / "a1", 1, 1.0, [0.2, 0.5]),
    ]


def test_seeds_of_a_config_are_one_curve_with_their_interval(runs):
    tables = several.merged_tables([reading.read_run(runs[0]), reading.read_run(runs[2])])
    found, key = tables["eval"], "eval/countdown/avg_at_k"
    np.testing.assert_array_equal(found["step"], [0.0, 20.0])  # that both have
    np.testing.assert_allclose(found[key], [0.15, 0.45])
    half = 12.7062047 * np.std([0.1, 0.2], ddof=1) / np.sqrt(2)  # Student's t, one degree
    np.testing.assert_allclose(found[f"{key}_low"], [0.15 - half, 0.45 - half], rtol=1e-6)
    np.testing.assert_allclose(found[f"{key}_high"], [0.15 + half, 0.45 + half], rtol=1e-6)


def test_several_runs_on_one_page(runs, tmp_path):
    code = main(["report", *map(str, runs), "--to", str(tmp_path / "all.html"), "--json"])
    page = Page(tmp_path / "all.html")
    assert code == 0 and "3 runs: tiny" in page.text
    assert "alpha 1.0 (2 seeds: 0, 1)" in page.text and "are one curve" in page.text
    assert "fieldalpha 1.0alpha 0.0objective.alpha1.00.0seed0, 10" in page.text
    assert "alpha 1.015.0%" in page.text and "alpha 0.010.0%5.0% to 15.0%30.0%25.0%" in page.text
    assert "b&lt;0&gt;: alpha 0.0, seed 0" in page.source and page.count("details") >= 3
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    before = (tmp_path / "all.html").read_bytes()
    assert report.write_page(runs, tmp_path / "again.html").read_bytes() == before


def test_the_same_seed_twice_is_no_second_seed(runs, tmp_path):
    again = seed_run(tmp_path / "again", 0, 1.0, [0.1, 0.4, 0.6])
    page = Page(report.write_page([runs[0], again], tmp_path / "r.html"))
    assert "2 runs" in page.text and "one curve" not in page.text and "seeds:" not in page.text


def test_runs_that_differ_in_much_go_by_their_folders(tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        fields = "".join(f"{key}: {name}\n" for key in ("task", "lora", "mesh", "model"))
        (tmp_path / name / "config.yaml").write_text(f"run: {{name: n}}\n{fields}")
    page = Page(report.write_page([tmp_path / "x", tmp_path / "y"], tmp_path / "r.html"))
    assert "fieldxy" in page.text and "one curve" not in page.text


FINDINGS = """# Findings

One **primary** endpoint
on <b>two</b> lines: `a < b`.

## Differences
| method | AUC |
| --- | ---: |
| delta-l | 0.75 |
| a \\| b | *0.70* |

- noise is no win,
  see [the guide](x.md)
- ![](curves.svg)

1. first
"""


def test_the_markdown_of_findings():
    assert markdown(FINDINGS) == "\n".join(
        [
            "<h2>Findings</h2>",
            "<p>One <strong>primary</strong> endpoint on &lt;b&gt;two&lt;/b&gt; lines: "
            "<code>a &lt; b</code>.</p>",
            "<h3>Differences</h3>",
            '<div class="scroll" tabindex="0"><table class=""><thead><tr><th>method</th>'
            "<th>AUC</th></tr></thead><tbody><tr><th>delta-l</th><td>0.75</td></tr>"
            "<tr><th>a | b</th><td><em>0.70</em></td></tr></tbody></table></div>",
            '<ul class="list"><li>noise is no win, see the guide</li></ul>',
            '<ol class="list"><li>first</li></ol>',
        ]
    )


def test_a_comparison_has_its_findings_and_plots(tmp_path, capsys):
    from matplotlib.figure import Figure

    (tmp_path / "cells" / "delta-l").mkdir(parents=True)
    (tmp_path / "cells" / "delta-l" / "seed-0.json").write_text("{}")
    (tmp_path / "plan.yaml").write_text("methods: {a<b: {}}\n")
    assert main(["report", str(tmp_path)]) == 0
    page = Page(tmp_path / "report.html")
    assert "are done: 1" in page.text and "findings are not there yet" in page.text
    (tmp_path / "findings.md").write_text(FINDINGS, encoding="utf-8")
    (tmp_path / "plots").mkdir()
    for name in ("learning_curves", "plots/ablation-alpha"):
        figure = Figure()
        figure.subplots().plot([1, 2], label="<script>alert(1)</script>")
        figure.legend()
        figure.savefig(tmp_path / f"{name}.svg")
    page = Page(report.write_page([tmp_path], tmp_path / "report.html"))
    assert page.titles() == ["Differences", "Learning curves", "Ablation alpha"]
    assert page.count("svg") == 2 and page.count("style") == 1 and page.count("script") == 0
    assert not re.search(r"<\?xml|<!DOCTYPE svg|<metadata", page.source)
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    assert page.pres[-1] == "methods: {a<b: {}}\n"


REFUSALS = {
    "no run": (
        ["nothing"],
        "RUN: nothing has no config.yaml and no plan.yaml; name a run's folder",
    ),
    "a comparison among runs": (
        ["cmp", "run"],
        "RUN: cmp is a comparison, which has a page alone; name only it",
    ),
    "a folder": (["run", "--to", "."], "--to: . is a folder; name a file in it"),
    "no folder": (["run", "--to", "a/b"], "--to: cannot write a/b: No such file or directory"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSALS.values(), ids=list(REFUSALS))
def test_what_the_command_refuses(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder, name in (("run", "config.yaml"), ("cmp", "plan.yaml")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text("")
    assert main(["report", *arguments]) == 2
    assert capsys.readouterr().err == f"deltal: {message}\n"
