"""Comparisons for real, with a tiny model: pairing, controls, resuming, and what is compiled."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltal_jax.compare.cells import permute_weights, run_cell
from deltal_jax.compare.clock import compiling, listen, programs_compiled
from deltal_jax.compare.plan import load_plan
from deltal_jax.compare.runner import Comparison
from deltal_jax.errors import UserError
from deltal_jax.guard import signals
from deltal_jax.progress import ProgressDisplay
from deltal_jax.training.objective import Weighted
from tests import runs

METHODS = {
    "delta-l": {"objective.aggregation": "delta_l"},
    "grpo": {"objective.aggregation": "sequence_mean"},
    "centred": {"objective.advantage": "group_center", "objective.aggregation": "token_mean"},
}
REWARD = {"task.rewards": [f"{runs.__file__}:mixed_reward"]}
PLAN = {
    "experiment": "countdown-tiny",
    "set": runs.TINY
    | REWARD
    | {"rl.steps": 3, "rl.optimizer.normalize": True, "rl.optimizer.learning_rate": 0.01},
    "seeds": [0, 1],
    "warmups": 1,
    "methods": METHODS,
    "controls": {"shuffled": {"weights": "permuted", "set": {}}},
}
CLOCKS = ("seconds", "cpu_seconds")


def comparison(folder, **changes):
    """The plan, with what is changed of it, over a folder; nothing is said."""
    path = folder.parent / "trial.yaml"
    path.write_text(json.dumps(PLAN))
    plan = load_plan(path, changes)
    return Comparison(plan, folder, ProgressDisplay(quiet=True), "deltal compare trial.yaml")


def contents(folder):
    """Every cell without its clocks, by name."""
    found = {}
    for path in sorted((folder / "cells").glob("*/*.json")):
        cell = json.loads(path.read_text())
        for evaluation in cell["evaluations"]:
            del evaluation["seconds"]
        name = f"{path.parent.name}/{path.stem}"
        found[name] = {k: v for k, v in cell.items() if k not in CLOCKS}
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A comparison that ran without a break."""
    folder = tmp_path_factory.mktemp("whole") / "study"
    progress = comparison(folder).run()
    assert progress.complete and progress.cells == 8
    return folder


def test_cells_of_a_seed_see_the_same_first_batch_and_the_same_problems(whole):
    cells = contents(whole)
    for seed in (0, 1):
        ours = [cells[f"{name}/seed-{seed}"] for name in (*METHODS, "shuffled")]
        assert len({json.dumps(cell["first_batch"]["lengths"]) for cell in ours}) == 1
        assert len({json.dumps(cell["train"]["reward/mean"][0]) for cell in ours}) == 1
        assert len({json.dumps(cell["evaluations"][0]) for cell in ours}) == 1
        weights = np.asarray([cell["first_batch"]["weights"] for cell in ours])
        assert len(np.unique(weights, axis=0)) == len(ours)
    first, second = (cells[f"grpo/seed-{seed}"]["first_batch"] for seed in (0, 1))
    assert first["lengths"] != second["lengths"]


def test_the_null_control_takes_the_same_steps_to_rounding(whole):
    cells = contents(whole)
    for seed in (0, 1):
        null, method, other = (
            cells[f"{name}/seed-{seed}"] for name in ("grpo", "delta-l", "centred")
        )
        assert null["evaluations"] == method["evaluations"] != other["evaluations"]
        for name in ("length/mean", "reward/mean"):
            assert null["train"][name] == method["train"][name]
        # The same steps, though the gradients differ by a factor: harmonic mean length / M.
        steps, others = (x["train"]["optim/update_norm"] for x in (null, method))
        assert steps == pytest.approx(others, rel=1e-4)
        gradients = (np.asarray(x["train"]["optim/grad_norm"]) for x in (method, null))
        lengths = np.asarray(null["first_batch"]["lengths"])
        factor = np.mean(1.0 / lengths) ** -1 / 8
        assert np.divide(*gradients)[0] == pytest.approx(factor, rel=1e-4)


def test_what_is_interrupted_and_resumed_is_as_what_was_not(whole, tmp_path):
    folder = tmp_path / "study"
    assert comparison(folder, seeds=[0]).run(2).done == 2
    before = {path: path.read_bytes() for path in folder.rglob("seed-*.json")}
    assert comparison(folder).run(0).done == 2
    assert comparison(folder, seeds=[0]).run().complete
    assert {path: path.read_bytes() for path in before} == before
    wanted = {name: cell for name, cell in contents(whole).items() if cell["seed"] == 0}
    assert contents(folder) == wanted and len(wanted) == 4


def test_two_processes_share_the_cells(whole, tmp_path):
    folder = tmp_path / "study"
    shutil.copytree(whole, folder)
    gone = [folder / "cells" / name / "seed-1.json" for name in ("grpo", "shuffled")]
    for path in gone:
        path.unlink()
    one, other = comparison(folder), comparison(folder)
    with one._claimed("grpo/seed-1"):
        progress = other.run()
        assert (progress.done, progress.elsewhere) == (7, 1)
    assert [path.exists() for path in gone] == [False, True]
    assert other.run().complete
    assert contents(folder) == contents(whole)


def test_a_changed_plan_is_refused_with_the_cell_and_the_fix(whole, tmp_path):
    folder = tmp_path / "study"
    shutil.copytree(whole, folder)
    cell = folder / "cells" / "delta-l" / "seed-0.json"
    said = f"^{cell}: made by another plan, experiment or version; choose another --to, or delete"
    for change in ({"rl.steps": 2}, {"objective.clip_low": 0.1}):
        with pytest.raises(UserError, match=said):
            comparison(folder, **change)
    with pytest.raises(UserError, match=r"^warmups: \S*0 was made by another plan; choose another"):
        comparison(folder, **{"sft.steps": 4})
    assert comparison(folder, seeds=[1, 2]).missing()  # others of the same are welcome
    cell.write_text("{")
    with pytest.raises(UserError, match=f"^{cell}: empty or damaged; delete it$"):
        comparison(folder)
    cell.unlink()
    weights = folder / "warmups" / "0" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"^warmups: \S*0 is damaged .*; delete it, and it is made"):
        comparison(folder).run()


def test_neither_another_method_nor_another_seed_compiles_an_update_rollout_or_evaluation(whole):
    study = comparison(whole)
    start = study._start(0)
    cells = {cell.name: cell for cell in study.cells}

    def run(cell):
        listen()
        before = programs_compiled()
        run_cell(study.setup, cell, start, "", lambda *_: None)
        return programs_compiled() - before

    run(cells["grpo/seed-0"])
    assert run(cells["grpo/seed-1"]) == 0
    for change, programs in (({"alpha": 0.25}, 0), ({"aggregation": "balanced"}, 1)):
        other = dataclasses.replace(cells["grpo/seed-1"].config.objective, **change)
        weighed = dataclasses.replace(cells["grpo/seed-1"].config, objective=other)
        cell = dataclasses.replace(cells["grpo/seed-1"], config=weighed)
        assert run(cell) == programs  # that of the weights


@given(
    weights=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=20),
    seed=st.integers(0, 9),
    step=st.integers(1, 9),
)
def test_permuted_weights_are_the_same_ones_among_the_responses_that_carry_any(weights, seed, step):
    given = np.asarray(weights, np.float32)
    weighted = Weighted(given, given, given, None, {}, given)
    found = permute_weights(weighted, seed, step)
    np.testing.assert_array_equal(np.sort(found.weights), np.sort(given))
    np.testing.assert_array_equal(found.weights == 0, given == 0)
    assert dataclasses.replace(found, weights=given) == weighted
    np.testing.assert_array_equal(permute_weights(weighted, seed, step).weights, found.weights)


def test_a_signal_ends_a_comparison_and_says_how_to_go_on(whole, tmp_path):
    study = comparison(tmp_path / "study")
    with signals.listening() as stop:
        stop.kept = study._kept
        with pytest.raises(
            signals.Stopped, match="0 of 8 cells are done; go on with: deltal com"
        ) as ended:
            stop.hear(signals.SIGNALS[1])
    assert ended.value.code == 128 + signals.SIGNALS[1]


def test_time_in_which_programs_are_compiled_is_counted_once(monkeypatch):
    spans = [(1.0, 3.0), (2.0, 2.5), (2.5, 4.0), (6.0, 9.0)]
    monkeypatch.setattr("deltal_jax.compare.clock._spans", spans)
    assert compiling(0.0, 10.0) == 6.0
    assert compiling(2.0, 7.0) == 3.0
    assert compiling(4.0, 6.0) == 0.0
