"""The published Qwen1.5-MoE, Qwen2 and Qwen2.5 models: Qwen2 report table 1, Qwen2.5 report table 1, config.json files.

Where a report and a released config.json disagree, the file is right.
"""

from typing import Any

# hidden, layers, query heads, key/value heads, intermediate, embedding rows
_Shape = tuple[int, int, int, int, int, int]
_0_5B: _Shape = (896, 24, 14, 2, 4_864, 151_936)
_1_5B: _Shape = (1_536, 28, 12, 2, 8_960, 151_936)
_3B: _Shape = (2_048, 36, 16, 2, 11_008, 151_936)
_7B: _Shape = (3_584, 28, 28, 4, 18_944, 152_064)
_14B: _Shape = (5_120, 48, 40, 8, 13_824, 152_064)
_32B: _Shape = (5_120, 64, 40, 8, 27_648, 152_064)
_72B: _Shape = (8_192, 80, 64, 8, 29_568, 152_064)
_57B_A14B: _Shape = (3_584, 28, 28, 4, 18_944, 151_936)
_A2_7B: _Shape = (2_048, 24, 16, 16, 5_632, 151_936)
_TIED = (_0_5B, _1_5B, _3B)

# routed experts, of which active, width of one, width of the shared expert
_EXPERTS: dict[_Shape, tuple[int, int, int, int]] = {
    _57B_A14B: (64, 8, 2_560, 20_480),
    _A2_7B: (60, 4, 1_408, 5_632),
}
_ONE_MILLION = {"chunk_size": 262_144, "local_size": 8_192, "original_max_position_embeddings": 262_144}

# name: shape, rms_norm_eps, max_position_embeddings
_MODELS: dict[str, tuple[_Shape, float, int]] = {
    "qwen2-0.5b": (_0_5B, 1e-6, 131_072),
    "qwen2-1.5b": (_1_5B, 1e-6, 131_072),
    "qwen2-7b": (_7B, 1e-6, 131_072),
    "qwen2-72b": (_72B, 1e-5, 131_072),
    "qwen2-57b-a14b": (_57B_A14B, 1e-6, 131_072),
    "qwen2-0.5b-instruct": (_0_5B, 1e-6, 32_768),
    "qwen2-1.5b-instruct": (_1_5B, 1e-6, 32_768),
    "qwen2-7b-instruct": (_7B, 1e-6, 32_768),
    "qwen2-72b-instruct": (_72B, 1e-6, 32_768),
    "qwen2-57b-a14b-instruct": (_57B_A14B, 1e-6, 32_768),
    "qwen2.5-0.5b": (_0_5B, 1e-6, 32_768),
    "qwen2.5-1.5b": (_1_5B, 1e-6, 131_072),
    "qwen2.5-3b": (_3B, 1e-6, 32_768),
    "qwen2.5-7b": (_7B, 1e-6, 131_072),
    "qwen2.5-14b": (_14B, 1e-5, 131_072),
    "qwen2.5-32b": (_32B, 1e-5, 131_072),
    "qwen2.5-72b": (_72B, 1e-5, 131_072),
    "qwen2.5-0.5b-instruct": (_0_5B, 1e-6, 32_768),
    "qwen2.5-1.5b-instruct": (_1_5B, 1e-6, 32_768),
    "qwen2.5-3b-instruct": (_3B, 1e-6, 32_768),
    "qwen2.5-7b-instruct": (_7B, 1e-6, 32_768),
    "qwen2.5-14b-instruct": (_14B, 1e-6, 32_768),
    "qwen2.5-32b-instruct": (_32B, 1e-6, 32_768),
    "qwen2.5-72b-instruct": (_72B, 1e-6, 32_768),
    "qwen2.5-7b-instruct-1m": (_7B, 1e-5, 1_010_000),
    "qwen2.5-14b-instruct-1m": (_14B, 1e-5, 1_010_000),
    "qwen1.5-moe-a2.7b": (_A2_7B, 1e-6, 8_192),
    "qwen1.5-moe-a2.7b-chat": (_A2_7B, 1e-6, 8_192),
}
NAMES = tuple(_MODELS)


def config_json(name: str) -> dict[str, Any]:
    """The fields of the published `config.json` that make the network. KeyError for a name that is none of `NAMES`."""
    shape, eps, positions = _MODELS[name]
    hidden, layers, heads, kv_heads, intermediate, rows = shape
    values: dict[str, Any] = {
        "vocab_size": rows,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": positions,
        "rope_theta": 1_000_000.0,
        "rms_norm_eps": eps,
        "tie_word_embeddings": shape in _TIED,
        "bos_token_id": 151_643,
        "eos_token_id": 151_645 if "-instruct" in name else 151_643,
    }
    if shape in _EXPERTS:
        experts, active, width, shared = _EXPERTS[shape]
        values |= {
            "model_type": "qwen2_moe",
            "num_experts": experts,
            "num_experts_per_tok": active,
            "moe_intermediate_size": width,
            "shared_expert_intermediate_size": shared,
        }
    if name.endswith("-1m"):
        values |= {"rope_theta": 10_000_000.0, "dual_chunk_attention_config": _ONE_MILLION}
    return values
