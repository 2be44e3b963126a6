"""The whole objective against golden losses of the paper's reference implementation.

`data/reference_losses.json` holds seeded inputs and what the public PyTorch code of arXiv
2509.07558 made of them in float64: for each optimizer mini-batch the loss and its meters, the
weighted advantages, and the gradient by every token's log-probability. Its rounding: every token
mean there divides by the count + 1e-8.
"""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltal_jax.objective.advantages import group_center, group_standardize
from deltal_jax.objective.aggregation import (
    constant_length,
    delta_l,
    policy_gradient_loss,
    sequence_mean,
    token_mean,
)
from deltal_jax.objective.surrogate import clipped, ratio_diagnostics

CASES = json.loads(
    (pathlib.Path(__file__).parent / "data" / "reference_losses.json").read_text(encoding="utf-8")
)["cases"]
#: (advantage, aggregation, whether weights are normalised inside each mini-batch) of a method.
METHODS = {
    "grpo": (group_standardize, sequence_mean, False),
    "dapo": (group_standardize, token_mean, True),
    "dr_grpo_norm": (group_standardize, constant_length, False),
    "dr_grpo": (group_center, constant_length, False),
    "delta_l": (group_standardize, delta_l, False),
}


def name(case: dict) -> str:
    alpha = "" if case["alpha"] is None else f"-{case['alpha']}"
    return f"{case['method']}{alpha}-seed{case['seed']}"


@functools.cache
def token_gradient(clip_low: float, clip_high: float, dual_clip: float):
    """Loss of one mini-batch with its gradient by the log-probabilities, and the meters."""
    clips = {"clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip}

    def loss(logprobs, old, advantages, weights, ids, mask):
        losses = clipped(logprobs, old, advantages, **clips)
        meters = ratio_diagnostics(logprobs, old, advantages, **clips)
        return policy_gradient_loss(losses, weights, ids, mask)[0], meters

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@functools.cache
def advantages_and_weights(method: str):
    advantage, aggregation, by_minibatch = METHODS[method]

    def both(lengths, rewards, groups, minibatches, kept, alpha, longest):
        options = {}
        if aggregation is delta_l:
            options["alpha"] = alpha
        if aggregation in (delta_l, constant_length):
            options["normalizer"] = longest
        if by_minibatch:
            options["scope_ids"] = minibatches
        weights = aggregation(lengths, where=kept, count_masked=True, **options)
        return jnp.where(kept, advantage(rewards, groups), 0.0), weights

    return jax.jit(both, static_argnames=("alpha", "longest"))


#: Every case is padded to these, with responses of no tokens and masked tokens that are NaN, so
#: that one program serves all: padding changes nothing.
RESPONSES = max(len(case["lengths"]) for case in CASES) + 1
TOKENS = max(sum(case["lengths"]) for case in CASES) + 1


def padded(values, size: int, fill: float) -> np.ndarray:
    values = np.asarray(values)
    return np.concatenate([values, np.full(size - len(values), fill, values.dtype)])


@pytest.mark.parametrize("x64", [True, False], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES, ids=name)
def test_loss_gradient_and_meters_are_those_of_the_reference(case, x64):
    tolerance = 1e-8 if x64 else 1e-4
    expected, B, M = case["expected"], len(case["lengths"]), float(case["max_response_length"])
    T, real = sum(case["lengths"]), np.s_[: sum(case["lengths"])]
    minibatches = np.arange(B) // (B // case["num_minibatches"])
    ids = padded(np.repeat(np.arange(B), case["lengths"]), TOKENS, RESPONSES)
    with jax.enable_x64(x64):
        lengths = padded(case["lengths"], RESPONSES, 0)
        advantages, weights = advantages_and_weights(case["method"])(
            jnp.asarray(lengths),
            jnp.asarray(padded(case["rewards"], RESPONSES, np.nan), float),
            jnp.asarray(padded(case["prompt_index"], RESPONSES, RESPONSES - 1)),
            jnp.asarray(padded(minibatches, RESPONSES, 0)),
            jnp.asarray(lengths < M if case["overlong_filter"] else lengths >= 0),
            alpha=case["alpha"],
            longest=M,
        )
        weighted = np.asarray(advantages)[:B]
        if case["method"] == "delta_l":
            weighted = weighted * np.asarray(weights)[:B] * B * M
        np.testing.assert_allclose(weighted, expected["weighted_advantages"], rtol=tolerance)

        step = token_gradient(case["clip_low"], case["clip_high"], case["dual_clip"])
        logprobs, old = (
            jnp.asarray(padded(case[k], TOKENS, np.nan), float)
            for k in ("logprobs", "old_logprobs")
        )
        of_token = np.append(np.asarray(advantages), 0.0)[ids]
        gradient = np.zeros(T)
        for number, reference in enumerate(expected["minibatches"]):
            inside = minibatches == number
            mask = np.append(inside, np.zeros(RESPONSES + 1 - B, bool))[ids]
            (loss, meters), slope = step(
                logprobs,
                old,
                jnp.asarray(of_token, float),
                weights * (B / inside.sum()),
                jnp.asarray(ids),
                jnp.asarray(mask),
            )
            gradient[mask[real]] = np.asarray(slope)[mask]
            assert float(loss) == pytest.approx(reference["loss"], rel=tolerance)
            means = {k: np.asarray(v, np.float64)[mask].mean() for k, v in meters.items()}
            clipped_share = means["clip_frac_high"] + means["clip_frac_low"]
            assert clipped_share == pytest.approx(reference["clip_fraction"], rel=1e-8)
            dual_share = means["clip_frac_dual"]
            assert dual_share == pytest.approx(reference["dual_clip_fraction"], rel=1e-8)
            if np.abs(np.subtract(case["logprobs"], case["old_logprobs"])).max() < 20:
                assert means["approx_kl"] == pytest.approx(reference["approx_kl"], rel=tolerance)
    np.testing.assert_allclose(gradient, expected["dloss_dlogprobs"], rtol=tolerance)


def test_the_cases_cover_every_method_and_branch():
    assert len(CASES) == 42
    assert {case["method"] for case in CASES} == METHODS.keys()
    assert {case["alpha"] for case in CASES} == {None, 0.5, 0.75, 1.0}
    assert {case["num_minibatches"] for case in CASES} == {1, 4}
    assert any(case["overlong_filter"] for case in CASES)
    reached = [m for case in CASES for m in case["expected"]["minibatches"]]
    assert any(m["clip_fraction"] > 0 for m in reached)
    assert any(m["dual_clip_fraction"] > 0 for m in reached)
    taken = {"high": 0, "low": 0, "dual": 0, "ratio cut at e^20": 0, "inside": 0}
    for case in CASES:
        ratio = np.exp(np.subtract(case["logprobs"], case["old_logprobs"]))
        signs = np.repeat(np.sign(case["expected"]["weighted_advantages"]), case["lengths"])
        low, high = 1 - case["clip_low"], 1 + case["clip_high"]
        above, below = (signs > 0) & (ratio > high), (signs < 0) & (ratio < low)
        dual = (signs < 0) & (ratio > (case["dual_clip"] or np.inf))
        taken["high"] += above.sum()
        taken["low"] += below.sum()
        taken["dual"] += dual.sum()
        taken["ratio cut at e^20"] += (np.abs(np.log(ratio)) > 20).sum()
        taken["inside"] += ((signs != 0) & ~above & ~below & ~dual).sum()
    assert all(count > 0 for count in taken.values()), taken
    constant = [0.0] * 4
    assert any(case["expected"]["weighted_advantages"][:4] == constant for case in CASES)
