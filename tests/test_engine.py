"""Laws of the sampler: exact log-probabilities, and ids that do not depend on slots."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltal_jax.errors import UserError
from deltal_jax.model.cache import init_cache
from deltal_jax.objective.logprobs import token_logprobs
from deltal_jax.rollout import checks, pools
from deltal_jax.rollout import engine as module
from deltal_jax.rollout.engine import Engine, SamplingOptions
from deltal_jax.rollout.results import assemble, begin
from deltal_jax.rollout.sampling import keep
from deltal_jax.rollout.schedule import ideal_steps
from deltal_jax.rollout.slots import window_of
from tests import fakes

OPTIONS = SamplingOptions(slots=4, max_response_length=12, eos_ids=(fakes.EOS, 5))
KEY = jax.random.key(11, impl="threefry2x32")


#: Most responses are short, some are long.
LONG_TAILED = SamplingOptions(slots=2, max_response_length=58, eos_ids=(3, 5, 7, 9))


@functools.cache
def engine_of(options=OPTIONS):
    """What it has compiled serves all tests."""
    return Engine(fakes.model(fakes.PLAIN)[0], options)


@pytest.fixture(scope="module")
def sampled():
    """Five prompts, three samples each, with 4 slots."""
    params = fakes.model(fakes.PLAIN)[1]
    return engine_of().generate(params, fakes.prompts(5), KEY, samples=3, step=2)


@pytest.fixture(scope="module")
def long_tailed():
    """24 responses with 2 slots, and the widths of the cache meanwhile."""
    sampler, widths = engine_of(LONG_TAILED), []
    run = sampler._run

    def watched(*arguments):
        widths.append(window_of(arguments[3]))
        return run(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "NARROWEST", 8)
        patch.setattr(sampler, "_run", watched)
        params = fakes.model(fakes.PLAIN)[1]
        return sampler.generate(params, fakes.prompts(24), KEY, samples=1)[0], widths


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


@pytest.mark.parametrize("slots", [1, 16])
def test_the_same_ids_for_any_number_of_slots(sampled, slots):
    params = fakes.model(fakes.PLAIN)[1]
    engine = engine_of(dataclasses.replace(OPTIONS, slots=slots))
    other, _ = engine.generate(params, fakes.prompts(5), KEY, samples=3, step=2)
    np.testing.assert_array_equal(sampled[0].tokens, other.tokens)
    np.testing.assert_array_equal(sampled[0].loss_mask, other.loss_mask)
    np.testing.assert_allclose(sampled[0].logprobs, other.logprobs, atol=1e-5)


def test_the_same_again_is_the_same_to_the_bit(sampled):
    graphdef, params = fakes.model(fakes.PLAIN)
    again, _ = Engine(graphdef, OPTIONS).generate(params, fakes.prompts(5), KEY, samples=3, step=2)
    np.testing.assert_array_equal(again.tokens, sampled[0].tokens)
    np.testing.assert_array_equal(again.logprobs, sampled[0].logprobs)


def test_a_prompt_samples_the_same_alone_and_among_others(sampled):
    params = fakes.model(fakes.PLAIN)[1]
    whole = fakes.prompts(5)
    third = jax.tree.map(lambda x: x[2:3], whole)
    alone, _ = engine_of().generate(params, third, KEY, samples=3, step=2)
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
    params = fakes.model(fakes.PLAIN)[1]
    free, _ = engine_of().generate(params, fakes.prompts(5), KEY, samples=3)
    lengths = free.response_lengths
    ended = int(lengths[~free.truncated].max())
    options = dataclasses.replace(OPTIONS, max_response_length=ended)
    cut, _ = engine_of(options).generate(params, fakes.prompts(5), KEY, samples=3)
    at_limit = ~free.truncated & (lengths == ended)
    assert at_limit.any() and not cut.truncated[at_limit].any()
    assert cut.truncated[lengths > ended].all()


def test_slots_are_as_full_as_ideal_list_scheduling(sampled):
    rollout, stats = sampled
    lengths = rollout.response_lengths
    assert stats.useful_steps == lengths.sum()
    assert stats.slot_steps == stats.ideal_slot_steps == 4 * ideal_steps(lengths, 4)
    assert stats.utilization_queued == 1.0 and 0.8 < stats.utilization <= 1.0


#: Each makes the host do something that the others don't.
HOSTS = {
    "one pool": {},
    "a pool a prompt": {"POOL_PAIRS": 0.5},
    "narrow windows": {"NARROWEST": 4},
    "narrow prompts": {"NARROWEST_PROMPT": 1, "PREFILL_TOKENS": 12},
    "all": {"POOL_PAIRS": 0.5, "NARROWEST": 4, "NARROWEST_PROMPT": 1, "PREFILL_TOKENS": 6},
}


@pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)
def test_pools_and_windows_change_no_id(sampled, host, monkeypatch):
    for name, value in host.items():
        monkeypatch.setattr(pools if hasattr(pools, name) else module, name, value)
    params = fakes.model(fakes.PLAIN)[1]
    engine, sizes = engine_of(), []
    resize = engine._resize
    monkeypatch.setattr(
        engine, "_resize", lambda slots, window: (sizes.append(window), resize(slots, window))[1]
    )
    other, stats = engine.generate(params, fakes.prompts(5), KEY, samples=3, step=2)
    np.testing.assert_array_equal(sampled[0].tokens, other.tokens)
    np.testing.assert_array_equal(sampled[0].truncated, other.truncated)
    np.testing.assert_allclose(sampled[0].logprobs, other.logprobs, atol=1e-5)
    assert stats.useful_steps == other.response_lengths.sum()
    assert stats.slot_steps == stats.ideal_slot_steps
    assert bool(sizes) is ("NARROWEST" in host)


@pytest.mark.parametrize("needed", [1, 3])
def test_what_was_begun_goes_on_where_it_stood(sampled, needed):
    """In two goes, the second with what the first left unfinished: the same as in one."""
    params = fakes.model(fakes.PLAIN)[1]
    engine = engine_of()
    none = begin(OPTIONS, fakes.prompts(5), KEY, samples=3, step=2)
    some, first = engine.sample(params, none, needed=needed)
    assert some.finished[: 3 * needed].all() and not some.finished.all()
    assert (some.lengths[~some.finished] > 0).any()
    every, second = engine.sample(params, some)
    got, want = assemble(every), sampled[0]
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.truncated, want.truncated)
    np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-5)
    # What was there stays as it was, to the bit.
    before = np.arange(12) < some.lengths[:, None]
    np.testing.assert_array_equal(every.logprobs[before], some.logprobs[before])
    assert first.useful_steps == some.lengths.sum()
    assert second.useful_steps == (every.lengths - some.lengths).sum()
    again, nothing = engine.sample(params, every)
    np.testing.assert_array_equal(again.tokens, every.tokens)
    assert nothing.slot_steps == 0


def test_tokens_that_other_parameters_sampled_keep_their_logprobs():
    """The prefix is scored by the old parameters, the rest by the new ones."""
    old = fakes.model(fakes.PLAIN)[1]
    new = jax.tree.map(lambda x: x * 1.1 if x.ndim > 1 else x, old)
    engine = engine_of()
    some, _ = engine.sample(old, begin(OPTIONS, fakes.prompts(5), KEY, samples=3, step=2), needed=1)
    every, _ = engine.sample(new, some)
    rollout = assemble(every)
    scored = [
        np.asarray(
            token_logprobs(jnp.asarray(logits[:, :-1]), jnp.asarray(rollout.tokens[:, 1:]))[0]
        )
        for logits in (fakes.forward(fakes.PLAIN, p, rollout.tokens) for p in (old, new))
    ]
    at = np.arange(rollout.tokens.shape[1] - 1) + 1 - rollout.prompt_lengths[:, None]
    want = np.where(at < some.lengths[:, None], *scored)
    mask = rollout.loss_mask[:, 1:]
    np.testing.assert_allclose(rollout.logprobs[:, 1:][mask], want[mask], atol=1e-5)
    carried = ~some.finished & (some.lengths > 0)
    assert carried.any() and (np.abs(scored[0] - scored[1])[mask] > 1e-3).mean() > 0.5


def test_slots_that_idle_in_the_tail_are_given_up(long_tailed, monkeypatch):
    """As many slots as responses: three quarters, a half, … of them are left, as soon as the live
    ones fit; several sizes at once where several responses end together."""
    want, _ = long_tailed
    engine, sizes = engine_of(dataclasses.replace(LONG_TAILED, slots=24)), []
    compact = engine._compact
    monkeypatch.setattr(
        engine, "_compact", lambda slots, size: (sizes.append(size), compact(slots, size))[1]
    )
    params = fakes.model(fakes.PLAIN)[1]
    got, stats = engine.generate(params, fakes.prompts(24), KEY, samples=1)
    np.testing.assert_array_equal(want.tokens, got.tokens)
    np.testing.assert_array_equal(want.truncated, got.truncated)
    np.testing.assert_allclose(want.logprobs, got.logprobs, atol=1e-5)
    assert sizes == [18, 12, 6, 4]  # not 9: several ended in one step
    assert stats.useful_steps == got.response_lengths.sum()
    assert stats.slot_steps < 0.5 * stats.ideal_slot_steps
    assert stats.ideal_slot_steps == 24 * got.response_lengths.max()


def test_the_cache_grows_with_the_longest_live_response_and_shrinks_after_it(long_tailed):
    """One response of 24 runs to 38 tokens, the others end soon: the window follows."""
    rollout, widths = long_tailed
    lengths = rollout.response_lengths
    assert lengths.max() > 32 and np.median(lengths) < 8
    assert widths[0] == 8 and sorted(set(widths)) == [8, 12, 16, 24, 32, 48]
    assert any(after < before for before, after in itertools.pairwise(widths))


@pytest.mark.parametrize(
    ("slots", "samples", "needed", "count", "limit"),
    [(8, 1, None, 12, 24), (2, 1, None, 24, 58), (4, 3, 2, 12, 24)],
    ids=["the tail gives up slots", "windows grow and shrink", "the first prompts are enough"],
)
def test_who_listens_hears_of_responses_as_they_end_and_changes_none(
    slots, samples, needed, count, limit, monkeypatch
):
    """Steps, windows, slots and so every bit are as without a listener; what goes on from before
    is told with its first tokens."""
    monkeypatch.setattr(module, "NARROWEST", 8)
    monkeypatch.setattr(module, "CHUNK", 3)
    params = fakes.model(fakes.PLAIN)[1]
    options = dataclasses.replace(LONG_TAILED, slots=slots, max_response_length=limit)
    engine = engine_of(options)
    responses = begin(options, fakes.prompts(count), KEY, samples=samples)
    while not responses.finished.all():
        told = []
        want, steps = engine.sample(params, responses, needed=needed)
        found, heard_steps = engine.sample(
            params, responses, needed=needed, finished=lambda *of, told=told: told.append(of)
        )
        jax.tree.map(np.testing.assert_array_equal, found, want)
        assert heard_steps == steps
        ended = np.flatnonzero(found.finished & ~responses.finished)
        rows = [row for row, _ in told]
        assert len(set(rows)) == len(rows) > 0.6 * len(ended) and set(rows) <= set(ended)
        for row, tokens in told:
            np.testing.assert_array_equal(tokens, found.tokens[row, : found.lengths[row]])
        responses, needed = found, None


def test_long_tailed_responses_keep_the_slots_full_while_some_wait():
    """Of a load whose lengths vary by more than twenty times; a prompt's prefill is made once."""
    graphdef, params = fakes.model(fakes.PLAIN)
    options = SamplingOptions(slots=8, max_response_length=58, eos_ids=(3, 5))
    engine, prefilled = Engine(graphdef, options), []
    prefill = engine._prefill
    engine._prefill = lambda p, tokens: (prefilled.append(np.asarray(tokens)), prefill(p, tokens))[
        1
    ]
    prompts = fakes.prompts(24)
    rollout, stats = engine.generate(params, prompts, KEY, samples=4)
    lengths = rollout.response_lengths
    low, high = np.percentile(lengths, [5, 95])
    assert high > 20 * low and len(lengths) == 96
    assert stats.utilization_queued >= 0.9
    assert stats.slot_steps <= stats.ideal_slot_steps
    rows = np.concatenate(prefilled)[:, : prompts.tokens.shape[1]]
    np.testing.assert_array_equal(rows[rows.any(axis=1)], prompts.tokens)


def test_list_scheduling_is_within_the_bounds_of_any_schedule():
    """Lognormal with σ = 1, the limit 32 times the median."""
    lengths = np.clip(np.exp(np.random.default_rng(0).normal(3, 1, 256)), 1, 640).astype(int)
    steps = ideal_steps(lengths, 16)
    # While something waits no slot is idle: so few steps would do if the end were not ragged.
    assert lengths.sum() / 16 <= steps <= lengths.sum() / 16 + lengths.max()
    assert ideal_steps(lengths, 1) == lengths.sum() and ideal_steps(lengths, 500) == lengths.max()


@pytest.mark.parametrize(
    "knobs", [{"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}, {"temperature": 0.7, "top_p": 0.8}]
)
def test_logprobs_are_of_the_distribution_that_was_drawn_from(knobs):
    """And the raw ones of the softmax of the logits, whatever the knobs."""
    graphdef, params = fakes.model(fakes.PLAIN)
    options = dataclasses.replace(OPTIONS, raw_logprobs=True, **knobs)
    rollout, _ = Engine(graphdef, options).generate(params, fakes.prompts(3), KEY, samples=2)
    logits = fakes.forward(fakes.PLAIN, params, rollout.tokens)[:, :-1]
    filters = {"top_k": None, "top_p": 1.0, "min_p": 0.0} | knobs
    temperature = filters.pop("temperature", 1.0)
    scores = np.stack([keep(jnp.asarray(row / temperature), **filters) for row in logits])
    mask, targets = rollout.loss_mask[:, 1:], rollout.tokens[:, 1:, None]
    for found, of in ((rollout.logprobs, scores), (rollout.raw_logprobs, logits)):
        every = np.take_along_axis(np.asarray(jax.nn.log_softmax(of)), targets, axis=-1)[..., 0]
        np.testing.assert_allclose(found[:, 1:][mask], every[mask], atol=2e-5)
    assert (rollout.logprobs[:, 1:][mask] > rollout.raw_logprobs[:, 1:][mask]).mean() > 0.5


REFUSALS = {
    "no slot": ({"slots": 0}, {}, "rollout.slots: needs at least one"),
    "no length": (
        {"max_response_length": 0},
        {},
        "rollout.max_response_length: must be at least 1",
    ),
    "unknown end": ({"eos_ids": (2, 23)}, {}, "eos_ids: 23 is no id of a vocabulary of 23"),
    "empty prompt": ({}, {"lengths": [2, 0, 3]}, "prompts: number 1 is empty"),
    "long prompt": (
        {},
        {"lengths": [2, 9, 3]},
        "rollout.max_prompt_length: 6, but a prompt takes 9",
    ),
    "unknown id": (
        {},
        {"tokens": np.full((3, 6), 23, np.int32)},
        "prompts: 23 is no id of a vocabulary of 23",
    ),
    "lengths of others": ({}, {"lengths": [2, 3]}, "prompts: 3 of them have 2 lengths"),
    "endless temperature": ({"temperature": np.inf}, {}, "rollout.temperature: inf is out"),
    "no prompt": (
        {},
        {"tokens": np.zeros((0, 6), np.int32), "lengths": []},
        "prompts: there is none",
    ),
}


@pytest.mark.parametrize(("options", "prompts", "said"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_sampled_is_refused_before_anything_compiles(options, prompts, said):
    graphdef, params = fakes.model(fakes.PLAIN)
    given = {k: np.asarray(v, np.int32) for k, v in prompts.items()}
    engine = Engine(graphdef, dataclasses.replace(OPTIONS, **options))
    with pytest.raises(UserError) as caught:
        engine.generate(params, dataclasses.replace(fakes.prompts(3), **given), KEY, samples=1)
    assert str(caught.value).startswith(said)


def test_slots_whose_cache_does_not_fit_are_refused_with_how_many_would(monkeypatch):
    params = fakes.model(fakes.PLAIN)[1]
    memory = checks.sampling_memory(OPTIONS, fakes.PLAIN, params, (3, 6), 2)
    cache = init_cache(2, OPTIONS.slots, 2, 6 + 12, 8, jnp.dtype("float32"))
    assert memory["kv_cache"] == sum(x.nbytes for x in jax.tree.leaves(cache))
    assert memory["sampling_weights"] == sum(x.nbytes for x in jax.tree.leaves(params["blocks"]))
    prompts = init_cache(2, 3, 2, 32, 8, jnp.dtype("float32"))
    assert memory["prompt_cache"] == sum(x.nbytes for x in jax.tree.leaves(prompts))
    assert memory["responses"] == 3 * 2 * 12 * (4 + 4)
    short = sum(memory.values()) - 1
    monkeypatch.setattr(checks, "free_memory", lambda devices: short)
    engine = engine_of()
    with pytest.raises(UserError, match=r"rollout\.slots: sampling with 4 takes .* 3 slots would"):
        engine.generate(params, fakes.prompts(3), KEY, samples=2)
    monkeypatch.setattr(checks, "free_memory", lambda devices: short + 1)
    engine.generate(params, fakes.prompts(3), KEY, samples=2)


def test_the_memory_of_responses_that_go_on_is_that_of_all_their_tokens():
    params = fakes.model(fakes.PLAIN)[1]
    begun = begin(OPTIONS, fakes.prompts(4), KEY, samples=2)
    begun = dataclasses.replace(begun, lengths=np.repeat(np.int32([11, 0]), 4))  # one a slot
    pool = pools.make_plan(begun, 4, 1, OPTIONS.slots).pools[0]
    count, longest = pool.tokens.shape[1:]
    width = pools.doubled(longest, pools.NARROWEST_PROMPT)
    stored = init_cache(2, count, 2, width, 8, jnp.dtype("float32"))
    memory = checks.sampling_memory(OPTIONS, fakes.PLAIN, params, (4, 6), 2, carried=True)
    assert memory["prompt_cache"] == sum(x.nbytes for x in jax.tree.leaves(stored))


def test_more_slots_than_this_machine_has_memory_for_are_refused():
    graphdef, params = fakes.model(fakes.PLAIN)
    engine = Engine(graphdef, dataclasses.replace(OPTIONS, slots=2**30))
    with pytest.raises(UserError, match=r"rollout\.slots: sampling with 1073741824 takes"):
        engine.generate(params, fakes.prompts(3), KEY, samples=1)


def test_greedy_takes_the_top_token_of_the_full_forward():
    graphdef, params = fakes.model(fakes.PLAIN)
    options = dataclasses.replace(OPTIONS, temperature=0.0)
    rollout, _ = Engine(graphdef, options).generate(params, fakes.prompts(2), KEY, samples=1)
    tokens = rollout.tokens
    logits = fakes.forward(fakes.PLAIN, params, tokens)
    top = logits.argmax(-1)[:, :-1]
    mask = rollout.loss_mask[:, 1:]
    np.testing.assert_array_equal(rollout.tokens[:, 1:][mask], top[mask])
