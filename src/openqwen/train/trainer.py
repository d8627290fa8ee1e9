"""The loop that every stage runs: micro-batches in, gradients summed, divided once, clipped, stepped, saved.

A stage gives two functions: `batch(step)`, the micro-batches of a step as a pure function of the step and the
weights, and `loss(micro)`, a sum and a count. Killed at any moment, the next run goes on from the last state and
writes the bits that the uninterrupted run would have written.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from openqwen.support.errors import OpenQwenError
from openqwen.support.generators import Generators
from openqwen.support.progress import progress
from openqwen.train.losses import Loss
from openqwen.train.optimizer import OptimizerConfig, adamw, learning_rate
from openqwen.train.state import load_state, save_state

METRICS = "metrics.jsonl"
Micro = TypeVar("Micro")


class SaveConfig(BaseModel):
    """When training states are written."""

    model_config = ConfigDict(extra="forbid")

    seconds: float = Field(30.0, ge=0, description="seconds between saved states; a killed run loses at most this much")


@dataclass
class Trainer(Generic[Micro]):
    """What training needs, whatever the stage.

    scratch: holds the states and metrics.jsonl while training goes on, and outlives a kill. output: metrics.jsonl is
    copied there at the end.
    """

    label: str
    model: nn.Module
    batch: Callable[[int], Sequence[Micro]]
    loss: Callable[[Micro], Loss]
    tokens: Callable[[Micro], int]
    steps: int
    optimizer: OptimizerConfig
    save: SaveConfig
    scratch: Path
    output: Path
    generators: Generators

    def run(self) -> dict[str, float]:
        """Train to the end; returns the last values of the metrics, smoothed over the last twentieth of the steps."""
        self.scratch.mkdir(parents=True, exist_ok=True)
        optimizer = adamw(self.model, self.optimizer)
        first = load_state(self.scratch, self.model, optimizer, self.generators)
        metrics = _read_metrics(self.scratch / METRICS, before=first)
        self.model.train()
        last_save = time.monotonic()
        total_tokens = sum(m["tokens"] for m in metrics)
        with (
            open(self.scratch / METRICS, "a", encoding="utf-8", buffering=1) as log,
            progress(self.label, self.steps, "steps", done=first) as bar,
        ):
            for step in range(first, self.steps):
                entry = self._step(step, optimizer)
                log.write(json.dumps(entry) + "\n")
                metrics.append(entry)
                total_tokens += entry["tokens"]
                bar.advance(1, loss=f"{entry['loss']:.3f}", speed=f"{entry['tokens_per_second']:,.0f} tokens/s")
                if step + 1 < self.steps and time.monotonic() - last_save >= self.save.seconds:
                    os.fsync(log.fileno())  # the log is never behind the state
                    save_state(self.scratch, step + 1, self.model, optimizer, self.generators)
                    last_save = time.monotonic()
        self.model.eval()
        self.output.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.scratch / METRICS, self.output / METRICS)
        return _summary(metrics)

    def _step(self, step: int, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        start = time.perf_counter()
        micros = self.batch(step)
        rate = learning_rate(self.optimizer, step, self.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        total, count, extras = 0.0, 0, dict[str, float]()
        for micro in micros:
            loss = self.loss(micro)
            loss.sum.backward()
            total += loss.sum.item()
            count += loss.count
            for name, value in loss.extras.items():
                extras[name] = extras.get(name, 0.0) + value
        if micros and count == 0:
            raise OpenQwenError(f"Step {step} of {self.label} has no target to learn from.", where=str(self.scratch))
        norm = self._divide_and_clip(count) if micros else 0.0
        count = max(count, 1)  # an online stage may find nothing to learn from in a step: it is logged and passes
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise OpenQwenError(
                f"The loss is {total / count} and the gradient norm {norm} at step {step} of {self.label}.",
                where=str(self.scratch),
                do=f"lower the learning rate (now {rate:.2g}); the last saved state is from before this step",
            )
        if micros:
            optimizer.step()
            optimizer.zero_grad()
        seconds = time.perf_counter() - start
        tokens = sum(self.tokens(m) for m in micros)
        return {
            "step": step,
            "loss": total / count,
            "gradient_norm": norm,
            "learning_rate": rate,
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "seconds": seconds,
            **{name: value / count for name, value in extras.items()},
        }

    def _divide_and_clip(self, count: int) -> float:
        """Turn the summed gradient into the mean over `count` targets; returns its norm before clipping."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients)) / count
        scale = min(1.0, self.optimizer.clip / (norm + 1e-6)) / count
        torch._foreach_mul_(gradients, scale)
        return norm


def _read_metrics(path: Path, before: int) -> list[dict[str, float]]:
    """The log's entries of earlier steps; what a killed run wrote beyond its last state is cut off."""
    if not path.exists():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8").split("\n")[: before or 0]:
        kept.append(json.loads(line))
    path.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
    return kept


def _summary(metrics: list[dict[str, float]]) -> dict[str, float]:
    """Means over the last twentieth of the steps, and totals of the whole run."""
    tail = metrics[-max(1, len(metrics) // 20) :]
    totalled = {"step", "seconds", "tokens", "tokens_per_second", "learning_rate", "gradient_norm"}
    names = [n for n in tail[-1] if n not in totalled]
    summary = {n: sum(m.get(n, 0.0) for m in tail) / len(tail) for n in names}
    tokens, seconds = sum(m["tokens"] for m in metrics), sum(m["seconds"] for m in metrics)
    return summary | {"tokens_per_second": tokens / max(seconds, 1e-9), "tokens": tokens, "steps": len(metrics)}
