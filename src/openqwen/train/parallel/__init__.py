"""Training over many processes, with the same loss and gradient as one process computes."""

from openqwen.train.parallel.degrees import ParallelConfig
from openqwen.train.parallel.world import (
    ALONE,
    World,
    copy_weights,
    full_tensor,
    join,
    load_for_training,
    local_shard,
)

__all__ = [
    "ALONE",
    "ParallelConfig",
    "World",
    "copy_weights",
    "full_tensor",
    "join",
    "load_for_training",
    "local_shard",
]
