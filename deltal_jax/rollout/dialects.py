"""What vLLM and SGLang are asked, and how their answers are read and checked.

Both are asked with token ids and must answer with token ids: text would come back as other tokens
than were sampled.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from deltal_jax.rollout.slots import SamplingOptions

#: What rounding may put a log-probability above 0; it is then taken as 0.
ROUNDING = 1e-4
#: vLLM writes −∞ as −9999, which no sampled token can have.
LOWEST = -9000.0


class BadAnswerError(ValueError):
    """An answer that cannot be trained on; the message says what is wrong, and the fix."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """One response as a server gives it, not yet checked."""

    ids: list[Any]
    logprobs: list[Any]
    #: "stop" or "length"; servers have further words for a response that was broken off.
    reason: Any
    #: The id that it says to have stopped at, where it says so.
    stopped_at: Any = None
    prompt_ids: list[Any] | None = None
    prompt_length: Any = None
    #: Of the weights that it was sampled with, where it says so.
    version: Any = None


class Speech(Protocol):
    """How one kind of server speaks."""

    #: Where it samples.
    path: str
    #: Why it may refuse new weights.
    update_fix: str
    #: How it is told to give log-probabilities of what is sampled from.
    scaled_fix: str
    #: Whether its answers say which weights they are from.
    says_version: bool

    def request(
        self,
        prompt: Sequence[int],
        options: SamplingOptions,
        *,
        seed: int,
        version: str,
        best: int = 0,
    ) -> dict[str, Any]:
        """The body that asks for one response; `best` also for so many likeliest tokens."""
        ...

    def read(self, found: Any) -> Answer:
        """Raises BadAnswerError where a field is missing."""
        ...

    def best(self, found: Any) -> float:
        """The log-probability of the likeliest first token, where it was asked for."""
        ...

    def update(self, folder: Path, version: str) -> tuple[str, dict[str, Any]]:
        """Path and body that make it load the weights of a folder."""
        ...


class VLLM:
    """vLLM's /v1/completions.

    `ignore_eos` with `stop_token_ids` makes ours the only ids that end a response, and the one that
    did is among the returned ids. `cache_salt` keeps prefixes that were computed with other weights
    from being used again. Penalties are named because the served model's generation_config would
    set them otherwise.
    """

    path = "/v1/completions"
    update_fix = (
        "start vLLM with VLLM_SERVER_DEV_MODE=1, in a version whose reload_weights takes a "
        "weights_path, and let it read rollout.server.weights_dir"
    )
    scaled_fix = "start vLLM with --logprobs-mode processed_logprobs"
    says_version = False

    def request(
        self,
        prompt: Sequence[int],
        options: SamplingOptions,
        *,
        seed: int,
        version: str,
        best: int = 0,
    ) -> dict[str, Any]:
        return _distribution(options) | {
            "prompt": list(prompt),
            "n": 1,
            "seed": seed,
            "max_tokens": options.max_response_length,
            "ignore_eos": True,
            "logprobs": best,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "cache_salt": version,
        }

    def read(self, found: Any) -> Answer:
        choice = _at(found, "choices", 0)
        answer = Answer(
            ids=_list(choice, "token_ids", fix="it needs vLLM 0.10.2 or newer"),
            logprobs=_list(choice, "logprobs", "token_logprobs"),
            reason=_at(choice, "finish_reason"),
            stopped_at=choice.get("stop_reason"),
            prompt_ids=_list(choice, "prompt_token_ids", fix="it needs vLLM 0.10.2 or newer"),
        )
        tokens = _list(choice, "logprobs", "tokens")
        if tokens != [f"token_id:{i}" for i in answer.ids]:
            raise BadAnswerError("log-probabilities are of other tokens than token_ids has")
        return answer

    def best(self, found: Any) -> float:
        first = _at(found, "choices", 0, "logprobs", "top_logprobs", 0)
        return _largest(first.values() if isinstance(first, dict) else ())

    def update(self, folder: Path, version: str) -> tuple[str, dict[str, Any]]:
        weights = {"weights_path": str(folder)}
        return "/collective_rpc", {"method": "reload_weights", "kwargs": weights}


class SGLang:
    """SGLang's own /generate: its OpenAI endpoints give no token ids in most versions.

    Log-probabilities are of the temperature's distribution before top-k, top-p and min-p, which a
    config with this dialect may not ask for. The served model's own end ids end responses too.
    New weights empty its cache of prefixes.
    """

    path = "/generate"
    update_fix = "let SGLang read rollout.server.weights_dir"
    scaled_fix = "start SGLang without SGLANG_RETURN_ORIGINAL_LOGPROB"
    says_version = True

    def request(
        self,
        prompt: Sequence[int],
        options: SamplingOptions,
        *,
        seed: int,
        version: str,
        best: int = 0,
    ) -> dict[str, Any]:
        del version  # every answer says which weights it is from
        sampling = _distribution(options) | {
            "sampling_seed": seed,
            "max_new_tokens": options.max_response_length,
            "no_stop_trim": True,
        }
        asked = {"return_logprob": True, "top_logprobs_num": best, "return_text_in_logprobs": False}
        return {"input_ids": list(prompt), "sampling_params": sampling} | asked

    def read(self, found: Any) -> Answer:
        meta = _at(found, "meta_info")
        pairs = _list(meta, "output_token_logprobs")
        if not all(isinstance(pair, list) and len(pair) >= 2 for pair in pairs):
            raise BadAnswerError("output_token_logprobs are no pairs of log-probability and id")
        reason = _at(meta, "finish_reason")
        ids = [pair[1] for pair in pairs]
        if _at(meta, "completion_tokens") != len(ids):
            raise BadAnswerError(
                f"{meta['completion_tokens']} tokens and log-probabilities of {len(ids)}"
            )
        return Answer(
            ids=ids,
            logprobs=[pair[0] for pair in pairs],
            reason=_at(reason, "type"),
            # The word for a logit that is no number, which comes with a made up last id, is text.
            stopped_at=reason.get("matched", -1),
            prompt_length=_at(meta, "prompt_tokens"),
            version=meta.get("weight_version"),
        )

    def best(self, found: Any) -> float:
        pairs = _list(_at(found, "meta_info"), "output_top_logprobs", 0)
        return _largest(pair[0] for pair in pairs if isinstance(pair, list) and pair)

    def update(self, folder: Path, version: str) -> tuple[str, dict[str, Any]]:
        body = {"model_path": str(folder), "weight_version": version, "abort_all_requests": True}
        return "/update_weights_from_disk", body


def _largest(values: Iterable[Any]) -> float:
    """Of those that are numbers; NaN where none is."""
    return max((x for x in values if isinstance(x, int | float)), default=math.nan)


def _distribution(options: SamplingOptions) -> dict[str, Any]:
    """What both call by the same names: from what tokens are drawn, and which of them end a
    response."""
    return {
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": -1 if options.top_k is None else options.top_k,
        "min_p": options.min_p,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": list(options.eos_ids),
        "skip_special_tokens": False,
    }


#: What `rollout.server.dialect` may name.
DIALECTS: dict[str, Speech] = {"vllm": VLLM(), "sglang": SGLang()}


def check_answer(
    answer: Answer, prompt: Sequence[int], options: SamplingOptions, *, vocab: int, version: str
) -> None:
    """Raises BadAnswerError for whatever does not fit what was asked for."""
    echoed = answer.prompt_ids
    if echoed is not None and echoed != list(prompt):
        raise BadAnswerError("its prompt ids are not those that were sent")
    if answer.prompt_length not in (None, len(prompt)):
        raise BadAnswerError(
            f"it counts {answer.prompt_length} prompt tokens, sent were {len(prompt)}"
        )
    if answer.version not in (None, version):
        raise BadAnswerError(
            f"it is sampled from the weights {answer.version!r}, not {version!r}; leave the server "
            "to one run at a time"
        )
    ids, logprobs = answer.ids, answer.logprobs
    unknown = [i for i in ids if type(i) is not int or not 0 <= i < vocab]
    if unknown:
        raise BadAnswerError(f"{unknown[0]!r} is no id of a vocabulary of {vocab}")
    if len(ids) != len(logprobs):
        raise BadAnswerError(f"{len(ids)} ids and {len(logprobs)} log-probabilities")
    wrong = [x for x in logprobs if not _is_logprob(x)]
    if wrong:
        raise BadAnswerError(f"{wrong[0]!r} is no log-probability of a sampled token")
    _check_end(answer, options)


def _check_end(answer: Answer, options: SamplingOptions) -> None:
    ids, longest, ends = answer.ids, options.max_response_length, options.eos_ids
    if not 1 <= len(ids) <= longest:
        raise BadAnswerError(f"{len(ids)} tokens, asked for were 1 to {longest}")
    if any(i in ends for i in ids[:-1]):
        raise BadAnswerError("it goes on after an end-of-sequence id")
    if answer.reason == "length":
        if len(ids) < longest:
            raise BadAnswerError(
                f"cut off after {len(ids)} of {longest} tokens; raise the server's longest context"
            )
    elif answer.reason != "stop":
        raise BadAnswerError(f"it ended for the reason {answer.reason!r}; see the server's log")
    elif ids[-1] not in ends or answer.stopped_at not in (None, ids[-1]):
        raise BadAnswerError(
            f"it stopped at {answer.stopped_at!r}, and its last id {ids[-1]} is "
            f"{'one' if ids[-1] in ends else 'none'} of the end-of-sequence ids {list(ends)}; the "
            "server must return the id that it stops at, and stop at no other"
        )


def _is_logprob(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and LOWEST < value <= ROUNDING


def _at(found: Any, *path: str | int, fix: str = "") -> Any:
    """The value at a path of a JSON tree. Raises BadAnswerError where there is none."""
    for key in path:
        there = isinstance(found, Mapping if isinstance(key, str) else list)
        try:
            found = found[key] if there else None
        except (KeyError, IndexError):
            found = None
        if found is None:
            name = ".".join(map(str, path))
            raise BadAnswerError(
                f"it has no {name}; {fix or 'is rollout.server.dialect the right one?'}"
            )
    return found


def _list(found: Any, *path: str | int, fix: str = "") -> list[Any]:
    value = _at(found, *path, fix=fix)
    if not isinstance(value, list):
        raise BadAnswerError(f"{'.'.join(map(str, path))} is no list")
    return value
