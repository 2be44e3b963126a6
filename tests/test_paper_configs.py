"""The shipped experiments of the paper against its table, typed here by hand.

Sources: arXiv 2509.07558 and its public scripts: 18 experiments, 1-10 on aggregation alone and
11-18 with the whole of DAPO.
"""

import dataclasses
import functools
import re

import pytest

from deltal_jax.config import Config, dump_config, load_config, shipped_configs
from deltal_jax.model.published import PUBLISHED
from deltal_jax.training.describe import batch_arithmetic, formula, memory_estimate
from deltal_jax.training.plan import make_plan

#: name: (aggregation, advantage); GRPO Norm, DAPO Norm, Dr. GRPO Norm, Dr. GRPO, ΔL.
AGGREGATION = {
    "grpo-norm": ("sequence_mean", "group_standardize"),
    "dapo-norm-reference": ("local_token_mean", "group_standardize"),
    "dr-grpo-norm": ("constant_length", "group_standardize"),
    "dr-grpo": ("constant_length", "group_center"),
    "delta-l": ("delta_l", "group_standardize"),
}
#: name: (aggregation, overlong filter, overlong buffer); DAPO alone, filtered, punished, and ΔL.
DAPO = {
    "dapo-reference": ("local_token_mean", "none", None),
    "dapo-overlong-filtering-reference": ("local_token_mean", "at_limit", None),
    "dapo-soft-punishment-reference": ("local_token_mean", "none", 2048),
    "dapo-delta-l": ("delta_l", "none", None),
}
#: The other reading of "token mean": one over all tokens.
GLOBAL = {
    name: name.replace("-reference", "-global") for name in [*AGGREGATION, *DAPO] if "-ref" in name
}
TASKS = ("countdown", "math")
ALPHA = {"countdown": 1.0, "math": 0.75}
PROMPT = {"countdown": 256, "math": 1024}
EIGHTEEN = [f"{task}-{name}" for task in TASKS for part in (AGGREGATION, DAPO) for name in part]
OTHERS = [f"{task}-{name}" for task in TASKS for name in GLOBAL.values()]
TINY = [f"{name}-tiny" for name in EIGHTEEN + OTHERS]
LONGER = [
    f"{task}-{name}-{kind}" for task in TASKS for name in AGGREGATION for kind in ("3072", "7b")
]


shipped = functools.cache(load_config)


def paper(name: str) -> Config:
    return shipped(f"paper/{name}")


def without(config: Config, *sections: str) -> dict:
    """The config as plain data, without its name and these fields."""
    tree = dataclasses.asdict(config)
    for path in ("run.name", *sections):
        *parents, last = path.split(".")
        at = tree
        for parent in parents:
            at = at[parent]
        del at[last]
    return tree


def test_all_eighteen_are_there_with_their_variants_and_nothing_else():
    assert len(EIGHTEEN) == 18 and len(OTHERS) == 8
    shipped = [name.removeprefix("paper/") for name in shipped_configs() if "paper/" in name]
    assert sorted(shipped) == sorted(EIGHTEEN + OTHERS + TINY + LONGER)


@pytest.mark.parametrize("name", EIGHTEEN)
def test_what_all_experiments_have_in_common(name):
    c = paper(name)
    assert c.model.path == "Qwen/Qwen2.5-3B" and not c.data.chat_template and c.sft.steps == 0
    assert c.lora.rank == 0 and c.model.param_dtype == "float32"
    assert (c.rl.prompts_per_step, c.rl.updates_per_rollout, c.rl.epochs_per_rollout) == (128, 4, 1)
    adam = c.rl.optimizer
    assert (adam.learning_rate, adam.weight_decay, adam.clip_norm) == (1e-6, 0.01, 1.0)
    assert (adam.schedule, adam.warmup_steps) == ("constant", 0)
    assert (adam.b1, adam.b2, adam.epsilon) == (0.9, 0.999, 1e-8)
    o, rollout = c.objective, c.rollout
    assert (o.surrogate, o.clip_low, o.clip_high) == ("clipped", 0.2, 0.3)
    assert (o.kl_coefficient, o.entropy_coefficient) == (0, 0)
    assert (o.scope, o.count_masked, o.old_logprobs) == ("batch", True, "recompute")
    assert o.normalizer is None  # so M is the length limit
    assert (rollout.temperature, rollout.filtered, rollout.ahead) == (1.0, False, 0)
    assert (c.evaluate.samples_per_problem, c.evaluate.temperature) == (8, 1.0)
    task = name.partition("-")[0]
    assert c.task.name == task and rollout.max_prompt_length == PROMPT[task]
    assert c.task.rewards is None and c.task.overlong_factor == 1.0
    if task == "math":
        assert (c.task.math.verifier, c.task.math.template) == ("reference", "user_assistant")
        return
    given = c.task.countdown
    assert (given.form, given.grammar) == ("text", "reference")
    assert (given.rows, c.evaluate.problems) == ((32_768, 1_024), 1_024)
    assert (given.numbers, given.most_numbers, given.max_number) == (3, 4, 100)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", AGGREGATION)
def test_aggregation_alone(task, name):
    c = paper(f"{task}-{name}")
    o, rollout = c.objective, c.rollout
    assert (o.aggregation, o.advantage) == AGGREGATION[name]
    if name == "delta-l":
        assert o.alpha == ALPHA[task]
    if name == "dapo-norm-reference":
        assert o.microbatch_size == 4
    assert c.rl.samples_per_prompt == 10 and rollout.max_response_length == 8192
    assert o.dual_clip == 3 and o.overlong_filter == "none" and c.task.overlong_buffer is None
    assert (rollout.dynamic_sampling, rollout.oversampling) == ("none", 1)
    assert c.evaluate.every == 50
    # 15 epochs of 32,768 / 128 = 256 steps, or of 57,000 / 128 = 445 whole ones.
    assert c.rl.steps == {"countdown": 3_840, "math": 6_675}[task]
    counts = batch_arithmetic(c)
    assert counts["responses_per_step"] == 1_280 and counts["responses_per_minibatch"] == 320
    assert counts["minibatches_per_step"] == counts["updates_per_step"] == 4
    assert counts["rl_updates"] == 4 * c.rl.steps
    assert counts["max_response_tokens_per_step"] == 1_280 * 8_192


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", DAPO)
def test_with_the_whole_of_dapo(task, name):
    c = paper(f"{task}-{name}")
    o, rollout = c.objective, c.rollout
    assert (o.aggregation, o.overlong_filter, c.task.overlong_buffer) == DAPO[name]
    if name == "dapo-delta-l":
        assert o.alpha == ALPHA[task]
    else:
        assert o.microbatch_size == 4
    assert o.advantage == "group_standardize" and o.dual_clip == 10
    assert c.rl.samples_per_prompt == 8 and rollout.max_response_length == 3072
    assert rollout.dynamic_sampling == {"countdown": "accuracy", "math": "reward"}[task]
    assert (rollout.oversampling, rollout.max_rounds, rollout.fill_up) == (3, 10, False)
    assert not rollout.partial
    assert c.evaluate.every == {"countdown": 25, "math": 50}[task]
    # 15 epochs of 32,768 / 384 = 85 whole steps, or of 57,000 / 384 = 148.
    assert c.rl.steps == {"countdown": 1_275, "math": 2_220}[task]
    counts = batch_arithmetic(c)
    assert counts["responses_per_step"] == 1_024 and counts["responses_per_minibatch"] == 256
    assert counts["minibatches_per_step"] == counts["updates_per_step"] == 4
    assert counts["max_prompts_begun_per_step"] == 384 * 10
    assert counts["max_response_tokens_per_step"] == 1_024 * 3_072


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", GLOBAL)
def test_the_other_reading_differs_in_the_aggregation_alone(task, name):
    one, other = paper(f"{task}-{name}"), paper(f"{task}-{GLOBAL[name]}")
    assert other.objective.aggregation == "token_mean"
    assert without(one, "objective.aggregation") == without(other, "objective.aggregation")
    assert "w_i  = 1 / Σ_(j in batch) L_j\n" in formula(other)
    assert "w_i  = 1 / (K · Σ_(j in micro-batch of 4) L_j), K micro-batches\n" in formula(one)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", AGGREGATION)
def test_variants_differ_in_one_field(task, name):
    one = paper(f"{task}-{name}")
    shorter, larger = paper(f"{task}-{name}-3072"), paper(f"{task}-{name}-7b")
    assert shorter.rollout.max_response_length == 3072
    limit = "rollout.max_response_length"
    assert without(one, limit) == without(shorter, limit)
    assert larger.model.path == "Qwen/Qwen2.5-7B"
    assert without(one, "model.path") == without(larger, "model.path")


@pytest.mark.parametrize("name", EIGHTEEN + OTHERS)
def test_a_tiny_profile_is_the_same_method_in_small(name):
    """Whatever decides which code runs is as in the experiment."""
    one, tiny = paper(name), paper(f"{name}-tiny")
    assert one.objective == tiny.objective
    assert (one.task.name, one.data) == (tiny.task.name, tiny.data)
    for field in ("updates_per_rollout", "epochs_per_rollout", "samples_per_prompt"):
        assert getattr(one.rl, field) == getattr(tiny.rl, field)
    for field in ("dynamic_sampling", "oversampling", "max_rounds", "temperature", "ahead"):
        assert getattr(one.rollout, field) == getattr(tiny.rollout, field)
    ratios = [(c.task.overlong_buffer or 0) / c.rollout.max_response_length for c in (one, tiny)]
    assert ratios[0] == ratios[1]
    assert one.evaluate.samples_per_problem == tiny.evaluate.samples_per_problem
    assert tiny.model.path is None and tiny.rl.steps <= 10
    if one.task.name == "math":
        assert one.task.math.verifier == tiny.task.math.verifier
        assert one.task.math.template == tiny.task.math.template
    else:
        assert tiny.task.countdown.form == "text" and tiny.task.countdown.train is None
        assert one.task.countdown.grammar == tiny.task.countdown.grammar


@pytest.mark.parametrize("name", EIGHTEEN)
def test_the_effective_formula_is_the_papers(name):
    c = paper(name)
    said, M = formula(c), c.rollout.max_response_length
    weights = {
        "sequence_mean": "1 / (B_batch · L_i)",
        "local_token_mean": "1 / (K · Σ_(j in micro-batch of 4) L_j), K micro-batches",
        "constant_length": f"(1/{M}) / B_batch",
        "delta_l": f"(1/{M}) · L_i^-{c.objective.alpha:g} / Σ_(j in batch) "
        f"L_j^-{c.objective.alpha:g}",
    }
    assert f"\nw_i  = {weights[c.objective.aggregation]}\n" in said
    assert said.startswith("loss of each mini-batch = 4 · Σ_(i in mini-batch) (w_i Σ_t ℓ_it) ")
    dual = 3 if M == 8192 else 10
    assert f"clip(r, 0.8, 1.3)), at most -A·{dual} where A < 0, r = π/π_old, π_old from" in said
    assert said.count("stays in the denominators") == 1
    punished = "\nr_i  = reward + min(-(length_i - 1024) / 2048 · 1, 0)\n"
    assert (punished in said) == ("soft-punishment" in name)
    filtered = "or a response of 3072 tokens, ended or not, has the weight 0"
    assert (filtered in said) == ("overlong-filtering" in name)


def test_a_header_has_the_planned_memory_and_the_steps_of_its_config():
    for name in EIGHTEEN + OTHERS + LONGER:
        path = shipped_configs()[f"paper/{name}"]
        header = path.read_text(encoding="utf-8").partition("\nbase:")[0]
        if name not in LONGER:
            assert f" {paper(name).rl.steps:,} steps: " in header
        assert re.search(r"planned memory \d+ GiB", header), name


@pytest.mark.parametrize("name", ["countdown-delta-l", "math-dapo-soft-punishment-reference"])
def test_planned_memory_is_what_a_dry_run_says(name):
    plan = make_plan(paper(name))
    total = memory_estimate(plan.config, plan.architecture)["total"]
    header = shipped_configs()[f"paper/{name}"].read_text(encoding="utf-8")
    assert f"planned memory {total / 2**30:.0f} GiB" in header


def test_every_model_that_is_named_has_a_known_shape():
    named = {shipped(name).model.path for name in shipped_configs()} - {None}
    assert named <= PUBLISHED.keys()


def test_a_dump_has_every_field_of_every_base(tmp_path):
    config = paper("math-dapo-soft-punishment-reference-tiny")
    (tmp_path / "one.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(tmp_path / "one.yaml") == config


@pytest.mark.parametrize(
    "name", ["countdown-delta-l", "countdown-dapo-soft-punishment-reference", "math-dapo-delta-l"]
)
def test_a_tiny_profile_finds_all_that_it_needs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = make_plan(paper(f"{name}-tiny"))
    assert plan.notes == [] and plan.task is not None
    assert plan.task.name == name.partition("-")[0]
