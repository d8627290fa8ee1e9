"""`log_probs`, chunked over tokens, for SFT, DPO, online DPO and every later stage.

The head is applied only to the hidden states that predict a target, so other tokens cost nothing.
Logits are kept for the backward pass while all of them fit a small budget; beyond it they are
computed again there, so that memory does not grow with tokens × vocabulary.

`cross_entropy` is for losses that need only the sum. It computes the gradient in the forward pass,
a block of logits at a time (as Liger-Kernel does), and keeps no logits. On a GPU where Liger-Kernel
is installed, its kernel does that.
"""

import importlib
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from openqwen.support.progress import console

CHUNK = 1_024  # tokens whose logits are computed at a time
KEEP_BYTES = 512 * 2**20  # logits kept for the backward pass, at most
BLOCK_BYTES = 160 * 2**20  # logits that `cross_entropy` holds at a time, about
BLOCK_BYTES_GPU = 2**30  # larger blocks use a GPU's bandwidth better


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor) -> Tensor:
        keep = hidden_ND.shape[0] * head_VD.shape[0] * 4 <= KEEP_BYTES and hidden_ND.requires_grad
        kept: list[Tensor] = []
        normalizers, scores = [], []
        for hidden, targets in zip(hidden_ND.split(CHUNK), targets_N.split(CHUNK)):
            logits_CV = (hidden @ head_VD.T).float()
            normalizers.append(torch.logsumexp(logits_CV, dim=-1))
            scores.append(logits_CV.gather(1, targets[:, None]).squeeze(1))
            if keep:
                kept.append(logits_CV)
        normalizer_N = torch.cat(normalizers)
        ctx.save_for_backward(hidden_ND, head_VD, targets_N, normalizer_N, *kept)
        return torch.cat(scores) - normalizer_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden_ND, head_VD, targets_N, normalizer_N, *kept = ctx.saved_tensors
        to_hidden, to_head, _ = ctx.needs_input_grad  # a frozen head (adapters) costs nothing
        grad_hidden_ND = torch.empty_like(hidden_ND) if to_hidden else None
        grad_head_VD = torch.zeros_like(head_VD, dtype=torch.float32) if to_head else None
        for n, start in enumerate(range(0, len(targets_N), CHUNK)):
            rows = slice(start, start + CHUNK)
            logits_CV = kept[n] if kept else (hidden_ND[rows] @ head_VD.T).float()
            # d log p(target) / d logits = onehot(target) − softmax
            slope_CV = torch.exp(logits_CV - normalizer_N[rows, None]).mul_(-grads[0][rows, None])
            at = torch.arange(slope_CV.shape[0], device=slope_CV.device)
            slope_CV[at, targets_N[rows]] += grads[0][rows]
            slope_CV = slope_CV.to(head_VD.dtype)
            if grad_hidden_ND is not None:
                grad_hidden_ND[rows] = slope_CV @ head_VD
            if grad_head_VD is not None:
                _add_product(grad_head_VD, slope_CV, hidden_ND[rows])
        return (
            grad_hidden_ND,
            None if grad_head_VD is None else grad_head_VD.to(head_VD.dtype),
            None,
        )


def log_probs(hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor) -> Tensor:
    """log p(target) of each hidden state that predicts a target: float32 [N], differentiable."""
    return _LogProbs.apply(*_lowered(hidden_ND, head_VD), targets_N)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor) -> Tensor:
        to_hidden, to_head, _ = ctx.needs_input_grad
        grad_hidden_ND = torch.empty_like(hidden_ND) if to_hidden else None
        grad_head_VD = torch.zeros_like(head_VD, dtype=torch.float32) if to_head else None
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        tokens = max(1, len(targets_N))
        most = BLOCK_BYTES_GPU if head_VD.is_cuda else BLOCK_BYTES
        size = -(-tokens // max(1, round(tokens * head_VD.shape[0] * 4 / most)))
        for start in range(0, len(targets_N), size):
            rows = slice(start, start + size)
            # A block is large, so one tensor holds in turn logits, logits − max, exp and gradient.
            slope_CV = (hidden_ND[rows] @ head_VD.T).float()
            slope_CV -= slope_CV.amax(dim=1, keepdim=True)
            total -= slope_CV.gather(1, targets_N[rows, None]).sum()
            sums_C1 = slope_CV.exp_().sum(dim=1, keepdim=True)
            total += sums_C1.log().sum()
            if not (to_hidden or to_head):
                continue
            slope_CV /= sums_C1  # d −log p(target) / d logits = softmax − onehot(target)
            slope_CV[torch.arange(len(slope_CV), device=slope_CV.device), targets_N[rows]] -= 1.0
            slope_CV = slope_CV.to(head_VD.dtype)
            if grad_hidden_ND is not None:
                torch.mm(slope_CV, head_VD, out=grad_hidden_ND[rows])
            if grad_head_VD is not None:
                _add_product(grad_head_VD, slope_CV, hidden_ND[rows])
        ctx.grads = grad_hidden_ND, None if grad_head_VD is None else grad_head_VD.to(head_VD.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_hidden_ND, grad_head_VD = ctx.grads
        del ctx.grads
        if (scale := grads[0].item()) != 1.0:
            # In place is safe: nothing else holds these tensors, and the graph is used once.
            torch._foreach_mul_([g for g in (grad_hidden_ND, grad_head_VD) if g is not None], scale)
        return grad_hidden_ND, grad_head_VD, None


def cross_entropy(hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Σ −log p(target) over N tokens, float32 []; its backward pass can be run once."""
    fused = _fused(hidden_ND.device) if len(targets_N) else None
    return (fused or _CrossEntropy.apply)(*_lowered(hidden_ND, head_VD), targets_N)


@cache
def _fused(device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """Liger-Kernel's fused cross-entropy, on a GPU and where it is installed; else None."""
    if device.type != "cuda":
        return None
    try:
        library = importlib.import_module("liger_kernel.transformers.functional")
    except ImportError:
        return None
    console.print("  cross-entropy by Liger-Kernel", markup=False)
    return partial(
        library.liger_fused_linear_cross_entropy, reduction="sum", accum_dtype=torch.float32
    )


def _lowered(hidden_ND: Tensor, head_VD: Tensor) -> tuple[Tensor, Tensor]:
    """Both in autocast's dtype, rounded once here and not again in every product."""
    kind = hidden_ND.device.type
    if not torch.is_autocast_enabled(kind):
        return hidden_ND, head_VD
    dtype = torch.get_autocast_dtype(kind)
    return hidden_ND.to(dtype), head_VD.to(dtype)


def _add_product(sum_VD: Tensor, slope_CV: Tensor, hidden_CD: Tensor) -> None:
    """sum += slopeᵀ · hidden, in float32."""
    if slope_CV.dtype == torch.float32:
        sum_VD.addmm_(slope_CV.T, hidden_CD)
    else:
        sum_VD += slope_CV.T @ hidden_CD
