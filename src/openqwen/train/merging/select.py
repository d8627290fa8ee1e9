"""The largest entries of a tensor by magnitude, also of one whose parts lie on several ranks.

The k-th largest magnitude is found digit by digit: the ranks add up how many of their magnitudes
have each upper digit, choose the digit in which the k-th lies, and go on within it. Magnitudes are
compared by the bits of their floats, which have the same order; NaN is larger than infinity, as in
torch.topk. Of equal magnitudes those with the smallest global index are taken, so the result does
not depend on how the tensor is divided.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from openqwen.train.merging.masks import LocalElements

Reduce = Callable[[Tensor], Tensor]  # sums an integer tensor over the ranks that share a parameter
DIGIT = 16  # bits of a digit
_SMALL = 2**16  # keys up to which a quickselect is faster than histograms
_INDEX_BITS = 48
_ROWS = 2**7  # a histogram is searched in rows, which is faster than place by place
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def sum_over_parts(parameter: Tensor) -> Reduce:
    """A function that sums counts in place over the ranks that hold parts of a parameter."""
    groups = []
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        # A replica of another rank's elements must not count twice.
        dims = [dim for dim, kind in enumerate(placements) if not kind.is_replicate()]
        groups = [mesh.get_group(dim) for dim in dims if mesh.size(dim) > 1]

    def reduce(counts: Tensor) -> Tensor:
        for group in groups:
            dist.all_reduce(counts, group=group)
        return counts

    return reduce if groups else whole


def whole(counts: Tensor) -> Tensor:
    """The sum where one rank holds all."""
    return counts


def magnitudes(values: Tensor) -> Tensor:
    """The bits of the absolute values as int64, in the order of the absolute values."""
    return values.abs().contiguous().view(_WORDS[values.itemsize]).long()


def digit_of(counts: Tensor, rank: int) -> tuple[int, int]:
    """The place in a histogram of the rank-th largest element, and its rank within that place."""
    rows = counts.view(_ROWS, -1)
    row, rank = _place(rows.sum(1), rank)
    column, rank = _place(rows[row], rank)
    return row * rows.shape[1] + column, rank


def _place(counts: Tensor, rank: int) -> tuple[int, int]:
    above = counts.flip(0).cumsum(0).flip(0)  # elements at this place or a larger one
    place = int((above >= rank).sum()) - 1
    return place, rank - int(above[place] - counts[place])


def top_mask(values: Tensor, k: int, elements: LocalElements, reduce: Reduce) -> Tensor:
    """Which of this rank's elements are among the k largest by magnitude; bool, [count].

    values: this rank's elements, [count]. k: at least 1, at most the elements of all ranks.
    """
    index = elements.index(torch.arange(elements.count, device=values.device))
    return top_of(magnitudes(values), k, index, reduce, 8 * values.itemsize)


def top_of(bits: Tensor, k: int, index: Tensor, reduce: Reduce, size: int) -> Tensor:
    """Which elements are among the k largest over all ranks; bool.

    Args:
        bits: non-negative numbers below 2**size, of this rank.
        k: at least 1, at most the number of elements of all ranks.
        index: their global indices, which decide between equal numbers.
        reduce: see `sum_over_parts`.
        size: bits of a number.
    """
    threshold, last = bounds_of(bits, k, lambda equal: index[equal], reduce, size)
    equal = bits == threshold
    return (bits > threshold) | (equal if last < 0 else equal & (index <= last))


def bounds_of(
    bits: Tensor, k: int, index_of: Callable[[Tensor], Tensor], reduce: Reduce, size: int
) -> tuple[int, int]:
    """The k-th largest number, and the last global index at which an equal one is among the k.

    The index is -1 where all equal ones are. index_of: gives the global indices of a mask's
    elements; the others are as in `top_of`.
    """
    threshold, left = _kth(bits, k, reduce, size)
    equal = bits == threshold
    if int(reduce(equal.sum())) == left:
        return threshold, -1
    # The smallest index has the largest complement.
    most = 2**_INDEX_BITS - 1
    complement, _ = _kth(most - index_of(equal), left, reduce, _INDEX_BITS)
    return threshold, most - complement


def _kth(keys: Tensor, k: int, reduce: Reduce, size: int) -> tuple[int, int]:
    """The k-th largest of keys of `size` bits over all ranks, and its rank among equal keys."""
    if reduce is whole and len(keys) <= _SMALL:
        found = keys.kthvalue(len(keys) - k + 1).values
        return int(found), k - int((keys > found).sum())
    value = 0
    for shift in reversed(range(0, size, DIGIT)):
        digits = keys >> shift & (2**DIGIT - 1)
        place, k = digit_of(reduce(torch.bincount(digits, minlength=2**DIGIT)), k)
        keys = keys[digits == place]
        value |= place << shift
    return value, k
