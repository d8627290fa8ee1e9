"""The loss by position in a long text: what a longer context is worth."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from openqwen.evaluate.bits_per_byte import Window, window_losses
from openqwen.model import Qwen2
from openqwen.tokenizer import Tokenizer

_FIRST = 128  # the end of the first range of positions; the ranges double from there on
_MOST = 48  # windows


@torch.inference_mode()
def loss_by_position(
    model: Qwen2, tokenizer: Tokenizer, documents: Iterable[dict[str, Any]], length: int
) -> list[list[float]]:
    """Read windows of `length` tokens, also beyond the context that the model was trained with.

    A model that cannot use distant tokens has the same loss everywhere; beyond the context that it
    knows, its loss rises. Texts with fewer tokens are left out.

    Args:
        documents: held-out documents ({"text", …}).

    Returns:
        [start, end, mean loss in nats] of ranges of positions; empty without a text of that length.
    """
    losses_W: list[Tensor] = []
    for ids in _windows(tokenizer, documents, length):
        window = Window([tokenizer.endoftext_id, *ids[:-1]], ids, document=0)
        losses_W += window_losses(model, [window], model.device)
    if not losses_W:
        return []
    mean_T = torch.stack(losses_W).mean(0)
    found: list[list[float]] = []
    start, end = 0, min(_FIRST, length)
    while start < length:
        found.append([start, end, float(mean_T[start:end].mean())])
        start, end = end, min(2 * end, length)
    return found


def _windows(
    tokenizer: Tokenizer, documents: Iterable[dict[str, Any]], length: int
) -> Sequence[list[int]]:
    """The first whole windows of all texts, one of each document before the second of any."""
    texts = [tokenizer.encode(document["text"]) for document in documents]
    longest = max((len(ids) for ids in texts), default=0)
    starts = range(0, longest - length + 1, length)
    rows = [ids[at : at + length] for at in starts for ids in texts if len(ids) >= at + length]
    return rows[:_MOST]
