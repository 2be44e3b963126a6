"""Tokens as they are drawn."""

import jax
import jax.numpy as jnp
import pytest

from deltal_jax.errors import UserError
from deltal_jax.model.cache import init_cache
from deltal_jax.rollout import checks
from deltal_jax.rollout.engine import Engine
from deltal_jax.rollout.slots import SamplingOptions
from deltal_jax.rollout.stream import Streamer
from tests import fakes

OPTIONS = SamplingOptions(slots=4, max_response_length=12, eos_ids=(fakes.EOS, 5))
KEY = jax.random.key(11, impl="threefry2x32")


def test_streaming_gives_the_tokens_of_generate():
    graphdef, params = fakes.model(fakes.PLAIN)
    rollout, _ = Engine(graphdef, OPTIONS).generate(
        params, fakes.prompts(5), KEY, samples=1, step=2
    )
    streamer = Streamer(graphdef, OPTIONS, params)
    for row in range(2):
        one = jax.tree.map(lambda x, row=row: x[row : row + 1], fakes.prompts(5))
        streamed = list(streamer.stream(one, KEY, step=2))
        assert streamed == rollout.tokens[row][rollout.loss_mask[row]].tolist()


def test_memory_is_asked_for_once_for_weights_and_each_time_for_caches(monkeypatch):
    graphdef, params = fakes.model(fakes.PLAIN)
    one = jax.tree.map(lambda x: x[:1], fakes.prompts(5))
    weights = sum(x.nbytes for x in jax.tree.leaves(params["blocks"]))
    caches = sum(
        x.nbytes
        for time in (6 + 12, 32)  # of the response; of the prompt, padded
        for x in jax.tree.leaves(init_cache(2, 1, 2, time, 8, jnp.dtype("float32")))
    )
    free = weights
    monkeypatch.setattr(checks, "free_memory", lambda: free)
    with pytest.raises(UserError, match=r"sampling with 1 takes"):
        Streamer(graphdef, OPTIONS, params)
    free = weights + caches
    streamer = Streamer(graphdef, OPTIONS, params)
    free = caches
    with pytest.raises(UserError, match=r"sampling with 1 takes"):
        next(streamer.stream(one, KEY))
    free = caches + 12 * 8  # what is written
    next(streamer.stream(one, KEY))
