"""What each rank of test_merging_ranks.py runs: merged steps with given gradients.

Arguments: folder, "whole" or "half", and cases such as `ties:experts:tensor=2:expert=2`. Rank 0
saves the weights of each case to `<folder>/<case>.safetensors`. half: a state is saved after two of
the four steps, and a new optimizer loads it.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from ranks import EXPERTS, SIZES
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from openqwen.model import ModelConfig, Qwen2, initialize
from openqwen.support.generators import Generators
from openqwen.train.merging import OnlineMerging
from openqwen.train.parallel import ParallelConfig, join, local_shard
from openqwen.train.state import StateWriter, load_state

SETTINGS = {
    "inverse": {"form": "dare", "reserve": 0.3, "scaling": "inverse"},
    "none": {"form": "dare", "reserve": 0.3, "scaling": "none", "every": 2},
    "ties": {"form": "ties", "reserve": 0.1},
    "few": {"form": "ties", "reserve": 1e-3, "signs": "unweighted", "every": 2},
}


def network(kind, seed):
    config = ModelConfig(64, 32, 48, **SIZES, **(EXPERTS if kind == "experts" else {}))
    model = Qwen2(config)
    initialize(model, Generators(seed).torch("weights"))
    return model


def gradient(name, shape, step):
    """Halves and quarters, of which many are equal."""
    rng = np.random.default_rng([step, *name.encode()])
    return torch.from_numpy(rng.integers(-9, 9, tuple(shape)) / 4).float()


def sharded(full, like):
    local = local_shard(full, like).contiguous()
    if not isinstance(like, DTensor):
        return local
    return DTensor.from_local(
        local,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=full.shape,
        stride=full.stride(),
    )


def steps(model, optimizer, numbers):
    for step in numbers:
        for name, parameter in model.named_parameters():
            parameter.grad = sharded(gradient(name, parameter.shape, step), parameter)
        optimizer.step()


def train(folder, half, case):
    setting, kind, *degrees = case.split(":")
    parallel = ParallelConfig(**{name: int(n) for name, n in (d.split("=") for d in degrees)})
    model, base = network(kind, 1), dict(network(kind, 2).named_parameters())
    world = join().with_mesh(parallel, model)
    whole = world.shard(model)

    def optimizer():
        return OnlineMerging(
            model.named_parameters(),
            [p.detach().clone() for p in model.parameters()],
            [base[name].detach() for name, _ in model.named_parameters()],
            alpha=1e-3,
            lr=1e-2,
            eps=0.1,
            weight_decay=0.1,
            generator=torch.Generator().manual_seed(3),
            **SETTINGS[setting],
        )

    first = optimizer()
    if half:
        second = optimizer()
        steps(model, first, (0, 1))
        scratch = folder / f"scratch-{case}"
        if world.main:
            scratch.mkdir()
        world.barrier()
        with StateWriter(scratch, 1, world) as writer:
            writer.save(2, model, [first], Generators(1))
        world.barrier()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert load_state(scratch, model, [second], Generators(1), world) == 2
        steps(model, second, (2, 3))
    else:
        steps(model, first, range(4))
    full = whole()
    if world.main:
        tensors = {n: p.detach().contiguous() for n, p in full.named_parameters()}
        save_file(tensors, folder / f"{case}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in sys.argv[3:]:
        train(Path(sys.argv[1]), sys.argv[2] == "half", case)
        join().barrier()
    if not join().alone:
        torch.distributed.destroy_process_group()
