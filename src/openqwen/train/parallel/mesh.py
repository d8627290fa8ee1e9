"""Where each rank stands: a mesh of named dimensions."""

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from openqwen.train.parallel.degrees import ParallelConfig


@dataclass(frozen=True)
class Mesh:
    """The ranks by `data`, `context`, `tensor` and `expert`; neighbours differ in the last.

    Ranks that differ in `data` or `expert` alone have micro-batches of their own; those that differ in `context` share
    the tokens of one, those in `tensor` the matrices. The others are unions of these, over which FSDP2 shards: `dense`
    what a layer's matrices are made of (all but `tensor`), `sparse` the experts (all but `expert`), `world` the rest.
    """

    whole: DeviceMesh
    context: DeviceMesh
    tensor: DeviceMesh
    expert: DeviceMesh
    same_rows: DeviceMesh
    dense: DeviceMesh
    sparse: DeviceMesh
    world: DeviceMesh

    @classmethod
    def of(cls, parallel: ParallelConfig, size: int, device_type: str) -> "Mesh":
        """A mesh of `size` processes; `data` takes what the degrees leave."""
        names = ("data", "context", "tensor", "expert")
        shape = (size // parallel.ranks, parallel.context, parallel.tensor, parallel.expert)
        whole = init_device_mesh(device_type, shape, mesh_dim_names=names)
        return cls(
            whole=whole,
            context=whole["context"],
            tensor=whole["tensor"],
            expert=whole["expert"],
            same_rows=whole["context", "tensor"]._flatten("same_rows"),
            dense=whole["data", "context", "expert"]._flatten("dense"),
            sparse=whole["data", "context", "tensor"]._flatten("sparse"),
            world=whole[names]._flatten("world"),
        )

    @property
    def copies(self) -> int:
        """Ranks that work on the same micro-batch."""
        return self.same_rows.size()

    @property
    def share(self) -> int:
        """Which of the `shares` of a step's micro-batches is this rank's."""
        return self.whole.get_local_rank("data") * self.expert.size() + self.expert.get_local_rank()

    @property
    def shares(self) -> int:
        """In how many parts a step's micro-batches are cut."""
        return self.whole.size() // self.copies
