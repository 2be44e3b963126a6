"""Text from a checkpoint folder, as it is drawn."""

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from deltal_jax.data.tokenizer import GENERATION_CONFIG, Tokenizer, read_tokenizer
from deltal_jax.errors import UserError
from deltal_jax.model.architecture import Architecture
from deltal_jax.model.families import architecture_of
from deltal_jax.model.huggingface import CONTEXT, check_vocabulary, load_params, read_config
from deltal_jax.model.transformer import make_graphdef
from deltal_jax.rollout.pools import doubled
from deltal_jax.rollout.slots import SamplingOptions
from deltal_jax.rollout.stream import Streamer
from deltal_jax.types import Prompts

#: Prompts are padded to a power of two, so that few widths are compiled; no narrower than this.
NARROWEST = 64


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder, all but its weights."""

    folder: Path
    architecture: Architecture
    tokenizer: Tokenizer
    #: How many tokens the model was made for; None where the config doesn't say.
    context: int | None
    #: What its generation config says to sample with.
    temperature: float

    def check_prompt(self, ids: Sequence[int]) -> None:
        """Raises UserError for a prompt without a token, or without room for one more."""
        if not ids:
            raise UserError("--prompt: the text is empty, and the tokenizer puts no BOS before it")
        if self.context is not None and len(ids) >= self.context:
            raise UserError(
                f"--prompt: {len(ids)} tokens leave no room for a response in the model's context "
                f"of {self.context} ({CONTEXT})"
            )


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint folder, all but its weights. Raises UserError for what doesn't fit."""
    config = read_config(folder)
    architecture, tokenizer = architecture_of(config), read_tokenizer(folder)
    check_vocabulary(architecture, tokenizer.vocab_size)
    context = config.get(CONTEXT)
    return Checkpoint(folder, architecture, tokenizer, context, _temperature(tokenizer))


def _temperature(tokenizer: Tokenizer) -> float:
    """That of the generation config where it samples; else 1."""
    described = json.loads(tokenizer.files().get(GENERATION_CONFIG, b"{}"))
    found = described.get("temperature") if described.get("do_sample") else None
    return float(found) if isinstance(found, int | float) and 0 <= found < math.inf else 1.0


class Response:
    """One response. Iterate once for its text as it is drawn, in whole characters."""

    def __init__(self, tokens: Iterator[int], tokenizer: Tokenizer):
        self._tokens, self._tokenizer = tokens, tokenizer
        self._started, self._times = time.perf_counter(), list[float]()
        #: What was sampled so far, with the EOS.
        self.ids: list[int] = []
        self._stopping = False

    def stop(self) -> None:
        """End it before the next token; for signal handlers, which may come at any time."""
        self._stopping = True

    def __iter__(self) -> Iterator[str]:
        return self._tokenizer.stream(self._content())

    def _content(self) -> Iterator[int]:
        while not self._stopping and (token := next(self._tokens, None)) is not None:
            self._times.append(time.perf_counter())
            self.ids.append(token)
            if not self.ended:
                yield token
        # Of a response that was stopped the sampler still holds a cache.
        self._tokens = iter(())

    @property
    def ended(self) -> bool:
        """Whether the model ended it."""
        return bool(self.ids) and self.ids[-1] in self._tokenizer.eos_ids

    @property
    def finish(self) -> str:
        """How it came to its end: by the model, at the length limit, or by `stop`."""
        return "eos" if self.ended else "interrupted" if self._stopping else "length"

    @property
    def text(self) -> str:
        """All its text so far."""
        return self._tokenizer.decode(self.ids[: self.count])

    @property
    def count(self) -> int:
        """Its tokens so far, without the EOS."""
        return len(self.ids) - self.ended

    @property
    def seconds(self) -> float:
        """From the question to the last token, compilation included."""
        return self._times[-1] - self._started if self._times else 0.0

    @property
    def steady(self) -> tuple[int, float]:
        """Tokens after the second and the seconds that they took: all is compiled by then."""
        later = self._times[1:]
        return max(len(later) - 1, 0), later[-1] - later[0] if later else 0.0


class Writer:
    """A checkpoint with its weights: ids in, text out."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: str = "bfloat16",
        temperature: float | None = None,
        max_tokens: int = 512,
        seed: int = 0,
    ):
        self.checkpoint = checkpoint
        self._max_tokens = min(max_tokens, checkpoint.context or max_tokens)
        self._key = jax.random.key(seed, impl="threefry2x32")
        architecture = checkpoint.architecture
        params = load_params(checkpoint.folder, architecture, dtype=jnp.dtype(dtype).type)
        options = SamplingOptions(
            slots=1,
            max_response_length=self._max_tokens,
            eos_ids=checkpoint.tokenizer.eos_ids,
            temperature=checkpoint.temperature if temperature is None else temperature,
        )
        self._streamer = Streamer(make_graphdef(architecture), options, params)

    def respond(self, ids: Sequence[int], turn: int = 0) -> Response:
        """The response to a prompt; another `turn` draws from other random numbers.

        Raises UserError for a prompt that doesn't fit in the model's context.
        """
        self.checkpoint.check_prompt(ids)
        room = (self.checkpoint.context or math.inf) - len(ids)
        width = doubled(len(ids), NARROWEST)
        prompts = Prompts(
            tokens=np.pad(np.asarray([ids], np.int32), ((0, 0), (0, width - len(ids)))),
            lengths=np.asarray([len(ids)], np.int32),
            positions=np.zeros(1, np.int32),
        )
        tokens = self._streamer.stream(
            prompts,
            self._key,
            step=turn,
            cache_length=doubled(width + self._max_tokens, NARROWEST),
        )
        limit = int(min(room, self._max_tokens))
        return Response(itertools.islice(tokens, limit), self.checkpoint.tokenizer)
