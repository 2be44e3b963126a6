"""What an engine is: prompts and parameters in, a rollout out."""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from jaxtyping import Array, Int

from deltal_jax.rollout.schedule import RolloutStats
from deltal_jax.rollout.slots import SamplingOptions
from deltal_jax.types import Prompts, Responses, Rollout

#: Told the row of a response and all its tokens.
Finished = Callable[[int, Int[np.ndarray, " t"]], None]


class RolloutEngine(Protocol):
    """Samples responses: in this process (`engine.Engine`) or by a server (`http.HttpEngine`)."""

    @property
    def options(self) -> SamplingOptions:
        """How responses are drawn."""
        ...

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
        """`samples` responses to each prompt under `params`, in prompt order: row p·samples + s.

        Arrays of the rollout are in host memory. Randomness is keyed by the root key, the step, the
        round, the prompt's position in the data stream and the sample's number, never by history.
        Raises UserError for what cannot be sampled.
        """
        ...

    def sample(
        self,
        params: Any,
        responses: Responses,
        *,
        needed: int | None = None,
        room: int = 0,
        finished: Finished | None = None,
    ) -> tuple[Responses, RolloutStats]:
        """Go on with every response until those to the first `needed` prompts are finished; None:
        all. With `room`, calls with any number of prompts up to it share what is compiled.

        `finished` is told of responses that end while others are sampled, soon after they do and
        from any thread; not of the last ones. What is sampled does not depend on it, except that a
        server that gets lost may give another response afterwards, which then counts."""
        ...

    def place(self, params: Any) -> Any:
        """The parameters where they are sampled from, such that `sample` copies nothing more;
        themselves where they are there already."""
        ...
