"""Runs that start from a Hugging Face folder: trained, resumed, exported, wholly or by adapters."""

import dataclasses
import json
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax import traverse_util
from safetensors.numpy import load_file, save_file

import deltal_jax
from deltal_jax.cli.main import main
from deltal_jax.config import Config, ModelConfig, load_config
from deltal_jax.data.prompts import prompt_ids
from deltal_jax.errors import UserError
from deltal_jax.model.huggingface import load_architecture, load_params
from deltal_jax.model.lora import trained
from deltal_jax.rollout.stream import Streamer
from deltal_jax.training.collect import RolloutStream, response_texts
from deltal_jax.training.policy import update_policy
from deltal_jax.training.setup import (
    check_setup,
    encode_problems,
    init_params,
    make_engine,
    make_setup,
    make_update,
    pin_checkpoint,
)
from deltal_jax.training.trained import load_trained
from tests import fakes, small_tokenizers
from tests.test_loop import length_reward, timeless

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
EXPERIMENT = {
    "task": {"countdown": {"numbers": 2, "max_number": 5, "max_value": 25}},
    "rollout": {"slots": 4, "max_prompt_length": 28, "max_response_length": 12},
    "length_buckets": [40],
    "objective": {"kl_coefficient": 0.05, "old_logprobs": "recompute"},
    "rl": {
        "steps": 2,
        "prompts_per_step": 2,
        "samples_per_prompt": 4,
        "tokens_per_microbatch": 160,
        "optimizer": {"learning_rate": 0.01},
    },
    "evaluate": {"every": 0, "problems": 4},
    "checkpoint": {"every": 1},
    "run": {"report": False},
}
LORA = {"lora.rank": 2, "lora.targets": ["q_proj", "down_proj"]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small Qwen2 with a byte-level tokenizer; its config is in an old form, with fields that we
    don't read."""
    folder = tmp_path_factory.mktemp("theirs") / "tiny"
    small_tokenizers.write_folder(folder, "qwen", template=TEMPLATE)
    config = {k: v for k, v in fakes.CONFIGS["qwen2"].items() if k != "rope_parameters"}
    config |= {
        "vocab_size": 600,
        "num_hidden_layers": 2,
        "rope_theta": 1e4,
        "torch_dtype": "float32",
        "note": "Größe",
    }
    return fakes.write_checkpoint(folder, config)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    path = tmp_path_factory.mktemp("experiment") / "small.yaml"
    path.write_text(yaml.safe_dump(EXPERIMENT))
    return path


def start(experiment, folder, **fields):
    overrides = {k.replace("__", "."): v for k, v in fields.items()} | {"run.dir": str(folder)}
    return deltal_jax.train(experiment, overrides, rewards=[length_reward], quiet=True)


def go_on(folder, **fields):
    overrides = {k.replace("__", "."): v for k, v in fields.items()} | {"run.dir": str(folder)}
    return deltal_jax.train(None, overrides, rewards=[length_reward], resume=True, quiet=True)


def flat(params):
    return traverse_util.flatten_dict(jax.tree.map(np.asarray, params), sep="/")


def same(a, b):
    a, b = flat(a), flat(b)
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a
    )


@pytest.fixture(scope="module")
def adapted(checkpoint, experiment, tmp_path_factory):
    """A run with adapters of two steps."""
    folder = tmp_path_factory.mktemp("adapted") / "run"
    start(experiment, folder, model__path=str(checkpoint), **LORA)
    return folder


@pytest.fixture(scope="module")
def whole(checkpoint, experiment, tmp_path_factory):
    """A run of two steps that trains all parameters, whose source is gone since."""
    folder = tmp_path_factory.mktemp("whole")
    source = shutil.copytree(checkpoint, folder / "source")
    fields = {"model.param_dtype": "bfloat16", "rl.optimizer.moment_dtype": "bfloat16"}
    start(experiment, folder / "run", model__path=str(source), data__chat_template=True, **fields)
    shutil.rmtree(source)
    return folder / "run"


def test_a_run_starts_from_the_weights_of_the_folder(checkpoint, experiment):
    config = load_config(experiment, {"model.path": str(checkpoint)})
    setup = make_setup(config)
    params = init_params(setup, jax.random.key(0))
    assert same(params, load_params(checkpoint, load_architecture(checkpoint)))
    assert setup.architecture.compute_dtype == "bfloat16"
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"float32"}


def test_a_run_keeps_its_tokenizer_and_config_as_they_came(whole, checkpoint):
    kept = {p.name: p.read_bytes() for p in (whole / "model").iterdir()}
    names = {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"}
    assert kept.keys() == names
    for name in names - {"config.json"}:
        assert kept[name] == (checkpoint / name).read_bytes()
    theirs = json.loads((checkpoint / "config.json").read_bytes())
    assert json.loads(kept["config.json"]) == theirs


def test_a_run_needs_its_source_no_more(whole):
    """Trained in bfloat16: at this learning rate most parameters have moved."""
    opened = load_trained(whole, {})
    params = flat(opened.params)
    assert {str(x.dtype) for x in params.values()} == {"bfloat16"}
    assert opened.setup.architecture.vocab == 600
    go_on(whole, rl__steps=3)
    now = flat(load_trained(whole, {}).params)
    assert np.mean([np.mean(params[k] != now[k]) for k in params]) > 0.5


def test_prompts_are_a_users_message_in_the_template(whole):
    setup = load_trained(whole, {}).setup
    problems = setup.task.held_out(1)
    ids = prompt_ids(problems[0].prompt, setup.tokenizer, chat=True)
    prompts = encode_problems(setup, problems)
    assert prompts.tokens[0, : prompts.lengths[0]].tolist() == ids
    text = f"<|im_start|>user\n{problems[0].prompt}<|im_end|>\n<|im_start|>assistant\n"
    assert ids == setup.tokenizer.encode(text)
    assert len(ids) > len(setup.tokenizer.encode(problems[0].prompt))


def test_only_adapters_are_trained_and_saved(adapted, checkpoint):
    opened = load_trained(adapted, {})
    base = load_params(checkpoint, load_architecture(checkpoint), dtype=jnp.bfloat16)
    found = flat(opened.params)
    for name, kept in flat(base).items():
        assert found[name].dtype == kept.dtype and np.array_equal(found[name], kept), name
    own = {name for name in found if "lora" in name}
    assert own == set(flat(trained(opened.params))) == found.keys() - flat(base).keys()
    assert all(np.abs(found[name]).max() > 0 and found[name].dtype == np.float32 for name in own)
    saved = (adapted / "checkpoints" / "2" / "state" / "_METADATA").read_text()
    assert "lora_a" in saved and "kernel" not in saved and "embedding" not in saved


def test_two_steps_are_one_and_a_resumed_one(adapted, checkpoint, experiment, tmp_path):
    folder = tmp_path / "halves"
    start(experiment, folder, model__path=str(checkpoint), rl__steps=1, **LORA)
    moved = shutil.copytree(checkpoint, tmp_path / "moved")
    go_on(folder, rl__steps=2, model__path=str(moved))
    assert same(load_trained(folder, {}).params, load_trained(adapted, {}).params)
    lines = [[x for x in timeless(f) if x["phase"] == "rl"] for f in (folder, adapted)]
    assert lines[0] == lines[1] and len(lines[0]) == 2


def test_adapters_of_another_model_are_refused(adapted, checkpoint, tmp_path):
    other = shutil.copytree(checkpoint, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_theta": 5e4}))
    with pytest.raises(UserError, match=r"model\.path: .*/other has another config\.json than the"):
        go_on(adapted, rl__steps=3, model__path=str(other))
    with pytest.raises(UserError, match=r"lora\.rank: the run was started with 2 and cannot go"):
        go_on(adapted, rl__steps=3, lora__rank=4)


def test_adapters_beside_other_weights_are_refused(adapted, checkpoint, tmp_path, capsys):
    """The same config, one number of one matrix changed."""
    other = shutil.copytree(checkpoint, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 1.0
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.path: .*/other has other weights than the run"):
        go_on(adapted, rl__steps=3, model__path=str(other))
    to = str(tmp_path / "out")
    assert main(["export", str(adapted), "--to", to, "--base", str(other)]) == 2
    assert "has other weights" in capsys.readouterr().err
    moved = shutil.copytree(checkpoint, tmp_path / "moved")
    assert main(["export", str(adapted), "--to", to, "--base", str(moved)]) == 0


def test_weights_that_do_not_fit_leave_no_run_folder(checkpoint, experiment, tmp_path):
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"does not fit its config: missing model\.norm\.weight"):
        start(experiment, tmp_path / "run", model__path=str(broken))
    assert not (tmp_path / "run").exists()


def test_a_relative_path_is_kept_as_an_absolute_one(checkpoint, experiment, tmp_path, monkeypatch):
    monkeypatch.chdir(checkpoint.parent)
    config = pin_checkpoint(load_config(experiment, {"model.path": checkpoint.name}))
    assert config.model.path == str(checkpoint)


@pytest.mark.parametrize("lora", [{}, {"lora.rank": 2}], ids=["whole", "adapters"])
def test_in_bfloat16_the_policy_of_all_programs_is_the_same(lora, checkpoint, experiment):
    """What is sampled, recomputed and differentiated: the ratio of an on-policy update is 1."""
    options = {"model.path": str(checkpoint), "rollout.max_response_length": 12} | lora
    setup = make_setup(load_config(experiment, options))
    update = make_update(setup, "rl")
    state = update.init(init_params(setup, jax.random.key(0)), jax.random.key(1), reference=True)
    engine = make_engine(setup, temperature=1.0)
    batch = RolloutStream(setup, engine, jax.random.key(2)).next(state.params, 0)
    _, metrics = update_policy(setup, update, state, batch)
    assert abs(metrics["policy/ratio_max"] - 1.0) < 1e-6
    assert abs(metrics["policy/kl"]) < 1e-9
    assert metrics["mismatch/logprob_diff_mean"] < 1e-3


def test_a_new_model_cannot_become_a_loaded_one(tmp_path, whole):
    with pytest.raises(UserError, match=r"model\.path: the run was started with .* cannot go on"):
        go_on(whole, rl__steps=3, model__path=None)


def test_the_start_says_what_is_trained_and_in_which_types(
    checkpoint, experiment, tmp_path, capsys
):
    items = [f"model.path={checkpoint}", "lora.rank=2", "rl.steps=0", f"run.dir={tmp_path / 'r'}"]
    assert main(["train", str(experiment), *items]) == 0
    arch = load_architecture(checkpoint)
    total = sum(x.size for x in jax.tree.leaves(load_params(checkpoint, arch)))
    wide, narrow = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    sizes = [(arch.d_model, wide), (arch.d_model, narrow), (arch.d_model, narrow)]
    sizes += [(wide, arch.d_model), *[(arch.d_model, arch.d_ff)] * 3]
    own = 2 * arch.layers * sum(a + b for a, b in sizes)
    assert (
        f"{checkpoint}: {total + own:,} parameters, {own:,} trained; adapters of rank 2 in "
        "float32, the rest bfloat16, computed in bfloat16, moments in float32"
    ) in capsys.readouterr().err


@pytest.mark.parametrize("merge", [False, True])
def test_a_run_with_adapters_is_exported_either_way(adapted, checkpoint, merge, tmp_path, capsys):
    to = tmp_path / "out"
    command = ["export", str(adapted), "--to", str(to), "--dtype", "float32", "--json"]
    assert main(command + ["--merge"] * merge) == 0
    said = json.loads(capsys.readouterr().out)
    opened = load_trained(adapted, {})
    files = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    found = {p.name for p in to.iterdir()}
    if not merge:
        assert found == files | {"adapter_config.json", "adapter_model.safetensors"}
        tensors = load_file(to / "adapter_model.safetensors")
        assert said["parameters"] == sum(x.size for x in tensors.values())
        a = flat(opened.params)["blocks/mlp/down/lora/lora_a"]
        name = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"
        np.testing.assert_array_equal(tensors[name], a[1].T)
        described = json.loads((to / "adapter_config.json").read_text())
        assert described["base_model_name_or_path"] == str(checkpoint)
        assert (described["r"], described["lora_alpha"]) == (2, 32)
        return
    assert found == files | {"config.json", "model.safetensors"}
    config = json.loads((checkpoint / "config.json").read_text())
    config.pop("torch_dtype")
    assert json.loads((to / "config.json").read_text()) == config | {"dtype": "float32"}
    arch = load_architecture(to)
    got = flat(load_params(to, arch))
    params = flat(opened.params)
    scale = 16.0
    product = params["blocks/attention/q/lora/lora_a"] @ params["blocks/attention/q/lora/lora_b"]
    want = params["blocks/attention/q/kernel"].astype(np.float32) + scale * product
    np.testing.assert_allclose(got["blocks/attention/q/kernel"], want, atol=1e-5)
    assert got.keys() == flat(load_params(checkpoint, arch)).keys()


def test_a_folder_is_evaluated_as_a_run_from_it_begins(adapted, checkpoint, experiment, capsys):
    """Its fresh adapters add nothing: the figures before the first step are the folder's."""
    options = ["--config", str(experiment), "lora.rank=2", "--json"]
    assert main(["evaluate", str(checkpoint), *options]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["model"], said["step"]) == (str(checkpoint), None)
    first = next(line for line in timeless(adapted) if line["phase"] == "eval")
    assert {k: v for k, v in said.items() if k.startswith("eval/")} == {
        k: v for k, v in first.items() if k.startswith("eval/")
    }
    assert main(["evaluate", str(checkpoint)]) == 2
    assert "name the experiment that has its task" in capsys.readouterr().err
    assert main(["evaluate", str(checkpoint), "--config", "countdown-tiny"]) == 2
    assert "rollout.max_response_length: with the prompt up to" in capsys.readouterr().err


def test_a_run_is_asked_one_problem(adapted, capsys):
    """The response is that of `generate` to the same prompt, judged by the task."""
    assert main(["sample", str(adapted), "2 3 -> 5", "--temperature", "0", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    opened = load_trained(adapted, {})
    setup, problem = opened.setup, opened.setup.task.parse_problem("2 3 -> 5")
    engine = make_engine(setup, temperature=0.0)
    prompts = encode_problems(setup, [problem])
    rollout, _ = engine.generate(opened.params, prompts, jax.random.key(0), samples=1)
    (text,) = response_texts(setup, rollout)
    verdict = setup.task.verify(text, problem.answer)
    ended = not rollout.truncated[0]
    assert said == {
        "prompt": problem.prompt,
        "response": text,
        "reward": verdict.reward,
        "correct": verdict.correct,
        "reason": verdict.reason,
        "truncated": not ended,
        "tokens": int(rollout.response_lengths[0]) - ended,
    }


def test_ctrl_c_ends_the_question_between_two_tokens(adapted, monkeypatch, capsys):
    stream, drawn = Streamer.stream, []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def broken(*arguments, **options):
        for token in stream(*arguments, **options):
            if len(drawn) == 2:
                signal.raise_signal(signal.SIGINT)
            drawn.append(token)
            yield token

    monkeypatch.setattr(Streamer, "stream", broken)
    try:
        assert main(["sample", str(adapted), "2 3 -> 5"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(drawn) == 3 and capsys.readouterr().err == "deltal: stopped\n"


def test_merging_needs_adapters(whole, tmp_path, capsys):
    assert main(["export", str(whole), "--to", str(tmp_path / "x"), "--merge"]) == 2
    assert "--merge: " in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


REFUSALS = {
    "shape": ({"model.layers": 7}, "model.layers: comes with the checkpoint of model.path"),
    "no folder": ({"model.path": "/no/where"}, "model.path: no folder /no/where"),
    "no path": ({"model.path": None, "lora.rank": 2}, "lora.rank: adapters need a trained model"),
    "revision": ({"model.path": None, "model.revision": "x"}, "model.revision: is that of a hub"),
    "narrow adapters": (
        {"lora.rank": 2, "model.param_dtype": "bfloat16"},
        "model.param_dtype: adapters are trained in float32",
    ),
    "no such target": ({"lora.targets": ["query"]}, "lora.targets[0]: 'query' is not one of"),
    "context": (
        {"rollout.max_response_length": 60, "length_buckets": None},
        "rollout.max_response_length: with the prompt up to 88 tokens, and the model was made for",
    ),
    "twice": ({"lora.targets": ["q_proj", "q_proj"]}, "lora.targets: names a matrix twice"),
    "kernel": ({"model.attention": "splash"}, "model.attention: splash needs a TPU, and"),
    "template": ({"data.chat_template": True}, "data.chat_template: the tokenizer has no default"),
    "long prompts": (
        {"rollout.max_prompt_length": 3},
        "rollout.max_prompt_length: 3 is too short for",
    ),
}


@pytest.mark.parametrize(("fields", "said"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_is_refused_in_one_line(fields, said, checkpoint, experiment, tmp_path):
    bare = shutil.copytree(checkpoint, tmp_path / "bare")
    small_tokenizers.write_folder(bare, "qwen")
    with pytest.raises(UserError) as caught:
        check_setup(make_setup(load_config(experiment, {"model.path": str(bare)} | fields)))
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused(checkpoint, tmp_path):
    config = json.loads((checkpoint / "config.json").read_text()) | {"vocab_size": 300}
    folder = fakes.write_checkpoint(tmp_path / "few", config)
    small_tokenizers.write_folder(folder, "qwen")
    config = dataclasses.replace(Config(), model=ModelConfig(path=str(folder)))
    with pytest.raises(UserError, match=r"has ids up to \d+, but the model has only 300 rows"):
        make_setup(config)
