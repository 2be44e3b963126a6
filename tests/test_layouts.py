"""`mesh.auto`: the laws of the sizes that it chooses."""

import dataclasses
import json
import math

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh

from deltal_jax.cli.main import main
from deltal_jax.config import MeshConfig, load_config
from deltal_jax.errors import UserError
from deltal_jax.model.families import architecture_of
from deltal_jax.model.published import PUBLISHED
from deltal_jax.parallel.layouts import USABLE, Layout, choose_layout, layouts
from deltal_jax.parallel.mesh import AXES
from deltal_jax.training.describe import memory_estimate
from deltal_jax.training.devices import choose_sizes

GIB = 2**30


def size(layout):
    return math.prod(dataclasses.astuple(layout))


@st.composite
def demands(draw):
    """Bytes on a device: whole copies, and what each axis splits."""
    whole, state, weights, rows = (draw(st.integers(0, 100)) for _ in range(4))

    def needed(layout):
        split = layout.fsdp * layout.context * layout.tensor
        return whole + state // split + weights // layout.tensor + rows // layout.context

    return needed


@given(
    devices=st.sampled_from([1, 2, 6, 8, 12, 32]),
    heads=st.sampled_from([1, 2, 6, 14, 16]),
    memory=st.integers(1, 400),
    needed=demands(),
)
def test_it_fits_wherever_any_layout_fits_and_splits_no_more_than_that_needs(
    devices, heads, memory, needed
):
    every = list(layouts(devices, heads))
    assert all(size(x) == devices and heads % x.tensor == 0 for x in every)
    assert len(set(every)) == len(every)
    fitting = [x for x in every if needed(x) <= int(memory * USABLE)]
    if not fitting:
        with pytest.raises(UserError, match=rf"^mesh.auto: no layout of {devices} dev") as refused:
            choose_layout(devices, memory, heads, needed)
        assert "\n" not in str(refused.value)
        return
    found, said = choose_layout(devices, memory, heads, needed)
    assert found in fitting and "\n" not in said
    assert found.context == min(x.context for x in fitting)
    same_context = [x for x in fitting if x.context == found.context]
    assert found.tensor == min(x.tensor for x in same_context)
    assert found.fsdp == min(x.fsdp for x in same_context if x.tensor == found.tensor)


def test_where_the_memory_is_not_known_nothing_is_held_twice():
    found, said = choose_layout(8, None, 2, lambda layout: 1 / 0)
    assert found == Layout(fsdp=8) and "not known" in said


def published(name, **overrides):
    """A config, and the shape of a published model."""
    config = load_config("countdown-checkpoint", {"model.path": name} | overrides)
    shape = architecture_of(PUBLISHED[name])
    return config, dataclasses.replace(
        shape, remat=config.model.remat, compute_dtype=config.model.compute_dtype
    )


LONG = {
    "rollout.max_prompt_length": 1024,
    "rollout.max_response_length": 31_744,
    "rl.tokens_per_microbatch": 32_768,
    "rollout.slots": 8,
    "length_buckets": [32_768],
}


def takes(config, arch, layout):
    """Bytes on a device."""
    mesh = AbstractMesh(tuple(getattr(layout, axis) for axis in AXES), AXES)
    return memory_estimate(config, arch, mesh)["total"]


@pytest.mark.parametrize(
    ("name", "memory", "options", "axes"),
    [
        ("Qwen/Qwen2.5-0.5B", 80, {}, {"data"}),  # eight copies
        ("Qwen/Qwen2.5-3B", 32, {}, {"data", "fsdp"}),
        ("Qwen/Qwen2.5-7B", 32, {}, {"fsdp", "tensor"}),  # the sampler's weights have no room
        ("Qwen/Qwen2.5-3B", 22, LONG, {"context"}),  # nor have the activations of a row
    ],
)
def test_what_is_split_follows_the_model_and_the_longest_row(name, memory, options, axes):
    config, arch = published(name, **options)
    sized, said = choose_sizes(config, arch, memory=memory * GIB)
    layout = Layout(**sized.mesh.sizes)
    assert size(layout) == jax.device_count() == 8
    split = {axis for axis, count in sized.mesh.sizes.items() if count > 1}
    assert axes <= split and ("context" in axes) == ("context" in split), said
    assert takes(sized, arch, layout) <= memory * GIB * USABLE
    if axes != {"data"}:
        assert takes(sized, arch, Layout(data=8)) > memory * GIB * USABLE
    if "context" in axes:
        others = [x for x in layouts(8, arch.heads) if x.context < layout.context]
        assert others and all(takes(sized, arch, x) > memory * GIB * USABLE for x in others)


def test_slots_become_so_many_that_they_split():
    config, arch = published("Qwen/Qwen2.5-0.5B", **{"rollout.slots": 12})
    sized, said = choose_sizes(config, arch, memory=80 * GIB)
    assert sized.rollout.slots == 16 and said.endswith("; rollout.slots: 12 → 16")
    assert choose_sizes(sized, arch, memory=80 * GIB)[0] == sized
    apart = dataclasses.replace(config.rollout, devices=3, slots=12)
    sized, said = choose_sizes(dataclasses.replace(config, rollout=apart), arch, memory=80 * GIB)
    assert sized.mesh.data == 5 and sized.rollout.slots == 15  # the other three sample
    few, _ = choose_sizes(config, arch, jax.devices()[:4], 80 * GIB)
    assert few.mesh.data == 4


def test_what_does_not_fit_says_what_would_help():
    config, arch = published("Qwen/Qwen2.5-7B")
    with pytest.raises(UserError, match=r"^mesh.auto: no layout of 8 devices of 4 GiB .* use more"):
        choose_sizes(config, arch, memory=4 * GIB)


def test_a_dry_run_says_what_was_chosen_and_why(capsys):
    options = ["mesh.auto=true", "rollout.slots=12"]
    assert main(["train", "countdown-tiny", "--dry-run", *options]) == 0
    shown = capsys.readouterr().out
    assert "mesh.auto: data 8: takes about" in shown and "rollout.slots: 12 → 16" in shown
    assert "mesh: data 8: 8 devices" in shown and "16 slots of up to" in shown
    assert main(["train", "countdown-tiny", "--dry-run", "--json", *options]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["notes"][-1].startswith("mesh.auto: data 8")
    assert load_config("countdown-tiny", {"mesh.auto": True}).mesh == MeshConfig(auto=True)
