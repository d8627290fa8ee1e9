"""Random masks that depend on a parameter's name, the step and an element's global index alone.

So a mask is the same in every run and on any number of ranks, whatever part of a parameter each
rank holds. The bits are SplitMix64's at a counter (`support/splitmix.py`), two elements a word.
"""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from openqwen.support.splitmix import GAMMA

_PIECE = 2**22  # elements whose words are in memory at once


@dataclass(frozen=True)
class LocalElements:
    """Where the elements of a rank's part of a tensor are in the whole tensor.

    Element i has the global index first + (i // run) · stride + i % run. A tensor that is not
    sharded is one run. A part may be cut in its first and its last dimension.
    """

    count: int
    first: int = 0
    run: int = 1
    stride: int = 0

    @classmethod
    def of(cls, tensor: Tensor) -> "LocalElements":
        """Of a tensor, or of the part of a DTensor that this rank holds."""
        if not isinstance(tensor, DTensor):
            return cls(tensor.numel(), run=max(1, tensor.numel()))
        part, offset = compute_local_shape_and_global_offset(
            tensor.shape, tensor.device_mesh, tensor.placements
        )
        strides = [math.prod(tensor.shape[dim + 1 :]) for dim in range(len(part))]
        first = sum(at * stride for at, stride in zip(offset, strides))
        last = len(part) - 1
        if last > 0 and part[last] < tensor.shape[last]:
            assert all(part[dim] == tensor.shape[dim] for dim in range(1, last))
            return cls(math.prod(part), first, max(1, part[last]), strides[last - 1])
        assert all(part[dim] == tensor.shape[dim] for dim in range(1, last + 1))
        return cls(math.prod(part), first, max(1, math.prod(part)))

    def index(self, local: Tensor) -> Tensor:
        """The global indices of local elements, int64."""
        return self.first + local // self.run * self.stride + local % self.run


def stream(seed: int, *names: object) -> int:
    """The start of a stream of random words, 64 bits."""
    text = "/".join(str(name) for name in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def limit(share: float) -> int:
    """An element is kept where its 32 random bits are below this number, from 1 to 2³²."""
    return max(1, round(share * 2**32))


def random_mask(key: int, share: float, elements: LocalElements, device: torch.device) -> Tensor:
    """Which of this rank's elements are kept, each with probability `share`; bool, [count]."""
    mask = torch.empty(elements.count, dtype=torch.bool, device=device)
    for begin in range(0, elements.count, _PIECE):
        end = min(begin + _PIECE, elements.count)
        index = elements.index(torch.arange(begin, end, device=device))
        word = _mix(((index >> 1) + 1) * _signed(GAMMA) + _signed(key))
        bits = torch.where(index % 2 == 1, _shift(word, 32), word & (2**32 - 1))
        mask[begin:end] = bits < limit(share)
    return mask


def _mix(x: Tensor) -> Tensor:
    """`splitmix.mix` on int64, whose products wrap as those of uint64 do."""
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _signed(word: int) -> int:
    word %= 2**64
    return word - 2**64 if word >= 2**63 else word
