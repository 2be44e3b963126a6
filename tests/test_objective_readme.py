"""The recipes of objective/README.md run and give the stated loss; its tables name what exists."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import deltal_jax
from deltal_jax.objective.advantages import ADVANTAGES
from deltal_jax.objective.aggregation import AGGREGATIONS, delta_l
from deltal_jax.objective.correction import CORRECTIONS
from deltal_jax.objective.divergence import DIVERGENCES
from deltal_jax.objective.names import FOREIGN_NAMES
from deltal_jax.objective.surrogate import SURROGATES
from deltal_jax.parallel.mesh import make_mesh

FOLDER = Path(deltal_jax.__file__).parent / "objective"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
RECIPES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
LENGTHS = np.asarray([3, 1, 5, 0, 2, 4])
MASK = np.arange(5)[None, :] < LENGTHS[:, None]
MAX_LENGTH = 8.0
rng = np.random.default_rng(0)
ADVANTAGE, OLD, NEW = rng.normal(size=6), -rng.random((6, 5)), -rng.random((6, 5))


def token_losses(advantages: np.ndarray) -> np.ndarray:
    ratio = np.exp(NEW - OLD)
    spread = advantages[:, None]
    return np.maximum(-spread * ratio, -spread * np.clip(ratio, 0.8, 1.2)) * MASK


def wanted(alpha: float) -> float:
    """Σ_i w_i S_i in float64, by the formula."""
    powers = np.asarray([length**-alpha if length else 0.0 for length in LENGTHS])
    return float(powers / powers.sum() / MAX_LENGTH @ token_losses(ADVANTAGE).sum(axis=1))


def test_there_are_four_recipes_of_at_most_ten_lines():
    assert len(RECIPES) == 4
    assert all(len(recipe.strip().splitlines()) <= 10 for recipe in RECIPES)


@pytest.mark.parametrize("split", [[[0, 1, 2, 3, 4, 5]], [[0, 4], [5, 1, 3, 2]]])
def test_the_plain_loop_adds_micro_batches_to_the_loss_of_the_batch(split):
    space = {
        "jnp": jnp,
        "mask": jnp.asarray(MASK),
        "max_length": MAX_LENGTH,
        "advantages": jnp.asarray(ADVANTAGE, jnp.float32),
        "old_logprobs": jnp.asarray(OLD, jnp.float32),
        "logprobs": lambda params, rows: params[rows],
    }
    exec(RECIPES[0], space)
    params = jnp.asarray(NEW, jnp.float32)
    parts = [jax.value_and_grad(space["loss"])(params, jnp.asarray(rows)) for rows in split]
    assert sum(float(value) for value, _ in parts) == pytest.approx(wanted(1.0), rel=1e-5)
    gradient = sum(np.asarray(slope) for _, slope in parts)
    np.testing.assert_array_equal(gradient[~MASK], 0.0)


@pytest.mark.parametrize("spec", [P(None, ("data", "fsdp")), P("fsdp", "data")])
def test_devices_that_share_responses_find_the_loss_and_its_gradient(spec):
    """Of rows that are packed one behind the other, so that each cut goes through some."""
    mesh = make_mesh(4, 2)
    space = {"dl": deltal_jax, "jnp": jnp, "max_length": MAX_LENGTH, "count": len(LENGTHS)}
    space["axes"] = ("data", "fsdp")
    exec(RECIPES[1], space)
    ids = np.full(16, len(LENGTHS), np.int32)
    ids[: LENGTHS.sum()] = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    assert set(ids[:8]) & set(ids[8:]) == {2}  # which goes on behind the cut
    mask, ids = (ids < len(LENGTHS)).reshape(2, 8), ids.reshape(2, 8)
    params = np.zeros(16, np.float32)
    params[: LENGTHS.sum()] = token_losses(ADVANTAGE)[MASK]
    params = jnp.asarray(params.reshape(2, 8))
    mapped = jax.shard_map(space["sharded_loss"], mesh=mesh, in_specs=spec, out_specs=P())
    value, gradient = jax.jit(jax.value_and_grad(mapped))(params, ids, mask)
    assert float(value) == pytest.approx(wanted(1.0), rel=1e-5)
    # The loss is linear in the tokens' losses, so its gradient is the weight of each response.
    powers = np.where(LENGTHS > 0, 1 / np.maximum(LENGTHS, 1), 0)
    weights = np.append(powers / powers.sum() / MAX_LENGTH, 0.0)
    np.testing.assert_allclose(gradient, weights[ids], rtol=1e-5)


def test_scaled_advantages_make_another_trainers_mean_our_sum():
    space = {
        "jnp": jnp,
        "lengths": jnp.asarray(LENGTHS),
        "max_length": MAX_LENGTH,
        "advantages": jnp.asarray(ADVANTAGE, jnp.float32),
    }
    exec(RECIPES[2], space)
    scaled = token_losses(np.asarray(space["advantages"], np.float64))
    means = scaled.sum(axis=1)[LENGTHS > 0] / LENGTHS[LENGTHS > 0]
    assert means.mean() == pytest.approx(wanted(0.75), rel=1e-5)


class FakeAccelerator:
    """Two processes, of which this one holds the first four responses."""

    def gather(self, values):
        assert len(values) == 4
        others = np.asarray([length**-1.0 for length in LENGTHS[4:]])
        return np.concatenate([values, others])


class FakeTrainer:
    accelerator = FakeAccelerator()

    def _generate_and_score_completions(self, inputs):
        return {"completion_mask": MASK[:4].astype(int), "advantages": ADVANTAGE[:4]}


def test_the_trl_recipe_makes_the_constant_divisor_delta_l():
    space = {"GRPOTrainer": FakeTrainer}
    exec(RECIPES[3], space)
    found = space["DeltaLTrainer"]()._generate_and_score_completions(None)["advantages"]
    weights = np.asarray(delta_l(jnp.asarray(LENGTHS), 1.0, normalizer=MAX_LENGTH))
    np.testing.assert_allclose(
        found / (6 * MAX_LENGTH), (weights * ADVANTAGE)[:4], rtol=1e-5, atol=1e-9
    )


def rows_of(heading: str) -> list[str]:
    """The first column of the table whose heading starts so."""
    table = README.split(f"\n| {heading} |", 1)[1].split("\n\n", 1)[0]
    return [row.split("|")[1] for row in table.splitlines()[2:]]


@pytest.mark.parametrize(
    ("heading", "catalogue"),
    [
        ("method", AGGREGATIONS),
        ("choose", AGGREGATIONS),
        ("advantage", ADVANTAGES),
        ("surrogate", SURROGATES),
        ("importance correction", CORRECTIONS),
        ("divergence", DIVERGENCES),
    ],
)
def test_every_function_has_its_row(heading, catalogue):
    named = [name for cell in rows_of(heading) for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(named) == sorted(catalogue)


def test_a_name_of_another_library_in_the_tables_is_answered_with_the_row_it_stands_in():
    kinds = (("method", AGGREGATIONS), ("surrogate", SURROGATES), ("divergence", DIVERGENCES))
    for heading, catalogue in kinds:
        table = README.split(f"\n| {heading} |", 1)[1].split("\n\n", 1)[0]
        for row in table.splitlines()[2:]:
            ours = re.findall(r"`(\w+)`", row.split("|")[1])
            for theirs in re.findall(r"`([\w+-]+)`", row.split("|", 2)[2]):
                meanings = [n for n in FOREIGN_NAMES.get(theirs, ()) if n in catalogue]
                assert theirs in catalogue or (meanings and set(meanings) <= set(ours)), theirs


def test_every_file_of_the_folder_is_named():
    for path in FOLDER.glob("*.py"):
        assert path.name == "__init__.py" or f"`{path.name}`" in README
