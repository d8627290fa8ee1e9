"""Data stages: stretches of one pre-training run with their own length, mixture, RoPE base and
learning rate.

Weights and optimizer run on from stage to stage; only what is read, how it is turned, and how fast
it is learned changes. Qwen2 and Qwen2.5 read rows of 4,096 tokens at base 10,000, then of 32,768 at
1,000,000; Qwen2.5-Turbo goes on to 262,144 at 10,000,000, with 40 % of the tokens at the longest
length of each stage (Qwen2.5 report, section 3.3).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, field_serializer, model_validator

from openqwen.model import ModelConfig
from openqwen.support.progress import console
from openqwen.support.settings import Settings
from openqwen.train.balance import Balance, Balanced
from openqwen.train.optimizer import OptimizerConfig, learning_rate
from openqwen.train.packed_dataset import DataConfig, PackedDataset
from openqwen.train.trainer import Trainer, TrainingConfig
from openqwen.train.validation import ValidationConfig

_BALANCE = (
    "where a mixture of experts counts the load that it evens out: the whole step, each "
    "micro-batch, or nowhere"
)
_THETA = 10_000.0  # of a new network, as in Qwen2
_RATE = ("learning_rate", "schedule", "final_share", "warmup_share")


class DataStage(Settings):
    """One data stage.

    What it leaves out is as in `data`, `rope_theta` and `train`; its schedule spans its steps.
    """

    tokens: int = Field(gt=0, description="tokens of this stage")
    context: int | None = Field(None, gt=1, description="longest row, in tokens")
    lengths: dict[int, float] | None = Field(
        None, description="row length -> its share of the tokens"
    )
    batch_tokens: int | None = Field(None, gt=0, description="tokens of one optimizer step")
    mixture: dict[str, float] | None = Field(None, description="share of each source in the tokens")
    isolated: bool | None = Field(None, description="documents are blind to each other")
    fill_in_middle: dict[str, float] | None = Field(
        None, description="source -> share of its documents to cut"
    )
    rope_theta: float | None = Field(None, gt=1, description="RoPE base")
    learning_rate: float | None = Field(None, gt=0, description="peak learning rate")
    schedule: Literal["cosine", "linear", "constant", "wsd"] | None = Field(
        None, description="how the rate falls"
    )
    final_share: float | None = Field(
        None, ge=0, le=1, description="share of the peak left at the stage's last step"
    )
    warmup_share: float | None = Field(
        None, ge=0, lt=1, description="share of the stage's steps that rise to the peak"
    )


class HeldOutConfig(ValidationConfig):
    """Text that nothing is learned from, on which the loss is measured."""

    tokens: int = Field(
        0, ge=0, description="tokens of the corpus's held-out documents, their first half; 0: none"
    )

    @model_validator(mode="after")
    def _some(self) -> "HeldOutConfig":
        if (self.every or self.outcome == "best") and not self.tokens:
            raise ValueError("there is nothing held out: give validation.tokens, such as 100000")
        return self


@dataclass(frozen=True)
class Resolved:
    """A data stage with nothing left out. positions: the context that the network is to state."""

    name: str
    data: DataConfig
    rope_theta: float
    train: OptimizerConfig
    positions: int


class StagedConfig(TrainingConfig):
    """What pre-training and its long-sequence phase have in common."""

    balance: Balance = Field("global", description=_BALANCE)
    data: DataConfig = Field(default_factory=DataConfig, description="what it reads")
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
    validation: HeldOutConfig = Field(
        default_factory=HeldOutConfig, description="held-out text, and what its loss decides"
    )

    @field_serializer("stages", when_used="json")
    def _in_order(self, stages: dict[str, DataStage]) -> list[dict[str, Any]]:
        """As a list, since their order counts, and the keys of a mapping have none in an artifact's
        digest.
        """
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
                    f"{where}the shares of the lengths must sum to 1 and the longest be the "
                    "context; they sum to "
                    f"{sum(lengths.values()):.3g}, and {max(lengths):,} stands beside "
                    f"{stage.data.row:,}"
                )
            if any(not 0 <= share <= 1 for share in stage.data.fill_in_middle.values()):
                raise ValueError(f"{where}a share of fill_in_middle is not between 0 and 1")
        return self

    def resolved(self, start: ModelConfig | None = None) -> list[Resolved]:
        """The data stages, in order.

        start: the checkpoint that training goes on from. It decides the RoPE base and the context
        where nobody asked; rows are then no longer than its context.
        """
        found = []
        theta = self.rope_theta or (start.rope_theta if start else _THETA)
        for name, stage in (self.stages or {"": DataStage(tokens=self.data.tokens)}).items():
            own = {key: value for key, value in stage if value is not None}
            data = self.data.model_copy(
                update={k: v for k, v in own.items() if k in DataConfig.model_fields}
            )
            train = self.train.model_copy(update={k: own[k] for k in _RATE if k in own})
            asked = data.context is not None or bool(data.lengths)
            positions = data.row if asked or start is None else start.max_position_embeddings
            data = data.model_copy(update={"context": min(data.row, positions)})
            found.append(Resolved(name, data, own.get("rope_theta", theta), train, positions))
        return found


@dataclass(frozen=True)
class Stretch:
    """A data stage with its rows, and the step of the run at which it begins."""

    stage: Resolved
    pieces: PackedDataset
    first: int


@dataclass
class StagedTrainer(Trainer[Balanced]):
    """A trainer that enters each data stage at its first step: its RoPE base and context, and its
    learning rate.
    """

    stretches: Sequence[Stretch] = ()

    def at(self, step: int) -> tuple[int, Stretch]:
        """The data stage of a step, with its number from 0."""
        number = max(n for n, stretch in enumerate(self.stretches) if stretch.first <= step)
        return number, self.stretches[number]

    def _step(
        self,
        step: int,
        optimizers: Sequence[torch.optim.Optimizer],
        earlier: Sequence[dict[str, float]],
    ) -> dict[str, float]:
        number, stretch = self.at(step)
        enter(self.model, stretch.stage)
        if len(self.stretches) == 1:
            return super()._step(step, optimizers, earlier)
        if step == stretch.first:
            data = stretch.stage.data
            said = (
                f"{data.tokens:,} tokens, rows of {data.row:,}, RoPE base "
                f"{stretch.stage.rope_theta:,.0f}"
            )
            console.print(f"  data stage {stretch.stage.name}: {said}", markup=False)
        return super()._step(step, optimizers, earlier) | {"data_stage": number + 1.0}

    def _rate(self, step: int) -> float:
        _, stretch = self.at(step)
        return learning_rate(stretch.stage.train, step - stretch.first, stretch.dataset.steps)


def enter(model: Any, stage: Resolved) -> None:
    """Turn a network's queries and keys as a data stage does."""
    model.config = model.model.config = model.config.with_rope(stage.rope_theta, stage.positions)
