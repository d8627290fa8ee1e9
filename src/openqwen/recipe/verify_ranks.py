"""The gradient of the user's model and data, computed by several processes that hold shards."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.elastic.utils.distributed import get_free_port

from openqwen.model import ModelConfig
from openqwen.support.device import free_memory
from openqwen.train.losses import next_token
from openqwen.train.packed_batch import PackedBatch, Sample
from openqwen.train.parallel import ParallelConfig, join, load_for_training

_OTHER = 2**30  # bytes that two processes need besides weights and gradients


def missing_memory(config: ModelConfig) -> float:
    """Return how many bytes of free memory the proof lacks, or 0.

    The processes together hold the weights and gradients once, and rank 0 gathers all.
    """
    return max(0.0, 4 * 4 * config.parameters() + _OTHER - free_memory())


def gradient_over_ranks(
    source: Path, micros: Sequence[Sequence[Sample]], ranks: int = 2
) -> dict[str, Tensor]:
    """Return the mean gradient of all targets by parameter name.

    The processes use gloo on the CPU; the network is sharded and micro-batches are divided.
    """
    with tempfile.TemporaryDirectory(prefix="openqwen-verify-") as folder:
        file = Path(folder) / "gradient.safetensors"
        arguments = (ranks, get_free_port(), source, micros, file)
        torch.multiprocessing.spawn(_rank, arguments, nprocs=ranks)
        return load_file(file)


def _rank(
    rank: int, ranks: int, port: int, source: Path, micros: Sequence[Sequence[Sample]], file: Path
) -> None:
    """Compute the gradient on one rank; rank 0 writes it to the file."""
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(max(1, torch.get_num_threads() // ranks))
    model = load_for_training(source)
    world = join().with_mesh(ParallelConfig(), model)
    world.shard(model)
    count = 0
    for micro, counts in world.local_micro_batches(micros):
        loss = next_token(model, PackedBatch.of(micro, model.device), world=world)
        (loss.sum * counts).backward()
        count += loss.count * counts
    (total,) = world.total([count])
    gradients = {n: p.grad / total for n, p in model.named_parameters() if p.grad is not None}
    gathered = world.full_state_dict(gradients)
    if world.main:
        save_file(gathered, file)
    world.barrier()
    torch.distributed.destroy_process_group()
