"""The processes that train together: torch.distributed under torchrun, or this process alone.

They stand on a mesh of four dimensions (see `Mesh`). Two of them divide the
micro-batches of a step, the other two divide the work of one micro-batch. Losses, counts and
gradients are summed over all ranks before anything is divided, so the gradient is the one that a
single process computes, up to rounding (law 2).
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
from weakref import WeakKeyDictionary

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

Micro = TypeVar("Micro")
Network = TypeVar("Network", bound=Qwen2 | Scorer)
Function = TypeVar("Function", bound=Callable[..., Tensor])
for _module in (
    "_redistribute",
    "_collective_utils",
):  # which collective was not the fastest is no news to a user
    logging.getLogger(f"torch.distributed.tensor.{_module}").setLevel(logging.ERROR)
_PATIENCE = timedelta(
    days=2
)  # a rank may wait long for another that reads a corpus or writes a checkpoint


@dataclass(frozen=True)
class World:
    """This process among those that train together. Rank 0 writes the files and speaks to the user.

    mesh: over which a network is sharded, once it is. files: the group in which training states are
    written, by another thread than the one that trains.
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
        """These processes on a mesh of the given degrees. OpenQwenError where they do not fit."""
        check(parallel, model.config, self.size)
        return (
            self
            if self.alone
            else replace(self, mesh=Mesh(parallel, self.size, best_device().type))
        )

    def shard(self, model: Network, low: bool = False) -> Callable[[], Network]:
        """Shard the network over the ranks, in place; nothing where this process is alone. low: see
        `shard.shard`.

        Returns what gives the whole network back to rank 0, on the CPU, to be saved, and to the
        others a network without memory. Every rank must call it, as it gathers.
        """
        if self.mesh is None:
            return lambda: model
        shapes = {
            id(p): nn.Parameter(p.to("meta"), requires_grad=p.requires_grad)
            for p in model.parameters()
        }
        blueprint = copy.deepcopy(model, shapes)
        shard(model, self.mesh, low)
        _WORLDS[model] = self

        def whole() -> Network:
            state = self.full_state_dict(model.state_dict())
            blueprint.load_state_dict(state, assign=True, strict=self.main)
            return blueprint

        return whole

    def local_micro_batches(self, micros: Sequence[Micro]) -> list[tuple[Micro, bool]]:
        """This rank's micro-batches of a step, each with whether it counts.

        Every rank gets equally many, since a forward pass of a sharded network is a common act:
        what is missing is filled up with micro-batches that do not count.
        """
        if not micros:
            return []
        number, numbers = (
            (self.mesh.data_rank, self.mesh.data_size) if self.mesh else (self.rank, self.size)
        )
        rounds = -(-len(micros) // numbers)
        mine = list(micros[number::numbers])
        return [(m, True) for m in mine] + [(micros[0], False)] * (rounds - len(mine))

    def total(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the micro-batches of all ranks; those that share one hold the same
        value.
        """
        if self.alone:
            return list(values)
        summed = torch.tensor(list(values), dtype=torch.float64, device=best_device())
        dist.all_reduce(summed)
        return (summed / self.copies).tolist()

    def norm(self, tensors: Sequence[Tensor]) -> float:
        """The 2-norm of all elements of tensors, each sharded over as many ranks as its mesh has,
        and no two alike.
        """
        groups: dict[int, list[Tensor]] = {}
        for tensor in tensors:
            ranks = tensor.device_mesh.size() if isinstance(tensor, DTensor) else 1
            groups.setdefault(ranks, []).append(
                tensor.to_local() if isinstance(tensor, DTensor) else tensor
            )
        norms = {
            ranks: float(torch.nn.utils.get_total_norm(group)) for ranks, group in groups.items()
        }
        if self.alone:
            return norms.get(1, 0.0)
        # A tensor on fewer ranks than there are is on all of them, several times.
        squares = sum(norm**2 * ranks / self.size for ranks, norm in norms.items())
        return math.sqrt(self.total([squares])[0] * self.copies)

    def token_parallel(self, function: Function) -> Function:
        """A function of rows whose work is shared by the ranks that hold the same rows.

        See `shard.token_parallel`.
        """
        return token_parallel(function, self.mesh.same_rows if self.mesh else None)

    def gather(self, mine: Sequence[Micro]) -> list[Micro]:
        """Gather per-rank lists in original order: rank r holds items r, r + size, r + 2 size, …"""
        if self.alone:
            return list(mine)
        parts: list[list[Micro]] = [[] for _ in range(self.size)]
        dist.all_gather_object(parts, list(mine))
        return [part[n] for n in range(len(parts[0])) for part in parts if n < len(part)]

    def full_state_dict(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gather tensors one by one to rank 0's CPU; the other ranks keep none of them."""
        found = {}
        for name, tensor in tensors.items():
            whole = full_tensor(tensor)  # by every rank
            if self.main:
                found[name] = whole.cpu()
        return found

    def broadcast(self, value: bool) -> bool:
        """Rank 0's value, on every rank."""
        if self.alone:
            return value
        flag = torch.tensor([value], dtype=torch.int32, device=best_device())
        dist.broadcast(flag, src=0)
        return bool(flag.item())

    def barrier(self) -> None:
        """Until every rank has come here."""
        if not self.alone:
            dist.barrier()


_WORLDS: WeakKeyDictionary[nn.Module, World] = WeakKeyDictionary()


@torch.no_grad()
def copy_weights(model: nn.Module, copied: nn.Module) -> None:
    """A sharded network's weights into a whole one of the same names.

    Every rank must call it, as it gathers.
    """
    places = dict(copied.named_parameters())
    for name, parameter in model.named_parameters():
        places[name].copy_(full_tensor(parameter))


def load_for_training(source: str | Path) -> Qwen2:
    """A language model where it will be trained; one that is to be sharded is not read before, but
    each rank's part.
    """
    return load_model(source, device=best_device() if join().alone else "meta")


def world_of(model: nn.Module) -> World:
    """Over which ranks a network is sharded: this process alone where it is not."""
    return _WORLDS.get(model, World())


def full_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shard(whole: Tensor, sharded: Tensor) -> Tensor:
    """The part of a whole tensor that this rank holds of a sharded one; all where it is whole."""
    if isinstance(sharded, DTensor):
        mesh, placements = sharded.device_mesh, sharded.placements
        shape, offset = compute_local_shape_and_global_offset(sharded.shape, mesh, placements)
        for dim, (start, size) in enumerate(zip(offset, shape, strict=True)):
            whole = whole.narrow(dim, start, size)
    return whole


@cache
def join() -> World:
    """The world of this process: what torchrun's environment says, or alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=_PATIENCE)
    return World(dist.get_rank(), size, files=dist.new_group(backend="gloo", timeout=_PATIENCE))
