"""Data stages: parts of one pre-training run with their own length, mixture, RoPE base and rate.

Weights and optimizer states go on from stage to stage; only the text, the rotation of queries and
keys, and the learning rate change. Qwen2 and Qwen2.5 read rows of 4,096 tokens at base 10,000, then
of 32,768 at 1,000,000. Qwen2.5-Turbo goes on to 262,144 at 10,000,000, with 40 % of the tokens at
the longest length of each stage (Qwen2.5 report, section 3.3).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, field_serializer, model_validator

from openqwen.model import ModelConfig
from openqwen.support.progress import console
from openqwen.support.settings import Settings
from openqwen.train.balance import Balance, PretrainBatch
from openqwen.train.metrics import Entry
from openqwen.train.optimizer import OptimizerConfig, learning_rate
from openqwen.train.packed_dataset import DataConfig, PackedDataset
from openqwen.train.trainer import Trainer, TrainingConfig
from openqwen.train.validation import ValidationConfig

_BALANCE = "load of the balancing loss: of the whole step, of each micro-batch, or no such loss"
_THETA = 10_000.0  # RoPE base of a new network, as in Qwen2


class DataStage(Settings):
    """One data stage. Its schedule spans its own steps.

    A setting that is left out has the value of `data`, `rope_theta` or `train`.
    """

    tokens: int = Field(gt=0, description="tokens of this stage")
    context: int | None = Field(None, gt=1, description="longest row, in tokens")
    lengths: dict[int, float] | None = Field(None, description="row length -> share of tokens")
    batch_tokens: int | None = Field(None, gt=0, description="tokens of one optimizer step")
    mixture: dict[str, float] | None = Field(None, description="share of each source in the tokens")
    isolated: bool | None = Field(None, description="documents cannot see each other")
    fill_in_middle: dict[str, float] | None = Field(
        None, description="source -> share to cut for infilling"
    )
    rope_theta: float | None = Field(None, gt=1, description="RoPE base")
    learning_rate: float | None = Field(None, gt=0, description="peak learning rate")
    schedule: Literal["cosine", "linear", "constant", "wsd"] | None = Field(
        None, description="how the learning rate falls"
    )
    final_share: float | None = Field(
        None, ge=0, le=1, description="last learning rate over the peak"
    )
    warmup_share: float | None = Field(
        None, ge=0, lt=1, description="share of steps that rise to it"
    )


class HeldOutConfig(ValidationConfig):
    """Held-out text on which the loss is measured."""

    tokens: int = Field(0, ge=0, description="held-out tokens to measure on; 0: none")

    @model_validator(mode="after")
    def _has_text(self) -> "HeldOutConfig":
        if (self.every or self.outcome == "best") and not self.tokens:
            raise ValueError("no text is held out: give validation.tokens, such as 100000")
        return self


@dataclass(frozen=True)
class ResolvedStage:
    """A data stage with all settings filled in. positions: the context length of the network."""

    name: str
    data: DataConfig
    rope_theta: float
    train: OptimizerConfig
    positions: int


class StagedConfig(TrainingConfig):
    """The settings that pre-training and its long-sequence phase share."""

    balance: Balance = Field("global", description=_BALANCE)
    data: DataConfig = Field(default_factory=DataConfig, description="the text to read")
    rope_theta: float | None = Field(
        None, gt=1, description="RoPE base; none: the checkpoint's, or 10,000 for a new network"
    )
    stages: dict[str, DataStage] = Field(
        default_factory=dict,
        description="named data stages, in this order; none: one stage as `data` says",
    )
    train: OptimizerConfig = Field(
        default_factory=lambda: OptimizerConfig(learning_rate=3e-4), description="optimizer"
    )
    validation: HeldOutConfig = Field(default_factory=HeldOutConfig, description="held-out text")

    @field_serializer("stages", when_used="json")
    def _in_order(self, stages: dict[str, DataStage]) -> list[dict[str, Any]]:
        """As a list: the order counts, and an artifact's digest sorts the keys of a mapping."""
        return [{"name": name, **stage.model_dump(mode="json")} for name, stage in stages.items()]

    @model_validator(mode="after")
    def _lengths_fit(self) -> "StagedConfig":
        if len(self.stages) > 1 and self.validation.outcome == "best":
            raise ValueError(
                "the best weights may be those of an early data stage: leave "
                "validation.outcome at last"
            )
        for stage in self.resolved():
            where = f"data stage '{stage.name}': " if stage.name else ""
            for what, table in (("lengths", stage.data.lengths), ("mixture", stage.data.mixture)):
                if any(share < 0 for share in table.values()):
                    raise ValueError(f"{where}a share of the {what} is negative")
            lengths = stage.data.lengths
            if lengths and (
                abs(sum(lengths.values()) - 1) > 1e-6 or max(lengths) != stage.data.row
            ):
                raise ValueError(
                    f"{where}the shares of the lengths must sum to 1 and the longest length must "
                    f"be the context; they sum to {sum(lengths.values()):.3g}, the longest is "
                    f"{max(lengths):,} and the context {stage.data.row:,}"
                )
            if any(not 0 <= share <= 1 for share in stage.data.fill_in_middle.values()):
                raise ValueError(f"{where}a share of fill_in_middle is not between 0 and 1")
        return self

    def resolved(self, start: ModelConfig | None = None) -> list[ResolvedStage]:
        """The data stages, in order.

        start: the configuration of the checkpoint that training goes on from. Its RoPE base and
        context hold where no setting gives others; rows are then no longer than its context.
        """
        resolved = []
        theta = self.rope_theta or (start.rope_theta if start else _THETA)
        for name, stage in (self.stages or {"": DataStage(tokens=self.data.tokens)}).items():
            given = {key: value for key, value in stage if value is not None}
            data = self.data.model_copy(
                update={k: v for k, v in given.items() if k in DataConfig.model_fields}
            )
            train = self.train.model_copy(
                update={k: v for k, v in given.items() if k in OptimizerConfig.model_fields}
            )
            has_context = data.context is not None or bool(data.lengths)
            positions = data.row if has_context or start is None else start.max_position_embeddings
            data = data.model_copy(update={"context": min(data.row, positions)})
            rope_theta = given.get("rope_theta", theta)
            resolved.append(ResolvedStage(name, data, rope_theta, train, positions))
        return resolved


@dataclass(frozen=True)
class PlannedStage:
    """A data stage with its rows, and the step of the run at which it begins."""

    stage: ResolvedStage
    dataset: PackedDataset
    first: int


def planned_at(plan: Sequence[PlannedStage], step: int) -> PlannedStage:
    """The data stage that a step belongs to."""
    return next(planned for planned in reversed(plan) if planned.first <= step)


@dataclass
class StagedTrainer(Trainer[PretrainBatch]):
    """A trainer that enters each data stage at its first step.

    plan: the data stages in order.
    """

    plan: Sequence[PlannedStage] = ()
    _entered: PlannedStage | None = None

    def _step(
        self, step: int, optimizers: Sequence[torch.optim.Optimizer], earlier: Sequence[Entry]
    ) -> Entry:
        planned = planned_at(self.plan, step)
        if planned is not self._entered:
            self._enter(planned)
        entry = super()._step(step, optimizers, earlier)
        if len(self.plan) > 1:
            entry["data_stage"] = self.plan.index(planned) + 1.0
        return entry

    def _enter(self, planned: PlannedStage) -> None:
        """Set the network's RoPE base and context at the boundary of a data stage, or on resume."""
        self._entered, stage = planned, planned.stage
        set_rope(self.model, stage)
        if len(self.plan) > 1:
            text = f"{stage.data.tokens:,} tokens, rows of {stage.data.row:,}"
            base = f"RoPE base {stage.rope_theta:,.0f}"
            console.print(f"  data stage {stage.name}: {text}, {base}", markup=False)

    def _rate(self, step: int) -> float:
        planned = planned_at(self.plan, step)
        return learning_rate(planned.stage.train, step - planned.first, planned.dataset.steps)


def set_rope(model: Any, stage: ResolvedStage) -> None:
    """Give a network a data stage's RoPE base and context; its decoder reads the same settings."""
    model.config = model.model.config = model.config.with_rope(stage.rope_theta, stage.positions)
