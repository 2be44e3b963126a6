"""A config in words and numbers, before anything runs: formula, batch arithmetic, memory."""

from deltal_jax.config import Config
from deltal_jax.model.cache import cache_bytes
from deltal_jax.model.transformer import Architecture, parameter_count
from deltal_jax.training.buckets import bucket_rows
from deltal_jax.training.collect import normalizer

FLOAT_BYTES = 4


def formula(config: Config) -> str:
    """The effective loss: method, scope, divisor, and what counts."""
    o, rl = config.objective, config.rl
    scope, among = {
        "batch": ("the rollout batch", "j in batch"),
        "minibatch": ("each mini-batch, averaged over them", "j in mini-batch"),
        "group": ("each prompt's group, averaged over them", "j in group"),
    }[o.scope]
    inverse_m = f"(1/{normalizer(config):g})"
    number = f"B_{o.scope}"
    weight = {
        "delta_l": f"{inverse_m} · L_i^-{o.alpha:g} / Σ_({among}) L_j^-{o.alpha:g}",
        "constant_length": f"{inverse_m} / {number}",
        "sequence_mean": f"1 / ({number} · L_i)",
        "token_mean": f"1 / Σ_({among}) L_j",
    }[o.aggregation]
    dual = f", dual clip {o.dual_clip:g}" if o.dual_clip is not None else ""
    token = {
        "clipped": f"max(-A·r, -A·clip(r, {1 - o.clip_low:g}, {1 + o.clip_high:g})){dual}, "
        f"r = π/π_old, π_old from the {'sampler' if o.old_logprobs == 'sampler' else 'trainer'}",
        "reinforce": "-A · log π",
    }[o.surrogate]
    advantage = {
        "group_standardize": "(r_i - mean_group) / (std_group + 1e-6), n-1 standard deviation",
        "group_center": "r_i - mean_group",
    }[o.advantage]
    factor = f"{rl.updates_per_rollout} · " if rl.updates_per_rollout > 1 else ""
    return "\n".join(
        (
            f"loss = {factor}Σ_i w_i Σ_t ℓ_it      {o.aggregation}, normalised over {scope}",
            f"w_i  = {weight}",
            f"ℓ_it = {token}",
            f"A_i  = {advantage}",
            "L_i counts sampled tokens, EOS included; a missing reward leaves numerator and "
            "denominator",
        )
    )


def batch_arithmetic(config: Config) -> dict[str, int]:
    """Counts of one RL step and of the whole run; token counts are upper bounds."""
    rl = config.rl
    responses = rl.prompts_per_step * rl.samples_per_prompt
    updates = rl.updates_per_rollout * rl.epochs_per_rollout
    tokens = responses * config.rollout.max_response_length
    return {
        "prompts_per_step": rl.prompts_per_step,
        "responses_per_step": responses,
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


def memory_estimate(config: Config, arch: Architecture) -> dict[str, int]:
    """Bytes that a step needs on its device, by part; an estimate from shapes, float32
    throughout."""
    parameters = parameter_count(arch) * FLOAT_BYTES
    time = config.rollout.max_prompt_length + config.rollout.max_response_length
    slots = max(config.rollout.slots, 1)
    cache = cache_bytes(arch.layers, slots, arch.kv_heads, time, arch.head_dim, FLOAT_BYTES)
    edges, budget = config.length_buckets, config.rl.tokens_per_microbatch
    activations = max(_activations(arch, bucket_rows(edge, budget), edge) for edge in edges)
    parts = {
        "parameters": parameters,
        "optimizer": 2 * parameters,
        "gradients": 2 * parameters,
        "activations": activations * FLOAT_BYTES,
        "kv_cache": cache,
    }
    return parts | {"total": sum(parts.values())}


def _activations(arch: Architecture, rows: int, width: int) -> int:
    """Floats kept for the backward pass of one micro-batch."""
    tokens = rows * width
    heads = arch.heads * arch.head_dim
    per_layer = 6 * arch.d_model + 4 * heads + 4 * arch.kv_heads * arch.head_dim
    per_layer += 4 * arch.d_ff + 2 * arch.heads * width
    layers = per_layer + (arch.layers - 1) * arch.d_model if arch.remat else arch.layers * per_layer
    return tokens * (layers + 3 * arch.vocab)
