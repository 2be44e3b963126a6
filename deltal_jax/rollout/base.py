"""What an engine is: prompts and parameters in, a rollout out."""

from typing import Any, Protocol

from jaxtyping import Array

from deltal_jax.rollout.schedule import RolloutStats
from deltal_jax.types import Prompts, Rollout


class RolloutEngine(Protocol):
    """Samples responses: in this process (`engine.Engine`) or by a server (`http.HttpEngine`)."""

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
