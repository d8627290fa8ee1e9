"""Rotary position embedding (Su et al. 2021), in Qwen2's rotate-half layout, with YARN (Peng et al.
2023) if wanted.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from openqwen.model.config import ModelConfig
from openqwen.model.dual_chunk import rotary_positions
from openqwen.model.long_context import LongContext, Yarn

Turns = tuple[Tensor, Tensor]  # cos and sin of each token's angles, each [T, 1, d/2], float32


@dataclass(frozen=True)
class Rotation:
    """What one forward call turns its queries and keys by; made by the attention, which knows who
    sees whom.

    chunk_lens: for each sequence its chunk length where Dual Chunk Attention divides it, else 0;
    empty where it divides none. successive, inter: how the rows of divided sequences turn queries
    for the chunk before their own and for those before that; `query` is then for their own chunk.
    """

    key: Turns
    query: Turns
    successive: Turns | None = None
    inter: Turns | None = None
    chunk_lens: tuple[int, ...] = ()


def inverse_frequencies(
    head_dim: int, theta: float, yarn: Yarn | None = None, device: torch.device | None = None
) -> Tensor:
    """θ_k = theta^(−2k/d) for k < d/2, in float32 whatever the weights' type. Shape [d/2].

    YARN divides the slow ones by its factor and leaves the fast ones, with a ramp between them that
    is linear in k, as in the released code; the paper's is linear in the number of turns
    (qwen2-recipe facts, 4.4).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    plain = 1.0 / theta**exponents
    if yarn is None or yarn.factor == 1:
        return plain
    low, high = _ramp_ends(head_dim, theta, yarn)
    dims = torch.arange(head_dim // 2, dtype=torch.float32, device=device)
    slow = ((dims - low) / (high - low)).clamp(0, 1)
    return plain / yarn.factor * slow + plain * (1 - slow)


def _ramp_ends(head_dim: int, theta: float, yarn: Yarn) -> tuple[float, float]:
    """Where YARN's ramp over k starts and ends: the dimensions that turn beta_fast and beta_slow
    times in training.
    """

    def dimension(turns: float) -> float:
        return (
            head_dim
            * math.log(yarn.original_max_position_embeddings / (turns * 2 * math.pi))
            / (2 * math.log(theta))
        )

    low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    return low, high if high != low else high + 0.001


def turns(positions_T: Tensor, frequencies: Tensor, scale: float | Tensor = 1.0) -> Turns:
    """cos and sin of every angle position × frequency, times `scale` (one number, or [T, 1]); each
    [T, 1, d/2].

    frequencies: [d/2], or [T, d/2] where tokens differ.
    """
    angles = positions_T.to(torch.float32)[:, None] * frequencies
    return (angles.cos() * scale)[:, None], (angles.sin() * scale)[:, None]


def rotate(x_THd: Tensor, cos_T1f: Tensor, sin_T1f: Tensor) -> Tensor:
    """Turn each pair (x_k, x_{k+d/2}) by its angle: first half against second half, not
    interleaved.
    """
    a, b = x_THd.chunk(2, dim=-1)
    cos, sin = cos_T1f.to(x_THd.dtype), sin_T1f.to(x_THd.dtype)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def key_turns(positions_T: Tensor, config: ModelConfig, context: LongContext | None) -> Turns:
    """What the keys at these positions of a sequence are turned by, read as `context` says (None:
    the model's).
    """
    chosen = context or config.long_context
    if chosen.dual_chunk:
        positions_T = positions_T % chosen.dual_chunk.chunk_len
    frequencies = inverse_frequencies(
        config.head_dim, config.rope_theta, chosen.yarn, positions_T.device
    )
    return turns(positions_T, frequencies, chosen.yarn.temperature if chosen.yarn else 1.0)


def rotation_of(
    positions_T: Tensor,
    config: ModelConfig,
    contexts: Sequence[LongContext | None],
    rows: Sequence[int],
    lengths: Sequence[int],
) -> Rotation:
    """The rotation of sequences laid end to end: of each its context (None: the model's), its rows
    in this call, and its length with what came before."""
    chosen = [config.long_context if c is None else c for c in contexts]
    frequencies, temperature = _frequencies(
        config, [c.yarn for c in chosen], rows, positions_T.device
    )
    duals = [c.dual_chunk for c in chosen]
    counted = [c.tokens or n for c, n in zip(chosen, lengths, strict=True)]
    scales = [dual.query_scale(n) if dual else 1.0 for dual, n in zip(duals, counted, strict=True)]
    chunk_lens = tuple(
        dual.chunk_len if dual and n > dual.chunk_len else 0
        for dual, n in zip(duals, lengths, strict=True)
    )
    query_temperature: float | Tensor = temperature
    if any(scale != 1 for scale in scales):
        query_temperature = (
            temperature * _of_rows(torch.tensor(scales), rows, positions_T.device)[:, None]
        )
    if not any(chunk_lens):
        key = turns(positions_T, frequencies, temperature)
        same = query_temperature is temperature
        return Rotation(key, key if same else turns(positions_T, frequencies, query_temperature))
    within_T, successive_T, inter_T = positions_T.clone(), positions_T.clone(), positions_T.clone()
    for dual, chunk_len, (start, end) in zip(duals, chunk_lens, pairwise((0, *accumulate(rows)))):
        if dual and chunk_len:
            found = rotary_positions(positions_T[start:end], dual)
            within_T[start:end], successive_T[start:end], inter_T[start:end] = found
    return Rotation(
        key=turns(within_T, frequencies, temperature),
        query=turns(within_T, frequencies, query_temperature),
        successive=turns(successive_T, frequencies, query_temperature),
        inter=turns(inter_T, frequencies, query_temperature),
        chunk_lens=chunk_lens,
    )


def _frequencies(
    config: ModelConfig, yarns: Sequence[Yarn | None], rows: Sequence[int], device: torch.device
) -> tuple[Tensor, float | Tensor]:
    """Frequencies [d/2] and temperature of all rows, or [T, d/2] and [T, 1] where sequences
    differ.
    """
    kinds = list(dict.fromkeys(yarns))
    tables = [
        inverse_frequencies(config.head_dim, config.rope_theta, yarn, device) for yarn in kinds
    ]
    temperatures = [yarn.temperature if yarn else 1.0 for yarn in kinds]
    if len(kinds) == 1:
        return tables[0], temperatures[0]
    kind_T = _of_rows(torch.tensor([kinds.index(yarn) for yarn in yarns]), rows, device)
    return torch.stack(tables)[kind_T], torch.tensor(temperatures, device=device)[kind_T][:, None]


def _of_rows(values_B: Tensor, rows: Sequence[int], device: torch.device) -> Tensor:
    """A number of each sequence, given to each of its rows, [T]."""
    return values_B.repeat_interleave(torch.tensor(rows)).to(device)
