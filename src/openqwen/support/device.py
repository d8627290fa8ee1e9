"""Where the tensors live: a GPU where there is one, without being asked; the CPU otherwise."""

import os
import platform
import resource
import sys
import time
from functools import cache

import torch


def best_device() -> torch.device:
    """CUDA, else the CPU. Apple's MPS is not chosen by itself: its float32 results are not reproducible bit by bit."""
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
        return torch.device("cuda")
    return torch.device("cpu")


def describe() -> dict[str, object]:
    """The machine a result was made on, for manifests and reports."""
    device = best_device()
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(pages * size / 2**30, 1),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def free_memory() -> int:
    """Bytes of main memory that a program could still take; half of all where the system does not tell."""
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def peak_memory(device: torch.device) -> int:
    """The most bytes held so far: of the GPU by tensors, else of main memory by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@cache
def peak_flops(device: torch.device) -> float:
    """Operations a second of this device's best large matrix product, measured once: what a share of the peak is of.

    float32 on a CPU, bfloat16 on a GPU; the best of five products of 2,048 (8,192) rows and columns.
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


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
