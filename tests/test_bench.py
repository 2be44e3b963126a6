"""The benchmarks' load and arithmetic; their seconds are nobody's law."""

import contextlib
import importlib
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltal_jax.bench import checkpoint, data, gpu, grading, loading, model, workload
from deltal_jax.bench import rollout as bench_rollout
from deltal_jax.bench.measure import Timing, in_turn, ratio
from deltal_jax.bench.peer import Peer
from deltal_jax.bench.update import head_memory
from deltal_jax.cli.main import main
from deltal_jax.data.rows import open_rows
from deltal_jax.errors import UserError
from deltal_jax.model.attention import attend_rows
from deltal_jax.model.huggingface import load_architecture, load_params
from deltal_jax.model.transformer import abstract_params
from deltal_jax.tasks.math.rules import judge
from tests import fakes

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


PEER = """#!/bin/sh
echo '{}'
while read seed; do echo "{\\"wall\\": $seed, \\"cpu\\": 1}"; done
"""


@pytest.fixture
def python(tmp_path):
    """What takes the place of a peer's Python: its seconds are the seed."""
    path = tmp_path / "python"
    path.write_text(PEER)
    path.chmod(0o755)
    return str(path)


def test_a_peer_is_asked_and_ends_where_a_round_fails(python):
    with (
        contextlib.suppress(ZeroDivisionError),
        Peer(python, "peer_side.py", "it", [5, 6, 7]) as peer,
    ):
        assert peer.timing.wall == []  # without what compiles
        assert peer.ask(7) == {"wall": 7, "cpu": 1}
        assert peer.timing.wall == [7] and peer.process.poll() is None
        raise ZeroDivisionError
    assert peer.process.poll() is not None


def test_a_peer_that_says_nothing_is_one_line(tmp_path):
    path = tmp_path / "python"
    path.write_text("#!/bin/sh\necho no such module >&2\n")
    path.chmod(0o755)
    with pytest.raises(UserError, match="--peer: it did not run: no such module"):
        Peer(str(path), "peer_side.py", "it", [5])


def test_speeds_over_a_peer_by_hand(monkeypatch):
    """Medians over rounds of ratios a round, and not ratios of medians."""
    monkeypatch.setattr(workload, "SIZES", workload.SIZES | {"d_model": 8, "d_ff": 8})
    side = bench_rollout.Side(())
    side.tokens, side.timing = [10, 20, 30], Timing([1.0, 1.0, 2.0], [2.0, 1.0, 1.0])
    whole = [{"tokens": n, "wall": w, "cpu": 1.0} for n, w in ((10, 1.0), (10, 4.0), (30, 1.0))]
    answers = [answer | {"full": {"tokens": 10, "wall": 1.0, "cpu": 2.0}} for answer in whole]
    found = bench_rollout._peer_figures(answers, {"geometric": side, "full": side})
    assert found["geometric"] == {
        "wall_s": 1.0,
        "cpu_s": 1.0,
        "useful_tokens_per_s": 10.0,  # of 10, 2.5, 30
        "ours_over_it": 1.0,  # of 10/10, 20/2.5, 15/30
        "ours_over_it_per_cpu_s": 1.0,  # of 5/10, 20/10, 30/30
    }
    assert found["full"]["ours_over_it"] == 1.5  # of 10/10, 20/10, 15/10
    assert found["full"]["ours_over_it_per_cpu_s"] == 4.0  # of 5/5, 20/5, 30/5


def test_memory_does_not_follow_the_vocabulary():
    """All but the buffer of the head's own gradient."""
    figures = head_memory(layers=2, tokens=4096)
    gradient = 152_064 * 2048 * 4
    assert figures["vocabulary_152064"] - gradient <= 1.3 * figures["vocabulary_1024"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["objective", "--rounds", "1"], "--rounds: a median needs at least 3, got 1"),
        (
            ["model", "--shape", "3b"],
            "--shape: of `deltal bench` only `gpu` has models of several sizes",
        ),
        (["objective", "--peer", "python3"], "--peer: `deltal bench objective` has no peer"),
        (
            ["model", "--folder", "here"],
            "--folder: of `deltal bench` only `loading`, `data`, `checkpoint` write files",
        ),
    ],
)
def test_bad_input_is_one_line(arguments, said, capsys):
    assert main(["bench", *arguments]) == 2
    assert capsys.readouterr().err == f"deltal: {said}\n"


def test_data_is_measured_from_files_that_are_gone_afterwards(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    monkeypatch.setattr(data, "FORMATS", ("parquet",))
    figures = data.benchmark_data(1, str(tmp_path), rows=700)
    assert list(tmp_path.iterdir()) == []
    found = figures["parquet"]
    assert figures["load"]["rows"] == 700
    assert found["start_over_plain_read"] == found["start_s"] / found["plain_read_s"]
    assert found["peak_over_file"] == found["peak_bytes"] / found["bytes"]
    assert found["prompts_per_s"] > 0


def test_both_files_of_problems_have_the_same_rows(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    monkeypatch.setattr(data, "GROUP", 1000)
    found = []
    for kind in data.FORMATS:
        data.write_rows(tmp_path / f"rows.{kind}", 300)
        found.append([*open_rows(tmp_path / f"rows.{kind}", "data")])
    assert found[0] == found[1] and len({str(row["prompt"]) for row in found[0]}) == 300


def test_aggregation_is_measured_and_printed_as_one_object(monkeypatch, capsys):
    from deltal_jax.bench import objective

    monkeypatch.setattr(objective, "RESPONSES", 1000)
    monkeypatch.setattr(objective, "share_of_update", lambda rounds: {"share_of_update": 0.5})
    assert main(["bench", "objective", "--rounds", "3", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["weights"]["power"]["over_power"] == 1.0
    assert figures["weights"]["delta_l"]["wall_s"] > 0
    assert figures["aggregation"] == {"share_of_update": 0.5}


ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the page cache is asked to forget")
CHECKPOINT = fakes.FAMILIES["qwen3"]


@ON_LINUX
def test_loading_is_measured_from_files_that_are_gone_afterwards(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "SHARD_BYTES", 4000)
    figures = loading.benchmark_loading(3, str(tmp_path), CHECKPOINT)
    assert list(tmp_path.iterdir()) == []
    parameters = sum(x.size for x in jax.tree.leaves(abstract_params(CHECKPOINT)))
    assert figures["checkpoint"]["files"] > 2
    assert 2 * parameters < figures["checkpoint"]["bytes"] < 2 * parameters + 10_000
    for name in ("plain read", "bfloat16", "float32"):
        assert figures[name]["wall_s"] > 0 and figures[name]["cpu_s"] >= 0
        size = figures["checkpoint"]["bytes"]
        assert figures[name]["mb_per_s"] == pytest.approx(size / figures[name]["wall_s"] / 1e6)
        assert figures[name]["from_disk"] >= 0
    assert figures["bfloat16"]["share_of_plain_read"] > 0


@ON_LINUX
def test_a_folder_that_is_not_there_is_one_line(tmp_path, capsys):
    folder = str(tmp_path / "none")
    assert main(["bench", "loading", "--rounds", "3", "--folder", folder]) == 2
    said = capsys.readouterr().err
    assert said.startswith("deltal: --folder: ") and folder in said and said.count("\n") == 1


def test_the_checkpoint_that_is_loaded_holds_random_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "SHARD_BYTES", 4000)
    files = loading.write_checkpoint(tmp_path, CHECKPOINT)
    assert all(file.stat().st_size < 4000 + 2000 for file in files)
    assert load_architecture(tmp_path).d_model == CHECKPOINT.d_model
    params = load_params(tmp_path, CHECKPOINT, dtype=jnp.bfloat16)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, abstract_params(CHECKPOINT))
    leaves = [np.asarray(x).view(np.uint16).ravel() for x in jax.tree.leaves(params)]
    bits = np.concatenate(leaves)
    assert np.mean(bits) == pytest.approx(2**15, rel=0.02)
    assert len(np.unique(bits)) > 0.8 * min(bits.size, 2**16)


@ON_LINUX
def test_a_file_that_was_dropped_is_read_from_the_disk(tmp_path):
    """Where there is a disk behind the folder; in memory nothing is fetched."""
    path = tmp_path / "file"
    path.write_bytes(bytes(2**20))
    with open(path, "rb") as file:
        loading.os.fsync(file.fileno())
    counts = []
    for forget in (True, False):
        if forget:
            loading.drop([path])
        before = loading._fetched()
        loading.plain_read([path])
        counts.append(loading._fetched() - before)
    assert counts[0] == 0 or counts[0] >= 2**20 > counts[1]


def test_useful_operations_are_those_of_the_products():
    arch = fakes.GROUPED
    kernels = [
        x.size
        for path, x in jax.tree.leaves_with_path(abstract_params(arch)["blocks"])
        if path[-1].key == "kernel"
    ]
    useful = model.layer_flops(arch, 3, 7, masked=False)
    assert useful["weights"] == 2 * 3 * 7 * sum(kernels)
    pairs = 7 * 8 // 2  # a query and a key that it sees
    assert useful["attention"] == 2 * 2 * 3 * arch.layers * arch.heads * arch.head_dim * pairs
    whole = model.layer_flops(arch, 3, 7, masked=True)
    assert whole["weights"] == useful["weights"]
    assert whole["attention"] == useful["attention"] * 7 * 7 / pairs


def test_plain_attention_is_the_same_function():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 9, n, 8)), jnp.float32) for n in (4, 2, 2))
    segments = jnp.asarray([[0] * 4 + [1] * 5, [0] * 9])
    want = attend_rows(q, k, v, segments)
    np.testing.assert_allclose(model.plain_attention(q, k, v, segments), want, atol=2e-6)


def test_the_slice_of_a_model_is_measured_against_the_product():
    figures = model.benchmark_model(3, fakes.PLAIN, rows=2, tokens=8, square=16)["float32"]
    assert figures["matmul"]["square"] == 16 and figures["matmul"]["gflops"] > 0
    useful = sum(model.layer_flops(fakes.PLAIN, 2, 8, masked=False).values())
    for name, times in (("forward", 1), ("forward, backward", 3)):
        assert figures[name]["gflops"] == pytest.approx(
            times * useful / figures[name]["wall_s"] / 1e9
        )
    for name in ("forward", "forward, backward", "attention", "attention, plain"):
        assert 0 < figures[name]["share_of_peak"] < figures[name]["share_with_masked"]


@pytest.mark.parametrize("groups", [False, True])
def test_the_load_of_grading_has_right_and_wrong_answers_of_every_kind(groups):
    pairs = grading.load(3, groups)
    assert pairs == grading.load(3, groups) != grading.load(4, groups)
    assert len(pairs) == grading.PROBLEMS * grading.SAMPLES
    golds = [gold for _, gold in pairs]
    runs = grading.SAMPLES if groups else 1
    assert all(golds[i : i + runs] == golds[i : i + 1] * runs for i in range(0, len(golds), runs))
    found = {(judge("reference", said, gold)[0], gold.isdigit()) for said, gold in pairs}
    assert found == {
        (verdict, whole) for verdict in ("correct", "wrong") for whole in (True, False)
    }


@pytest.mark.slow
def test_the_figures_of_grading_are_those_of_both_verifiers_and_of_the_overlap(monkeypatch):
    monkeypatch.setattr(grading, "PROBLEMS", 2)
    monkeypatch.setattr(grading, "WORKERS", 1)
    tiny = {"model.layers": 1, "model.d_model": 16, "model.head_dim": 8, "model.d_ff": 16}
    steps = {"rl.prompts_per_step": 4, "rollout.max_response_length": 24, "rollout.slots": 8}
    monkeypatch.setattr(grading, "SAMPLED", tiny | steps)
    figures = grading.benchmark_grading(3)
    for verifier in ("reference", "math_verify"):
        assert figures[verifier].pop("missing") == 0
        assert all(rate > 0 for rate in figures[verifier].values())
    overlap = figures["overlap"]
    assert overlap["responses"] == 32 and 0 <= overlap.pop("verdicts there before") <= 1
    assert all(figure > 0 for figure in overlap.values())


def test_a_save_is_measured_beside_a_plain_write_of_the_same_bytes(tmp_path):
    figures = checkpoint.benchmark_checkpoint(1, str(tmp_path), rows=4)
    assert figures["state"]["bytes"] == 3 * 8 * 4 * 1000 * 4 and not list(tmp_path.iterdir())
    assert figures["stall"]["wall_s"] >= figures["save"]["wall_s"] > 0
    checkpoint.plain_write(tmp_path / "plain", np.arange(5, dtype=np.uint8), 12)
    assert list((tmp_path / "plain").read_bytes()) == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


def test_the_peaks_of_a_device_are_those_of_the_longest_name_that_fits():
    assert gpu.known_peaks("NVIDIA H100 80GB HBM3") == gpu.PEAKS["H100"]
    assert gpu.known_peaks("NVIDIA H100 PCIe") == gpu.PEAKS["H100 PCIe"]
    assert gpu.known_peaks("NVIDIA L40S")[1] == 864e9 and gpu.known_peaks("NVIDIA L4")[1] == 300e9
    assert gpu.known_peaks("cpu") is None


@pytest.mark.parametrize("shape", ["0.5b", "3b"])
def test_useful_operations_of_an_update_are_six_a_parameter_and_token(shape):
    load = gpu.LOADS[shape]
    config, arch, update = gpu.make_parts(load)
    assert load.rows * load.tokens == 4096 and arch.compute_dtype == "bfloat16" and arch.remat
    count = sum(x.size for x in jax.tree.leaves(abstract_params(arch)))
    pairs = load.tokens * (load.tokens + 1) / 2
    attention = 3 * 4 * load.rows * arch.layers * arch.heads * arch.head_dim * pairs
    found = gpu.update_flops(arch, load.rows, load.tokens)
    # Norms and biases are parameters that nothing is multiplied with.
    assert found == pytest.approx(6 * count * 4096 + attention, rel=1e-3)
    # Its gradient by such a bucket, which is full, is that of all parameters.
    (bucket, *others) = gpu.make_load(load, config)
    assert len(others) == 15 and bucket.tokens.shape == (4, 1024) and bucket.tokens.all()
    gradient = jax.eval_shape(update.gradient, abstract_params(arch), bucket)
    assert sum(x.size for x in jax.tree.leaves(gradient.grads)) == count
    read = gpu.step_bytes(arch, load.responses, 768)
    assert read["weights"] == pytest.approx(2 * count, rel=1e-3)
    assert (
        read["cache"] == 2 * load.responses * 768 * 2 * arch.layers * arch.kv_heads * arch.head_dim
    )


def test_a_model_is_measured_against_the_peaks_of_this_machine(capsys):
    assert main(["bench", "gpu", "--shape", "tiny", "--rounds", "3", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    device, tiny = figures["device"], figures["tiny"]
    assert device["peaks_from"] == "measured" and device["peak_flops"] == device["measured_flops"]
    load, update, decode, step = gpu.LOADS["tiny"], tiny["update"], tiny["decode"], tiny["step"]
    _, arch, _ = gpu.make_parts(load)
    done = load.microbatches * gpu.update_flops(arch, load.rows, load.tokens)
    assert update["mfu"] == pytest.approx(done / update["wall_s"] / device["peak_flops"])
    assert 0 < update["mfu"] < 1
    read = decode["weight_bytes"] + decode["cache_bytes"]
    share = read / decode["step_s"] / device["peak_bytes_per_s"]
    assert decode["share_of_bandwidth"] == pytest.approx(share)
    assert sum(v for k, v in step.items() if k.endswith("_share")) == pytest.approx(1.0)
    assert tiny["model"]["parameters"] > 0
