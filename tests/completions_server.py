"""A server on this machine that speaks as vLLM and SGLang do, samples with our own engine, loads
Hugging Face folders, and misbehaves when told to."""

import collections
import dataclasses
import functools
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deltal_jax.model.architecture import Architecture
from deltal_jax.model.huggingface import load_architecture, load_params
from deltal_jax.model.transformer import make_graphdef
from deltal_jax.rollout.engine import Engine, SamplingOptions
from deltal_jax.types import Prompts


@dataclasses.dataclass(frozen=True)
class Sampled:
    """One response with what may be told of it."""

    prompt: list[int]
    ids: list[int]
    logprobs: list[float]
    reason: str
    #: Asked for seldom.
    best: Callable[[], float]


class CompletionsServer:
    """Serves `params` until it is told to load others.

    `before(path, number)` is called before the `number`-th request to a path (from 0) is answered:
    it may wait, or return a status to answer with, or one of "drop", "half" an answer and "trickle"
    for one that never ends. `after(found)` may change an answer, into bytes too.
    """

    def __init__(self, arch: Architecture, params: Any, width: int):
        self.arch, self.first_params, self.width = arch, params, width
        self.url = ""
        self._engines: dict[SamplingOptions, Engine] = {}
        self._guard, self._model = threading.Lock(), threading.Lock()
        self.start_anew()

    def start_anew(self) -> None:
        """Forget all but what is compiled: weights, requests, and how to misbehave."""
        self.params, self.version = self.first_params, "default"
        self.before: Callable[[str, int], Any] = lambda path, number: None
        self.after: Callable[[Any], Any] = lambda found: found
        #: Whether log-probabilities follow the temperature.
        self.scaled = True
        self.requests: list[tuple[str, Any]] = []
        self.under_way = self.most = 0
        self._counts: collections.Counter[str] = collections.Counter()

    def count(self, path: str) -> int:
        """Requests to a path."""
        return self._counts[path]

    def last(self, path: str) -> Any:
        """Body of the last request to a path."""
        return next(body for name, body in reversed(self.requests) if name == path)

    def answer(self, path: str, body: Any) -> tuple[Any, bytes]:
        """Status and text, or what `before` said."""
        with self._guard:
            number = self._counts[path]
            self._counts[path] += 1
            self.requests.append((path, body))
            self.under_way += 1
            self.most = max(self.most, self.under_way)
        try:
            said = self.before(path, number)
            if said is not None:
                return said, b'{"error":\n "as asked for"}'
            found = getattr(self, ANSWERS[path])(body)
            return 200, found if isinstance(found, bytes) else json.dumps(found).encode()
        finally:
            with self._guard:
                self.under_way -= 1

    def completions(self, body: Any) -> Any:
        """vLLM's."""
        known = {"prompt", "n", "seed", "max_tokens", "temperature", "top_p", "top_k", "min_p"}
        known |= {"repetition_penalty", "presence_penalty", "frequency_penalty", "ignore_eos"}
        known |= {"stop_token_ids", "logprobs", "return_token_ids", "return_tokens_as_token_ids"}
        assert set(body) == known | {"skip_special_tokens", "cache_salt"}
        assert body["ignore_eos"] and body["return_token_ids"] and body["n"] == 1
        own = self._sample(body["prompt"], body["seed"], body["max_tokens"], body)
        names = [f"token_id:{i}" for i in own.ids]
        logprobs = {"tokens": names, "token_logprobs": own.logprobs}
        if body["logprobs"]:
            logprobs["top_logprobs"] = [{"token_id:0": own.best(), names[0]: own.logprobs[0]}]
        choice = {
            "index": 0,
            "text": "",
            "token_ids": own.ids,
            "prompt_token_ids": own.prompt,
            "logprobs": logprobs,
            "finish_reason": own.reason,
            "stop_reason": own.ids[-1] if own.reason == "stop" else None,
        }
        return self.after({"object": "text_completion", "choices": [choice]})

    def generate(self, body: Any) -> Any:
        """SGLang's."""
        sampling = body["sampling_params"]
        assert body["return_logprob"]
        limit = sampling["max_new_tokens"]
        own = self._sample(body["input_ids"], sampling["sampling_seed"], limit, sampling)
        reason: dict[str, Any] = {"type": own.reason}
        reason |= {"matched": own.ids[-1]} if own.reason == "stop" else {"length": limit}
        meta = {
            "finish_reason": reason,
            "prompt_tokens": len(own.prompt),
            "completion_tokens": len(own.ids),
            "weight_version": self.version,
            "output_token_logprobs": [
                [x, i, None] for x, i in zip(own.logprobs, own.ids, strict=True)
            ],
        }
        if body["top_logprobs_num"]:
            meta["output_top_logprobs"] = [[[own.best(), 0, None]]]
        return self.after({"text": "", "output_ids": own.ids, "meta_info": meta})

    def collective_rpc(self, body: Any) -> Any:
        """vLLM's way to load weights."""
        assert body["method"] == "reload_weights"
        self._load(Path(body["kwargs"]["weights_path"]))
        return {"results": [None]}

    def update_weights(self, body: Any) -> Any:
        """SGLang's."""
        self._load(Path(body["model_path"]))
        self.version = body["weight_version"]
        return {"success": True, "message": "", "num_paused_requests": 0}

    def _load(self, folder: Path) -> None:
        assert load_architecture(folder).vocab == self.arch.vocab
        self.params = load_params(folder, self.arch)

    def _sample(self, prompt: list[int], seed: int, limit: int, asked: Any) -> Sampled:
        """One response, always in programs of the same shapes."""
        options = SamplingOptions(
            slots=1,
            max_response_length=limit,
            eos_ids=tuple(asked["stop_token_ids"]),
            temperature=asked["temperature"],
            top_k=None if asked["top_k"] == -1 else asked["top_k"],
            top_p=asked["top_p"],
            min_p=asked["min_p"],
            raw_logprobs=True,
        )
        tokens = np.zeros((1, self.width), np.int32)
        tokens[0, : len(prompt)] = prompt
        lengths = np.asarray([len(prompt)], np.int32)
        prompts = Prompts(tokens=tokens, lengths=lengths, positions=np.zeros(1, np.int32))
        key = jax.random.key(seed, impl="threefry2x32")
        with self._model:
            if options not in self._engines:
                self._engines[options] = Engine(make_graphdef(self.arch), options)
            rollout, _ = self._engines[options].generate(self.params, prompts, key, samples=1)
        mask = rollout.loss_mask[0]
        assert rollout.raw_logprobs is not None
        # Servers tell of greedy tokens what they would have had at temperature 1.
        follows = self.scaled and options.temperature > 0
        logprobs = (rollout.logprobs if follows else rollout.raw_logprobs)[0][mask].tolist()
        ids = rollout.tokens[0][mask].tolist()
        reason = "length" if rollout.truncated[0] else "stop"
        best = functools.partial(self._best, prompt, options.temperature if follows else 1.0)
        return Sampled(list(prompt), ids, logprobs, reason, best)

    def _best(self, prompt: list[int], temperature: float) -> float:
        """The log-probability of the likeliest next token."""
        model = nnx.merge(make_graphdef(self.arch), self.params)
        tokens = jnp.asarray([prompt])
        positions = jnp.arange(len(prompt))[None]
        logits = model.logits(model.hidden(tokens, positions, jnp.zeros_like(tokens)))[0, -1]
        return float(jnp.max(jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)))


#: Path → the method that answers.
ANSWERS = {
    "/v1/completions": "completions",
    "/collective_rpc": "collective_rpc",
    "/generate": "generate",
    "/update_weights_from_disk": "update_weights",
}


@contextmanager
def serving(server: CompletionsServer) -> Iterator[str]:
    """Its address, for as long as it runs."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            text = self.rfile.read(int(self.headers["Content-Length"]))
            status, content = 404, b'{"detail":"Not Found"}'
            if self.path in ANSWERS:
                status, content = server.answer(self.path, json.loads(text))
            if status == "drop":
                return
            self.send_response(status if isinstance(status, int) else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(2**20 if status == "trickle" else len(content)))
            self.end_headers()
            while status == "trickle":
                self.wfile.write(b" ")
                time.sleep(0.01)
            self.wfile.write(content[: len(content) // 2] if status == "half" else content)

        def log_message(self, format: str, *args: Any) -> None:
            del format, args

    class Listening(ThreadingHTTPServer):
        request_queue_size = 64
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            del request, client_address  # the client sees the connection break off

    listening = Listening(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, args=(0.02,))
    thread.start()
    try:
        server.url = f"http://127.0.0.1:{listening.server_port}"
        yield server.url
    finally:
        listening.shutdown()
        thread.join()
        listening.server_close()
