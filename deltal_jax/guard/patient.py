"""What the doctor examines: a checkpoint, and a small batch that it samples. Each part is made as
it is first asked for; nothing of the run is changed."""

import bisect
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deltal_jax.data.prompts import problems_at
from deltal_jax.parallel.sharding import host_key
from deltal_jax.tasks.grading import grade
from deltal_jax.training.collect import Collected, response_texts
from deltal_jax.training.groups import informative
from deltal_jax.training.opening import choose_rewards
from deltal_jax.training.policy import make_updates, with_logprobs
from deltal_jax.training.setup import Setup, draw_training, make_local_engine, make_update
from deltal_jax.training.step import Update
from deltal_jax.training.trained import Trained
from deltal_jax.types import Bucket, Prompts, Rollout, TrainState

#: Keeps its draws apart from those of the run.
DOCTOR_STREAM = 0x646F6374
#: Responses of its batch at most.
RESPONSES = 32


class Patient:
    """A checkpoint under a config whose step is one small rollout and one update."""

    def __init__(self, folder: Path, trained: Trained):
        self.folder, self.trained, self.params = folder, trained, trained.params
        config = trained.setup.config
        samples = min(config.rl.samples_per_prompt, RESPONSES)
        rl = dataclasses.replace(
            config.rl,
            prompts_per_step=min(config.rl.prompts_per_step, max(RESPONSES // samples, 1)),
            samples_per_prompt=samples,
            updates_per_rollout=1,
            epochs_per_rollout=1,
        )
        self.config = dataclasses.replace(config, rl=rl)
        self.setup: Setup = dataclasses.replace(trained.setup, config=self.config)
        self.key = jax.random.fold_in(host_key(trained.key), DOCTOR_STREAM)

    @functools.cached_property
    def update(self) -> Update:
        """That of RL."""
        return make_update(self.setup, "rl")

    def sample(self, prompts: Prompts, temperature: float, samples: int) -> Rollout:
        """Responses by this process's own sampler, of all tokens."""
        engine = make_local_engine(self.setup, temperature=temperature)
        return engine.generate(self.params, prompts, self.key, samples=samples)[0]

    @functools.cached_property
    def prompts(self) -> Prompts:
        """Those that the run would train on next."""
        where = self.trained.position.next_prompt
        return draw_training(self.setup, where, self.config.rl.prompts_per_step).prompts

    def roll_out(self) -> Rollout:
        """A batch as training samples it, the same each time."""
        rl, temperature = self.config.rl, self.config.rollout.temperature
        return self.sample(self.prompts, temperature, rl.samples_per_prompt)

    @functools.cached_property
    def rollout(self) -> Rollout:
        """The first such batch."""
        return self.roll_out()

    @functools.cached_property
    def graded(self) -> tuple[np.ndarray, bool]:
        """The rewards of the batch, and whether they are made up: every other response gets one,
        where those of the run are constant in each group and would move nothing."""
        rollout, task = self.rollout, self.setup.task
        positions = self.prompts.positions[rollout.group_ids]
        asked = problems_at(task, self.config.seed, positions)
        wanted = choose_rewards(self.config, None)
        rewards = grade(task, asked, response_texts(self.setup, rollout), wanted).rewards
        varied = informative(rewards, ~np.isnan(rewards), self.config.rl.samples_per_prompt)
        if varied.any():
            return rewards, False
        return (np.arange(len(rewards)) % 2).astype(np.float32), True

    def fresh_state(self) -> TrainState:
        """A state as if RL began here: its updates take a copy of the parameters."""
        copy = jax.tree.map(jnp.copy, self.params)
        reference = self.config.objective.kl_coefficient > 0
        return self.update.init(copy, self.trained.key, reference=reference, donate=True)

    def logprobs(self, params: Any) -> np.ndarray:
        """The trainer's log p of each token of the batch, Float[B T]; 0 where none is trained."""
        objective = dataclasses.replace(self.config.objective, old_logprobs="recompute")
        config = dataclasses.replace(self.layout.config, objective=objective)
        setup = dataclasses.replace(self.layout, config=config)
        state = TrainState(params, None, jnp.zeros((), jnp.int32), self.trained.key)
        batch = Collected(self.rollout.group_ids, self.rollout, self.graded[0], {})
        found = with_logprobs(setup, self.update, state, batch).old_logprobs
        assert found is not None
        return found

    @functools.cached_property
    def before(self) -> np.ndarray:
        """`logprobs` under the checkpoint's parameters."""
        return self.logprobs(self.params)

    @functools.cached_property
    def batch(self) -> Collected:
        """The graded batch, with the log-probabilities that the objective asks for."""
        batch = Collected(self.rollout.group_ids, self.rollout, self.graded[0], {})
        return with_logprobs(self.layout, self.update, self.fresh_state(), batch)

    @functools.cached_property
    def layout(self) -> Setup:
        """The setup with one length of rows alone, the least that holds the batch: each takes
        programs of its own, and which there are changes no number."""
        edges = self.config.bucket_edges
        edge = edges[bisect.bisect_left(edges, int(self.rollout.lengths.max()))]
        config = dataclasses.replace(self.config, length_buckets=(edge,))
        return dataclasses.replace(self.setup, config=config)

    def cut(self, tokens: int) -> tuple[list[Bucket], dict[str, float]]:
        """The micro-batches of the one update under a budget of tokens, and the batch's meters."""
        config = self.layout.config
        rl = dataclasses.replace(config.rl, tokens_per_microbatch=tokens)
        setup = dataclasses.replace(self.layout, config=dataclasses.replace(config, rl=rl))
        (buckets,), _, metrics = make_updates(setup, self.batch)
        return buckets, metrics

    @functools.cached_property
    def step(self) -> tuple[list[Bucket], dict[str, float]]:
        """The same under the run's own budget."""
        return self.cut(self.config.rl.tokens_per_microbatch)
