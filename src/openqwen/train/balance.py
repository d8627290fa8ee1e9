"""Experts kept in even use: the two load-balancing losses, and what of a router is worth a curve.

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
from openqwen.train.parallel import world_of

Balance = Literal["global", "micro", "off"]


@dataclass(frozen=True)
class Load:
    """Tokens that each expert of each sparse layer received, of how many tokens: a micro-batch, or
    a whole step.

    Loads of the parts of a batch, on whichever rank, add up to the batch's.
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
        """A few numbers of a load.

        dead_experts: share of all layers' experts that got no token. largest_load: the busiest
        expert's tokens over an even share, the worst layer's. load_entropy: entropy of the load
        over that of an even one, mean over layers.
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
    """The reference code's balance of one forward call (transformers' `load_balancing_loss_func`),
    times its tokens.

    All layers' tokens are one pile there: expert 3 of every layer counts as one expert. It is not
    linear in the tokens, so cutting a batch otherwise changes it.
    """
    load = Load.of(routing)
    layers, experts = load.counts_LE.shape
    f_E = load.counts_LE.sum(0) / (layers * load.tokens)
    p_E = torch.stack([p_TE.sum(0) for p_TE in routing.probabilities]).sum(0) / layers
    return Loss(experts * (f_E * p_E).sum(), load.tokens)


def global_balance(routing: Routing, load: Load) -> Loss:
    """The balance under the load of a whole optimizer batch, summed over this call's tokens (Qwen's
    post of 2025-01).

    Layer by layer, and the mean over layers. With the load given it is a sum over tokens: however
    the batch is cut, the sums over its parts are the same, gradient included (law 2).
    """
    layers, experts = load.counts_LE.shape
    f_LE = load.counts_LE / load.tokens
    p_LE = torch.stack([p_TE.sum(0) for p_TE in routing.probabilities])
    return Loss(experts / layers * (f_LE * p_LE).sum(), len(routing.chosen[0]))


@dataclass(frozen=True)
class Balanced:
    """A micro-batch, and the load of the step that it belongs to, where that must be known
    beforehand.
    """

    rows: PackedBatch
    load: Load | None = None


def with_loads(
    model: Qwen2,
    parts: Sequence[PackedBatch],
    balance: Balance,
    precision: Precision = "auto",
) -> list[Balanced]:
    """Micro-batches with the load of all of them together, as the global balance needs it.

    The load depends on the weights, so a step of several micro-batches is read once more without
    gradient, which costs about a third of the step; a step of one finds its load on the way and
    costs nothing.
    """
    if balance != "global" or len(parts) == 1:
        return [Balanced(rows) for rows in parts]
    load = measure_load(model, parts, precision)
    return [Balanced(rows, load) for rows in parts]


@torch.no_grad()
def measure_load(model: Qwen2, parts: Sequence[PackedBatch], precision: Precision = "auto") -> Load:
    """Where the tokens of some micro-batches go, all together; each rank reads its share of them.

    precision: the one that the network trains in, so that each token goes where the step sends it.
    """
    world, loads = world_of(model), []
    for rows, counts in world.local_micro_batches(parts):
        routing = Routing()
        with computing(precision, model.device):
            model(rows.tokens, rows.positions, rows.attention, routing)
        loads.append(Load(Load.of(routing).counts_LE * counts, len(rows.tokens) * counts))
    found = sum(loads[1:], loads[0])
    *counts_N, tokens = world.total([*found.counts_LE.flatten().tolist(), found.tokens])
    whole = torch.tensor(counts_N, dtype=torch.float64).long().view_as(found.counts_LE)
    return Load(whole.to(found.counts_LE.device), round(tokens))


def balanced(
    loss: Callable[[PackedBatch, Routing], Loss],
    micro: Balanced,
    balance: Balance,
    coefficient: float,
) -> Loss:
    """A loss over tokens plus coefficient times the balance, and the router's numbers beside it.

    `loss` makes the one forward call with the routing that it is given, and counts every token, as
    pre-training does.
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
    """What `experts.json` says: the load of each expert, 1 for an even share, a row for each sparse
    layer.
    """
    config = model.config
    even = load.tokens * config.num_experts_per_tok / config.num_experts
    layers = [n for n in range(config.num_hidden_layers) if config.is_sparse(n)]
    rows = [[round(count / even, 4) for count in row] for row in load.counts_LE.tolist()]
    return {"tokens": load.tokens, "layers": layers, "load": rows}
