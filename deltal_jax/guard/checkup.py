"""The doctor's rungs about one update: log-probabilities, the loss and its gradient at ratio 1, the
weights, and whether a few updates learn."""

import math
from collections.abc import Sequence

import jax
import numpy as np
import optax

from deltal_jax.guard.ladder import Figure, Rung, at_least, at_most
from deltal_jax.guard.patient import Patient
from deltal_jax.objective.surrogate import importance_ratio
from deltal_jax.training.loss import bucket_logprobs
from deltal_jax.training.objective import make_loss, normalizer, surrogate_options
from deltal_jax.types import Bucket

#: Of each type that is computed in, what is ok and what has failed; in between it is worth a look.
#: Measured: mean |Δ log p| 4e-7 in float32, up to 0.005 in bfloat16; a temperature of 0.7 for 1
#: gives 0.04, parameters of 50 steps ago 0.06.
MEAN_DRIFT = {"float32": (1e-4, 0.01), "bfloat16": (0.01, 0.03)}
MAX_DRIFT = {"float32": (1e-2, 1.0), "bfloat16": (0.5, 4.0)}
#: Of the loss, relative to the sum of its parts' sizes.
LOSS_ERROR = {"float32": (1e-4, 1e-2), "bfloat16": (1e-2, 5e-2)}
#: Of the gradient in two splits, relative to its norm; a micro-batch's is of its parameters' type.
SPLIT_ERROR = {"float32": (1e-5, 1e-3), "bfloat16": (2e-2, 0.1)}
#: Updates on one batch that are to learn it.
UPDATES = 4

WRONG_SCALE = (
    "the loss is not Σ w_i A_i …: something divides it, or masks are shifted; `deltal train "
    "--dry-run` prints the formula"
)
#: By the aggregation, what is 1 whatever the lengths: M·Σ w, Σ w, Σ w·L, or each weight.
SUM_IS_ONE = {
    "delta_l": "M Σ w",
    "constant_length": "M Σ w",
    "inverse_variance": "M Σ w",
    "sequence_sum": "Σ w",
    "sequence_mean": "Σ w L",
    "token_mean": "Σ w L",
    "prompt_mean": "Σ w L",
    "local_token_mean": "Σ w L",
    "balanced": "Σ w L",
    "token_sum": "mean w",
}


def logprobs(patient: Patient) -> Rung:
    """Of a fresh rollout, by its sampler and by the trainer."""
    rollout, dtype = patient.rollout, patient.config.model.compute_dtype
    drift = np.abs(patient.before - rollout.logprobs)[rollout.loss_mask]
    remedy = (
        "sampler and trainer are not one policy: compare rollout.temperature, the chat template, "
        "model.attention; model.compute_dtype=float32 tells rounding from a fault"
    )
    figures = [
        at_most("mean |Δ log p|", float(drift.mean()), *MEAN_DRIFT[dtype], remedy=remedy),
        at_most("largest |Δ log p|", float(drift.max()), *MAX_DRIFT[dtype], remedy=remedy),
    ]
    notes = [f"{len(drift)} tokens of {len(rollout.lengths)} responses"]
    if patient.config.rollout.engine == "http":
        notes.append("by the sampler of this process: the run's server is not asked")
    return Rung("log-probabilities", "are sampler and trainer one policy?", figures, notes)


def first_update(patient: Patient, norms: Sequence[float]) -> Rung:
    """The first update on a fresh rollout, as if RL began at the checkpoint. `norms` are those of
    the run's own first steps."""
    dtype, (buckets, _) = patient.config.model.compute_dtype, patient.step
    gradient = patient.update.accumulate(patient.params, buckets)
    meters, norm = gradient.meters.values(), float(optax.tree.norm(gradient.grads))
    figures = list(_at_ratio_one(patient, meters))
    expected, scale = closed_form(patient, buckets)
    error = abs(float(gradient.loss) - expected) / scale
    figures.append(
        at_most("loss against its closed form", error, *LOSS_ERROR[dtype], remedy=WRONG_SCALE)
    )
    figures.append(at_most("gradient norm", norm, math.inf, remedy="see the parameters' types"))
    if norms and np.median(norms) > 0:
        figures.append(_beside(norm, float(np.median(norms))))
    figures.append(_split(patient, gradient.grads, norm))
    return Rung(
        "first update", "ratio 1, KL 0, the loss that the formula says?", figures, _made_up(patient)
    )


def _at_ratio_one(patient: Patient, meters: dict[str, float]) -> list[Figure]:
    """What is 1 or 0 before the first update has changed anything."""
    dtype, kl = patient.config.model.compute_dtype, "policy/kl"
    mean, largest = MEAN_DRIFT[dtype], MAX_DRIFT[dtype]
    stale = "the update does not start from the policy that sampled: see the log-probabilities"
    figures = []
    if "policy/ratio_max" in meters:
        clipped = sum(v for k, v in meters.items() if k.startswith("policy/clip_frac_"))
        off = abs(meters["policy/ratio_max"] - 1.0)
        figures += [
            at_most("|largest ratio − 1|", off, *largest, remedy=stale),
            at_most("clipped share of the tokens", clipped, 0.0, 0.01, remedy=stale),
            at_most("|approximate KL|", abs(meters["policy/approx_kl"]), *mean, remedy=stale),
        ]
    if kl in meters:
        remedy = "the reference is not the model that RL begins with: look at its adapters"
        figures.append(
            at_most("KL to the reference", abs(meters[kl]), mean[0] ** 2, 1e-3, remedy=remedy)
        )
    return figures


def _beside(norm: float, own: float) -> Figure:
    """The gradient's norm in the run's own first ones; its batch is another, so it need not fit."""
    times = max(norm, own) / max(min(norm, own), 1e-30)
    said = f"gradient norm, times off the run's own {own:.3g}"
    return at_most(said, times, 10.0, remedy="another scale than at the start: optim/grad_norm")


def _split(patient: Patient, grads: object, norm: float) -> Figure:
    """The same gradient from half of the tokens a micro-batch, or twice where that changes none."""
    name, (buckets, _) = "gradient in another split", patient.step
    tokens = patient.config.rl.tokens_per_microbatch
    for other in (tokens // 2, 2 * tokens):
        parts = patient.cut(max(other, 1))[0]
        if [x.tokens.shape for x in parts] != [x.tokens.shape for x in buckets]:
            break
    else:
        return Figure(name, "no other split", verdict="n/a")
    again = patient.update.accumulate(patient.params, parts).grads
    off = float(optax.tree.norm(jax.tree.map(lambda a, b: a - b, again, grads)))
    model = patient.config.model
    coarse = "bfloat16" in (model.compute_dtype, model.param_dtype)
    bounds = SPLIT_ERROR["bfloat16" if coarse else "float32"]
    said = f"{name} ({len(parts)} micro-batches, not {len(buckets)}), relative"
    remedy = "something is divided by what a micro-batch holds: weights are of the whole batch"
    return at_most(said, off / max(norm, 1e-30), *bounds, remedy=remedy)


def closed_form(patient: Patient, buckets: Sequence[Bucket]) -> tuple[float, float]:
    """The loss at ratio 1 by hand, in float64: Σ_i w_i Σ_t ρ_it ℓ_it − c_H Σ_i u_i Σ_t H_it, and
    the sum of its parts' sizes. ℓ_it is −A_i, or −A_i log p where the surrogate is of log p, or
    −2 A_i / τ of sapo; ρ_it the importance correction. The KL is 0."""
    objective = patient.config.objective
    advantages = np.asarray(buckets[0].advantages, np.float64)
    weights = np.asarray(buckets[0].weights, np.float64)
    slopes = -advantages
    if objective.surrogate == "sapo":
        options = surrogate_options(objective)
        positive, negative = (options[f"tau_{side}"] or 1.0 for side in ("positive", "negative"))
        slopes = slopes * 2 / np.where(advantages > 0, positive, negative)
    sums, entropies = np.zeros(len(weights)), np.zeros(len(weights))
    entropy = jax.jit(lambda params, bucket: _entropy(patient, params, bucket))
    for bucket in buckets:
        mask = np.asarray(bucket.loss_mask)
        own, at = np.asarray(bucket.segment_ids)[mask], np.asarray(bucket.positions)[mask]
        values = np.ones(len(own))
        if objective.surrogate in ("reinforce", "cispo"):
            values = patient.before[own, at].astype(np.float64)
        if objective.importance_correction != "none":
            pair = (patient.before[own, at], patient.rollout.logprobs[own, at])
            ratio = np.asarray(importance_ratio(*map(jax.numpy.asarray, pair)))
            values = values * np.minimum(ratio, objective.correction_threshold)
        np.add.at(sums, own, values)
        if objective.entropy_coefficient:
            found = np.asarray(entropy(patient.params, patient.update.place(bucket)))
            np.add.at(entropies, own, found[mask])
    parts = weights * slopes * sums
    bonus = objective.entropy_coefficient * np.asarray(buckets[0].auxiliary_weights) * entropies
    return float(parts.sum() - bonus.sum()), float(np.abs(parts).sum() + bonus.sum()) or 1.0


def _entropy(patient: Patient, params: object, bucket: Bucket) -> jax.Array:
    return bucket_logprobs(patient.setup.graphdef, params, bucket, make_loss(patient.config))[1]


def weights(patient: Patient) -> Rung:
    """Those of the batch: what they sum to, how they lie, and how many responses count."""
    objective, (buckets, meters) = patient.config.objective, patient.step
    found = np.asarray(buckets[0].weights, np.float64)
    lengths, m = patient.rollout.response_lengths, normalizer(patient.config)
    asks = "does the aggregation weigh as its formula says?"
    if not found.any():
        return Rung("weights", asks, reason="no response carries weight")
    kind = SUM_IS_ONE[objective.aggregation]
    total = {
        "M Σ w": m * found.sum(),
        "Σ w": found.sum(),
        "Σ w L": (found * lengths).sum(),
        "mean w": found[found > 0].mean(),
    }[kind]
    remedy = "weights are normalised over something else than objective.scope says"
    # Filtered responses that stay in the denominators leave less than 1 to the others.
    off = max(total - 1.0, 0.0) if objective.count_masked else abs(total - 1.0)
    bias = abs(meters["aggregation/bias_factor"] / (m * found.sum()) - 1.0)
    figures = [
        at_most(f"|{kind} − 1|", off, 1e-5, 1e-3, remedy=remedy),
        at_most("bias factor against M Σ w, relative", bias, 1e-5, 1e-3, remedy=remedy),
    ]
    if objective.aggregation == "delta_l" and not objective.count_masked:
        figures.append(_shape_of_delta_l(patient, found, lengths, m))
    share = meters["aggregation/ess"] / len(found)
    idle = meters["aggregation/zero_advantage_weight"]
    few = "few responses carry the weight: a lower objective.alpha, or more rl.prompts_per_step"
    dull = "most of the weight moves nothing: rollout.dynamic_sampling=reward"
    figures.append(at_least("effective sample size, of the batch", share, 0.25, remedy=few))
    if not patient.graded[1]:
        figures.append(at_most("weight on advantage 0", idle, 0.8, remedy=dull))
    notes = [f"bias factor {meters['aggregation/bias_factor']:.6g}, M = {m:g}"]
    return Rung("weights", asks, figures, notes)


def _shape_of_delta_l(patient: Patient, found: np.ndarray, lengths: np.ndarray, m: float) -> Figure:
    """The largest relative error of (1/K M) · L^-α / Σ L^-α, by hand in float64."""
    objective, counted = patient.config.objective, found > 0
    scopes = np.zeros(len(found), int)
    if objective.scope == "group":
        scopes = np.asarray(patient.rollout.group_ids)
    occupied = np.unique(scopes[counted])
    powers = np.where(counted, np.maximum(lengths, 1).astype(np.float64) ** -patient.alpha, 0.0)
    totals = np.bincount(scopes, powers, minlength=len(found))
    wanted = powers / np.where(totals > 0, totals, 1.0)[scopes] / m / len(occupied)
    error = np.abs(found[counted] / wanted[counted] - 1.0).max()
    remedy = "the weights are not those of objective.alpha"
    said = f"w ∝ L^-{patient.alpha:g}, relative error"
    return at_most(said, float(error), 1e-5, 1e-3, remedy=remedy)


def learns(patient: Patient) -> Rung:
    """Whether updates on one batch make good responses likelier, against the bad ones."""
    (buckets, _), rollout = patient.step, patient.rollout
    asks = "do a few updates on one batch make its good responses likelier?"
    if patient.config.rl.optimizer.learning_rate == 0:
        return Rung("learns", asks, reason="rl.optimizer.learning_rate is 0")
    state, skipped = patient.fresh_state(), 0
    for _ in range(UPDATES):
        state, report = patient.update(state, buckets)
        skipped += report.skipped is not None
    moved = np.where(rollout.loss_mask, patient.logprobs(state.params) - patient.before, 0.0)
    weights, advantages = np.asarray(buckets[0].weights), np.asarray(buckets[0].advantages)
    pull = (weights * advantages).astype(np.float64)
    scale = float((np.abs(pull) * rollout.response_lengths).sum()) or 1.0
    gain = float((pull * moved.sum(axis=1)).sum()) / scale
    remedy = "updates push the wrong way, or nowhere: the sign of A, or rl.optimizer.epsilon"
    figures = [at_least("Σ w A Δ log p a token", gain, 1e-9, 1e-9, remedy=remedy)]
    figures.append(
        at_most("updates left out", float(skipped), 0.0, 0.0, remedy="deltal debug replay")
    )
    notes = _made_up(patient)
    for name, side in (("A > 0", advantages > 0), ("A < 0", advantages < 0)):
        tokens = rollout.loss_mask[side].sum()
        if tokens:
            notes.append(f"{name}: log p of a token moves by {moved[side].sum() / tokens:+.3g}")
    return Rung("learns", asks, figures, notes)


def _made_up(patient: Patient) -> list[str]:
    said = "its groups are constant: every other response is given a reward instead"
    return [said] if patient.graded[1] else []
