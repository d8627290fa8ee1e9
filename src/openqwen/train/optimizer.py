"""The optimizers (AdamW, AdamW in 8 bits, Muon) and the learning rate schedules."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from openqwen.support.errors import OpenQwenError
from openqwen.support.settings import Settings
from openqwen.train.compute import Precision
from openqwen.train.eight_bit import adamw8bit, in_blocks
from openqwen.train.merging.settings import MergingConfig, online_merging
from openqwen.train.parallel import ParallelConfig, full_tensor, local_shard
from openqwen.train.recompute import Recompute
from openqwen.train.track import Tracker


class BadStepConfig(Settings):
    """What to do with a step whose loss or gradient is not finite, or whose gradient is a spike."""

    action: Literal["stop", "skip"] = Field("stop", description="stop training, or skip the step")
    spike: float = Field(
        0.0,
        ge=0,
        description="a gradient norm over this many times the median of the last 100 is bad too; "
        "0: never",
    )
    patience: int = Field(10, ge=1, description="skip: bad steps in a row that stop training")


class OptimizerConfig(Settings):
    """The optimizer. The report gives SFT's weight decay and clip; the betas are Qwen's (2023)."""

    method: Literal["adamw", "adamw8bit", "muon"] = Field(
        "adamw",
        description="adamw8bit: moments of matrices in 8 bits (torchao); "
        "muon: Muon on the layers' matrices, AdamW on the rest",
    )
    learning_rate: float = Field(7e-6, gt=0, description="peak learning rate")
    final_share: float = Field(0.1, ge=0, le=1, description="last learning rate over the peak")
    schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        "cosine", description="how the rate falls from the peak; wsd: constant, then a linear decay"
    )
    decay_share: float = Field(0.2, gt=0, le=1, description="wsd: share of steps that decay")
    warmup_share: float = Field(
        0.05, ge=0, lt=1, description="share of steps that rise to the peak"
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW: decay of the mean gradient")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW: decay of the mean squared gradient")
    vector_rate: float = Field(
        1.0,
        gt=0,
        description="learning rate of vectors (norm weights, biases), as a factor; each of their"
        " few numbers changes all logits",
    )
    epsilon: float = Field(1e-8, gt=0, description="AdamW: added to the denominator")
    weight_decay: float = Field(0.1, ge=0, description="decoupled decay, of matrices only")
    clip: float = Field(1.0, gt=0, description="largest global gradient norm")
    merging: MergingConfig = Field(
        default_factory=MergingConfig,
        description="merge each step with the task vector (Online Merging Optimizer)",
    )
    bad: BadStepConfig = Field(
        default_factory=BadStepConfig, description="steps that must not change the weights"
    )
    recompute: Recompute = Field(
        "nothing", description="activations to compute again, to save memory"
    )
    precision: Precision = Field(
        "auto",
        description="of matrix products; weights and losses are float32. auto: bfloat16 on a GPU, "
        "else float32",
    )
    compile: bool = Field(False, description="compile the layers with torch.compile")
    parallel: ParallelConfig = Field(
        default_factory=ParallelConfig, description="how processes divide the work"
    )
    track: list[Tracker] = Field(default_factory=list, description="where metrics go as well")

    @model_serializer(mode="wrap")
    def _without_defaults(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A run without these keeps the key, and so the states, of versions without them.
        values = dump(self)
        if self.merging.base is None:
            values.pop("merging", None)
        if self.vector_rate == 1:
            values.pop("vector_rate", None)
        return values


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate of step `step` (from 0) of `steps`.

    The first step after the warm-up has the peak, the last step the final share of it (SFT in the
    Qwen2 report: 7e-6 to 7e-7). A schedule of transformers over `steps` ends one step later.
    """
    warmup, last = round(config.warmup_share * steps), steps - 1
    if step <= warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / (last - warmup)
    if config.schedule == "constant":
        factor = 1.0
    elif config.schedule == "linear":
        factor = 1.0 - done
    elif config.schedule == "wsd":  # warm-up, stable, decay (MiniCPM, Hu et al. 2024)
        factor = min(1.0, (last - step) / min(config.decay_share * last, last - warmup))
    else:
        factor = 0.5 * (1.0 + math.cos(math.pi * done))
    return config.learning_rate * (config.final_share + (1.0 - config.final_share) * factor)


def build_optimizers(
    model: nn.Module, config: OptimizerConfig, **merging: Any
) -> list[torch.optim.Optimizer]:
    """The optimizers that together update all parameters of a model that learn.

    AdamW decays matrices and not vectors. In 8 bits, or by Muon, an optimizer of its own takes the
    matrices that it can. Muon's learning rate is scaled to change a matrix as much as AdamW would
    (Liu et al. 2025), so both use the same one. With a base to merge with, AdamW is the Online
    Merging Optimizer, and the weights must be those that training starts from. merging: further
    arguments of `online_merging`.
    """
    rate, decay = config.learning_rate, config.weight_decay
    adamw: dict[str, Any] = {
        "lr": rate,
        "betas": (config.beta1, config.beta2),
        "eps": config.epsilon,
    }
    if config.merging.base is not None:
        return [_merging(model, config, adamw | merging)]
    in_muon, in_8bit, matrices, vectors = (list[nn.Parameter]() for _ in range(4))
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if config.method == "muon" and _is_hidden(name, parameter):
            in_muon.append(parameter)
        elif config.method == "adamw8bit" and in_blocks(parameter):
            in_8bit.append(parameter)
        elif parameter.dim() > 1:
            matrices.append(parameter)
        else:
            vectors.append(parameter)
    optimizers: list[torch.optim.Optimizer] = []
    if matrices or vectors:
        decayed = {"params": matrices, "weight_decay": decay}
        groups = [decayed, {"params": vectors, "weight_decay": 0.0}]
        optimizers.append(torch.optim.AdamW(groups, **adamw, fused=True))
    if in_8bit:
        optimizers.append(adamw8bit([{"params": in_8bit, "weight_decay": decay}], **adamw))
    if in_muon:
        muon = Muon(in_muon, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        optimizers.append(muon)
    return optimizers


def make_moments(optimizer: torch.optim.Optimizer) -> None:
    """Make AdamW's moments that are not there yet, as its first step would.

    Among that step's tensors they would leave holes in memory that no later step fills: 1 GiB for
    0.6 billion weights.
    """
    if type(optimizer) is not torch.optim.AdamW:
        return
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        if not optimizer.state[parameter]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def _merging(
    model: nn.Module, config: OptimizerConfig, settings: dict[str, Any]
) -> torch.optim.Optimizer:
    if config.method != "adamw":
        raise OpenQwenError(
            f"Merging is around AdamW, not {config.method}.",
            where="train.merging.base",
            do="set train.method to adamw",
        )
    named = [pair for pair in model.named_parameters() if pair[1].requires_grad]
    matrices = [pair for pair in named if pair[1].dim() > 1]
    vectors = [pair for pair in named if pair[1].dim() <= 1]
    decays = ((matrices, config.weight_decay), (vectors, 0.0))
    groups = [{"params": pairs, "weight_decay": decay} for pairs, decay in decays if pairs]
    return online_merging(model, groups, config.merging, **{"seed": 0, **settings})


def _is_hidden(name: str, parameter: Tensor) -> bool:
    """Whether Muon updates it: a matrix of a layer, but not of a router or a gate."""
    routes = ".mlp.gate." in name or ".shared_expert_gate." in name
    return ".layers." in f".{name}" and parameter.dim() == 2 and not routes


class Muon(torch.optim.Muon):
    """PyTorch's Muon, for sharded matrices too: each rank applies its shard of the full update.

    PyTorch's own step computes on shards, which fails for matrices of fewer rows than ranks and on
    meshes of two dimensions.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the matrices that have a gradient; every rank must call it."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    self._update(matrix, matrix.grad, group)

    def _update(self, matrix: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        mean = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        full_gradient = full_tensor(gradient.lerp(mean, group["momentum"]))
        # A step from zero without decay and momentum gives the orthogonal update itself.
        change = nn.Parameter(torch.zeros_like(full_gradient))
        change.grad = full_gradient
        plain = {"weight_decay": 0.0, "momentum": 0.0, "adjust_lr_fn": group["adjust_lr_fn"]}
        torch.optim.Muon([change], lr=group["lr"], **plain).step()
        local = matrix.to_local() if isinstance(matrix, DTensor) else matrix
        local.mul_(1 - group["lr"] * group["weight_decay"])
        local.add_(local_shard(change, matrix))
