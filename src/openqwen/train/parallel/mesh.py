"""The mesh of named dimensions on which the ranks stand."""

from torch.distributed.device_mesh import init_device_mesh

from openqwen.train.parallel.degrees import ParallelConfig


class Mesh:
    """The ranks by `data`, `context`, `tensor` and `expert`; neighbours differ in the last.

    Ranks that differ in `data` or `expert` alone have micro-batches of their own. Those that differ
    in `context` share the tokens of a micro-batch, those in `tensor` the matrices. The other meshes
    are unions of these dimensions, over which FSDP2 shards: `dense` the layers' matrices (all but
    `tensor`), `sparse` the experts (all but `expert`), `world` the rest of the network.
    """

    def __init__(self, parallel: ParallelConfig, size: int, device_type: str):
        """A mesh of `size` processes; `data` takes what the degrees leave."""
        names = ("data", "context", "tensor", "expert")
        shape = (size // parallel.ranks, parallel.context, parallel.tensor, parallel.expert)
        self.all = ranks = init_device_mesh(device_type, shape, mesh_dim_names=names)
        self.context, self.tensor, self.expert = (ranks[name] for name in names[1:])
        self.same_rows = ranks["context", "tensor"]._flatten("same_rows")
        self.dense = ranks["data", "context", "expert"]._flatten("dense")
        self.sparse = ranks["data", "context", "tensor"]._flatten("sparse")
        self.world = ranks[names]._flatten("world")

    @property
    def copies(self) -> int:
        """Ranks that work on the same micro-batch."""
        return self.same_rows.size()

    @property
    def data_rank(self) -> int:
        """This rank's number among the `data_size` groups that have micro-batches of their own."""
        return self.all.get_local_rank("data") * self.expert.size() + self.expert.get_local_rank()

    @property
    def data_size(self) -> int:
        """The number of groups that have micro-batches of their own."""
        return self.all.size() // self.copies
