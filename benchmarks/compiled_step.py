"""Compare plain and compiled training steps of a 31-million-parameter network on one CPU thread.

    python benchmarks/compiled_step.py

Prints the median processor time of a step (2 rows of 512 tokens), and that of the first compiled
step, which includes the compilation.
"""

import statistics
import time

import numpy as np
import torch
from bench_train import SMALL

from openqwen.model import ModelConfig, Qwen2, initialize
from openqwen.train.compute import compile_layers
from openqwen.train.losses import next_token
from openqwen.train.optimizer import OptimizerConfig, build_optimizers
from openqwen.train.packed_batch import PackedBatch


def stepper(compiled: bool):
    """A function that does one step."""
    model = Qwen2(ModelConfig(**SMALL, vocab_size=16_384))
    initialize(model, torch.Generator().manual_seed(0))
    if compiled:
        compile_layers(model)
    (optimizer,) = build_optimizers(model, OptimizerConfig())
    rng = np.random.default_rng(0)
    rows = PackedBatch.of(
        [(rng.integers(0, 16_384, 513), np.ones(513, dtype=bool)) for _ in range(2)]
    )

    def step() -> float:
        start = time.process_time()
        next_token(model, rows).sum.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.process_time() - start

    return step


if __name__ == "__main__":
    torch.set_num_threads(1)
    plain, compiled = stepper(False), stepper(True)
    print(f"first step: plain {plain():.1f} s, compiled {compiled():.1f} s", flush=True)
    pairs = [(plain(), compiled()) for _ in range(4)]
    for name, seconds in zip(("plain", "compiled"), zip(*pairs)):
        print(f"{name}: {statistics.median(seconds):.2f} s a step")
    print(f"plain over compiled: {statistics.median(a / b for a, b in pairs):.3f}")
