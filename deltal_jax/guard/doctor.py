"""The ladder of a run: from its files to its curves, each rung a check with figures, bounds and a
verdict. The first that fails is where to begin, as those after it stand on it.

All of it is computed by the run's own checkpoint and config, and nothing of the run is changed.
"""

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from deltal_jax.checkpoints.reader import SavedSteps
from deltal_jax.config import Config
from deltal_jax.errors import UserError
from deltal_jax.guard import checkup
from deltal_jax.guard.curves import judge_curves
from deltal_jax.guard.dumps import DUMPS, RECORD, load_dump
from deltal_jax.guard.ladder import Figure, Rung, at_least, at_most
from deltal_jax.guard.patient import Patient
from deltal_jax.guard.replay import replay
from deltal_jax.metrics import load_metrics
from deltal_jax.tasks.base import Problem
from deltal_jax.tasks.grading import grade
from deltal_jax.training import run_folder
from deltal_jax.training.collect import response_text
from deltal_jax.training.setup import Setup, encode_problems, make_streamer
from deltal_jax.training.trained import Steps, Trained, load_trained

#: Held-out problems that are answered greedily; characters of a text, and warnings, that are shown.
GREEDY, SHOWN, WARNINGS = 4, 160, 3
#: A share below this is none.
NONE = 1e-9
ENDLESS = "responses do not end: the tokenizer's EOS, sft.steps, rollout.max_response_length"
UNREADABLE = "the task finds no answer: the prompt's form, data.chat_template, sft.steps"
UNSOLVED = "nothing is solved: easier problems, or more sft.steps"
LOOPS = "it repeats itself: fewer updates, a lower learning rate, or a sounder start"
#: Longest repeated part of a text that is looked for, and how often it comes at least.
LONGEST_PERIOD, REPEATS = 24, 3
#: Rungs that ask for a model, and those of them that ask for its RL phase.
MODEL = ("coherent text", "log-probabilities")
UPDATE = ("first update", "weights", "learns", "replay")


def examine(
    folder: Path, overrides: dict[str, Any], steps: Steps = None
) -> tuple[list[Rung], Trained | None]:
    """All rungs, in order, and the checkpoint that they are of.

    Raises UserError where the folder is no run, or has no checkpoint after the wanted step.
    """
    if not (folder / run_folder.CONFIG).exists():
        run_folder.load_run_config(folder)
    lines, damaged = _metrics(folder)
    files, trained = look_at_files(folder, overrides, steps, lines, damaged)
    rungs, config = [files], None
    if trained is None:
        said = "no checkpoint could be read"
        rungs += [Rung(name, "", reason=said) for name in (*MODEL, *UPDATE)]
    else:
        config = trained.setup.config
        rungs += _examine(Patient(folder, trained), overrides, lines)
    rungs.append(_held("curves", functools.partial(curves, folder, config, lines)))
    return rungs, trained


def _examine(
    patient: Patient, overrides: dict[str, Any], lines: Sequence[dict[str, Any]]
) -> list[Rung]:
    """The rungs between the files and the curves."""
    own = [line["optim/grad_norm"] for line in lines if line.get("phase") == "rl"][:3]
    norms = [norm for norm in own if norm is not None]
    checks: dict[str, Callable[[], Rung]] = {
        "coherent text": lambda: text(patient),
        "log-probabilities": lambda: checkup.logprobs(patient),
        "first update": lambda: checkup.first_update(patient, norms),
        "weights": lambda: checkup.weights(patient),
        "learns": lambda: checkup.learns(patient),
        "replay": lambda: again(patient, overrides),
    }
    warming = patient.trained.position.phase == "sft"
    said = "the checkpoint is of the warm-up, before any update of RL"
    return [
        Rung(name, "", reason=said) if warming and name in UPDATE else _held(name, check)
        for name, check in checks.items()
    ]


def _held(name: str, check: Callable[[], Rung]) -> Rung:
    """A rung; one whose check cannot be done has failed, and the others go on."""
    try:
        return check()
    except Exception as error:
        return Rung(name, "", [_broken("the check itself", error)])


def _broken(name: str, error: Exception) -> Figure:
    said = " ".join(str(error).split())[:300]
    return Figure(name, said or type(error).__name__, "no error", "failed", said)


def _metrics(folder: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of metrics, and how many were not readable."""
    path = folder / run_folder.METRICS
    if not path.exists():
        return [], 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lines = load_metrics(path)
    return lines, len(caught)


def look_at_files(
    folder: Path,
    overrides: dict[str, Any],
    steps: Steps,
    lines: Sequence[dict[str, Any]],
    damaged: int,
) -> tuple[Rung, Trained | None]:
    """Config, checkpoints, metrics and warnings; and the checkpoint, if it can be read."""
    figures, notes, trained = [], [], None
    asks = "is all of it there, and whole?"
    try:
        config = run_folder.load_run_config(folder)
        figures.append(Figure("config", "readable"))
        found, trained = _checkpoints(folder, config, overrides, steps)
        figures += found
    except UserError as error:
        if str(error).startswith("--step"):
            raise
        figures.append(_broken("config", error))
    remedy = "a run that was killed and resumed leaves such lines; none should be the last ones"
    figures.append(at_least("lines of metrics", len(lines), 1, remedy="the run wrote none yet"))
    figures.append(at_most("lines that are not readable", damaged, 0, remedy=remedy))
    if trained is not None:
        size = sum(path.stat().st_size for path in [folder / run_folder.METRICS] if path.exists())
        short = trained.position.metrics_bytes - size
        lost = f"{run_folder.METRICS} was cut: bring it back, or the run cannot be resumed"
        figures.append(at_most("bytes of metrics that are lost", max(short, 0), 0, 0, remedy=lost))
    try:
        said = run_folder.load_summary(folder).get("warnings", [])
        remedy = "the run's own warnings, below; the first ones tell the cause"
        figures.append(at_most("warnings of the run", len(said), 0, remedy=remedy))
        notes += said[:WARNINGS]
    except UserError as error:
        figures.append(_broken(run_folder.SUMMARY, error))
    return Rung("files", asks, figures, notes), trained


def _checkpoints(
    folder: Path, config: Config, overrides: dict[str, Any], steps: Steps
) -> tuple[list[Figure], Trained | None]:
    """The verdicts on all checkpoints, every byte compared, and the one to examine."""
    saved = SavedSteps(run_folder.checkpoints_folder(folder, config))
    numbers = saved.all()
    remedy = "bring them back, or delete them: a resume takes the newest intact one"
    if not numbers:
        return [Figure("checkpoints", 0, "≥ 1", "look", "the run has saved none yet")], None
    wrong = {number: what for number in numbers if (what := saved.damage(number))}
    said = "; ".join(f"{number}: {what}" for number, what in wrong.items())
    figures = [
        at_least("checkpoints", len(numbers), 1),
        at_most("damaged ones", len(wrong), 0, 0, remedy=f"{said}; {remedy}"),
    ]
    try:
        return figures, load_trained(folder, overrides, steps)
    except UserError as error:
        if str(error).startswith("--step"):
            raise
        return [*figures, _broken("the checkpoint", error)], None
    except Exception as error:  # Orbax has no class of its own
        return [*figures, _broken("the checkpoint", error)], None


def text(patient: Patient) -> Rung:
    """What the model says to held-out problems, sampled and greedily."""
    setup, rl = patient.setup, patient.config.rl
    problems = setup.task.held_out(rl.prompts_per_step)[: rl.prompts_per_step]
    temperature = patient.config.evaluate.temperature or patient.config.rollout.temperature
    rollout = patient.sample(encode_problems(setup, problems), temperature, rl.samples_per_prompt)
    rows = zip(rollout.tokens, rollout.prompt_lengths, rollout.lengths, strict=True)
    sampled = [row[start:end] for row, start, end in rows]
    asked = [problems[group] for group in rollout.group_ids]
    streamer = make_streamer(setup, patient.params, temperature=0.0)
    greedy = [
        np.asarray(list(streamer.stream(encode_problems(setup, [problem]), patient.key)))
        for problem in problems[:GREEDY]
    ]
    figures, notes = [], []
    for kind, of, said in (
        (f"temperature {temperature:g}", asked, sampled),
        ("greedy", problems[:GREEDY], greedy),
    ):
        more, note = _spoken(setup, of, said, kind)
        figures += more
        notes.append(note)
    return Rung("coherent text", "does it answer, and end?", figures, notes)


def _spoken(
    setup: Setup, asked: Sequence[Problem], responses: Sequence[np.ndarray], kind: str
) -> tuple[list[Figure], str]:
    """The figures of some responses, and the first of them in words. A few greedy ones may all be
    bad by chance: only of sampled ones it has failed where none ends, or none can be read."""
    texts = [response_text(setup, tokens) for tokens in responses]
    grades = grade(setup.task, asked, texts)
    ended = np.mean([int(tokens[-1]) in setup.tokenizer.eos_ids for tokens in responses])
    read = np.mean([bool(v.answer) or v.correct or (v.reward or 0) > 0 for v in grades.verdicts])
    known = grades.rewards[~np.isnan(grades.rewards)]
    reward = float(known.mean()) if known.size else 0.0
    longest = [longest_repetition(tokens) for tokens in responses]
    loops = np.mean([2 * n > len(r) for n, r in zip(longest, responses, strict=True)])
    least = 0.0 if kind == "greedy" else NONE
    figures = [
        at_least(f"ended by EOS, {kind}", float(ended), 0.5, least, remedy=ENDLESS),
        at_least(f"read by the task, {kind}", float(read), 0.5, least, remedy=UNREADABLE),
        at_least(f"reward, {kind}", reward, NONE, remedy=UNSOLVED),
        at_most(f"share that repeats itself, {kind}", float(loops), 0.25, 0.9, remedy=LOOPS),
        at_most(f"tokens of the longest repetition, {kind}", max(longest), math.inf),
    ]
    shown = texts[0] if len(texts[0]) <= SHOWN else f"{texts[0][:SHOWN]} …"
    prompt, why = asked[0].prompt[-SHOWN:], grades.verdicts[0].reason
    return figures, f"{kind}: {prompt!r} → {shown!r} ({why})"


def longest_repetition(tokens: np.ndarray) -> int:
    """Tokens of the longest part that is one piece, of up to LONGEST_PERIOD tokens, REPEATS times
    or more one after the other; 0 where there is none."""
    best = 0
    for period in range(1, min(LONGEST_PERIOD, len(tokens) // REPEATS) + 1):
        run = 0
        for same in tokens[period:] == tokens[:-period]:
            run = run + 1 if same else 0
            if run + period >= REPEATS * period:
                best = max(best, run + period)
    return best


def again(patient: Patient, overrides: dict[str, Any]) -> Rung:
    """The newest dump of the run computed again, or where there is none the fresh rollout and its
    gradient: the same bits."""
    asks = "does the same give the same bits?"
    dumps = sorted((patient.folder / DUMPS).glob(f"*/{RECORD}"))
    if dumps:
        folder = dumps[-1].parent
        dump = load_dump(folder, overrides)
        found = replay(dump)
        remedy = f"see deltal debug replay {folder}"
        differ = at_most(
            f"figures of {folder.name} that differ, of {len(found.figures)}",
            len(found.differing),
            0,
            0 if dump.exact else len(found.figures),
            remedy=remedy,
        )
        return Rung("replay", asks, [differ], [dump.inexact] if dump.inexact else [])
    first, second = patient.rollout, patient.roll_out()
    tokens = int((first.tokens != second.tokens).sum())
    bits = int((first.logprobs.view(np.uint32) != second.logprobs.view(np.uint32)).sum())
    buckets, _ = patient.step
    once, twice = (patient.update.accumulate(patient.params, buckets).grads for _ in range(2))
    pairs = zip(jax.tree.leaves(once), jax.tree.leaves(twice), strict=True)
    differing = sum(int((a != b).sum()) for a, b in pairs)
    remedy = "an unstable kernel, or memory at fault: try another model.attention, or machine"
    figures = [
        at_most("tokens of two rollouts that differ", tokens, 0, 0, remedy=remedy),
        at_most("their log-probabilities that differ", bits, 0, 0, remedy=remedy),
        at_most("numbers of two gradients that differ", differing, 0, 0, remedy=remedy),
    ]
    return Rung("replay", asks, figures, ["the run has no dump: guard.dump_steps keeps some"])


def curves(folder: Path, config: Config | None, lines: Sequence[dict[str, Any]]) -> Rung:
    """What the metrics of the whole run say."""
    asks = "do the curves tell a known story?"
    if not lines:
        return Rung("curves", asks, reason="the run has no metrics yet")
    if config is None:
        config = run_folder.load_run_config(folder)
    figures, idle = judge_curves(config, lines)
    notes = [f"nothing to judge yet: {', '.join(dict.fromkeys(idle))}"] if idle else []
    return Rung("curves", asks, figures, notes)
