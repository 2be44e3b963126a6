"""Engines that sample by the local server, and what the tests ask of them."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltal_jax.errors import UserError
from deltal_jax.model import huggingface
from deltal_jax.objective.logprobs import token_logprobs
from deltal_jax.rollout.http import HttpEngine
from deltal_jax.rollout.slots import SamplingOptions
from deltal_jax.types import Rollout
from tests import fakes
from tests.completions_server import CompletionsServer

OPTIONS = SamplingOptions(slots=3, max_response_length=12, eos_ids=(fakes.EOS, 5))
KEY = jax.random.key(11, impl="threefry2x32")
#: Of each dialect: where it samples, and where it is told of new weights.
PATHS = {
    "vllm": ("/v1/completions", "/collective_rpc"),
    "sglang": ("/generate", "/update_weights_from_disk"),
}
SAMPLING, RELOAD = PATHS["vllm"]
#: Tries after the first, with pauses too short to be noticed.
RETRIES = 2


def make_server() -> CompletionsServer:
    """The server, with weights that no test asks for."""
    return CompletionsServer(fakes.PLAIN, weights(7), width=6)


def weights(seed: int) -> Any:
    """Parameters of the model that is served."""
    return fakes.model(fakes.PLAIN, seed)[1]


def write(folder: Path, params: Any) -> None:
    """What the engine has written for the server."""
    field = "rollout.server.weights_dir"
    huggingface.export(folder, params, fakes.PLAIN, dtype="float32", field=field)


def http_engine(
    url: str,
    folder: Path,
    dialect: str = "vllm",
    options: SamplingOptions = OPTIONS,
    *,
    timeout: float = 60.0,
) -> HttpEngine:
    """An engine that does not wait long before it tries again."""
    how = dict(weights_dir=folder, timeout=timeout, retries=RETRIES, backoff=0.01)
    return HttpEngine(url, dialect, options, fakes.PLAIN, write, **how)


def generate(
    engine: HttpEngine, own: Any = None, *, prompts: int = 3, samples: int = 2, **counters: int
) -> tuple[Rollout, Any]:
    """Two responses to each of three prompts."""
    own = weights(0) if own is None else own
    return engine.generate(own, fakes.prompts(prompts), KEY, samples=samples, **counters)


def refusal(engine: HttpEngine, own: Any = None) -> str:
    """The one line with which a rollout is refused."""
    with pytest.raises(UserError) as refused:
        generate(engine, own)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def check_against_forward(rollout: Rollout, own: Any, temperature: float = 1.0) -> None:
    """Log-probabilities are those of the full forward under these parameters."""
    logits = jnp.asarray(fakes.forward(fakes.PLAIN, own, rollout.tokens)[:, :-1])
    want, _ = token_logprobs(logits, jnp.asarray(rollout.tokens[:, 1:]), temperature=temperature)
    mask = rollout.loss_mask[:, 1:]
    np.testing.assert_allclose(rollout.logprobs[:, 1:][mask], np.asarray(want)[mask], atol=1e-5)
