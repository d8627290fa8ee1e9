"""What each rank of test_parallel.py's loading test runs. Argument: a folder with a checkpoint.

Prints the bytes that loading and sharding took at the most, over those of the whole network in
float32.
"""

import resource
import sys

import torch

from openqwen.train.parallel import ParallelConfig, join, load_for_training

if __name__ == "__main__":
    torch.set_num_threads(1)
    world = join()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = load_for_training(sys.argv[1])
    world = world.with_mesh(ParallelConfig(), model)
    world.shard(model)
    taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    for rank in range(world.size):
        world.barrier()
        if rank == world.rank:
            print("share", taken / (4 * model.config.parameters()), flush=True)
    if not world.alone:
        torch.distributed.destroy_process_group()
