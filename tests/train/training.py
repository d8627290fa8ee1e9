"""A small trainer for tests, and what stands for a kill."""

import numpy as np
import torch

from openqwen.model import ModelConfig, Qwen2, initialize
from openqwen.support.generators import Generators
from openqwen.train.losses import next_token
from openqwen.train.packed_batch import PackedBatch
from openqwen.train.trainer import Place, Trainer, TrainingConfig


class Stop(Exception):
    """Stands for a kill."""


def network(width=32, tied=True):
    model = Qwen2(
        ModelConfig(
            64, width, 2 * width, 2, 2, 1, max_position_embeddings=64, tie_word_embeddings=tied
        )
    )
    initialize(model, Generators(5).torch("weights"))
    return model


def micros(generators, step):
    """Two micro-batches; part of them is drawn, so that a resumed run must restore the
    generator.
    """
    rng = np.random.default_rng(step)
    noise = generators["noise"].integers(0, 64, 9).tolist()
    return [
        PackedBatch.of([(rng.integers(0, 64, 9).tolist(), [1] * 9), (noise, [1] * 9)])
        for _ in range(2)
    ]


def trainer(
    folder,
    model=None,
    stop_at=None,
    save_seconds=0.0,
    steps=12,
    rate=1e-2,
    micros=micros,
    **optimizer,
):
    generators, model = Generators(5), model or network()

    def batch(step):
        if step == stop_at:
            raise Stop
        return micros(generators, step)

    config = TrainingConfig(
        train={"learning_rate": rate, **optimizer}, save={"seconds": save_seconds}
    )
    place = Place(folder / "output", folder, 5, "test")
    return Trainer(
        place, config, model, batch, lambda rows: next_token(model, rows), steps, generators
    )


def same_bits(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
