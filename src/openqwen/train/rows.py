"""Micro-batches: documents laid end to end, with what each token shall predict."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from openqwen.model import Attention, ModelConfig, Packed

# Token ids, and for each whether it is to be learned.
Sample = tuple[Sequence[int] | np.ndarray, Sequence[int] | np.ndarray]


@dataclass
class Rows:
    """Packed documents of one forward call. The last token of a document predicts nothing and is not fed.

    tokens, positions: [T]. learned: rows [N] whose next token is a target. targets: those next tokens [N].
    counts: targets of each document, in order. whole: whether every token predicts a target, in order.
    """

    tokens: Tensor
    positions: Tensor
    attention: Attention
    learned: Tensor
    targets: Tensor
    counts: list[int]
    whole: bool = False

    @classmethod
    def of(cls, samples: Sequence[Sample], device: torch.device | str = "cpu") -> "Rows":
        """Lay out samples of at least two tokens each."""
        ids = [torch.as_tensor(s[0]) for s in samples]
        masks = [torch.as_tensor(s[1], dtype=torch.bool)[1:] for s in samples]
        packed = Packed.from_lengths([len(i) - 1 for i in ids])
        learned = torch.cat(masks)
        return cls(
            tokens=torch.cat([i[:-1] for i in ids]).to(device),
            positions=packed.positions.to(device),
            attention=packed.to(device),
            learned=learned.nonzero().squeeze(1).to(device),
            targets=torch.cat([i[1:] for i in ids])[learned].to(device),
            counts=[int(m.sum()) for m in masks],
            whole=bool(learned.all()),
        )

    def flops(self, config: ModelConfig) -> float:
        """Floating-point operations of a language model's forward and backward pass over these rows."""
        return config.flops(len(self.tokens), len(self.targets), seen=float((self.positions + 1).sum()))


def cut_to_budget(sizes: Sequence[int], budget: int) -> Iterator[slice]:
    """Cut a list of documents, in order, into runs of at most `budget` tokens (one longer document stands alone)."""
    start = total = 0
    for n, size in enumerate(sizes):
        if total and total + size > budget:
            yield slice(start, n)
            start, total = n, 0
        total += size
    if total:
        yield slice(start, len(sizes))
