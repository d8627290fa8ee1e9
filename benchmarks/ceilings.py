"""Measure this machine's memory bandwidth and its peak of 8-bit operations (VNNI).

    python benchmarks/ceilings.py

The engine's speed is given as a share of these. The best of several tries counts, because other
work on the machine only lowers them.
"""

import ctypes
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from openqwen.support import native

_BYTES, _ROUNDS, _TRIES = 1 << 29, 20_000_000, 5


@dataclass(frozen=True)
class Ceilings:
    """Each per second, on as many threads as PyTorch uses; None where it cannot be measured."""

    bytes_read: float | None
    operations: float | None


def measure() -> Ceilings:
    """Takes about two seconds."""
    library = native.load("ceilings", [Path(__file__).with_suffix(".cpp")])
    if library is None:
        return Ceilings(None, None)
    threads = torch.get_num_threads()
    memory = torch.ones(_BYTES // 8, dtype=torch.int64)
    read, multiply = library.read_all, library.multiply_bytes
    read.argtypes, read.restype = [ctypes.c_void_p, ctypes.c_int64], ctypes.c_int64
    multiply.argtypes, multiply.restype = [ctypes.c_int64], ctypes.c_int64
    share = len(memory) // threads
    with ThreadPoolExecutor(threads) as pool:

        def best(work: Callable[[int], int]) -> float:
            return min(_timed(lambda: list(pool.map(work, range(threads)))) for _ in range(_TRIES))

        reading = best(lambda n: read(memory[n * share :].data_ptr(), share))
        operations = multiply(1) * _ROUNDS * threads
        multiplying = best(lambda _: multiply(_ROUNDS))
    return Ceilings(8 * share * threads / reading, operations / multiplying if operations else None)


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    found = measure()
    print(f"memory read: {(found.bytes_read or 0) / 1e9:.1f} GB/s")
    print(f"products of bytes: {(found.operations or 0) / 1e9:.0f} GOP/s")
