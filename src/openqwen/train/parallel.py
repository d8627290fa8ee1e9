"""The processes that train together: torch.distributed under torchrun, or this process alone.

Weights, gradients and optimizer states are sharded over all of them (FSDP2). The micro-batches of a step are dealt to
the ranks, sums and counts are added up over them, and only then is anything divided: so the gradient is the one that a
single process computes, up to rounding (law 2).
"""

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from openqwen.model.decoder import Layer

Micro = TypeVar("Micro")
Network = TypeVar("Network", bound=nn.Module)
_PATIENCE = timedelta(days=2)  # a rank may wait long for another that reads a corpus or writes a checkpoint


@dataclass(frozen=True)
class World:
    """This process among those that train together. Rank 0 writes the files and speaks to the user.

    mesh: over which the network is sharded. files: the group in which training states are written, by another thread
    than the one that trains.
    """

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    files: dist.ProcessGroup | None = None

    @property
    def main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.mesh is None

    def shard(self, model: Network) -> Callable[[], Network]:
        """Shard the network over the ranks, in place, layer by layer; nothing where this process is alone.

        Returns what gives the whole network back, on the CPU, to be saved. Every rank must call it, as it gathers.
        """
        if self.mesh is None:
            return lambda: model
        blueprint = copy.deepcopy(model, {id(p): _shape_of(p) for p in model.parameters()})
        for layer in [m for m in model.modules() if isinstance(m, Layer)]:
            fully_shard(layer, mesh=self.mesh)
        fully_shard(model, mesh=self.mesh)

        def whole() -> Network:
            state = {name: whole_tensor(tensor).cpu() for name, tensor in model.state_dict().items()}
            blueprint.load_state_dict(state, assign=True)
            return blueprint

        return whole

    def share(self, micros: Sequence[Micro]) -> list[tuple[Micro, bool]]:
        """This rank's micro-batches of a step, each with whether it counts.

        Every rank gets equally many, since a forward pass of a sharded network is a common act: what is missing is
        filled up with micro-batches that do not count.
        """
        if not micros:
            return []
        rounds = -(-len(micros) // self.size)
        mine = list(micros[self.rank :: self.size])
        return [(m, True) for m in mine] + [(micros[0], False)] * (rounds - len(mine))

    def total(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the ranks."""
        if self.mesh is None:
            return list(values)
        summed = torch.tensor(list(values), dtype=torch.float64, device=self._device())
        dist.all_reduce(summed)
        return summed.tolist()

    def agree(self, wish: bool) -> bool:
        """Rank 0's wish, on every rank."""
        if self.mesh is None:
            return wish
        said = torch.tensor([wish], dtype=torch.int32, device=self._device())
        dist.broadcast(said, src=0)
        return bool(said.item())

    def wait(self) -> None:
        """Until every rank has come here."""
        if self.mesh is not None:
            dist.barrier()

    def _device(self) -> torch.device:
        assert self.mesh is not None
        return torch.device(self.mesh.device_type)


def whole_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _shape_of(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)


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
    mesh = init_device_mesh("cuda" if gpu else "cpu", (size,))
    return World(dist.get_rank(), size, mesh, dist.new_group(backend="gloo", timeout=_PATIENCE))
