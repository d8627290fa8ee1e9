"""The whole Qwen2 / Qwen2.5 system: raw text in, an aligned chat model out.

The names below are loaded when they are first used, so that importing the package costs nothing.
"""

import os
from typing import TYPE_CHECKING

from openqwen.support.lazy import lazy_names

# PyTorch takes large tensors from pages of 2 MB. Without it, the page faults of tensors that come
# and go in every step of a real model take half of the time on a CPU (docs/log.md). Read once, at
# PyTorch's first allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

if TYPE_CHECKING:
    from openqwen.engine import Engine, Sampling
    from openqwen.model import ModelConfig, Packed, load_model, save_checkpoint
    from openqwen.tokenizer import load_tokenizer

__all__ = [
    "Engine",
    "ModelConfig",
    "Packed",
    "Sampling",
    "load_model",
    "load_tokenizer",
    "save_checkpoint",
]

_ROOMS = {
    "Engine": "engine",
    "Sampling": "engine",
    "ModelConfig": "model",
    "Packed": "model",
    "load_model": "model",
    "save_checkpoint": "model",
    "load_tokenizer": "tokenizer",
}

__getattr__ = lazy_names(__name__, _ROOMS)
