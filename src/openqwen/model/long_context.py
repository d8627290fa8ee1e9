"""How a sequence longer than the training window is read: YARN and Dual Chunk Attention, as `config.json` states them.

The numbers only; the arithmetic is in rope.py and dual_chunk.py.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from openqwen.support.errors import OpenQwenError


@dataclass(frozen=True)
class Yarn:
    """Frequencies stretched by `factor` beyond `original_max_position_embeddings` (Peng et al. 2023, released form).

    attention_factor: what cos and sin are multiplied by, on queries and keys alike; None means 0.1 ln(factor) + 1.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        if self.factor < 1 or self.original_max_position_embeddings < 1:
            raise OpenQwenError(f"YARN cannot stretch {self}.", do="give a factor of at least 1 and the length trained")

    @property
    def temperature(self) -> float:
        """m: scales queries and keys, so attention's logits grow by m²."""
        return yarn_temperature(self.factor) if self.attention_factor is None else self.attention_factor

    @classmethod
    def from_json(cls, values: Mapping[str, Any], max_position_embeddings: int, where: str) -> "Yarn | None":
        """Read `rope_scaling` or `rope_parameters`, old spelling (`type`) or new (`rope_type`); None where plain."""
        kind = values.get("rope_type", values.get("type", "default"))
        if kind == "default":
            return None
        if kind != "yarn" or "factor" not in values:
            raise OpenQwenError(
                f"RoPE scaling {dict(values)} is not one that Qwen2 uses.",
                where=where,
                do='use {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, or none',
            )
        return cls(
            factor=float(values["factor"]),
            original_max_position_embeddings=int(
                values.get("original_max_position_embeddings") or max_position_embeddings
            ),
            beta_fast=float(values.get("beta_fast") or 32.0),
            beta_slow=float(values.get("beta_slow") or 1.0),
            attention_factor=values.get("attention_factor"),
        )

    def to_json(self) -> dict[str, Any]:
        """The entries of `rope_scaling` without the key that names the kind; defaults are left out, as published."""
        values = {"factor": self.factor, "original_max_position_embeddings": self.original_max_position_embeddings}
        if self.beta_fast != 32.0:
            values["beta_fast"] = self.beta_fast
        if self.beta_slow != 1.0:
            values["beta_slow"] = self.beta_slow
        if self.attention_factor is not None:
            values["attention_factor"] = self.attention_factor
        return values


def yarn_temperature(factor: float) -> float:
    """m = 0.1 ln(s) + 1, and 1 for s ≤ 1 (Peng et al. 2023, eq. 22)."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


@dataclass(frozen=True)
class DualChunk:
    """Dual Chunk Attention in the code form of ChunkLlama, vLLM and Qwen2.5-1M (An et al. 2024).

    The names shift from the paper's: chunk_size is the paper's c, local_size its w, and `chunk_len` the real length of
    a chunk. original_max_position_embeddings: queries of longer sequences are scaled by YARN's m²; 0 never scales.
    """

    chunk_size: int
    local_size: int
    original_max_position_embeddings: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.local_size < self.chunk_size:
            raise OpenQwenError(
                f"Dual chunks of {self.chunk_size} tokens cannot have a local window of {self.local_size}.",
                where="dual_chunk_attention_config",
                do="make local_size smaller than chunk_size (Qwen2.5-1M: 262144 and 8192)",
            )

    @property
    def chunk_len(self) -> int:
        """Tokens of one chunk."""
        return self.chunk_size - self.local_size

    def query_scale(self, length: int) -> float:
        """m² of a sequence of this many tokens: all of the length scaling, put on the query."""
        if not self.original_max_position_embeddings:
            return 1.0
        return yarn_temperature(length / self.original_max_position_embeddings) ** 2

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "DualChunk":
        """Read `dual_chunk_attention_config`; what is missing is as in vLLM (8,192, 1,024, no scaling)."""
        return cls(
            chunk_size=int(values.get("chunk_size", 8_192)),
            local_size=int(values.get("local_size", 1_024)),
            original_max_position_embeddings=int(values.get("original_max_position_embeddings", 0)),
        )

    def to_json(self) -> dict[str, int]:
        """`dual_chunk_attention_config`."""
        return {
            "chunk_size": self.chunk_size,
            "local_size": self.local_size,
            "original_max_position_embeddings": self.original_max_position_embeddings,
        }


@dataclass(frozen=True)
class LongContext:
    """How one sequence is read. The default is plain RoPE attention. Sequences of one batch may differ."""

    yarn: Yarn | None = None
    dual_chunk: DualChunk | None = None
