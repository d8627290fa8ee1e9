"""What test_losses.py runs where Liger-Kernel is installed: its kernel, by Triton's interpreter,
against ours.

Prints the largest difference of losses (relative) and of gradients (of the largest gradient), in
float32 and bfloat16.
"""

import torch
from test_losses import samples, tiny

from openqwen.train import log_probs
from openqwen.train.losses import next_token
from openqwen.train.packed_batch import PackedBatch


class Gpu:
    """Stands for a GPU's device."""

    type = "cuda"


def gradients(model, dtype):
    model.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = next_token(model, PackedBatch.of(samples(9, seed=3)))
    (loss.sum * 3.0).backward()
    return loss, [p.grad.clone() for p in model.parameters()]


if __name__ == "__main__":
    model = tiny()
    find = log_probs._fused
    for dtype in (torch.float32, torch.bfloat16):
        log_probs._fused = find
        loss, ours = gradients(model, dtype)
        log_probs._fused = lambda device: find(Gpu)
        other, theirs = gradients(model, dtype)
        assert loss.count == other.count
        apart = max(
            float((a - b).abs().max() / a.abs().max().clamp(min=1e-3)) for a, b in zip(ours, theirs)
        )
        print("apart", abs(1 - loss.sum.item() / other.sum.item()), apart)
