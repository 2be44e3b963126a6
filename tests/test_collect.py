"""Rollout batches: prompts, grades and metrics that agree with them; groups in prompt order."""

import copy
import dataclasses
import heapq
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltal_jax.config import load_config
from deltal_jax.errors import UserError
from deltal_jax.objective.logprobs import token_logprobs
from deltal_jax.rollout import engine as engine_module
from deltal_jax.rollout.engine import Engine
from deltal_jax.rollout.results import assemble, begin
from deltal_jax.tasks.base import Verdict
from deltal_jax.tasks.grading import Reward
from deltal_jax.tasks.workers import Workers, WorkerStartError
from deltal_jax.training.collect import RolloutStream, response_texts
from deltal_jax.training.setup import (
    draw_training,
    encode_problems,
    init_params,
    make_engine,
    make_setup,
)
from tests.fakes import Chains, chain_setup, forward
from tests.test_workers import until

OPTIONS = {
    "model.layers": 1,
    "model.d_model": 16,
    "model.head_dim": 8,
    "model.d_ff": 16,
    "rollout.max_response_length": 20,
    "rl.prompts_per_step": 4,
    "rl.samples_per_prompt": 4,
}


@pytest.fixture(scope="module")
def collected():
    setup = make_setup(load_config("countdown-tiny", OPTIONS))
    params = init_params(setup, jax.random.key(3))
    engine = make_engine(setup, temperature=1.0)

    def reward(prompts, responses, answers):
        return [None if i == 5 else float(len(r) % 3) for i, r in enumerate(responses)]

    key = jax.random.key(0, impl="threefry2x32")
    stream = RolloutStream(setup, engine, key, [Reward(reward)], next_prompt=8)
    return setup, [stream.next(params, step) for step in (2, 3)]


def test_rewards_are_the_users_and_a_missing_one_is_kept_apart(collected):
    setup, (batch, _) = collected
    rewards, texts = batch.rewards, response_texts(setup, batch.rollout)
    want = np.asarray([float(len(r) % 3) for r in texts])
    want[5] = np.nan
    np.testing.assert_array_equal(rewards, want)
    assert batch.metrics["reward/missing"] == 1
    assert batch.metrics["reward/mean"] == pytest.approx(np.nanmean(want))


def test_responses_are_the_texts_of_the_sampled_tokens(collected):
    setup, (batch, _) = collected
    rollout = batch.rollout
    texts = response_texts(setup, rollout)
    assert len(texts) == 16
    np.testing.assert_array_equal(rollout.group_ids, np.repeat(np.arange(4), 4))
    for i, text in enumerate(texts):
        ids = rollout.tokens[i, rollout.prompt_lengths[i] : rollout.lengths[i]].tolist()
        ended = ids[-1] in setup.tokenizer.eos_ids
        assert ended != rollout.truncated[i]
        assert text == setup.tokenizer.decode(ids[:-1] if ended else ids)
    lengths = rollout.lengths - rollout.prompt_lengths
    np.testing.assert_array_equal(rollout.response_lengths, lengths)
    assert batch.metrics["length/mean"] == pytest.approx(lengths.mean())
    assert batch.metrics["length/max"] == lengths.max()
    assert batch.metrics["length/truncated_frac"] == pytest.approx(rollout.truncated.mean())


def test_prompts_come_from_consecutive_positions_of_the_stream(collected):
    setup, batches = collected
    for step, batch in zip((2, 3), batches, strict=True):
        np.testing.assert_array_equal(batch.positions, np.repeat(np.arange(4) + step * 4, 4))
        want = [setup.task.problem(0, step * 4 + i).prompt for i in range(4)]
        starts = zip(batch.rollout.tokens[::4], batch.rollout.prompt_lengths[::4], strict=True)
        assert [setup.tokenizer.decode(ids[1:n].tolist()) for ids, n in starts] == want


KEY = jax.random.key(5, impl="threefry2x32")
PARTIAL = {"rollout.partial": True, "rollout.oversampling": 2.0}


def groups_of(batch, samples=3):
    """Positions of the groups of a batch."""
    return batch.positions[::samples].tolist()


def chain_stream(overrides, rewards=("task",), engine=None):
    setup, params = chain_setup(overrides)
    engine = engine or make_engine(setup, temperature=1.0, training=True)
    return RolloutStream(setup, engine, KEY, rewards), params


class Graded:
    """A reward that keeps what it was asked about."""

    def __init__(self, reward):
        self.groups, self._reward = [], reward

    def __call__(self, prompts, responses, answers):
        values = [self._reward(response) for response in responses]
        for start in range(0, len(answers), 3):
            self.groups.append((answers[start], values[start : start + 3]))
        return values


class Counting(Engine):
    """An engine that counts the tokens that it samples."""

    tokens = 0

    def sample(self, params, responses, **options):
        found, stats = super().sample(params, responses, **options)
        self.tokens += int(found.lengths.sum() - responses.lengths.sum())
        return found, stats


def ends(lengths, slots):
    """When each of Int[P G] responses ends, where each takes a token a step and begins, in order,
    as soon as a slot is free."""
    free, found = [0] * slots, np.zeros(lengths.shape, int)
    for index in np.ndindex(lengths.shape):
        found[index] = free[0] + lengths[index]
        heapq.heapreplace(free, found[index])
    return found


def test_groups_are_trained_in_prompt_order_and_slow_ones_are_not_left_behind():
    """Of the prompts that begin in a step, those that end first have far shorter responses."""
    stream, params = chain_stream(PARTIAL)
    problems = [stream.setup.task.problem(0, position) for position in range(8)]
    whole = begin(stream.engine.options, encode_problems(stream.setup, problems), KEY, samples=3)
    whole, _ = stream.engine.sample(params, whole)
    lengths = whole.lengths.reshape(8, 3)
    first = np.argsort(ends(lengths, slots=6).max(axis=1), kind="stable")[:4]
    assert 1 not in first  # a slow one
    batches = [stream.next(params, step) for step in range(6)]
    np.testing.assert_array_equal(
        batches[0].rollout.tokens, assemble(whole).tokens[: 4 * 3], "the first four prompts"
    )
    trained = batches[0].rollout.response_lengths
    assert lengths[first].mean() < 0.5 * trained.mean()
    assert [groups_of(batch) for batch in batches] == np.arange(24).reshape(6, 4).tolist()
    assert any(batch.metrics["rollout/carried"] > 0 for batch in batches)
    slow = np.concatenate([batch.positions % 4 == 1 for batch in batches])
    found = np.concatenate([batch.rollout.response_lengths for batch in batches])
    assert found[slow].mean() > 5 * found[~slow].mean()


def test_dynamic_sampling_takes_the_first_groups_that_vary_and_grades_each_once():
    spy = Graded(lambda response: float(len(response.split()) > 3))
    options = {"rollout.dynamic_sampling": "reward", "rollout.oversampling": 1.5}
    shared = chain_stream(options)[0].engine
    own = Counting(shared._graphdef, shared.options)
    stream, params = chain_stream(options, [Reward(spy)], own)
    rounds = []
    for step in range(3):
        spy.groups.clear()
        own.tokens = 0
        start = stream.next_prompt
        batch = stream.next(params, step)
        seen = [position for position, _ in spy.groups]
        assert seen == sorted(set(seen)) and seen[0] == start
        assert seen[-1] < stream.next_prompt  # what was sampled in vain begins in no later step
        varied = [position for position, rewards in spy.groups if len(set(rewards)) > 1]
        assert groups_of(batch) == varied == varied[:4]
        assert len(varied) < len(seen)
        metrics = batch.metrics
        assert metrics["rollout/informative_groups"] == 4 and metrics["reward/frac_zero_std"] == 0
        rounds.append(metrics["rollout/rounds"])
        assert metrics["rollout/groups_dropped"] == stream.next_prompt - start - 4
        assert metrics["rollout/tokens"] == own.tokens  # of what was never graded, too
        assert metrics["rollout/informative_frac"] == pytest.approx(4 / len(seen))
        everything = np.mean([rewards for _, rewards in spy.groups])
        assert metrics["rollout/reward_mean"] == pytest.approx(everything)
        assert stream.carried is None
    assert max(rounds) > 1
    # Rounds of any size share their programs.
    assert stream.engine._empty._cache_size() == stream.engine._prefill._cache_size() == 1


def test_by_accuracy_what_counts_is_the_tasks_own_verdict():
    options = {"rollout.dynamic_sampling": "accuracy"}
    stream, params = chain_stream(options, [Reward(lambda p, r, a: range(len(r)), name="rank")])
    batch = stream.next(params, 0)
    texts = response_texts(stream.setup, batch.rollout)
    even = np.asarray([len(text.split()) % 2 == 0 for text in texts]).reshape(4, 3)
    assert np.all(even.any(axis=1) & ~even.all(axis=1))
    assert batch.metrics["rollout/accuracy_mean"] != batch.metrics["accuracy/mean"]


def test_after_the_last_round_the_batch_is_filled_up_with_the_first_other_groups():
    options = {"rollout.dynamic_sampling": "reward", "rollout.max_rounds": 2}
    missing = Graded(lambda response: None)
    stream, params = chain_stream(options, [Reward(missing)])
    batch = stream.next(params, 0)
    assert groups_of(batch) == [0, 1, 2, 3]
    assert [position for position, _ in missing.groups] == list(range(8))
    names = ("rounds", "informative_groups", "groups_dropped")
    assert [batch.metrics[f"rollout/{name}"] for name in names] == [2, 0, 4]
    assert groups_of(stream.next(params, 1)) == [8, 9, 10, 11]


def test_a_batch_that_may_not_be_filled_up_stops_the_run_and_leaves_the_stream_where_it_was():
    options = {"rollout.dynamic_sampling": "reward", "rollout.max_rounds": 2}
    missing = Graded(lambda response: None)
    stream, params = chain_stream(options | {"rollout.fill_up": False}, [Reward(missing)])
    said = r"^rollout.max_rounds: in 2 rounds only 0 of 4 groups were found whose reward varies; "
    with pytest.raises(UserError, match=said):
        stream.next(params, 0)
    assert stream.next_prompt == 0 and [position for position, _ in missing.groups] == [*range(8)]


@pytest.mark.parametrize("metric", ["reward", "accuracy"])
def test_long_responses_are_punished_in_the_reward_and_nowhere_else(metric):
    """M = 60, b = 58, factor 2: a response of L tokens loses 2 (L − 2)/58. A reward that is the
    same for all then varies with the lengths, and the accuracy does not change."""
    shaped = {"task.overlong_buffer": 58, "task.overlong_factor": 2.0}
    options = {"rollout.dynamic_sampling": metric} | shaped

    def reward(prompts, responses, answers):
        return [None if i == 4 else 1.0 for i in range(len(responses))]

    stream, params = chain_stream(options, [Reward(reward, name="one")])
    batch = stream.next(params, 0)
    lengths = batch.rollout.response_lengths
    known = ~np.isnan(batch.rewards)
    assert 0 < np.sum(~known) < len(known) and lengths.max() > 2
    expected = 1 - 2 * np.maximum(lengths - 2, 0) / 58
    np.testing.assert_allclose(batch.rewards[known], expected[known], rtol=1e-6)
    assert batch.metrics["reward/overlong/mean"] == pytest.approx((expected - 1).mean())
    assert batch.metrics["reward/one/mean"] == 1
    texts = response_texts(stream.setup, batch.rollout)
    even = np.asarray([len(text.split()) % 2 == 0 for text in texts])
    assert batch.metrics["accuracy/mean"] == pytest.approx(even.mean())
    values = batch.rewards if metric == "reward" else np.where(known, even, np.nan)
    for group in values.reshape(4, 3):
        assert len(set(group[~np.isnan(group)])) > 1


def test_with_both_no_group_is_lost_and_what_is_carried_is_graded_when_its_turn_comes():
    spy = Graded(lambda response: float(len(response.split()) % 2))
    options = PARTIAL | {"rollout.dynamic_sampling": "reward"}
    stream, params = chain_stream(options, [Reward(spy)])
    trained, carried, stale = [], [], []
    for step in range(4):
        before = stream.carried
        batch = stream.next(params, step)
        trained += groups_of(batch)
        if before is not None:
            at = before.prompts.positions[before.group_ids]
            tokens = before.lengths[np.isin(at, batch.positions)].sum()
            stale.append(tokens / batch.rollout.response_lengths.sum())
            assert batch.metrics["rollout/stale_frac"] == pytest.approx(stale[-1])
        waiting = [] if stream.carried is None else stream.carried.prompts.positions.tolist()
        assert waiting == list(range(len(spy.groups), stream.next_prompt))
        carried.append(len(waiting))
    assert max(carried) > 0 and max(stale) > 0
    assert [position for position, _ in spy.groups] == list(range(len(spy.groups)))
    assert trained == [p for p, rewards in spy.groups if len(set(rewards)) > 1]


def test_without_options_a_batch_is_one_call_of_the_sampler(collected):
    """The prompts and random numbers of a step depend on the step alone."""
    setup, batches = collected
    engine = make_engine(setup, temperature=1.0)
    key = jax.random.key(0, impl="threefry2x32")
    params = init_params(setup, jax.random.key(3))
    prompts = draw_training(setup, 12, 4).prompts
    rollout, _ = engine.generate(params, prompts, key, samples=4, step=3)
    jax.tree.map(np.testing.assert_array_equal, batches[1].rollout, rollout)
    assert not [
        name
        for name in batches[1].metrics
        if name.startswith("rollout/") and ("utilization" not in name)
    ]


class Judged(Chains):
    """The same verdicts, by worker processes."""

    def __init__(self, workers):
        super().__init__()
        object.__setattr__(self, "workers", workers)

    def submit(self, response, answer):
        def verdict(outcome):
            return Verdict(float(outcome.value), outcome.value, "", str(outcome.value))

        return self.workers.submit(response, then=verdict)

    def verify(self, response, answer):
        return self.submit(response, answer).result()


@pytest.fixture(scope="module")
def workers():
    with Workers("tests.worker_calls:even_words", 2) as opened:
        opened.submit("").result()
        yield opened


def judged_stream(overrides, workers):
    stream, params = chain_stream(overrides)
    setup = dataclasses.replace(stream.setup, task=Judged(workers))
    return RolloutStream(setup, copy.copy(stream.engine), KEY), params  # which tests change


def judging_threads():
    return sum(thread.name == "verdicts" for thread in threading.enumerate())


@pytest.mark.parametrize(
    "options",
    [{}, PARTIAL, PARTIAL | {"rollout.dynamic_sampling": "reward"}],
    ids=["plain", "partial", "dynamic and partial"],
)
def test_when_a_response_is_judged_changes_nothing(options, workers, monkeypatch):
    """What is sampled, chosen, rewarded and reported is as without other processes."""
    monkeypatch.setattr(engine_module, "CHUNK", 4)
    (plain, params), (judged, _) = chain_stream(options), judged_stream(options, workers)
    sample, early = judged.engine.sample, []

    def patient(*arguments, finished, **how):
        """Sampling that ends no sooner than the first verdict is there."""
        told = []
        result = sample(*arguments, finished=lambda *of: (told.append(of), finished(*of)), **how)
        until(lambda: not told or any(x.done() for x in list(judged._early._found.values())))
        return result

    monkeypatch.setattr(judged.engine, "sample", patient)
    for step in range(4):
        want, found = plain.next(params, step), judged.next(params, step)
        early.append(found.metrics.pop("overlap/verdicts_early"))
        for batch in (want, found):
            del batch.metrics["time/reward"], batch.metrics["time/rollout"]
        assert found.metrics == want.metrics
        np.testing.assert_array_equal(found.positions, want.positions)
        np.testing.assert_array_equal(found.rewards, want.rewards)
        jax.tree.map(np.testing.assert_array_equal, found.rollout, want.rollout)
        assert judged.next_prompt == plain.next_prompt and judging_threads() == 0
        waiting = [] if judged.carried is None else judged.carried.prompts.positions.tolist()
        assert {position for position, _ in judged._early._found} <= set(waiting)
    assert max(early) > 0 and max(early) <= 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_sampling_that_breaks_off_leaves_no_judging_behind(error, workers, monkeypatch):
    monkeypatch.setattr(engine_module, "CHUNK", 4)
    stream, params = judged_stream({}, workers)
    sample, calls = stream.engine.sample, workers.counts["done"]

    def broken(*arguments, finished, **options):
        sample(*arguments, finished=finished, **options)
        raise error

    monkeypatch.setattr(stream.engine, "sample", broken)
    with pytest.raises(error):
        stream.next(params, 0)
    assert judging_threads() == 0 and stream.next_prompt == 0
    assert not stream._early._found
    monkeypatch.setattr(stream.engine, "sample", sample)
    plain, _ = chain_stream({})
    np.testing.assert_array_equal(stream.next(params, 0).rewards, plain.next(params, 0).rewards)
    assert workers.counts["done"] > calls


def test_an_error_of_the_judges_is_the_callers(monkeypatch):
    monkeypatch.setattr(engine_module, "CHUNK", 4)
    with Workers("math:no_such_function", 1) as none:
        stream, params = judged_stream({}, none)
        with pytest.raises(WorkerStartError, match="no worker for math:no_such_function: "):
            stream.next(params, 0)
    assert judging_threads() == 0 and stream.next_prompt == 0


def test_a_carried_token_keeps_the_logprob_of_the_parameters_that_sampled_it():
    """Before the cut those of the old ones, after it those of the new ones; the share of the former
    is reported."""
    options = OPTIONS | PARTIAL | {"rollout.slots": 6, "rollout.max_response_length": 24}
    setup = make_setup(load_config("countdown-tiny", options))
    old = jax.tree.map(lambda x: 1.3 * x if x.ndim > 1 else x, init_params(setup, KEY))
    new = jax.tree.map(lambda x: 0.8 * x if x.ndim > 1 else x, old)
    stream = RolloutStream(setup, make_engine(setup, temperature=1.0), KEY)
    stream.next(old, 0)
    carried = stream.carried
    assert carried is not None
    batch = stream.next(new, 1)
    count = min(len(carried.lengths), len(batch.positions))
    before = np.zeros(len(batch.positions), int)
    before[:count] = carried.lengths[:count]
    rollout = batch.rollout
    at = np.arange(rollout.tokens.shape[1]) - rollout.prompt_lengths[:, None]
    stale = rollout.loss_mask & (at < before[:, None])
    partly = stale.any(axis=1) & (rollout.loss_mask & ~stale).any(axis=1)
    assert partly.sum() >= 3
    want = [full_logprobs(setup, params, rollout) for params in (old, new)]
    found = rollout.logprobs
    np.testing.assert_allclose(found[stale], want[0][stale], atol=1e-5)
    fresh = rollout.loss_mask & ~stale
    np.testing.assert_allclose(found[fresh], want[1][fresh], atol=1e-5)
    assert np.abs(want[0] - want[1])[rollout.loss_mask].mean() > 0.05
    assert batch.metrics["rollout/stale_frac"] == pytest.approx(
        stale.sum() / found.astype(bool).sum()
    )


def full_logprobs(setup, params, rollout):
    """Of every token given those before it, by a forward pass over whole rows."""
    logits = forward(setup.architecture, params, rollout.tokens)
    found, _ = token_logprobs(jnp.asarray(logits[:, :-1]), jnp.asarray(rollout.tokens[:, 1:]))
    return np.pad(np.asarray(found), ((0, 0), (1, 0)))
