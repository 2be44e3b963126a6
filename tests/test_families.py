"""Families of models: published configs, refusals, and the logits that transformers gives.

The goldens of `data/families.npz` come from `python -m tests.test_parity`.
"""

from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltal_jax.errors import UserError
from deltal_jax.model.attention import RopeScaling
from deltal_jax.model.families import architecture_of, config_of, tensor_names
from deltal_jax.model.huggingface import load_architecture, load_params
from deltal_jax.model.transformer import parameter_count
from tests import fakes

GOLDENS = Path(__file__).parent / "data" / "families.npz"

_QWEN25 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "model_type": "qwen2",
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
}
_LLAMA3 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128256,
}
#: `config.json` of published models, and their numbers of parameters.
PUBLISHED = {
    "Qwen2.5-0.5B": (
        _QWEN25
        | {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "max_window_layers": 24,
            "num_attention_heads": 14,
            "num_hidden_layers": 24,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "vocab_size": 151936,
        },
        494_032_768,
    ),
    "Qwen2.5-3B": (
        _QWEN25
        | {
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "max_window_layers": 36,
            "num_attention_heads": 16,
            "num_hidden_layers": 36,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "vocab_size": 151936,
        },
        3_085_938_688,
    ),
    "Qwen2.5-7B": (
        _QWEN25
        | {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "max_window_layers": 28,
            "num_attention_heads": 28,
            "num_hidden_layers": 28,
            "num_key_value_heads": 4,
            "tie_word_embeddings": False,
            "vocab_size": 152064,
        },
        7_615_616_512,
    ),
    "Qwen3-4B": (
        {
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "max_position_embeddings": 40960,
            "max_window_layers": 36,
            "model_type": "qwen3",
            "num_attention_heads": 32,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        4_022_468_096,
    ),
    "Llama-3.2-1B": (
        _LLAMA3
        | {
            "head_dim": 64,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_attention_heads": 32,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "tie_word_embeddings": True,
        },
        1_235_814_400,
    ),
    "Llama-3.1-8B": (
        _LLAMA3
        | {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rope_scaling": {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "tie_word_embeddings": False,
        },
        8_030_261_248,
    ),
    "gemma-3-1b": (
        {
            "architectures": ["Gemma3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "attn_logit_softcapping": None,
            "cache_implementation": "hybrid",
            "final_logit_softcapping": None,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "max_position_embeddings": 32768,
            "model_type": "gemma3_text",
            "num_attention_heads": 4,
            "num_hidden_layers": 26,
            "num_key_value_heads": 1,
            "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-06,
            "rope_local_base_freq": 10000,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
            "torch_dtype": "bfloat16",
            "vocab_size": 262144,
        },
        999_885_952,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_its_published_number_of_parameters(name):
    config, count = PUBLISHED[name]
    assert parameter_count(architecture_of(config)) == count


def test_what_published_configs_say_between_the_lines():
    archs = {name: architecture_of(config) for name, (config, _) in PUBLISHED.items()}
    qwen = archs["Qwen2.5-7B"]
    assert (qwen.qkv_bias, qwen.output_bias, qwen.mlp_bias) == (True, False, False)
    assert (qwen.sliding_window, qwen.rope_theta, qwen.head_dim) == (None, 1e6, 128)
    qwen3 = archs["Qwen3-4B"]
    assert (qwen3.qk_norm, qwen3.qkv_bias, qwen3.head_dim) == (True, False, 128)
    assert archs["Llama-3.2-1B"].rope_scaling == RopeScaling(32.0, 1.0, 4.0, 8192)
    assert archs["Llama-3.1-8B"].rope_theta == 500_000.0
    gemma = archs["gemma-3-1b"]
    full = [i for i, local in enumerate(gemma.local_layers) if not local]
    assert (len(gemma.local_layers), full, gemma.sliding_window) == (26, [5, 11, 17, 23], 512)
    assert (gemma.rope_theta, gemma.local_rope_theta) == (1e6, 1e4)
    assert (gemma.query_scale, gemma.embed_scale) == (1 / 16, 1152**0.5)
    assert (gemma.norm_offset, gemma.post_norms, gemma.tied_embeddings) == (1.0, True, True)
    assert gemma.activation == "gelu_tanh"


@pytest.mark.parametrize("name", fakes.CONFIGS)
def test_logits_are_those_that_transformers_gave(name, tmp_path):
    folder = fakes.write_checkpoint(tmp_path / name, fakes.CONFIGS[name])
    arch = load_architecture(folder)
    with np.load(GOLDENS) as goldens, jax.default_matmul_precision("highest"):
        got = fakes.forward(arch, load_params(folder, arch), goldens["tokens"])
        want = goldens[name]
    assert np.abs(want).max() > 1
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", fakes.CONFIGS)
def test_every_tensor_on_disk_has_a_parameter_and_none_is_counted_twice(name):
    config = fakes.CONFIGS[name]
    arch, shapes = architecture_of(config), fakes.tensor_shapes(config)
    templates = [tensor.name for tensor in tensor_names(arch).values()]
    names = [t.format(layer=i) for t in templates for i in range(arch.layers if "{" in t else 1)]
    assert sorted(names) == sorted(shapes)
    assert parameter_count(arch) == sum(int(np.prod(shape)) for shape in shapes.values())


OLD_FORMS = {
    "qwen2": {"rope_theta": 1e6, "torch_dtype": "float32"},
    "qwen2-window": {"rope_theta": 1e4, "layer_types": None},
    "qwen3": {"rope_theta": 1_000_000, "rope_scaling": None},
    "llama": {
        "rope_theta": 5e5,
        "rope_scaling": {
            "type": "llama3",
            "factor": 8,
            "low_freq_factor": 1,
            "high_freq_factor": 4,
            "original_max_position_embeddings": 16,
        },
    },
    "llama-linear": {"rope_scaling": {"type": "linear", "factor": 4}},
    "gemma3": {
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "layer_types": None,
        "sliding_window_pattern": 3,
    },
}


@pytest.mark.parametrize("name", fakes.CONFIGS)
def test_the_old_form_of_a_config_describes_the_same_architecture(name):
    new = dict(fakes.CONFIGS[name])
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    assert architecture_of(old | OLD_FORMS[name]) == architecture_of(new)


def test_a_field_that_transformers_defaults_has_the_same_default_here():
    def without(name, *fields):
        config = {key: x for key, x in fakes.CONFIGS[name].items() if key not in fields}
        return architecture_of(config)

    assert without("qwen3", "head_dim").head_dim == 128
    assert without("gemma3", "head_dim").head_dim == 256
    assert without("gemma3", "hidden_activation").activation == "gelu_tanh"
    assert without("gemma3", "tie_word_embeddings").tied_embeddings
    assert without("gemma3", "query_pre_attn_scalar").query_scale == 256**-0.5
    assert without("gemma3", "layer_types").local_layers == (True,) * 4
    assert without("qwen2-window", "layer_types", "max_window_layers").local_layers == ()
    assert without("qwen2-window", "sliding_window").sliding_window == 4096
    assert without("llama", "num_key_value_heads").kv_heads == 4
    assert without("llama", "tie_word_embeddings", "mlp_bias", "attention_bias") == without(
        "llama", "mlp_bias", "attention_bias"
    )


SUPPORTED = "Qwen2ForCausalLM, Qwen3ForCausalLM, LlamaForCausalLM, Gemma3ForCausalLM"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "llama",
            {"architectures": ["MambaForCausalLM"]},
            f"architecture MambaForCausalLM is not supported; supported are {SUPPORTED}",
        ),
        (
            "llama",
            {"architectures": None},
            f"architecture none is not supported; supported are {SUPPORTED}",
        ),
        (
            "qwen3",
            {"num_experts": 128},
            f"a mixture of experts is not supported; supported are {SUPPORTED}",
        ),
        (
            "llama",
            {"num_local_experts": 8},
            f"a mixture of experts is not supported; supported are {SUPPORTED}",
        ),
        (
            "llama",
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "the weights are quantised; use a checkpoint in bf16 or f32",
        ),
        *(
            (
                "qwen2",
                {"rope_parameters": None, "rope_scaling": {key: kind, "factor": 4.0}},
                f"rope type '{kind}' is not supported; supported are default, linear, llama3",
            )
            for key, kind in [("type", "yarn"), ("rope_type", "longrope"), ("type", "dynamic")]
        ),
        (
            "gemma3",
            {"attn_logit_softcapping": 50.0},
            "soft-capping of logits is not supported",
        ),
        (
            "gemma3",
            {"final_logit_softcapping": 30.0},
            "soft-capping of logits is not supported",
        ),
        (
            "gemma3",
            {"use_bidirectional_attention": True},
            "bidirectional attention is not supported",
        ),
        (
            "gemma3",
            {
                "rope_parameters": {
                    "full_attention": {"rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "linear", "factor": 2.0},
                }
            },
            "a scaled rope on sliding layers is not supported",
        ),
        (
            "llama",
            {"hidden_act": "relu"},
            "activation 'relu' is not supported; supported are silu, gelu_pytorch_tanh",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
            "config.json has no field 'factor'",
        ),
    ],
)
def test_what_is_not_supported_is_refused_in_one_line(name, change, message):
    with pytest.raises(UserError) as caught:
        architecture_of(fakes.CONFIGS[name] | change)
    assert str(caught.value) == f"model.path: {message}"


def test_a_config_that_lacks_a_field_is_refused_by_the_name_of_the_field():
    config = {key: x for key, x in fakes.CONFIGS["llama"].items() if key != "hidden_size"}
    with pytest.raises(UserError) as caught:
        architecture_of(config)
    assert str(caught.value) == "model.path: config.json has no field 'hidden_size'"


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 40)
    | st.floats(allow_nan=True)
    | st.sampled_from(["3", "default", "sliding_attention", "Qwen2ForCausalLM", ""]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["rope_type", "rope_theta", "factor", "x"]), inner)
    ),
    max_leaves=6,
)
#: Fields that one config or another has.
FIELDS = sorted({key for config in fakes.CONFIGS.values() for key in config} - {"model_type"})


@given(st.sampled_from(sorted(fakes.CONFIGS)), st.sampled_from(FIELDS), JSON)
def test_any_value_of_a_field_is_either_a_model_or_one_line(name, field, value):
    """Never another exception, neither here nor when the model is described."""
    refused, arch = "", None
    try:
        arch = architecture_of(fakes.CONFIGS[name] | {field: value})
    except UserError as error:
        refused = str(error)
    if arch is None:
        assert refused.startswith("model.path: ") and "\n" not in refused
    else:
        assert parameter_count(arch) > 0
        assert not arch.local_layers or len(arch.local_layers) == arch.layers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": "3"}, "num_hidden_layers must be a whole number of at least 1"),
        ({"rope_parameters": [1]}, "rope_parameters must be an object, got [1]"),
        ({"rms_norm_eps": None}, "rms_norm_eps must be a number above 0, got None"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false, got 'yes'"),
        ({"architectures": "Qwen2ForCausalLM"}, "architectures must be a list of names"),
        ({"layer_types": ["full_attention"]}, "layer_types must be a list of full_attention or"),
        ({"num_attention_heads": 3}, "num_key_value_heads 2 does not divide"),
        ({"head_dim": 5}, "head_dim 5 is not even"),
    ],
)
def test_a_field_of_another_type_is_refused_by_its_name(change, message):
    with pytest.raises(UserError) as caught:
        architecture_of(fakes.CONFIGS["qwen2"] | change)
    assert str(caught.value).startswith(f"model.path: config.json: {message}")


OURS = [fakes.PLAIN, fakes.GROUPED, fakes.FAMILIES["qwen3"]]


@pytest.mark.parametrize("arch", OURS, ids=["plain", "gqa", "qwen3"])
def test_an_architecture_of_ours_survives_its_config(arch):
    config = config_of(arch)
    got = architecture_of(config)
    assert got == type(arch)(**{**vars(arch), "remat": got.remat})
    assert config["architectures"] == ["Qwen3ForCausalLM" if arch.qk_norm else "LlamaForCausalLM"]


@pytest.mark.parametrize("name", ["qwen2", "llama", "gemma3"])
def test_an_architecture_that_its_config_would_not_describe_is_not_exported(name):
    with pytest.raises(UserError, match="no supported family describes"):
        config_of(fakes.FAMILIES[name])
