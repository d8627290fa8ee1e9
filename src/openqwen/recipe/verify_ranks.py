"""The proof that ranks do not matter: two real processes on the user's model and data, against this
one.
"""

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

_BESIDE = 2**30  # bytes of two processes besides weights and gradients


def missing_memory(config: ModelConfig) -> float:
    """Bytes that the proof lacks here; 0 where there is room.

    Both processes hold halves, and rank 0 gathers.
    """
    return max(0.0, 4 * 4 * config.parameters() + _BESIDE - free_memory())


def gradient_over_ranks(
    source: Path, micros: Sequence[Sequence[Sample]], ranks: int = 2
) -> dict[str, Tensor]:
    """Mean gradient of all targets by name: gloo processes on the CPU, the network sharded,
    micro-batches dealt.
    """
    with tempfile.TemporaryDirectory(prefix="openqwen-verify-") as folder:
        place = Path(folder) / "gradient.safetensors"
        arguments = (ranks, get_free_port(), source, micros, place)
        torch.multiprocessing.spawn(_rank, arguments, nprocs=ranks)
        return load_file(place)


def _rank(
    rank: int, ranks: int, port: int, source: Path, micros: Sequence[Sequence[Sample]], place: Path
) -> None:
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
    found = world.full_state_dict(gradients)
    if world.main:
        save_file(found, place)
    world.barrier()
    torch.distributed.destroy_process_group()
