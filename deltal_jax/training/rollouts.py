"""What a step was trained on, as a file: lengths, rewards, advantages, weights, samples."""

import json
from pathlib import Path
from typing import Any

from deltal_jax.data.prompts import problems_at
from deltal_jax.metrics import finite
from deltal_jax.training.collect import Collected, response_text
from deltal_jax.training.objective import Weighted, reject
from deltal_jax.training.run_folder import ROLLOUTS, write_text
from deltal_jax.training.setup import Setup

#: Responses that are kept as text, the first of the batch.
SAMPLES = 16


def write_rollout(
    folder: Path, setup: Setup, step: int, batch: Collected, weighted: Weighted
) -> None:
    """`rollouts/step-NNNNNN.json` in a run folder. The same batch gives the same bytes."""
    path = folder / ROLLOUTS / f"step-{step:06d}.json"
    path.parent.mkdir(exist_ok=True)
    record = describe_rollout(setup, step, batch, weighted)
    write_text(path, json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")


def describe_rollout(
    setup: Setup, step: int, batch: Collected, weighted: Weighted
) -> dict[str, Any]:
    """Plain JSON of a batch of B responses: lists of B numbers, and the first `SAMPLES` as text.

    Lengths are the L_i that the weights are of, in trained tokens. A reward that is missing, and
    what is not finite, is null.
    """
    config, rollout = setup.config, batch.rollout
    if batch.old_logprobs is not None:
        rollout, _ = reject(config.objective, rollout, batch.old_logprobs)
    lists = {
        "lengths": rollout.response_lengths.tolist(),
        "rewards": [finite(value) for value in batch.rewards],
        "advantages": [finite(value) for value in weighted.advantages],
        "weights": [finite(value) for value in weighted.weights],
        "truncated": rollout.truncated.tolist(),
    }
    positions = batch.positions[:SAMPLES]
    problems = problems_at(setup.task, config.seed, positions)
    samples = []
    for row, problem in enumerate(problems):
        tokens = rollout.tokens[row, rollout.prompt_lengths[row] : rollout.lengths[row]]
        text = {"prompt": problem.prompt, "response": response_text(setup, tokens)}
        numbers = {name.removesuffix("s"): values[row] for name, values in lists.items()}
        samples.append(text | {"answer": problem.answer} | numbers)
    return {"step": step, **lists, "samples": samples}
