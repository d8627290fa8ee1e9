"""Speed of the experts beside other implementations.

    python benchmarks/experts.py [--full]

Four ways to compute the same routed output of one layer with 60 experts, 4 of them active, medians
of alternating runs:

    ours              sorted by expert, gradient written out (openqwen.model.experts)
    published loop    the block of transformers 4.45 as published: for each of the 60 experts, find its tokens in a
                      one-hot mask, gather them, run three linear layers, add the answers into place
    dense mask        every expert reads every token, and the mask sets what was not chosen to zero
    transformers      the installed version's own default (fused tensors, loop over the experts that are hit)

The dense mask does E/k = 15 times the arithmetic; the published loop does the same arithmetic as
ours, so on a CPU, where arithmetic is what takes time, it can only lose what it wastes around the
matrix products.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openqwen.model.experts import Experts

EXPERTS, ACTIVE = 60, 4


class Separate(nn.Module):
    """The same experts as separate modules, for the loops that expect them so."""

    def __init__(self, experts: Experts):
        super().__init__()
        gate_up, down = experts.gate_up_proj.detach(), experts.down_proj.detach()
        self.parts = nn.ParameterList()
        for e in range(len(down)):
            gate, up = gate_up[e].chunk(2)
            self.parts.extend(nn.Parameter(w.clone()) for w in (gate, up, down[e]))

    def expert(self, e: int, x: Tensor) -> Tensor:
        """SwiGLU number e."""
        gate, up, down = self.parts[3 * e : 3 * e + 3]
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def published_loop(model: Separate, x_TD: Tensor, chosen_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
    """Gather the tokens of each expert by a one-hot mask, and add its outputs into place."""
    out_TD = torch.zeros_like(x_TD)
    mask_EkT = F.one_hot(chosen_Tk, num_classes=EXPERTS).permute(2, 1, 0)
    for e in range(EXPERTS):
        slot, token = torch.where(mask_EkT[e])
        answer = (
            model.expert(e, x_TD[None, token].reshape(-1, x_TD.shape[1]))
            * weights_Tk[token, slot, None]
        )
        out_TD.index_add_(0, token, answer)
    return out_TD


def dense_mask(model: Separate, x_TD: Tensor, chosen_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
    """Every expert on every token, weighted by what is zero for most."""
    weights_TE = torch.zeros(len(x_TD), EXPERTS).scatter(1, chosen_Tk, weights_Tk)
    out_TD = torch.zeros_like(x_TD)
    for e in range(EXPERTS):
        out_TD = out_TD + weights_TE[:, e, None] * model.expert(e, x_TD)
    return out_TD


def transformers_experts(experts: Experts, width: int) -> nn.Module:
    """transformers' module over the same tensors."""
    from transformers import Qwen2MoeConfig
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

    hidden = experts.down_proj.shape[1]
    config = Qwen2MoeConfig(num_experts=EXPERTS, hidden_size=hidden, moe_intermediate_size=width)
    config._experts_implementation = "eager"
    module = Qwen2MoeExperts(config)
    module.load_state_dict(experts.state_dict())
    return module


def measure(
    hidden: int, width: int, tokens: int, repeats: int, with_dense: bool, with_transformers: bool
) -> None:
    """One line forward, one with the gradient."""
    generator = torch.Generator().manual_seed(0)
    ours = Experts(EXPERTS, hidden, width)
    with torch.no_grad():
        for p in ours.parameters():
            p.normal_(0, 0.02, generator=generator)
    separate = Separate(ours)
    x_TD = torch.randn(tokens, hidden, generator=generator, requires_grad=True)
    weights_Tk, chosen_Tk = (
        torch.randn(tokens, EXPERTS, generator=generator).softmax(-1).topk(ACTIVE)
    )
    ways = {
        "ours": lambda: ours(x_TD, chosen_Tk, weights_Tk),
        "published loop": lambda: published_loop(separate, x_TD, chosen_Tk, weights_Tk),
    }
    if with_dense:
        ways["dense mask"] = lambda: dense_mask(separate, x_TD, chosen_Tk, weights_Tk)
    if with_transformers:
        theirs = transformers_experts(ours, width)
        ways["transformers"] = lambda: theirs(x_TD, chosen_Tk, weights_Tk)
    expected = ways["ours"]().detach()
    for name, way in ways.items():
        assert torch.allclose(way().detach(), expected, rtol=1e-4, atol=1e-5), name
    for backward in (False, True):
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repeats):
            for name, way in ways.items():
                ours.zero_grad()
                separate.zero_grad()
                x_TD.grad = None
                start = time.process_time()
                if backward:
                    way().sum().backward()
                else:
                    with torch.no_grad():
                        way()
                seconds[name].append(time.process_time() - start)
        what = "forward + backward" if backward else "forward"
        cells = []
        for name in ways:
            ratio = statistics.median(
                a / b for a, b in zip(seconds[name], seconds["ours"], strict=True)
            )
            cells.append(f"{name} {1e3 * statistics.median(seconds[name]):.1f} ms ({ratio:.2f}×)")
        print(
            f"hidden {hidden}, width {width}, {tokens} tokens, {what}: " + ", ".join(cells),
            flush=True,
        )


def main() -> None:
    """Print a line for each shape."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--full", action="store_true", help="Qwen1.5-MoE-A2.7B's own layer too (4 GB of memory)"
    )
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"torch {torch.__version__}, {EXPERTS} experts, {ACTIVE} active, float32, one thread, "
        "CPU time (× ours)"
    )
    for hidden, width, tokens in [
        (256, 176, 1),
        (256, 176, 16),
        (256, 176, 256),
        (256, 176, 2_048),
        (64, 44, 2_048),
    ]:
        measure(hidden, width, tokens, options.repeats, with_dense=True, with_transformers=True)
    if options.full:
        for tokens in (1, 64, 512):
            measure(2_048, 1_408, tokens, 3, with_dense=tokens < 512, with_transformers=False)


if __name__ == "__main__":
    main()
