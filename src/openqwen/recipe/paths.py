"""Report which fast paths this machine takes; all are detected, none is required."""

import torch

from openqwen.model import dual_chunk
from openqwen.model.attention import packed_kernel
from openqwen.support.device import best_device
from openqwen.tokenizer import fast


def paths() -> str:
    """Return one line on the device and its fast paths, printed at the start of a run."""
    device = best_device()
    if device.type == "cuda":
        where = torch.cuda.get_device_name()
    else:
        threads = torch.get_num_threads()
        where = f"CPU, {threads} thread{'s' * (threads != 1)}"
    tokenizer = "compiled" if fast.library() else "in plain Python"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    chunks = "fused" if dual_chunk.has_fused(device, dtype) else "in plain PyTorch"
    packed = "without padding" if packed_kernel(device) else "in padded buckets"
    return (
        f"On {where}; {str(dtype).removeprefix('torch.')}; tokenizer {tokenizer}; "
        f"packed attention {packed}; dual chunk attention {chunks}."
    )
