"""What each rank of test_parallel*.py runs: a few steps of tiny networks.

Arguments: folder, last step, and cases such as `experts` or `dense:tensor=2:context=2`; each trains
in a folder of its own name, which holds its log, its first step's gradient and the weights in the
end.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from openqwen.model import DualChunk, ModelConfig, Qwen2, Scorer, initialize, save_weights
from openqwen.model.lora import LoraConfig, add_adapters
from openqwen.support.files import write_json
from openqwen.support.generators import Generators
from openqwen.train.balance import with_balance, with_loads
from openqwen.train.comparisons import ComparedAnswers, Comparison
from openqwen.train.losses import next_token
from openqwen.train.optimizer import OptimizerConfig
from openqwen.train.packed_batch import PackedBatch
from openqwen.train.parallel import ParallelConfig, full_tensor, join, load_for_training
from openqwen.train.reward import ScoredAnswers
from openqwen.train.trainer import Place, SaveConfig, Trainer, TrainingConfig

SIZES = {
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 20,
    "router_aux_loss_coef": 0.1,
}


STEPS = 4


class Stop(Exception):
    """Stands for a kill."""


class Watched(Trainer):
    """A trainer whose first gradient is kept."""

    gradient = None

    def _norm_and_scale(self, count):
        if self.gradient is None:
            found = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
            dense = {n: full_tensor(g).clone() for n, g in found.items()}
            self.gradient = {n: g / count for n, g in dense.items()}
        return super()._norm_and_scale(count)


def documents(step):
    """Seven documents of 3 to 19 tokens."""
    rng = np.random.default_rng(step)
    return [rng.integers(0, 64, rng.integers(3, 20)).tolist() for _ in range(7)]


def rows(step):
    """Five micro-batches of one or two documents."""
    samples = [(ids, [1] * len(ids)) for ids in documents(step)]
    return [PackedBatch.of(samples[a:b]) for a, b in ((0, 2), (2, 3), (3, 4), (4, 6), (6, 7))]


def comparisons(step):
    """Three micro-batches of one or two prompts, each with two answers."""
    compared = [Comparison(0, 1, -1, 0.0), Comparison(0, 1, 1, 0.5)]
    groups = [
        ComparedAnswers(ids[:2], [ids[2:], ids[:1:-1]], [], compared) for ids in documents(step)[:5]
    ]
    return [ScoredAnswers.of(groups[a:b], torch.device("cpu")) for a, b in ((0, 2), (2, 3), (3, 5))]


def work(kind, generators, folder, parallel):
    """A network, its world, its micro-batches of a step, and its loss."""
    more = (
        EXPERTS
        if kind == "experts"
        else {"dual_chunk": DualChunk(8, 2, 0)}
        if kind == "dual"
        else {}
    )
    width = 128 if kind == "eight" else 32  # moments in 8 bits are for rows of whole blocks
    config = ModelConfig(64, width, 48, **SIZES, **more)
    model = (
        Scorer(config, {"truthfulness": 1.0, "relevance": 0.5})
        if kind == "reward"
        else Qwen2(config)
    )
    initialize(model, generators.torch("weights"))
    world = join().with_mesh(parallel, model)
    if kind not in (
        "adapters",
        "reward",
    ):  # as a stage begins: each rank reads its own part, and nothing else
        if join().main:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "config.json", config.to_json())
            save_weights(model, folder)
        join().barrier()
        model = load_for_training(folder)
        assert join().alone or next(model.parameters()).is_meta
    if kind == "adapters":
        add_adapters(model, LoraConfig(rank=2), generators.torch("lora"))
    if kind == "reward":
        return model, world, comparisons, lambda answers: answers.loss(model)
    if kind == "experts":
        loss = lambda micro: with_balance(
            lambda r, routing: next_token(model, r, routing, world), micro, "global", 0.1
        )
        batch = lambda step: with_loads(model, rows(step), "global", "auto", world)
        return model, world, batch, loss
    return model, world, rows, lambda micro: next_token(model, micro, world=world)


def merging(base, kind):
    """Settings of Online Merging, with a base of other weights."""
    if join().main:
        config = ModelConfig(64, 32, 48, **SIZES, **(EXPERTS if kind == "experts" else {}))
        model = Qwen2(config)
        initialize(model, Generators(6).torch("weights"))
        base.mkdir(parents=True, exist_ok=True)
        write_json(base / "config.json", config.to_json())
        save_weights(model, base)
    join().barrier()
    # Not OnTIES: gradients of other ranks differ by rounding, which decides its first step's mask.
    scaling = "none" if kind == "experts" else "inverse"
    return {"base": base, "scaling": scaling, "alpha": 1e-3, "reserve": 0.5}


seen = set()  # dtypes of weights as a layer gets them


def train(folder: Path, stop_at: int, kind: str, parallel: ParallelConfig) -> None:
    """Train four steps; stop before step `stop_at`."""
    generators, low, muon = Generators(5), kind.startswith("low-"), kind.startswith("muon-")
    plain = kind.removeprefix("low-").removeprefix("muon-").removeprefix("merging-")
    model, world, micros, loss = work(plain, generators, folder / "start", parallel)
    model.model.layers[0].register_forward_pre_hook(
        lambda layer, _: seen.add(next(layer.parameters()).dtype)
    )

    def batch(step):
        if step == stop_at:
            raise Stop
        return micros(step)

    train = OptimizerConfig(
        learning_rate=1e-2,
        parallel=parallel,
        method="muon" if muon else "adamw8bit" if kind == "eight" else "adamw",
        precision="bfloat16" if low else "float32",
        merging=merging(folder / "base", plain) if kind.startswith("merging-") else {},
    )
    config = TrainingConfig(train=train, save=SaveConfig(seconds=0 if stop_at < STEPS else 1e9))
    place = Place(folder / "output", folder, 5, "ranks")
    trainer = Watched(place, config, model, batch, loss, STEPS, generators, world=world)
    try:
        trainer.run()
    except Stop:
        return
    print(kind, *seen, {p.dtype for p in model.parameters()})
    whole = trainer.full_model()
    assert trainer.world.main or all(p.is_meta for p in whole.parameters())  # rank 0 alone holds it
    if trainer.world.main:
        save_file(
            {n: p.detach().contiguous() for n, p in whole.named_parameters()},
            folder / "weights.safetensors",
        )
        save_file(
            {n: g.contiguous() for n, g in trainer.gradient.items()},
            folder / "gradient.safetensors",
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in sys.argv[3:]:
        kind, *degrees = case.split(":")
        if kind == "eight":  # sooner than compiled
            torch.compiler.set_stance("force_eager")
        parallel = ParallelConfig(**{name: int(n) for name, n in (d.split("=") for d in degrees)})
        train(Path(sys.argv[1]) / case.replace(":", "-"), int(sys.argv[2]), kind, parallel)
        join().barrier()
    if not join().alone:
        torch.distributed.destroy_process_group()
