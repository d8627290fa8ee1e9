"""Where the tensors live: a GPU where there is one, without being asked; the CPU otherwise."""

import ctypes
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch


def best_device() -> torch.device:
    """CUDA, else the CPU.

    Apple's MPS is not chosen by itself: its float32 results are not reproducible bit by bit.
    """
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Within, a GPU's float32 products may round their factors to TF32, for speed, or may not."""
    before = torch.get_float32_matmul_precision()
    rounded = allowed and torch.cuda.is_available()
    torch.set_float32_matmul_precision("high" if rounded else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def free_memory() -> int:
    """Bytes of main memory that a program could still take; half of all where the system does not
    tell.
    """
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            return next(
                int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable")
            )
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Main memory that is freed in here stays with the process until the end, where the C library
    is glibc.

    Large tensors that come and go in every step of training would else be given back and fetched,
    page by zeroed page.
    """
    libc = ctypes.CDLL(None)
    if not (sys.platform == "linux" and hasattr(libc, "mallopt")):
        yield
        return
    trim_threshold, mmap_max = -1, -4  # malloc.h
    libc.mallopt(trim_threshold, -1)
    libc.mallopt(mmap_max, 0)
    try:
        yield
    finally:
        libc.mallopt(trim_threshold, 128 * 1024)
        libc.mallopt(mmap_max, 65_536)
        libc.malloc_trim(0)


def peak_memory(device: torch.device) -> int:
    """The most bytes held so far: of the GPU by tensors, else of main memory by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@cache
def peak_flops(device: torch.device) -> float:
    """Operations a second of this device's best large matrix product, measured once: what a share
    of the peak is of.

    float32 on a CPU, bfloat16 on a GPU; the best of five products of 2,048 (8,192) rows and
    columns.
    """
    size, dtype = (8_192, torch.bfloat16) if device.type == "cuda" else (2_048, torch.float32)
    a = torch.ones(size, size, dtype=dtype, device=device)
    out, best = torch.empty_like(a), 0.0
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, a, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2.0 * size**3 / (time.perf_counter() - start))
    return best
