"""New weights reach the server once, and nothing is sampled from others."""

import json

import jax
import jax.numpy as jnp
import pytest

from deltal_jax.rollout.dialects import DIALECTS
from tests.served import (
    PATHS,
    RELOAD,
    RETRIES,
    SAMPLING,
    check_against_forward,
    generate,
    refusal,
    weights,
)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_new_parameters_are_served_once_and_sampled_from(make, server, tmp_path, dialect):
    reload = PATHS[dialect][1]
    engine, evaluator = make(dialect), make(dialect)
    first, second = weights(0), weights(1)

    def written():
        """Different folders that were loaded; a server that says no version gets one each time."""
        bodies = [json.dumps(body) for path, body in server.requests if path == reload]
        assert DIALECTS[dialect].says_version is False or len(bodies) == len(set(bodies))
        return len(set(bodies))

    for own, count in ((first, 1), (second, 2), (first, 3)):
        for which in (engine, evaluator, engine):
            rollout, _ = generate(which, own)
            check_against_forward(rollout, own)
            assert written() == count
    leaves, tree = jax.tree.flatten(first)
    generate(engine, jax.tree.unflatten(tree, leaves))
    assert written() == 3, "the same arrays in another tree are not new"
    generate(engine, jax.tree.unflatten(tree, [*leaves[:-1], leaves[-1] + 0]))
    assert written() == 4, "one other array is, as where adapters alone are trained"
    left = list((tmp_path / "served").iterdir())
    assert len(left) == 1, "older folders are removed"
    body = server.last(reload)
    assert str(left[0]) in (body.get("model_path"), body.get("kwargs", {}).get("weights_path"))


def test_parameters_may_be_donated_between_rollouts(make, server):
    update = jax.jit(lambda tree: jax.tree.map(lambda x: 1.01 * x, tree), donate_argnums=0)
    engine, own = make(), jax.tree.map(jnp.copy, weights(0))
    for count in (1, 2, 3):
        before = jax.tree.leaves(own)
        rollout, _ = generate(engine, own)
        check_against_forward(rollout, own)
        assert server.count(RELOAD) == count
        own = update(own)
        assert all(leaf.is_deleted() for leaf in before), "nothing held on to them"


def test_old_prefixes_are_not_served_for_new_weights(make, server):
    engine = make()
    salts = []
    for seed in (0, 0, 1):
        generate(engine, weights(seed))
        salts.append(server.last(SAMPLING)["cache_salt"])
    assert salts[0] == salts[1] != salts[2]


@pytest.mark.parametrize("status", [400, 500])
def test_nothing_is_sampled_where_the_weights_were_not_taken(make, server, status):
    engine = make()
    generate(engine)
    asked = server.count(SAMPLING)
    server.before = lambda path, number: status if path == RELOAD else None
    said = refusal(engine, weights(1))
    assert f"{RELOAD} answered {status}: " in said and "VLLM_SERVER_DEV_MODE=1" in said
    assert "as asked for" in said
    assert server.count(RELOAD) == 1 + (1 if status == 400 else 1 + RETRIES)
    assert "weights" in refusal(engine, weights(1)), "and not the next time either"
    assert "weights" in refusal(engine, weights(0)), "nor the old ones"
    assert server.count(SAMPLING) == asked
    server.before = lambda path, number: None
    rollout, _ = generate(engine, weights(1))
    check_against_forward(rollout, weights(1))


def test_a_server_that_was_lost_gets_the_weights_again(make, server):
    engine = make()
    generate(engine)

    def starts_anew(path, number):
        if path == SAMPLING and number == 6 + 2:
            server.params = weights(7)
            return "drop"

    server.before = starts_anew
    rollout, _ = generate(engine)
    check_against_forward(rollout, weights(0))
    assert server.count(RELOAD) == 1 + 2  # each rollout's own, and one for the one that was lost


def test_a_server_that_started_anew_between_two_rollouts_is_given_the_weights(make, server):
    engine = make()
    generate(engine)
    server.params = weights(7)
    rollout, _ = generate(engine)
    check_against_forward(rollout, weights(0))


def test_another_runs_weights_are_noticed(make, server):
    engine = make("sglang")
    generate(engine)
    server.version = "another's"
    assert 'sampled from the weights "another\'s"' in refusal(engine)


def test_weights_that_cannot_be_written_are_an_error_of_the_field(make, server, tmp_path):
    (tmp_path / "served").write_text("a file")
    assert refusal(make()).startswith("rollout.server.weights_dir: cannot write")
    assert server.requests == []
