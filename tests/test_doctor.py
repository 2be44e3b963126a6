"""The doctor finds a sound run sound, and each of its rungs fails for a fault of its own."""

import copy
import dataclasses
import json
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deltal_jax import Reward, train
from deltal_jax.analysis.guide import find_entry
from deltal_jax.cli.main import main
from deltal_jax.config import ModelConfig
from deltal_jax.config.rules import SHAPE
from deltal_jax.guard import checkup, doctor, patient
from deltal_jax.guard.doctor import examine, longest_repetition
from deltal_jax.guard.ladder import begin_with
from deltal_jax.metrics import load_metrics
from deltal_jax.training import loop, policy
from tests import fakes, small_tokenizers
from tests.runs import TINY, mixed_reward

#: Of as many programs as a run has, nearly every part that writes metrics, and a dump.
OPTIONS = TINY | {
    "sft.steps": 150,
    "sft.tokens_per_batch": 128,
    "sft.optimizer.learning_rate": 0.01,
    "rl.steps": 2,
    "rl.optimizer.learning_rate": 1e-3,
    "rl.optimizer.warmup_steps": 0,
    "objective.kl_coefficient": 0.05,
    "objective.old_logprobs": "recompute",
    "objective.importance_correction": "token_truncate",
    "task.overlong_buffer": 2,
    "rollout.dynamic_sampling": "reward",
    "rollout.partial": True,
    "rollout.oversampling": 1.5,
    "rollout.ahead": 1,
    "guard.dump_steps": [2],
    "model.compute_dtype": "float32",
}
#: Beside a small Qwen2.
ADAPTERS = {k: v for k, v in TINY.items() if not k.startswith("model.")} | {
    **{f"model.{name}": getattr(ModelConfig(), name) for name in SHAPE},
    "sft.steps": 0,
    "rl.steps": 2,
    "lora.rank": 2,
    "rollout.max_prompt_length": 28,
    "rollout.max_response_length": 12,
    "length_buckets": [40],
    "objective.kl_coefficient": 0.05,
    "rl.optimizer.learning_rate": 1e-2,
}
RL = ("first update", "weights", "learns", "replay")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examined") / "run"
    rewards = ["task", Reward(mixed_reward)]
    train("countdown-tiny", OPTIONS | {"run.dir": str(folder)}, rewards=rewards, quiet=True)
    return folder


@pytest.fixture(scope="module")
def examined(run):
    """The rungs of the sound run by name, its checkpoint, and its files before."""
    before = contents(run)
    rungs, trained = examine(run, {})
    assert contents(run) == before
    return {rung.name: rung for rung in rungs}, trained


@pytest.fixture(scope="module")
def known(run, examined):
    """The checkpoint with its fresh rollout, to be copied."""
    known = patient.Patient(run, examined[1])
    known.step  # noqa: B018
    known.before  # noqa: B018
    return known


@pytest.fixture
def ill(known):
    """The same, with what was measured so far, for a test to spoil."""
    return copy.copy(known)


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def verdicts(rung):
    return {figure.name: figure.verdict for figure in rung.figures}


def failed(rung):
    """The figures that failed; each says what to do."""
    assert all(figure.remedy for figure in rung.figures if figure.verdict != "ok")
    return [figure.name for figure in rung.figures if figure.verdict == "failed"]


def test_a_sound_run_has_no_rung_that_fails_and_its_metrics_are_in_the_guide(run, examined):
    rungs, _ = examined
    assert [*rungs] == ["files", "coherent text", "log-probabilities", *RL, "curves"]
    assert not [name for name, rung in rungs.items() if rung.verdict not in ("ok", "look")]
    for name in ("log-probabilities", "first update", "weights", "learns", "replay"):
        assert set(verdicts(rungs[name]).values()) <= {"ok", "n/a"}, rungs[name]
    update = verdicts(rungs["first update"])
    assert "KL to the reference" in update and "loss against its closed form" in update
    assert "step-000002-update-1" in rungs["replay"].figures[0].name
    written = set().union(*load_metrics(run / "metrics.jsonl")) - {"step", "phase"}
    assert {"policy/kl", "rollout/stale_frac", "eval/countdown/pass_at_2"} <= written
    assert not [name for name in sorted(written) if find_entry(name) is None]


def test_the_command_shows_all_rungs_and_names_the_first_that_fails(
    run, examined, capsys, monkeypatch
):
    rungs, trained = examined
    sound, worst = [*rungs.values()], dataclasses.replace(rungs["weights"], figures=[broken()])
    monkeypatch.setattr(doctor, "examine", lambda *_: (sound, trained))
    assert main(["debug", "doctor", str(run), "--step", "2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{run}, rl step 2\n") and all(name in out for name in rungs)
    monkeypatch.setattr(doctor, "examine", lambda *_: ([*sound[:4], worst, *sound[5:]], trained))
    assert main(["debug", "doctor", str(run)]) == 1
    assert capsys.readouterr().out.endswith(
        "begin with rung 5, weights: those after it stand on it\n"
    )
    assert main(["debug", "doctor", str(run), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["begin_with"], found["step"], len(found["rungs"])) == ("weights", 2, 8)
    assert found["rungs"][4]["figures"][0]["value"] == "nan"


def broken():
    return checkup.at_most("x", float("nan"), 1.0, remedy="do something")


def test_what_is_no_run_or_no_step_of_it_is_bad_input(run, tmp_path, capsys):
    assert main(["debug", "doctor", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    assert main(["debug", "doctor", str(run), "--step", "7"]) == 2
    assert "has no checkpoint after RL step 7" in capsys.readouterr().err


def test_damage_is_found_and_the_intact_checkpoint_is_examined(run, tmp_path, monkeypatch):
    folder = shutil.copytree(run, tmp_path / "run")
    monkeypatch.setattr(doctor, "_examine", lambda own, *_: [own.trained.position.step])
    newest = folder / "checkpoints" / "152"
    largest = max(newest.rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with (folder / "metrics.jsonl").open("r+b") as file:
        file.truncate((folder / "metrics.jsonl").stat().st_size // 2)
    (files, step, curves), _ = examine(folder, {})
    assert step == 1 and curves.figures
    assert failed(files) == ["damaged ones", "bytes of metrics that are lost"]
    (folder / "summary.json").write_text("{")
    (folder / "config.yaml").write_text("rl: [")
    rungs, trained = examine(folder, {})
    assert trained is None and [rung.verdict for rung in rungs] == [
        "failed",
        *["n/a"] * 6,
        "failed",
    ]
    assert failed(rungs[0])[0] == "config" and begin_with(rungs) is rungs[0]


def test_without_a_checkpoint_that_loads_the_files_fail_and_the_curves_are_judged(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    for manifest in folder.glob("checkpoints/*/manifest.json"):
        manifest.write_text(manifest.read_text().replace("params", "parens"))
    rungs, trained = examine(folder, {})
    assert trained is None and "the checkpoint" in failed(rungs[0])
    assert [rung.verdict for rung in rungs[1:]] == ["n/a"] * 6 + [rungs[-1].verdict]
    assert rungs[-1].figures


def test_a_model_that_says_one_token_for_ever_fails_the_text(ill):
    embed, head = (jax.tree.map(lambda x: 0 * x, ill.params[x]) for x in ("embed", "head"))
    ill.params = ill.params | {"embed": embed, "head": head}  # all logits are 0
    rung = doctor.text(ill)
    assert "share that repeats itself, greedy" in failed(rung)
    assert rung.notes[1].startswith("greedy: '")


def test_responses_that_do_not_end_or_cannot_be_read_fail_the_text(ill):
    problems = ill.setup.task.held_out(3)
    (eos,) = ill.setup.tokenizer.eos_ids
    _, shown = next(ill.setup.task.demonstrations(0))
    ended, endless = [eos], ill.setup.tokenizer.encode(shown, bos=False)

    def spoken(*responses, kind="temperature 1"):
        said = [np.asarray(tokens) for tokens in responses]
        figures, _ = doctor._spoken(ill.setup, problems[: len(said)], said, kind)
        return [figure.verdict for figure in figures[:3]]

    assert spoken(endless, endless) == ["failed", "ok", "look"]
    assert spoken(ended, ended) == ["ok", "failed", "look"]
    assert spoken(ended, endless, endless) == ["look", "ok", "look"]
    assert spoken(ended, kind="greedy") == ["ok", "look", "look"]


def test_parameters_changed_after_sampling_fail_the_log_probabilities(ill):
    ill.params = jax.tree.map(lambda x: 1.3 * x, ill.params)
    del ill.__dict__["before"]
    assert failed(checkup.logprobs(ill)) == ["mean |Δ log p|", "largest |Δ log p|"]


def test_a_sampler_of_another_temperature_fails_the_log_probabilities(run, examined, monkeypatch):
    own = patient.make_local_engine

    def colder(setup, *, temperature):
        return own(setup, temperature=0.5 * temperature)

    monkeypatch.setattr(patient, "make_local_engine", colder)
    ill = patient.Patient(run, examined[1])
    assert "mean |Δ log p|" in failed(checkup.logprobs(ill))


def test_a_mean_of_each_micro_batch_fails_the_first_update(ill, monkeypatch):
    """The classic fault: a token mean by micro-batch, which a sum of them is not."""
    make = policy.make_minibatches

    def local(*arguments, **options):
        return [
            [dataclasses.replace(b, weights=b.weights / b.loss_mask.sum()) for b in buckets]
            for buckets in make(*arguments, **options)
        ]

    monkeypatch.setattr(policy, "make_minibatches", local)
    del ill.__dict__["step"]
    found = failed(checkup.first_update(ill, []))
    assert [name.split(" (")[0] for name in found] == [
        "loss against its closed form",
        "gradient in another split",
    ]


def test_parameters_stored_in_less_round_the_gradient_of_each_micro_batch(ill):
    model = dataclasses.replace(ill.config.model, param_dtype="bfloat16")
    ill.config = dataclasses.replace(ill.config, model=model)
    ill.params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), ill.params)
    grads = ill.update.accumulate(ill.params, ill.step[0]).grads
    norm = float(optax.tree.norm(grads))
    figure = checkup._split(ill, grads, norm)
    assert checkup.SPLIT_ERROR["float32"][0] < figure.value and figure.verdict == "ok"


def test_stale_log_probabilities_and_another_reference_fail_the_first_update(ill):
    moved = np.where(ill.rollout.loss_mask, ill.before - 2.0, 0.0).astype(np.float32)
    ill.batch = dataclasses.replace(ill.batch, old_logprobs=moved, reference_logprobs=moved)
    del ill.__dict__["step"]
    found = failed(checkup.first_update(ill, [1e-9]))
    assert found[:3] == ["|largest ratio − 1|", "clipped share of the tokens", "|approximate KL|"]
    assert "KL to the reference" in found and "loss against its closed form" in found


def test_a_gradient_far_from_the_runs_own_is_worth_a_look(ill):
    rung = checkup.first_update(ill, [1e9, 1e9, 1.0])
    assert rung.verdict == "look" and not failed(rung)


@pytest.mark.parametrize("fault", ["scale", "shape"])
def test_weights_that_are_not_the_formulas_fail(ill, monkeypatch, fault):
    weigh = policy.weigh

    def wrong(config, rollout, rewards, alpha):
        found = weigh(config, rollout, rewards, alpha)
        factor = 1.1 if fault == "scale" else 1.0 / found.weights
        shaped = found.weights * factor
        if fault == "shape":  # those of constant lengths: the same sum
            shaped *= found.weights.sum() / shaped.sum()
        return dataclasses.replace(found, weights=shaped.astype(np.float32))

    monkeypatch.setattr(policy, "weigh", wrong)
    del ill.__dict__["step"]
    wanted = {
        "scale": ["|M Σ w − 1|", "bias factor against M Σ w, relative", "w ∝ L^-1, relative error"],
        "shape": ["w ∝ L^-1, relative error"],
    }
    assert failed(checkup.weights(ill)) == wanted[fault]


def test_a_gradient_of_the_wrong_sign_does_not_learn(ill, monkeypatch):
    apply = ill.update.apply

    def uphill(state, found):
        grads = jax.tree.map(jnp.negative, found.grads)
        return apply(state, dataclasses.replace(found, grads=grads))

    monkeypatch.setattr(ill.update, "apply", uphill)
    assert failed(checkup.learns(ill)) == ["Σ w A Δ log p a token"]


def test_a_tampered_dump_and_a_sampler_without_a_seed_fail_the_replay(ill, run, tmp_path):
    folder = shutil.copytree(run / "dumps", tmp_path / "dumps").parent
    record = folder / "dumps" / "step-000002-update-1" / "record.json"
    found = json.loads(record.read_text())
    found["reports"][0]["loss"] = np.nextafter(found["reports"][0]["loss"], 1.0)
    record.write_text(json.dumps(found))
    ill.folder = folder
    assert len(failed(doctor.again(ill, {}))) == 1
    shutil.rmtree(folder / "dumps")
    assert doctor.again(ill, {}).verdict == "ok"
    ill.key = jax.random.key(5)
    assert failed(doctor.again(ill, {})) == [
        "tokens of two rollouts that differ",
        "their log-probabilities that differ",
    ]


def test_a_collapsed_entropy_fails_the_curves(run, examined):
    lines = load_metrics(run / "metrics.jsonl")
    (first, *_) = [line for line in lines if line["phase"] == "rl"]
    collapsed = [first | {"policy/entropy": 1.0 / step} for step in range(1, 40)]
    rung = doctor.curves(run, examined[1].setup.config, collapsed)
    assert failed(rung) == ["policy/entropy, last steps of the highest"]
    assert doctor.curves(run, None, []).reason == "the run has no metrics yet"


def test_a_check_that_breaks_has_failed_and_the_others_go_on(examined, monkeypatch, run):
    def breaks(*_):
        raise ValueError("a line\nand another")

    for module, name in ((doctor, "text"), (checkup, "learns"), (checkup, "first_update")):
        monkeypatch.setattr(module, name, breaks)
    own = patient.Patient(run, examined[1])
    rungs = {rung.name: rung for rung in doctor._examine(own, {}, [])}
    assert rungs["learns"].figures[0].value == "a line and another"
    assert [rung.verdict for rung in rungs.values()][:3] == ["failed", "ok", "failed"]
    assert rungs["weights"].verdict == rungs["replay"].verdict == "ok"


def test_of_a_run_in_its_warm_up_the_rungs_of_rl_are_not_applicable(tmp_path, monkeypatch):
    batches = loop.demonstration_batches

    def stopping(*arguments):
        for number, batch in enumerate(batches(*arguments)):
            if number == 3:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    monkeypatch.setattr(loop, "demonstration_batches", stopping)
    folder = tmp_path / "run"
    assert train("countdown-tiny", OPTIONS | {"run.dir": str(folder)}, quiet=True).status == (
        "interrupted"
    )
    rungs, trained = examine(folder, {})
    assert trained is not None and trained.position.phase == "sft"
    found = {rung.name: rung for rung in rungs}
    assert all("of the warm-up" in found[name].reason for name in RL)
    assert found["log-probabilities"].verdict == "ok" and found["coherent text"].figures


def test_the_longest_repetition():
    rng = np.random.default_rng(0)
    noise = rng.permutation(50)
    assert longest_repetition(noise) == longest_repetition(noise[:0]) == 0
    assert longest_repetition(np.asarray([1, 1])) == 0 < longest_repetition(np.asarray([1, 1, 1]))
    part = np.tile([51, 52, 53, 54], 5)
    assert longest_repetition(np.concatenate([noise, part, noise])) == 20
    assert longest_repetition(np.concatenate([noise, part[:8], noise])) == 0


@pytest.mark.slow
def test_a_run_with_adapters_is_examined_too(tmp_path):
    small_tokenizers.write_folder(tmp_path / "base", "qwen")
    fakes.write_checkpoint(tmp_path / "base", fakes.CONFIGS["qwen2"] | {"vocab_size": 600})
    options = ADAPTERS | {"model.path": str(tmp_path / "base"), "run.dir": str(tmp_path / "run")}
    train("countdown-tiny", options, rewards=[Reward(mixed_reward)], quiet=True)
    rungs, _ = examine(tmp_path / "run", {})
    found = {rung.name: rung for rung in rungs}
    for name in ("files", "log-probabilities", "first update", "learns", "replay"):
        assert found[name].verdict == "ok", found[name]
    assert "KL to the reference" in verdicts(found["first update"])
    moved = (tmp_path / "base").rename(tmp_path / "moved")
    rungs, _ = examine(tmp_path / "run", {})
    assert failed(rungs[0]) == ["the checkpoint"] and rungs[1].verdict == "n/a"
    assert examine(tmp_path / "run", {"model.path": str(moved)})[1] is not None
