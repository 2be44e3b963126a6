"""Rollout batches: sample and grade, step after step, in the order of the training stream."""

import dataclasses
import functools
import json
import math
import operator
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from deltal_jax.data.prompts import Drop, problems_at
from deltal_jax.errors import UserError
from deltal_jax.guard import signals
from deltal_jax.guard.failpoints import fail_point
from deltal_jax.guard.pulse import phase
from deltal_jax.parallel.processes import on_each, own_share
from deltal_jax.parallel.sharding import host_key
from deltal_jax.rollout.base import Finished, RolloutEngine
from deltal_jax.rollout.results import assemble, begin, join, take
from deltal_jax.rollout.schedule import RolloutStats
from deltal_jax.tasks.base import files_of
from deltal_jax.tasks.early import EarlyVerdicts
from deltal_jax.tasks.grading import Grades, Reward
from deltal_jax.tasks.shaping import soft_overlong_punishment
from deltal_jax.training.groups import (
    Groups,
    choose,
    informative,
    join_groups,
    rows_of,
    take_groups,
)
from deltal_jax.training.journal import VerdictJournal
from deltal_jax.training.setup import Setup, draw_training
from deltal_jax.training.verdicts import grade_together
from deltal_jax.types import Prompts, Responses, Rollout

#: The punishment of long responses among the parts of a reward.
OVERLONG = "overlong"


@dataclasses.dataclass(frozen=True)
class Collected:
    """A graded rollout batch, ready for updates; in host memory."""

    #: Of each response's prompt in the training stream, Int[B].
    positions: np.ndarray
    rollout: Rollout
    #: NaN where missing, Float[B].
    rewards: np.ndarray
    metrics: dict[str, float]
    #: Under the parameters that the step's first update finds, and under those of the reference
    #: model, Float[B T]; where the objective asks for them, and only then.
    old_logprobs: np.ndarray | None = None
    reference_logprobs: np.ndarray | None = None


@dataclasses.dataclass
class _Gathered:
    """What the rounds of a step found: graded groups in prompt order, and which are good."""

    parts: list[Groups] = dataclasses.field(default_factory=list)
    good: list[bool] = dataclasses.field(default_factory=list)
    rounds: list[RolloutStats] = dataclasses.field(default_factory=list)
    grading: float = 0.0  # seconds
    early: int = 0  # verdicts that were there before


class RolloutStream:
    """The batches of a run, one a step.

    Prompts begin in the order of the training stream, and groups are graded and chosen in that
    order, never in that in which they end: who takes those that end first trains on short
    responses. So a finished group waits for those before it.

    `rollout.dynamic_sampling` samples in rounds until enough groups are informative; rounds after
    the first are as large as the share of informative groups so far suggests. Where they are too
    few in the end, the first of the others make up the number. With `rollout.partial`, what has
    begun and this step does not need waits for the next one: finished groups, which are graded when
    their turn comes, and unfinished ones, which then go on under newer parameters.

    Where verdicts take other processes' time, responses are judged as they end, while others are
    still sampled; this changes how long a step takes, and nothing else.

    What one step leaves to the next is `next_prompt`, the first position of the stream that has not
    begun, and `carried`, the responses to the prompts right before it. A run that has to stop may
    also leave a batch, `pending`, that no update was begun on.
    """

    def __init__(
        self,
        setup: Setup,
        engine: RolloutEngine,
        key: jax.Array,
        rewards: Sequence[Reward | str] = ("task",),
        *,
        next_prompt: int = 0,
        carried: Responses | None = None,
        pending: Collected | None = None,
        journal: VerdictJournal | None = None,
    ):
        self.setup, self.engine, self._journal = setup, engine, journal
        self.next_prompt, self.carried, self.pending = next_prompt, carried, pending
        # Not the state's own, which is given away to every update.
        self._key, self._rewards = host_key(key), rewards
        self._dropped: dict[int, Drop] = {}  # positions of this step without a prompt
        self._early = None
        if EarlyVerdicts.serves(setup.task):
            self._early = EarlyVerdicts(setup.task, functools.partial(response_text, setup))

    def next(self, params: Any, step: int) -> Collected:
        """The batch of an RL step (counted from 0): the one that waits, or as `sample` does. It
        goes on waiting where the run has to stop first."""
        if self.pending is None:
            self.pending = self.sample(params, step)
        signals.check_update()
        batch, self.pending = self.pending, None
        return batch

    def sample(self, params: Any, step: int) -> Collected:
        """A batch sampled by `params`, for an RL step counted from 0. Where that fails, the stream
        is where it was."""
        before = self.next_prompt, self.carried
        try:
            with phase("rollout", f"RL step {step + 1}"):
                return self._next(params, step)
        except BaseException:
            self.next_prompt, self.carried = before
            self._dropped = {}
            if self._early is not None:
                self._early.keep(())
            raise

    def _next(self, params: Any, step: int) -> Collected:
        started, rl = time.perf_counter(), self.setup.config.rl
        samples, options = rl.samples_per_prompt, self.setup.config.rollout
        before = np.zeros(0, np.int32) if self.carried is None else self.carried.lengths
        found = self._gather(params, step)
        groups = join_groups(found.parts, samples)
        chosen = choose(np.asarray(found.good), rl.prompts_per_step)
        batch = take_groups(groups, chosen, samples)
        unused, in_vain = self._keep()
        metrics = batch.metrics | _utilization(found.rounds) | self._data_metrics()
        if options.dynamic_sampling != "none":
            everything = groups.metrics
            metrics |= {
                "rollout/rounds": float(len(found.rounds)),
                "rollout/informative_groups": float(sum(found.good)),
                "rollout/informative_frac": float(np.mean(found.good)),
                "rollout/groups_dropped": float(len(found.good) - len(chosen) + unused),
                "rollout/tokens": float(groups.rollout.response_lengths.sum() + in_vain),
                "rollout/reward_mean": everything["reward/mean"],
                "rollout/accuracy_mean": everything["accuracy/mean"],
            }
        if options.partial:
            rows = rows_of(chosen, samples)
            stale = before[rows[rows < len(before)]].sum()  # what was carried comes first
            metrics |= {
                "rollout/stale_frac": float(stale / batch.rollout.loss_mask.sum()),
                "rollout/carried": float(_count(self.carried) * samples),
            }
        if self._early is not None:
            self._early.keep(
                [] if self.carried is None else self.carried.prompts.positions.tolist()
            )
            judged = int(np.sum(own_share(groups.positions)))
            metrics["overlap/verdicts_early"] = found.early / max(judged, 1)
        metrics["time/reward"] = found.grading
        metrics["time/rollout"] = time.perf_counter() - started - found.grading
        fail_point("rollout")
        return Collected(batch.positions, batch.rollout, batch.rewards, metrics)

    def saved(self) -> dict[str, Any]:
        """Arrays that a checkpoint needs beside `next_prompt`; none where nothing is carried and
        no batch waits."""
        left = {"carried": self.carried, "pending": self.pending}
        return {name: arrays_of(value) for name, value in left.items() if value is not None}

    def _gather(self, params: Any, step: int) -> _Gathered:
        """Sample and grade until there are enough good groups, or no more rounds."""
        wanted, options = self.setup.config.rl.prompts_per_step, self.setup.config.rollout
        rounds = 1 if options.dynamic_sampling == "none" else options.max_rounds
        found, params = _Gathered(), self.engine.place(params)
        while (missing := wanted - sum(found.good)) and len(found.rounds) < rounds:
            share = float(np.mean(found.good)) if found.good else 1.0
            found.rounds.append(self._sample(params, missing, share, step, len(found.rounds)))
            clock = time.perf_counter()
            with phase("grading"):
                while count := min(wanted - sum(found.good), self._ready()):
                    groups = self._grade(self._pop(count), found, step)
                    found.parts.append(groups)
                    found.good += self._good(groups).tolist()
            found.grading += time.perf_counter() - clock
        if missing and not options.fill_up:
            raise UserError(
                f"rollout.max_rounds: in {rounds} rounds only {wanted - missing} of {wanted} "
                f"groups were found whose {options.dynamic_sampling} varies; raise it, or set "
                "rollout.fill_up=true"
            )
        return found

    def _sample(
        self, params: Any, missing: int, share: float, step: int, round_: int
    ) -> RolloutStats:
        """One round, for so many good groups more, where this share of the groups is good."""
        options, rl = self.setup.config.rollout, self.setup.config.rl
        room = math.ceil(rl.prompts_per_step * options.oversampling)
        if options.partial:  # later ones may be finished by another round, or step
            needed = math.ceil(min(missing / max(share, 1e-9), rl.prompts_per_step))
            count = math.ceil(needed * options.oversampling)
        else:
            needed = None
            count = math.ceil(min(missing * max(options.oversampling, 1 / max(share, 1e-9)), room))
        if (more := count - _count(self.carried)) > 0:
            start = self.next_prompt
            drawn = on_each(lambda: draw_training(self.setup, start, more))
            fresh = begin(
                self.engine.options,
                drawn.prompts,
                self._key,
                samples=rl.samples_per_prompt,
                step=step,
                round_=round_,
            )
            self.carried = fresh if self.carried is None else join(self.carried, fresh)
            self.next_prompt = drawn.next_position
            self._dropped |= drawn.dropped
        assert self.carried is not None
        with self._listener(self.carried) as finished:
            self.carried, stats = self.engine.sample(
                params, self.carried, needed=needed, room=room, finished=finished
            )
        return stats

    @contextmanager
    def _listener(self, responses: Responses) -> Iterator[Finished | None]:
        """Has those that end judged, as long as it is open."""
        if (early := self._early) is None:
            yield None
            return
        positions = responses.prompts.positions
        problems = problems_at(self.setup.task, self.setup.config.seed, positions)
        judged = own_share(positions)

        def finished(row: int, tokens: np.ndarray) -> None:
            group = responses.group_ids[row]
            if judged[group]:
                early.offer(int(positions[group]), problems[group].answer, tokens)

        with early:
            yield finished

    def _ready(self) -> int:
        """How many groups are finished before the first that is not."""
        if self.carried is None:
            return 0
        unfinished = self.carried.group_ids[~self.carried.finished]
        return int(unfinished[0]) if len(unfinished) else _count(self.carried)

    def _pop(self, count: int) -> Responses:
        """The first `count` groups, which are carried no longer."""
        assert self.carried is not None
        first, rest = np.split(np.arange(_count(self.carried)), [count])
        popped = take(self.carried, first)
        self.carried = take(self.carried, rest) if len(rest) else None
        return popped

    def _keep(self) -> tuple[int, int]:
        """Carry over what has begun, or nothing; returns how many groups are thrown away, and how
        many tokens of theirs."""
        if self.carried is None:
            return 0, 0
        count = _count(self.carried)
        if not self.setup.config.rollout.partial:
            tokens = int(self.carried.lengths.sum())
            self.carried = None
            return count, tokens
        begun = self.carried.group_ids[self.carried.lengths > 0]
        kept = int(begun[-1]) + 1 if len(begun) else 0
        if kept < count:  # the turn of the others comes again
            self.next_prompt = int(self.carried.prompts.positions[kept])
        self.carried = take(self.carried, np.arange(kept)) if kept else None
        return 0, 0

    def _data_metrics(self) -> dict[str, float]:
        """How far the run is in its data, and what it left out on the way; both only of tasks that
        read files, and what was left out of any task that has such."""
        left_out = [why for at, why in self._dropped.items() if at < self.next_prompt]
        self._dropped = {}
        files = files_of(self.setup.task)
        found = {
            "data/dropped_rows": float(left_out.count("row")),
            "data/dropped_prompts": float(left_out.count("overlong")),
        }
        if len(files) == 1 and self.setup.task.name in files:
            found["data/epoch"] = self.next_prompt / files[self.setup.task.name].rows()
        return found if files or left_out else {}

    def _grade(self, responses: Responses, found: _Gathered, step: int) -> Groups:
        rollout, positions = assemble(responses), responses.prompts.positions
        problems = problems_at(self.setup.task, self.setup.config.seed, positions)
        asked = [problems[group] for group in rollout.group_ids]
        texts = response_texts(self.setup, rollout)
        each, early = positions[rollout.group_ids], []
        if self._early is not None:
            early = [self._early.find(*of) for of in zip(each.tolist(), texts, strict=True)]
            found.early += sum(verdict is not None and verdict.done() for verdict in early)
        journal = None if self._journal is None else self._journal.of("rl", step + 1)
        grades = grade_together(
            self.setup.task, asked, texts, self._rewards, early, journal, numbers=each
        )
        shaped, parts = self._shape(grades, rollout)
        return Groups(each, rollout, shaped, grades.correct, parts, grades.missing)

    def _shape(self, grades: Grades, rollout: Rollout) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Rewards as they are trained on, and their parts by name. A missing one stays missing."""
        options, limit = self.setup.config.task, self.setup.config.rollout.max_response_length
        if options.overlong_buffer is None:
            return grades.rewards, grades.parts
        lengths = rollout.lengths - rollout.prompt_lengths
        buffer, factor = options.overlong_buffer, options.overlong_factor
        punished = soft_overlong_punishment(lengths, limit, buffer, factor)
        shaped = (grades.rewards + punished).astype(np.float32)
        return shaped, grades.parts | {OVERLONG: punished}

    def _good(self, groups: Groups) -> np.ndarray:
        """Which groups may be trained: all, or by `rollout.dynamic_sampling`."""
        kind = self.setup.config.rollout.dynamic_sampling
        samples = self.setup.config.rl.samples_per_prompt
        values = {"none": None, "reward": groups.rewards, "accuracy": groups.correct}[kind]
        if values is None:
            return np.ones(len(groups.positions) // samples, bool)
        return informative(values, ~np.isnan(groups.rewards), samples)


def arrays_of(value: Any) -> dict[str, Any]:
    """A dataclass as nested dictionaries of arrays, without what is None; plain numbers by name as
    JSON in bytes."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        part = getattr(value, field.name)
        if dataclasses.is_dataclass(part):
            part = arrays_of(part)
        elif isinstance(part, dict):
            part = np.frombuffer(json.dumps(part).encode(), np.uint8)
        if part is not None:
            found[field.name] = part
    return found


def load_carried(arrays: dict[str, Any]) -> Responses:
    """The responses that `arrays_of` took apart."""
    fields: dict[str, Any] = arrays | {"prompts": Prompts(**arrays["prompts"])}
    return Responses(**fields)


def load_collected(arrays: dict[str, Any]) -> Collected:
    """The batch that `arrays_of` took apart."""
    metrics = json.loads(np.asarray(arrays["metrics"]).tobytes())
    fields: dict[str, Any] = arrays | {"rollout": Rollout(**arrays["rollout"]), "metrics": metrics}
    return Collected(**fields)


def response_texts(setup: Setup, rollout: Rollout) -> list[str]:
    """The text of every response."""
    rows = zip(rollout.tokens, rollout.prompt_lengths, rollout.lengths, strict=True)
    return [response_text(setup, row[prompt:length]) for row, prompt, length in rows]


def response_text(setup: Setup, tokens: Int[np.ndarray, " t"]) -> str:
    """The text of a response's tokens, without the end-of-sequence id."""
    ids = tokens.tolist()
    return setup.tokenizer.decode(ids[:-1] if ids and ids[-1] in setup.tokenizer.eos_ids else ids)


def _count(responses: Responses | None) -> int:
    """Groups."""
    return 0 if responses is None else len(responses.prompts.lengths)


def _utilization(rounds: list[RolloutStats]) -> dict[str, float]:
    stats = functools.reduce(operator.add, rounds)
    return {
        "rollout/utilization": stats.utilization,
        "rollout/utilization_queued": stats.utilization_queued,
        "rollout/utilization_ideal": stats.ideal_utilization,
    }
