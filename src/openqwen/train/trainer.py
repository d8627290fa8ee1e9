"""The loop that every stage runs: micro-batches in, gradients summed, divided once, clipped,
stepped, saved.

A stage gives two functions: `batch(step)`, the micro-batches of a step as a pure function of the
step and the weights, and `loss(micro)`, a sum and a count. Killed at any moment, the next run goes
on from the last state and writes the bits that the uninterrupted run would have written.
"""

import json
import math
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from openqwen.model import Qwen2, Scorer, save_checkpoint
from openqwen.support.device import best_device, freed_memory_kept, peak_flops, peak_memory, tf32
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import write_text
from openqwen.support.generators import Generators
from openqwen.support.progress import console, progress
from openqwen.support.settings import Settings
from openqwen.support.stage import StageRun
from openqwen.tokenizer import Tokenizer
from openqwen.train.compute import LEVERS, compile_layers, computing, is_low, is_out_of_memory
from openqwen.train.losses import Loss
from openqwen.train.optimizer import OptimizerConfig, build_optimizers, learning_rate
from openqwen.train.packed_batch import PackedBatch
from openqwen.train.parallel import World, join
from openqwen.train.recompute import recompute
from openqwen.train.state import StateWriter, load_best, load_state
from openqwen.train.track import tracking
from openqwen.train.validation import HELD_OUT, ValidationConfig, best_step

METRICS = "metrics.jsonl"
_USUAL = 100  # steps whose gradient norms say what is usual


class SaveConfig(Settings):
    """When training states are written."""

    seconds: float = Field(
        30.0, ge=0, description="seconds between saved states; a killed run loses at most this much"
    )
    keep: int = Field(2, ge=1, description="how many states are kept, the newest")


class TrainingConfig(Settings):
    """What every stage that trains lets choose."""

    train: OptimizerConfig = Field(default_factory=OptimizerConfig, description="optimizer")
    save: SaveConfig = Field(default_factory=SaveConfig, description="training states")


@dataclass(frozen=True)
class Place:
    """Where one training runs. output: for what it makes, metrics.jsonl among it. scratch: holds
    the states and the metrics while it goes on, and outlives a kill. seed: of all its draws. label:
    its name on the live line."""

    output: Path
    scratch: Path
    seed: int
    label: str

    @classmethod
    def of(cls, run: StageRun) -> "Place":
        """The place of a stage's run."""
        return cls(run.output, run.scratch, run.seed, run.label)


Micro = TypeVar("Micro")  # PackedBatch, or what has them as `rows`


@dataclass
class Trainer(Generic[Micro]):
    """What training needs, whatever the stage. Under torchrun every rank holds one, and they train
    together.

    generators: every one that `batch` or `loss` draws from; they are saved. log_mfu: whether
    to log MFU; leave it out where a step does other work than training, such as sampling.
    name: says which records a step is made of, for the message about a bad one. held_out:
    micro-batches that nothing is learned from; their loss is measured as often as `validation`
    says.
    """

    place: Place
    config: TrainingConfig
    model: Qwen2 | Scorer
    batch: Callable[[int], Sequence[Micro]]
    loss: Callable[[Micro], Loss]
    steps: int
    generators: Generators
    log_mfu: bool = False
    name: Callable[[int], str] | None = None
    held_out: Callable[[], Sequence[Micro]] | None = None
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    world: World = field(default_factory=join)

    def __post_init__(self) -> None:
        self.optimizer_config, self.label = self.config.train, self.place.label
        self.output, self.scratch = self.place.output, self.place.scratch
        self.full_model: Callable[[], Qwen2 | Scorer] = lambda: (
            self.model
        )  # after `run`: all of it, to be saved
        self._sharded = False

    def shard(self) -> None:
        """Divide the network over the ranks, once; `run` does so too, if nobody has."""
        if not self._sharded:
            recompute(self.model, self.optimizer_config.recompute)
            if self.optimizer_config.compile:
                compile_layers(self.model)
            self.world = self.world.with_mesh(self.optimizer_config.parallel, self.model)
            self.full_model = self.world.shard(
                self.model, low=is_low(self.optimizer_config.precision, best_device())
            )
            self._sharded = True

    def run(self) -> dict[str, float]:
        """Train to the end; returns the last values of the metrics, smoothed over the last
        twentieth of the steps.
        """
        self.scratch.mkdir(parents=True, exist_ok=True)
        self.shard()
        optimizers = build_optimizers(self.model, self.optimizer_config)
        first = load_state(self.scratch, self.model, optimizers, self.generators, self.world)
        metrics = _read_metrics(self.scratch / METRICS, before=first)
        self.world.barrier()  # every rank has read it
        if self.world.main:
            write_text(self.scratch / METRICS, "".join(map(_line, metrics)))
        self.model.train()
        last_save = time.monotonic()
        trackers = self.optimizer_config.track if self.world.main else []
        with (
            freed_memory_kept(),
            # What autocast leaves in float32 need not be exact where bfloat16 is meant.
            tf32(is_low(self.optimizer_config.precision, best_device())),
            tracking(trackers, self.scratch, self.label, first) as track,
            open(
                self.scratch / METRICS if self.world.main else os.devnull,
                "a",
                encoding="utf-8",
                buffering=1,
            ) as log,
            StateWriter(self.scratch, self.config.save.keep, self.world) as writer,
            progress(self.label, self.steps, "steps", done=first) as bar,
        ):
            for step in range(first, self.steps):
                entry = self._step(step, optimizers, metrics)
                if self.held_out and self.validation.due(step, self.steps):
                    entry[HELD_OUT] = self._held_out_loss(self.held_out())
                log.write(_line(entry))
                track(entry)
                metrics.append(entry)
                if self.validation.outcome == "best" and best_step(metrics) == step:
                    writer.save_best(step, self.model)
                bar.advance(1, **_notes(entry))
                due = (
                    step + 1 < self.steps
                    and time.monotonic() - last_save >= self.config.save.seconds
                )
                if self.world.broadcast(due):
                    if self.world.main:
                        os.fsync(log.fileno())  # the log is never behind the state
                    writer.save(step + 1, self.model, optimizers, self.generators)
                    last_save = time.monotonic()
        best = best_step(metrics)
        if self.validation.outcome == "best" and best is not None:
            load_best(self.scratch, best, self.model, self.world)
        self.model.eval()
        if self.world.main:
            self.output.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.scratch / METRICS, self.output / METRICS)
            for name in self.optimizer_config.track:
                shutil.copytree(self.scratch / name, self.output / name, dirs_exist_ok=True)
        clipped, moved = sum("clipped" in m for m in metrics), sum(map(_moved, metrics))
        if 2 * clipped > moved:
            bound = f"a gradient norm of {self.optimizer_config.clip:g} (train.clip)"
            told = f"  {self.label}: {clipped} of {moved} steps were clipped to {bound}"
            console.print(told, markup=False)
        return _summary(metrics)

    def save_checkpoint(self, tokenizer: Tokenizer, chat: bool = False) -> None:
        """Write the trained network to `output`, whole, by rank 0; all ranks must call this.

        See `model`'s own.
        """
        whole = self.full_model()
        if self.world.main:
            save_checkpoint(whole, tokenizer, self.output, chat=chat)

    def _step(
        self,
        step: int,
        optimizers: Sequence[torch.optim.Optimizer],
        earlier: Sequence[dict[str, float]],
    ) -> dict[str, float]:
        start = time.perf_counter()
        micros = self.batch(step)
        rate = self._rate(step)
        total, count, extras = self._backward(step, micros)
        if micros and count == 0:
            raise OpenQwenError(
                f"Step {step} of {self.label} has no target to learn from{self._named(step)}.",
                where=self.scratch,
                do="look at what the data's answers are: nothing in this step is to be learned",
            )
        # An online stage may find nothing to learn from in a step: it is logged and passes.
        loss = total / count if micros else math.nan
        norm, scale = self._norm_and_scale(count) if micros else (math.nan, 1.0)
        why = self._bad(loss, norm, earlier) if micros else ""
        if why:
            self._stop_or_skip(step, rate, why, earlier)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = torch.tensor(rate) if isinstance(group["lr"], Tensor) else rate
            if micros and not why:
                self._move(optimizer, scale)
            optimizer.zero_grad()
        seconds = time.perf_counter() - start
        rows = [_fed(micro) for micro in micros]
        tokens = sum(len(r.tokens) + r.spared for r in rows)
        entry = {
            "step": step,
            "loss": loss,
            "gradient_norm": norm,
            "learning_rate": rate,
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "seconds": seconds,
            "peak_memory": peak_memory(self._device),
            **{name: value / count for name, value in extras.items()},
        }
        if self.log_mfu:
            entry["flops_per_second"] = sum(r.flops(self.model.config) for r in rows) / seconds
            entry["mfu"] = entry["flops_per_second"] / peak_flops(self._device)
        if why:
            entry["skipped"] = 1.0
        elif norm > self.optimizer_config.clip:
            entry["clipped"] = 1.0
        return entry

    def _backward(self, step: int, micros: Sequence[Micro]) -> tuple[float, int, dict[str, float]]:
        """Sum gradients, losses, counts and extras over the micro-batches of all ranks."""
        total, count, extras = 0.0, 0, dict[str, float]()
        for micro, counts in self.world.local_micro_batches(micros):
            try:
                with computing(self.optimizer_config.precision, self._device):
                    loss = self.loss(micro)
                (loss.sum * counts).backward()
            except Exception as error:
                if is_out_of_memory(error):
                    raise self._too_large(step, micro) from error
                raise
            total += loss.sum.item() * counts
            count += loss.count * counts
            for name, value in loss.extras.items():
                extras[name] = extras.get(name, 0.0) + value * counts
        total, whole, *values = self.world.total([total, count, *extras.values()])
        return total, round(whole), dict(zip(extras, values, strict=True))

    @torch.no_grad()
    def _held_out_loss(self, micros: Sequence[Micro]) -> float:
        """The mean loss over all targets of micro-batches."""
        self.model.eval()
        total, count = 0.0, 0
        for micro, counts in self.world.local_micro_batches(micros):
            with computing(self.optimizer_config.precision, self._device):
                loss = self.loss(micro)
            total, count = total + loss.sum.item() * counts, count + loss.count * counts
        self.model.train()
        total, whole = self.world.total([total, count])
        return total / whole if whole else math.nan

    def _bad(self, loss: float, norm: float, earlier: Sequence[dict[str, float]]) -> str:
        """What is wrong with a step, or nothing."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"the loss is {loss} and the gradient norm {norm}"
        spike = self.optimizer_config.bad.spike
        usual = [m["gradient_norm"] for m in islice(filter(_moved, reversed(earlier)), _USUAL)]
        if spike and len(usual) == _USUAL and norm > spike * statistics.median(usual):
            return f"the gradient norm is {norm:.3g}, and {statistics.median(usual):.3g} is usual"
        return ""

    def _stop_or_skip(
        self, step: int, rate: float, why: str, earlier: Sequence[dict[str, float]]
    ) -> None:
        where = f"step {step} of {self.label}{self._named(step)}"
        before = list(
            islice(filter(_learned, reversed(earlier)), self.optimizer_config.bad.patience - 1)
        )
        endless = len(before) == self.optimizer_config.bad.patience - 1
        endless = endless and all("skipped" in m for m in before)
        if self.optimizer_config.bad.action == "stop" or endless:
            raise OpenQwenError(
                f"At {where} {why}.",
                where=self.scratch,
                do=f"look at that data, or lower the learning rate (now {rate:.2g}); "
                "the last saved state is from before this step",
            )
        console.print(f"  Left out {where}: {why}.", markup=False)

    def _too_large(self, step: int, micro: Micro) -> OpenQwenError:
        peak = peak_memory(self._device) / 2**30
        return OpenQwenError(
            f"Memory ran out in step {step} of {self.label}{self._named(step)}, in a micro-batch "
            "of "
            f"{len(_fed(micro).tokens):,} tokens; the most held was {peak:.1f} GiB.",
            where=self.scratch,
            do=f"{LEVERS}. The last saved state is whole, and training goes on from it",
        )

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _rate(self, step: int) -> float:
        return learning_rate(self.optimizer_config, step, self.steps)

    def _named(self, step: int) -> str:
        return f" ({self.name(step)})" if self.name else ""

    def _norm_and_scale(self, count: int) -> tuple[float, float]:
        """The norm of the mean gradient over `count` targets, and what makes the summed one the
        mean, clipped.
        """
        for parameter in self.model.parameters():
            if parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = parameter.grad.coalesce()
        norm = self.world.norm(_gradients(self.model.parameters())) / count
        return norm, min(1.0, self.optimizer_config.clip / (norm + 1e-6)) / count

    def _move(self, optimizer: torch.optim.Optimizer, scale: float) -> None:
        """Step by the gradients times `scale`, which the fused AdamW multiplies itself, while it
        reads them.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if isinstance(optimizer, torch.optim.AdamW) and self.world.alone:
            optimizer.grad_scale = torch.tensor(1.0 / scale, device=parameters[0].device)  # type: ignore[attr-defined]
        else:
            torch._foreach_mul_(_gradients(parameters), scale)
        optimizer.step()


def _fed(micro: Any) -> PackedBatch:
    """What a micro-batch feeds."""
    return getattr(micro, "rows", micro)


def _gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """What there is of gradients; of a sparse one its values."""
    found = [p.grad for p in parameters if p.grad is not None]
    return [g._values() if g.is_sparse else g for g in found]


def _notes(entry: dict[str, float]) -> dict[str, str]:
    """The end of the live line."""
    notes = {"loss": f"{entry['loss']:.3f}", "speed": f"{entry['tokens_per_second']:,.0f} tokens/s"}
    if "mfu" in entry:
        notes["MFU"] = f"{entry['mfu']:.0%}"
    return notes | {"memory": f"{entry['peak_memory'] / 2**30:.1f} GiB"}


def _line(entry: dict[str, float]) -> str:
    """One line of the log; JSON has no NaN, so what is not a number is null."""
    return json.dumps({k: v if math.isfinite(v) else None for k, v in entry.items()}) + "\n"


def _read_metrics(path: Path, before: int) -> list[dict[str, float]]:
    """The log's entries of earlier steps, without what a killed run wrote beyond its last state."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:before]
    return [
        {k: math.nan if v is None else v for k, v in json.loads(line).items()} for line in lines
    ]


def _learned(entry: dict[str, float]) -> bool:
    """Whether a step had something to learn from; an online stage may find none."""
    return entry["tokens"] > 0


def _moved(entry: dict[str, float]) -> bool:
    """Whether a step moved the weights."""
    return _learned(entry) and "skipped" not in entry


def _summary(metrics: list[dict[str, float]]) -> dict[str, float]:
    """Means over the last twentieth of the steps, totals of the whole run; the most telling first.

    Steps that did not move the weights are counted and enter no mean.
    """
    moved, count = list(filter(_moved, metrics)), max(1, len(metrics) // 20)
    tail = list(filter(_moved, metrics[-count:])) or moved[-count:] or metrics[-count:]
    other = {"step", "seconds", "tokens", "tokens_per_second", "flops_per_second", "mfu"}
    other |= {"learning_rate", "gradient_norm", "peak_memory", "skipped", "clipped", HELD_OUT}
    summary = {n: sum(m.get(n, 0.0) for m in tail) / len(tail) for n in tail[-1] if n not in other}
    summary["clipped_share"] = sum("clipped" in m for m in moved) / max(1, len(moved))
    counts = {
        "skipped_steps": sum("skipped" in m for m in metrics),
        "empty_steps": sum(not _learned(m) for m in metrics),
    }
    summary |= {name: count for name, count in counts.items() if count}
    tokens, seconds = sum(m["tokens"] for m in metrics), sum(m["seconds"] for m in metrics)
    summary |= {
        "tokens_per_second": tokens / max(seconds, 1e-9),
        "tokens": tokens,
        "steps": len(metrics),
    }
    last = metrics[-1]
    if HELD_OUT in last:
        best = min(m.get(HELD_OUT, math.inf) for m in metrics)
        summary |= {HELD_OUT: last[HELD_OUT], f"best_{HELD_OUT}": best}
    if "mfu" in tail[-1]:
        summary["mfu"] = sum(m.get("mfu", 0.0) for m in tail) / len(tail)
    return summary
