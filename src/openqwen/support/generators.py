"""Every random draw has a named generator, and all of them are saved (law 4)."""

import hashlib
from typing import Any

import numpy as np
import torch


def _key(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")


class Generators:
    """Independent streams of random numbers, one a name, all grown from one seed.

    The stream of a name depends on (seed, name) alone: drawing more from one never moves another.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self._streams: dict[str, np.random.Generator] = {}

    def __getitem__(self, name: str) -> np.random.Generator:
        if name not in self._streams:
            self._streams[name] = np.random.Generator(np.random.Philox(key=_key(self.seed, name)))
        return self._streams[name]

    def torch(self, name: str) -> torch.Generator:
        """A fresh torch generator for a single use, such as initialising weights."""
        return torch.Generator().manual_seed(_key(self.seed, name) % 2**63)

    def state(self) -> dict[str, Any]:
        """JSON-ready: the seed and each stream's position."""
        return {
            "seed": self.seed,
            "streams": {n: _plain(g.bit_generator.state) for n, g in self._streams.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state()` was taken."""
        self.seed = state["seed"]
        self._streams.clear()
        for name, position in state["streams"].items():
            stream = self[name]
            inner = dict(position)
            inner["state"] = {k: np.array(v, dtype=np.uint64) for k, v in position["state"].items()}
            inner["buffer"] = np.array(position["buffer"], dtype=np.uint64)
            stream.bit_generator.state = inner


def _plain(value: Any) -> Any:
    """NumPy arrays and integers inside a Philox state, as lists and ints."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return [int(v) for v in value]
    return int(value) if isinstance(value, np.integer) else value
