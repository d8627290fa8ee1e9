"""The training loop of every stage: sum gradients, divide once, clip, step, save.

A stage gives two functions: `batch(step)`, the micro-batches of a step as a pure function of the
step and the weights, and `loss(micro)`, a sum and a count. A run that is killed at any moment and
started again goes on from its last state and writes the bits that the uninterrupted run writes.
"""

import math
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

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
from openqwen.train.metrics import (
    METRICS,
    Entry,
    has_targets,
    read_metrics,
    summarize,
    to_line,
    updated,
)
from openqwen.train.optimizer import OptimizerConfig, build_optimizers, learning_rate, make_moments
from openqwen.train.packed_batch import PackedBatch
from openqwen.train.parallel import World, join
from openqwen.train.recompute import recompute
from openqwen.train.state import StateWriter, load_best, load_state
from openqwen.train.track import tracking
from openqwen.train.validation import HELD_OUT, ValidationConfig, best_step

_USUAL = 100  # the last steps whose median gradient norm a spike is compared with


class EpisodeError(OpenQwenError):
    """No samples could be made for a step. Raised on every rank, before anything has changed."""


class SaveConfig(Settings):
    """When training states are written."""

    seconds: float = Field(
        30.0, ge=0, description="seconds between saved states; a killed run loses at most this much"
    )
    keep: int = Field(2, ge=1, description="number of states to keep, the newest")


class TrainingConfig(Settings):
    """The settings of every stage that trains."""

    train: OptimizerConfig = Field(default_factory=OptimizerConfig, description="optimizer")
    save: SaveConfig = Field(default_factory=SaveConfig, description="training states")


@dataclass(frozen=True)
class Place:
    """Where one training runs.

    Args:
        output: Folder for the checkpoint and a copy of metrics.jsonl.
        scratch: Folder for states and metrics.jsonl during training; it must outlive a kill.
        seed: Seed of all random draws.
        label: Name on the progress line.
        start: The model that training starts from, where it is a file or a folder.
        base: The base of `train.merging`, where an earlier stage made it.
    """

    output: Path
    scratch: Path
    seed: int
    label: str
    start: Path | None = None
    base: Path | None = None

    @classmethod
    def of(cls, run: StageRun) -> "Place":
        """The place of a stage's run."""
        inputs = run.inputs
        start, base = inputs.get("model"), inputs.get("base")
        return cls(run.output, run.scratch, run.seed, run.label, start, base)


Micro = TypeVar("Micro")  # a PackedBatch, or an object that has one as `rows`


@dataclass
class Trainer(Generic[Micro]):
    """The training loop. Under torchrun every rank holds a trainer, and they train together.

    Args:
        place: Folders, seed and label.
        config: Settings of the optimizer and of saved states.
        model: The network; `shard` divides it over the ranks.
        batch: Step -> its micro-batches, on every rank the same.
        loss: Micro-batch -> its loss.
        steps: Number of optimizer steps.
        generators: All generators that `batch` or `loss` draws from; they are saved.
        log_mfu: Log MFU, of all devices together; not where a step does other work too.
        name: Step -> the records that it reads, for error messages.
        held_out: Returns micro-batches that nothing is learned from.
        validation: When the loss on `held_out` is measured, and what it decides.
        world: The processes; with its mesh where `batch` or `loss` use that world too.
        episode: Number of steps that learn from the same samples. States are saved between
            episodes only, since the samples are not part of them.
        beside: Another network that training changes, such as a moving reference; it is saved.
        after: Called with each step after its update; returns what to log of it besides.
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
    episode: int = 1
    beside: nn.Module | None = None
    after: Callable[[int], Entry] | None = None

    def __post_init__(self) -> None:
        self.optimizer_config, self.label = self.config.train, self.place.label
        self.output, self.scratch = self.place.output, self.place.scratch
        # Gathers the full network on rank 0; see `World.shard`.
        self.full_model: Callable[[], Qwen2 | Scorer] = lambda: self.model
        self._sharded = False

    def shard(self) -> None:
        """Divide the network over the ranks, once. `run` does so where nothing did before."""
        if self._sharded:
            return
        recompute(self.model, self.optimizer_config.recompute)
        if self.optimizer_config.compile:
            compile_layers(self.model)
        if self.world.mesh is None:
            self.world = self.world.with_mesh(self.optimizer_config.parallel, self.model)
        self.full_model = self.world.shard(self.model, low=self._is_low)
        self._sharded = True

    def run(self) -> dict[str, float]:
        """Train to the end, from the last saved state where there is one.

        Returns:
            The metrics, averaged over the last twentieth of the steps (see `summarize`).
        """
        self.scratch.mkdir(parents=True, exist_ok=True)
        self.shard()
        optimizers = self._optimizers()
        first = load_state(
            self.scratch, self.model, optimizers, self.generators, self.world, self.beside
        )
        for optimizer in optimizers:
            make_moments(optimizer)
        metrics = self._resume_metrics(first)
        self._train(first, optimizers, metrics)
        self._finish(metrics)
        return summarize(metrics)

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimizers; the weights are still those that training starts from."""
        place, config = self.place, self.optimizer_config
        if config.merging.base is not None and place.base is not None:
            merging = config.merging.model_copy(update={"base": place.base})
            config = config.model_copy(update={"merging": merging})
        more = {"seed": place.seed, "start": place.start, "scratch": place.scratch}
        return build_optimizers(self.model, config, **(more if config.merging.base else {}))

    def save_checkpoint(self, tokenizer: Tokenizer, chat: bool = False) -> None:
        """Write the full trained network to `output`; every rank must call this.

        See `openqwen.save_checkpoint`.
        """
        full_model = self.full_model()
        if self.world.main:
            save_checkpoint(full_model, tokenizer, self.output, chat=chat)

    def _resume_metrics(self, first: int) -> list[Entry]:
        """The entries before step `first`. Later ones, which a killed run wrote, leave the log."""
        metrics = read_metrics(self.scratch / METRICS, before=first)
        self.world.barrier()  # every rank has read the file
        if self.world.main:
            write_text(self.scratch / METRICS, "".join(map(to_line, metrics)))
        return metrics

    def _train(
        self, first: int, optimizers: Sequence[torch.optim.Optimizer], metrics: list[Entry]
    ) -> None:
        """Run the steps from `first` on; append their entries to `metrics`."""
        self.model.train()
        last_save = time.monotonic()
        log_path = self.scratch / METRICS if self.world.main else os.devnull
        trackers = self.optimizer_config.track if self.world.main else []
        with (
            freed_memory_kept(),
            # With bfloat16, what autocast leaves in float32 need not be exact either.
            tf32(self._is_low),
            tracking(trackers, self.scratch, self.label, first) as track,
            open(log_path, "a", encoding="utf-8", buffering=1) as log,
            StateWriter(self.scratch, self.config.save.keep, self.world) as writer,
            progress(self.label, self.steps, "steps", done=first) as bar,
        ):
            for step in range(first, self.steps):
                try:
                    entry = self._step(step, optimizers, metrics)
                except EpisodeError:
                    if step > first:  # once the cause is mended the run goes on from here
                        self._save(writer, step, optimizers, log)
                    raise
                if self.held_out and self.validation.due(step, self.steps):
                    entry[HELD_OUT] = self._held_out_loss(self.held_out())
                log.write(to_line(entry))
                track(entry)
                metrics.append(entry)
                bar.advance(1, **_notes(entry))
                measured = HELD_OUT in entry and self.validation.outcome == "best"
                if measured and best_step(metrics) == step:
                    writer.save_best(step, self.model)
                waited = time.monotonic() - last_save >= self.config.save.seconds
                between = (step + 1) % self.episode == 0 and step + 1 < self.steps
                if self.world.broadcast(between and waited):
                    self._save(writer, step + 1, optimizers, log)
                    last_save = time.monotonic()

    def _save(
        self,
        writer: StateWriter,
        step: int,
        optimizers: Sequence[torch.optim.Optimizer],
        log: IO[str],
    ) -> None:
        """Save the state before a step."""
        if self.world.main:
            os.fsync(log.fileno())  # the log is never behind the state
        writer.save(step, self.model, optimizers, self.generators, self.beside)

    def _finish(self, metrics: Sequence[Entry]) -> None:
        """Take the best weights where they are asked for; copy the metrics to the output."""
        best = best_step(metrics)
        if self.validation.outcome == "best" and best is not None:
            load_best(self.scratch, best, self.model, self.world)
        self.model.eval()
        if self.world.main:
            self.output.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.scratch / METRICS, self.output / METRICS)
            for name in self.optimizer_config.track:
                shutil.copytree(self.scratch / name, self.output / name, dirs_exist_ok=True)
        clipped, updates = sum("clipped" in m for m in metrics), sum(map(updated, metrics))
        if 2 * clipped > updates:
            bound = f"a gradient norm of {self.optimizer_config.clip:g} (train.clip)"
            text = f"  {self.label}: {clipped} of {updates} steps were clipped to {bound}"
            console.print(text, markup=False)

    def _step(
        self, step: int, optimizers: Sequence[torch.optim.Optimizer], earlier: Sequence[Entry]
    ) -> Entry:
        """One optimizer step: gradients, checks, update. Returns its entry in the log."""
        start = time.perf_counter()
        micros, rate = self.batch(step), self._rate(step)
        total, count, extras = self._sum_gradients(step, micros)
        loss, norm, scale, problem = math.nan, math.nan, 1.0, ""
        if micros:  # an online stage may find nothing to learn from; the step is logged and passes
            if count == 0:
                raise self._no_target(step)
            loss = total / count
            norm, scale = self._norm_and_scale(count)
            problem = self._problem(loss, norm, earlier)
        if problem:
            self._stop_or_skip(step, rate, problem, earlier)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                vectors = all(parameter.dim() <= 1 for parameter in group["params"])
                own = rate * self.optimizer_config.vector_rate if vectors else rate
                group["lr"] = torch.tensor(own) if isinstance(group["lr"], Tensor) else own
            if micros and not problem:
                self._update(optimizer, scale)
            optimizer.zero_grad()
        entry = {"step": step, "loss": loss, "gradient_norm": norm, "learning_rate": rate}
        entry |= self._speed(micros, time.perf_counter() - start)
        entry |= {name: value / count for name, value in extras.items()}
        if self.after:
            entry |= self.after(step)
        if problem:
            entry["skipped"] = 1.0
        elif norm > self.optimizer_config.clip:
            entry["clipped"] = 1.0
        return entry

    def _sum_gradients(
        self, step: int, micros: Sequence[Micro]
    ) -> tuple[float, int, dict[str, float]]:
        """Sums of gradients, losses, counts and extras over the micro-batches of all ranks."""
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
        total, all_counts, *values = self.world.total([total, count, *extras.values()])
        return total, round(all_counts), dict(zip(extras, values, strict=True))

    @torch.no_grad()
    def _held_out_loss(self, micros: Sequence[Micro]) -> float:
        """The mean loss over all targets of some micro-batches."""
        self.model.eval()
        total, count = 0.0, 0
        for micro, counts in self.world.local_micro_batches(micros):
            with computing(self.optimizer_config.precision, self._device):
                loss = self.loss(micro)
            total, count = total + loss.sum.item() * counts, count + loss.count * counts
        self.model.train()
        total, all_counts = self.world.total([total, count])
        return total / all_counts if all_counts else math.nan

    def _norm_and_scale(self, count: int) -> tuple[float, float]:
        """The norm of the mean gradient over `count` targets, and the factor for the summed one.

        The factor divides by the count and clips.
        """
        norm = self.world.norm(_gradients(self.model.parameters())) / count
        return norm, min(1.0, self.optimizer_config.clip / (norm + 1e-6)) / count

    def _update(self, optimizer: torch.optim.Optimizer, scale: float) -> None:
        """Step by the gradients times `scale`."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if isinstance(optimizer, torch.optim.AdamW) and self.world.alone:
            # The fused AdamW multiplies while it reads, which saves a pass over the gradients.
            inverse = torch.tensor(1.0 / scale, device=parameters[0].device)
            optimizer.grad_scale = inverse  # type: ignore[attr-defined]
        else:
            torch._foreach_mul_(_gradients(parameters), scale)
        optimizer.step()

    def _problem(self, loss: float, norm: float, earlier: Sequence[Entry]) -> str:
        """Why a step must not change the weights; empty where it may."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"the loss is {loss} and the gradient norm {norm}"
        spike = self.optimizer_config.bad.spike
        norms = [m["gradient_norm"] for m in islice(filter(updated, reversed(earlier)), _USUAL)]
        if spike and len(norms) == _USUAL and norm > spike * statistics.median(norms):
            return f"the gradient norm is {norm:.3g}, and {statistics.median(norms):.3g} is usual"
        return ""

    def _stop_or_skip(self, step: int, rate: float, problem: str, earlier: Sequence[Entry]) -> None:
        """Raise an error, or print that the step is left out; `bad` decides."""
        bad = self.optimizer_config.bad
        where = f"step {step} of {self.label}{self._records(step)}"
        before = list(islice(filter(has_targets, reversed(earlier)), bad.patience - 1))
        too_many = len(before) == bad.patience - 1 and all("skipped" in m for m in before)
        if bad.action == "stop" or too_many:
            raise OpenQwenError(
                f"At {where} {problem}.",
                where=self.scratch,
                do=f"look at that data, or lower the learning rate (now {rate:.2g}); "
                "the last saved state is from before this step",
            )
        console.print(f"  Left out {where}: {problem}.", markup=False)

    def _no_target(self, step: int) -> OpenQwenError:
        return OpenQwenError(
            f"Step {step} of {self.label} has no target to learn from{self._records(step)}.",
            where=self.scratch,
            do="look at the answers in the data: none of this step's tokens is to be learned",
        )

    def _too_large(self, step: int, micro: Micro) -> OpenQwenError:
        peak = peak_memory(self._device) / 2**30
        return OpenQwenError(
            f"Memory ran out in step {step} of {self.label}{self._records(step)}, in a micro-batch "
            f"of {len(_rows(micro).tokens):,} tokens; the peak was {peak:.1f} GiB.",
            where=self.scratch,
            do=f"{LEVERS}. The last saved state is complete, and training goes on from it",
        )

    def _speed(self, micros: Sequence[Micro], seconds: float) -> Entry:
        rows = [_rows(micro) for micro in micros]
        tokens = sum(len(r.tokens) + r.spared for r in rows)
        entry = {
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "seconds": seconds,
            "peak_memory": peak_memory(self._device),
        }
        if self.log_mfu:
            flops = sum(r.flops(self.model.config) for r in rows) / seconds
            peak = peak_flops(self._device) * self.world.size
            entry |= {"flops_per_second": flops, "mfu": flops / peak}
        return entry

    @property
    def _is_low(self) -> bool:
        return is_low(self.optimizer_config.precision, best_device())

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _rate(self, step: int) -> float:
        return learning_rate(self.optimizer_config, step, self.steps)

    def _records(self, step: int) -> str:
        return f" ({self.name(step)})" if self.name else ""


def _rows(micro: Any) -> PackedBatch:
    return getattr(micro, "rows", micro)


def _gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def _notes(entry: Entry) -> dict[str, str]:
    """The end of the progress line."""
    notes = {"loss": f"{entry['loss']:.3f}", "speed": f"{entry['tokens_per_second']:,.0f} tokens/s"}
    if "mfu" in entry:
        notes["MFU"] = f"{entry['mfu']:.0%}"
    return notes | {"memory": f"{entry['peak_memory'] / 2**30:.1f} GiB"}
