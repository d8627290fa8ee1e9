"""Bits per byte: a language model's loss in a unit that does not depend on the tokenizer."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from openqwen.engine.score import score_tokens
from openqwen.evaluate.intervals import ratio_interval
from openqwen.model import Packed, Qwen2
from openqwen.support.batching import cut_to_budget
from openqwen.support.errors import OpenQwenError
from openqwen.support.progress import progress
from openqwen.tokenizer import Tokenizer

_FORWARD_TOKENS = 8_192  # most tokens of one forward, except for a single longer window


@dataclass
class BitsPerByte:
    """Total negative log-likelihood (bits) over total UTF-8 bytes, of all documents and by source.

    sources, bytes, bits: one for each document, in order. tokens: how many were scored.
    """

    sources: list[str] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    bits: list[float] = field(default_factory=list)
    tokens: int = 0

    @property
    def overall(self) -> float:
        """Bits per byte of all documents."""
        return math.fsum(self.bits) / sum(self.bytes)

    @property
    def by_source(self) -> dict[str, float]:
        """{source: bits per byte}."""
        totals: dict[str, tuple[float, int]] = {}
        for source, bits, size in zip(self.sources, self.bits, self.bytes, strict=True):
            total_bits, total_size = totals.get(source, (0.0, 0))
            totals[source] = total_bits + bits, total_size + size
        return {source: bits / size for source, (bits, size) in sorted(totals.items()) if size}

    def scores(self, name: str) -> dict[str, float]:
        """{name: overall}; with two documents or more also {name_low, name_high}, 95 %."""
        if len(self.bits) < 2:
            return {name: self.overall}
        low, high = ratio_interval(self.bits, self.bytes)
        return {name: self.overall, f"{name}_low": low, f"{name}_high": high}


@dataclass(frozen=True)
class Window:
    """A part of one document: input ids, and the targets of its last positions, which it scores.

    document: the document's index.
    """

    inputs: list[int]
    targets: list[int]
    document: int


@torch.inference_mode()
def bits_per_byte(
    model: Qwen2,
    tokenizer: Tokenizer,
    documents: Iterable[dict[str, Any]],
    context: int,
    device: torch.device | str = "cpu",
) -> BitsPerByte:
    """Score documents ({"text", "source", …}) one by one.

    A document's first token is predicted from `<|endoftext|>`. A document longer than `context`
    tokens is read in overlapping windows: every token is scored exactly once, and from the second
    window on with at least half a window before it.

    Raises:
        OpenQwenError: the documents have no text.
    """
    result = BitsPerByte()
    all_windows: list[Window] = []
    for number, document in enumerate(documents):
        text = document["text"]
        result.sources.append(document["source"])
        result.bytes.append(len(text.encode()))
        result.bits.append(0.0)
        all_windows += windows(tokenizer.encode(text), tokenizer.endoftext_id, context, number)
    if not all_windows:
        raise OpenQwenError(
            "There is no held-out text to score.",
            do="give a corpus whose held-out split is not empty",
        )
    was_training = model.training
    model.eval()
    tokens = sum(len(window.targets) for window in all_windows)
    with progress("bits per byte", tokens, "tokens") as work:
        for cut in cut_to_budget([len(window.inputs) for window in all_windows], _FORWARD_TOKENS):
            pack = all_windows[cut]
            for window, nats in zip(pack, window_losses(model, pack, device), strict=True):
                result.bits[window.document] += float(nats.sum()) / math.log(2)
                result.tokens += len(window.targets)
                work.advance(len(window.targets))
    model.train(was_training)
    return result


def windows(ids: Sequence[int], first: int, context: int, document: int = 0) -> Iterator[Window]:
    """Cut `first` and one document into windows of up to `context` inputs, half a window apart."""
    if context < 2:
        raise ValueError("a window needs at least two tokens")
    sequence = [first, *ids]  # position i predicts sequence[i + 1]
    scored, start = 0, 0
    while scored < len(ids):
        end = min(start + context, len(ids))
        yield Window(sequence[start:end], sequence[scored + 1 : end + 1], document)
        scored, start = end, start + context // 2


def window_losses(
    model: Qwen2, pack: Sequence[Window], device: torch.device | str
) -> tuple[Tensor, ...]:
    """Negative log-likelihood in nats of each target, [targets] for each window; one forward."""
    attention = Packed.from_lengths([len(window.inputs) for window in pack]).to(device)
    tokens_T = torch.tensor([i for window in pack for i in window.inputs], device=device)
    hidden_TD = model(tokens_T, attention.positions.to(device), attention)
    targets = torch.tensor([t for window in pack for t in window.targets], device=device)
    logprobs, _ = score_tokens(model, hidden_TD[_scored_rows(pack).to(device)], targets)
    return (-logprobs.double()).split([len(window.targets) for window in pack])


def _scored_rows(pack: Sequence[Window]) -> Tensor:
    """Row numbers of the positions that predict targets: the last ones of each window."""
    rows, end = [], 0
    for window in pack:
        end += len(window.inputs)
        rows.append(torch.arange(end - len(window.targets), end))
    return torch.cat(rows)


def within_budget(documents: Iterable[dict[str, Any]], budget: int) -> list[dict[str, Any]]:
    """The first documents of each source, up to its equal share of `budget` UTF-8 bytes.

    Each source gets at least one document. The same input gives the same documents, so that every
    stage is measured on the same text.
    """
    by_source: dict[str, list[dict[str, Any]]] = {}
    for document in documents:
        by_source.setdefault(document["source"], []).append(document)
    kept = []
    for source in sorted(by_source):
        left = budget // len(by_source)
        for number, document in enumerate(by_source[source]):
            size = len(document["text"].encode())
            if number == 0 or size <= left:
                kept.append(document)
                left -= size
    return kept
