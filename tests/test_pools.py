"""Laws of the plan: every unfinished response once, in prompt order, from where it stands."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltal_jax.rollout.pools import make_plan
from deltal_jax.types import Responses
from tests import fakes


def responses(count, samples, seed, limit=7):
    """Some finished, some begun, some not."""
    rng = np.random.default_rng(seed)
    B = count * samples
    lengths = (rng.integers(0, limit + 1, B) * rng.integers(0, 2, B)).astype(np.int32)
    there = np.arange(limit) < lengths[:, None]
    return Responses(
        prompts=fakes.prompts(count, seed=seed),
        group_ids=np.repeat(np.arange(count, dtype=np.int32), samples),
        keys=rng.integers(0, 2**32, (B, 2), dtype=np.uint32),
        tokens=np.where(there, rng.integers(3, 23, (B, limit)), 0).astype(np.int32),
        logprobs=np.where(there, -rng.random((B, limit)), 0).astype(np.float32),
        lengths=lengths,
        ended=(lengths > 0) & (rng.random(B) < 0.3),
    )


@given(
    count=st.integers(1, 9),
    samples=st.integers(1, 4),
    devices=st.integers(1, 3),
    slots=st.integers(1, 5),
    needed=st.integers(0, 9),
    seed=st.integers(0, 99),
)
def test_every_unfinished_response_once_with_its_own_sequence(
    count, samples, devices, slots, needed, seed
):
    given_ = responses(count, samples, seed)
    plan = make_plan(given_, min(needed, count), devices, slots)
    planned = plan.rows[plan.rows >= 0]
    assert sorted(planned) == np.flatnonzero(~given_.finished).tolist()
    assert plan.rows.shape == (devices, -(-count // devices) * samples)
    found = []
    for device in range(devices):
        own = plan.rows[device][plan.rows[device] >= 0]
        assert (np.diff(own) > 0).all()
        prompts_of = given_.group_ids[own]
        assert (prompts_of[: plan.needed[device]] < needed).all()
        assert (prompts_of[plan.needed[device] :] >= needed).all()
        for pool in plan.pools:
            for pair in range(pool.counts[device]):
                row = own[pool.row[device, pair]]
                found.append(row)
                number, begun = pool.sequence[device, pair], given_.lengths[row]
                assert pool.begun[device, pair] == begun
                np.testing.assert_array_equal(pool.keys[device, pair], given_.keys[row])
                prompt = given_.group_ids[row]
                length = given_.prompts.lengths[prompt]
                want = [*given_.prompts.tokens[prompt, :length], *given_.tokens[row, :begun]]
                assert pool.lengths[device, number] == len(want)
                assert pool.tokens[device, number, : len(want)].tolist() == want
    assert sorted(found) == sorted(planned)


@pytest.mark.parametrize("samples", [1, 4])
def test_samples_of_a_prompt_share_its_prefill(samples):
    """And those that were begun come first, each from its own tokens."""
    given_ = responses(6, samples, seed=3)
    none = np.zeros_like(given_.lengths)
    fresh = dataclasses.replace(given_, lengths=none, ended=none.astype(bool))
    plan = make_plan(fresh, 6, devices=1, slots=100)
    assert [pool.tokens.shape[1] for pool in plan.pools] == [6]
    assert plan.pools[0].counts.tolist() == [6 * samples]
    mixed = make_plan(given_, 6, devices=1, slots=100)
    began = [pool.begun[0, : pool.counts[0]] > 0 for pool in mixed.pools]
    assert began[0].all() and not began[1].any() and len(began) == 2
