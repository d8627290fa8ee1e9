"""Where each rank stands: a mesh of named dimensions."""

from torch.distributed.device_mesh import init_device_mesh

from openqwen.train.parallel.degrees import ParallelConfig


class Mesh:
    """The ranks by `data`, `context`, `tensor` and `expert`; neighbours differ in the last.

    Ranks that differ in `data` or `expert` alone have micro-batches of their own; those that differ
    in `context` share the tokens of one, those in `tensor` the matrices. The others are unions of
    these, over which FSDP2 shards: `dense` what a layer's matrices are made of (all but `tensor`),
    `sparse` the experts (all but `expert`), `world` the rest.
    """

    def __init__(self, parallel: ParallelConfig, size: int, device_type: str):
        """A mesh of `size` processes; `data` takes what the degrees leave."""
        names = ("data", "context", "tensor", "expert")
        shape = (size // parallel.ranks, parallel.context, parallel.tensor, parallel.expert)
        self.whole = whole = init_device_mesh(device_type, shape, mesh_dim_names=names)
        self.context, self.tensor, self.expert = (whole[name] for name in names[1:])
        self.same_rows = whole["context", "tensor"]._flatten("same_rows")
        self.dense = whole["data", "context", "expert"]._flatten("dense")
        self.sparse = whole["data", "context", "tensor"]._flatten("sparse")
        self.world = whole[names]._flatten("world")

    @property
    def copies(self) -> int:
        """Ranks that work on the same micro-batch."""
        return self.same_rows.size()

    @property
    def data_rank(self) -> int:
        """Which of the `data_size` of a step's micro-batches is this rank's."""
        return self.whole.get_local_rank("data") * self.expert.size() + self.expert.get_local_rank()

    @property
    def data_size(self) -> int:
        """In how many parts a step's micro-batches are cut."""
        return self.whole.size() // self.copies
