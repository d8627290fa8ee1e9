"""Micro-batches: documents laid end to end, with the targets of their tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from openqwen.model import Attention, ModelConfig, Packed
from openqwen.model.rope import Rotation

# Token ids, and which of them are targets.
Sample = tuple[Sequence[int] | np.ndarray, Sequence[int] | np.ndarray]


@dataclass
class PackedBatch:
    """Packed documents of one forward call.

    The last token of a document predicts nothing and is not fed.

    tokens, positions: [T]. learned: the rows whose next token is a target, [N]. targets: those next
    tokens, [N]. counts: targets of each document, in order. whole: whether all rows predict a
    target, in order. spared: tokens that are computed once for all documents and not again.
    """

    tokens: Tensor
    positions: Tensor
    attention: Attention
    learned: Tensor
    targets: Tensor
    counts: list[int]
    whole: bool = False
    spared: int = 0

    @classmethod
    def of(
        cls, samples: Sequence[Sample], device: torch.device | str = "cpu", share: bool = False
    ) -> "PackedBatch":
        """Pack samples of at least two tokens each.

        share: compute a beginning that all samples have in common (a system prompt) once.
        """
        ids = [torch.as_tensor(s[0]) for s in samples]
        masks = [torch.as_tensor(s[1], dtype=torch.bool)[1:] for s in samples]
        shared = common_beginning(samples) if share else 0
        lengths = [len(i) - 1 for i in ids]
        packed = SharedBeginning(lengths, shared) if shared else Packed.from_lengths(lengths)
        firsts = [0] + [shared] * (len(ids) - 1)
        tokens = torch.cat([i[first:-1] for i, first in zip(ids, firsts)])
        positions = torch.cat([torch.arange(first, n) for n, first in zip(lengths, firsts)])
        following = torch.cat([i[1 + first :] for i, first in zip(ids, firsts)])
        learned = torch.cat([m[first:] for m, first in zip(masks, firsts)])
        return cls(
            tokens=tokens.to(device),
            positions=positions.to(device),
            attention=packed.to(device),
            learned=learned.nonzero().squeeze(1).to(device),
            targets=following[learned].to(device),
            counts=[int(m.sum()) for m in masks],
            whole=bool(learned.all()),
            spared=sum(firsts),
        )

    def flops(self, config: ModelConfig) -> float:
        """Floating-point operations of a language model's forward and backward pass."""
        return config.flops(
            len(self.tokens), len(self.targets), seen=float((self.positions + 1).sum())
        )


class SharedBeginning(Packed):
    """Attention over documents with a common beginning, of which only the first is fed it.

        fed         s0 s1 s2 a3 a4 | b3 b4              s: the common beginning
        attention   s0 s1 s2 a3 a4 | s0 s1 s2 b3 b4     its rows are repeated, their gradients added

    All that is computed token by token, which is nearly everything, is computed once for it.
    """

    def __init__(self, lengths: Sequence[int], shared: int):
        """lengths: of the documents with their `shared` first tokens, each longer than these."""
        super().__init__(lengths)
        # The row that token 0 of each document would have.
        starts = accumulate((n - shared for n in lengths[:-1]), initial=0)
        parts: list[Tensor] = []
        for start, n in zip(starts, lengths):
            parts += [torch.arange(shared), torch.arange(start + shared, start + n)]
        self._rows_T = torch.cat(parts)
        first = torch.ones(len(self._rows_T), dtype=torch.bool)
        for start in accumulate(lengths[:-1]):
            first[start : start + shared] = False
        self._kept = first.nonzero().squeeze(1)

    def to(self, device: torch.device | str) -> "SharedBeginning":
        """Move the indices; returns self."""
        super().to(device)
        self._rows_T, self._kept = self._rows_T.to(device), self._kept.to(device)
        return self

    def rotation(self, positions_T: Tensor, config: ModelConfig) -> Rotation:
        """See `Attention.rotation`."""
        return super().rotation(positions_T[self._rows_T], config)

    def attend(
        self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, rotation: Rotation, layer: int
    ) -> Tensor:
        """See `Attention.attend`."""
        q, k, v = (x.index_select(0, self._rows_T) for x in (q_THd, k_TKd, v_TKd))
        return super().attend(q, k, v, rotation, layer).index_select(0, self._kept)


def common_beginning(samples: Sequence[Sample], least: int = 8) -> int:
    """How many first tokens all samples have in common, none of which predicts a target.

    0 where there are fewer than `least`: sharing them is not worth it.
    """
    if len(samples) < 2:
        return 0
    # Each sample keeps at least one token of its own that is fed.
    shortest = min(len(ids) for ids, _ in samples) - 2
    first, *others = (np.asarray(ids[:shortest]) for ids, _ in samples)
    alike = np.logical_and.reduce([first == other for other in others])
    quiet = ~np.logical_or.reduce(
        [np.asarray(mask[1 : shortest + 1], dtype=bool) for _, mask in samples]
    )
    shared = int((alike & quiet).cumprod().sum())
    return shared if shared >= least else 0
