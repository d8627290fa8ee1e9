"""The compiled steps, native/merging.cpp, for contiguous float32 parameters on a CPU."""

import ctypes
import dataclasses
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from openqwen.model.kernels import address, follow_torch, function
from openqwen.model.structs import Address
from openqwen.train.merging.plain import StepNumbers

FORMS = {("dare", "weighted"): 0, ("dare", "unweighted"): 0}
FORMS |= {("ties", "weighted"): 1, ("ties", "unweighted"): 2}
_TYPES = {torch.float32: 1, torch.bfloat16: 2}
_Numbers = c_float * len(dataclasses.fields(StepNumbers))


class MergingCall(ctypes.Structure):
    """The arguments of one step, in the order of the structure in C++.

    weights … cached, gradient: float32, `count` elements; 0 for what the step does not need. The
    moments are updated where there is a gradient. first, run, stride: see `LocalElements`. task,
    task_lanes, task_starts: the entries of the task vector, see `TaskVector`. step_key, task_key:
    streams of the masks (OnDARE). limit: see `masks.limit`. fresh: the task vector has a new mask
    in each step. merges: 0 in the plain steps between two merges.

    OnTIES (see `largest.py`): `collect` writes down the steps with a magnitude from `low` on. lanes
    has a bit for each element, steps their values, starts the place of each block's first value.
    near_…: those of a magnitude up to `high`, with their local places; above: how many are larger.
    A list with more entries than its room is not complete. Magnitudes are bits of floats. listed:
    the step keeps what was written down, from `threshold` on; of the equal ones those with global
    indices up to `last`, all if it is negative. keep: how many steps the kernel itself is to choose
    by the same lists; 0: it is not.

    numbers: `StepNumbers` in order.
    """

    _fields_ = [
        *((name, Address) for name in ("weights", "mean", "square", "lost", "cached", "gradient")),
        *((name, c_int64) for name in ("count", "first", "run", "stride")),
        *((name, Address) for name in ("task", "task_lanes", "task_starts")),
        *((name, Address) for name in ("step_key", "task_key", "limit")),  # unsigned, 64 bits
        *((name, c_int64) for name in ("form", "task_type", "fresh", "merges")),
        *((name, c_int64) for name in ("low", "high", "listed", "keep")),
        *((name, Address) for name in ("lanes", "starts", "steps")),
        *((name, c_int64) for name in ("steps_room", "steps_count")),
        *((name, Address) for name in ("near_places", "near_bits")),
        *((name, c_int64) for name in ("near_room", "near_count", "above")),
        *((name, c_int64) for name in ("threshold", "last")),
        ("numbers", _Numbers),
    ]


def usable(*tensors: Tensor) -> bool:
    """Whether the compiled step can work on these tensors."""
    plain = all(t.dtype == torch.float32 and t.is_cpu and t.is_contiguous() for t in tensors)
    return plain and _steps() is not None


def packed(numbers: StepNumbers) -> ctypes.Array[c_float]:
    """The numbers as a call has them."""
    return _Numbers(*vars(numbers).values())


def call(**fields: Any) -> MergingCall:
    """A call with tensors given for addresses; fields that are left out are 0."""
    values = {k: address(v) if v is None or isinstance(v, Tensor) else v for k, v in fields.items()}
    task = fields.get("task")
    kind = 0 if task is None or not len(task) else _TYPES[task.dtype]
    return MergingCall(task_type=kind, **values)


def steps(calls: Sequence[MergingCall]) -> list[MergingCall]:
    """Do the steps of some parameters in one call. Returns the calls with what was found."""
    kernel, given = _steps(), (MergingCall * len(calls))(*calls)
    assert kernel is not None
    follow_torch()
    kernel(ctypes.addressof(given), len(given))
    return list(given)


def collect(merging: MergingCall) -> None:
    """Update the moments, and write down the large steps and how many there are."""
    kernel = function("openqwen_merging_collect", c_void_p)
    assert kernel is not None
    follow_torch()
    kernel(ctypes.addressof(merging))


def count(merging: MergingCall, bucket: int, slots: int) -> Tensor:
    """The histogram of the step's magnitudes: by their upper bits, or by the lower within a bucket.

    bucket: -1, or the upper bits. slots: of the histogram. Returns int64, [slots].
    """
    kernel = function("openqwen_merging_count", c_void_p, c_int64, c_void_p)
    assert kernel is not None
    counts = torch.zeros(slots, dtype=torch.int64)
    follow_torch()
    kernel(ctypes.addressof(merging), bucket, counts.data_ptr())
    return counts


def _steps() -> Any:
    return function("openqwen_merging_steps", c_void_p, c_int64)
