"""Sampling by a server: a rollout like our own engine's, and a whole run on them."""

import dataclasses
import json
import threading
import typing

import jax.numpy as jnp
import numpy as np
import pytest

from deltal_jax import train
from deltal_jax.cli.main import main
from deltal_jax.config import load_config
from deltal_jax.config.rules import SHAPE
from deltal_jax.config.schema import ModelConfig, ServerConfig
from deltal_jax.errors import UserError
from deltal_jax.metrics import load_metrics
from deltal_jax.model.huggingface import load_architecture, load_params
from deltal_jax.rollout.dialects import DIALECTS
from deltal_jax.rollout.results import begin
from deltal_jax.training.setup import make_architecture, make_setup
from tests import fakes, small_tokenizers
from tests.completions_server import CompletionsServer, serving
from tests.served import (
    KEY,
    OPTIONS,
    PATHS,
    RELOAD,
    SAMPLING,
    check_against_forward,
    generate,
    refusal,
    weights,
)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_rollout_is_as_our_own_engine_gives_it(server, make, dialect):
    rollout, stats = generate(make(dialect), prompts=5, samples=3)
    prompts = fakes.prompts(5)
    check_against_forward(rollout, weights(0))
    assert (rollout.logprobs[~rollout.loss_mask] == 0).all()
    np.testing.assert_array_equal(rollout.group_ids, np.repeat(np.arange(5), 3))
    for row, group in enumerate(rollout.group_ids):
        start, end = rollout.prompt_lengths[row], rollout.lengths[row]
        assert start == prompts.lengths[group]
        np.testing.assert_array_equal(rollout.tokens[row, :start], prompts.tokens[group, :start])
        np.testing.assert_array_equal(np.flatnonzero(rollout.loss_mask[row]), np.arange(start, end))
        assert (rollout.tokens[row, end:] == 0).all()
        ended = rollout.tokens[row, end - 1] in OPTIONS.eos_ids
        assert rollout.truncated[row] == (not ended)
        assert ended or end - start == OPTIONS.max_response_length
    assert 0 < rollout.truncated.sum() < 15, "both ends occur"
    assert 0 < stats.utilization <= 1 and 0 < stats.utilization_queued <= 1
    assert server.count(PATHS[dialect][0]) == 15
    seeds = {
        body.get("seed", body.get("sampling_params", {}).get("sampling_seed"))
        for path, body in server.requests
        if path == PATHS[dialect][0]
    }
    assert len(seeds) == 15


def test_seeds_follow_the_counters_and_no_history(make, server):
    def asked(**counters):
        server.requests.clear()
        generate(make(), **counters)
        found = [body for path, body in server.requests if path == SAMPLING]
        return sorted((body["seed"], tuple(body["prompt"])) for body in found)

    first = asked(step=4)
    assert asked(step=4) == first
    for other in (asked(step=5), asked(step=4, round_=1)):
        assert not {seed for seed, _ in other} & {seed for seed, _ in first}


def test_who_listens_hears_of_each_answer(make, server):
    responses = begin(OPTIONS, fakes.prompts(3), KEY, samples=2)
    told = {}
    found, _ = make().sample(weights(0), responses, finished=told.__setitem__)
    assert sorted(told) == list(range(6))
    for row, tokens in told.items():
        np.testing.assert_array_equal(tokens, found.tokens[row, : found.lengths[row]])


def test_rows_do_not_depend_on_which_answer_comes_first(make, server):
    want, _ = generate(make())
    waiting = threading.Event()
    done = []

    def first_comes_last(path, number):
        if path == SAMPLING:
            if number % 6 == 0:
                assert waiting.wait(60)
            done.append(number)
            if len(done) == 5:
                waiting.set()

    server._counts.clear()
    server.before = first_comes_last
    got, _ = generate(make())
    assert done[-1] == 0
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.logprobs, want.logprobs)


def test_as_many_requests_at_once_as_there_are_slots(make, server):
    together = threading.Barrier(OPTIONS.slots)

    def wait(path, number):
        if path == SAMPLING:
            together.wait(60)  # with fewer at once nobody would ever pass

    server.before = wait
    generate(make(), prompts=3, samples=3)
    assert server.most == OPTIONS.slots


def test_greedy_tokens_have_probability_one(make):
    rollout, _ = generate(make(options=dataclasses.replace(OPTIONS, temperature=0.0)), samples=1)
    logits = fakes.forward(fakes.PLAIN, weights(0), rollout.tokens)
    mask = rollout.loss_mask[:, 1:]
    np.testing.assert_array_equal(rollout.tokens[:, 1:][mask], logits.argmax(-1)[:, :-1][mask])
    assert (rollout.logprobs == 0).all()


@pytest.mark.parametrize("dialect", DIALECTS)
def test_log_probabilities_that_ignore_the_temperature_are_noticed(make, server, dialect):
    options = dataclasses.replace(OPTIONS, temperature=0.6)
    engine = make(dialect, options)
    rollout, _ = generate(engine)
    check_against_forward(rollout, weights(0), temperature=0.6)
    count = server.count(PATHS[dialect][0])
    assert count == 6 + 2, "two requests of one token tell"
    generate(engine)
    assert server.count(PATHS[dialect][0]) == count + 6, "once is enough"
    server.scaled = False
    said = refusal(make(dialect, options))
    assert said.startswith("rollout.temperature: the server's log-probabilities do not follow it")
    assert {"vllm": "processed_logprobs", "sglang": "RETURN_ORIGINAL"}[dialect] in said


def test_raw_log_probabilities_are_not_to_be_had(make):
    with pytest.raises(UserError, match="raw_logprobs: a server gives one"):
        make(options=dataclasses.replace(OPTIONS, raw_logprobs=True))


def test_requests_are_checked_as_for_our_own_engine(make, server):
    prompts, engine = fakes.prompts(3), make()
    prompts.lengths[1] = 0
    with pytest.raises(UserError, match="number 1 is empty"):
        engine.generate(weights(0), prompts, KEY, samples=1)
    assert server.requests == []


SMALL = {
    "task.countdown.numbers": 2,
    "task.countdown.max_number": 5,
    "task.countdown.max_value": 25,
    "model.layers": 1,
    "model.d_model": 16,
    "model.head_dim": 8,
    "model.d_ff": 16,
    "length_buckets": [40],
    "rollout.max_prompt_length": 7,
    "rollout.max_response_length": 24,
    "rollout.slots": 4,
    "rollout.engine": "http",
    "sft.steps": 3,
    "sft.tokens_per_batch": 120,
    "rl.steps": 2,
    "rl.prompts_per_step": 2,
    "rl.samples_per_prompt": 4,
    "evaluate.problems": 6,
    "evaluate.every": 1,
    "run.report": False,
}


def test_dialects_are_those_that_there_are():
    assert typing.get_args(typing.get_type_hints(ServerConfig)["dialect"]) == tuple(DIALECTS)


URL = {"rollout.engine": "http", "rollout.server.url": "http://localhost:8000"}


def test_a_dry_run_asks_the_server_nothing(server):
    overrides = [f"{k}={v}" for k, v in (URL | {"rollout.server.url": server.url}).items()]
    assert main(["train", "countdown-tiny", *overrides, "--dry-run", "--json"]) == 0
    assert server.requests == []


def test_a_whole_run_trains_on_what_the_server_samples(tmp_path, capsys):
    setup = make_setup(load_config("countdown-tiny", SMALL | URL))
    arch = make_architecture(setup.config, setup.tokenizer.vocab_size)
    server = CompletionsServer(arch, None, width=7)
    folder = tmp_path / "run"
    options = {"run.dir": str(folder), "objective.old_logprobs": "recompute"}
    with serving(server) as url:
        result = train("countdown-tiny", SMALL | options | {"rollout.server.url": url}, quiet=True)
    assert (result.status, result.step) == ("done", 2)
    # After the warm-up, and after each of two updates; training and its evaluations share them,
    # and each of these five says so.
    assert len({str(body) for path, body in server.requests if path == RELOAD}) == 3
    assert server.count(RELOAD) == 3 + 2
    assert server.count(SAMPLING) == 3 * 6 + 2 * 8
    lines = [line for line in load_metrics(folder / "metrics.jsonl") if line["phase"] == "rl"]
    assert len(lines) == 2
    for line in lines:
        # The server had just the weights that were trained.
        assert line["mismatch/logprob_diff_max"] < 1e-5
        assert 0 < line["rollout/utilization"] <= 1
    assert len(list((folder / "served").iterdir())) == 1
    capsys.readouterr()
    assert main(["evaluate", str(folder), "--json"]) == 0, "in this process: the server is gone"
    assert json.loads(capsys.readouterr().out)["step"] == 2


#: Undoes what `countdown-tiny` says of the model and the warm-up.
SHAPELESS = {f"model.{name}": getattr(ModelConfig(), name) for name in SHAPE} | {"sft.steps": 0}


def test_adapters_reach_the_server_merged(tmp_path):
    source, folder = tmp_path / "source", tmp_path / "run"
    small_tokenizers.write_folder(source, "qwen")
    shape = fakes.CONFIGS["qwen2"] | {"vocab_size": 600, "num_hidden_layers": 1}
    fakes.write_checkpoint(source, shape)
    overrides = {k: v for k, v in SMALL.items() if not k.startswith(("model.", "sft."))} | {
        "model.path": str(source),
        "model.compute_dtype": "float32",
        "lora.rank": 2,
        "rl.optimizer.learning_rate": 0.05,
        "rollout.max_prompt_length": 28,
        "rollout.max_response_length": 12,
        "objective.old_logprobs": "recompute",
        "run.dir": str(folder),
    }

    def by_length(prompts, responses, answers):
        return [float(len(response)) for response in responses]

    server = CompletionsServer(load_architecture(source), None, width=28)
    with serving(server) as url:
        overrides = SHAPELESS | overrides | {"rollout.server.url": url}
        train("countdown-tiny", overrides, rewards=[by_length], quiet=True)
    assert len({str(body) for path, body in server.requests if path == RELOAD}) == 3
    lines = [x for x in load_metrics(folder / "metrics.jsonl") if x["phase"] == "rl"]
    assert max(line["mismatch/logprob_diff_max"] for line in lines) < 1e-5
    before, after = (
        x["blocks"]["mlp"]["down"]["kernel"].astype(jnp.bfloat16)
        for x in (load_params(source, server.arch), server.params)
    )
    assert jnp.abs(after - before).max() > 0.01, "what was frozen is not all that it got"
