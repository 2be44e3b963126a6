"""The flow of a measurement: sample fresh responses, grade them, take each one's gradient, and say
what depends on the length."""

import dataclasses
import functools
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from deltal_jax.config import Config
from deltal_jax.errors import UserError
from deltal_jax.laboratory.aggregations import Pool, compare
from deltal_jax.laboratory.configured import compare_configs
from deltal_jax.laboratory.exponents import compare_exponents
from deltal_jax.laboratory.gradients import KINDS, OUTSIDE, Block, Grams, measure_gradients
from deltal_jax.laboratory.moments import Power, bin_moments, fit_power, length_bins
from deltal_jax.metrics import finite
from deltal_jax.rollout.base import RolloutEngine
from deltal_jax.tasks.files import load_rewards
from deltal_jax.tasks.grading import Reward
from deltal_jax.training.collect import Collected, RolloutStream
from deltal_jax.training.objective import not_overlong, weigh
from deltal_jax.training.setup import Setup, make_local_engine

#: Keeps the laboratory's draws apart from those of training under the same root key.
STREAM = 0x76617269
#: Groups that are sampled, or two batches if that is more.
GROUPS = 64
#: Resamples of a layer's, a kind's or a block's interval.
PART_RESAMPLES = 300
#: Fewer responses are not fitted, and fewer groups not measured.
FEWEST, FEWEST_GROUPS = 16, 8


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured, and of which responses."""

    #: Prompts; None: `GROUPS`, or as many as two batches need.
    groups: int | None = None
    bins: int = 6
    #: Trained tokens; shorter responses are set apart.
    min_length: int = 1
    drop_truncated: bool = False
    #: Figures also without truncated responses, without the shortest, and without both.
    subsets: bool = False
    #: Dimension of each block's random projection; None: exact where memory allows.
    project: int | None = None
    #: Whether layers and kinds with an exponent of their own are tried.
    exponents: bool = True


def measure(
    setup: Setup,
    params: Any,
    key: jax.Array,
    *,
    start: int = 0,
    settings: Settings | None = None,
    engine: RolloutEngine | None = None,
    rewards: Sequence[Reward | str] | None = None,
    configs: Mapping[str, Config] | None = None,
) -> dict[str, Any]:
    """Everything that the laboratory says of these parameters, as plain JSON.

    `start` is the position in the stream of training problems where fresh prompts begin, and `key`
    the run's; the same arguments give the same figures. `engine` samples, by default one in this
    process, and `rewards` grade, by default those that the config names. `configs` are measured on
    the same responses, as `methods`. Raises UserError for too few groups, or responses.
    """
    settings = settings or Settings()
    groups = _groups(setup, settings)
    key = jax.random.fold_in(key, STREAM)
    batch = sample(setup, params, key, groups, start, engine, rewards)
    advantages = weigh(setup.config, batch.rollout, batch.rewards).advantages
    grams = measure_gradients(setup, params, batch.rollout, advantages, key, settings.project)
    kept = ~np.isnan(batch.rewards) & (batch.rollout.response_lengths > 0)
    overlong = not_overlong(setup.config, batch.rollout)
    kept &= True if overlong is None else overlong
    lengths, truncated = batch.rollout.response_lengths, batch.rollout.truncated
    size = setup.config.rl.prompts_per_step
    look = functools.partial(_describe, grams, lengths, advantages, groups, size, settings)
    counted = (lengths >= settings.min_length) & ~(truncated & settings.drop_truncated)
    chosen = kept & counted
    if chosen.sum() < FEWEST:
        raise UserError(
            f"--min-length: {chosen.sum()} of {len(chosen)} responses are left, and {FEWEST} are "
            "needed; lower it, or raise --groups"
        )
    result = {
        "settings": dataclasses.asdict(settings) | {"groups": groups, "start": start},
        "responses": len(lengths),
        "groups": groups,
        "batch_groups": size,
        "counted": int(chosen.sum()),
        "parameters": grams.parameters,
        "projected": grams.projected,
        "projection_error": grams.projected and math.sqrt(2 / grams.projected),
        "lengths": [float(x) for x in np.percentile(lengths, [0, 5, 50, 95, 100])],
        "truncated_frac": float(truncated.mean()),
        "reward_mean": finite(float(np.nanmean(batch.rewards))),
        "informative_groups": int((advantages.reshape(groups, -1) != 0).any(1).sum()),
        **look(chosen, parts=True),
    }
    if settings.subsets:
        result["subsets"] = _subsets(look, kept, lengths, truncated, settings)
    if configs is not None:
        fit = (result["gradients"]["advantage"] or {}).get("fit")
        beta, score = fit and fit["beta"], _total(grams.score)
        result["methods"] = compare_configs(score, batch, configs, setup.config, counted, beta)
    return result


def sample(
    setup: Setup,
    params: Any,
    key: jax.Array,
    groups: int,
    start: int,
    engine: RolloutEngine | None = None,
    rewards: Sequence[Reward | str] | None = None,
) -> Collected:
    """A graded batch of so many groups, as a step of training would sample it."""
    config = setup.config
    wider = dataclasses.replace(
        config,
        rl=dataclasses.replace(config.rl, prompts_per_step=groups),
        rollout=dataclasses.replace(config.rollout, partial=False),
    )
    if engine is None:
        engine = make_local_engine(setup, temperature=config.rollout.temperature)
    stream = RolloutStream(
        dataclasses.replace(setup, config=wider),
        engine,
        key,
        load_rewards(config.task.rewards) if rewards is None else rewards,
        next_prompt=start,
    )
    return stream.sample(params, 0)


def _groups(setup: Setup, settings: Settings) -> int:
    """How many groups. Raises UserError for fewer than two batches, or than 8."""
    rl = setup.config.rl
    if settings.groups is None:
        return max(GROUPS, 2 * rl.prompts_per_step)
    if settings.groups < max(FEWEST_GROUPS, 2 * rl.prompts_per_step):
        raise UserError(
            f"--groups: {settings.groups} are fewer than {FEWEST_GROUPS}, or than two batches of "
            f"rl.prompts_per_step={rl.prompts_per_step}; raise it, or lower rl.prompts_per_step"
        )
    return settings.groups


def _subsets(
    look: Any, kept: np.ndarray, lengths: np.ndarray, truncated: np.ndarray, settings: Settings
) -> dict[str, Any]:
    """Figures without truncated responses, without the shortest, and without both. The shortest are
    those under `min_length`, or the first bin where that was not given."""
    edge = settings.min_length
    if edge <= 1:
        bins = length_bins(lengths, settings.bins)
        edge = int(lengths[bins == bins.min()].max()) + 1
    long = kept & (lengths >= edge)
    choices = {
        "all": kept,
        "without truncated": kept & ~truncated,
        f"without under {edge} tokens": long,
        f"without truncated and under {edge} tokens": long & ~truncated,
    }
    return {
        name: {"counted": int(chosen.sum())} | look(chosen, parts=False)
        for name, chosen in choices.items()
        if chosen.sum() >= FEWEST
    }


def _describe(
    grams: Grams,
    lengths: np.ndarray,
    advantages: np.ndarray,
    groups: int,
    size: int,
    settings: Settings,
    kept: np.ndarray,
    *,
    parts: bool,
) -> dict[str, Any]:
    """The figures of the responses that are kept; `parts` adds those of layers and kinds."""
    moments = functools.partial(_moments, lengths, groups, settings.bins, kept, parts=parts)
    found: dict[str, Any] = {"score": moments(grams.score), "advantage": None}
    said: dict[str, Any] = {"gradients": found}
    if not np.any(advantages[kept]):
        reason = "all rewards of each group are equal, so every advantage is 0"
        return said | {"reason": reason, "aggregations": [], "exponents": None}
    found["advantage"] = moments(grams.loss)
    pool = Pool(lengths, advantages, kept, groups)
    fit = found["advantage"]["fit"]
    beta = None if fit is None else fit["beta"]
    said["aggregations"] = compare(_total(grams.loss), pool, size, beta)
    if parts:
        tried = settings.exponents
        said["exponents"] = (
            compare_exponents(grams.loss, pool, size, settings.bins) if tried else None
        )
    return said


def _moments(
    lengths: np.ndarray,
    groups: int,
    count: int,
    kept: np.ndarray,
    grams: Mapping[Block, np.ndarray],
    *,
    parts: bool,
) -> dict[str, Any]:
    """Bins and fits of one kind of gradient."""
    rows = np.flatnonzero(kept)
    own = lengths[rows]
    ids = np.unique(rows // (len(lengths) // groups), return_inverse=True)[1]
    bins = length_bins(own, count)

    def fit(gram: np.ndarray, **options: int) -> dict[str, float | None] | None:
        power = fit_power(gram[np.ix_(rows, rows)], own, ids, bins, **options)
        return None if power is None else _plain(power)

    total = _total(grams)
    found = {
        "bins": bin_moments(total[np.ix_(rows, rows)], own, ids, bins),
        "fit": fit(total),
    }
    if not parts:
        return found
    layers = sorted({layer for layer, _ in grams if layer != OUTSIDE})
    each = {block: fit(gram, resamples=PART_RESAMPLES) for block, gram in grams.items()}

    def together(part: int, name: int | str) -> dict[str, float | None] | None:
        chosen = {block: gram for block, gram in grams.items() if block[part] == name}
        if len(chosen) == 1:
            return each[next(iter(chosen))]
        return fit(_total(chosen), resamples=PART_RESAMPLES)

    kinds = [kind for kind in KINDS if any(kind == k for _, k in grams)]
    ends = ("beta", "low", "high")
    blocks = sorted(each, key=lambda b: (b[0] == OUTSIDE, b[0], KINDS.index(b[1])))
    return found | {
        "layers": {str(layer): together(0, layer) for layer in layers},
        "kinds": {kind: together(1, kind) for kind in kinds},
        "heat": [
            {"layer": None if layer == OUTSIDE else layer, "kind": kind}
            | {end: (each[layer, kind] or {}).get(end) for end in ends}
            for layer, kind in blocks
        ],
    }


def _plain(power: Power) -> dict[str, float | None]:
    return {name: finite(value) for name, value in dataclasses.asdict(power).items()}


def _total(grams: Mapping[Block, np.ndarray]) -> np.ndarray:
    return functools.reduce(operator.add, grams.values())
