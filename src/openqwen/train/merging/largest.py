"""The largest steps of a parameter, which OnTIES keeps, for the compiled kernel.

The magnitude of the k-th largest step changes little from one step to the next. So the pass that
updates the moments also writes down the steps above a guess of it and counts them. If the k-th
largest is within the guessed bounds, it is chosen among the few that lie there, and nothing is read
twice. If not, a histogram of all magnitudes gives the bounds. The guess decides about the time
alone, not about the result, so it is not part of the state. It is the same on all ranks.
"""

import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from openqwen.train.merging import kernels
from openqwen.train.merging.select import DIGIT, bounds_of, digit_of
from openqwen.train.merging.task_vector import BLOCK, LANES, MergedParameter

_COARSE = 15  # bits of a float32's magnitude below its upper digit
_MOST = 2**31 - 1  # the largest magnitude
_INFINITE = 0x7F800000  # the bits of infinity; NaN is above
_TINY = 2**15  # magnitudes below count as 0 in a guess
_SMALL = 2**14  # parameters of which all magnitudes are compared
_REFINE = 16  # a bucket with more than 1/16 of the elements is divided
_FIRST, _NARROWEST, _WIDEST = 0.05, 0.005, 0.25  # widths of a guess, as shares of it


@dataclass
class _Guess:
    """Where the k-th largest magnitude of the next step may be.

    value: the last one, at the learning rate `rate`; None: there was no step. trend: by how much it
    last changed, as a factor. width: how far the next one may be from where the trend leads, as a
    share. written: steps that were written down on this rank.
    """

    value: float | None = None
    rate: float = 0.0
    trend: float = 1.0
    width: float = _FIRST
    written: int = 0

    def bounds(self, rate: float) -> tuple[int, int]:
        """Bits of magnitudes between which it may be; (1, 0) where it is expected to be 0."""
        expected = self._at(rate) * self.trend
        low = _bits(expected * (1 - self.width))
        return (low, _bits(expected * (1 + self.width))) if low >= _TINY else (1, 0)

    def room(self, count: int) -> int:
        """Places for the steps that will be written down."""
        return min(count, int(self.written * (1.2 + 4 * self.width)) + BLOCK)

    def learn(self, threshold: int, rate: float, written: int) -> None:
        """Take over what a step had: the bits of its threshold, and how many it wrote down."""
        self.written = written
        if threshold >= _INFINITE:
            self.value = None
            return
        value = 0.0 if threshold < _TINY else struct.unpack("f", struct.pack("i", threshold))[0]
        if value and (before := self._at(rate)):
            change = value / before
            error = 4 * abs(change / self.trend - 1)
            self.width = min(max(error, 0.8 * self.width, _NARROWEST), _WIDEST)
            self.trend = min(max(change, 0.5), 2.0)
        self.value, self.rate = value, rate

    def _at(self, rate: float) -> float:
        """The last value at a learning rate; 0: it is not known."""
        return (self.value or 0.0) * (rate / self.rate if self.rate else 1.0)


class LargestSteps:
    """Finds the steps that OnTIES keeps, for all parameters of an optimizer."""

    def __init__(self) -> None:
        self._guesses: dict[str, _Guess] = {}

    def choose(
        self, call: kernels.MergingCall, part: MergedParameter, rate: float
    ) -> tuple[Tensor, ...]:
        """Update the moments, and prepare the call for the parameter's largest steps.

        call: without what OnTIES needs. rate: the learning rate. Returns the lists to which the
        call points.
        """
        guess = self._guesses.setdefault(part.name, _Guess())
        count = part.elements.count
        lists = None
        if part.total <= _SMALL:
            lists = _collect(call, part, (1, _MOST), (count, count))
        elif guess.value is not None:
            room = guess.room(count)
            lists = _collect(call, part, guess.bounds(rate), (room, room))
        if lists is None:
            lists = _collect(call, part, *_by_histogram(call, part))
        assert lists is not None
        guess.learn(call.threshold, rate, call.steps_count)
        return lists


def _collect(
    call: kernels.MergingCall,
    part: MergedParameter,
    bounds: tuple[int, int],
    rooms: tuple[int, int],
) -> tuple[Tensor, ...] | None:
    """Write steps down, and find the last kept magnitude among those within the bounds.

    bounds: `MergingCall.low` and `high`. rooms: for steps, and for near ones. Returns the lists of
    steps; None if the magnitude is not within the bounds, or a rank had too little room.
    """
    low, high = call.low, call.high = bounds
    call.steps_room, call.near_room = rooms
    lanes = torch.empty(-(-call.count // LANES), dtype=torch.int16)
    starts = torch.empty(-(-call.count // BLOCK), dtype=torch.int64)
    steps = torch.empty(call.steps_room + LANES)  # the kernel reads sixteen at a time
    places = torch.empty(call.near_room, dtype=torch.int64)
    bits = torch.empty(call.near_room, dtype=torch.int32)
    call.lanes, call.starts, call.steps = lanes.data_ptr(), starts.data_ptr(), steps.data_ptr()
    call.near_places, call.near_bits = places.data_ptr(), bits.data_ptr()
    kernels.collect(call)
    call.gradient = 0  # the moments are updated
    full = call.steps_count > call.steps_room or call.near_count > call.near_room
    counts = part.reduce(torch.tensor([call.above, call.near_count, int(full)]))
    above, near, full = counts.tolist()
    left = part.largest - above
    if full or left < 0 or (left > near and low > 1):
        return None
    call.listed, call.threshold, call.last = 1, low, -1
    if left == 0:
        call.threshold = high + 1
    elif left < near:
        places, bits = places[: call.near_count], bits[: call.near_count]
        found, call.last = bounds_of(
            bits.long() - low,
            left,
            lambda equal: part.elements.index(places[equal]),
            part.reduce,
            (high - low).bit_length(),
        )
        call.threshold = low + found
    return lanes, starts, steps


def _by_histogram(
    call: kernels.MergingCall, part: MergedParameter
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Bounds of the last kept magnitude, and how many steps this rank has from the lower one on."""
    mine = kernels.count(call, -1, 2**DIGIT)
    call.gradient = 0
    counts = part.reduce(mine.clone())
    place, left = digit_of(counts, part.largest)
    larger = int(mine[place + 1 :].sum())
    low, high = place << _COARSE, (place + 1 << _COARSE) - 1
    if place == 0:
        return (1, high), (larger + int(mine[0]), int(mine[0]))  # zeros are never kept
    if int(counts[place]) * _REFINE > part.total:
        mine = kernels.count(call, place, 2**_COARSE)
        place, left = digit_of(part.reduce(mine.clone()), left)
        larger += int(mine[place + 1 :].sum())
        low = high = low + place
    return (low, high), (larger + int(mine[place]), int(mine[place]))


def _bits(value: float) -> int:
    """The bits of a float32 of this magnitude."""
    bits: int = struct.unpack("i", struct.pack("f", min(value, 3e38)))[0]
    return bits
