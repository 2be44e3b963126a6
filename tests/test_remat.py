"""Whatever the backward pass computes anew, the gradient is the same; memory and work are not."""

import dataclasses
import re
from types import SimpleNamespace
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltal_jax.config import ModelConfig, load_config
from deltal_jax.errors import UserError
from deltal_jax.model import kernels
from deltal_jax.model.architecture import Architecture
from deltal_jax.model.remat import CUDNN, POLICIES, Remat, check_pinned_host
from deltal_jax.model.transformer import abstract_params, init_model, make_graphdef, split_model
from deltal_jax.training import activations
from deltal_jax.training.loss import SUPERVISED, microbatch_loss
from deltal_jax.types import Bucket

NAMES = get_args(Remat)
#: Scanned, as no fewer layers are.
DEEP = Architecture(
    vocab=64, layers=6, d_model=64, heads=4, kv_heads=2, head_dim=16, d_ff=192, qkv_bias=True
)
#: In one block of queries: a loop over several would count as one of them.
SHAPE = (4, 128)


def shapes(rows, width):
    """A bucket of one response a row, all of it trained, as shapes."""
    whole = {
        name: jax.ShapeDtypeStruct((rows, width), jnp.int32)
        for name in ("tokens", "positions", "segment_ids")
    }
    numbers = {
        name: jax.ShapeDtypeStruct((rows, width), jnp.float32)
        for name in ("sampler_logprobs", "old_logprobs")
    }
    each = {
        name: jax.ShapeDtypeStruct((rows,), jnp.float32)
        for name in ("advantages", "weights", "auxiliary_weights")
    }
    mask = jax.ShapeDtypeStruct((rows, width), jnp.bool_)
    return Bucket(loss_mask=mask, **whole, **numbers, **each)


def bucket_of(rows, width):
    """The same with tokens."""
    rng, whole = np.random.default_rng(0), (rows, width)
    zeros, ones = np.zeros(whole, np.float32), np.ones(rows, np.float32)
    return Bucket(
        tokens=rng.integers(0, DEEP.vocab, whole).astype(np.int32),
        positions=np.broadcast_to(np.arange(width, dtype=np.int32), whole),
        segment_ids=np.broadcast_to(np.arange(rows, dtype=np.int32)[:, None], whole),
        loss_mask=np.ones(whole, bool),
        sampler_logprobs=zeros,
        old_logprobs=zeros,
        advantages=ones,
        weights=ones / rows,
        auxiliary_weights=ones,
    )


def compiled_gradient(arch, rows, width, dtype=jnp.float32):
    """The program of the gradient of a micro-batch's loss, for shapes alone."""
    graphdef = make_graphdef(arch)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), abstract_params(arch))

    def gradient(params, bucket):
        return jax.grad(lambda p: microbatch_loss(graphdef, p, bucket, SUPERVISED)[0])(params)

    return jax.jit(gradient).lower(params, shapes(rows, width)).compile()


def test_memory_of_a_long_row_grows_with_its_length():
    """Four times the tokens, four times the memory: no scores of all queries, nor logits of all
    tokens, are ever there together."""
    arch = dataclasses.replace(DEEP, vocab=300)
    widths = (2_048, 8_192)
    programs = [compiled_gradient(arch, 1, width, jnp.bfloat16) for width in widths]
    sizes = [program.memory_analysis().temp_size_in_bytes for program in programs]
    assert sizes[1] <= 4.3 * sizes[0]
    for width, program in zip(widths, programs, strict=True):
        found = set(re.findall(r"\w\[([\d,]+)\]", program.as_text()))
        found = [sizes.split(",") for sizes in found]
        assert any(sizes.count(str(width)) == 1 for sizes in found)
        for sizes in found:
            assert sizes.count(str(width)) < 2, sizes
            assert str(width) not in sizes or str(arch.vocab) not in sizes, sizes


@pytest.mark.parametrize("name", ["layer", "attention", "dots", "none"])
def test_the_estimate_of_memory_is_within_a_quarter_of_what_the_compiler_says(name):
    arch = dataclasses.replace(DEEP, remat=name)
    temporary = compiled_gradient(arch, *SHAPE).memory_analysis().temp_size_in_bytes
    assert 0.75 < activations.activation_bytes(arch, *SHAPE) / temporary < 1.25


@pytest.fixture(scope="module")
def programs():
    """That of each policy at one shape, whose attention goes block by block as in long rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deltal_jax.model.attention.WHOLE_ROW", SHAPE[1] // 2)
        patch.setattr("deltal_jax.model.attention.QUERY_BLOCK", SHAPE[1])
        return {x: compiled_gradient(dataclasses.replace(DEEP, remat=x), *SHAPE) for x in NAMES}


def test_the_gradient_is_the_same_whatever_is_computed_anew(programs):
    """In float32; the compiler may fuse what is computed anew in another way, to rounding."""
    params = split_model(init_model(DEEP, jax.random.key(0)))[1]
    bucket = bucket_of(*SHAPE)
    found = {name: program(params, bucket) for name, program in programs.items()}
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(found["none"])) > 1e-2
    for name in NAMES:
        for one, other in zip(*map(jax.tree.leaves, (found[name], found["none"])), strict=True):
            apart = np.linalg.norm(np.asarray(one) - np.asarray(other))
            assert apart <= 1e-6 * np.linalg.norm(other), name


def test_less_memory_is_more_work(programs):
    order = ("layer", "attention", "dots", "none")
    memory = [programs[name].memory_analysis().temp_size_in_bytes for name in order]
    work = [programs[name].cost_analysis()["flops"] for name in order]
    assert memory == sorted(memory) and len(set(memory)) == 4, memory
    assert work == sorted(work, reverse=True) and len(set(work)) == 4, work


@pytest.mark.parametrize(("former", "name"), [(True, "layer"), (False, "none")])
def test_a_config_of_an_older_run_has_true_or_false(former, name, tmp_path):
    assert load_config("countdown-tiny", {"model.remat": former}).model == ModelConfig(
        **vars(load_config("countdown-tiny").model) | {"remat": name}
    )
    path = tmp_path / "config.yaml"
    path.write_text(f"model: {{remat: {str(former).lower()}}}\n")
    assert load_config(path).model.remat == name
    assert load_config(path, {"model.remat": "dots"}).model.remat == "dots"


@pytest.mark.parametrize("wrong", [1, 0, "true", "all", None])
def test_nothing_else_is_a_name(wrong):
    with pytest.raises(UserError, match=r"^model\.remat: .* is not one of none, layer, attention"):
        load_config("countdown-tiny", {"model.remat": wrong})


def test_a_device_without_memory_of_the_host_is_refused():
    def device(*kinds):
        memories = [SimpleNamespace(kind=kind) for kind in kinds]
        return SimpleNamespace(platform="cpu", addressable_memories=lambda: memories)

    check_pinned_host("model.remat", device("device", "pinned_host"), "layer")
    with pytest.raises(UserError) as refused:
        check_pinned_host("model.remat", device("device", "unpinned_host"), "layer")
    assert str(refused.value) == (
        "model.remat: needs devices that reach the host's memory, and a cpu here has only "
        "device, unpinned_host; set it to layer"
    )


def test_inputs_of_layers_in_the_hosts_memory_are_not_on_the_device():
    """A CPU has them where all else is, so this is of the estimate alone."""
    layer, offload = (dataclasses.replace(DEEP, remat=x) for x in ("layer", "offload"))
    each = DEEP.d_model * np.prod(SHAPE) * 4
    found = [activations.offloaded_bytes(arch, *SHAPE) for arch in (layer, offload)]
    assert found == [0, DEEP.layers * each]
    on_device = [activations.activation_bytes(arch, *SHAPE) for arch in (layer, offload)]
    assert on_device[0] - on_device[1] == (DEEP.layers - 1) * each


def test_cudnn_does_not_run_twice_where_what_it_gave_is_kept(monkeypatch):
    """As JAX traces the gradient: the program itself needs a GPU."""
    fused = "jax._src.cudnn.fused_attention_stablehlo"  # where JAX asks which cuDNN there is
    monkeypatch.setattr(f"{fused}.check_cudnn_version", lambda: 90_500)
    monkeypatch.setattr(f"{fused}.check_compute_capability", lambda _: True)

    def layer(x):
        heads = x.reshape(1, 64, 2, 64)
        found = kernels.attend_cudnn(heads, heads, heads)
        return jnp.sum(jnp.sin(found), dtype=jnp.float32)

    def runs(name):
        gradient = jax.grad(jax.checkpoint(layer, policy=POLICIES[name]))
        traced = str(jax.make_jaxpr(gradient)(jnp.ones((1, 64, 128), jnp.bfloat16)))
        return traced.count(f"{CUDNN}[")

    assert [runs(name) for name in ("layer", "attention", "dots")] == [2, 1, 1]
