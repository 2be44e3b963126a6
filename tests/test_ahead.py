"""Sampling ahead: what is sampled by which parameters, whatever the clocks say; no thread stays."""

import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltal_jax.errors import UserError
from deltal_jax.tasks.grading import Reward
from deltal_jax.training.ahead import idle_shares, open_batches
from deltal_jax.training.collect import RolloutStream
from deltal_jax.training.setup import check_setup, make_engine
from tests.fakes import chain_setup

KEY = jax.random.key(5, impl="threefry2x32")
AHEAD = {"rollout.ahead": 1, "rl.steps": 4, "rl.updates_per_rollout": 2}


@jax.jit
def sharpened(params):
    return jax.tree.map(lambda x: 1.2 * x, params)


#: Takes the memory of the parameters, as the update does.
donated = jax.jit(sharpened, donate_argnums=0)


def sampling_threads():
    """Others come and go by themselves."""
    return sum(thread.name == "rollout" for thread in threading.enumerate())


def batches_of(overrides, rewards=("task",), rollouts=None, next_prompt=0):
    setup, params = chain_setup(AHEAD | overrides)
    rollouts = rollouts or {}
    opened = open_batches(setup, KEY, rewards, next_prompt=next_prompt, rollouts=rollouts)
    return opened, jax.tree.map(jnp.copy, params)


def in_turn(overrides):
    """What the batches have to be: step by step, with the parameters kept."""
    setup, params = chain_setup(AHEAD | overrides)
    stream = RolloutStream(setup, make_engine(setup, temperature=1.0), KEY)
    history = [params]
    for _ in range(3):
        history.append(sharpened(history[-1]))
    return [stream.next(history[max(step - 1, 0)], step) for step in range(4)]


def same(batch, want):
    np.testing.assert_array_equal(batch.positions, want.positions)
    np.testing.assert_array_equal(batch.rollout.tokens, want.rollout.tokens)
    np.testing.assert_array_equal(batch.rewards, want.rewards)
    # On another mesh the program differs.
    np.testing.assert_allclose(batch.rollout.logprobs, want.rollout.logprobs, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"rollout.devices": 2}, {"rollout.partial": True, "rollout.oversampling": 1.5}],
    ids=["shared", "own devices", "partial"],
)
def test_each_batch_is_of_the_parameters_of_one_update_ago(options):
    shared = {k: v for k, v in options.items() if k != "rollout.devices"}
    threads = sampling_threads()
    opened, params = batches_of(options)
    found = []
    with opened as batches:
        for step in range(4):
            found.append(batches.next(params, step))
            if step == 1:
                time.sleep(0.5)  # the thread may well be done before
            params = donated(params)
        # The last step began none: what the one after it would be sampled by.
        assert batches.saved().keys() - {"carried"} == {"behind"}
    assert sampling_threads() == threads
    for batch, want in zip(found, in_turn(shared), strict=True):
        same(batch, want)
    assert [batch.metrics["rollout/staleness"] for batch in found] == [0, 2, 2, 2]
    for batch in found:
        idle = [batch.metrics[f"overlap/{name}_idle"] for name in ("rollout", "update")]
        assert min(idle) >= 0 and max(idle) <= 1


def test_what_is_saved_goes_on_elsewhere():
    """The batch that comes next was sampled by parameters that are gone by then."""
    opened, params = batches_of({})
    with opened as batches:
        for step in range(2):
            batches.next(params, step)
            params = donated(params)
        rollouts, next_prompt = batches.saved(), batches.next_prompt
        assert rollouts.keys() == {"pending"} and next_prompt == 12
    opened, _ = batches_of({}, rollouts=rollouts, next_prompt=next_prompt)
    with opened as batches:
        third, fourth = batches.next(params, 2), batches.next(donated(params), 3)
    want = in_turn({})
    same(third, want[2])
    same(fourth, want[3])
    assert third.metrics["rollout/staleness"] == 2


def test_a_run_goes_on_with_more_steps_as_if_it_had_had_them_from_the_start():
    opened, params = batches_of({"rl.steps": 2})
    with opened as batches:
        for step in range(2):
            batches.next(params, step)
            params = donated(params)
        rollouts, next_prompt = batches.saved(), batches.next_prompt
    opened, _ = batches_of({}, rollouts=rollouts, next_prompt=next_prompt)
    with opened as batches:
        third = batches.next(params, 2)
    same(third, in_turn({})[2])
    assert third.metrics["rollout/staleness"] == 2


def test_an_error_in_the_thread_is_raised_as_it_is_where_its_batch_is_wanted():
    def failing(prompts, responses, answers):
        if answers[0] > 0:
            raise ZeroDivisionError("the reward's own")
        return [0.0] * len(responses)

    threads = sampling_threads()
    opened, params = batches_of({}, [Reward(failing)])
    with opened as batches:
        batches.next(params, 0)
        # What is saved is where the batch that failed began, and what it was sampled by.
        assert batches.saved().keys() == {"behind"} and batches.next_prompt == 4
        with pytest.raises(ZeroDivisionError, match="the reward's own"):
            batches.next(params, 1)
    assert sampling_threads() == threads


def test_a_second_interrupt_does_not_wait_for_the_thread():
    release = threading.Event()

    def waiting(prompts, responses, answers):
        if answers[0] > 0:
            release.wait(60)
        return [0.0] * len(responses)

    opened, params = batches_of({}, [Reward(waiting)])
    threads = sampling_threads()
    batches = opened.__enter__()
    batches.next(params, 0)
    opened.__exit__(KeyboardInterrupt, None, None)
    assert sampling_threads() == threads + 1
    release.set()
    opened.__exit__(None, None, None)
    assert sampling_threads() == threads


def test_a_run_that_is_broken_off_leaves_no_thread():
    threads = sampling_threads()
    opened, params = batches_of({})
    with opened as batches:
        batches.next(params, 0)
        assert sampling_threads() > threads
    assert sampling_threads() == threads


def test_idle_shares_by_hand():
    """Ten seconds, of which the update waited four; a rollout that ended two seconds ago, or before
    the last update began."""
    found = [idle_shares(10.0, ended, 20.0, 4.0) for ended in (18.0, 5.0)]
    assert [shares["overlap/update_idle"] for shares in found] == [0.4, 0.4]
    assert [shares["overlap/rollout_idle"] for shares in found] == [0.2, 1.0]


def test_devices_that_sample_only_leave_one_to_train():
    for devices in (1, 2):
        check_setup(chain_setup({"rollout.devices": devices})[0])
    with pytest.raises(UserError, match=r"rollout\.devices: 8 of 8 .* set it to at most 7"):
        check_setup(chain_setup({"rollout.devices": 8, "rollout.slots": 8})[0])
