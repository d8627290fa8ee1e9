"""Rotary position embedding (RoPE, Su et al. 2021) in Qwen2's rotate-half layout, with YARN.

YARN is that of Peng et al. 2023. Shapes: T tokens, H heads, d head width, f = d/2 frequencies.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from openqwen.model.config import ModelConfig
from openqwen.model.dual_chunk import rotary_positions
from openqwen.model.fused import fused
from openqwen.model.long_context import LongContext, Yarn

CosSin = tuple[Tensor, Tensor]  # of each token's angles, each [T, 1, d/2], float32


@dataclass(frozen=True)
class Rotation:
    """The rotations of queries and keys in one forward call; the attention makes them.

    key, query: of each row. In sequences that Dual Chunk Attention divides, `query` is for keys of
    the query's own chunk. successive, inter: there, for keys of the chunk before and of all earlier
    chunks. chunk_lens: for each sequence its chunk length, 0 where it is not divided; empty where
    none is.
    """

    key: CosSin
    query: CosSin
    successive: CosSin | None = None
    inter: CosSin | None = None
    chunk_lens: tuple[int, ...] = ()


def inverse_frequencies(
    head_dim: int, theta: float, yarn: Yarn | None = None, device: torch.device | None = None
) -> Tensor:
    """θ_k = theta^(−2k/d) for k < d/2, [d/2], in float32 whatever the weights' type.

    YARN divides the low frequencies by its factor and keeps the high ones. The ramp between them is
    linear in k, as in the released code; the paper's is linear in the number of rotations.
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
    """Start and end of YARN's ramp over k.

    They are the dimensions that rotate beta_fast and beta_slow times over the trained length.
    """

    def dimension(rotations: float) -> float:
        tokens_per_radian = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(tokens_per_radian) / (2 * math.log(theta))

    low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    return low, high if high != low else high + 0.001


def cos_sin(positions_T: Tensor, frequencies: Tensor, scale: float | Tensor = 1.0) -> CosSin:
    """cos and sin of position × frequency, each times `scale`, [T, 1, d/2].

    frequencies: [d/2], or [T, d/2] where tokens differ. scale: one number, or [T, 1].
    """
    angles = positions_T.to(torch.float32)[:, None] * frequencies
    return (angles.cos() * scale)[:, None], (angles.sin() * scale)[:, None]


@fused
def rotate(x_THd: Tensor, cos_T1f: Tensor, sin_T1f: Tensor) -> Tensor:
    """Rotate each pair (x_k, x_{k+d/2}) by its angle; the pairs are not interleaved. [T, H, d]."""
    a, b = x_THd.chunk(2, dim=-1)
    cos, sin = cos_T1f.to(x_THd.dtype), sin_T1f.to(x_THd.dtype)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def key_rotation(positions_T: Tensor, config: ModelConfig, context: LongContext | None) -> CosSin:
    """The rotation of a sequence's keys at these positions; context None: the model's."""
    chosen = context or config.long_context
    if chosen.dual_chunk:
        positions_T = positions_T % chosen.dual_chunk.chunk_len
    head_dim, theta, yarn = config.head_dim, config.rope_theta, chosen.yarn
    frequencies = inverse_frequencies(head_dim, theta, yarn, positions_T.device)
    return cos_sin(positions_T, frequencies, yarn.temperature if yarn else 1.0)


def rotation_of(
    positions_T: Tensor,
    config: ModelConfig,
    contexts: Sequence[LongContext | None],
    rows: Sequence[int],
    lengths: Sequence[int],
) -> Rotation:
    """The rotation of several sequences laid end to end.

    Args:
        positions_T: the position of each row in its sequence.
        config: of the model.
        contexts: how each sequence is read; None: as the model's configuration says.
        rows: how many rows of this call each sequence has.
        lengths: tokens of each sequence, with those of earlier calls.
    """
    chosen = [config.long_context if c is None else c for c in contexts]
    yarns = [c.yarn for c in chosen]
    frequencies, temperature = _frequencies(config, yarns, rows, positions_T.device)
    duals = [c.dual_chunk for c in chosen]
    counted = [c.tokens or n for c, n in zip(chosen, lengths, strict=True)]
    scales = [dual.query_scale(n) if dual else 1.0 for dual, n in zip(duals, counted, strict=True)]
    chunk_lens = tuple(
        dual.chunk_len if dual and n > dual.chunk_len else 0
        for dual, n in zip(duals, lengths, strict=True)
    )
    query_temperature: float | Tensor = temperature
    if any(scale != 1 for scale in scales):
        scales_T = _of_rows(torch.tensor(scales), rows, positions_T.device)
        query_temperature = temperature * scales_T[:, None]
    if not any(chunk_lens):
        key = cos_sin(positions_T, frequencies, temperature)
        same = query_temperature is temperature
        return Rotation(key, key if same else cos_sin(positions_T, frequencies, query_temperature))
    within_T, successive_T, inter_T = positions_T.clone(), positions_T.clone(), positions_T.clone()
    for dual, chunk_len, (start, end) in zip(duals, chunk_lens, pairwise((0, *accumulate(rows)))):
        if dual and chunk_len:
            chunked = rotary_positions(positions_T[start:end], dual)
            within_T[start:end], successive_T[start:end], inter_T[start:end] = chunked
    return Rotation(
        key=cos_sin(within_T, frequencies, temperature),
        query=cos_sin(within_T, frequencies, query_temperature),
        successive=cos_sin(successive_T, frequencies, query_temperature),
        inter=cos_sin(inter_T, frequencies, query_temperature),
        chunk_lens=chunk_lens,
    )


def _frequencies(
    config: ModelConfig, yarns: Sequence[Yarn | None], rows: Sequence[int], device: torch.device
) -> tuple[Tensor, float | Tensor]:
    """Frequencies [d/2] and a temperature; [T, d/2] and [T, 1] where sequences differ."""
    head_dim, theta, kinds = config.head_dim, config.rope_theta, list(dict.fromkeys(yarns))
    tables = [inverse_frequencies(head_dim, theta, yarn, device) for yarn in kinds]
    temperatures = [yarn.temperature if yarn else 1.0 for yarn in kinds]
    if len(kinds) == 1:
        return tables[0], temperatures[0]
    kind_T = _of_rows(torch.tensor([kinds.index(yarn) for yarn in yarns]), rows, device)
    return torch.stack(tables)[kind_T], torch.tensor(temperatures, device=device)[kind_T][:, None]


def _of_rows(values_B: Tensor, rows: Sequence[int], device: torch.device) -> Tensor:
    """Repeat each sequence's number for each of its rows, [T]."""
    return values_B.repeat_interleave(torch.tensor(rows)).to(device)
