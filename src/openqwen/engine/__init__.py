"""Weights + prompts → tokens.

What needs torch or httpx is loaded when it is first used.
"""

from typing import TYPE_CHECKING

from openqwen.engine.generator import FinishReason, Generator, Output, Prompt, Sampling, Structure
from openqwen.support.lazy import lazy_names

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

__getattr__ = lazy_names(__name__, _FILES)
