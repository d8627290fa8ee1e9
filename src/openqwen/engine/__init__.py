"""Weights + prompts → tokens.

What needs torch or httpx is loaded when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from openqwen.engine.generator import FinishReason, Generator, Output, Prompt, Sampling, Structure

if TYPE_CHECKING:
    from openqwen.engine.config import EngineConfig
    from openqwen.engine.endpoint import Endpoint
    from openqwen.engine.engine import Engine
    from openqwen.engine.request import Event, Request, Stats

__all__ = [
    "Endpoint",
    "Engine",
    "EngineConfig",
    "Event",
    "FinishReason",
    "Generator",
    "Output",
    "Prompt",
    "Request",
    "Sampling",
    "Stats",
    "Structure",
]

_FILES = {
    "Endpoint": "endpoint",
    "Engine": "engine",
    "EngineConfig": "config",
    "Event": "request",
    "Request": "request",
    "Stats": "request",
}


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module 'openqwen.engine' has no attribute '{name}'")
    return getattr(importlib.import_module(f"openqwen.engine.{_FILES[name]}"), name)
