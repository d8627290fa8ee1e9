"""The largest steps of a parameter, which OnTIES keeps, for the compiled kernel.

The magnitude of the k-th largest step changes little from one step to the next. So the pass that
updates the moments also writes down the steps above a guess of it and counts them. If the k-th
largest is within the guessed bounds, it is chosen among the few that lie there, and nothing is read
twice: by the kernel, or where ranks share the parameter, here. If not, a histogram of all
magnitudes gives the bounds. The guess decides about the time alone, not about the result, so it is
not part of the state. It is the same on all ranks.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openqwen.train.merging import kernels
from openqwen.train.merging.select import DIGIT, bounds_of, digit_of, whole
from openqwen.train.merging.task_vector import BLOCK, LANES, MergedParameter

_COARSE = 15  # bits of a float32's magnitude below its upper digit
_MOST = 2**31 - 1  # the largest magnitude
_INFINITE = 0x7F800000  # the bits of infinity; NaN is above
_TINY = 2**15  # magnitudes below count as 0 in a guess
_SMALL = 2**14  # parameters of which all magnitudes are compared
_REFINE = 16  # a bucket with more than 1/16 of the elements is divided
_LISTS = {
    "lanes": torch.int16,
    "starts": torch.int64,
    "steps": torch.float32,
    "near_places": torch.int64,
    "near_bits": torch.int32,
}
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


@dataclass(frozen=True)
class PendingStep:
    """A parameter whose step is to be done by the kernel.

    rate: the learning rate. gradient: to which the call points, so it must live until then.
    """

    call: kernels.MergingCall
    part: MergedParameter
    rate: float
    gradient: Tensor


class LargestSteps:
    """Does the steps that keep the largest entries, for all parameters of an optimizer."""

    def __init__(self) -> None:
        self._guesses: dict[str, _Guess] = {}
        self._lists = [torch.empty(0, dtype=dtype) for dtype in _LISTS.values()]

    def run(self, steps: Sequence[PendingStep]) -> None:
        """Do the steps; their calls lack what OnTIES needs."""
        alone, failed, others = (list[PendingStep]() for _ in range(3))
        for step in steps:
            known = self._set_guess(step) and step.part.reduce is whole
            step.call.keep = step.part.largest if known else 0
            (alone if known else others).append(step)
        self._set_lists([step.call for step in alone])
        for step, done in zip(alone, kernels.steps([step.call for step in alone])):
            if done.listed:
                self._learn(step, done)
            else:  # the moments are updated
                step.call.gradient = step.call.keep = 0
                failed.append(step)
        # All ranks take the same way here, also those that hold nothing of a parameter.
        for step in others:
            if not (self._set_guess(step) and self._collected(step.call, step.part)):
                failed.append(step)
            else:
                self._finish(step)
        for step in failed:
            _set_bounds(step.call, *_by_histogram(step.call, step.part))
            found = self._collected(step.call, step.part)
            assert found
            self._finish(step)

    def _finish(self, step: PendingStep) -> None:
        self._learn(step, step.call)
        kernels.steps([step.call])

    def _learn(self, step: PendingStep, done: kernels.MergingCall) -> None:
        self._guesses[step.part.name].learn(done.threshold, step.rate, done.steps_count)

    def _set_guess(self, step: PendingStep) -> bool:
        """Give a call the guessed bounds and rooms; whether there is a guess."""
        call, part = step.call, step.part
        guess = self._guesses.setdefault(part.name, _Guess())
        if part.total <= _SMALL:
            _set_bounds(call, (1, _MOST), (call.count, call.count))
            return True
        if guess.value is not None:
            room = guess.room(call.count)
            _set_bounds(call, guess.bounds(step.rate), (room, room))
        return guess.value is not None

    def _collected(self, call: kernels.MergingCall, part: MergedParameter) -> bool:
        """Write steps down, and find the last kept magnitude among those within the bounds.

        False if the magnitude is not within the bounds, or a rank had too little room. The kernel's
        `choose_last` does the same for one rank.
        """
        self._set_lists([call])
        kernels.collect(call)
        full = call.steps_count > call.steps_room or call.near_count > call.near_room
        counts = part.reduce(torch.tensor([call.above, call.near_count, int(full)]))
        above, near, full = counts.tolist()
        left = part.largest - above
        if full or left < 0 or (left > near and call.low > 1):
            return False
        call.listed, call.threshold, call.last = 1, call.low, -1
        if left == 0:
            call.threshold = call.high + 1
        elif left < near:
            places, bits = (kept[: call.near_count] for kept in self._lists[3:])
            found, call.last = bounds_of(
                bits.long() - call.low,
                left,
                lambda equal: part.elements.index(places[equal]),
                part.reduce,
                (call.high - call.low).bit_length(),
            )
            call.threshold = call.low + found
        return True

    def _set_lists(self, calls: Sequence[kernels.MergingCall]) -> None:
        """Give calls that run one after the other the lists, which are as long as one needs."""
        if not calls:
            return
        count = max(call.count for call in calls)
        room = max(call.steps_room for call in calls) + LANES  # the kernel reads sixteen at a time
        near = max(call.near_room for call in calls)
        sizes = (-(-count // LANES), -(-count // BLOCK), room, near, near)
        for at, (size, dtype) in enumerate(zip(sizes, _LISTS.values())):
            if len(self._lists[at]) < size:
                self._lists[at] = torch.empty(size, dtype=dtype)
        for call in calls:
            for name, kept in zip(_LISTS, self._lists):
                setattr(call, name, kept.data_ptr())


def _set_bounds(call: kernels.MergingCall, bounds: tuple[int, int], rooms: tuple[int, int]) -> None:
    """Bounds of the last kept magnitude, and rooms for steps, and for those within the bounds."""
    call.low, call.high = bounds
    call.steps_room, call.near_room = rooms


def _by_histogram(
    call: kernels.MergingCall, part: MergedParameter
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Bounds of the last kept magnitude, and how many steps this rank has there and above."""
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
