"""What is planned is what runs: the same functions, and the same programs to the letter."""

import gzip
import importlib.util
import json

import jax
import numpy as np
import pytest

from deltal_jax.cli.main import main
from deltal_jax.config import load_config
from deltal_jax.errors import UserError
from deltal_jax.parallel.mesh import make_mesh
from deltal_jax.planning import several
from deltal_jax.planning.compiling import Cache, compile_program
from deltal_jax.planning.plan import ways_out
from deltal_jax.planning.programs import bucket_shapes, make_planned, on_chip, update_programs
from deltal_jax.planning.sampling import decoding_programs, weights_program
from deltal_jax.planning.topology import axis_links, parse_topology, tpu_devices
from deltal_jax.training.buckets import bucket_layout, make_buckets
from deltal_jax.training.devices import make_sampling_mesh, make_training_mesh
from deltal_jax.training.setup import init_params, make_engine, make_setup, make_update
from tests import fakes

#: On 2 × 2 × 2 devices, with every part of a state that a run may have.
SMALL = {
    "model.layers": 1,
    "model.d_model": 16,
    "model.d_ff": 32,
    "model.compute_dtype": "bfloat16",
    "mesh.data": 2,
    "mesh.fsdp": 2,
    "mesh.tensor": 2,
    "rl.prompts_per_step": 8,
    "rl.samples_per_prompt": 2,
    "rl.tokens_per_microbatch": 256,
    "rl.optimizer.moment_dtype": "bfloat16",
    "rollout.slots": 8,
    "rollout.max_prompt_length": 8,
    "rollout.max_response_length": 24,
    "length_buckets": [16, 32],
    "objective.kl_coefficient": 0.1,
}
#: And on one.
ALONE = {"mesh.data": None, "mesh.fsdp": None, "mesh.tensor": None}


def setup_of(overrides):
    setup = make_setup(load_config("countdown-tiny", SMALL | overrides))
    planned = make_planned(setup.config, setup.architecture, jax.devices(), setup.tokenizer.eos_ids)
    return setup, planned


@pytest.mark.parametrize("devices", [8, 1])
def test_the_planned_updates_are_those_of_training(devices):
    setup, planned = setup_of({} if devices == 8 else ALONE)
    config, update = setup.config, make_update(setup, "rl")
    assert planned.update is update
    key = jax.random.key(0)
    state = update.init(init_params(setup, key), key, reference=True)
    rollout = fakes.rollout(16, longest=30, vocab=setup.architecture.vocab)
    zeros = np.zeros(rollout.tokens.shape, np.float32)
    bucket = make_buckets(
        rollout,
        np.arange(16),
        advantages=np.ones(16, np.float32),
        weights=np.ones(16, np.float32),
        reference_logprobs=zeros,
        edges=config.bucket_edges,
        tokens_per_microbatch=config.rl.tokens_per_microbatch,
        row_multiple=update.row_multiple,
    )[-1]
    bucket = update.place(bucket)
    running = update._zero(state.params, bucket)
    programs = {own.name: own for own in update_programs(planned, [bucket.tokens.shape])}
    run = {
        "add": update.add.lower(state.params, running, bucket),
        "logprobs": update.logprobs.lower(state.params, bucket),
        "apply": update.apply.lower(state, running),
    }
    for name, lowered in run.items():
        assert programs[name].lower().as_text() == lowered.as_text(), name
    one = jax.devices()[0]

    def really(tree):
        shards = (s for x in jax.tree.leaves(tree) for s in x.addressable_shards)
        return sum(s.data.nbytes for s in shards if s.device == one and s.data.dtype != "key<fry>")

    held = programs["add"].held
    assert held["parameters"] == really(state.params)
    assert held["optimizer"] == really(state.opt_state)
    assert held["gradients"] == really(running.grads)
    assert held["reference"] == really(state.reference) > 0


@pytest.mark.parametrize("devices", [8, 1])
def test_the_planned_sampling_is_that_of_an_engine(devices):
    setup, planned = setup_of({} if devices == 8 else ALONE)
    engine = make_engine(setup, temperature=setup.config.rollout.temperature, training=True)
    assert planned.engine is engine
    seen = {}

    def watched(name, function):
        def call(*arguments):
            seen.setdefault(name, function.lower(*arguments).as_text())
            return function(*arguments)

        return call

    names = {"weights": "_weights", "prefill": "_prefill", "decode": "_run"}
    before = {name: getattr(engine, own) for name, own in names.items()}
    key = jax.random.key(0)  # the engine reads those of the state that is trained
    params = make_update(setup, "rl").init(init_params(setup, key), key, reference=True).params
    layout = engine.programs["weights"].lower(params).compile().output_shardings
    prompts = fakes.prompts(8, width=8, vocab=setup.architecture.vocab)
    try:
        for name, own in names.items():
            setattr(engine, own, watched(name, before[name]))
        engine.generate(params, prompts, jax.random.key(1), samples=2)
    finally:
        for name, own in names.items():
            setattr(engine, own, before[name])
    programs = [weights_program(planned, {}), *decoding_programs(planned, {}, layout)]
    for own in programs:
        assert own.lower().as_text() == seen[own.name], own.name


def test_the_same_program_is_compiled_once_also_by_another_process(tmp_path):
    _, planned = setup_of({})
    program = update_programs(planned, [(8, 32)])[-1]
    said, folder = [], tmp_path / "texts"
    cache = Cache(tmp_path / "plans.json", folder)
    found, layout = compile_program(planned, program, cache, said.append)
    assert said == ["compiling apply"] and layout is None
    again, _ = compile_program(planned, program, Cache(tmp_path / "plans.json"), said.append)
    assert again == found and len(said) == 1
    _, layout = compile_program(planned, program, cache, said.append, layout=True)
    assert layout is not None and len(said) == 2  # how results lie is not kept
    (text,) = folder.iterdir()
    assert gzip.decompress(text.read_bytes()).startswith(b"HloModule jit__apply")
    # The state is given back where it was; new are a few numbers, and the address of each result.
    memory, count = found.memory, len(jax.tree.leaves(layout))
    assert 0 < memory["outputs"] - memory["aliased"] < 100 + 8 * count
    own = sum(found.held.values()) - found.beside
    assert memory["arguments"] == pytest.approx(own, abs=200)
    assert found.needed > own and not found.stacks


def test_the_widest_and_the_narrowest_bucket_are_planned_or_all_that_may_be_chosen():
    config = load_config("countdown-tiny", SMALL)
    assert bucket_shapes(config, 4) == [(8, 32), (16, 16)]
    every = bucket_shapes(config, 4, every=True)
    lengths = np.random.default_rng(0).integers(1, 33, 50)
    for count in range(1, 50, 7):
        for own in bucket_layout(lengths[:count], (16, 32), 256, row_multiple=4):
            assert (own.rows, own.width) in every


def test_what_is_held_is_counted_on_one_chip_and_the_way_out_names_what_would_help():
    _, planned = setup_of({"rl.optimizer.moment_dtype": "float32"})
    (add, *_) = update_programs(planned, [(8, 32)])
    said = ways_out(planned, add)
    assert [line.split(":")[0] for line in said] == [
        "rl.tokens_per_microbatch=128",
        "model.remat=layer",
        "rl.optimizer.moment_dtype=bfloat16",
        "mesh.fsdp=4 on a slice of twice the chips",
    ]
    assert on_chip(planned_rows()) == 4 * 3 * 4


def planned_rows():
    """[8, 3] of float32, its rows over two devices."""
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = make_mesh(data=1, fsdp=2, devices=jax.devices()[:2])
    own = NamedSharding(mesh, PartitionSpec("fsdp"))
    return jax.ShapeDtypeStruct((8, 3), np.float32, sharding=own)


needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: the extra tpu"
)


@needs_compiler
@pytest.mark.xdist_group("libtpu")  # it locks
def test_a_small_run_is_compiled_for_a_slice_by_its_own_compiler(capsys):
    """On four chips of v5e with splash attention, split over fsdp and tensor."""
    small = [f"{key}={json.dumps(value)}" for key, value in SMALL.items() if "mesh" not in key]
    mesh = "--mesh=fsdp=2,tensor=2"
    assert main(["plan", "countdown-tiny", *small, "--topology=v5e:2x2", mesh, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["fits"], found["chips"], found["by"]) == (True, 4, "compiler")
    programs = {own["name"]: own for own in found["programs"]}
    assert list(programs) == ["add", "logprobs", "apply", "weights", "prefill", "decode"]
    kernels = programs["add"]["kernels"]
    assert kernels["tpu_custom_call"] == 3  # forward; of queries; of keys and values
    axes = {tuple(own["axes"]) for own in programs["add"]["collectives"]}
    assert ("fsdp",) in axes and ("tensor",) in axes
    assert not any(own["refused"] for own in programs.values())
    assert 0 < found["update"]["mfu_bound"] < 0.75 and found["step"]["seconds"] > 0


@needs_compiler
@pytest.mark.xdist_group("libtpu")
def test_what_does_not_fit_on_a_chip_is_said_with_a_way_out(capsys):
    """Ten times the feed-forward that one chip of 16 GiB holds with Adam's moments."""
    wide = ["model.layers=1", "model.d_model=1024", "model.d_ff=1000000", "rollout.engine=http"]
    server = ["rollout.server.url=http://localhost:8000", "length_buckets=[16,256]"]
    assert main(["plan", "countdown-tiny", *wide, *server, "--topology=v5e:1x1"]) == 1
    out = capsys.readouterr().out
    assert "does not fit: " in out
    assert "rl.optimizer.moment_dtype=bfloat16" in out and "mesh.fsdp=2" in out


@needs_compiler
@pytest.mark.xdist_group("libtpu")
def test_the_devices_that_sample_need_be_no_whole_slice_and_a_host_of_eight_is_one_process():
    config = load_config("gsm8k-0.5b-v5e8")
    devices = tpu_devices(parse_topology("v5e:2x4"))
    assert {device.process_index for device in devices} == {0}
    assert make_training_mesh(config, devices) is None
    sampling = make_sampling_mesh(config, devices)
    assert sampling.shape["data"] == 7 and devices[0] not in set(sampling.devices.flat)


@needs_compiler
@pytest.mark.xdist_group("libtpu")
def test_a_collective_has_the_links_of_the_dimensions_that_its_groups_extend_in():
    topology = parse_topology("v5p:4x4x4")
    mesh = make_mesh(data=1, fsdp=16, tensor=4, devices=tpu_devices(topology))
    every = axis_links(topology, mesh, ("fsdp", "tensor"))
    assert every == 6  # three rings
    assert axis_links(topology, mesh, ("tensor",)) == 2
    assert axis_links(topology, mesh, ("fsdp",)) == 4


@needs_compiler
@pytest.mark.xdist_group("libtpu")
def test_a_mesh_that_does_not_follow_the_sides_of_a_slice_is_refused_and_those_of_the_table_do():
    devices = tpu_devices(parse_topology("v6e:4x8"))
    with pytest.raises(UserError, match=r"^mesh: .* does not follow the sides of this slice"):
        make_mesh(data=1, fsdp=16, tensor=2, devices=devices)
    for own in several.rows(everything=False):
        config = load_config(own.config, own.overrides)
        assert make_training_mesh(config, tpu_devices(parse_topology(own.topology))) or config.mesh
