"""What each rank of test_parallel.py runs: a few steps of a tiny network. Arguments: folder, last step, kind."""

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from openqwen.model import ModelConfig, Qwen2, initialize
from openqwen.model.lora import LoraConfig, add_adapters
from openqwen.support.generators import Generators
from openqwen.train.losses import next_token
from openqwen.train.optimizer import OptimizerConfig
from openqwen.train.parallel import join
from openqwen.train.rows import Rows
from openqwen.train.trainer import SaveConfig, Trainer


class Stop(Exception):
    """Stands for a kill."""


def train(folder: Path, stop_at: int, adapters: bool) -> Trainer:
    """Train ten steps of five micro-batches of one or two documents; stop before step `stop_at`."""
    generators = Generators(5)
    model = Qwen2(ModelConfig(64, 32, 48, 3, 4, 2, max_position_embeddings=64, tie_word_embeddings=True))
    initialize(model, generators.torch("weights"))
    if adapters:
        add_adapters(model, LoraConfig(rank=2), generators.torch("lora"))

    def batch(step: int) -> list[Rows]:
        if step == stop_at:
            raise Stop
        rng = np.random.default_rng(step)
        documents = [rng.integers(0, 64, rng.integers(3, 20)).tolist() for _ in range(7)]
        samples = [(ids, [1] * len(ids)) for ids in documents]
        return [Rows.of(samples[a:b]) for a, b in ((0, 2), (2, 3), (3, 4), (4, 6), (6, 7))]

    trainer = Trainer(
        label="ranks",
        model=model,
        batch=batch,
        loss=lambda rows: next_token(model, rows),
        tokens=lambda rows: len(rows.tokens),
        steps=10,
        optimizer=OptimizerConfig(learning_rate=1e-2),
        save=SaveConfig(seconds=0),
        scratch=folder,
        output=folder / "output",
        generators=generators,
    )
    try:
        trainer.run()
    except Stop:
        return trainer
    whole = trainer.whole()
    if trainer.world.main:
        save_file({n: p.detach().contiguous() for n, p in whole.named_parameters()}, folder / "weights.safetensors")
    return trainer


if __name__ == "__main__":
    torch.set_num_threads(1)
    trained = train(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "adapters")
    trained.world.wait()
    if join().mesh is not None:
        torch.distributed.destroy_process_group()
