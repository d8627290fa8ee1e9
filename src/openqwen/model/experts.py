"""Mixture of experts: the feed-forward network of a sparse layer (Qwen2 report, 2.2.2).

As in transformers' Qwen2-MoE: p = softmax(G x) over all experts. A token passes through the k
experts with the largest p, weighted by p (renormalised only with `norm_topk_prob`), and through the
shared expert, weighted by its own sigmoid gate. There is no capacity limit: no token is dropped.
Parameter names and shapes are transformers' fused ones. Shapes: T tokens, D width, E experts, k
experts of a token, N = T·k pairs of a token and an expert, I width of an expert, J = 2I.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openqwen.model.config import ModelConfig
from openqwen.model.feed_forward import FeedForward


class Routing:
    """The routers' decisions in a forward call, one entry for each sparse layer, in order.

    It is an argument of the call, which appends to it. It is not a dataclass, because FSDP2 copies
    dataclasses among the arguments, and the copy would be filled.

    Args:
        probabilities: the router's softmax over all experts, [T, E] each, differentiable.
        chosen: the experts of each token, [T, k] each, the most probable first.
    """

    def __init__(self, probabilities: Sequence[Tensor] = (), chosen: Sequence[Tensor] = ()):
        self.probabilities, self.chosen = list(probabilities), list(chosen)

    def counts_LE(self) -> Tensor:
        """Tokens of each expert in each sparse layer, int64 [layers, E]; a layer's sum is T·k."""
        experts = self.probabilities[0].shape[1]
        return torch.stack([torch.bincount(c.flatten(), minlength=experts) for c in self.chosen])


def route(
    logits_TE: Tensor, active: int, renormalised: bool, routing: Routing | None = None
) -> tuple[Tensor, Tensor]:
    """Weights and numbers of the `active` most probable experts of each token, [T, k] each.

    The probabilities and the numbers are appended to `routing`.
    """
    p_TE = logits_TE.softmax(-1, dtype=torch.promote_types(logits_TE.dtype, torch.float32))
    weights_Tk, chosen_Tk = p_TE.topk(active, dim=-1)
    if renormalised:
        weights_Tk = weights_Tk / weights_Tk.sum(-1, keepdim=True)
    if routing is not None:
        routing.probabilities.append(p_TE)
        routing.chosen.append(chosen_Tk)
    return weights_Tk, chosen_Tk


class SparseFeedForward(nn.Module):
    """Σ over the chosen experts of p_i · E_i(x), plus σ(w_s · x) · Shared(x)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.active = config.num_experts_per_tok
        self.renormalised = config.norm_topk_prob
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = Experts(config.num_experts, config.hidden_size, config.moe_intermediate_size)
        self.shared_expert = FeedForward(config.hidden_size, config.shared_expert_intermediate_size)
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, x_TD: Tensor, routing: Routing | None = None) -> Tensor:
        """[T, D] → [T, D]; the router's decisions are appended to `routing`."""
        logits_TE = self.gate(x_TD)
        weights_Tk, chosen_Tk = route(logits_TE, self.active, self.renormalised, routing)
        routed_TD = self.experts(x_TD, chosen_Tk, weights_Tk.to(x_TD.dtype))
        return routed_TD + self.shared_expert_gate(x_TD).sigmoid() * self.shared_expert(x_TD)


class Experts(nn.Module):
    """E SwiGLU networks in two tensors: gate_up_proj [E, 2I, D], gate first; down_proj [E, D, I].

    The tensors are not initialised; a checkpoint or `initialize` fills them.
    """

    def __init__(self, experts: int, hidden_size: int, width: int):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden_size, width))

    def forward(self, x_TD: Tensor, chosen_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
        """The weighted sum of each token's experts, [T, D]."""
        return mixture(x_TD, weights_Tk, self.gate_up_proj, self.down_proj, chosen_Tk)


def mixture(
    x_TD: Tensor, weights_Tk: Tensor, gate_up_EJD: Tensor, down_EDI: Tensor, chosen_Tk: Tensor
) -> Tensor:
    """The weighted sum of each token's chosen experts, [T, D]."""
    return _Mixture.apply(x_TD, weights_Tk, gate_up_EJD, down_EDI, chosen_Tk)


class _Mixture(torch.autograd.Function):
    """Σ_k w_k · down_e(silu(gate_e(x)) · up_e(x)), with a hand-written gradient.

    The pairs of a token and an expert are sorted by expert, so that each expert has one matrix of
    tokens. Autograd would keep k copies of every token before and after the experts; here only gate
    and up are kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weights_Tk: Tensor,
        gate_up_EJD: Tensor,
        down_EDI: Tensor,
        chosen_Tk: Tensor,
    ) -> Tensor:
        order_N = chosen_Tk.flatten().argsort(stable=True)  # sorted place → pair
        places_N = torch.arange(len(order_N), device=order_N.device)
        places_Tk = torch.empty_like(order_N).scatter_(0, order_N, places_N).view_as(chosen_Tk)
        groups = _Groups(torch.bincount(chosen_Tk.flatten(), minlength=len(down_EDI)))
        tokens_N = order_N // chosen_Tk.shape[1]
        gate_up_NJ = groups.rows(x_TD[tokens_N], gate_up_EJD.transpose(1, 2))
        gate_NI, up_NI = gate_up_NJ.chunk(2, dim=-1)
        y_ND = groups.rows(F.silu(gate_NI).mul_(up_NI), down_EDI.transpose(1, 2))
        ctx.groups = groups
        ctx.save_for_backward(
            x_TD, weights_Tk, gate_up_EJD, down_EDI, gate_up_NJ, order_N, places_Tk
        )
        return F.embedding_bag(places_Tk, y_ND, per_sample_weights=weights_Tk, mode="sum")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, None]:
        x_TD, weights_Tk, gate_up_EJD, down_EDI, gate_up_NJ, order_N, places_Tk = ctx.saved_tensors
        tokens_N = order_N // places_Tk.shape[1]
        weights_N1 = weights_Tk.flatten()[order_N, None]
        gate_NI, up_NI = gate_up_NJ.chunk(2, dim=-1)
        gate_sigmoid_NI = gate_NI.sigmoid()
        silu_NI = gate_NI * gate_sigmoid_NI
        h_NI = silu_NI * up_NI

        grad_y_ND = grads[0][tokens_N]
        # Without the weights w, since dw = ⟨dy, down h⟩ = ⟨downᵀ dy, h⟩ needs it so.
        grad_h_NI = ctx.groups.rows(grad_y_ND, down_EDI)
        grad_weights_Tk = (grad_h_NI * h_NI).sum(-1)[places_Tk]
        grad_h_NI *= weights_N1
        trained = ctx.needs_input_grad  # no gradient is computed for frozen experts
        grad_down_EDI = ctx.groups.outer(grad_y_ND, h_NI.mul_(weights_N1)) if trained[3] else None

        grad_gate_up_NJ = torch.empty_like(gate_up_NJ)
        grad_gate_NI, grad_up_NI = grad_gate_up_NJ.chunk(2, dim=-1)
        torch.mul(grad_h_NI, silu_NI, out=grad_up_NI)
        # silu'(g) = σ(g) + silu(g) (1 − σ(g))
        slope_NI = torch.addcmul(gate_sigmoid_NI + silu_NI, silu_NI, gate_sigmoid_NI, value=-1)
        torch.mul(grad_h_NI.mul_(up_NI), slope_NI, out=grad_gate_NI)
        grad_gate_up_EJD = ctx.groups.outer(grad_gate_up_NJ, x_TD[tokens_N]) if trained[2] else None
        grad_x_ND = ctx.groups.rows(grad_gate_up_NJ, gate_up_EJD)
        grad_x_TD = F.embedding_bag(places_Tk, grad_x_ND, mode="sum")
        return grad_x_TD, grad_weights_Tk, grad_gate_up_EJD, grad_down_EDI, None


class _Groups:
    """Rows in E consecutive groups, each with its own matrix: one matmul per group, or one call."""

    def __init__(self, sizes_E: Tensor):
        self.ends_E = sizes_E.cumsum(0, dtype=torch.int32)
        self._bounds: list[tuple[int, int, int]] | None = None

    @property
    def bounds(self) -> list[tuple[int, int, int]]:
        """(group, first row, row after the last) of each group that is not empty.

        On a GPU this waits for the device.
        """
        if self._bounds is None:
            ends = self.ends_E.tolist()
            self._bounds = [(e, a, b) for e, (a, b) in enumerate(zip([0, *ends], ends)) if a < b]
        return self._bounds

    def rows(self, a_NA: Tensor, w_EAB: Tensor) -> Tensor:
        """Each row times its group's matrix: [N, B]."""
        if one_call(a_NA, w_EAB):
            return F.grouped_mm(a_NA, w_EAB, offs=self.ends_E)
        out_NB = a_NA.new_empty(len(a_NA), w_EAB.shape[2])
        for e, start, end in self.bounds:
            torch.mm(a_NA[start:end], w_EAB[e], out=out_NB[start:end])
        return out_NB

    def outer(self, a_NA: Tensor, b_NB: Tensor) -> Tensor:
        """aᵀ b of each group: [E, A, B], zero where a group is empty."""
        if one_call(a_NA, b_NB):
            return F.grouped_mm(a_NA.T, b_NB, offs=self.ends_E)
        out_EAB = a_NA.new_zeros(len(self.ends_E), a_NA.shape[1], b_NB.shape[1])
        for e, start, end in self.bounds:
            torch.mm(a_NA[start:end].T, b_NB[start:end], out=out_EAB[e])
        return out_EAB


def one_call(a: Tensor, b: Tensor) -> bool:
    """Whether torch's grouped matmul can do all groups in one call.

    It needs CUDA, bfloat16, and widths that are multiples of 16 bytes. On a CPU it is the same loop
    and no faster (benchmarks/experts.py).
    """
    aligned = a.shape[1] % 8 == 0 and b.shape[-1] % 8 == 0
    if not (a.is_cuda and a.dtype == torch.bfloat16 and aligned):
        return False
    return grouped_matmul_is_right(a.device, a.dtype)


@cache
def grouped_matmul_is_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's grouped matmul runs here and equals one matmul per group, even if empty."""
    if not hasattr(F, "grouped_mm"):
        return False
    generator = torch.Generator().manual_seed(0)
    a_NA, b_NB, w_EAB = (
        torch.randn(s, generator=generator).to(device, dtype)
        for s in ((24, 16), (24, 8), (3, 16, 8))
    )
    ends_E = torch.tensor([8, 8, 24], dtype=torch.int32, device=device)
    rows_NB = torch.cat([a_NA[:8] @ w_EAB[0], a_NA[8:] @ w_EAB[2]])
    outer_EAB = torch.stack(
        [a_NA[:8].T @ b_NB[:8], torch.zeros_like(w_EAB[1]), a_NA[8:].T @ b_NB[8:]]
    )
    try:
        rows_too_NB = F.grouped_mm(a_NA, w_EAB, offs=ends_E)
        outer_too_EAB = F.grouped_mm(a_NA.T, b_NB, offs=ends_E)
    except RuntimeError:
        return False
    pairs = ((rows_too_NB, rows_NB), (outer_too_EAB, outer_EAB))
    return all(torch.allclose(a.float(), b.float(), rtol=2e-2, atol=2e-2) for a, b in pairs)
