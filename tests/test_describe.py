"""What is said before a run is what the run does."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltal_jax.config import Aggregation, load_config
from deltal_jax.training.describe import batch_arithmetic, formula, memory_estimate
from deltal_jax.training.setup import init_params, make_architecture, make_setup


def test_batch_arithmetic_of_the_tiny_experiment():
    counts = batch_arithmetic(load_config("countdown-tiny", {"rl.updates_per_rollout": 4}))
    assert counts["responses_per_step"] == 128
    assert counts["responses_per_minibatch"] == 32
    assert counts["updates_per_step"] == 4
    assert counts["rl_updates"] == 400
    assert counts["responses"] == 12_800
    assert counts["max_response_tokens"] == 12_800 * 192


@pytest.mark.parametrize("aggregation", get_args(Aggregation))
@pytest.mark.parametrize("scope", ["batch", "minibatch", "group"])
def test_the_formula_names_method_scope_and_constant(aggregation, scope):
    options = {"objective.aggregation": aggregation, "objective.scope": scope}
    text = formula(load_config("countdown-tiny", options | {"objective.alpha": 0.75}))
    assert aggregation in text
    assert {"batch": "rollout batch", "minibatch": "mini-batch", "group": "group"}[scope] in text
    assert ("1/192" in text) == (aggregation in ("delta_l", "constant_length"))
    assert ("L_j^-0.75" in text) == (aggregation == "delta_l")


def test_the_memory_estimate_is_near_what_the_compiler_says():
    from deltal_jax.objective.surrogate import reinforce
    from deltal_jax.training.optimizer import make_optimizer
    from deltal_jax.training.step import Update
    from deltal_jax.types import Bucket

    config = load_config("countdown-tiny")
    setup = make_setup(config)
    estimate = memory_estimate(config, make_architecture(config, setup.tokenizer.vocab_size))
    update = Update(setup.graphdef, make_optimizer(config.rl.optimizer, 1), reinforce)
    params = jax.eval_shape(lambda: init_params(setup, jax.random.key(0)))
    rows, width = 5, 200
    whole, ids = (rows, width), jnp.int32
    shapes = [(whole, ids)] * 3 + [(whole, bool)] + [(whole, jnp.float32)] * 2
    shapes += [((rows,), jnp.float32)] * 2
    bucket = Bucket(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
    compiled = jax.jit(update.gradient).lower(params, bucket).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert 0.5 < estimate["activations"] / temporary < 2.0
    sizes = [np.prod(x.shape) * 4 for x in jax.tree.leaves(params)]
    assert estimate["parameters"] == sum(sizes) == 161_088 * 4
    assert estimate["total"] == sum(v for k, v in estimate.items() if k != "total")
