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

from openqwen.model.linear import product
from openqwen.support.progress import console

CHUNK = 1_024  # tokens whose logits are computed at a time
KEEP_BYTES = 512 * 2**20  # logits kept for the backward pass, at most
BLOCK_BYTES = 160 * 2**20  # logits that `cross_entropy` holds at a time, about
BLOCK_BYTES_GPU = 2**30  # larger blocks use a GPU's bandwidth better


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, dtype: torch.dtype
    ) -> Tensor:
        low_ND, low_VD = hidden_ND.to(dtype), head_VD.to(dtype)
        size = hidden_ND.shape[0] * head_VD.shape[0] * dtype.itemsize
        keep = size <= KEEP_BYTES and hidden_ND.requires_grad
        kept: list[Tensor] = []
        normalizers, scores = [], []
        for hidden, targets in zip(low_ND.split(CHUNK), targets_N.split(CHUNK)):
            rounded_CV = product(hidden, low_VD.T)
            if keep:
                kept.append(rounded_CV)
            logits_CV = rounded_CV.float()
            normalizers.append(torch.logsumexp(logits_CV, dim=-1))
            scores.append(logits_CV.gather(1, targets[:, None]).squeeze(1))
        normalizer_N = torch.cat(normalizers)
        # The head is rounded again in the backward pass: a copy would be large.
        ctx.save_for_backward(low_ND, head_VD, targets_N, normalizer_N, *kept)
        ctx.dtype = hidden_ND.dtype
        return torch.cat(scores) - normalizer_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden_ND, head_VD, targets_N, normalizer_N, *kept = ctx.saved_tensors
        to_hidden, to_head, *_ = ctx.needs_input_grad  # a frozen head (adapters) costs nothing
        low_VD = head_VD.to(hidden_ND.dtype)
        grad_hidden_ND = torch.empty_like(hidden_ND) if to_hidden else None
        grad_head_VD = None
        for n, start in enumerate(range(0, len(targets_N), CHUNK)):
            rows = slice(start, start + CHUNK)
            # Logits are large, so the kept ones in float32 themselves become their gradient:
            # d log p(target) / d logits = onehot(target) − softmax
            slope_CV = (kept[n] if kept else product(hidden_ND[rows], low_VD.T)).float()
            slope_CV.sub_(normalizer_N[rows, None]).exp_().mul_(-grads[0][rows, None])
            at = torch.arange(slope_CV.shape[0], device=slope_CV.device)
            slope_CV[at, targets_N[rows]] += grads[0][rows]
            slope_CV = slope_CV.to(hidden_ND.dtype)
            if grad_hidden_ND is not None:
                grad_hidden_ND[rows] = product(slope_CV, low_VD)
            if to_head:
                grad_head_VD = _with_product(grad_head_VD, slope_CV, hidden_ND[rows])
        if grad_hidden_ND is not None:
            grad_hidden_ND = grad_hidden_ND.to(ctx.dtype)
        return grad_hidden_ND, _of_head(grad_head_VD, head_VD, to_head), None, None


def log_probs(hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor) -> Tensor:
    """log p(target) of each hidden state that predicts a target: float32 [N].

    Differentiable; its backward pass can be run once.
    """
    return _LogProbs.apply(hidden_ND, head_VD, targets_N, _dtype(hidden_ND))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, dtype: torch.dtype
    ) -> Tensor:
        to_hidden, to_head, *_ = ctx.needs_input_grad
        low_ND, low_VD = hidden_ND.to(dtype), head_VD.to(dtype)
        grad_hidden_ND = torch.empty_like(low_ND) if to_hidden else None
        grad_head_VD = None
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        tokens = max(1, len(targets_N))
        most = BLOCK_BYTES_GPU if head_VD.is_cuda else BLOCK_BYTES
        size = -(-tokens // max(1, round(tokens * head_VD.shape[0] * 4 / most)))
        for start in range(0, len(targets_N), size):
            rows = slice(start, start + size)
            # A block is large, so one tensor holds in turn logits, logits − max, exp and gradient.
            slope_CV = product(low_ND[rows], low_VD.T).float()
            slope_CV -= slope_CV.amax(dim=1, keepdim=True)
            total -= slope_CV.gather(1, targets_N[rows, None]).sum()
            sums_C1 = slope_CV.exp_().sum(dim=1, keepdim=True)
            total += sums_C1.log().sum()
            if not (to_hidden or to_head):
                continue
            slope_CV /= sums_C1  # d −log p(target) / d logits = softmax − onehot(target)
            slope_CV[torch.arange(len(slope_CV), device=slope_CV.device), targets_N[rows]] -= 1.0
            slope_CV = slope_CV.to(dtype)
            if grad_hidden_ND is not None:
                grad_hidden_ND[rows] = product(slope_CV, low_VD)
            if to_head:
                grad_head_VD = _with_product(grad_head_VD, slope_CV, low_ND[rows])
        if grad_hidden_ND is not None:
            grad_hidden_ND = grad_hidden_ND.to(hidden_ND.dtype)
        ctx.grads = grad_hidden_ND, _of_head(grad_head_VD, head_VD, to_head)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden_ND, grad_head_VD = ctx.grads
        del ctx.grads
        if (scale := grads[0].item()) != 1.0:
            # In place is safe: nothing else holds these tensors, and the graph is used once.
            torch._foreach_mul_([g for g in (grad_hidden_ND, grad_head_VD) if g is not None], scale)
        return grad_hidden_ND, grad_head_VD, None, None


def cross_entropy(hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Σ −log p(target) over N tokens, float32 []; its backward pass can be run once."""
    dtype = _dtype(hidden_ND)
    if len(targets_N) and (fused := _fused(hidden_ND.device)):
        return fused(hidden_ND.to(dtype), head_VD.to(dtype), targets_N)
    return _CrossEntropy.apply(hidden_ND, head_VD, targets_N, dtype)


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


def _dtype(hidden_ND: Tensor) -> torch.dtype:
    """That of products with the head: autocast's where it is on."""
    kind = hidden_ND.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_ND.dtype


def _with_product(sum_VD: Tensor | None, slope_CV: Tensor, hidden_CD: Tensor) -> Tensor:
    """sum + slopeᵀ · hidden in float32; the sum itself is changed. None: 0."""
    if sum_VD is None:
        return product(slope_CV.T, hidden_CD).float()
    if slope_CV.dtype == torch.float32:
        return sum_VD.addmm_(slope_CV.T, hidden_CD)
    return sum_VD.add_(product(slope_CV.T, hidden_CD))


def _of_head(grad_VD: Tensor | None, head_VD: Tensor, wanted: bool) -> Tensor | None:
    """The head's gradient in its dtype; without tokens it is 0."""
    if not wanted:
        return None
    return torch.zeros_like(head_VD) if grad_VD is None else grad_VD.to(head_VD.dtype)
