"""Sequences cut into batches by a token budget."""

from collections.abc import Iterator, Sequence


def cut_to_budget(sizes: Sequence[int], budget: int) -> Iterator[slice]:
    """Cut a list of sequences, in order, into runs of at most `budget` tokens.

    sizes: tokens of each sequence. A sequence longer than the budget is a run of its own.
    """
    start = total = 0
    for number, size in enumerate(sizes):
        if number > start and total + size > budget:
            yield slice(start, number)
            start, total = number, 0
        total += size
    if start < len(sizes):
        yield slice(start, len(sizes))
