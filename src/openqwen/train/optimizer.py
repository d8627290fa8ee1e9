"""AdamW (in 8 bits too, or Muon) with weight decay on matrices alone, and learning rates over
time.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from openqwen.support.settings import Settings
from openqwen.train.compute import Precision
from openqwen.train.eight_bit import adamw8bit, in_blocks
from openqwen.train.parallel import ParallelConfig, full_tensor, local_shard
from openqwen.train.recompute import Recompute
from openqwen.train.track import Tracker


class BadStepConfig(Settings):
    """What to do with a step whose loss or gradient is not a number, or whose gradient is far above
    the usual.
    """

    action: Literal["stop", "skip"] = Field(
        "stop", description="stop training, or leave the step out and log it"
    )
    spike: float = Field(
        0.0,
        ge=0,
        description=(
            "a gradient norm over so many times the median of the last 100 is bad too; 0: never"
        ),
    )
    patience: int = Field(
        10, ge=1, description="skip: so many bad steps in a row stop training after all"
    )


class OptimizerConfig(Settings):
    """How weights move. The report gives SFT's decay and clip; the betas are Qwen's (2023)."""

    method: Literal["adamw", "adamw8bit", "muon"] = Field(
        "adamw",
        description="adamw8bit: moments of matrices in 8 bits (torchao); "
        "muon: momentum made orthogonal on the layers' matrices, AdamW on the rest",
    )
    learning_rate: float = Field(7e-6, gt=0, description="peak learning rate")
    final_share: float = Field(
        0.1, ge=0, le=1, description="share of the peak left at the last step"
    )
    schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        "cosine",
        description="shape of the fall from the peak; wsd: stays at the peak, then falls linearly",
    )
    decay_share: float = Field(
        0.2, gt=0, le=1, description="wsd: share of the steps in which the rate falls"
    )
    warmup_share: float = Field(
        0.05, ge=0, lt=1, description="share of the steps that rise to the peak, linearly"
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW: decay of the mean gradient")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW: decay of the mean squared gradient")
    epsilon: float = Field(1e-8, gt=0, description="AdamW: added to the denominator")
    weight_decay: float = Field(
        0.1, ge=0, description="decoupled decay of matrices; norms and biases are spared"
    )
    clip: float = Field(1.0, gt=0, description="largest global gradient norm")
    bad: BadStepConfig = Field(
        default_factory=BadStepConfig, description="steps that must not move the weights"
    )
    recompute: Recompute = Field(
        "nothing",
        description=(
            "activations computed again, not kept: cheap ones or whole layers; saves memory alone"
        ),
    )
    precision: Precision = Field(
        "auto",
        description=(
            "of matrix products; weights and losses are float32. auto: bfloat16 on a GPU, else "
            "float32"
        ),
    )
    compile: bool = Field(False, description="compile the layers with torch.compile")
    parallel: ParallelConfig = Field(
        default_factory=ParallelConfig, description="how the processes divide the work"
    )
    track: list[Tracker] = Field(
        default_factory=list, description="where the curves go, beside metrics.jsonl"
    )


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate of step `step` (from 0) of `steps`.

    The step behind the warm-up has the peak, the last step the final share (SFT in the Qwen2
    report: 7e-6 to 7e-7). A schedule of transformers over `steps` would end one step later.
    """
    warmup, last = round(config.warmup_share * steps), steps - 1
    if step <= warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / (last - warmup)
    if config.schedule == "constant":
        fall = 1.0
    elif config.schedule == "linear":
        fall = 1.0 - done
    elif config.schedule == "wsd":  # warm-up, stable, decay (MiniCPM, Hu et al. 2024)
        fall = min(1.0, (last - step) / min(config.decay_share * last, last - warmup))
    else:
        fall = 0.5 * (1.0 + math.cos(math.pi * done))
    return config.learning_rate * (config.final_share + (1.0 - config.final_share) * fall)


def build_optimizers(model: nn.Module, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """What moves a model's parameters: decayed matrices, undecayed vectors; in 8 bits or by Muon,
    its matrices apart.

    Muon's rate is scaled to move a matrix as far as AdamW would (Liu et al. 2025), so one learning
    rate serves both. An embedding table that is no output matrix too and is not sharded goes to
    `TableAdamW`, where not in 8 bits.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    by_muon = [p for n, p in named if config.method == "muon" and _is_hidden(n, p)]
    small = [p for _, p in named if config.method == "adamw8bit" and in_blocks(p)]
    embeddings = [
        m for m in model.modules() if isinstance(m, nn.Embedding) and config.method != "adamw8bit"
    ]
    tables = [m.weight for m in embeddings if _is_table(m, model)]
    taken = {id(p) for p in by_muon + small + tables}
    matrices = [p for _, p in named if p.dim() > 1 and id(p) not in taken]
    vectors = [p for _, p in named if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.beta1, config.beta2),
        "eps": config.epsilon,
    }
    found: list[torch.optim.Optimizer] = []
    if matrices or vectors:
        found.append(torch.optim.AdamW(groups, **settings, fused=True))
    if tables:
        found.append(TableAdamW(tables, settings | {"weight_decay": config.weight_decay}))
    if small:
        found.append(
            adamw8bit([{"params": small, "weight_decay": config.weight_decay}], **settings)
        )
    if by_muon:
        rate, decay = config.learning_rate, config.weight_decay
        found.append(Muon(by_muon, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    return found


def _is_hidden(name: str, parameter: Tensor) -> bool:
    """Whether Muon moves it: a matrix of a layer that is no router and no gate."""
    routes = ".mlp.gate." in name or ".shared_expert_gate." in name
    return ".layers." in f".{name}" and parameter.dim() == 2 and not routes


def _is_table(embedding: nn.Embedding, model: nn.Module) -> bool:
    """Whether a table learns, is whole here, and is only ever looked up in, so that its gradient
    can be sparse.
    """
    tied = getattr(model, "lm_head", embedding) is None
    weight = embedding.weight
    embedding.sparse = weight.requires_grad and not tied and not isinstance(weight, DTensor)
    return embedding.sparse


class Muon(torch.optim.Muon):
    """PyTorch's Muon, for sharded matrices too: each rank takes its part of the whole update.

    PyTorch's own computes on shards. That fails for matrices of fewer rows than ranks, and on
    meshes of two dimensions.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move the matrices that have a gradient. Every rank must call it, as it gathers."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    self._move(matrix, matrix.grad, group)

    def _move(self, matrix: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        mean = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        update = full_tensor(gradient.lerp(mean, group["momentum"]))
        change = nn.Parameter(torch.zeros_like(update))
        change.grad = update
        plain = {"weight_decay": 0.0, "momentum": 0.0, "adjust_lr_fn": group["adjust_lr_fn"]}
        torch.optim.Muon([change], lr=group["lr"], **plain).step()
        local = matrix.to_local() if isinstance(matrix, DTensor) else matrix
        local.mul_(1 - group["lr"] * group["weight_decay"])
        local.add_(local_shard(change, matrix))


class TableAdamW(torch.optim.Optimizer):
    """AdamW on tables with sparse gradients, to the bit that of `torch.optim.AdamW(fused=True)` on
    dense ones.

    A row's moments are zero until it is looked up for the first time, so they are kept for rows
    seen so far alone: `rows` [R] says whose the first R of `exp_avg` and `exp_avg_sq` are; the rest
    is room. Of the other rows only the decay is left. Fine-tuning with a vocabulary of 150,000
    looks up few of them.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move the tables; nothing that has no gradient."""
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is not None:
                    self._move(table, group)

    def _move(self, table_VD: Tensor, group: dict[str, Any]) -> None:
        gradient = table_VD.grad.coalesce()  # type: ignore[union-attr]
        state = self.state[table_VD]
        if "step" not in state:
            state["step"] = torch.zeros((), device=table_VD.device)
            state["exp_avg"], state["exp_avg_sq"] = table_VD.new_zeros(2, 0, table_VD.shape[1])
            state["rows"] = torch.empty(0, dtype=torch.long, device=table_VD.device)
        elif "rows" not in state:  # saved by a run that kept all of it
            state["rows"] = torch.arange(len(table_VD), device=table_VD.device)
        slot_V = torch.full((len(table_VD),), -1, device=table_VD.device)
        looked_up = gradient.indices()[0]
        slot_V[state["rows"]] = torch.arange(len(state["rows"]), device=table_VD.device)
        state["rows"] = torch.cat([state["rows"], looked_up[slot_V[looked_up] < 0]])
        rows = state["rows"]
        slot_V[rows] = torch.arange(len(rows), device=table_VD.device)
        for key in ("exp_avg", "exp_avg_sq"):
            if len(rows) > len(state[key]):
                room = state[key].new_zeros(len(rows) * 3 // 2 - len(state[key]), table_VD.shape[1])
                state[key] = torch.cat([state[key], room])
        grad_RD = table_VD.new_zeros(len(rows), table_VD.shape[1])
        grad_RD[slot_V[looked_up]] = gradient.values()
        moved_RD = table_VD[rows]
        state["step"] += 1
        torch._fused_adamw_(
            [moved_RD],
            [grad_RD],
            [state["exp_avg"][: len(rows)]],
            [state["exp_avg_sq"][: len(rows)]],
            [],
            [state["step"]],
            amsgrad=False,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        table_VD.mul_(1.0 - group["lr"] * group["weight_decay"])
        table_VD[rows] = moved_RD
