"""One response at a time, each token as it is drawn."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from deltal_jax.model.cache import Cache, resized
from deltal_jax.model.precision import ROUND_ALIKE
from deltal_jax.model.transformer import cast_weights, take_apart
from deltal_jax.rollout import checks
from deltal_jax.rollout.sampling import stream_keys
from deltal_jax.rollout.slots import SamplingOptions, Weights, draw, prefill
from deltal_jax.types import Prompts


class Streamer:
    """Samples by the same parameters again and again, on one device, the tokens that
    `engine.Engine` gives.

    Holds the weights as sampling reads them, and not `params`. Raises UserError where they do not
    fit into the memory that is free.
    """

    def __init__(self, graphdef: nnx.GraphDef, options: SamplingOptions, params: Any):
        self._options = dataclasses.replace(options, slots=1)
        self._arch = nnx.merge(graphdef, jax.eval_shape(lambda x: x, params)).arch
        self._check_memory(params, prompts=(1, 1))
        dtype = self._arch.compute_dtype
        self._weights = jax.jit(lambda x: Weights(*take_apart(cast_weights(x, dtype))))(params)

        def decode(
            weights: Weights, tokens: Int[Array, " 1"], positions: Int[Array, " 1"], cache: Cache
        ) -> tuple[Array, Cache]:
            model = nnx.merge(graphdef, weights.params)
            return model.decode(tokens, positions, cache, weights.layers)

        alike = functools.partial(jax.jit, compiler_options=ROUND_ALIKE)
        self._prefill = alike(functools.partial(prefill, graphdef))
        self._decode = alike(decode, donate_argnums=3)
        self._draw = jax.jit(functools.partial(draw, options))

    def stream(
        self,
        prompts: Prompts,
        key: Array,
        *,
        step: int = 0,
        round_: int = 0,
        cache_length: int | None = None,
    ) -> Iterator[int]:
        """The tokens of the response to one prompt as they are drawn.

        Prompts of several widths share one compiled decoding where `cache_length` is the same; None
        is what prompt and response may need. Raises UserError, at the first token, for what cannot
        be sampled.
        """
        options, weights = self._options, self._weights
        checks.check_request(options, self._arch, prompts, samples=1)
        self._check_memory(weights.params, prompts.tokens.shape)
        keys = stream_keys(
            key, jnp.asarray(step), jnp.asarray(round_), jnp.asarray(prompts.positions), 1
        )
        length = int(prompts.lengths[0])
        cache = self._prefill(weights, jnp.asarray(prompts.tokens))
        room = prompts.tokens.shape[1] + options.max_response_length
        cache = resized(cache, max(room, cache_length or 0))
        token = int(prompts.tokens[0, length - 1])
        for count in range(options.max_response_length):
            at = jnp.asarray([token]), jnp.asarray([length - 1 + count])
            logits, cache = self._decode(weights, *at, cache)
            token = int(self._draw(logits, keys, jnp.asarray([count]))[0][0])
            yield token
            if token in options.eos_ids:
                return

    def _check_memory(self, params: Any, prompts: tuple[int, int]) -> None:
        """Of weights that are held already, nothing more is counted."""
        memory = checks.sampling_memory(self._options, self._arch, params, prompts, samples=1)
        checks.check_memory(self._options.slots, memory, checks.free_memory())
