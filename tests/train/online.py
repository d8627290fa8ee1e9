"""What each rank of test_parallel.py's online DPO test runs.

Arguments: inputs, outputs, the tensor degree.
"""

import sys
from pathlib import Path

import torch

from openqwen.tokenizer import load_tokenizer
from openqwen.train.online_dpo import OnlineDpoConfig, online_dpo
from openqwen.train.optimizer import OptimizerConfig
from openqwen.train.parallel import ParallelConfig, join
from openqwen.train.trainer import Place

if __name__ == "__main__":
    torch.set_num_threads(1)
    given, made = Path(sys.argv[1]), Path(sys.argv[2])
    own = made if join().main else made / f"rank{join().rank}"
    train = OptimizerConfig(learning_rate=1e-3, parallel=ParallelConfig(tensor=int(sys.argv[3])))
    config = OnlineDpoConfig(
        steps=3, batch=3, samples=6, max_tokens=60, micro_tokens=100, train=train
    )
    tokenizer = load_tokenizer(given / "model")
    place = Place(own, made / "scratch", seed=3, label="online")
    online_dpo(config, given / "model", given / "prompts.jsonl", tokenizer, place, given / "reward")
    join().barrier()
    if not join().alone:
        torch.distributed.destroy_process_group()
