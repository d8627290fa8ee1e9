"""Weights + prompts → tokens."""

from openqwen.engine.engine import Engine, Output
from openqwen.engine.sampler import Sampling

__all__ = ["Engine", "Output", "Sampling"]
