"""Model families as data: a Hugging Face `config.json` to our architecture and tensor names.

One decoder serves them all. What differs is in `Architecture`: biases, normalisation of queries and
keys, rotary scaling, sliding windows, scales. Names and shapes on disk are in `tensor_names`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from deltal_jax.errors import UserError
from deltal_jax.model.architecture import Architecture
from deltal_jax.model.attention import RopeScaling

Config = dict[str, Any]

#: Activations, by their names in `config.json` (`hidden_act`, or Gemma's `hidden_activation`).
ACTIVATION_NAMES = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def architecture_of(config: Config) -> Architecture:
    """The architecture that a `config.json` describes, in its old or new form.

    Raises UserError, naming what is supported, for an unknown architecture, a mixture of experts,
    quantised weights, an activation or a rope type that the decoder does not have, and for a config
    that lacks a field.
    """
    _check_types(config)
    names = config.get("architectures") or ["none"]
    family = next((FAMILIES[name] for name in names if name in FAMILIES), None)
    if family is None:
        raise UserError(
            f"model.path: architecture {names[0]} is not supported; supported are "
            f"{', '.join(FAMILIES)}"
        )
    if config.get("quantization_config") is not None:
        raise UserError("model.path: the weights are quantised; use a checkpoint in bf16 or f32")
    if any(config.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise UserError(
            "model.path: a mixture of experts is not supported; supported are "
            f"{', '.join(FAMILIES)}"
        )
    try:
        arch = family(config)
    except KeyError as error:
        raise UserError(f"model.path: config.json has no field {error}") from None
    if arch.heads % arch.kv_heads:
        raise UserError(
            f"model.path: config.json: num_key_value_heads {arch.kv_heads} does not divide "
            f"num_attention_heads {arch.heads}"
        )
    if arch.head_dim % 2:
        raise UserError(f"model.path: config.json: head_dim {arch.head_dim} is not even")
    return arch


#: Fields of config.json by what they must be, where they are there.
COUNTS = (
    *("vocab_size", "num_hidden_layers", "hidden_size", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "intermediate_size", "sliding_window", "max_position_embeddings"),
    *("sliding_window_pattern", "_sliding_window_pattern", "original_max_position_embeddings"),
)
NUMBERS = (
    *("rms_norm_eps", "rope_theta", "factor", "low_freq_factor", "high_freq_factor"),
    *("rope_local_base_freq", "query_pre_attn_scalar"),
)
FLAGS = (
    *("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"),
    *("use_bidirectional_attention",),
)
#: Fields that may be null, which is as if they were not there.
OPTIONAL = (
    *("head_dim", "num_key_value_heads", "sliding_window", "max_position_embeddings"),
    *("use_bidirectional_attention", "sliding_window_pattern", "_sliding_window_pattern"),
)
LAYER_TYPES = ("full_attention", "sliding_attention")


def _check_types(config: Config, prefix: str = "") -> None:
    """Raises UserError, naming it, for a field of another type than it must have."""

    def refuse(name: str, wanted: str, found: Any) -> None:
        raise UserError(f"model.path: config.json: {prefix}{name} must be {wanted}, got {found!r}")

    for name, found in config.items():
        if found is None and name in OPTIONAL:
            continue
        if name in COUNTS and not _is_positive(found, int):
            refuse(name, "a whole number of at least 1", found)
        if name in NUMBERS and not _is_positive(found, int | float):
            refuse(name, "a number above 0", found)
        if name in FLAGS and type(found) is not bool:
            refuse(name, "true or false", found)
        # Gemma's rope_parameters have an object for each type of layer.
        ropes = LAYER_TYPES if prefix else ("rope_parameters", "rope_scaling")
        if name in ropes and isinstance(found, dict):
            _check_types(found, f"{prefix}{name}.")
        elif name in ropes and (found is not None or prefix):
            refuse(name, "an object", found)
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        refuse("architectures", "a list of names", names)
    kinds = config.get("layer_types")
    if kinds is None or prefix:
        return
    known = isinstance(kinds, list) and all(kind in LAYER_TYPES for kind in kinds)
    if not known or len(kinds) != config.get("num_hidden_layers"):
        refuse("layer_types", f"a list of {' or '.join(LAYER_TYPES)}, one a layer", kinds)


def _is_positive(found: Any, kind: Any) -> bool:
    return isinstance(found, kind) and not isinstance(found, bool) and 0 < found < math.inf


def _common(config: Config) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    return dict(
        vocab=config["vocab_size"],
        layers=config["num_hidden_layers"],
        d_model=config["hidden_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        d_ff=config["intermediate_size"],
        norm_epsilon=config["rms_norm_eps"],
        activation=_activation(config),
    )


def _activation(config: Config) -> str:
    name = config.get("hidden_activation") or config.get("hidden_act") or "silu"
    if not isinstance(name, str) or name not in ACTIVATION_NAMES:
        raise UserError(
            f"model.path: activation {name!r} is not supported; supported are "
            f"{', '.join(ACTIVATION_NAMES)}"
        )
    return ACTIVATION_NAMES[name]


def _rope(parameters: Config) -> tuple[float, RopeScaling | None]:
    """Base and scaling from `rope_parameters` (or what stands for it in older files)."""
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    theta = float(parameters.get("rope_theta", 10_000.0))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling(factor=float(parameters["factor"]))
    if kind == "llama3":
        return theta, RopeScaling(
            factor=float(parameters["factor"]),
            low_freq_factor=float(parameters["low_freq_factor"]),
            high_freq_factor=float(parameters["high_freq_factor"]),
            original_length=int(parameters["original_max_position_embeddings"]),
        )
    raise UserError(
        f"model.path: rope type {kind!r} is not supported; supported are default, linear, llama3"
    )


def _rope_parameters(config: Config) -> Config:
    """The one set of rotary parameters: new form, or the old top-level fields."""
    if config.get("rope_parameters"):
        return config["rope_parameters"]
    return {"rope_theta": config.get("rope_theta", 10_000.0)} | (config.get("rope_scaling") or {})


def _windows(config: Config, default: bool) -> dict[str, Any]:
    """Sliding windows: which layers have one. `default`: whether the window counts by itself."""
    window, layers = config.get("sliding_window", 4096), config["num_hidden_layers"]
    if not window or not config.get("use_sliding_window", default):
        return {}
    kinds = config.get("layer_types")
    if kinds is None:
        first = config.get("max_window_layers", 28)
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    local = tuple(kind == "sliding_attention" for kind in kinds)
    return {"sliding_window": window, "local_layers": local} if any(local) else {}


def _one_rope(config: Config) -> dict[str, Any]:
    """What families share whose layers all rotate alike."""
    theta, scaling = _rope(_rope_parameters(config))
    return _common(config) | dict(
        tied_embeddings=config.get("tie_word_embeddings", False),
        rope_theta=theta,
        rope_scaling=scaling,
    )


def _attention_bias(config: Config) -> dict[str, Any]:
    bias = config.get("attention_bias", False)
    return {"qkv_bias": bias, "output_bias": bias}


def _qwen2(config: Config) -> Architecture:
    return Architecture(**_one_rope(config), **_windows(config, default=False), qkv_bias=True)


def _qwen3(config: Config) -> Architecture:
    return Architecture(
        **_one_rope({"head_dim": 128} | config),
        **_windows(config, default=False),
        **_attention_bias(config),
        qk_norm=True,
    )


def _llama(config: Config) -> Architecture:
    return Architecture(
        **_one_rope(config), **_attention_bias(config), mlp_bias=config.get("mlp_bias", False)
    )


def _gemma3(config: Config) -> Architecture:
    if config.get("attn_logit_softcapping") or config.get("final_logit_softcapping"):
        raise UserError("model.path: soft-capping of logits is not supported")
    if config.get("use_bidirectional_attention"):
        raise UserError("model.path: bidirectional attention is not supported")
    ropes = config.get("rope_parameters")
    if ropes:
        full, local = ropes["full_attention"], ropes["sliding_attention"]
    else:
        full = {"rope_theta": config.get("rope_theta", 1_000_000.0)}
        full |= config.get("rope_scaling") or {}
        local = {"rope_theta": config.get("rope_local_base_freq", 10_000.0)}
    theta, scaling = _rope(full)
    local_theta, local_scaling = _rope(local)
    if local_scaling is not None:
        raise UserError("model.path: a scaled rope on sliding layers is not supported")
    layers = config["num_hidden_layers"]
    pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
    kinds = config.get("layer_types") or [
        "full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(layers)
    ]
    return Architecture(
        **_common({"head_dim": 256, "hidden_activation": "gelu_pytorch_tanh"} | config),
        **_windows(config | {"layer_types": kinds}, default=True),
        tied_embeddings=config.get("tie_word_embeddings", True),
        rope_theta=theta,
        rope_scaling=scaling,
        local_rope_theta=local_theta,
        **_attention_bias(config),
        qk_norm=True,
        norm_offset=1.0,
        post_norms=True,
        embed_scale=float(config["hidden_size"]) ** 0.5,
        query_scale=float(config.get("query_pre_attn_scalar", 256)) ** -0.5,
    )


#: Names in `config.json` → its architecture.
FAMILIES: dict[str, Callable[[Config], Architecture]] = {
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "LlamaForCausalLM": _llama,
    "Gemma3ForCausalLM": _gemma3,
}


@dataclasses.dataclass(frozen=True)
class TensorName:
    """Where a parameter is on disk: a name, with `{layer}` where there is one tensor a layer, and
    whether it is stored as [out, in], the transpose of ours."""

    name: str
    transposed: bool = False


def tensor_names(arch: Architecture) -> dict[str, TensorName]:
    """Path of each parameter of ours → its tensor on disk."""
    names = {"embed/embedding": TensorName("model.embed_tokens.weight")}
    names["norm/scale"] = TensorName("model.norm.weight")
    if not arch.tied_embeddings:
        names["head/kernel"] = TensorName("lm_head.weight", transposed=True)
    block = "model.layers.{layer}"
    for ours, theirs, bias in (
        ("attention/q", "self_attn.q_proj", arch.qkv_bias),
        ("attention/k", "self_attn.k_proj", arch.qkv_bias),
        ("attention/v", "self_attn.v_proj", arch.qkv_bias),
        ("attention/o", "self_attn.o_proj", arch.output_bias),
        ("mlp/gate", "mlp.gate_proj", arch.mlp_bias),
        ("mlp/up", "mlp.up_proj", arch.mlp_bias),
        ("mlp/down", "mlp.down_proj", arch.mlp_bias),
    ):
        names[f"blocks/{ours}/kernel"] = TensorName(f"{block}.{theirs}.weight", transposed=True)
        if bias:
            names[f"blocks/{ours}/bias"] = TensorName(f"{block}.{theirs}.bias")
    norms = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if arch.post_norms:
        norms |= {
            "attention_post_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "mlp_post_norm": "post_feedforward_layernorm",
        }
    if arch.qk_norm:
        norms |= {"attention/q_norm": "self_attn.q_norm", "attention/k_norm": "self_attn.k_norm"}
    for ours, theirs in norms.items():
        names[f"blocks/{ours}/scale"] = TensorName(f"{block}.{theirs}.weight")
    return names


def config_of(arch: Architecture) -> Config:
    """A `config.json` for a model that came from none: a Llama, or a Qwen3 where queries and keys
    are normalised.

    Raises UserError for an architecture that neither is.
    """
    name = "Qwen3" if arch.qk_norm else "Llama"
    config: Config = {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": name.lower(),
        "vocab_size": arch.vocab,
        "num_hidden_layers": arch.layers,
        "hidden_size": arch.d_model,
        "num_attention_heads": arch.heads,
        "num_key_value_heads": arch.kv_heads,
        "head_dim": arch.head_dim,
        "intermediate_size": arch.d_ff,
        "hidden_act": "silu",
        "rms_norm_eps": arch.norm_epsilon,
        "tie_word_embeddings": arch.tied_embeddings,
        "attention_bias": arch.qkv_bias,
        "rope_parameters": {"rope_type": "default", "rope_theta": arch.rope_theta},
    }
    if not arch.qk_norm:
        config["mlp_bias"] = arch.mlp_bias
    how: Config = {name: getattr(arch, name) for name in ("remat", "compute_dtype", "attention")}
    if dataclasses.replace(architecture_of(config), **how) != arch:
        raise UserError("export: the model has a shape that no supported family describes")
    return config
