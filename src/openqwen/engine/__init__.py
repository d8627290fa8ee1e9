"""Weights + prompts → tokens."""

from openqwen.engine.config import EngineConfig
from openqwen.engine.engine import Engine
from openqwen.engine.request import Event, FinishReason, Output, Prompt, Request, Sampling, Stats, Structure

__all__ = [
    "Engine",
    "EngineConfig",
    "Event",
    "FinishReason",
    "Output",
    "Prompt",
    "Request",
    "Sampling",
    "Stats",
    "Structure",
]
