"""The two load-balancing losses that keep experts in even use, and metrics of the router.

Both are E · Σ_i f_i p̄_i: f_i, the share of the tokens that chose expert i, carries no gradient;
p̄_i is the mean of its probability. An even load gives k, since the f_i sum to k. Shapes: T tokens,
E experts, k experts of a token, L sparse layers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from openqwen.model import Qwen2, Routing
from openqwen.train.compute import Precision, computing
from openqwen.train.losses import Loss
from openqwen.train.packed_batch import PackedBatch
from openqwen.train.parallel import ALONE, World

Balance = Literal["global", "micro", "off"]


@dataclass(frozen=True)
class Load:
    """How many of `tokens` tokens each expert of each sparse layer received, [L, E].

    Loads of the parts of a batch add up to the load of the batch.
    """

    counts_LE: Tensor
    tokens: int

    @classmethod
    def of(cls, routing: Routing) -> "Load":
        """The load of one forward call."""
        return cls(routing.counts_LE(), len(routing.chosen[0]))

    def __add__(self, other: "Load") -> "Load":
        return Load(self.counts_LE + other.counts_LE, self.tokens + other.tokens)

    def statistics(self) -> dict[str, float]:
        """Metrics of the load.

        dead_experts: share of all experts that got no token. largest_load: tokens of the busiest
        expert over an even share, in the worst layer. load_entropy: entropy of the load over that
        of an even one, mean over layers.
        """
        share_LE = self.counts_LE.double() / self.counts_LE.sum(1, keepdim=True)
        entropy_L = torch.special.entr(share_LE).sum(1)
        experts = share_LE.shape[1]
        return {
            "dead_experts": float((self.counts_LE == 0).double().mean()),
            "largest_load": float(share_LE.max()) * experts,
            "load_entropy": float(entropy_L.mean()) / max(math.log(experts), 1e-9),
        }


def micro_balance(routing: Routing) -> Loss:
    """The balance of one forward call as the reference code has it, times the call's tokens.

    transformers' `load_balancing_loss_func` counts the tokens of all layers together: expert 3 of
    every layer is one expert to it. The loss is not linear in the tokens, so it depends on how a
    batch is cut into micro-batches.
    """
    load = Load.of(routing)
    layers, experts = load.counts_LE.shape
    f_E = load.counts_LE.sum(0) / (layers * load.tokens)
    p_E = torch.stack([p_TE.sum(0) for p_TE in routing.probabilities]).sum(0) / layers
    return Loss(experts * (f_E * p_E).sum(), load.tokens)


def global_balance(routing: Routing, load: Load) -> Loss:
    """The balance under a given load, summed over this call's tokens (Qwen's post of 2025-01).

    It is computed for each layer and averaged over layers. With the load of the whole optimizer
    batch it is linear in the tokens, so loss and gradient do not depend on how the batch is cut.
    """
    layers, experts = load.counts_LE.shape
    f_LE = load.counts_LE / load.tokens
    p_LE = torch.stack([p_TE.sum(0) for p_TE in routing.probabilities])
    return Loss(experts / layers * (f_LE * p_LE).sum(), len(routing.chosen[0]))


@dataclass(frozen=True)
class PretrainBatch:
    """A micro-batch of pre-training, and the load of its step where that must be known before."""

    rows: PackedBatch
    load: Load | None = None


def with_loads(
    model: Qwen2,
    parts: Sequence[PackedBatch],
    balance: Balance,
    precision: Precision = "auto",
    world: World = ALONE,
) -> list[PretrainBatch]:
    """Micro-batches with the load of their whole step, as the global balance needs it.

    The load depends on the weights, so a step of several micro-batches is read once more without a
    gradient, which costs about a third of the step. A step of one micro-batch needs no such pass:
    its loss knows the load.
    """
    if balance != "global" or len(parts) == 1:
        return [PretrainBatch(rows) for rows in parts]
    load = measure_load(model, parts, precision, world)
    return [PretrainBatch(rows, load) for rows in parts]


@torch.no_grad()
def measure_load(
    model: Qwen2,
    parts: Sequence[PackedBatch],
    precision: Precision = "auto",
    world: World = ALONE,
) -> Load:
    """The load of all tokens of some micro-batches; each rank reads its share of them.

    precision: that of training, so that each token takes the experts that it takes in the step.
    """
    loads = []
    for rows, counts in world.local_micro_batches(parts):
        routing = Routing()
        with computing(precision, model.device):
            model(rows.tokens, rows.positions, rows.attention, routing)
        loads.append(Load(Load.of(routing).counts_LE * counts, len(rows.tokens) * counts))
    local = sum(loads[1:], loads[0])
    *summed, tokens = world.total([*local.counts_LE.flatten().tolist(), local.tokens])
    counts_LE = torch.tensor(summed, dtype=torch.float64).long().view_as(local.counts_LE)
    return Load(counts_LE.to(local.counts_LE.device), round(tokens))


def with_balance(
    loss: Callable[[PackedBatch, Routing], Loss],
    micro: PretrainBatch,
    balance: Balance,
    coefficient: float,
) -> Loss:
    """A loss over tokens plus `coefficient` times the balance, with metrics of the router.

    loss: makes one forward call that fills the given routing, and counts every token as a target.
    """
    routing = Routing()
    plain = loss(micro.rows, routing)
    load = micro.load or Load.of(routing)
    share = micro_balance(routing) if balance == "micro" else global_balance(routing, load)
    if plain.count != share.count:
        raise ValueError(
            f"the balance is a mean over all {share.count} tokens, this loss one over {plain.count}"
        )
    total = plain.sum + coefficient * share.sum if balance != "off" else plain.sum
    chosen = sum(
        float(p.detach().gather(1, c).sum()) for p, c in zip(routing.probabilities, routing.chosen)
    )
    extras = {
        "next_token_loss": float(plain.sum.detach()),
        "balance": float(share.sum.detach()),
        "chosen_weight": chosen / len(routing.chosen),
        **{name: value * plain.count for name, value in load.statistics().items()},
    }
    return replace(plain, sum=total, extras=plain.extras | extras)


def load_record(model: Qwen2, load: Load) -> dict[str, Any]:
    """The content of `experts.json`: loads over an even share, a row for each sparse layer."""
    config = model.config
    even = load.tokens * config.num_experts_per_tok / config.num_experts
    layers = [n for n in range(config.num_hidden_layers) if config.is_sparse(n)]
    rows = [[round(count / even, 4) for count in row] for row in load.counts_LE.tolist()]
    return {"tokens": load.tokens, "layers": layers, "load": rows}
