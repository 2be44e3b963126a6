"""Shapes of models that our experiments name, so that a run can be planned before anything is
fetched. Only plans use them: a run reads the `config.json` of its checkpoint."""

from typing import Any

_QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "use_sliding_window": False,
}


def _qwen2(
    layers: int, width: int, heads: int, kv_heads: int, ff: int, vocab: int, context: int
) -> dict[str, Any]:
    return _QWEN2 | {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": ff,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "tie_word_embeddings": vocab == 151_936,  # the small ones
    }


#: What matters of the `config.json` of a hub id.
PUBLISHED = {
    "Qwen/Qwen2.5-0.5B": _qwen2(24, 896, 14, 2, 4864, 151_936, 32_768),
    "Qwen/Qwen2.5-1.5B": _qwen2(28, 1536, 12, 2, 8960, 151_936, 131_072),
    "Qwen/Qwen2.5-3B": _qwen2(36, 2048, 16, 2, 11_008, 151_936, 32_768),
    "Qwen/Qwen2.5-7B": _qwen2(28, 3584, 28, 4, 18_944, 152_064, 131_072),
    "Qwen/Qwen2.5-32B": _qwen2(64, 5120, 40, 8, 27_648, 152_064, 131_072),
}
