"""The network's compiled kernels: one library of all files in `native/`, with one pool of threads.

Never required (law 7): where there is no compiler, `function` returns None and callers take their
plain PyTorch path. Sums are rounded in the order in which they are written, so that every path
gives the same bits.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch

from openqwen.support import native

_FLAGS = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
_width = 0  # threads of the pool
_alone = False


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where there are none; built on first use."""
    sources = sorted((Path(__file__).parent / "native").glob("*.[hc]*"))
    return native.load("model", sources, _FLAGS)


@cache
def function(name: str, *arguments: Any, result: Any = None) -> Callable[..., Any] | None:
    """A kernel by its C name, given the ctypes of its arguments (an address is a `c_void_p`, passed
    as an int).
    """
    if (loaded := library()) is None:
        return None
    found = getattr(loaded, name)
    found.argtypes, found.restype = arguments, result
    return found


def follow_torch() -> None:
    """Give the pool as many threads as PyTorch has now.

    Cheap; called before kernels that share their work out.
    """
    global _width
    count = _width if _alone else torch.get_num_threads()
    if count != _width and (setter := function("openqwen_set_threads", ctypes.c_int32)):
        setter(count)
        _width = count


@contextmanager
def alone() -> Iterator[None]:
    """While the block lasts PyTorch works on one thread: after each of its operations the others
    would look for work on the cores that the pool's threads need, for milliseconds (OpenMP's
    way)."""
    global _alone
    if _alone or library() is None:
        yield
        return
    follow_torch()
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    _alone = True
    try:
        yield
    finally:
        _alone = False
        torch.set_num_threads(count)


def address(tensor: torch.Tensor | None) -> int | None:
    """Where a tensor begins, for a `c_void_p`; None where there is none."""
    return None if tensor is None else tensor.data_ptr()


def linear() -> Callable[..., Any] | None:
    """`openqwen_linear` of native/linear.cpp, on as many threads as PyTorch has; None where there
    are no kernels.
    """
    follow_torch()
    return _linear()


@cache
def _linear() -> Callable[..., Any] | None:
    return function("openqwen_linear", c_void_p, c_void_p, c_int64, c_void_p, c_void_p)
