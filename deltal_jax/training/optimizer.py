"""The optimizer of a phase, from its config; and arithmetic in float32 over what is stored in
less."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, BFloat16, Float, Shaped

from deltal_jax.config import OptimizerConfig
from deltal_jax.model.remat import PINNED_HOST

#: Keeps the draws of rounding apart from those of sampling with the same root key.
ROUNDING_STREAM = 0x726F756E


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by update number: linear warm-up (never 0), constant or cosine to `steps`."""
    warmup, peak = config.warmup_steps, config.learning_rate
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(steps - warmup, 1), config.final_fraction)
    else:
        after = optax.constant_schedule(peak)
    if warmup == 0:
        return after
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rise, after], [warmup])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW, or gradient descent, each with decoupled weight decay, behind a clip of the global
    gradient norm or behind `normalize_by_global_norm`."""
    rate = learning_rate(config, steps)
    if config.rule == "sgd":
        rule = optax.chain(optax.add_decayed_weights(config.weight_decay), optax.sgd(rate))
    else:
        rule = optax.adamw(
            rate,
            b1=config.b1,
            b2=config.b2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
        )
    if config.normalize:
        return optax.chain(normalize_by_global_norm(), rule)
    if config.clip_norm is None:
        return rule
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), rule)


def normalize_by_global_norm() -> optax.GradientTransformation:
    """g / ‖g‖ over all parameters together; 0 where g is 0. Two losses that differ by a positive
    factor give the same steps behind it."""

    def normalize(updates: Any) -> Any:
        norm = optax.tree.norm(updates)
        scale = jnp.where(norm > 0, 1 / jnp.where(norm > 0, norm, 1), 0)
        return jax.tree.map(lambda x: x * scale, updates)

    return optax.stateless(lambda updates, params: normalize(updates))


def optimizer_meter(config: OptimizerConfig) -> Callable[[Array, Any], dict[str, Array]]:
    """Metrics of a step, from the norm of the gradient and the optimizer's state after it:

    - `optim/clipped_frac`: 1 where the gradient was clipped, else 0; absent where nothing clips.
    - `optim/below_eps_frac`: the share of the elements whose root second moment, corrected for its
      bias as Adam uses it, is under 10 ε, so that ε damps their step by a tenth or more; absent for
      an optimizer without one.
    """

    def is_adam(state: Any) -> bool:
        return isinstance(state, optax.ScaleByAdamState)

    def meter(norm: Array, opt_state: Any) -> dict[str, Array]:
        found = {}
        if config.clip_norm is not None and not config.normalize:
            found["optim/clipped_frac"] = (norm > config.clip_norm).astype(jnp.float32)
        for state in filter(is_adam, jax.tree.leaves(opt_state, is_leaf=is_adam)):
            least = (10 * config.epsilon) ** 2 * (1 - config.b2 ** state.count.astype(jnp.float32))
            moments = jax.tree.leaves(state.nu)
            size = sum(nu.size for nu in moments)
            parts = [jnp.mean(nu < least, dtype=jnp.float32) * (nu.size / size) for nu in moments]
            found["optim/below_eps_frac"] = jnp.sum(jnp.stack(parts))
        return found

    return meter


def on_host(shardings: Any, opt_state: Any) -> Any:
    """The shardings of an optimizer's state with its moments in the host's memory, where each
    device has its own part; counts stay on the devices."""
    return jax.tree.map(
        lambda own, x: own.with_memory_kind(PINNED_HOST) if x.ndim else own, shardings, opt_state
    )


def widen(tree: Any) -> Any:
    """Every array of less than float32 in float32; the others as they are."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if _narrow(x) else x, tree)


def round_like(tree: Any, stored: Any, key: Shaped[Array, ""]) -> Any:
    """`tree` in the types of `stored`: bfloat16 by `stochastic_round`, each leaf with draws of its
    own, what it is already as it is."""
    leaves, structure = jax.tree.flatten(tree)
    targets = structure.flatten_up_to(stored)

    def store(number: int, x: Array, target: Array) -> Array:
        return stochastic_round(x, jax.random.fold_in(key, number)) if _narrow(target) else x

    pairs = zip(leaves, targets, strict=True)
    return structure.unflatten([store(number, *pair) for number, pair in enumerate(pairs)])


def stochastic_round(
    x: Float[Array, "*shape"], key: Shaped[Array, ""]
) -> BFloat16[Array, "*shape"]:
    """One of the two bfloat16 neighbours of each float32, the nearer the likelier: its mean is x.

    A step of 1e-6 from 0.02, which rounding to nearest loses every time, is so kept on average.
    Source: Gupta et al., arXiv 1502.02551.
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    rounded = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def _narrow(x: Array) -> bool:
    return x.dtype == jnp.bfloat16
