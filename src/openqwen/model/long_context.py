"""Settings for sequences longer than the trained window: YARN and Dual Chunk Attention.

They come from `config.json`, or are chosen by a sequence's length (`stages`). The arithmetic is in
rope.py and dual_chunk.py.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from openqwen.support.errors import OpenQwenError

if TYPE_CHECKING:
    from openqwen.model.config import ModelConfig

_STRETCH = 4  # the largest factor of YARN alone: that of the Qwen team's own configurations
_UNITS = {"k": 1024, "m": 1024**2}


@dataclass(frozen=True)
class Yarn:
    """YARN (Peng et al. 2023) in its released form, with the fields of transformers.

    Args:
        factor: ratio of the new context length to the trained one.
        original_max_position_embeddings: the trained context length in tokens.
        beta_fast: dimensions that rotate more often over the trained length keep their frequency.
        beta_slow: dimensions that rotate less often have their frequency divided by `factor`.
        attention_factor: multiplies cos and sin of queries and keys. None means 0.1 ln(factor) + 1,
            or with `mscale` and `mscale_all_dim` the ratio of 0.1 m ln(factor) + 1 for both.
        mscale: see attention_factor.
        mscale_all_dim: see attention_factor.
        truncate: the ramp between the two betas begins and ends at integer dimensions.
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
        """m, the scale of queries and of keys; attention's logits are scaled by m²."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            all_dim = yarn_temperature(self.factor, self.mscale_all_dim)
            return yarn_temperature(self.factor, self.mscale) / all_dim
        return yarn_temperature(self.factor)

    def stretched(self, factor: float) -> "Yarn":
        """The same with another factor, for which a stated attention_factor is not valid."""
        scale = self.attention_factor if factor == self.factor else None
        return replace(self, factor=factor, attention_factor=scale)

    @classmethod
    def from_json(cls, values: Mapping[str, Any], max_position_embeddings: int) -> "Yarn | None":
        """Read `rope_scaling` or `rope_parameters` (`type` or `rope_type`); None for plain RoPE."""
        kind = values.get("rope_type") or values.get("type") or "default"
        if kind == "default":
            return None
        wrong = f"RoPE scaling of the type '{kind}' is not supported." if kind != "yarn" else ""
        given = {f.name: values[f.name] for f in fields(cls) if values.get(f.name) is not None}
        given.pop("truncate", None)
        for name in ("beta_fast", "beta_slow"):
            if given.get(name) == 0:  # means the default, as in transformers
                del given[name]
        for name, value in given.items():
            if type(value) not in (float, int) or not math.isfinite(value):
                wrong = wrong or f"YARN's {name} is {value!r}, not a number."
        if "factor" not in given:
            wrong = wrong or "YARN has no factor."
        if wrong:
            length = '"original_max_position_embeddings": 32768'
            do = f'use {{"rope_type": "yarn", "factor": 4.0, {length}}}, or no scaling'
            raise OpenQwenError(wrong, do=do)
        given.setdefault("original_max_position_embeddings", max_position_embeddings)
        return cls(**given, truncate=bool(values.get("truncate", True)))

    def to_json(self) -> dict[str, Any]:
        """The entries of `rope_scaling` without its type; defaults are left out, as published."""
        values = {f.name: (getattr(self, f.name), f.default) for f in fields(self)}
        return {name: value for name, (value, default) in values.items() if value != default}


def yarn_temperature(factor: float, mscale: float = 1.0) -> float:
    """m = 0.1 mscale ln(s) + 1, and 1 for s ≤ 1 (Peng et al. 2023, eq. 22, where mscale is 1)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


@dataclass(frozen=True)
class DualChunk:
    """Dual Chunk Attention (An et al. 2024) in the form of ChunkLlama's, vLLM's, Qwen2.5-1M's code.

    Args:
        chunk_size: the paper's c; a chunk has `chunk_len` tokens.
        local_size: the paper's w.
        original_max_position_embeddings: queries of longer sequences are scaled by YARN's m²; 0
            means never.
    """

    chunk_size: int
    local_size: int
    original_max_position_embeddings: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.local_size < self.chunk_size:
            sizes = f"chunk_size {self.chunk_size}, local_size {self.local_size}"
            raise OpenQwenError(
                f"Dual chunks cannot have {sizes}.",
                where="dual_chunk_attention_config",
                do="make local_size smaller than chunk_size (Qwen2.5-1M: 8192 and 262144)",
            )

    @property
    def chunk_len(self) -> int:
        """Tokens of one chunk."""
        return self.chunk_size - self.local_size

    def query_scale(self, length: int) -> float:
        """YARN's m² for a sequence of this length; all of it is put on the query, none on keys."""
        if not self.original_max_position_embeddings:
            return 1.0
        return yarn_temperature(length / self.original_max_position_embeddings) ** 2

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "DualChunk":
        """Read `dual_chunk_attention_config`; defaults as in vLLM (8,192, 1,024, no scaling)."""
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
    """How one sequence is read; plain RoPE by default. Sequences of one batch may differ.

    Args:
        yarn: its YARN scaling.
        dual_chunk: its Dual Chunk Attention.
        tokens: the length from which Dual Chunk Attention computes the scale of queries. None means
            the sequence's length at each call, as in vLLM. Generating token by token then scales
            each query by the length at its step, and one pass scales all by the final length, so
            the two differ. With a number, chosen when a request is admitted, they are the same.
    """

    yarn: Yarn | None = None
    dual_chunk: DualChunk | None = None
    tokens: int | None = None


class ContextStep(NamedTuple):
    """Sequences of up to `until` tokens are read in this `way`; None: as the configuration says."""

    until: int
    way: LongContext | None


def stages(config: "ModelConfig", max_context: int | None = None) -> list[ContextStep]:
    """How to read sequences by length, with factors 1, 2, 4 … up to max_context, shortest first.

    At factor 1 the results are to the bit those of a model without long context. YARN serves up to
    four times the trained window. Dual Chunk Attention serves sequences longer than the window if
    the checkpoint's configuration has it, or if max_context is beyond four windows.

    max_context: tokens; None: what the checkpoint states.
    """
    most, window = max_context or stated_context(config), trained_window(config)
    dual = config.dual_chunk or _chunks(window, most)
    steps, factor = list[ContextStep](), 1
    while not steps or steps[-1].until < most:
        way, tokens = LongContext(), factor * window
        if dual and (factor > 1 or config.dual_chunk):
            way = LongContext(config.yarn if config.dual_chunk else None, dual, tokens)
        elif factor > 1:
            way = LongContext((config.yarn or Yarn(1.0, window)).stretched(float(factor)))
        steps.append(ContextStep(min(tokens, most), way))
        factor *= 2
    return steps


def describe(config: "ModelConfig", max_context: int | None = None) -> str:
    """One line on how requests of each length are read with this maximum."""
    most, window = max_context or stated_context(config), trained_window(config)
    plain = f"context {most:,}: requests of up to {min(most, window):,} tokens are read as trained"
    if most <= window:
        return plain
    if dual := config.dual_chunk or _chunks(window, most):
        return f"{plain}, longer ones by Dual Chunk Attention in chunks of {dual.chunk_len:,}"
    yarns = [step.way and step.way.yarn for step in stages(config, most)]
    factors = [f"{yarn.factor:g}" for yarn in yarns if yarn]
    return f"{plain}, longer ones by YARN × {' or '.join(factors)}, chosen for each request"


def context_tokens(text: str) -> int:
    """The number of tokens in "128k", "1m" (k is 1,024, m is 1,024²) or "40000".

    Raises OpenQwenError for anything else.
    """
    digits, unit = text, 1
    if text[-1:].lower() in _UNITS:
        digits, unit = text[:-1], _UNITS[text[-1].lower()]
    if not digits.isascii() or not digits.isdigit() or int(digits) == 0:
        what = f"'{text}' is not a context length."
        raise OpenQwenError(what, do="write 32k, 128k, 1m or a number of tokens")
    return int(digits) * unit


def trained_window(config: "ModelConfig") -> int:
    """The length in tokens up to which the network was trained without any scaling."""
    if dual := config.dual_chunk:
        return dual.original_max_position_embeddings or dual.chunk_size
    if config.yarn:
        return config.yarn.original_max_position_embeddings
    # Base models of Qwen2 and Qwen2.5 state 131,072 but were trained on 32,768.
    overstated = config.max_position_embeddings == 131_072 and config.rope_theta == 1_000_000.0
    return 32_768 if overstated else config.max_position_embeddings


def stated_context(config: "ModelConfig") -> int:
    """The longest context in tokens that the checkpoint's configuration states."""
    if (yarn := config.yarn) is None:
        return config.max_position_embeddings
    stretched = int(yarn.factor * yarn.original_max_position_embeddings)
    return max(config.max_position_embeddings, stretched)


def _chunks(window: int, most: int) -> DualChunk | None:
    """Chunks for a model whose configuration has none, in the proportions of Qwen2.5-1M."""
    return DualChunk(window, window // 32, window) if most > _STRETCH * window else None
