"""The network's compiled kernels: one library of all files in `native/`, with one thread pool.

They are never required: without a compiler `function` returns None, and callers take their
plain PyTorch path. The compiler may not contract or reorder floating-point operations, so that
every path gives the same bits.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from openqwen.support import native

_FLAGS = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, built on first use; None where they cannot be built."""
    sources = sorted((Path(__file__).parent / "native").glob("*.[hc]*"))
    return native.load("model", sources, _FLAGS)


@cache
def function(name: str, *arguments: Any, result: Any = None) -> Callable[..., Any] | None:
    """A kernel by its C name, with the ctypes of its arguments and result; None without a library.

    An address is a `c_void_p` and is passed as an int.
    """
    if (loaded := library()) is None:
        return None
    kernel = getattr(loaded, name)
    kernel.argtypes, kernel.restype = arguments, result
    return kernel


@dataclass
class ThreadPool:
    """The state of the library's thread pool, which serves the whole process.

    threads: how many work, the caller included. fixed: `alone` is active, so the pool keeps its
    threads although PyTorch has only one.
    """

    threads: int = 0
    fixed: bool = False


@cache
def pool() -> ThreadPool:
    """The one state of the one pool. Like the library it lives as long as the process."""
    return ThreadPool()


def follow_torch() -> None:
    """Give the pool as many threads as PyTorch has now; call it before kernels that use the pool.

    PyTorch's number may change at any time (`torch.set_num_threads`) without notice, so each call
    compares it, which is cheap.
    """
    state, count = pool(), torch.get_num_threads()
    if state.fixed or count == state.threads:
        return
    if setter := function("openqwen_set_threads", ctypes.c_int32):
        setter(count)
        state.threads = count


@contextmanager
def alone() -> Iterator[None]:
    """Within the block PyTorch works on one thread, while the pool keeps as many as PyTorch had.

    After each operation PyTorch's other threads (OpenMP's) spin for milliseconds on the cores that
    the pool's threads need.
    """
    state = pool()
    if state.fixed or library() is None:
        yield
        return
    follow_torch()
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    state.fixed = True
    try:
        yield
    finally:
        state.fixed = False
        torch.set_num_threads(count)


def address(tensor: torch.Tensor | None) -> int:
    """The address of a tensor's first element; 0 for None, which C++ sees as a null pointer."""
    return 0 if tensor is None else tensor.data_ptr()


def linear() -> Callable[..., Any] | None:
    """`openqwen_linear` of native/linear.cpp on as many threads as PyTorch has; None without it."""
    follow_torch()
    return _linear()


@cache
def _linear() -> Callable[..., Any] | None:
    return function("openqwen_linear", c_void_p, c_void_p, c_int64, c_void_p, c_void_p)
