"""Devices: which one to use, its precision, its memory, its peak speed."""

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
    """CUDA where it is available, else the CPU.

    Apple's MPS is never chosen by default: its float32 results are not reproducible bit by bit.
    """
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow or forbid, within the block, that a GPU rounds factors of float32 products to TF32."""
    before = torch.get_float32_matmul_precision()
    rounded = allowed and torch.cuda.is_available()
    torch.set_float32_matmul_precision("high" if rounded else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def free_memory() -> int:
    """Bytes of main memory that are available; half of all memory where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("MemAvailable"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Keep main memory that is freed within the block with the process, if the C library is glibc.

    Otherwise large tensors, which every training step makes and frees, are given back to the system
    and fetched again, and the system fills each page with zeros.
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
    """The peak memory so far in bytes: of tensors on a GPU, else of this whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@cache
def peak_flops(device: torch.device) -> float:
    """Peak floating-point operations per second, measured once; MFU is a share of this number.

    It is the best of five square matrix products: float32 with 2,048 rows on a CPU, bfloat16 with
    8,192 rows on a GPU.
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
