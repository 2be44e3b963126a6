"""Slices, rooflines and counts of compiled programs: what needs no compiler of TPUs."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from deltal_jax.cli.main import main
from deltal_jax.config import load_config, shipped_configs
from deltal_jax.errors import UserError
from deltal_jax.model import transformer
from deltal_jax.model.transformer import abstract_params, make_graphdef
from deltal_jax.parallel.mesh import AXES, make_mesh
from deltal_jax.planning import arithmetic, counting, hlo, several
from deltal_jax.planning.chips import CHIPS
from deltal_jax.planning.lengths import Lengths
from deltal_jax.planning.roofline import Work, mfu, sent_by_one, times
from deltal_jax.planning.topology import Topology, parse_topology
from deltal_jax.training.loss import SUPERVISED, microbatch_loss
from deltal_jax.types import Bucket
from tests import fakes

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "kind", "shape", "size"),
    [
        ("v5e:8x8", "v5e", (8, 8), 64),
        ("v5p:2x2x2", "v5p", (2, 2, 2), 8),
        ("v4:4x4x8", "v4", (4, 4, 8), 128),
        ("gpu:h100x8", "h100", (8,), 8),
    ],
)
def test_a_slice_is_named_by_its_chips(text, kind, shape, size):
    found = parse_topology(text)
    assert (found.kind, found.shape, found.size, found.name) == (kind, shape, size, text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("v5e", "'v5e' is none; name a slice by its chips, such as v5e:8x8"),
        ("v5e-64", "'v5e-64' is none"),
        ("v9:2x2", "'v9:2x2' is none"),
        ("gpu:v5ex8", "'gpu:v5ex8' is none"),
        ("h100:8x8", "'h100:8x8' is none"),
        ("v5e:0x8", "'v5e:0x8' is none"),
        ("v5p:8x8", "'v5p:8x8' has 2 sides, and a slice of v5p has 3, such as v5p:2x2x2"),
        ("v6e:2x2x2", "'v6e:2x2x2' has 3 sides, and a slice of v6e has 2"),
    ],
)
def test_what_names_no_slice_is_refused_with_one_that_does(text, said):
    with pytest.raises(UserError, match=r"^--topology: ") as error:
        parse_topology(text)
    assert said in str(error.value)


def test_a_ring_has_two_links_a_line_one_and_a_side_of_one_chip_none():
    for text, varied, links in (
        ("v5e:8x8", (True, True), 2),
        ("v5e:16x16", (True, True), 4),
        ("v5e:16x16", (True, False), 2),
        ("v5p:2x2x2", (True, True, True), 3),
        ("v5p:4x4x8", (True, True, True), 6),
        ("v5p:2x2x1", (True, False, True), 1),
    ):
        assert parse_topology(text).links(varied) == links


def test_the_slowest_resource_bounds_a_program_and_rates_are_those_of_the_chip():
    slice_ = parse_topology("v5e:4x2")
    work = Work(197e12, 819e9 / 2, {("fsdp",): 50e9 / 4})
    found = times(work, slice_, None)
    assert (found.compute, found.hbm, found.collectives) == pytest.approx((1.0, 0.5, 0.25))
    assert (found.bound, found.limit, found.in_turn) == (1.0, "compute", 1.75)
    slower = times(dataclasses.replace(work, hbm_bytes=4 * 819e9), slice_, None)
    assert (slower.bound, slower.limit) == (4.0, "hbm")
    assert mfu(8 * 197e12 / 2, 1.0, slice_) == 0.5
    assert mfu(197e12, 2.0, slice_, chips=1) == 0.5


def test_what_a_chip_sends_is_the_least_of_all_algorithms():
    """Of 8 chips with a buffer of 64 bytes each receives 7 shares of 8 when it gathers, sends 7
    when it scatters, and both when it reduces."""
    found = {kind: sent_by_one(kind, 64.0, 8) for kind in counting.KINDS}
    assert found["all-gather"] == found["reduce-scatter"] == found["all-to-all"] == 56.0
    assert found["all-reduce"] == 112.0
    assert found["collective-permute"] == 64.0
    assert sent_by_one("all-reduce", 64.0, 1) == 0.0


@pytest.mark.parametrize(
    ("written", "groups", "axes"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", [[0, 1], [2, 3], [4, 5], [6, 7]], ("tensor",)),
        ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]], ("fsdp", "tensor")),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", [[0, 2, 4, 6], [1, 3, 5, 7]], ("data", "fsdp")),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]], ("data",)),
        (
            "replica_groups=mesh['a'=8] {'a':(2)2}",
            [[0, 2], [1, 3], [4, 6], [5, 7]],
            ("fsdp",),
        ),
        (
            "replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}",
            [[0, 2, 4, 6], [1, 3, 5, 7]],
            ("data", "fsdp"),
        ),
    ],
)
def test_groups_of_devices_are_read_in_each_form_and_tell_the_mesh_axes(written, groups, axes):
    found = counting.replica_groups(f"channel_id=1, {written}, dimensions={{0}}")
    assert found is not None and found.tolist() == groups
    assert counting.axes_of(found, {"data": 2, "fsdp": 2, "tensor": 2}) == axes


def compiled_text(function, *shapes, mesh=None):
    if mesh is None:
        return jax.jit(function).lower(*shapes).compile().as_text()
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*shapes).compile().as_text()


@pytest.fixture(scope="module")
def stacks():
    """A product with each of six matrices that are split over fsdp, scanned and in turn: the text
    of both programs on 2 × 4 devices."""
    mesh = make_mesh(data=2, fsdp=4)
    whole = NamedSharding(mesh, PartitionSpec())
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    matrices = jax.ShapeDtypeStruct(
        (6, 64, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    )
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=rows)

    def body(x, matrix):
        matrix = jax.lax.with_sharding_constraint(matrix, whole)
        return jax.lax.with_sharding_constraint(jnp.tanh(x @ matrix), rows), None

    def scanned(x, matrices):
        return jax.lax.scan(body, x, matrices)[0]

    def unrolled(x, matrices):
        for at in range(6):
            x = body(x, matrices[at])[0]
        return x

    def outside(x, matrices):
        return scanned(x, jax.lax.with_sharding_constraint(matrices, whole))

    return {
        own.__name__: counting.count(
            hlo.parse(compiled_text(own, x, matrices, mesh=mesh)), dict(mesh.shape)
        )
        for own in (scanned, unrolled, outside)
    }


def test_a_scan_counts_as_often_as_it_goes_round(stacks):
    """Each chip multiplies its 2 rows with all six matrices, and gathers them over fsdp."""
    for found in (stacks["scanned"], stacks["unrolled"]):
        assert found.flops == 6 * 2 * 2 * 64 * 64
        gathered = [own for own in found.collectives if own.kind == "all-gather"]
        assert {own.axes for own in gathered} == {("fsdp",)}
        assert sum(own.count for own in gathered) == 6
        assert found.sent()["fsdp",] == 6 * 64 * 64 * 4 * 3 / 4
    assert {own.depth for own in stacks["scanned"].collectives} == {1}
    assert stacks["scanned"].dynamic == 0


def test_a_whole_stack_that_is_gathered_outside_the_scan_is_found(stacks):
    shapes = [(6, 64, 64)]
    assert counting.gathered_stacks(stacks["scanned"], shapes, 6) == []
    (found,) = counting.gathered_stacks(stacks["outside"], shapes, 6)
    assert (found.dims, found.depth, found.members) == ((6, 64, 64), 0, 4)


def test_a_loop_whose_rounds_depend_on_data_counts_as_often_as_is_said():
    def loop(x, rounds):
        return jax.lax.fori_loop(0, rounds, lambda _, x: x @ x, x)

    text = compiled_text(
        loop, jax.ShapeDtypeStruct((32, 32), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    )
    found = counting.count(hlo.parse(text), {}, rounds=5.0)
    assert (found.flops, found.dynamic) == (5 * 2 * 32**3, 1)
    assert found.hbm_bytes >= 5 * 2 * 32 * 32 * 4


def test_a_batched_product_written_as_a_convolution_counts_what_it_multiplies():
    """TPUs write a batch as a dilated spatial axis, of whose places one in 16 counts."""
    line = (
        "  %c = f32[16,8,4]{2,1,0} convolution(%a, %b), "
        "window={size=16 stride=15 lhs_dilate=16}, dim_labels=0bf_0io->0bf"
    )
    text = (
        "ENTRY %main (a: f32[16,8,32], b: f32[16,32,4]) -> f32[16,8,4] {\n"
        "  %a = f32[16,8,32]{2,1,0} parameter(0)\n  %b = f32[16,32,4]{2,1,0} parameter(1)\n"
        f"  ROOT {line.strip()}\n}}\n"
    )
    assert counting.count(hlo.parse(text), {}).flops == 2 * 16 * 8 * 32 * 4


def test_a_slice_that_a_fusion_reads_counts_as_its_part_and_what_stays_near_as_nothing():
    text = (
        "%inside (p: f32[100,64], q: s32[]) -> f32[1,64] {\n"
        "  %p = f32[100,64]{1,0} parameter(0)\n  %q = s32[] parameter(1)\n"
        "  %zero = s32[] constant(0)\n"
        "  ROOT %s = f32[1,64]{1,0} dynamic-slice(%p, %q, %zero), dynamic_slice_sizes={1,64}\n}\n"
        "ENTRY %main (p: f32[100,64], q: s32[]) -> f32[1,64] {\n"
        "  %p.1 = f32[100,64]{1,0} parameter(0)\n  %q.1 = s32[] parameter(1)\n"
        "  %f = f32[1,64]{1,0:T(8,128)S(1)} fusion(%p.1, %q.1), kind=kLoop, calls=%inside\n"
        "  ROOT %n = f32[1,64]{1,0:T(8,128)S(1)} negate(%f)\n}\n"
    )
    assert counting.count(hlo.parse(text), {}).hbm_bytes == 64 * 4 + 4


def test_a_fusion_that_only_renames_what_it_is_given_hides_no_reading():
    """As TPUs write the matrices of a decoding step; and a prefetch is read and not written."""
    text = (
        "%view (p: bf16[64,32]) -> bf16[64,32] {\n  %p = bf16[64,32]{1,0} parameter(0)\n"
        "  ROOT %b = bf16[64,32]{1,0} bitcast(%p)\n}\n"
        "%inside (m: bf16[64,32], x: bf16[4,64]) -> bf16[4,32] {\n"
        "  %m = bf16[64,32]{1,0} parameter(0)\n  %x = bf16[4,64]{1,0} parameter(1)\n"
        "  %v = bf16[64,32]{1,0} fusion(%m), kind=kLoop, calls=%view\n"
        "  ROOT %c = bf16[4,32]{1,0} convolution(%x, %v), dim_labels=bf_io->bf\n}\n"
        "ENTRY %main (m: bf16[64,32], x: bf16[4,64]) -> bf16[4,32] {\n"
        "  %m.1 = bf16[64,32]{1,0} parameter(0)\n  %x.1 = bf16[4,64]{1,0:S(1)} parameter(1)\n"
        "  %s = ((bf16[64,32]{1,0}), bf16[64,8]{1,0:S(1)}, s32[]) slice-start(%m.1)\n"
        "  ROOT %f = bf16[4,32]{1,0:S(1)} fusion(%m.1, %x.1), kind=kOutput, calls=%inside\n}\n"
    )
    found = counting.count(hlo.parse(text), {})
    assert found.hbm_bytes == 2 * (64 * 32 + 64 * 8)
    assert found.flops == 2 * 4 * 64 * 32


def gradient_count(arch, rows, width):
    """Of the gradient of a micro-batch on one device, every token trained."""
    graphdef = make_graphdef(arch)
    shape = (rows, width)
    numbers, flags = (jax.ShapeDtypeStruct(shape, kind) for kind in (jnp.int32, jnp.bool_))
    reals = jax.ShapeDtypeStruct(shape, jnp.float32)
    each = jax.ShapeDtypeStruct((rows,), jnp.float32)
    bucket = Bucket(numbers, numbers, numbers, flags, reals, reals, each, each, each)

    def loss(params, bucket):
        return microbatch_loss(graphdef, params, bucket, SUPERVISED)[0]

    text = compiled_text(jax.value_and_grad(loss), abstract_params(arch), bucket)
    chunk = max(128, rows * width // 8)
    return counting.count(hlo.parse(text), {}, rounds=math.ceil(rows * width / chunk))


def test_the_real_gradient_counts_the_same_scanned_and_unrolled_and_as_the_architecture_says(
    monkeypatch,
):
    """With recomputation: the matrix products of the layers four times, but for the last of each,
    the head's four times, and attention over whole squares, as XLA does it."""
    arch = dataclasses.replace(
        fakes.PLAIN, vocab=256, layers=6, d_model=64, heads=2, kv_heads=2, head_dim=32, d_ff=128
    )
    scanned = gradient_count(arch, 4, 256)
    monkeypatch.setattr(transformer, "UNROLLED_LAYERS", 6)
    unrolled = gradient_count(arch, 4, 256)
    assert scanned.flops == unrolled.flops
    said = arithmetic.gradient_flops(arch, 4, 256, 4 * 256)
    assert scanned.flops == pytest.approx(said, rel=1e-9)  # a share of a layer is no whole number


def test_useful_work_is_six_flops_a_parameter_and_token_and_attention_by_the_pairs():
    arch = dataclasses.replace(fakes.PLAIN, sliding_window=4, local_layers=(True, False))
    lengths = [3, 10]
    near = sum(min(i + 1, 4) for length in lengths for i in range(length))
    pairs = near + sum(length * (length + 1) // 2 for length in lengths)
    one = 2 * arch.heads * arch.head_dim * pairs
    assert arithmetic.product_flops(arch, lengths) == one
    matrices = sum(x.size for x in jax.tree.leaves(abstract_params(arch)["blocks"]) if x.ndim == 3)
    head = arch.vocab * arch.d_model
    said = 6 * matrices * 13 + 6 * head * 8 + 6 * one
    assert arithmetic.useful_flops(arch, lengths, trained=8) == said


def test_lengths_have_the_mean_and_the_percentile_that_were_asked_for():
    drawn = Lengths(1000.0, 2500.0).drawn(4000, 10**6)
    assert drawn.mean() == pytest.approx(1000, rel=0.01)
    assert np.quantile(drawn, 0.95) == pytest.approx(2500, rel=0.01)
    assert np.all(Lengths(100.0, 100.0).drawn(16, 512) == 100)
    cut = Lengths(1000.0, 3000.0).drawn(1000, 3000)
    assert cut.max() == 3000 and cut.min() >= 1


def test_every_experiment_names_its_slice_and_every_named_one_is_planned_as_it_says():
    assert several.named() == set(shipped_configs())
    assert several.slices_of("countdown-tiny") == []
    assert several.slices_of("some/configs/gsm8k-0.5b-v5e8.yaml")[0].topology == "v5e:2x4"
    assert several.slices_of("my-own.yaml") == []
    (found,) = several.slices_of("paper/math-delta-l-7b")
    assert (found.topology, found.overrides["mesh.fsdp"]) == ("v5p:2x2x2", 8)
    rows = several.rows(everything=False)
    for own in [*rows, *(x for name in shipped_configs() for x in several.slices_of(name))]:
        slice_ = parse_topology(own.topology)
        mesh = load_config(own.config, own.overrides).mesh
        sizes = [getattr(mesh, axis) or 1 for axis in AXES]
        assert math.prod(sizes) in (1, slice_.size), own
    assert len({(own.name, own.topology) for own in rows}) == len(rows)


def refusal(capsys, *arguments):
    """The one line of a command that is refused."""
    assert main(["plan", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("deltal: ")


def test_bad_input_is_one_line_that_names_the_option(capsys, monkeypatch):
    at = "--topology=gpu:h100x8"
    assert refusal(capsys, at).startswith("config: name one experiment")
    assert refusal(capsys, "countdown-tiny").startswith("--topology: name a slice")
    assert refusal(capsys, "countdown-tiny", "--topology=v5e").startswith("--topology: 'v5e' is")
    said = refusal(capsys, "countdown-tiny", at, "--mesh=fsdp=4,depth=2")
    assert said.startswith("--mesh: 'depth=2' in 'fsdp=4,depth=2'; give sizes of data, fsdp")
    said = refusal(capsys, "countdown-tiny", at, "--mesh=fsdp=16")
    assert said == "--mesh: takes 16 devices, and gpu:h100x8 has 8"
    said = refusal(capsys, "countdown-tiny", at, "--lengths=50,10")
    assert said == "--lengths: '50,10' is not MEAN,P95 with 1 ≤ MEAN ≤ P95 ≤ 192, the limit"
    assert refusal(capsys, "countdown-tiny", at, "rl.step=1").startswith("rl.step: no such field")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = refusal(capsys, "countdown-tiny", "--topology=v5e:2x4")
    assert "is not installed; pip install 'deltal-jax[tpu]'" in said


def test_gpus_are_planned_by_arithmetic_that_says_so_and_what_does_not_fit_has_a_way_out(capsys):
    common = ["plan", "paper/math-delta-l-3072", "--topology=gpu:h100x8", "--json"]
    assert main([*common, "--mesh=fsdp=8"]) == 0
    fits = json.loads(capsys.readouterr().out)
    assert (fits["by"], fits["fits"], fits["ways_out"]) == ("arithmetic", True, [])
    # Parameters, two moments, a sum of gradients and what is added to it: 20 bytes each over 8.
    state = sum(fits["memory"][name] for name in ("parameters", "optimizer", "gradients"))
    assert state == pytest.approx(20 * 3_085_938_688 / 8, rel=0.01)
    # Recomputation does 8 where 6 are useful, or a little more of the head.
    assert 0.6 < fits["full_microbatch"]["mfu_bound"] < 0.8
    assert main([*common, "model.path=Qwen/Qwen2.5-7B"]) == 1
    alone = json.loads(capsys.readouterr().out)
    assert not alone["fits"] and alone["needed"] > CHIPS["h100"].hbm
    assert len(alone["ways_out"]) == 1


def test_the_text_of_a_plan_says_by_whom_what_takes_most_and_what_to_do(capsys):
    assert main(["plan", "paper/math-delta-l-7b", "--topology=gpu:h100x8"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "gpu:h100x8, 8 chips of 74.51 GiB; by arithmetic alone: an estimate"
    assert out[-2].startswith("does not fit: all parts needs ") and "moment_dtype" in out[-1]
    assert Topology("h100", (8,)).chip.hbm / GIB == pytest.approx(74.51, abs=0.01)


@pytest.mark.parametrize(
    ("said", "needed"),
    [
        ("RESOURCE_EXHAUSTED: Used 17.50G of 15.75G hbm. Exceeded hbm capacity", 17.5 * GIB),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (512.00M) exceeds available HBM (15.75G).",
            0.5 * GIB + 100,
        ),
        ("INTERNAL: something else", None),
    ],
)
def test_a_refusal_of_the_compiler_tells_what_would_be_needed(said, needed):
    from deltal_jax.planning.compiling import _needed

    assert _needed(said, arguments=100) == needed
