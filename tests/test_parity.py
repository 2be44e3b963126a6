"""The same numbers as transformers, for small random models of every family.

    python -m tests.test_parity

writes `data/families.npz` anew: the logits that transformers gives for the checkpoints of
`fakes.CONFIGS`, with which test_families.py checks the decoder where torch is not installed.
"""

import dataclasses
import functools
import tempfile
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deltal_jax.model import huggingface
from deltal_jax.model.architecture import Architecture
from deltal_jax.model.huggingface import (
    export,
    export_adapters,
    load_architecture,
    load_params,
    read_config,
)
from deltal_jax.model.lora import TARGETS, LoRA, merge_adapters, overlay, trained
from deltal_jax.model.transformer import abstract_params, make_graphdef, parameter_count
from deltal_jax.rollout.engine import Engine, SamplingOptions
from deltal_jax.types import Prompts
from tests import fakes
from tests.test_families import GOLDENS, OLD_FORMS

REASON = (
    "parity needs the extra `parity` (torch, transformers, peft); goldens are in test_families.py"
)
torch = pytest.importorskip("torch", reason=REASON)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers", reason=REASON)
    peft = pytest.importorskip("peft", reason=REASON)

torch.set_num_threads(1)  # more would spin where other tests run beside

BASE = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.15,
)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", BASE | dict(tie_word_embeddings=True)),
    "qwen2-window": (
        "Qwen2",
        BASE
        | dict(
            tie_word_embeddings=False,
            use_sliding_window=True,
            sliding_window=8,
            max_window_layers=1,
        ),
    ),
    "qwen3": ("Qwen3", BASE | dict(head_dim=16, tie_word_embeddings=False)),
    "llama": (
        "Llama",
        BASE
        | dict(
            attention_bias=True,
            mlp_bias=True,
            rope_parameters=dict(
                rope_type="llama3",
                rope_theta=5e5,
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=32,
            ),
        ),
    ),
    "llama-linear": (
        "Llama",
        BASE | dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0)),
    ),
    "gemma3": (
        "Gemma3",
        BASE
        | dict(
            num_hidden_layers=7,  # local and global ones, and a remainder
            head_dim=16,
            sliding_window=8,
            query_pre_attn_scalar=24,
            pad_token_id=0,
        ),
    ),
}
#: Rows of different lengths; longer than any window.
LENGTHS = np.asarray([40, 23, 31])
WIDTH = 40
TOKENS = np.random.default_rng(0).integers(1, 97, (3, WIDTH)).astype(np.int32)
REAL = np.arange(WIDTH)[None, :] < LENGTHS[:, None]


@dataclasses.dataclass(frozen=True)
class Case:
    """One model of theirs, and ours as it was loaded from their folder."""

    folder: Path
    theirs: Any
    arch: Architecture
    params: Any


def named(kind: str) -> Any:
    return getattr(transformers, f"{kind}ForCausalLM")


@functools.cache
def _case(name: str, folder: Path) -> Case:
    kind, fields = CASES[name]
    config = getattr(transformers, "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config")
    torch.manual_seed(0)
    theirs = named(kind)(config(**fields)).float().eval()
    for parameter_name, parameter in theirs.named_parameters():
        if "bias" in parameter_name or "norm" in parameter_name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    theirs.save_pretrained(folder / name)
    arch = load_architecture(folder / name)
    return Case(folder / name, theirs, arch, load_params(folder / name, arch))


@pytest.fixture(scope="module", autouse=True)
def exact():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory) -> Case:
    return _case(request.param, Path(tmp_path_factory.getbasetemp()) / "theirs")


def their_logits(model: Any, tokens: np.ndarray, real: np.ndarray | None = None) -> np.ndarray:
    options = {}
    if real is not None:
        at = np.maximum(np.cumsum(real, axis=1) - 1, 0)
        options = {"attention_mask": torch.tensor(real), "position_ids": torch.tensor(at)}
    with torch.no_grad():
        return model(torch.tensor(tokens).long(), **options).logits.float().numpy()


def left(rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Right-padded rows, left-padded."""
    return np.stack([np.roll(row, len(row) - n) for row, n in zip(rows, lengths, strict=True)])


@functools.cache
def _value_and_gradient(arch: Architecture) -> Any:
    graphdef = make_graphdef(arch)
    positions = jnp.broadcast_to(jnp.arange(WIDTH), TOKENS.shape)
    scored, targets = jnp.asarray(REAL[:, 1:]), jnp.asarray(TOKENS[:, 1:, None])

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graphdef, params)
        hidden = model.hidden(jnp.asarray(TOKENS), positions, jnp.zeros(TOKENS.shape, int))
        logits = model.logits(hidden)
        logprobs = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
        chosen = jnp.take_along_axis(logprobs, targets, axis=-1)[..., 0]
        return jnp.sum(jnp.where(scored, chosen, 0.0)), logits

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def test_logits_are_theirs(case):
    (_, got), _ = _value_and_gradient(case.arch)(case.params)
    want = their_logits(case.theirs, TOKENS)
    assert np.abs(want).max() > 1
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)


def test_right_padding_here_is_left_padding_there(case):
    (_, got), _ = _value_and_gradient(case.arch)(case.params)
    theirs = their_logits(case.theirs, left(TOKENS * REAL, LENGTHS), left(REAL, LENGTHS))
    for row, length in enumerate(LENGTHS):
        want = theirs[row, WIDTH - length :]
        np.testing.assert_allclose(got[row, :length], want, rtol=0, atol=2e-5)


def test_rows_packed_into_one_give_what_each_gives_there_alone(case):
    packed = np.concatenate([TOKENS[1, :23], TOKENS[2, :17]])[None]
    positions = np.concatenate([np.arange(23), np.arange(17)])[None]
    segments = np.repeat([4, 9], [23, 17])[None]
    got = fakes.forward(case.arch, case.params, packed, positions, segments)[0]
    want = [their_logits(case.theirs, TOKENS[r : r + 1, :n])[0] for r, n in ((1, 23), (2, 17))]
    np.testing.assert_allclose(got, np.concatenate(want), rtol=0, atol=2e-5)


def test_gradients_of_all_parameters_are_theirs(case):
    (value, _), gradient = _value_and_gradient(case.arch)(case.params)
    case.theirs.zero_grad()
    logits = case.theirs(torch.tensor(TOKENS).long()).logits
    logprobs = torch.log_softmax(logits[:, :-1], dim=-1)
    chosen = logprobs.gather(-1, torch.tensor(TOKENS[:, 1:, None]).long())[..., 0]
    loss = (chosen * torch.tensor(REAL[:, 1:])).sum()
    loss.backward()
    assert float(value) == pytest.approx(loss.item(), rel=1e-5)
    want = {name: p.grad.numpy() for name, p in case.theirs.named_parameters()}
    got = dict(huggingface._tensors(gradient, case.arch, jnp.float32))
    assert got.keys() == want.keys()
    errors = {
        name: np.linalg.norm(got[name] - want[name]) / np.linalg.norm(want[name]) for name in want
    }
    assert max(errors.values()) < 1e-4, errors


@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
def test_bf16_is_at_most_twice_as_far_from_f32_as_theirs(case, stored):
    """Weights that are stored in bfloat16, and such that are cast to it where they are used."""
    params = load_params(case.folder, case.arch, dtype=stored)
    arch = dataclasses.replace(case.arch, compute_dtype="bfloat16")
    exact = their_logits(case.theirs, TOKENS)
    low = named(CASES[case.folder.name][0]).from_pretrained(case.folder, dtype=torch.bfloat16)
    theirs = np.abs(their_logits(low.eval(), TOKENS) - exact)
    got = fakes.forward(arch, params, TOKENS)
    assert got.dtype == np.float32  # of bfloat16 products, but not rounded to it
    ours = np.abs(got - exact)
    assert 1e-3 < ours.max() <= 2 * theirs.max(), (ours.max(), theirs.max())
    assert ours.mean() <= 2 * theirs.mean()


def test_64_greedy_tokens_of_prompts_of_three_lengths_are_theirs(case):
    lengths = np.asarray([12, 5, 9], np.int32)
    real = np.arange(12)[None, :] < lengths[:, None]
    prompts = (TOKENS[:, :12] * real).astype(np.int32)
    with torch.no_grad():
        generated = case.theirs.generate(
            torch.tensor(left(prompts, lengths)).long(),
            attention_mask=torch.tensor(left(real, lengths)).long(),
            generation_config=transformers.GenerationConfig(
                max_new_tokens=64, do_sample=False, pad_token_id=0
            ),
        )
    want = generated.numpy()[:, 12:]
    assert want.shape == (3, 64)
    options = SamplingOptions(slots=2, max_response_length=64, eos_ids=(), temperature=0.0)
    given = Prompts(tokens=prompts, lengths=lengths, positions=np.arange(3, dtype=np.int32))
    engine = Engine(make_graphdef(case.arch), options)
    key = jax.random.key(0, impl="threefry2x32")
    rollout, _ = engine.generate(case.params, given, key, samples=1)
    got = [rollout.tokens[i, n : n + 64] for i, n in enumerate(lengths)]
    np.testing.assert_array_equal(got, want)
    assert len(set(want.ravel().tolist())) > 5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_round_trip_through_several_shards_keeps_every_bit(case, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 20_000)
    kind = CASES[case.folder.name][0]
    theirs = named(kind).from_pretrained(case.folder, dtype=getattr(torch, dtype))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=15_000)
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    params = load_params(tmp_path / "theirs", case.arch, dtype=dtype)
    export(
        tmp_path / "ours",
        params,
        case.arch,
        config=read_config(tmp_path / "theirs"),
        dtype=jnp.dtype(dtype),
    )
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    again, info = named(kind).from_pretrained(
        tmp_path / "ours", dtype="auto", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.dtype == getattr(torch, dtype)
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    fields = {"_name_or_path", "dtype", "torch_dtype"}
    ours, original = (m.config.to_dict() for m in (again, theirs))
    assert {k: v for k, v in ours.items() if k not in fields} == {
        k: v for k, v in original.items() if k not in fields
    }


@pytest.mark.parametrize("arch", [fakes.GROUPED, fakes.FAMILIES["qwen3"]], ids=["llama", "qwen3"])
def test_a_model_that_came_from_no_checkpoint_gives_the_same_logits_there(arch, tmp_path):
    params = fakes.model(arch)[1]
    export(tmp_path / "ours", params, arch, dtype=jnp.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    tokens = TOKENS % 23
    want = their_logits(theirs.eval(), tokens)
    size = np.abs(want).max()  # these weights are sharpened: logits of many times those above
    np.testing.assert_allclose(
        fakes.forward(arch, params, tokens), want, rtol=0, atol=2e-5 * max(1.0, size)
    )
    assert theirs.num_parameters() == parameter_count(arch)


@pytest.mark.parametrize("name", ["qwen2-window", "llama", "llama-linear", "gemma3"])
def test_a_config_in_the_old_form_means_the_same_to_both(name, tmp_path):
    config = {k: v for k, v in fakes.CONFIGS[name].items() if k != "rope_parameters"}
    config |= OLD_FORMS[name]
    folder = fakes.write_checkpoint(
        tmp_path, {key: value for key, value in config.items() if value is not None}
    )
    # In float64: with these sharpened weights float32 costs them as much as us, 1.6e-5.
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    arch = load_architecture(folder)
    got = fakes.forward(arch, load_params(folder, arch), TOKENS % 48)
    want = their_logits(theirs.eval(), TOKENS % 48)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), tuple(TARGETS)], ids=["two", "all"])
def test_adapters_and_what_they_merge_into_give_the_same_logits_in_peft(case, targets, tmp_path):
    lora = LoRA(rank=3, alpha=6.0, targets=targets)
    arch = dataclasses.replace(case.arch, lora=lora)
    random = np.random.default_rng(0)
    adapters = jax.tree.map(
        lambda x: jnp.asarray(random.normal(size=x.shape) * 0.1, jnp.float32),
        trained(abstract_params(arch)),
    )
    params = overlay(case.params, adapters)
    got = fakes.forward(arch, params, TOKENS)
    export_adapters(tmp_path / "adapters", params, arch, base=str(case.folder))
    fresh = named(CASES[case.folder.name][0]).from_pretrained(case.folder)
    theirs = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapters").eval()
    assert np.abs(got - their_logits(case.theirs, TOKENS)).max() > 0.1
    np.testing.assert_allclose(got, their_logits(theirs, TOKENS), rtol=0, atol=3e-5)
    read = peft.PeftConfig.from_pretrained(tmp_path / "adapters")
    assert (read.r, read.lora_alpha, read.target_modules) == (3, 6, set(targets))
    merged = theirs.merge_and_unload().state_dict()
    ours = dict(huggingface._tensors(merge_adapters(params, lora), case.arch, jnp.float32))
    for name, tensor in ours.items():
        np.testing.assert_allclose(tensor, merged[name].numpy(), rtol=0, atol=1e-6)


def test_the_defaults_of_absent_fields_are_theirs():
    """Those with which test_families.py expects an incomplete config to be read."""
    qwen2, qwen3, gemma = (
        getattr(transformers, f"{name}Config")() for name in ("Qwen2", "Qwen3", "Gemma3Text")
    )
    assert (qwen2.max_window_layers, qwen2.use_sliding_window, qwen3.head_dim) == (28, False, 128)
    window = transformers.Qwen2Config(use_sliding_window=True).sliding_window
    assert (window, gemma.sliding_window) == (4096, 4096)
    assert (gemma.head_dim, gemma.query_pre_attn_scalar) == (256, 256)
    assert (gemma.hidden_activation, gemma.tie_word_embeddings) == ("gelu_pytorch_tanh", True)
    assert not (qwen2.tie_word_embeddings or qwen3.tie_word_embeddings)


def goldens() -> dict[str, np.ndarray]:
    """Tokens, and the logits that transformers gives for each checkpoint of `fakes.CONFIGS`."""
    tokens = np.random.RandomState(1).randint(1, 48, (2, 20))
    found = {"tokens": tokens.astype(np.int32)}
    for name, config in fakes.CONFIGS.items():
        with tempfile.TemporaryDirectory() as folder:
            fakes.write_checkpoint(Path(folder), config)
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True
            )
            assert not any(info[key] for key in ("missing_keys", "unexpected_keys")), info
            found[name] = their_logits(model.eval(), tokens)
    return found


def test_the_committed_goldens_are_what_transformers_gives():
    with np.load(GOLDENS) as committed:
        fresh = goldens()
        assert committed.keys() == fresh.keys()
        for name, want in fresh.items():
            np.testing.assert_allclose(committed[name], want, rtol=0, atol=5e-6)


if __name__ == "__main__":
    np.savez_compressed(GOLDENS, **goldens())
