"""A parameter's part in merging: its task vector, which is sparse, dense, or in a file."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from openqwen.support.errors import disk_errors
from openqwen.train.merging.masks import LocalElements
from openqwen.train.merging.select import Reduce

LANES, BLOCK = 16, 4096  # elements of a word of bits, and of a block, as in native/merging.cpp


@dataclass(frozen=True)
class TaskVector:
    """The entries of τ or F(τ) that a rank holds; without values it has none.

    values: [count], or where only some have a place, side by side with sixteen zeros behind them.
    lanes: then which elements have one, a bit each, int16, [count / 16]. starts: the place of the
    first value of each block of 4,096 elements, int64.
    """

    values: Tensor | None = None
    lanes: Tensor | None = None
    starts: Tensor | None = None

    def __bool__(self) -> bool:
        return self.values is not None

    @classmethod
    def of(
        cls,
        tau: Tensor,
        kept: Tensor | None,
        sparse: bool,
        dtype: torch.dtype,
        folder: Path | None,
    ) -> "TaskVector":
        """From dense entries, [count].

        Args:
            tau: the entries.
            kept: which of them stay, bool; None: all.
            sparse: store these only.
            dtype: of the stored values.
            folder: where dense values are put into a temporary file; None: in memory.
        """
        if kept is not None and sparse:
            return cls(F.pad(tau[kept], (0, LANES)).to(dtype), *_bits(kept))
        if kept is not None:
            tau = torch.where(kept, tau, 0.0)
        values = tau.to(dtype)
        return cls(values if folder is None else _mapped(values, folder))

    def dense(self, count: int) -> tuple[Tensor | float, Tensor | bool]:
        """The entries of all `count` places, and which places have one."""
        if self.values is None or not len(self.values):
            return 0.0, False
        if self.lanes is None:
            return self.values, True
        bits = torch.arange(LANES, device=self.lanes.device, dtype=torch.int16)
        has = (self.lanes[:, None] >> bits & 1).flatten()[:count].bool()
        values = self.values.new_zeros(count)
        values[has] = self.values[:-LANES]
        return values, has


def _bits(kept: Tensor) -> tuple[Tensor, Tensor]:
    """A mask as bits, sixteen in a word, and how many are set before each block."""
    padded = F.pad(kept, (0, -len(kept) % BLOCK))
    weights = (2 ** torch.arange(LANES, device=kept.device)).to(torch.int16)  # the last: −2¹⁵
    words = (padded.view(-1, LANES) * weights).sum(1, dtype=torch.int16)
    counts = padded.view(-1, BLOCK).sum(1)
    return words[: -(-len(kept) // LANES)].clone(), counts.cumsum(0) - counts


@dataclass(frozen=True)
class MergedParameter:
    """What stays the same about a parameter.

    elements, task: of this rank. reduce: see `sum_over_parts`. total: elements on all ranks.
    largest: how many of them OnTIES keeps.
    """

    name: str
    elements: LocalElements
    reduce: Reduce
    total: int
    largest: int
    task: TaskVector


def _mapped(values: Tensor, folder: Path) -> Tensor:
    """The values in a temporary file, which has no name and goes with the process."""
    words = values.cpu().view(torch.int16 if values.itemsize == 2 else values.dtype).numpy()
    if not len(words):
        return values
    folder.mkdir(parents=True, exist_ok=True)
    with disk_errors(folder), tempfile.TemporaryFile(dir=folder) as file:
        pages = np.memmap(file, dtype=words.dtype, shape=words.shape, mode="w+")
        pages[:] = words
        pages.flush()
    return torch.from_numpy(pages).view(values.dtype)
