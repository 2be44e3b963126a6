"""Small real parts that the tests share: models, prompts and rollouts of known content."""

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from deltal_jax.config import load_config
from deltal_jax.data.tokenizer import train_word_tokenizer
from deltal_jax.errors import UserError
from deltal_jax.model.architecture import Architecture
from deltal_jax.model.attention import RopeScaling
from deltal_jax.model.transformer import (
    abstract_params,
    init_model,
    make_graphdef,
    split_model,
)
from deltal_jax.tasks.base import Problem, Verdict
from deltal_jax.training.setup import Setup, make_architecture
from deltal_jax.types import Prompts, Rollout

PLAIN = Architecture(vocab=23, layers=2, d_model=16, heads=2, kv_heads=2, head_dim=8, d_ff=24)
#: Soon compiled, for laws that need many shapes.
SHALLOW = dataclasses.replace(PLAIN, layers=1, kv_heads=1, remat="none")
#: Everything that may differ: grouped heads, a head_dim of its own, tied embeddings, remat off.
GROUPED = Architecture(
    vocab=23,
    layers=5,
    d_model=16,
    heads=4,
    kv_heads=2,
    head_dim=6,
    d_ff=24,
    tied_embeddings=True,
    rope_theta=500.0,
    remat="none",
)
_SMALL = dataclasses.replace(GROUPED, layers=2, tied_embeddings=False)
#: One architecture for each family of models, with all that the family may have.
FAMILIES = {
    "qwen2": dataclasses.replace(
        _SMALL,
        tied_embeddings=True,
        qkv_bias=True,
        sliding_window=4,
        local_layers=(False, True),
    ),
    "qwen3": dataclasses.replace(_SMALL, qk_norm=True),
    "llama": dataclasses.replace(
        _SMALL,
        rope_scaling=RopeScaling(4.0, 1.0, 4.0, original_length=16),
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
    ),
    "gemma3": dataclasses.replace(
        _SMALL,
        layers=5,  # scanned, as no fewer layers are
        tied_embeddings=True,
        rope_scaling=RopeScaling(2.0),
        qk_norm=True,
        activation="gelu_tanh",
        norm_offset=1.0,
        post_norms=True,
        embed_scale=4.0,
        query_scale=0.3,
        sliding_window=3,
        local_layers=(True, True, False, True, True),
        local_rope_theta=100.0,
    ),
}
EOS = 2


@functools.cache
def model(arch: Architecture, seed: int = 0) -> tuple[nnx.GraphDef, Any]:
    """A model whose logits are far from flat, so that sampling has something to decide."""
    if arch in FAMILIES.values():
        return make_graphdef(arch), _drawn(arch, seed)
    graphdef, params = split_model(init_model(arch, jax.random.key(seed)))
    return graphdef, jax.tree.map(lambda x: x * 1.4 if x.ndim > 1 else x, params)


def _drawn(arch: Architecture, seed: int) -> Any:
    """Parameters whose biases are not 0 and whose norms are not where they start."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, x: jax.ShapeDtypeStruct) -> jax.Array:
        drawn, kind = rng.normal(size=x.shape), path[-1].key
        if kind in ("bias", "scale"):
            drawn = 0.3 * drawn + (1.0 - arch.norm_offset) * (kind == "scale")
        else:
            drawn *= 1.4 * (arch.d_model if kind == "embedding" else x.shape[-2]) ** -0.5
        return jnp.asarray(drawn, x.dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(arch))


@functools.cache
def _forward(arch: Architecture) -> Any:
    graphdef = model(arch)[0]

    def logits(params: Any, tokens: Any, positions: Any, segments: Any) -> Any:
        transformer = nnx.merge(graphdef, params)
        return transformer.logits(transformer.hidden(tokens, positions, segments))

    return jax.jit(logits)


def forward(
    arch: Architecture,
    params: Any,
    tokens: np.ndarray,
    positions: np.ndarray | None = None,
    segments: np.ndarray | None = None,
) -> np.ndarray:
    """Logits of whole rows; one segment a row unless said otherwise."""
    if positions is None:
        positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    if segments is None:
        segments = np.zeros_like(tokens)
    rows = (jnp.asarray(x) for x in (tokens, positions, segments))
    return np.asarray(_forward(arch)(params, *rows))


def prompts(count: int, width: int = 6, vocab: int = 23, seed: int = 0, start: int = 0) -> Prompts:
    """Prompts of different lengths."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, width + 1, count).astype(np.int32)
    tokens = rng.integers(3, vocab, (count, width)).astype(np.int32)
    tokens[np.arange(width)[None, :] >= lengths[:, None]] = 0
    positions = np.arange(start, start + count, dtype=np.int32)
    return Prompts(tokens=tokens, lengths=lengths, positions=positions)


def rollout(count: int, longest: int = 30, vocab: int = 23, seed: int = 0) -> Rollout:
    """Responses of very different lengths; every third has a hole in its loss mask."""
    rng = np.random.default_rng(seed)
    prompt_lengths = rng.integers(1, 5, count).astype(np.int32)
    responses = np.clip(np.exp(rng.normal(1.8, 1.0, count)), 1, longest - 5).astype(np.int32)
    lengths = prompt_lengths + responses
    at = np.arange(longest)[None, :]
    mask = (at >= prompt_lengths[:, None]) & (at < lengths[:, None])
    for row in range(0, count, 3):
        if responses[row] > 4:
            mask[row, prompt_lengths[row] + 1 : prompt_lengths[row] + 3] = False
    tokens = np.where(at < lengths[:, None], rng.integers(3, vocab, (count, longest)), 0)
    return Rollout(
        tokens=tokens.astype(np.int32),
        prompt_lengths=prompt_lengths,
        lengths=lengths,
        loss_mask=mask,
        logprobs=np.where(mask, -2.0 + 0.3 * rng.normal(size=mask.shape), 0.0).astype(np.float32),
        truncated=np.zeros(count, bool),
        group_ids=(np.arange(count) // 4).astype(np.int32),
    )


@dataclasses.dataclass(frozen=True)
class Chains:
    """A task whose prompts say how long responses are: most are short, and in between are a few
    long ones, which a model of `chain_setup` ends after about `LONG` words. A response is correct
    if its number of words is even."""

    name: str = "chains"
    LONG: ClassVar[int] = 20

    def vocabulary(self) -> list[str]:
        return ["short", "long", "few", "many"]

    def problem(self, seed: int, position: int) -> Problem:
        del seed
        return Problem("long" if position % 4 == 1 else "short", position)

    def held_out(self, count: int) -> list[Problem]:
        return [self.problem(0, position) for position in range(count)]

    def demonstrations(self, seed: int) -> Iterator[tuple[str, str]]:
        raise NotImplementedError

    def parse_problem(self, text: str) -> Problem:
        raise NotImplementedError

    def verify(self, response: str, answer: Any) -> Verdict:
        del answer
        even = len(response.split()) % 2 == 0
        return Verdict(float(even), even, "", str(even))


def chain_setup(overrides: dict[str, Any]) -> tuple[Setup, Any]:
    """A setup for `Chains`, and parameters of a model in which a token depends on the one before it
    alone: its blocks add nothing."""
    task = Chains()
    options = {
        "model.layers": 1,
        "model.d_model": 8,
        "model.heads": 1,
        "model.head_dim": 4,
        "model.d_ff": 4,
        "rollout.max_prompt_length": 2,
        "rollout.max_response_length": 60,
        "rollout.slots": 6,
        "length_buckets": [62],
        "rl.prompts_per_step": 4,
        "rl.samples_per_prompt": 3,
    }
    config = load_config("countdown-tiny", options | overrides)
    tokenizer = train_word_tokenizer(task.vocabulary())
    architecture = make_architecture(config, tokenizer.vocab_size)
    graphdef = make_graphdef(architecture)
    setup = Setup(config, task, tokenizer, architecture, graphdef, None)
    short, long, few, many = (tokenizer.encode(word, bos=False)[0] for word in task.vocabulary())
    logits = np.full((8, tokenizer.vocab_size), -30.0)
    (eos,) = tokenizer.eos_ids
    ending = 1 / task.LONG
    for before, word, ends in (
        (short, few, 0.5),
        (few, few, 0.5),
        (long, many, 0.0),
        (many, many, ending),
    ):
        logits[before, word], logits[before, eos] = np.log(1 - ends), np.log(max(ends, 1e-13))
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract_params(architecture))
    params["embed"]["embedding"] = jnp.eye(tokenizer.vocab_size, 8)
    params["norm"]["scale"] = jnp.ones(8)
    params["head"]["kernel"] = jnp.asarray(logits * 8**-0.5, jnp.float32)
    return setup, params


_TINY = {
    "vocab_size": 48,
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
}
#: A small `config.json` for each family of models, as transformers 5 writes them.
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2": _TINY
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "qwen2-window": _TINY
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "tie_word_embeddings": False,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "qwen3": _TINY
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "head_dim": 12,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "llama": _TINY
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "llama-linear": _TINY
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    },
    "gemma3": {name: value for name, value in _TINY.items() if name != "hidden_act"}
    | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "tie_word_embeddings": True,
        "num_hidden_layers": 4,
        "head_dim": 12,
        "pad_token_id": 0,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 24,
        "sliding_window": 5,
        "layer_types": [
            "sliding_attention",
            "sliding_attention",
            "full_attention",
            "sliding_attention",
        ],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
}


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that transformers writes for a `config.json`."""
    D, F, V = (config[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    H, K = config["num_attention_heads"], config["num_key_value_heads"]
    d, family = config.get("head_dim", D // H), config["model_type"]
    biased = {
        "qwen2": ("q_proj", "k_proj", "v_proj"),
        "llama": ("q_proj", "k_proj", "v_proj", "o_proj") * config.get("attention_bias", False)
        + ("gate_proj", "up_proj", "down_proj") * config.get("mlp_bias", False),
    }.get(family, ())
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (V, D), "norm.weight": (D,)}
    for layer in range(config["num_hidden_layers"]):
        for name, shape in {
            "self_attn.q_proj": (H * d, D),
            "self_attn.k_proj": (K * d, D),
            "self_attn.v_proj": (K * d, D),
            "self_attn.o_proj": (D, H * d),
            "mlp.gate_proj": (F, D),
            "mlp.up_proj": (F, D),
            "mlp.down_proj": (D, F),
        }.items():
            shapes[f"layers.{layer}.{name}.weight"] = shape
            if name.split(".")[1] in biased:
                shapes[f"layers.{layer}.{name}.bias"] = shape[:1]
        norms = {"input_layernorm": D, "post_attention_layernorm": D}
        if family == "gemma3_text":
            norms |= {"pre_feedforward_layernorm": D, "post_feedforward_layernorm": D}
        if family in ("qwen3", "gemma3_text"):
            norms |= {"self_attn.q_norm": d, "self_attn.k_norm": d}
        for name, size in norms.items():
            shapes[f"layers.{layer}.{name}.weight"] = (size,)
    shapes = {f"model.{name}": shape for name, shape in shapes.items()}
    return shapes if config["tie_word_embeddings"] else shapes | {"lm_head.weight": (V, D)}


def checkpoint_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors of a checkpoint, the same ones for ever: matrices that keep the size of what
    they turn, biases and norms far from where training starts."""
    # The stream of RandomState is frozen; that of a Generator may change with numpy.
    random = np.random.RandomState(seed)
    start = 0.0 if config["model_type"] == "gemma3_text" else 1.0
    tensors = {}
    for name, shape in sorted(tensor_shapes(config).items()):
        drawn = random.standard_normal(shape)
        if len(shape) == 2:
            tensors[name] = drawn * shape[1] ** -0.5 * 1.4
        else:
            tensors[name] = 0.3 * drawn + (start if "norm" in name else 0.0)
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def write_checkpoint(
    folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray] | None = None
) -> Path:
    """A Hugging Face folder with one safetensors file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = checkpoint_tensors(config) if tensors is None else tensors
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def config_refusal(overrides: dict[str, Any]) -> str:
    """The one line with which `countdown-tiny` is refused under overrides."""
    with pytest.raises(UserError) as refused:
        load_config("countdown-tiny", overrides)
    assert "\n" not in str(refused.value)
    return str(refused.value)
