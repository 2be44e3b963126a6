"""The benchmarks' load and arithmetic; their seconds are nobody's law."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from deltal_jax.bench import workload
from deltal_jax.bench.measure import Timing, in_turn, ratio
from deltal_jax.bench.update import head_memory
from deltal_jax.cli.main import main

SHARED = Path(__file__).parents[2] / "shared" / "bench"


def test_the_load_is_what_it_says():
    batch = workload.batch_arrays(0)
    lengths = batch["loss_mask"].sum(axis=1)
    assert lengths.max() == workload.LIMIT and lengths.min() >= 4
    assert np.array_equal(batch["lengths"], lengths + workload.PROMPT)
    assert np.all(batch["tokens"][:, 0] == workload.BOS)
    rows = np.arange(workload.RESPONSES)
    assert np.all(batch["tokens"][rows, batch["lengths"] - 1] == workload.EOS)
    assert not np.any(batch["tokens"][~(np.arange(160) < batch["lengths"][:, None])])
    medians = [np.median(workload.batch_arrays(s)["loss_mask"].sum(axis=1)) for s in range(50)]
    assert np.mean(medians) == pytest.approx(24, rel=0.1)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the peer's load lies beside the repository")
def test_the_load_is_the_peers(monkeypatch):
    monkeypatch.syspath_prepend(str(SHARED))
    theirs = importlib.import_module("workload")
    for seed in range(3):
        ours, batch = workload.batch_arrays(seed), theirs.train_batch(seed=seed)
        prompt = workload.PROMPT
        np.testing.assert_array_equal(ours["tokens"][:, :prompt], batch["prompt"])
        np.testing.assert_array_equal(ours["tokens"][:, prompt:], batch["completion"])
        np.testing.assert_array_equal(ours["loss_mask"][:, prompt:], batch["mask"])
        np.testing.assert_array_equal(ours["logprobs"][:, prompt:], batch["old"])
        np.testing.assert_array_equal(ours["advantages"], batch["adv"])


def test_a_ratio_is_the_median_of_the_rounds_ratios():
    assert ratio(Timing([2.0, 9.0, 4.0]), Timing([1.0, 1.0, 1.0])) == 4.0
    assert ratio(Timing([1.0, 8.0, 3.0]), Timing([2.0, 2.0, 1.0])) == 3.0
    assert Timing([1.0, 5.0, 2.0], [3.0, 1.0, 2.0]).summary() == {"wall_s": 2.0, "cpu_s": 2.0}


def test_sides_take_turns_after_one_call_each():
    calls = []
    sides = {name: lambda name=name: calls.append(name) for name in "ab"}
    timings = in_turn(sides, rounds=3)
    assert "".join(calls) == "ab" + "ab" * 3
    assert all(len(t.wall) == len(t.cpu) == 3 for t in timings.values())


def test_memory_does_not_follow_the_vocabulary():
    """All but the buffer of the head's own gradient."""
    figures = head_memory(layers=2, tokens=4096)
    gradient = 152_064 * 2048 * 4
    assert figures["vocabulary_152064"] - gradient <= 1.3 * figures["vocabulary_1024"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["objective", "--rounds", "1"], "--rounds: a median needs at least 3, got 1"),
        (["objective", "--peer", "python3"], "--peer: only `deltal bench update` has a peer"),
    ],
)
def test_bad_input_is_one_line(arguments, said, capsys):
    assert main(["bench", *arguments]) == 2
    assert capsys.readouterr().err == f"deltal: {said}\n"


def test_aggregation_is_measured_and_printed_as_one_object(monkeypatch, capsys):
    from deltal_jax.bench import objective

    monkeypatch.setattr(objective, "RESPONSES", 1000)
    monkeypatch.setattr(objective, "share_of_update", lambda rounds: {"share_of_update": 0.5})
    assert main(["bench", "objective", "--rounds", "3", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["weights"]["power"]["over_power"] == 1.0
    assert figures["weights"]["delta_l"]["wall_s"] > 0
    assert figures["aggregation"] == {"share_of_update": 0.5}
