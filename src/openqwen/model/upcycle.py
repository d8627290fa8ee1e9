"""Upcycling: a dense network becomes a mixture of fine-grained experts (Qwen2 report, 2.2.2).

Published: the feed-forward network is copied often enough, each copy is shuffled along its
intermediate dimension, experts are cut from the copies and the rest is discarded; then half of each
expert's parameters are drawn anew.

Not published, and chosen here:

- The copies are one strip, so an expert may straddle two of them: 9 copies of 18,944 channels give
64 experts of 2,560
  only so. One permutation a copy, shared by gate rows, up rows and down columns: a channel stays
  whole.
- What is drawn anew is whole channels of an expert, the same in its three matrices, from N(mean,
deviation) of that
  expert's weights in that matrix (after Drop-Upcycling, Nakamura et al. 2025). The router ~ N(0,
  initializer_range).
- The shared expert is cut likewise, from copies of its own, so that it holds every channel where it
is wide enough.
  None of it is drawn anew, and its gate starts at zero: σ = 1/2.
- `keep_output` scales the shared expert's down projection so that it alone gives the parent's
output (`_shared`). Left
  as they are, the shared expert gives half of it, and the routed ones next to nothing: small
  weights, not renormalised, of slices a seventh as wide. With it, training goes on from the
  parent's loss (benchmarks/upcycle.py).

Attention, norms, embeddings and head are taken over. Shapes: E experts, D width, I width of an
expert, F of the dense network, S channels of a strip.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from openqwen.model.config import ModelConfig
from openqwen.model.decoder import Qwen2
from openqwen.model.feed_forward import FeedForward
from openqwen.support.errors import OpenQwenError
from openqwen.support.generators import Generators

_PUBLISHED_SHARE = 2_560 / 18_944  # an expert of the 57B-A14B, of the 7B's feed-forward network


@dataclass(frozen=True)
class Upcycling:
    """How many experts, how wide, and how they start; a width of None follows the 57B-A14B's
    proportions.

    reinit: share of each routed expert's channels drawn anew. vocabulary_rows: embedding rows to
    keep, or None for all; the rest must be padding (the 7B has 152,064 rows, the 57B-A14B grown
    from it 151,936).
    """

    experts: int = 64
    experts_per_token: int = 8
    expert_width: int | None = None
    shared_width: int | None = None
    reinit: float = 0.5
    keep_output: bool = True
    vocabulary_rows: int | None = None


def default_width(dense: int) -> int:
    """Width of an expert: 2,560 for 18,944, else in proportion, a multiple of 16."""
    return max(1, round(dense * _PUBLISHED_SHARE / 16)) * 16


def default_shared_width(dense: int) -> int:
    """Width of the shared expert: eight experts' (20,480 for 18,944), and never less than the dense
    network's.
    """
    return max(8 * default_width(dense), dense)


def upcycled_config(dense: ModelConfig, plan: Upcycling) -> ModelConfig:
    """The mixture's configuration; what the plan does not name is the dense network's."""
    if dense.num_experts:
        raise OpenQwenError(
            "This network has experts already.", where="num_experts", do="start from a dense one"
        )
    width = plan.expert_width or default_width(dense.intermediate_size)
    rows = plan.vocabulary_rows or dense.vocab_size
    if rows > dense.vocab_size:
        raise OpenQwenError(
            f"The dense network has {dense.vocab_size} embedding rows, not {rows}.",
            where="vocabulary_rows",
            do="leave it out to keep all rows",
        )
    if not 0 <= plan.reinit <= 1:
        raise OpenQwenError(f"A share of {plan.reinit} cannot be drawn anew.", where="reinit")
    return replace(
        dense,
        vocab_size=rows,
        num_experts=plan.experts,
        num_experts_per_tok=plan.experts_per_token,
        moe_intermediate_size=width,
        shared_expert_intermediate_size=plan.shared_width
        or default_shared_width(dense.intermediate_size),
    )


@torch.no_grad()
def upcycle(dense: Qwen2, plan: Upcycling, seed: int) -> Qwen2:
    """A mixture of experts grown from a dense network, which is left alone; in the same precision,
    on the same device.

    Random draws: the generators `upcycle.permutations`, `upcycle.weights` and `upcycle.router`, of
    this seed.
    """
    config = upcycled_config(dense.config, plan)
    generators = Generators(seed)
    draws = {
        name: generators.torch(f"upcycle.{name}") for name in ("permutations", "weights", "router")
    }
    tensors = {name: t.clone() for name, t in dense.state_dict().items() if ".mlp." not in name}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            tensors[name] = tensors[name][: config.vocab_size].clone()
    for number, layer in enumerate(dense.model.layers):
        for name, tensor in _mixture(cast(FeedForward, layer.mlp), config, plan, draws).items():
            tensors[f"model.layers.{number}.mlp.{name}"] = tensor
    with torch.device("meta"):
        model = Qwen2(config)
    model.load_state_dict(tensors, assign=True)
    return model


def strip(dense_width: int, width: int, generator: torch.Generator) -> Tensor:
    """Which dense channel stands at each of `width` places: shuffled copies end to end, the rest
    cut off. [S]
    """
    copies = -(-width // dense_width)
    return torch.cat([torch.randperm(dense_width, generator=generator) for _ in range(copies)])[
        :width
    ]


def redraw(parts: Sequence[Tensor], share: float, generator: torch.Generator) -> None:
    """Draw a share of each expert's channels anew, in place, the same ones in all parts.

    parts: [E, I, D] each. What is drawn is normal, with the mean and deviation of that expert's
    part as it was.
    """
    experts, width, _ = parts[0].shape
    for e in range(experts):
        channels = torch.randperm(width, generator=generator)[: round(share * width)]
        for part_EID in parts:
            old_ID = part_EID[e].float()
            new = torch.randn(len(channels), old_ID.shape[1], generator=generator).to(old_ID.device)
            part_EID[e, channels.to(old_ID.device)] = (new * old_ID.std() + old_ID.mean()).to(
                part_EID.dtype
            )


def _mixture(
    dense: FeedForward, config: ModelConfig, plan: Upcycling, draws: dict[str, torch.Generator]
) -> dict[str, Tensor]:
    """The tensors of one sparse layer, by their names under `mlp.`."""
    experts, width, weight = (
        config.num_experts,
        config.moe_intermediate_size,
        dense.down_proj.weight,
    )
    places_S = strip(config.intermediate_size, experts * width, draws["permutations"]).to(
        weight.device
    )
    gate_EID = dense.gate_proj.weight[places_S].unflatten(0, (experts, width))
    up_EID = dense.up_proj.weight[places_S].unflatten(0, (experts, width))
    down_EDI = weight[:, places_S].unflatten(1, (experts, width)).transpose(0, 1).contiguous()
    redraw([gate_EID, up_EID, down_EDI.transpose(1, 2)], plan.reinit, draws["weights"])
    router_ED = (
        torch.randn(experts, config.hidden_size, generator=draws["router"])
        * config.initializer_range
    )
    return {
        "gate.weight": router_ED.to(weight),
        "experts.gate_up_proj": torch.cat([gate_EID, up_EID], dim=1),
        "experts.down_proj": down_EDI,
        "shared_expert_gate.weight": weight.new_zeros(1, config.hidden_size),
        **_shared(dense, config, plan.keep_output, draws["permutations"]),
    }


def _shared(
    dense: FeedForward, config: ModelConfig, keep_output: bool, generator: torch.Generator
) -> dict[str, Tensor]:
    """The shared expert.

    keep_output: a channel that stands in it c times is scaled by 2/c, so that with its gate at 1/2
    the shared expert is the dense network; where it is too narrow for that, by what keeps the
    expected output over permutations.
    """
    dense_width, width = config.intermediate_size, config.shared_expert_intermediate_size
    places_S = strip(dense_width, width, generator).to(dense.down_proj.weight.device)
    down_DS = dense.down_proj.weight[:, places_S]
    if keep_output:
        copies_S = torch.bincount(places_S, minlength=dense_width)[places_S]
        down_DS = down_DS * (2 * max(1.0, dense_width / width) / copies_S.double()).to(
            down_DS.dtype
        )
    return {
        "shared_expert.gate_proj.weight": dense.gate_proj.weight[places_S],
        "shared_expert.up_proj.weight": dense.up_proj.weight[places_S],
        "shared_expert.down_proj.weight": down_DS,
    }
