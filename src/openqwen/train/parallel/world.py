"""The processes that train together: torch.distributed under torchrun, or this process alone.

They stand on a mesh of four dimensions (see `Mesh`). Two of them divide the micro-batches of a
step, the other two divide the work of one micro-batch. Losses, counts and gradients are summed over
all ranks before anything is divided, so the gradient is the one that a single process computes, up
to rounding.
"""

import copy
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from openqwen.model import Qwen2, Scorer, load_model
from openqwen.support.device import best_device
from openqwen.train.parallel.degrees import ParallelConfig, check
from openqwen.train.parallel.mesh import Mesh
from openqwen.train.parallel.shard import shard, token_parallel

Item = TypeVar("Item")
Network = TypeVar("Network", bound=Qwen2 | Scorer)
Function = TypeVar("Function", bound=Callable[..., Tensor])
for _module in ("_redistribute", "_collective_utils"):
    # PyTorch reports which collective was not the fastest; that is of no use to a user.
    logging.getLogger(f"torch.distributed.tensor.{_module}").setLevel(logging.ERROR)
# A rank may wait long for another one that reads a corpus or writes a checkpoint.
_TIMEOUT = timedelta(days=2)


@dataclass(frozen=True)
class World:
    """This process among those that train together. Rank 0 writes the files and prints.

    mesh: the mesh over which the network is sharded; None before `with_mesh` and in one process.
    files: the process group of the thread that writes training states.
    """

    rank: int = 0
    size: int = 1
    mesh: Mesh | None = None
    files: dist.ProcessGroup | None = None

    @property
    def main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.size == 1

    @property
    def copies(self) -> int:
        """Ranks that work on the same micro-batch."""
        return self.mesh.copies if self.mesh else 1

    def with_mesh(self, parallel: ParallelConfig, model: Qwen2 | Scorer) -> "World":
        """These processes on a mesh of the given degrees.

        Raises:
            OpenQwenError: The degrees do not fit the network or the number of processes.
        """
        check(parallel, model.config, self.size)
        if self.alone:
            return self
        return replace(self, mesh=Mesh(parallel, self.size, best_device().type))

    def shard(self, model: Network, low: bool = False) -> Callable[[], Network]:
        """Shard a network over the ranks of the mesh, in place; do nothing in one process.

        Args:
            model: All of it on every rank, or without memory and with its files (`model.stored`).
            low: Gather the layers' weights in bfloat16 (see `shard.shard`).

        Returns:
            A function that gathers the full network on rank 0's CPU, to be saved; other ranks get a
            network without memory. Every rank must call it.
        """
        if self.mesh is None:
            return lambda: model
        empty = {
            id(p): nn.Parameter(p.to("meta"), requires_grad=p.requires_grad)
            for p in model.parameters()
        }
        blueprint = copy.deepcopy(model, empty)
        shard(model, self.mesh, low)

        def full_model() -> Network:
            state = self.full_state_dict(model.state_dict())
            blueprint.load_state_dict(state, assign=True, strict=self.main)
            return blueprint

        return full_model

    def local_micro_batches(self, micros: Sequence[Item]) -> list[tuple[Item, bool]]:
        """This rank's micro-batches of a step, each with whether it counts.

        Every rank gets equally many, since all ranks must take part in each forward pass of a
        sharded network. The lists are padded with a micro-batch that does not count.
        """
        if not micros:
            return []
        rank, size = (
            (self.mesh.data_rank, self.mesh.data_size) if self.mesh else (self.rank, self.size)
        )
        rounds = -(-len(micros) // size)
        local = list(micros[rank::size])
        return [(m, True) for m in local] + [(micros[0], False)] * (rounds - len(local))

    def total(self, values: Sequence[float]) -> list[float]:
        """Sum each value over the micro-batches of all ranks.

        Ranks that share a micro-batch hold the same values, which count once.
        """
        if self.alone:
            return list(values)
        summed = torch.tensor(list(values), dtype=torch.float64, device=best_device())
        dist.all_reduce(summed)
        return (summed / self.copies).tolist()

    def norm(self, tensors: Sequence[Tensor]) -> float:
        """The 2-norm of all elements of several tensors, sharded ones over all their ranks."""
        groups: dict[int, list[Tensor]] = {}
        for tensor in tensors:
            ranks = tensor.device_mesh.size() if isinstance(tensor, DTensor) else 1
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            groups.setdefault(ranks, []).append(local)
        norms = {
            ranks: float(torch.nn.utils.get_total_norm(group)) for ranks, group in groups.items()
        }
        if self.alone:
            return norms.get(1, 0.0)
        # A tensor whose mesh has fewer ranks than the world is held size / ranks times.
        squares = sum(norm**2 * ranks / self.size for ranks, norm in norms.items())
        return math.sqrt(self.total([squares])[0] * self.copies)

    def token_parallel(self, function: Function) -> Function:
        """Divide the work of a row-wise function over the ranks that hold the same rows.

        See `shard.token_parallel`.
        """
        return token_parallel(function, self.mesh.same_rows if self.mesh else None)

    def gather(self, items: Sequence[Item]) -> list[Item]:
        """Gather per-rank lists in original order: rank r holds items r, r + size, r + 2 size, …"""
        if self.alone:
            return list(items)
        parts: list[list[Item]] = [[] for _ in range(self.size)]
        dist.all_gather_object(parts, list(items))
        return [part[n] for n in range(len(parts[0])) for part in parts if n < len(part)]

    def full_state_dict(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gather sharded tensors one by one on rank 0's CPU; other ranks get an empty mapping."""
        gathered = {}
        for name, tensor in tensors.items():
            full = full_tensor(tensor)  # every rank takes part
            if self.main:
                gathered[name] = full.cpu()
        return gathered

    def broadcast(self, value: bool) -> bool:
        """Rank 0's value, on every rank."""
        if self.alone:
            return value
        flag = torch.tensor([value], dtype=torch.int32, device=best_device())
        dist.broadcast(flag, src=0)
        return bool(flag.item())

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        if not self.alone:
            dist.barrier()


ALONE = World()  # one process


@torch.no_grad()
def copy_weights(model: nn.Module, copied: nn.Module) -> None:
    """Copy a sharded network's weights into a full one; every rank must call it."""
    targets = dict(copied.named_parameters())
    for name, parameter in model.named_parameters():
        targets[name].copy_(full_tensor(parameter))


def load_for_training(source: str | Path) -> Qwen2:
    """Load a language model where it will be trained.

    Over several processes it has no memory yet: each rank reads its own shards in `World.shard`.
    """
    return load_model(source, device=best_device() if join().alone else "meta")


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor; return any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shard(full: Tensor, like: Tensor) -> Tensor:
    """The part of a full tensor that this rank holds if it is sharded as `like` is."""
    if isinstance(like, DTensor):
        mesh, placements = like.device_mesh, like.placements
        shape, offset = compute_local_shape_and_global_offset(like.shape, mesh, placements)
        for dim, (start, size) in enumerate(zip(offset, shape, strict=True)):
            full = full.narrow(dim, start, size)
    return full


@cache
def join() -> World:
    """Join the processes that torchrun started, as its environment says; without it, be alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ALONE
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=_TIMEOUT)
    return World(dist.get_rank(), size, files=dist.new_group(backend="gloo", timeout=_TIMEOUT))
