"""The numbers that make a Qwen2 network, as `config.json` states them."""

from dataclasses import dataclass, fields, replace
from typing import Any

from openqwen.support.errors import OpenQwenError, suggestion


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of one dense Qwen2 / Qwen2.5 model; field names are those of the published `config.json`.

    `vocab_size` counts embedding rows: the tokenizer's ids plus padding rows that are never targets.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int = 32_768
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads or (self.hidden_size // self.num_attention_heads) % 2:
            raise OpenQwenError(
                f"hidden_size {self.hidden_size} does not give {self.num_attention_heads} heads of an even size.",
                where="model.hidden_size",
                do="make hidden_size a multiple of 2 × num_attention_heads",
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise OpenQwenError(
                f"{self.num_attention_heads} query heads cannot share {self.num_key_value_heads} key/value heads.",
                where="model.num_key_value_heads",
                do="choose a divisor of num_attention_heads",
            )

    @property
    def head_dim(self) -> int:
        """Width of one head, d."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def named(cls, name: str) -> "ModelConfig":
        """The published configuration of a dense base model: `qwen2-7b`, `qwen2.5-0.5b` …

        Source: Qwen2 report table 1, Qwen2.5 report table 1, released config.json files.
        """
        key = name.lower()
        if key not in _PUBLISHED:
            raise OpenQwenError(f"No published model is called '{name}'.{suggestion(key, _PUBLISHED)}", do=_KNOWN)
        hidden, layers, heads, kv_heads, intermediate, eps, positions = _PUBLISHED[key]
        tied = hidden <= 2_048  # 0.5B, 1.5B and 3B
        return cls(
            vocab_size=151_936 if tied else 152_064,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=positions,
            rms_norm_eps=eps,
            tie_word_embeddings=tied,
            bos_token_id=151_643,
            eos_token_id=151_643,
        )

    @classmethod
    def from_json(cls, values: dict[str, Any], where: str = "config.json") -> "ModelConfig":
        """Read a `config.json`; fields that only other software uses are ignored."""
        if values.get("model_type", "qwen2") != "qwen2":
            raise OpenQwenError(f"model_type is '{values['model_type']}', not 'qwen2'.", where=where)
        if values.get("use_sliding_window"):
            raise OpenQwenError("use_sliding_window is true; no released Qwen2 uses a sliding window.", where=where)
        rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise OpenQwenError(
                f"RoPE scaling {rope} is not supported yet.", where=where, do="remove rope_scaling from config.json"
            )
        known = {f.name for f in fields(cls)}
        chosen = {k: v for k, v in values.items() if k in known and v is not None}
        if "rope_theta" in rope:  # transformers 5 spells it inside rope_parameters
            chosen["rope_theta"] = rope["rope_theta"]
        if isinstance(chosen.get("eos_token_id"), list):
            chosen["eos_token_id"] = chosen["eos_token_id"][0]
        missing = {f.name for f in fields(cls) if f.default is f.default_factory} - chosen.keys()
        if missing:
            raise OpenQwenError(f"config.json lacks {', '.join(sorted(missing))}.", where=where)
        return cls(**chosen)

    def to_json(self, architecture: str = "Qwen2ForCausalLM") -> dict[str, Any]:
        """The `config.json` that transformers, vLLM and llama.cpp's converter read."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            "architectures": [architecture],
            "model_type": "qwen2",
            **own,
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "use_cache": True,
            "use_sliding_window": False,
            "torch_dtype": "float32",
        }

    def with_rope(self, theta: float, positions: int) -> "ModelConfig":
        """The same network with another RoPE base and context length, for the long-sequence phase."""
        return replace(self, rope_theta=theta, max_position_embeddings=positions)

    def parameters(self) -> int:
        """Exact parameter count (qwen2-recipe facts, section 1.4)."""
        h, i, d = self.hidden_size, self.intermediate_size, self.head_dim
        q, kv = self.num_attention_heads * d, self.num_key_value_heads * d
        layer = h * q + q + 2 * (h * kv + kv) + q * h + 3 * h * i + 2 * h
        tables = 1 if self.tie_word_embeddings else 2
        return self.num_hidden_layers * layer + h + tables * self.vocab_size * h

    def flops_per_token(self, context: float) -> float:
        """Floating-point operations of one token, forward and backward, at a mean causal context of `context` tokens.

        6 per matrix parameter (the head counts, the table look-up does not) plus attention's two matmuls.
        """
        h, i, d = self.hidden_size, self.intermediate_size, self.head_dim
        q, kv = self.num_attention_heads * d, self.num_key_value_heads * d
        matrices = self.num_hidden_layers * (2 * h * q + 2 * h * kv + 3 * h * i) + self.vocab_size * h
        return 6.0 * matrices + 12.0 * self.num_hidden_layers * q * context


# hidden, layers, query heads, key/value heads, intermediate, rms_norm_eps, max_position_embeddings of the base models
_PUBLISHED: dict[str, tuple[int, int, int, int, int, float, int]] = {
    "qwen2-0.5b": (896, 24, 14, 2, 4_864, 1e-6, 131_072),
    "qwen2-1.5b": (1_536, 28, 12, 2, 8_960, 1e-6, 131_072),
    "qwen2-7b": (3_584, 28, 28, 4, 18_944, 1e-6, 131_072),
    "qwen2-72b": (8_192, 80, 64, 8, 29_568, 1e-5, 131_072),
    "qwen2.5-0.5b": (896, 24, 14, 2, 4_864, 1e-6, 32_768),
    "qwen2.5-1.5b": (1_536, 28, 12, 2, 8_960, 1e-6, 131_072),
    "qwen2.5-3b": (2_048, 36, 16, 2, 11_008, 1e-6, 32_768),
    "qwen2.5-7b": (3_584, 28, 28, 4, 18_944, 1e-6, 131_072),
    "qwen2.5-14b": (5_120, 48, 40, 8, 13_824, 1e-5, 131_072),
    "qwen2.5-32b": (5_120, 64, 40, 8, 27_648, 1e-5, 131_072),
    "qwen2.5-72b": (8_192, 80, 64, 8, 29_568, 1e-5, 131_072),
}
_KNOWN = "known names: " + ", ".join(_PUBLISHED)
