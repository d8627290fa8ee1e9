"""Upcycling: a dense network becomes a mixture of fine-grained experts (Qwen2 report, 2.2.2).

Published: the feed-forward network is copied as often as needed. Each copy is shuffled along its
intermediate dimension. Experts are cut from the copies, and the rest is discarded. Then half of
each expert's parameters are drawn again.

Not published, and chosen here:

- The copies form one strip, so an expert may lie in two copies: otherwise 9 copies of 18,944
  channels would not give 64 experts of 2,560. A copy has one permutation for gate rows, up rows and
  down columns, so a channel stays complete.
- Complete channels of an expert are drawn again, the same ones in its three matrices, from a normal
  distribution with the mean and deviation of the expert's weights in that matrix (as in
  Drop-Upcycling, Nakamura et al. 2025). The router is drawn from N(0, initializer_range).
- The shared expert is cut from copies of its own, so it has every channel if it is wide enough.
  None of it is drawn again. Its gate starts at zero, which is σ = 1/2.
- `keep_output` scales the shared expert's down projection so that it alone gives the output of the
  dense network (`_shared`). Otherwise the shared expert gives half of it, and the routed experts
  next to nothing, since their weights are small and not renormalised. With it, training continues
  at the dense network's loss (benchmarks/upcycle.py).

Attention, norms, embeddings and head are copied. Shapes: E experts, D width, I width of an expert,
F of the dense network, S channels of a strip.
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

_PUBLISHED_SHARE = 2_560 / 18_944  # width of the 57B-A14B's experts / of the 7B's network


@dataclass(frozen=True)
class Upcycling:
    """Number, width and initialisation of the experts.

    Args:
        experts: routed experts of a layer.
        experts_per_token: routed experts that a token passes.
        expert_width: of a routed expert; None: in the proportion of the 57B-A14B.
        shared_width: of the shared expert; None: in the proportion of the 57B-A14B.
        reinit: share of each routed expert's channels that are drawn again.
        keep_output: the shared expert alone gives the output of the dense network.
        vocabulary_rows: embedding rows to keep, None for all. The others must be padding: the 7B
            has 152,064 rows, the 57B-A14B made from it 151,936.
    """

    experts: int = 64
    experts_per_token: int = 8
    expert_width: int | None = None
    shared_width: int | None = None
    reinit: float = 0.5
    keep_output: bool = True
    vocabulary_rows: int | None = None


def default_width(dense: int) -> int:
    """Width of a routed expert: 2,560 for 18,944, else in proportion, a multiple of 16."""
    return max(1, round(dense * _PUBLISHED_SHARE / 16)) * 16


def default_shared_width(dense: int) -> int:
    """Width of the shared expert: eight routed experts' (20,480), at least the dense network's."""
    return max(8 * default_width(dense), dense)


def upcycled_config(dense: ModelConfig, plan: Upcycling) -> ModelConfig:
    """The configuration of the mixture: the dense network's with the fields of the plan."""
    if dense.num_experts:
        what = "This network has experts already."
        raise OpenQwenError(what, where="num_experts", do="start from a dense one")
    width = plan.expert_width or default_width(dense.intermediate_size)
    rows = plan.vocabulary_rows or dense.vocab_size
    if rows > dense.vocab_size:
        raise OpenQwenError(
            f"The dense network has {dense.vocab_size} embedding rows, not {rows}.",
            where="vocabulary_rows",
            do="leave it out to keep all rows",
        )
    if not 0 <= plan.reinit <= 1:
        raise OpenQwenError(f"reinit is {plan.reinit}, not from 0 to 1.", where="reinit")
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
    """Make a mixture of experts from a dense network, with the same dtype and device.

    The dense network is not changed. Random draws use the generators `upcycle.permutations`,
    `upcycle.weights` and `upcycle.router` of this seed.
    """
    config = upcycled_config(dense.config, plan)
    generators = Generators(seed)
    names = ("permutations", "weights", "router")
    draws = {name: generators.torch(f"upcycle.{name}") for name in names}
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
    """The dense channel at each of `width` places, [S]: shuffled copies end to end, cut off."""
    count = -(-width // dense_width)
    copies = [torch.randperm(dense_width, generator=generator) for _ in range(count)]
    return torch.cat(copies)[:width]


def redraw(parts: Sequence[Tensor], share: float, generator: torch.Generator) -> None:
    """Draw a share of each expert's channels again, in place, the same ones in all parts.

    parts: [E, I, D] each. The draws are normal, with the mean and deviation of the expert's part
    before.
    """
    experts, width, _ = parts[0].shape
    for e in range(experts):
        channels = torch.randperm(width, generator=generator)[: round(share * width)]
        for part_EID in parts:
            old_ID = part_EID[e].float()
            new = torch.randn(len(channels), old_ID.shape[1], generator=generator).to(old_ID.device)
            new = new * old_ID.std() + old_ID.mean()
            part_EID[e, channels.to(old_ID.device)] = new.to(part_EID.dtype)


def _mixture(
    dense: FeedForward, config: ModelConfig, plan: Upcycling, draws: dict[str, torch.Generator]
) -> dict[str, Tensor]:
    """The tensors of one sparse layer, by their names after `mlp.`."""
    experts, width = config.num_experts, config.moe_intermediate_size
    weight = dense.down_proj.weight
    places_S = strip(config.intermediate_size, experts * width, draws["permutations"])
    places_S = places_S.to(weight.device)
    gate_EID = dense.gate_proj.weight[places_S].unflatten(0, (experts, width))
    up_EID = dense.up_proj.weight[places_S].unflatten(0, (experts, width))
    down_EDI = weight[:, places_S].unflatten(1, (experts, width)).transpose(0, 1).contiguous()
    redraw([gate_EID, up_EID, down_EDI.transpose(1, 2)], plan.reinit, draws["weights"])
    router_ED = torch.randn(experts, config.hidden_size, generator=draws["router"])
    router_ED *= config.initializer_range
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
    """The tensors of the shared expert.

    keep_output: a channel that occurs c times is scaled by 2/c, so that the shared expert with its
    gate at 1/2 is the dense network. If the shared expert is narrower, the scale is larger, so that
    the mean over permutations is the dense network's output.
    """
    dense_width, width = config.intermediate_size, config.shared_expert_intermediate_size
    places_S = strip(dense_width, width, generator).to(dense.down_proj.weight.device)
    down_DS = dense.down_proj.weight[:, places_S]
    if keep_output:
        copies_S = torch.bincount(places_S, minlength=dense_width)[places_S]
        scale_S = 2 * max(1.0, dense_width / width) / copies_S.double()
        down_DS = down_DS * scale_S.to(down_DS.dtype)
    return {
        "shared_expert.gate_proj.weight": dense.gate_proj.weight[places_S],
        "shared_expert.up_proj.weight": dense.up_proj.weight[places_S],
        "shared_expert.down_proj.weight": down_DS,
    }
