"""The training run, top to bottom: warm-up, then rollout → rewards → weights → update, again and
again."""

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np

from deltal_jax.analysis.accuracy import monotonicity
from deltal_jax.backend import enable_compile_cache
from deltal_jax.checkpoints.manifest import Position
from deltal_jax.checkpoints.store import SaveError
from deltal_jax.errors import UserError
from deltal_jax.guard import signals, supervise
from deltal_jax.guard.pulse import phase
from deltal_jax.guard.watch import StepWatch, finite_updates
from deltal_jax.metrics import FILE_NAME, MetricsWriter, load_metrics, metrics_size
from deltal_jax.parallel.mesh import describe_mesh, start_distributed
from deltal_jax.parallel.processes import agree, all_failed, ending_together, is_first, on_first
from deltal_jax.progress import ProgressDisplay
from deltal_jax.report.page import write_report
from deltal_jax.rollout.base import RolloutEngine
from deltal_jax.tasks.base import close
from deltal_jax.tasks.early import EarlyVerdicts
from deltal_jax.tasks.grading import Reward, RewardFunction, as_rewards
from deltal_jax.trackers import open_sinks
from deltal_jax.training import run_folder
from deltal_jax.training.ahead import Ahead, open_batches
from deltal_jax.training.collect import RolloutStream
from deltal_jax.training.journal import VerdictJournal
from deltal_jax.training.meters import KEPT, LiveMeters
from deltal_jax.training.opening import (
    MESH,
    check_mesh,
    check_profile,
    check_progress,
    choose_rewards,
    create_run,
    keep_config,
    open_checkpoints,
    reopen_run,
)
from deltal_jax.training.optimizer import learning_rate
from deltal_jax.training.policy import mean_of, update_policy
from deltal_jax.training.rollouts import write_rollout
from deltal_jax.training.run import OWED, Run, stage
from deltal_jax.training.setup import init_params, make_engine, make_update
from deltal_jax.training.sft import demonstration_batches
from deltal_jax.training.step import Update
from deltal_jax.training.trained import restore_state, root_key
from deltal_jax.types import TrainState

#: The warm-up steps since the last line of metrics, among what is kept with a checkpoint.
PENDING = "sft/pending"
#: Warm-up steps between two looks at signals where several processes have to agree on them.
AGREE_EVERY = 10


class _Interrupted(Exception):
    """A signal came, and the state was saved."""


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run came to. `before` and `after` are the evaluations around RL, `monotonicity` is
    `analysis.accuracy`'s of all of them by data set."""

    run_dir: Path
    report: Path | None
    status: str  # "done" or "interrupted"
    step: int
    before: dict[str, float]
    after: dict[str, float]
    monotonicity: dict[str, float | None]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        plain = dataclasses.asdict(self)
        return {k: str(v) if isinstance(v, Path) else v for k, v in plain.items()}


def train(
    experiment: str | Path | None = "countdown-tiny",
    overrides: dict[str, Any] | None = None,
    *,
    rewards: Sequence[Reward | RewardFunction | str] | None = None,
    resume: bool = False,
    profile: tuple[int, int] | None = None,
    quiet: bool = False,
) -> TrainResult:
    """Run an experiment: a config file or the name of one that comes with the package.

    `overrides` are dotted config fields. `rewards` replaces the task's verifier as what is
    maximised: functions `fn(prompts, responses, answers) -> rewards` (None = missing), `Reward(fn,
    name, weight)`, or "task" for the verifier itself; held-out accuracy is always the task's.
    `resume` goes on from the newest checkpoint. `profile` = (start, stop) traces those RL steps
    with the JAX profiler.

    SIGINT and SIGTERM save and end it: see `guard.signals`. Several processes call it alike, before
    anything of JAX; a launcher's environment says that they are several, or the caller has called
    `parallel.mesh.start_distributed`.

    Raises UserError for bad input, TrainingError where `guard` in the config stops the run, and
    `guard.signals.Stopped` for a signal where there is nothing new to save. Of several processes
    one that fails alone does not return.
    """
    wanted = None if rewards is None else as_rewards(rewards)
    with signals.listening() as stop, contextlib.ExitStack() as held:
        start_distributed()
        signals.listen_anew()
        supervise.tell(process=jax.process_index())
        stop.agree, stop.alone = agree, jax.process_count() == 1
        display = ProgressDisplay(quiet=quiet or not is_first())
        if not quiet:
            stop.say = display.say
        with ending_together():
            return _train(
                experiment, dict(overrides or {}), wanted, resume, profile, display, stop, held
            )


def _train(
    experiment: str | Path | None,
    overrides: dict[str, Any],
    wanted: Sequence[Reward | str] | None,
    resume: bool,
    profile: tuple[int, int] | None,
    display: ProgressDisplay,
    stop: signals.Stop,
    held: contextlib.ExitStack,
) -> TrainResult:
    started = time.monotonic()
    enable_compile_cache()
    if resume:
        name = None if experiment is None else str(experiment)
        folder, setup, changes = reopen_run(name, overrides, wanted, display)
    else:
        folder, setup = create_run(experiment, overrides, wanted, profile)
        changes = {}
    on_first(lambda: held.enter_context(run_folder.locked(folder)))
    config = setup.config
    wanted = choose_rewards(config, wanted)
    check_profile(profile, config)
    checkpoints = open_checkpoints(folder, setup, display, resume=resume)
    newest = checkpoints.choose(metrics_size(folder)) if resume else None
    if resume and newest is None:
        on_first(lambda: check_progress(folder, config))
    position = Position("sft", 0, 0, 0) if newest is None else checkpoints.read_position(newest)
    check_mesh(setup, position)
    if resume and newest is None:
        display.say(f"no checkpoint yet in {checkpoints.folder}: the run begins anew")
    writer = MetricsWriter(
        folder if is_first() else None,
        keep_bytes=position.metrics_bytes,
        sinks=open_sinks(folder, config, display.say) if is_first() else (),
    )
    running = position.running | {MESH: describe_mesh(setup.mesh)}
    journal = None
    if EarlyVerdicts.serves(setup.task):
        journal = VerdictJournal(folder / run_folder.VERDICTS)
    run = Run(folder, setup, wanted, writer, checkpoints, display, profile, stop, journal, running)
    stop.grace, stop.kept = config.run.grace_seconds, run.kept
    supervise.tell(folder=str(checkpoints.folder), resume=run.resume_command())
    if resume:
        keep_config(folder, setup)
    run.announce(newest, position, changes)
    try:
        with ending_together(), run.watched():
            step, status = _run_phases(run, newest, position)
            with phase("save"):
                run.settle(step)
    finally:
        display.stop()
        close(setup.task)
        with contextlib.suppress(SaveError):  # `settle` says it, or the run has failed before
            checkpoints.close()
        writer.close()
    return _finish(run, step, status, time.monotonic() - started)


def _run_phases(run: Run, newest: int | None, position: Position) -> tuple[int, str]:
    """Warm-up and RL from wherever the checkpoint is; returns the RL step and how it ended."""
    setup, config = run.setup, run.setup.config
    warm_up, policy = make_update(setup, "sft"), make_update(setup, "rl")
    init_key, run_key = jax.random.split(root_key(config.seed))
    with phase("start-up"):
        if newest is None:
            state = warm_up.init(init_params(setup, init_key), run_key, donate=True)
        else:
            state = restore_state(run.checkpoints, newest, setup, position)
    run.stop.serving = not run.stop.alone
    step = position.step if position.phase == "rl" else 0
    evaluator = make_engine(setup, temperature=config.evaluate.temperature)
    try:
        if position.phase == "sft":
            state = _warm_up(run, warm_up, state, position.step)
            reference = config.objective.kl_coefficient > 0
            state = policy.init(state.params, state.key, reference=reference, donate=True)
            run.evaluate(evaluator, state, 0)
            run.improved(0)  # refuses a metric that no evaluation has before any step
            run.save(state, "rl", 0)
        else:
            owed = run.running.pop(OWED, False)
            if run.evaluates(step) and (owed or not run.scheduled(step)):
                run.evaluate_saved(evaluator, state, step)
        if run.stop.asked():
            raise _Interrupted(step)
        rollouts = {} if newest is None else run.checkpoints.read_rollouts(newest)
        where: dict[str, Any] = {"next_prompt": position.next_prompt, "rollouts": rollouts}
        with open_batches(setup, state.key, run.rewards, **where, journal=run.journal) as batches:
            step = _reinforce(run, policy, batches, evaluator, state, step)
    except _Interrupted as interrupt:
        return int(interrupt.args[0]), "interrupted"
    return step, "done"


def _warm_up(run: Run, update: Update, state: TrainState, done: int) -> TrainState:
    """Supervised steps done+1 … sft.steps."""
    config = run.setup.config.sft
    setup = run.setup
    batches = demonstration_batches(setup.config, setup.task, setup.tokenizer, update.row_multiple)
    schedule = learning_rate(config.optimizer, config.steps)
    run.display.start("warm-up", done, config.steps)
    pending, tokens, clock = [], 0, time.perf_counter()
    before = run.running.pop(PENDING, {"good": [], "steps": 0})
    good, steps = before["good"], before["steps"]
    for step, batch in enumerate(islice(batches, done, config.steps), start=done + 1):
        with stage("update", "sft", step):
            state, metrics = update.single(state, update.place(batch))
        run.stop.serving = True
        pending.append((step, batch.tokens.shape, metrics))
        tokens += int(np.sum(batch.loss_mask))
        writes = not step % config.log_every or step == config.steps
        stops = (run.stop.alone or not step % AGREE_EVERY) and run.stop.asked()
        if not writes and not stops:
            continue
        with stage("update", "sft", step):
            good += finite_updates(run, pending)
        steps, pending = steps + len(pending), []
        if not writes:
            run.running[PENDING] = {"good": good, "steps": steps}
            run.save(state, "sft", step)
            raise _Interrupted(0)
        seconds = time.perf_counter() - clock
        line = {
            "sft/loss": mean_of([loss for loss, _ in good]),
            "optim/grad_norm": good[-1][1] if good else float("nan"),
            "optim/skipped": float(steps - len(good)),
            "optim/lr": float(np.asarray(schedule(step - 1))),
            "throughput/tokens_per_s": tokens / seconds,
            "time/update": seconds,
        }
        with run.writing("warm-up", step):
            run.writer.write(step, "sft", line)
        shown = {"loss": line["sft/loss"], "tokens/s": line["throughput/tokens_per_s"]}
        run.display.update(step, shown)
        if stops and step < config.steps:
            run.save(state, "sft", step)
            raise _Interrupted(0)
        good, steps, tokens, clock = [], 0, 0, time.perf_counter()
    return state


def _reinforce(
    run: Run,
    update: Update,
    batches: RolloutStream | Ahead,
    evaluator: RolloutEngine,
    state: TrainState,
    done: int,
) -> int:
    """RL steps done+1 … rl.steps, with evaluations and checkpoints; returns the last step."""
    config = run.setup.config
    run.display.start("RL", done, config.rl.steps)
    accuracy, saving = float("nan"), 0.0
    live = LiveMeters(config, run.running.get(KEPT))
    for step in range(done + 1, config.rl.steps + 1):
        clock = time.perf_counter()
        with run.profiled(step):
            try:
                batch = batches.next(state.params, step - 1)
            except Exception as error:
                if all_failed(error):
                    run.save(state, "rl", step - 1, batches)
                if isinstance(error, signals.Abandoned):
                    raise _Interrupted(step - 1) from error
                if isinstance(error, UserError) and step > done + 1:  # it was good input so far
                    raise run.stopped("RL", step, error) from error
                raise
            watch, began = StepWatch(run, step), time.perf_counter()
            with stage("update", "rl", step):
                state, metrics = update_policy(run.setup, update, state, batch, watch, live)
            run.running[KEPT] = live.saved()
        run.stop.serving, run.stop.update_seconds = True, time.perf_counter() - began
        seconds = time.perf_counter() - clock
        metrics |= batch.metrics | {
            "throughput/tokens_per_s": float(batch.rollout.response_lengths.sum()) / seconds,
            "time/checkpoint": saving,
        }
        with run.writing("RL", step):
            run.writer.write(step, "rl", metrics)
            if is_first() and (step == 1 or run.evaluates(step)):
                assert watch.batch is not None and watch.weighted is not None
                write_rollout(run.folder, run.setup, step, watch.batch, watch.weighted)
        must_stop = watch.finish(metrics)
        if run.evaluates(step):
            accuracy = run.evaluate(evaluator, state, step)
        saving = 0.0
        due = config.checkpoint.every and step % config.checkpoint.every == 0
        due = due or run.improved(step) or step == config.rl.steps
        stops = run.stop.asked()
        if due or stops or must_stop:
            saving = run.save(state, "rl", step, batches)
            stops = stops or run.stop.asked()  # a signal that came while it was saved
        if must_stop:
            raise run.stopped("RL", step, must_stop)
        shown = {
            "accuracy": accuracy,
            "reward": metrics["reward/mean"],
            "length": metrics["length/mean"],
            "tokens/s": metrics["throughput/tokens_per_s"],
        }
        run.display.update(step, {k: v for k, v in shown.items() if np.isfinite(v)})
        if stops and step < config.rl.steps:
            raise _Interrupted(step)
    last = max(done, config.rl.steps)
    if OWED in run.running:
        raise _Interrupted(last)
    return last


def _finish(run: Run, step: int, status: str, seconds: float) -> TrainResult:
    stop = run.stop
    stop.serving = stop.saved = True
    if status == "interrupted":
        by = "a signal" if stop.asked_by is None else stop.asked_by.name
        run.display.say(f"stopped by {by} {stop.where}: {stop.kept()[0]}")
    prefix = f"eval/{run.setup.task.name}/"
    evaluations = on_first(
        lambda: [x for x in load_metrics(run.folder / FILE_NAME) if x["phase"] == "eval"]
    )
    figures = [
        {k.removeprefix(prefix): v for k, v in line.items() if k.startswith(prefix)}
        | {"step": line["step"]}
        for line in evaluations
    ]
    order = monotonicity(evaluations)
    run.conclude(order)
    report = None
    if run.setup.config.run.report and on_first(lambda: stop.spare() > 0):
        with phase("report"):
            report = Path(on_first(lambda: str(write_report(run.folder))))
    before, after = (figures[0], figures[-1]) if figures else ({}, {})
    return TrainResult(run.folder, report, status, step, before, after, order, seconds)
