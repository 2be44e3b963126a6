"""Sampling by a server: vLLM or SGLang, with token ids and log-probabilities.

Each response is a request of its own, so many at once as there are slots. New parameters are
written as a Hugging Face folder, which the server is told to load, before anything is asked of it.
"""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array

from deltal_jax.errors import UserError
from deltal_jax.guard.pulse import pulse
from deltal_jax.guard.signals import check
from deltal_jax.model.architecture import Architecture
from deltal_jax.rollout.base import Finished
from deltal_jax.rollout.checks import check_request
from deltal_jax.rollout.client import AbortedError, Client, LostServerError
from deltal_jax.rollout.dialects import DIALECTS, Answer, BadAnswerError, check_answer
from deltal_jax.rollout.results import assemble, begin
from deltal_jax.rollout.sampling import COLDEST
from deltal_jax.rollout.schedule import RolloutStats, ideal_steps
from deltal_jax.rollout.served import weights_of
from deltal_jax.rollout.slots import SamplingOptions
from deltal_jax.types import Prompts, Responses, Rollout

#: Tries after the first, of a request and of a rollout; the pauses between them begin with so many
#: seconds and double.
RETRIES, BACKOFF = 4, 0.5
#: Bytes that an answer may have: so many, and so many for each token.
ANSWER_BYTES, TOKEN_BYTES = 2**20, 2**10
#: Seconds between two looks at whether the run is to stop.
LOOK = 1.0
#: Log-probabilities that differ by less are the same.
SAME = 1e-6
#: A likeliest token above this log-probability is certain at every temperature.
CERTAIN = -1e-3


@dataclasses.dataclass(frozen=True)
class Asked:
    """One request: a row of the rollout, its prompt and its seed."""

    row: int
    prompt: list[int]
    seed: int


@dataclasses.dataclass(frozen=True)
class Given:
    """A checked answer, and when it was asked for and there, in microseconds."""

    answer: Answer
    begin: int
    end: int


class HttpEngine:
    """Samples responses by a server at `url` that speaks `dialect`.

    `write(folder, params)` makes a Hugging Face folder; it lies in `weights_dir`, which the server
    must see under the same path and which no other run may use. Each request has a seed, derived
    from the same keys as the random numbers of our own engine; what a server makes of it, and
    whether the same twice, is its own matter.
    """

    def __init__(
        self,
        url: str,
        dialect: str,
        options: SamplingOptions,
        arch: Architecture,
        write: Callable[[Path, Any], None],
        *,
        weights_dir: Path,
        timeout: float,
        retries: int = RETRIES,
        backoff: float = BACKOFF,
    ):
        if options.raw_logprobs:
            raise UserError(
                "raw_logprobs: a server gives one log-probability a token; leave it out"
            )
        self.options, self.arch = options, arch
        self._speech, self._weights = DIALECTS[dialect], weights_of(url)
        self._write, self._folder = write, weights_dir.absolute()
        self._client = functools.partial(
            Client, url, timeout=timeout, retries=retries, backoff=backoff
        )
        self._greedy = options.temperature < COLDEST
        self._scaled = self._greedy or options.temperature == 1.0

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

        A server whose connection was lost may have started anew, with the weights of then: it gets
        ours again, and everything is sampled again. Slots of the statistics are places for
        requests, and their steps microseconds. Raises UserError where the server does not answer,
        or not what it was asked for.
        """
        check_request(self.options, self.arch, prompts, samples)
        responses = begin(self.options, prompts, key, samples=samples, step=step, round_=round_)
        responses, stats = self.sample(params, responses)
        return assemble(responses), stats

    def sample(
        self,
        params: Any,
        responses: Responses,
        *,
        needed: int | None = None,
        room: int = 0,
        finished: Finished | None = None,
    ) -> tuple[Responses, RolloutStats]:
        """All of the responses, of which none may have begun: `needed` and `room` change nothing
        here. `finished` is told of each, by the thread that asked for it. Raises UserError as
        `generate`."""
        del needed, room
        assert not responses.lengths.any(), "a server begins each response anew"
        prompts = responses.prompts
        seeds = responses.keys[:, 0] >> 1  # 31 bits: not every server takes more
        ids = [
            row[:length].tolist()
            for row, length in zip(prompts.tokens, prompts.lengths, strict=True)
        ]
        asked = [
            Asked(row, ids[group], int(seed))
            for row, (group, seed) in enumerate(zip(responses.group_ids, seeds, strict=True))
        ]
        with self._weights.lock:
            given = self._persist(params, asked, finished)
        responses = self._filled(responses, [own.answer for own in given])
        return responses, _stats(given, self._places(len(given)))

    def place(self, params: Any) -> Any:
        """As they are: the server reads them from a folder."""
        return params

    def _persist(self, params: Any, asked: list[Asked], finished: Finished | None) -> list[Given]:
        """All answers, each from these parameters, however often the server gets lost in between,
        up to the bound."""
        for attempt in itertools.count(1):
            client = self._client()
            try:
                self._weights.update(client, self._speech, params, self._write, self._folder)
                self._check_scaled(client, asked[0].prompt)
                return self._sample(client, asked, finished)
            except LostServerError as error:
                self._weights.lost()
                if attempt > client.retries:
                    raise UserError(
                        f"rollout.server.url: {error}, {attempt} times; start the server, or "
                        "correct the address"
                    ) from error
            time.sleep(client.backoff * 2 ** (attempt - 1))
        raise AssertionError

    def _places(self, requests: int) -> int:
        """How many requests are under way at once."""
        return min(self.options.slots, requests)

    def _sample(self, client: Client, asked: list[Asked], finished: Finished | None) -> list[Given]:
        """The answers in the order of the requests; where one fails the rest are broken off."""
        pool = ThreadPoolExecutor(self._places(len(asked)))
        try:
            futures = [pool.submit(self._one, client, own, finished) for own in asked]
            while wait(futures, LOOK).not_done:
                check()
        finally:
            client.close()
            pool.shutdown(cancel_futures=True)
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            raise next(error for error in errors if not isinstance(error, AbortedError))
        return [future.result() for future in futures]

    def _one(self, client: Client, asked: Asked, finished: Finished | None) -> Given:
        begin = time.monotonic_ns()
        try:
            answer = self._speech.read(self._ask(client, asked, self.options))
            version = self._weights.version
            check_answer(answer, asked.prompt, self.options, vocab=self.arch.vocab, version=version)
            if finished is not None:
                finished(asked.row, np.asarray(answer.ids, np.int32))
        except BaseException as error:
            client.close()
            if isinstance(error, BadAnswerError):
                raise UserError(
                    f"rollout.server.url: an answer of {client.url} cannot be trained on (row "
                    f"{asked.row}): {error}"
                ) from error
            raise
        pulse()
        return Given(answer, begin // 1000, time.monotonic_ns() // 1000)

    def _ask(self, client: Client, asked: Asked, options: SamplingOptions, best: int = 0) -> Any:
        """What the server answers; `best` also asks for so many likeliest tokens."""
        version = self._weights.version
        body = self._speech.request(
            asked.prompt, options, seed=asked.seed, version=version, best=best
        )
        tokens = len(asked.prompt) + options.max_response_length
        return client.post(self._speech.path, body, limit=ANSWER_BYTES + TOKEN_BYTES * tokens)

    def _check_scaled(self, client: Client, prompt: list[int]) -> None:
        """Once: log-probabilities must follow the temperature, or they would be of another
        distribution than the one that was sampled from."""
        if self._scaled:
            return
        found = []
        for temperature in (self.options.temperature, 1.0):
            options = dataclasses.replace(
                self.options, max_response_length=1, temperature=temperature
            )
            answer = self._ask(client, Asked(0, prompt, 0), options, best=1)
            try:
                found.append(self._speech.best(answer))
            except BadAnswerError as error:
                raise UserError(
                    f"rollout.server.url: an answer of {client.url}: {error}"
                ) from error
        if min(found) > CERTAIN:
            return  # the next rollout may tell
        if not math.isfinite(sum(found)) or abs(found[0] - found[1]) < SAME:
            raise UserError(
                "rollout.temperature: the server's log-probabilities do not follow it; "
                f"{self._speech.scaled_fix}"
            )
        self._scaled = True

    def _filled(self, responses: Responses, answers: list[Answer]) -> Responses:
        tokens, logprobs = responses.tokens.copy(), responses.logprobs.copy()
        for row, answer in enumerate(answers):
            tokens[row, : len(answer.ids)] = answer.ids
            # Greedy, a token has probability 1; servers say what it would have been at 1.
            if not self._greedy:
                logprobs[row, : len(answer.ids)] = np.minimum(answer.logprobs, 0.0)
        return dataclasses.replace(
            responses,
            tokens=tokens,
            logprobs=logprobs,
            lengths=np.asarray([len(answer.ids) for answer in answers], np.int32),
            ended=np.asarray([answer.ids[-1] in self.options.eos_ids for answer in answers]),
        )


def _stats(given: list[Given], places: int) -> RolloutStats:
    """How full the places for requests were, in microseconds."""
    begin, last = min(own.begin for own in given), max(own.begin for own in given)
    taken = [own.end - own.begin for own in given]
    return RolloutStats(
        slot_steps=places * (max(own.end for own in given) - begin),
        useful_steps=sum(taken),
        slot_steps_queued=places * (last - begin),
        useful_steps_queued=sum(max(0, min(own.end, last) - own.begin) for own in given),
        ideal_slot_steps=places * ideal_steps(np.asarray(taken), places),
    )
