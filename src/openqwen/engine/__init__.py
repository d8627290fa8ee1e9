"""Weights + prompts → tokens."""

from openqwen.engine.config import EngineConfig
from openqwen.engine.engine import Engine, Stats
from openqwen.engine.request import Event, FinishReason, Output, Prompt, Request, Sampling, Structure

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
