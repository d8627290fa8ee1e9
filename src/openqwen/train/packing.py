"""Best-fit packing of conversations into rows of a fixed token budget."""

from bisect import bisect_left, insort
from collections.abc import Sequence

from pydantic import Field

from openqwen.support.settings import Settings


class MicroBatchConfig(Settings):
    """How large a micro-batch is; for stages to inherit."""

    micro_tokens: int = Field(
        8_192, gt=0, description="tokens of one forward call; changes memory and speed alone"
    )


def pack(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Pack items into rows by best-fit decreasing: the longest first, into the fullest row it fits.

    Args:
        sizes: Tokens of each item.
        budget: The most tokens of a row. An item that exceeds it is a row of its own.

    Returns:
        The numbers of the items in each row, in the order in which rows were opened. O(n log n).
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        at = bisect_left(room, (sizes[item], -1))
        if at == len(room):
            left, row = budget, len(rows)
            rows.append([])
        else:
            left, row = room.pop(at)
        rows[row].append(item)
        if left > sizes[item]:
            insort(room, (left - sizes[item], row))
    return rows


def waste(sizes: Sequence[int], budget: int) -> float:
    """The share of the packed rows that is padding."""
    return 1.0 - sum(sizes) / (len(pack(sizes, budget)) * budget) if sizes else 0.0
