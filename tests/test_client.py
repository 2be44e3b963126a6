"""A server that fails: what may pass is tried again, never for ever, and said in one line."""

import dataclasses
import threading

import pytest

from tests.completions_server import serving
from tests.served import (
    OPTIONS,
    RELOAD,
    RETRIES,
    SAMPLING,
    check_against_forward,
    generate,
    http_engine,
    make_server,
    refusal,
    weights,
)


@pytest.mark.parametrize("status", [429, 500])
def test_what_may_pass_is_tried_again(make, server, status):
    server.before = lambda path, number: status if path == SAMPLING and number < RETRIES else None
    rollout, _ = generate(make())
    check_against_forward(rollout, weights(0))
    assert server.count(SAMPLING) == 6 + RETRIES
    assert server.count(RELOAD) == 1


def test_but_not_for_ever(make, server):
    server.before = lambda path, number: 500 if path == SAMPLING else None
    said = refusal(make(options=dataclasses.replace(OPTIONS, slots=1)))
    assert "answered 500" in said and f"{1 + RETRIES} times" in said
    assert server.count(SAMPLING) == 1 + RETRIES


def test_what_cannot_pass_is_tried_once(make, server):
    server.before = lambda path, number: 422 if path == SAMPLING else None
    said = refusal(make(options=dataclasses.replace(OPTIONS, slots=1)))
    assert said.startswith(f"rollout.server.url: {server.url}{SAMPLING} answered 422: ")
    assert server.count(SAMPLING) == 1


@pytest.mark.parametrize("how", ["drop", "half", 503])
def test_lost_connections_begin_the_rollout_again_and_not_for_ever(make, server, how):
    one = dataclasses.replace(OPTIONS, slots=1)
    server.before = lambda path, number: how if path == SAMPLING and number < RETRIES else None
    rollout, _ = generate(make(options=one))
    check_against_forward(rollout, weights(0))
    assert server.count(SAMPLING) == 6 + RETRIES
    assert server.count(RELOAD) == 1 + RETRIES
    server.before = lambda path, number: how
    said = refusal(make(options=one))
    assert f"{1 + RETRIES} times; start the server" in said


def test_a_server_that_is_not_there_is_said_so(tmp_path):
    with serving(make_server()) as url:
        pass
    said = refusal(http_engine(url, tmp_path))
    assert said.startswith(f"rollout.server.url: {url}")
    assert "refused" in said and said.endswith("start the server, or correct the address")


@pytest.mark.parametrize("how", [None, "trickle"])
def test_a_server_that_takes_too_long_is_left(make, server, how):
    """Which never answers, or whose answer never ends."""
    one, freed = dataclasses.replace(OPTIONS, slots=1), threading.Event()
    generate(make(options=one))  # so that the server has the weights

    def late(path, number):
        if path == SAMPLING and how is None:
            freed.wait()
        return how if path == SAMPLING else None

    server.before, asked = late, server.count(SAMPLING)
    said = refusal(make(options=one, timeout=0.2))
    freed.set()
    assert said.startswith("rollout.server.timeout: no answer from ")
    assert f"within 0.2 s, {1 + RETRIES} times" in said
    assert server.count(SAMPLING) - asked == 1 + RETRIES


def test_one_failure_breaks_off_the_rest_at_once(make, server):
    """Nothing waits for the time-out of requests whose answers are not needed any more."""
    freed = threading.Event()

    def one_fails(path, number):
        if path == SAMPLING and number == 2:
            return 422
        if path == SAMPLING:
            freed.wait()
        return None

    server.before = one_fails
    said = refusal(make(timeout=3600.0))
    freed.set()
    assert "answered 422" in said
    assert server.count(SAMPLING) == OPTIONS.slots
