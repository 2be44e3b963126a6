"""Laws of the sampler: exact log-probabilities, and ids that do not depend on slots."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltal_jax.objective.logprobs import token_logprobs
from deltal_jax.rollout.engine import Engine, SamplingOptions
from tests import fakes

OPTIONS = SamplingOptions(slots=4, max_response_length=12, eos_ids=(fakes.EOS, 5))
KEY = jax.random.key(11, impl="threefry2x32")


@pytest.fixture(scope="module")
def sampled():
    """Five prompts, three samples each, with 4 slots."""
    graphdef, params = fakes.model(fakes.PLAIN)
    return Engine(graphdef, OPTIONS).generate(params, fakes.prompts(5), KEY, samples=3, step=2)


def test_logprobs_are_those_of_the_full_forward(sampled):
    rollout, _ = sampled
    params = fakes.model(fakes.PLAIN)[1]
    tokens = rollout.tokens
    logits = fakes.forward(fakes.PLAIN, params, tokens)
    want, _ = token_logprobs(jnp.asarray(logits[:, :-1]), jnp.asarray(tokens[:, 1:]))
    mask = rollout.loss_mask[:, 1:]
    np.testing.assert_allclose(rollout.logprobs[:, 1:][mask], np.asarray(want)[mask], atol=1e-5)
    assert (rollout.logprobs[:, 1:][~mask] == 0).all()
    assert mask.sum() > 60


def test_temperature_is_in_the_logprobs():
    graphdef, params = fakes.model(fakes.PLAIN)
    options = dataclasses.replace(OPTIONS, temperature=0.6)
    rollout, _ = Engine(graphdef, options).generate(params, fakes.prompts(2), KEY, samples=2)
    tokens = rollout.tokens
    logits = fakes.forward(fakes.PLAIN, params, tokens)
    want, _ = token_logprobs(
        jnp.asarray(logits[:, :-1]), jnp.asarray(tokens[:, 1:]), temperature=0.6
    )
    mask = rollout.loss_mask[:, 1:]
    np.testing.assert_allclose(rollout.logprobs[:, 1:][mask], np.asarray(want)[mask], atol=1e-5)


@pytest.mark.parametrize("slots", [1, 16])
def test_the_same_ids_for_any_number_of_slots(sampled, slots):
    graphdef, params = fakes.model(fakes.PLAIN)
    engine = Engine(graphdef, dataclasses.replace(OPTIONS, slots=slots))
    other, _ = engine.generate(params, fakes.prompts(5), KEY, samples=3, step=2)
    np.testing.assert_array_equal(sampled[0].tokens, other.tokens)
    np.testing.assert_array_equal(sampled[0].loss_mask, other.loss_mask)
    np.testing.assert_allclose(sampled[0].logprobs, other.logprobs, atol=1e-5)


def test_a_prompt_samples_the_same_alone_and_among_others(sampled):
    graphdef, params = fakes.model(fakes.PLAIN)
    whole = fakes.prompts(5)
    third = jax.tree.map(lambda x: x[2:3], whole)
    alone, _ = Engine(graphdef, OPTIONS).generate(params, third, KEY, samples=3, step=2)
    np.testing.assert_array_equal(alone.tokens, sampled[0].tokens[6:9])


def test_samples_of_a_prompt_differ(sampled):
    """Very short ones may coincide by chance; those of five tokens or more do not."""
    rollout = sampled[0]
    long = rollout.response_lengths >= 5
    rows = [
        (int(p), row.tobytes()) for p, row in zip(rollout.group_ids, rollout.tokens, strict=True)
    ]
    chosen = [row for row, is_long in zip(rows, long, strict=True) if is_long]
    assert len(chosen) >= 8 and len(set(chosen)) == len(chosen)
    assert all(len({row for row in rows if row[0] == p}) > 1 for p in range(5))


def test_masks_mark_what_was_sampled_and_nothing_else(sampled):
    rollout, _ = sampled
    eos = np.asarray(OPTIONS.eos_ids)
    prompts = fakes.prompts(5)
    for row in range(15):
        start, end = rollout.prompt_lengths[row], rollout.lengths[row]
        np.testing.assert_array_equal(rollout.tokens[row, :start], prompts.tokens[row // 3, :start])
        assert rollout.loss_mask[row].nonzero()[0].tolist() == list(range(start, end))
        response = rollout.tokens[row, start:end]
        assert not np.isin(response[:-1], eos).any()
        assert rollout.truncated[row] == (response[-1] not in eos)
        assert 1 <= len(response) <= 12
        assert not rollout.truncated[row] or len(response) == 12
        assert (rollout.tokens[row, end:] == 0).all()
    assert 0 < rollout.truncated.sum() < 15
    np.testing.assert_array_equal(rollout.group_ids, np.repeat(np.arange(5), 3))


def test_an_end_at_the_length_limit_is_not_truncated():
    graphdef, params = fakes.model(fakes.PLAIN)
    free, _ = Engine(graphdef, OPTIONS).generate(params, fakes.prompts(5), KEY, samples=3)
    lengths = free.response_lengths
    ended = int(lengths[~free.truncated].max())
    options = dataclasses.replace(OPTIONS, max_response_length=ended)
    cut, _ = Engine(graphdef, options).generate(params, fakes.prompts(5), KEY, samples=3)
    at_limit = ~free.truncated & (lengths == ended)
    assert at_limit.any() and not cut.truncated[at_limit].any()
    assert cut.truncated[lengths > ended].all()


def test_slot_steps_are_counted_and_slots_stay_busy(sampled):
    rollout, stats = sampled
    # The first token of a response comes from its prompt's prefill, the others from one step each.
    assert stats.useful_steps == rollout.response_lengths.sum() - 15
    assert stats.slot_steps % 4 == 0
    longest_first = rollout.response_lengths.max() * np.ceil(15 / 4) * 4
    assert stats.useful_steps <= stats.slot_steps < longest_first


def test_streaming_gives_the_tokens_of_generate(sampled):
    graphdef, params = fakes.model(fakes.PLAIN)
    first = jax.tree.map(lambda x: x[:1], fakes.prompts(5))
    streamed = list(Engine(graphdef, OPTIONS).stream(params, first, KEY, step=2))
    rollout = sampled[0]
    assert streamed == rollout.tokens[0][rollout.loss_mask[0]].tolist()


def test_greedy_takes_the_top_token_of_the_full_forward():
    graphdef, params = fakes.model(fakes.PLAIN)
    options = dataclasses.replace(OPTIONS, temperature=0.0)
    rollout, _ = Engine(graphdef, options).generate(params, fakes.prompts(2), KEY, samples=1)
    tokens = rollout.tokens
    logits = fakes.forward(fakes.PLAIN, params, tokens)
    top = logits.argmax(-1)[:, :-1]
    mask = rollout.loss_mask[:, 1:]
    np.testing.assert_array_equal(rollout.tokens[:, 1:][mask], top[mask])
