"""Answers that cannot be trained on are refused, each with what is wrong."""

import dataclasses
import math

import numpy as np
import pytest

from tests import fakes
from tests.served import (
    OPTIONS,
    RELOAD,
    SAMPLING,
    generate,
    refusal,
)


def choice(change):
    """A change to what vLLM answers."""

    def changed(found):
        own = found["choices"][0]
        change(own, own["logprobs"])
        return found

    return changed


def drop_eos(own, logprobs):
    if own["finish_reason"] == "stop":
        for part in (own["token_ids"], logprobs["tokens"], logprobs["token_logprobs"]):
            part.pop()


def stop_early(own, logprobs):
    for part in (own["token_ids"], logprobs["tokens"], logprobs["token_logprobs"]):
        del part[3:]
    own |= {"finish_reason": "length"}


def use_id(i):
    def change(own, logprobs):
        own["token_ids"][0], logprobs["tokens"][0] = i, f"token_id:{i}"

    return change


def use_logprob(x):
    return lambda own, logprobs: logprobs["token_logprobs"].__setitem__(0, x)


WRONG = {
    "other prompt": (
        lambda own, logprobs: own["prompt_token_ids"].append(3),
        "its prompt ids are not those that were sent",
    ),
    "no ids": (lambda own, logprobs: own.pop("token_ids"), "it has no token_ids; it needs vLLM"),
    "id outside": (use_id(23), "23 is no id of a vocabulary of 23"),
    "negative id": (use_id(-1), "-1 is no id of a vocabulary"),
    "no number": (use_id("3"), "'3' is no id of a vocabulary"),
    "other ids": (
        lambda own, logprobs: own["token_ids"].__setitem__(0, 22 - own["token_ids"][0]),
        "log-probabilities are of other tokens than token_ids has",
    ),
    "no logprobs": (lambda own, logprobs: own.update(logprobs=None), "it has no logprobs"),
    "too few": (lambda own, logprobs: logprobs["token_logprobs"].pop(), "log-probabilities"),
    "null": (use_logprob(None), "None is no log-probability"),
    "NaN": (use_logprob(math.nan), "nan is no log-probability"),
    "infinite": (use_logprob(-math.inf), "-inf is no log-probability"),
    "masked": (use_logprob(-9999.0), "-9999.0 is no log-probability"),
    "positive": (use_logprob(0.01), "0.01 is no log-probability"),
    "EOS dropped": (drop_eos, "the server must return the id that it stops at"),
    "cut": (stop_early, "cut off after 3 of 12 tokens; raise the server's longest context"),
    "aborted": (
        lambda own, logprobs: own.update(finish_reason="abort"),
        "it ended for the reason 'abort'",
    ),
    "goes on": (use_id(fakes.EOS), "it goes on after an end-of-sequence id"),
}


@pytest.mark.parametrize(("change", "expected"), WRONG.values(), ids=list(WRONG))
def test_an_answer_that_does_not_fit_is_refused(make, server, change, expected):
    server.after = choice(change)
    said = refusal(make())
    assert expected in said
    assert said.startswith(f"rollout.server.url: an answer of {server.url} cannot be trained on")
    assert server.count(RELOAD) == 1


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda meta: meta.update(prompt_tokens=1), "it counts 1 prompt tokens, sent were"),
        (lambda meta: meta.pop("output_token_logprobs"), "it has no output_token_logprobs"),
        (lambda meta: meta["output_token_logprobs"].pop(), "tokens and log-probabilities of"),
        (lambda meta: meta.update(output_token_logprobs=[-0.5]), "no pairs of log-probability"),
        # What SGLang does with logits that are no numbers: the last id is made up.
        (
            lambda meta: (
                "matched" in meta["finish_reason"]
                and meta["finish_reason"].update(matched="NaN happened")
            ),
            "it stopped at 'NaN happened'",
        ),
    ],
)
def test_so_is_one_of_sglang(make, server, change, expected):
    def changed(found):
        change(found["meta_info"])
        return found

    server.after = changed
    assert expected in refusal(make("sglang"))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"<html>\n<b>hello</b>", "answered what is no JSON: <html> <b>hello</b>; is it the"),
        (b"[" + b" " * 2**22 + b"]", "answered more than"),
        (b"", "it has no choices.0; is rollout.server.dialect the right one?"),
        (b"[1]", "it has no choices.0"),
        (b'{"choices": {}}', "it has no choices.0"),
    ],
)
def test_what_is_no_answer_at_all_is_refused_at_once(make, server, content, expected):
    server.after = lambda found: content
    assert expected in refusal(make(options=dataclasses.replace(OPTIONS, slots=1)))
    assert server.count(SAMPLING) == 1


def test_a_rounding_error_above_zero_is_zero(make, server):
    server.after = choice(use_logprob(1e-6))
    rollout, _ = generate(make())
    assert (rollout.logprobs[np.arange(6), rollout.prompt_lengths] == 0).all()
