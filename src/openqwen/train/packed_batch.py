"""Micro-batches: documents laid end to end, with what each token shall predict."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from openqwen.model import Attention, ModelConfig, Packed
from openqwen.model.rope import Rotation

# Token ids, and for each whether it is to be learned.
Sample = tuple[Sequence[int] | np.ndarray, Sequence[int] | np.ndarray]


@dataclass
class PackedBatch:
    """Packed documents of one forward call. The last token of a document predicts nothing and is
    not fed.

    tokens, positions: [T]. learned: rows [N] whose next token is a target. targets: those next
    tokens [N].
    counts: targets of each document, in order. whole: whether every token predicts a target, in
    order. spared: tokens of a beginning that all documents share, which only the first brings
    along.
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
        """Lay out samples of at least two tokens each. share: compute a common beginning (a system
        prompt) once.
        """
        ids = [torch.as_tensor(s[0]) for s in samples]
        masks = [torch.as_tensor(s[1], dtype=torch.bool)[1:] for s in samples]
        shared = common_beginning(samples) if share else 0
        lengths = [len(i) - 1 for i in ids]
        packed = SharedBeginning(lengths, shared) if shared else Packed.from_lengths(lengths)
        firsts = [0] + [shared] * (len(ids) - 1)
        learned = torch.cat([m[first:] for m, first in zip(masks, firsts)])
        return cls(
            tokens=torch.cat([i[first:-1] for i, first in zip(ids, firsts)]).to(device),
            positions=torch.cat([torch.arange(first, n) for n, first in zip(lengths, firsts)]).to(
                device
            ),
            attention=packed.to(device),
            learned=learned.nonzero().squeeze(1).to(device),
            targets=torch.cat([i[1 + first :] for i, first in zip(ids, firsts)])[learned].to(
                device
            ),
            counts=[int(m.sum()) for m in masks],
            whole=bool(learned.all()),
            spared=sum(firsts),
        )

    def flops(self, config: ModelConfig) -> float:
        """Floating-point operations of a language model's forward and backward pass over these
        rows.
        """
        return config.flops(
            len(self.tokens), len(self.targets), seen=float((self.positions + 1).sum())
        )


class SharedBeginning(Packed):
    """Documents that begin alike, laid end to end, where all but the first come without that
    beginning.

    Attention sees each of them whole: the rows of the beginning are repeated for it, and their
    gradients added up. What is computed token by token, nearly everything, is computed once for the
    beginning.
    """

    def __init__(self, lengths: Sequence[int], shared: int):
        """lengths: of the whole documents, each longer than the `shared` tokens of their
        beginning.
        """
        super().__init__(lengths)
        starts = accumulate(
            (n - shared for n in lengths[:-1]), initial=0
        )  # where token 0 of each document would be
        own = [torch.arange(start + shared, start + n) for start, n in zip(starts, lengths)]
        self._rows_T = torch.cat([part for rows in own for part in (torch.arange(shared), rows)])
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
    """Tokens with which all samples begin and of which none predicts a target; 0 where sharing them
    is not worth it.
    """
    if len(samples) < 2:
        return 0
    shortest = (
        min(len(ids) for ids, _ in samples) - 2
    )  # each keeps at least one token of its own that is fed
    first, *others = (np.asarray(ids[:shortest]) for ids, _ in samples)
    alike = np.logical_and.reduce([first == other for other in others])
    quiet = ~np.logical_or.reduce(
        [np.asarray(mask[1 : shortest + 1], dtype=bool) for _, mask in samples]
    )
    shared = int((alike & quiet).cumprod().sum())
    return shared if shared >= least else 0
