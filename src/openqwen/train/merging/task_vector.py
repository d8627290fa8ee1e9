"""A parameter's part in merging: its task vector, which is sparse, dense, or in a file."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from openqwen.support.errors import disk_errors
from openqwen.train.merging.masks import LocalElements
from openqwen.train.merging.select import Reduce


@dataclass(frozen=True)
class TaskVector:
    """The entries of τ or F(τ) that a rank holds; without values it has none.

    values: [entries], or [count] without an index. index: their places, sorted, int32.
    """

    values: Tensor | None = None
    index: Tensor | None = None

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
            sparse: store these and their places only.
            dtype: of the stored values.
            folder: where dense values are put into a temporary file; None: in memory.
        """
        if kept is not None and sparse:
            assert len(tau) < 2**31
            places = kept.nonzero().flatten()
            return cls(tau[places].to(dtype), places.int())
        if kept is not None:
            tau = torch.where(kept, tau, 0.0)
        values = tau.to(dtype)
        return cls(values if folder is None else _mapped(values, folder))

    def dense(self, count: int) -> tuple[Tensor | float, Tensor | bool]:
        """The entries of all `count` places, and which places have one."""
        if self.values is None or not len(self.values):
            return 0.0, False
        if self.index is None:
            return self.values, True
        values = self.values.new_zeros(count)
        has = torch.zeros(count, dtype=torch.bool, device=values.device)
        values[self.index], has[self.index] = self.values, True
        return values, has


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
