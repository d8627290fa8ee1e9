"""Named random generators. Every random draw uses one, and all are saved."""

import hashlib
from typing import Any

import numpy as np
import torch


def _key(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")


class Generators:
    """Independent streams of random numbers, one for each name, from one seed.

    A stream depends on (seed, name) alone, so drawing from one never changes another.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self._streams: dict[str, np.random.Generator] = {}

    def __getitem__(self, name: str) -> np.random.Generator:
        if name not in self._streams:
            self._streams[name] = np.random.Generator(np.random.Philox(key=_key(self.seed, name)))
        return self._streams[name]

    def torch(self, name: str) -> torch.Generator:
        """A new torch generator for a single use, such as initialising weights; it is not saved."""
        return torch.Generator().manual_seed(_key(self.seed, name) % 2**63)

    def state(self) -> dict[str, Any]:
        """The seed and each stream's position, as values that JSON can hold."""
        streams = {n: _plain(g.bit_generator.state) for n, g in self._streams.items()}
        return {"seed": self.seed, "streams": streams}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a saved `state()`: the next draws are those that followed it."""
        self.seed = state["seed"]
        self._streams.clear()
        for name, position in state["streams"].items():
            stream = self[name]
            inner = dict(position)
            inner["state"] = {k: np.array(v, dtype=np.uint64) for k, v in position["state"].items()}
            inner["buffer"] = np.array(position["buffer"], dtype=np.uint64)
            stream.bit_generator.state = inner


def _plain(value: Any) -> Any:
    """A Philox state with NumPy's arrays and integers replaced by lists and ints."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return [int(v) for v in value]
    return int(value) if isinstance(value, np.integer) else value
