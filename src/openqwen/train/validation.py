"""Held-out loss during training, and the choice of the weights that it decides."""

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from openqwen.support.settings import Settings

HELD_OUT = "validation_loss"  # the name in the metrics


class ValidationConfig(Settings):
    """When the held-out loss is measured, and what it decides."""

    every: int = Field(0, ge=0, description="steps between measurements; 0: only at the end")
    outcome: Literal["last", "best"] = Field(
        "last", description="weights to save: the last, or those of the lowest loss"
    )

    def due(self, step: int, steps: int) -> bool:
        """Whether the loss is measured after step `step` of `steps`."""
        return step + 1 == steps or bool(self.every and (step + 1) % self.every == 0)


def best_step(metrics: Sequence[dict[str, float]]) -> int | None:
    """The first step with the lowest held-out loss; None where none was measured."""
    measured = [m for m in metrics if math.isfinite(m.get(HELD_OUT, math.nan))]
    return round(min(measured, key=lambda m: m[HELD_OUT])["step"]) if measured else None
