"""What test_reward_model.py runs in an environment with TRL: its RewardTrainer's loss.

Reads {"chosen", "rejected", "margins" or null, "center" or null} from standard input; writes the
loss and the gradients of the scores. All numbers are float64.
"""

import json
import sys
from collections import defaultdict
from types import SimpleNamespace

import torch
from trl import RewardTrainer

given = json.load(sys.stdin)
scores = torch.tensor([*given["chosen"], *given["rejected"]], dtype=torch.float64)
scores.requires_grad_()


class Model:
    training = True

    def __call__(self, **inputs):
        return SimpleNamespace(logits=scores[:, None])


trainer = SimpleNamespace(
    model=Model(),
    args=SimpleNamespace(center_rewards_coefficient=given["center"]),
    accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
    _metrics={"train": defaultdict(list)},
    _total_train_tokens=0,
    _tp_size=1,
)
inputs = {"attention_mask": torch.ones(len(scores), 3)}
if given["margins"] is not None:
    inputs["margin"] = torch.tensor(given["margins"], dtype=torch.float64)
loss = RewardTrainer.compute_loss(trainer, trainer.model, inputs)
loss.backward()
metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}
print(json.dumps({"loss": loss.item(), "gradient": scores.grad.tolist(), "metrics": metrics}))
