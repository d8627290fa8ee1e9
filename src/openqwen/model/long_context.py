"""How a sequence longer than the training window is read: YARN and Dual Chunk Attention, as
`config.json` states them, or as sequences of each length need them (`stages`).

The numbers only; the arithmetic is in rope.py and dual_chunk.py.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from openqwen.support.errors import OpenQwenError

if TYPE_CHECKING:
    from openqwen.model.config import ModelConfig

_STRETCH = 4  # as far as YARN alone goes: the factor of the Qwen team's own configurations
_UNITS = {"k": 1024, "m": 1024**2}


@dataclass(frozen=True)
class Yarn:
    """Frequencies stretched by `factor` beyond `original_max_position_embeddings` (Peng et al.
    2023, released form).

    attention_factor: what cos and sin are multiplied by, on queries and keys alike; None means
    0.1 ln(factor) + 1, or with both `mscale` and `mscale_all_dim` the ratio of
    0.1 mscale ln(factor) + 1 to the same of the other. truncate: the ramp begins and ends at whole
    dimensions. All as in transformers.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.factor < 1 or self.original_max_position_embeddings < 1:
            length = self.original_max_position_embeddings
            what = f"YARN cannot stretch {length} tokens by a factor of {self.factor}."
            raise OpenQwenError(what, do="give a factor of at least 1 and the length trained")
        if min(self.beta_fast, self.beta_slow) <= 0:
            what = f"YARN's beta_fast is {self.beta_fast} and its beta_slow {self.beta_slow}."
            raise OpenQwenError(what, do="give both above 0, or neither")

    @property
    def temperature(self) -> float:
        """m: scales queries and keys, so attention's logits grow by m²."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            whole = yarn_temperature(self.factor, self.mscale_all_dim)
            return yarn_temperature(self.factor, self.mscale) / whole
        return yarn_temperature(self.factor)

    def stretched(self, factor: float) -> "Yarn":
        """The same at another factor; an attention_factor of its own belongs to its own factor."""
        own = self.attention_factor if factor == self.factor else None
        return replace(self, factor=factor, attention_factor=own)

    @classmethod
    def from_json(cls, values: Mapping[str, Any], max_position_embeddings: int) -> "Yarn | None":
        """Read `rope_scaling` or `rope_parameters`, old spelling (`type`) or new (`rope_type`);
        None where plain.
        """
        kind = values.get("rope_type") or values.get("type") or "default"
        if kind == "default":
            return None
        wrong = f"RoPE scaling of the type '{kind}' is not supported." if kind != "yarn" else ""
        given = {f.name: values[f.name] for f in fields(cls) if values.get(f.name) is not None}
        given.pop("truncate", None)
        for name in ("beta_fast", "beta_slow"):
            if given.get(name) == 0:  # transformers takes its default
                del given[name]
        for name, value in given.items():
            if type(value) not in (float, int) or not math.isfinite(value):
                wrong = wrong or f"YARN's {name} is {value!r}, not a number."
        if "factor" not in given:
            wrong = wrong or "YARN has no factor."
        if wrong:
            raise OpenQwenError(
                wrong,
                do=(
                    'use {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": '
                    "32768}, or none"
                ),
            )
        given.setdefault("original_max_position_embeddings", max_position_embeddings)
        return cls(**given, truncate=bool(values.get("truncate", True)))

    def to_json(self) -> dict[str, Any]:
        """The entries of `rope_scaling` without the key that names the kind; defaults are left out,
        as published.
        """
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if getattr(self, f.name) != f.default
        }


def yarn_temperature(factor: float, mscale: float = 1.0) -> float:
    """m = 0.1 mscale ln(s) + 1, and 1 for s ≤ 1 (Peng et al. 2023, eq. 22, where mscale is 1)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


@dataclass(frozen=True)
class DualChunk:
    """Dual Chunk Attention in the code form of ChunkLlama, vLLM and Qwen2.5-1M (An et al. 2024).

    The names shift from the paper's: chunk_size is the paper's c, local_size its w, and `chunk_len`
    the real length of a chunk. original_max_position_embeddings: queries of longer sequences are
    scaled by YARN's m²; 0 never scales.
    """

    chunk_size: int
    local_size: int
    original_max_position_embeddings: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.local_size < self.chunk_size:
            raise OpenQwenError(
                (
                    f"Dual chunks of {self.chunk_size} tokens cannot have a local window of "
                    f"{self.local_size}."
                ),
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
        """Read `dual_chunk_attention_config`; what is missing is as in vLLM (8,192, 1,024, no
        scaling).
        """
        given = {f.name: values[f.name] for f in fields(cls) if values.get(f.name) is not None}
        for name, value in given.items():
            if type(value) is not int:
                what = f"{name} is {value!r}, not a whole number."
                raise OpenQwenError(what, where="dual_chunk_attention_config")
        return cls(**{"chunk_size": 8_192, "local_size": 1_024, **given})

    def to_json(self) -> dict[str, int]:
        """`dual_chunk_attention_config`."""
        return asdict(self)


@dataclass(frozen=True)
class LongContext:
    """How one sequence is read. The default is plain RoPE attention. Sequences of one batch may
    differ.

    tokens: the length that Dual Chunk Attention's query scale counts with. None takes the
    sequence's own at each call, as vLLM does: then generating token by token scales a query by the
    length at its step, one pass scales all by the final length, and the two differ. A number,
    settled at admission, makes them the same.
    """

    yarn: Yarn | None = None
    dual_chunk: DualChunk | None = None
    tokens: int | None = None


class ContextStep(NamedTuple):
    """Sequences of up to `until` tokens are read in this `way`; None: as the model's configuration
    says.
    """

    until: int
    way: LongContext | None


def stages(config: "ModelConfig", max_context: int | None = None) -> list[ContextStep]:
    """The ways to read sequences of any length up to max_context (None: what the checkpoint
    states), shortest first: stretched by 1, 2, 4 … At factor 1 every bit is that of a model that
    knows no longer context.

    YARN stretches up to four times the trained window. Dual Chunk Attention reads what is longer
    than the window where the checkpoint's configuration has it, or where max_context is beyond
    that.
    """
    most, window = max_context or stated_context(config), trained_window(config)
    dual = config.dual_chunk or _chunks(window, most)
    found, factor = list[ContextStep](), 1
    while not found or found[-1].until < most:
        way, tokens = LongContext(), factor * window
        if dual and (factor > 1 or config.dual_chunk):
            way = LongContext(config.yarn if config.dual_chunk else None, dual, tokens)
        elif factor > 1:
            way = LongContext((config.yarn or Yarn(1.0, window)).stretched(float(factor)))
        found.append(ContextStep(min(tokens, most), way))
        factor *= 2
    return found


def describe(config: "ModelConfig", max_context: int | None = None) -> str:
    """One line: what this maximum means for short and long requests."""
    most, window = max_context or stated_context(config), trained_window(config)
    plain = f"context {most:,}: requests of up to {min(most, window):,} tokens are read as trained"
    if most <= window:
        return plain
    if dual := config.dual_chunk or _chunks(window, most):
        return f"{plain}, longer ones by Dual Chunk Attention in chunks of {dual.chunk_len:,}"
    factors = [
        f"{stage.way.yarn.factor:g}"
        for stage in stages(config, most)
        if stage.way and stage.way.yarn
    ]
    return f"{plain}, longer ones by YARN × {' or '.join(factors)}, chosen for each request"


def context_tokens(text: str) -> int:
    """Tokens of "128k", "1m" (1,024 and 1,024² to the unit) or "40000".

    OpenQwenError for anything else.
    """
    digits, unit = (
        (text[:-1], _UNITS[text[-1].lower()]) if text[-1:].lower() in _UNITS else (text, 1)
    )
    if not digits.isascii() or not digits.isdigit() or int(digits) == 0:
        raise OpenQwenError(
            f"'{text}' is no length of a context.", do="write 32k, 128k, 1m or a number of tokens"
        )
    return int(digits) * unit


def trained_window(config: "ModelConfig") -> int:
    """Tokens up to which the network reads as it was trained, with nothing stretched."""
    if dual := config.dual_chunk:
        return dual.original_max_position_embeddings or dual.chunk_size
    if config.yarn:
        return config.yarn.original_max_position_embeddings
    # Base models of Qwen2 and Qwen2.5 state 131,072 but were trained on 32,768 (qwen2-recipe facts,
    # 4.4).
    overstated = config.max_position_embeddings == 131_072 and config.rope_theta == 1_000_000.0
    return 32_768 if overstated else config.max_position_embeddings


def stated_context(config: "ModelConfig") -> int:
    """The longest context that the checkpoint's configuration speaks of."""
    stretched = (
        int(config.yarn.factor * config.yarn.original_max_position_embeddings) if config.yarn else 0
    )
    return max(config.max_position_embeddings, stretched)


def _chunks(window: int, most: int) -> DualChunk | None:
    """Chunks of a model whose configuration has none, in the proportions of Qwen2.5-1M."""
    return DualChunk(window, window // 32, window) if most > _STRETCH * window else None
