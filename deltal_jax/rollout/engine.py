"""Sampling as one compiled program whose slots are refilled as responses end.

A fixed number of slots decodes in lock step. When a response ends, its slot takes the next (prompt,
sample) pair from the queue, so that no slot waits for the longest response. A prompt's prefill is
computed once and copied to each of its samples. Log-probabilities and masks come from here, never
from a guess afterwards.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt32

from deltal_jax.model.cache import Cache
from deltal_jax.model.precision import ROUND_ALIKE
from deltal_jax.model.transformer import cast_weights, take_apart
from deltal_jax.rollout.sampling import sample, stream_keys, uniforms
from deltal_jax.types import Prompts, Rollout


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How responses are drawn; static for the compiled program."""

    slots: int
    max_response_length: int
    eos_ids: tuple[int, ...]
    temperature: float = 1.0


@dataclasses.dataclass(frozen=True)
class RolloutStats:
    """Decoded slot-steps, and those that gave a token of a response."""

    slot_steps: int
    useful_steps: int

    @property
    def utilization(self) -> float:
        """The share of decoded slot-steps that gave a useful token."""
        return self.useful_steps / max(self.slot_steps, 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Slots:
    """The sampler's state: what each slot holds, and what has been written."""

    pair: Int[Array, " S"]  # queue index of the response; B when idle
    token: Int[Array, " S"]  # last token, not yet in the cache
    position: Int[Array, " S"]  # its position in the sequence
    count: Int[Array, " S"]  # response tokens so far
    live: Bool[Array, " S"]
    cache: Cache
    next_pair: Int[Array, ""]
    steps: Int[Array, ""]
    tokens: Int[Array, "B R"]
    logprobs: Float[Array, "B R"]
    lengths: Int[Array, " B"]
    ended: Bool[Array, " B"]


class Engine:
    """Samples responses on one device.

    `generate` compiles once per number of prompts and samples; the parameters are an argument.
    """

    def __init__(self, graphdef: nnx.GraphDef, options: SamplingOptions):
        self.options = options
        self._cast = jax.jit(functools.partial(cast_weights, graphdef))
        alike = functools.partial(jax.jit, compiler_options=ROUND_ALIKE)
        self._run = alike(functools.partial(_generate, graphdef, options))
        self._prefill = alike(
            functools.partial(_prefill_one, graphdef), static_argnames="cache_length"
        )
        self._apart = jax.jit(
            lambda blocks: take_apart(blocks, jax.tree.leaves(blocks)[0].shape[0])
        )
        self._draw = jax.jit(functools.partial(_draw_one, options))
        self._decode = alike(
            lambda params, tokens, positions, cache, apart: nnx.merge(graphdef, params).decode(
                tokens, positions, cache, apart
            ),
            donate_argnums=3,
        )

    def generate(
        self,
        params: Any,
        prompts: Prompts,
        key: Array,
        *,
        samples: int,
        step: int = 0,
        round_: int = 0,
    ) -> tuple[Rollout, RolloutStats]:
        """`samples` responses to each prompt, in prompt order: row p·samples + s.

        Arrays of the returned rollout are in host memory.
        """
        counters = jnp.asarray(step), jnp.asarray(round_)
        keys = stream_keys(key, *counters, jnp.asarray(prompts.positions), samples)
        groups = np.repeat(np.arange(len(prompts.lengths), dtype=np.int32), samples)
        arrays = (jnp.asarray(prompts.tokens), jnp.asarray(prompts.lengths))
        out: _Slots = self._run(self._cast(params), *arrays, jnp.asarray(groups), keys)
        return _assemble(prompts, groups, out), RolloutStats(
            slot_steps=int(out.steps) * self.options.slots,
            useful_steps=int(np.sum(out.lengths)) - len(groups),
        )

    def stream(
        self,
        params: Any,
        prompts: Prompts,
        key: Array,
        *,
        step: int = 0,
        round_: int = 0,
        cache_length: int | None = None,
    ) -> Iterator[int]:
        """The tokens of one response as they are drawn: the same ones that `generate` gives.

        Prompts of several widths share one compiled decoding where `cache_length` is the same; None
        is what prompt and response may need.
        """
        (raw_key,) = stream_keys(
            key, jnp.asarray(step), jnp.asarray(round_), jnp.asarray(prompts.positions), 1
        )
        length, params = int(prompts.lengths[0]), self._cast(params)
        needed = prompts.tokens.shape[1] + self.options.max_response_length
        logits, cache = self._prefill(
            params,
            jnp.asarray(prompts.tokens),
            jnp.asarray([length]),
            cache_length=max(needed, cache_length or 0),
        )
        apart = None  # a copy of all layers' parameters, which one more token is worth
        for count in range(self.options.max_response_length):
            drawn = self._draw(logits, raw_key, jnp.asarray(count))
            yield int(drawn[0])
            if int(drawn[0]) in self.options.eos_ids:
                return
            apart = apart or self._apart(params["blocks"])
            position = jnp.asarray([length + count])
            logits, cache = self._decode(params, drawn, position, cache, apart)


def _prefill_one(
    graphdef: nnx.GraphDef,
    params: Any,
    tokens: Int[Array, "1 Tp"],
    lengths: Int[Array, " 1"],
    *,
    cache_length: int,
) -> tuple[Float[Array, "1 V"], Cache]:
    """Prefill of one prompt, with room in the cache for its response."""
    logits, prompt = nnx.merge(graphdef, params).prefill(tokens, lengths)
    room = ((0, 0), (0, 0), (0, cache_length - tokens.shape[1]), (0, 0))
    return logits, jax.tree.map(lambda x: jnp.pad(x, room), prompt)


def _draw_one(
    options: SamplingOptions,
    logits: Float[Array, "1 V"],
    key: UInt32[Array, " 2"],
    count: Int[Array, ""],
) -> Int[Array, " 1"]:
    """The next token of one response, its `count`-th."""
    uniform = uniforms(key[None], count[None])
    return sample(logits, uniform, temperature=options.temperature)[0]


def _generate(
    graphdef: nnx.GraphDef,
    options: SamplingOptions,
    params: Any,
    prompt_tokens: Int[Array, "P Tp"],
    prompt_lengths: Int[Array, " P"],
    group_ids: Int[Array, " B"],
    keys: UInt32[Array, "B 2"],
) -> _Slots:
    model = nnx.merge(graphdef, params)
    B, R = group_ids.shape[0], options.max_response_length
    prompt_logits, prompt_cache = model.prefill(prompt_tokens, prompt_lengths)
    keys = jnp.concatenate([keys, jnp.zeros((1, 2), keys.dtype)])  # the idle slots' key
    group_ids = jnp.concatenate([group_ids, jnp.zeros(1, group_ids.dtype)])

    def record(state: _Slots, active: Bool[Array, " S"], logits: Array) -> _Slots:
        """Draw a token for the active slots and write it down; a slot that ends becomes free."""
        drawn, logprob = sample(
            logits, uniforms(keys[state.pair], state.count), temperature=options.temperature
        )
        rows = jnp.where(active, state.pair, B)
        at = (rows, state.count)
        is_end = jnp.isin(drawn, jnp.asarray(options.eos_ids))
        count = jnp.where(active, state.count + 1, state.count)
        return dataclasses.replace(
            state,
            token=jnp.where(active, drawn, state.token),
            position=jnp.where(active, state.position + 1, state.position),
            count=count,
            live=active & ~is_end & (count < R),
            tokens=state.tokens.at[at].set(drawn, mode="drop"),
            logprobs=state.logprobs.at[at].set(logprob, mode="drop"),
            lengths=state.lengths.at[rows].set(count, mode="drop"),
            ended=state.ended.at[rows].set(is_end, mode="drop"),
        )

    def refill(state: _Slots) -> tuple[_Slots, Bool[Array, " S"], Array]:
        """Give each free slot the next pair of the queue, with its prompt's cache."""
        candidate = state.next_pair + jnp.cumsum(~state.live) - 1
        fresh = ~state.live & (candidate < B)
        pair = jnp.where(fresh, candidate, state.pair)
        group = group_ids[pair]
        width = prompt_tokens.shape[1]

        def copy(slots: Array, prompts: Array) -> Array:
            mine = jnp.where(fresh[:, None, None, None], prompts[group], slots[:, :, :width])
            return slots.at[:, :, :width].set(mine)

        state = dataclasses.replace(
            state,
            pair=pair,
            position=jnp.where(fresh, prompt_lengths[group] - 1, state.position),
            count=jnp.where(fresh, 0, state.count),
            cache=jax.tree.map(copy, state.cache, prompt_cache),
            next_pair=state.next_pair + jnp.sum(fresh),
        )
        return state, fresh, prompt_logits[group]

    def admit(state: _Slots) -> _Slots:
        before = state.live
        state, fresh, logits = refill(state)
        state = record(state, fresh, logits)
        return dataclasses.replace(state, live=state.live | before)

    def decode(state: _Slots) -> _Slots:
        logits, cache = model.decode(state.token, state.position, state.cache)
        state = dataclasses.replace(state, cache=cache, steps=state.steps + 1)
        return record(state, state.live, logits)

    def undisturbed(state: _Slots) -> Bool[Array, ""]:
        """Whether decoding can go on: all slots busy, or the queue is empty and some are."""
        return jnp.any(state.live) & (jnp.all(state.live) | (state.next_pair >= B))

    def busy(state: _Slots) -> Bool[Array, ""]:
        return jnp.any(state.live) | (state.next_pair < B)

    def turn(state: _Slots) -> _Slots:
        return jax.lax.while_loop(undisturbed, decode, admit(state))

    return jax.lax.while_loop(busy, turn, _empty(model, options, prompt_tokens.shape[1], B))


def _empty(model: Any, options: SamplingOptions, prompt_width: int, B: int) -> _Slots:
    S, R = options.slots, options.max_response_length
    zeros = jnp.zeros(S, jnp.int32)
    return _Slots(
        pair=zeros + B,
        token=zeros,
        position=zeros,
        count=zeros,
        live=jnp.zeros(S, bool),
        cache=model.empty_cache(S, prompt_width + R),
        next_pair=jnp.zeros((), jnp.int32),
        steps=jnp.zeros((), jnp.int32),
        tokens=jnp.zeros((B, R), jnp.int32),
        logprobs=jnp.zeros((B, R), jnp.float32),
        lengths=jnp.zeros(B, jnp.int32),
        ended=jnp.zeros(B, bool),
    )


def _assemble(prompts: Prompts, groups: np.ndarray, out: _Slots) -> Rollout:
    """Join prompts and responses into rows without padding between them."""
    response, logprobs = np.asarray(out.tokens), np.asarray(out.logprobs)
    counts = np.asarray(out.lengths)
    prompt_lengths = np.asarray(prompts.lengths)[groups]
    B, R = response.shape
    width = prompts.tokens.shape[1] + R
    tokens = np.zeros((B, width), np.int32)
    tokens[:, : prompts.tokens.shape[1]] = np.asarray(prompts.tokens)[groups]
    at = np.arange(width)[None, :] - prompt_lengths[:, None]
    mask = (at >= 0) & (at < counts[:, None])
    index = np.clip(at, 0, R - 1)
    tokens = np.where(at >= 0, np.take_along_axis(response, index, axis=1), tokens)
    return Rollout(
        tokens=np.where(at < counts[:, None], tokens, 0),
        prompt_lengths=prompt_lengths,
        lengths=(prompt_lengths + counts).astype(np.int32),
        loss_mask=mask,
        logprobs=np.where(mask, np.take_along_axis(logprobs, index, axis=1), 0.0).astype(
            np.float32
        ),
        truncated=~np.asarray(out.ended),
        group_ids=groups,
    )
