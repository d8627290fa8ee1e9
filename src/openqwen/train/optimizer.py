"""AdamW (or Muon) with weight decay on matrices alone, and learning rates over time."""

import math
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from openqwen.train.parallel import ParallelConfig
from openqwen.train.recompute import Recompute


class BadStepConfig(BaseModel):
    """What to do with a step whose loss or gradient is not a number, or whose gradient is far above the usual."""

    model_config = ConfigDict(extra="forbid")

    action: Literal["stop", "skip"] = Field("stop", description="stop training, or leave the step out and log it")
    spike: float = Field(
        0.0, ge=0, description="a gradient norm over so many times the median of the last 100 is bad too; 0: never"
    )
    patience: int = Field(10, ge=1, description="skip: so many bad steps in a row stop training after all")


class OptimizerConfig(BaseModel):
    """How weights move. The report gives SFT's decay and clip; the betas are Qwen's (2023)."""

    model_config = ConfigDict(extra="forbid")

    method: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: momentum made orthogonal on the layers' matrices, AdamW on the rest"
    )
    learning_rate: float = Field(7e-6, gt=0, description="peak learning rate")
    final_share: float = Field(0.1, ge=0, le=1, description="share of the peak left at the last step")
    schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        "cosine", description="shape of the fall from the peak; wsd: stays at the peak, then falls linearly"
    )
    decay_share: float = Field(0.2, gt=0, le=1, description="wsd: share of the steps in which the rate falls")
    warmup_share: float = Field(0.05, ge=0, lt=1, description="share of the steps that rise to the peak, linearly")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW: decay of the mean gradient")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW: decay of the mean squared gradient")
    epsilon: float = Field(1e-8, gt=0, description="AdamW: added to the denominator")
    weight_decay: float = Field(0.1, ge=0, description="decoupled decay of matrices; norms and biases are spared")
    clip: float = Field(1.0, gt=0, description="largest global gradient norm")
    bad: BadStepConfig = Field(default_factory=BadStepConfig, description="steps that must not move the weights")
    recompute: Recompute = Field(
        "nothing", description="activations computed again, not kept: cheap ones or whole layers; saves memory alone"
    )
    parallel: ParallelConfig = Field(default_factory=ParallelConfig, description="how the processes divide the work")


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate of step `step` (from 0) of `steps`."""
    warmup = round(config.warmup_share * steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    if config.schedule == "constant":
        fall = 1.0
    elif config.schedule == "linear":
        fall = 1.0 - done
    elif config.schedule == "wsd":  # warm-up, stable, decay (MiniCPM, Hu et al. 2024)
        fall = min(1.0, (steps - step) / max(1.0, config.decay_share * steps))
    else:
        fall = 0.5 * (1.0 + math.cos(math.pi * done))
    return config.learning_rate * (config.final_share + (1.0 - config.final_share) * fall)


def optimizers(model: nn.Module, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """What moves a model's parameters: decayed matrices, undecayed vectors; with Muon, the layers' matrices apart.

    Muon's rate is scaled to move a matrix as far as AdamW would (Liu et al. 2025), so one learning rate serves both.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    by_muon = [p for n, p in named if config.method == "muon" and ".layers." in f".{n}" and p.dim() == 2]
    taken = {id(p) for p in by_muon}
    matrices = [p for _, p in named if p.dim() > 1 and id(p) not in taken]
    vectors = [p for _, p in named if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.epsilon, fused=True
    )
    if not by_muon:
        return [adamw]
    muon = torch.optim.Muon(
        by_muon, lr=config.learning_rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return [adamw, muon]
