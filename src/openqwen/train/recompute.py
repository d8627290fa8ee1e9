"""Activation checkpointing: compute activations again in the backward pass to save memory."""

from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from openqwen.model.decoder import Layer

Recompute = Literal["nothing", "cheap", "layers"]
_aten = torch.ops.aten
# Matrix products and attention are expensive and kept; norms, rotations and SwiGLU are recomputed.
_KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}


def recompute(model: nn.Module, what: Recompute) -> None:
    """Choose what the layers compute again, in place; parameters keep their names.

    what: `cheap`, all but matrix products and attention (selective recomputation, Korthikanti et
    al. 2022); `layers`, each layer from its input (Chen et al. 2016).
    """
    if what == "nothing":
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if what == "cheap":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    for layer in model.modules():
        if isinstance(layer, Layer):
            layer.forward = partial(checkpoint, layer.forward, **options)  # type: ignore[method-assign]


def _policy(_: Any, operation: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    # Compared by name, since PyTorch defines this operator only when it is first used.
    kept = operation in _KEPT or str(operation) == "torch_attn._varlen_attn.default"
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
