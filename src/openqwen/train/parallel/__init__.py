"""Training over many processes: how many share what, and the same loss and gradient as one process
computes.
"""

from openqwen.train.parallel.degrees import ParallelConfig
from openqwen.train.parallel.world import (
    World,
    copy_weights,
    full_tensor,
    join,
    load_for_training,
    local_shard,
    world_of,
)

__all__ = [
    "ParallelConfig",
    "World",
    "copy_weights",
    "full_tensor",
    "join",
    "load_for_training",
    "local_shard",
    "world_of",
]
