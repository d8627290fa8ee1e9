"""The network. It knows tensors, not text, data or training."""

from openqwen.model.attention import Attention, Packed
from openqwen.model.cache import Cache
from openqwen.model.checkpoint import (
    load_model,
    load_scorer,
    save_checkpoint,
    save_weights,
    scorer_from,
)
from openqwen.model.config import ModelConfig
from openqwen.model.decoder import Decoder, Qwen2, Scorer, initialize
from openqwen.model.experts import Routing
from openqwen.model.long_context import DualChunk, LongContext, Yarn
from openqwen.model.paged import Paged

__all__ = [
    "Attention",
    "Cache",
    "Decoder",
    "DualChunk",
    "LongContext",
    "ModelConfig",
    "Packed",
    "Paged",
    "Qwen2",
    "Routing",
    "Scorer",
    "Yarn",
    "initialize",
    "load_model",
    "load_scorer",
    "save_checkpoint",
    "save_weights",
    "scorer_from",
]
