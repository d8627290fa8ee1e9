"""What each rank of test_parallel.py's tests of online stages runs.

Arguments: inputs, outputs, the tensor degree, the stage.
"""

import os
import sys
from pathlib import Path

import torch

from openqwen.tokenizer import load_tokenizer
from openqwen.train.grpo import GrpoConfig, grpo
from openqwen.train.online_dpo import OnlineDpoConfig, online_dpo
from openqwen.train.parallel import join
from openqwen.train.trainer import Place

if __name__ == "__main__":
    torch.set_num_threads(1)
    os.chdir(Path(__file__).parent)  # where toy_rewards.py is
    given, made = Path(sys.argv[1]), Path(sys.argv[2])
    own = made if join().main else made / f"rank{join().rank}"
    train = {"learning_rate": 1e-3, "parallel": {"tensor": int(sys.argv[3])}}
    shared = {"samples": 6, "max_tokens": 60, "micro_tokens": 100, "train": train}
    shared |= {"reference": {"refresh": "average", "decay": 0.5}}
    if sys.argv[4] == "grpo":
        rewards = {"sources": {"reward": 1.0, "toy_rewards:likes_e": 1.0}}
        stage, config = (
            grpo,
            GrpoConfig(
                episodes=2, batch=4, updates=2, rewards=rewards, beta=0.1, refill=1, **shared
            ),
        )
    else:
        stage, config = online_dpo, OnlineDpoConfig(steps=3, batch=3, **shared)
    tokenizer = load_tokenizer(given / "model")
    place = Place(own, made / "scratch", seed=3, label="online")
    stage(config, given / "model", given / "prompts.jsonl", tokenizer, place, given / "reward")
    join().barrier()
    if not join().alone:
        torch.distributed.destroy_process_group()
