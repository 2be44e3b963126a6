"""A config in words and numbers, before anything runs: formula, batch arithmetic, memory."""

import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from deltal_jax.config import Advantage, Aggregation, Config, Correction, OptimizerConfig
from deltal_jax.model.architecture import Architecture
from deltal_jax.model.attention import WHOLE_ROW
from deltal_jax.model.lora import overlay, trained
from deltal_jax.model.transformer import abstract_params, parameter_count
from deltal_jax.parallel.mesh import describe_mesh
from deltal_jax.parallel.sharding import parameter_shardings, row_shards, slot_shards
from deltal_jax.rollout.checks import sampling_memory
from deltal_jax.rollout.slots import SamplingOptions
from deltal_jax.tasks.base import Task
from deltal_jax.training.activations import FLOAT_BYTES, activation_bytes, offloaded_bytes
from deltal_jax.training.buckets import bucket_rows
from deltal_jax.training.meters import CLASSES
from deltal_jax.training.objective import first_exponent, normalizer, surrogate_options

BYTES = {"float32": 4, "bfloat16": 2}


def formula(config: Config) -> str:
    """The effective loss: method, scope, divisor, and what counts."""
    o, rl = config.objective, config.rl
    corrected = "" if o.importance_correction == "none" else "ρ_it "
    terms = f"w_i Σ_t {corrected}ℓ_it{_auxiliary_terms(config)}"
    loss = f"loss = Σ_i ({terms})"
    if rl.updates_per_rollout > 1:
        factor = "" if o.scope == "minibatch" else f"{rl.updates_per_rollout} · "
        loss = f"loss of each mini-batch = {factor}Σ_(i in mini-batch) ({terms})"
    lines = [
        f"{loss}      {o.aggregation}, {_normalised(config)}",
        f"w_i  = {_weight(config, o.aggregation)}",
        f"ℓ_it = {_token_loss(config)}",
        f"A_i  = {ADVANTAGES[o.advantage]}",
    ]
    if config.task.overlong_buffer is not None:
        limit, buffer = config.rollout.max_response_length, config.task.overlong_buffer
        punished = (
            f"min(-(length_i - {limit - buffer}) / {buffer} · {config.task.overlong_factor:g}, 0)"
        )
        lines.append(f"r_i  = reward + {punished}")
    if corrected:
        lines.append(
            f"ρ_it = {CORRECTIONS[o.importance_correction]}, ρ = π_old / π_sampler, "
            f"C = {o.correction_threshold:g}"
        )
    if isinstance(o.alpha, str):
        lines.append(f"α    = {_exponent(config)}")
    methods = {o.aggregation}
    if o.kl_coefficient or o.entropy_coefficient:
        methods.add(o.auxiliary_aggregation)
        lines.append(f"u_i  = {_weight(config, o.auxiliary_aggregation)}")
    if rl.updates_per_rollout * rl.epochs_per_rollout > 1:
        lines.append(
            f"{rl.updates_per_rollout} mini-batches × {rl.epochs_per_rollout} epochs = "
            f"{rl.updates_per_rollout * rl.epochs_per_rollout} updates a rollout"
        )
    trained = "sampled tokens" if "mask" not in o.importance_correction else "tokens not rejected"
    lines.append(f"L_i counts {trained}, EOS included; a missing reward {_filtering(config)}")
    temperature = config.rollout.temperature
    if temperature != 1.0:
        lines.append(f"π is the softmax at temperature {temperature:g}, as it is sampled from")
    if "local_token_mean" in methods:
        lines.append(
            f"warning: local_token_mean follows how responses fall into micro-batches of "
            f"{o.microbatch_size}; it is for reproduction only"
        )
    return "\n".join(lines)


#: Each advantage estimator in symbols.
ADVANTAGES: dict[Advantage, str] = {
    "group_standardize": "(r_i - mean_group) / (std_group + 1e-6), n-1 standard deviation",
    "group_center": "r_i - mean_group",
    "leave_one_out": "r_i - mean of the others in the group",
    "batch_standardize": "(r_i - mean_batch) / (std_batch + 1e-6), n-1 standard deviation",
    "length_weighted_baseline": "r_i - Σ_(j in group) L_j r_j / Σ_(j in group) L_j",
    "max_rl": "(r_i - mean_group) / mean_group, 0 where the mean is not positive",
}
#: Each importance correction in symbols.
CORRECTIONS: dict[Correction, str] = {
    "none": "1",
    "token_truncate": "min(ρ, C)",
    "token_mask": "ρ where 1/C ≤ ρ ≤ C, other tokens are not trained",
    "sequence_mask": "ρ where 1/C ≤ geometric mean ≤ C, other responses are not trained",
}


def _normalised(config: Config) -> str:
    """Over what the weights are normalised, in words."""
    own = {
        "prompt_mean": "normalised over each prompt's group, averaged over them",
        "local_token_mean": "normalised over each micro-batch, averaged over them",
        "balanced": "normalised over each sign of the advantage",
        "token_sum": "not normalised",
    }
    scopes = {
        "batch": "normalised over the rollout batch",
        "minibatch": "normalised over each mini-batch",
        "group": "normalised over each prompt's group, averaged over them",
    }
    return own.get(config.objective.aggregation, scopes[config.objective.scope])


def _scope(config: Config) -> tuple[str, str, str]:
    """The members of the scope, their number, and the factor of the mean over scopes."""
    return {
        "batch": ("j in batch", "B_batch", ""),
        "minibatch": ("j in mini-batch", "B_minibatch", ""),
        "group": ("j in group", "B_group", "(1/K) · "),
    }[config.objective.scope]


def _weight(config: Config, aggregation: Aggregation) -> str:
    o = config.objective
    among, number, averaged = _scope(config)
    inverse_m = f"(1/{normalizer(config):g})"
    groups = ", K groups that have anything to train"
    alpha = "α" if isinstance(o.alpha, str) else f"{o.alpha:g}"
    weight = {
        "delta_l": f"{inverse_m} · L_i^-{alpha} / Σ_({among}) L_j^-{alpha}",
        "constant_length": f"{inverse_m} / {number}",
        "sequence_mean": f"1 / ({number} · L_i)",
        "token_mean": f"1 / Σ_({among}) L_j",
        "prompt_mean": f"1 / (K · Σ_(j in group) L_j){groups}",
        "token_sum": "1",
        "sequence_sum": f"1 / {number}",
        "local_token_mean": f"1 / (K · Σ_(j in micro-batch of {o.microbatch_size}) L_j), "
        "K micro-batches",
        "balanced": "(n_s / (n_+ + n_-)) / Σ_(j of sign s) L_j, s = sign(A_i); 0 where A_i = 0",
        "inverse_variance": f"{inverse_m} · v(L_i)^-1 / Σ_({among}) v(L_j)^-1, "
        f"v(L) = L + 2 Σ_h max(L - h, 0) ρ_h, ρ = {list(o.rho or ())}",
    }[aggregation]
    return f"{averaged}{weight}{groups if averaged else ''}"


def _exponent(config: Config) -> str:
    """What an exponent that is no number is, in words."""
    adaptive = config.objective.adaptive
    low, high = (f"{x:g}" for x in adaptive.range)
    what = {
        "beta": "follows β̂, with Var(g_i) ∝ L_i^β̂ in the steps before",
        "mse": "maximises uᵀX / √(uᵀNu) - 0.1 (α - 1)², u_j = L_j^-α, of the steps before "
        "(experimental)",
    }[str(config.objective.alpha)]
    return (
        f"{first_exponent(config):g} for {adaptive.start} steps; from then on it {what}: anew "
        f"every {adaptive.every} steps, in {low} … {high}"
    )


def _token_loss(config: Config) -> str:
    o = config.objective
    set_ = {k: f"{v:g}" for k, v in surrogate_options(o).items() if v is not None}
    low, high = (float(set_.get(k, 0)) for k in ("clip_low", "clip_high"))
    dual = f", at most -A·{set_['dual_clip']} where A < 0" if "dual_clip" in set_ else ""
    ratio = f"π_old from the {'sampler' if o.old_logprobs == 'sampler' else 'trainer'}"
    clip = f"clip(s, {1 - low:g}, {1 + high:g})"
    return {
        "reinforce": "-A · log π",
        "clipped": f"max(-A·r, -A·clip(r, {1 - low:g}, {1 + high:g})){dual}, r = π/π_old, {ratio}",
        "gspo": f"max(-A·s, -A·{clip}), s = exp(mean_t log π/π_old), {ratio}",
        "gspo_token": f"max(-A·s, -A·{clip}), s = sg(exp(mean_t log π/π_old)) · π/sg(π), {ratio}",
        "cispo": f"-sg(clip(r, {1 - low:g}, {1 + high:g})) · A · log π, r = π/π_old, {ratio}",
        "gmpo": f"-A · exp(mean_t c), c = log π/π_old, at most {high:g} where A > 0, at least "
        f"{-low:g} where A < 0, {ratio}",
        "sapo": f"-A · (4/τ) σ(τ(r - 1)), τ = {set_.get('tau_positive')} where A > 0, else "
        f"{set_.get('tau_negative')}, r = π/π_old, {ratio}",
        "dppo": f"-A·r, 0 where |π - π_old| > {set_.get('threshold')} and r moves on, r = π/π_old, "
        f"{ratio}",
    }[o.surrogate]


def _auxiliary_terms(config: Config) -> str:
    o = config.objective
    kl, entropy = o.kl_coefficient, o.entropy_coefficient
    parts = [f"{kl:g} · {o.kl_estimator}_it"] if kl else []
    parts += [f"- {entropy:g} · H_it"] if entropy else []
    return f" + u_i Σ_t ({' '.join(parts)})" if parts else ""


def _filtering(config: Config) -> str:
    """What becomes of responses that are not trained."""
    o = config.objective
    who = {
        "none": "",
        "truncated": "or a truncated response",
        "at_limit": f"or a response of {config.rollout.max_response_length} tokens, ended or not,",
    }[o.overlong_filter]
    where = "stays in the denominators" if o.count_masked else "leaves the denominators too"
    return f"{who} has the weight 0 and {where}".strip()


def batch_arithmetic(config: Config) -> dict[str, int]:
    """Counts of one RL step and of the whole run; token counts are upper bounds."""
    rl = config.rl
    responses = rl.prompts_per_step * rl.samples_per_prompt
    updates = rl.updates_per_rollout * rl.epochs_per_rollout
    tokens = responses * config.rollout.max_response_length
    return {
        "prompts_per_step": rl.prompts_per_step,
        "responses_per_step": responses,
        "max_prompts_begun_per_step": _most_prompts(config),
        "minibatches_per_step": rl.updates_per_rollout,
        "responses_per_minibatch": responses // rl.updates_per_rollout,
        "updates_per_step": updates,
        "max_response_tokens_per_step": tokens,
        "sft_updates": config.sft.steps,
        "rl_steps": rl.steps,
        "rl_updates": rl.updates,
        "prompts": rl.prompts_per_step * rl.steps,
        "responses": responses * rl.steps,
        "max_response_tokens": tokens * rl.steps,
    }


def _most_prompts(config: Config) -> int:
    """How many prompts a step begins at most: dynamic sampling begins some in each round."""
    rollout = config.rollout
    rounds = 1 if rollout.dynamic_sampling == "none" else rollout.max_rounds
    return rounds * math.ceil(config.rl.prompts_per_step * rollout.oversampling)


def describe_task(task: Task) -> str:
    """What a task, or each part of a mixture, found in its files; empty where it has none."""
    parts = getattr(task, "parts", {task.name: task}).values()
    return "\n".join(part.summary for part in parts if getattr(part, "summary", ""))


def describe_model(
    config: Config, arch: Architecture, mesh: Mesh | AbstractMesh | None = None
) -> str:
    """Parameters, the types that they, the activations and the moments have, and the devices."""
    model, total, own = config.model, parameter_count(arch), _trained_count(arch)
    if config.lora.rank:
        kinds = f"adapters of rank {config.lora.rank} in {model.param_dtype}, the rest bfloat16"
    else:
        kinds = f"stored in {model.param_dtype}"
    moments = config.rl.optimizer.moment_dtype
    if config.rl.optimizer.offload:
        moments = f"{moments} in the host's memory"
    said = f"{model.path or 'new model'}: {total:,} parameters, {own:,} trained"
    said = f"{said}; {kinds}, computed in {model.compute_dtype}, moments in {moments}\n"
    if mesh is not None:
        said = f"{said}mesh: {describe_mesh(mesh)}\n"
    if config.rollout.engine == "http":
        return f"{said}sampling: by {config.rollout.server.url}"
    memory = sampling_parts(config, arch, mesh)
    rollout = config.rollout
    time = rollout.max_prompt_length + rollout.max_response_length
    return (
        f"{said}sampling: {rollout.slots} slots of up to {time} tokens, "
        f"cache {_mebibytes(memory['kv_cache'])}, all {_mebibytes(sum(memory.values()))}"
        + (" a device" if mesh is not None else "")
    )


def describe_sampling(config: Config) -> str:
    """What of a rollout is not the default, in one line; empty where all is."""
    rollout, rl = config.rollout, config.rl
    parts = []
    if rollout.dynamic_sampling != "none":
        after = "filled up" if rollout.fill_up else "the run stops"
        parts.append(
            f"{rl.prompts_per_step} groups whose {rollout.dynamic_sampling} varies, in at most "
            f"{rollout.max_rounds} rounds, then {after}"
        )
    if rollout.oversampling > 1:
        parts.append(f"{rollout.oversampling:g} prompts begun for each group needed")
    if rollout.partial:
        parts.append("what was begun beyond them is carried over")
    if rollout.ahead:
        parts.append("one step ahead of the update")
    if rollout.devices is not None:
        parts.append(f"on {rollout.devices} devices of their own")
    return f"rollouts: {'; '.join(parts)}" if parts else ""


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _trained_count(arch: Architecture) -> int:
    return sum(x.size for x in jax.tree.leaves(trained(abstract_params(arch))))


def _held(arch: Architecture, mesh: Mesh | AbstractMesh | None) -> tuple[int, int]:
    """Numbers that each device holds: of the trained parameters, and of the others."""
    every = abstract_params(arch)
    if mesh is not None:
        shardings = parameter_shardings(mesh, every)
        every = jax.tree.map(
            lambda x, of: jax.ShapeDtypeStruct(of.shard_shape(x.shape), x.dtype), every, shardings
        )
    own, all_ = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (trained(every), every))
    return own, all_ - own


def memory_estimate(
    config: Config, arch: Architecture, mesh: Mesh | AbstractMesh | None = None
) -> dict[str, int]:
    """Bytes that a step needs on each of its devices, by part; an estimate from shapes and types.
    "of_host": what lies in the host's memory for each device, where anything is offloaded."""
    model, (own, frozen) = config.model, _held(arch, mesh)
    narrow, stored = BYTES["bfloat16"], BYTES[model.param_dtype]
    buckets = _largest_buckets(config, mesh)
    tokens = 1 if mesh is None else mesh.shape["context"]
    activations = max(activation_bytes(arch, *bucket) for bucket in buckets) // tokens
    optimizer, gradients = config.rl.optimizer, _gradients(config) * own * FLOAT_BYTES
    moments = _moments(optimizer) * own * BYTES[optimizer.moment_dtype]
    host = max(offloaded_bytes(arch, *bucket) for bucket in buckets) // tokens
    if optimizer.offload:
        host += moments
        # On the devices while the step is taken, when nothing but the sum of gradients is there.
        moments = max(0, moments - activations - (gradients - own * FLOAT_BYTES))
    copied = config.rollout.ahead and config.rollout.devices is None
    parts = {
        "parameters": own * stored + frozen * narrow,
        "optimizer": moments,
        "gradients": gradients,
        "reference": own * stored if config.objective.kl_coefficient else 0,
        "activations": activations,
        "sampling_copy": copied * (own * stored + frozen * narrow),
    }
    if config.rollout.engine == "jax":
        parts |= sampling_parts(config, arch, mesh)
    total = {"total": sum(parts.values())}
    return parts | total | ({"of_host": host} if host else {})


def _largest_buckets(config: Config, mesh: Mesh | AbstractMesh | None) -> list[tuple[int, int]]:
    """Rows and width, on one device, of the micro-batches that may take the most memory: scores are
    whole up to a length, and the longest may be of more tokens than the budget."""
    parts = (1 if mesh is None else row_shards(mesh)) * (2 if config.halves else 1)
    edges, budget = config.bucket_edges, config.rl.tokens_per_microbatch
    widest = max((edge for edge in edges if edge <= WHOLE_ROW), default=edges[-1])
    return [(bucket_rows(x, budget, parts) // parts, x) for x in {widest, edges[-1]}]


def _moments(optimizer: OptimizerConfig) -> int:
    """Numbers that the optimizer keeps of each that is trained."""
    return 2 if optimizer.rule == "adamw" else 0


def _gradients(config: Config) -> int:
    """How many gradients are held at once: a sum and what is added to it, and those that are
    compared with it."""
    held = 2 + config.halves
    if config.objective.alpha == "mse":  # of the classes before the last, and the running mean
        return held + CLASSES
    return held + (config.meters.every > 0)


def sampling_parts(
    config: Config, arch: Architecture, mesh: Mesh | AbstractMesh | None = None
) -> dict[str, int]:
    """What sampling takes on a device by `rollout.checks.sampling_memory`, in bytes; on those of
    the mesh that trains, unless others sample."""
    rollout, rl = config.rollout, config.rl
    options = SamplingOptions(rollout.slots, rollout.max_response_length, eos_ids=())
    shards, tensor = rollout.devices or 1, 1
    if mesh is not None and rollout.devices is None:
        shards, tensor = slot_shards(mesh), mesh.shape["tensor"]
    return sampling_memory(
        options,
        arch,
        stored_params(config, arch),
        (math.ceil(rl.prompts_per_step * rollout.oversampling), rollout.max_prompt_length),
        rl.samples_per_prompt,
        carried=rollout.partial,
        shards=shards,
        tensor=tensor,
    )


def stored_params(config: Config, arch: Architecture) -> Any:
    """Shapes and types of all parameters of a run, without allocating them."""
    every = abstract_params(arch)
    dtype = "bfloat16" if config.lora.rank else config.model.param_dtype
    held, own = (
        jax.tree.map(lambda x, dtype=dtype: jax.ShapeDtypeStruct(x.shape, dtype), tree)
        for tree, dtype in ((every, dtype), (trained(every), config.model.param_dtype))
    )
    return overlay(held, own)
