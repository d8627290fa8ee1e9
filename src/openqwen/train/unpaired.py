"""Answers with a label each, good or bad, as KTO reads them."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from openqwen.model import Qwen2
from openqwen.support.errors import OpenQwenError, located
from openqwen.support.records import Record
from openqwen.tokenizer import Tokenizer
from openqwen.tokenizer.messages import demonstration
from openqwen.train import losses
from openqwen.train.branches import pack_answers
from openqwen.train.conversations import check_some_fit, encode_answer, encode_preference
from openqwen.train.packed_batch import PackedBatch, Sample
from openqwen.train.parallel import ALONE, World
from openqwen.train.preferences import PreferenceGroup
from openqwen.train.token_cache import TokenCache, encode_records
from openqwen.train.trainer import Place


class LabelledAnswers:
    """The answers of a source, each with its prompt and its label, in the order of the records.

    sizes: tokens of each with its prompt. labels: whether it is good. counts: for the metrics.
    limit: most tokens of an answer with its prompt.
    """

    def __init__(self, cache: TokenCache, limit: int, where: Path):
        self._cache, self.limit = cache, limit
        lengths = cache.lengths - 1  # without the label
        check_some_fit(lengths, limit, where)
        self._kept = np.flatnonzero(lengths <= limit)
        self.sizes = lengths[self._kept]
        self.labels = np.array([bool(cache[int(index)][0][-1]) for index in self._kept])
        self.counts: dict[str, float] = {
            "answers": len(self),
            "desirable": int(self.labels.sum()),
            "too_long": len(lengths) - len(self),
        }

    @classmethod
    def read(cls, path: Path, tokenizer: Tokenizer, limit: int, place: Place) -> Self:
        """The answers of a source (see `read_records`) that fit.

        Raises:
            OpenQwenError: a record cannot be read or has no label, or no record is left.
        """

        def encode(record: Record, where: str, counts: Counter[str]) -> Sequence[Sample]:
            return encode_labelled(tokenizer, record, where)

        folder, label = place.scratch / "labelled", f"{place.label} tokens"
        return cls(encode_records(path, tokenizer, encode, folder, label), limit, path)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> PreferenceGroup:
        """A prompt and its answer."""
        ids, mask = self._cache[int(self._kept[index])]
        start = int(np.argmax(mask))  # the first target
        return PreferenceGroup(ids[:start].tolist(), [ids[start:-1].tolist()])

    def __iter__(self) -> Iterator[PreferenceGroup]:
        return (self[index] for index in range(len(self)))


def encode_labelled(tokenizer: Tokenizer, record: Record, where: str) -> list[Sample]:
    """The answer of a record, or the two of a pair, each with its label.

    The label, 1 or 0, stands behind the answer as a token that is no target.
    """
    with located(where):
        if record.get("chosen") is not None and record.get("label") is None:
            sides = encode_preference(tokenizer, record, "pair")
            return [_labelled(sides[0], True), _labelled(sides[1], False)]
        label = record.get("label")
        if label not in (0, 1):  # True and False are 1 and 0
            what = f"The label of an answer is true or false, and this is {label!r}."
            raise OpenQwenError(
                what, "label", "give label: true for a good answer, false for a bad"
            )
        messages, tools = demonstration(record)
        if messages[-1]["role"] != "assistant" or len(messages) < 2:
            what = "This record has no answer to a prompt."
            raise OpenQwenError(what, do="end the messages with the assistant's")
        answer = encode_answer(tokenizer, messages[:-1], messages[-1], tools)
        return [_labelled(answer, bool(label))]


def _labelled(sample: Sample, good: bool) -> Sample:
    ids, mask = sample
    return [*ids, int(good)], [*mask, 0]


class OtherAnswers(Sequence[PreferenceGroup]):
    """Each prompt of an order, with the answer to the prompt before it in that order.

    KTO estimates the divergence of the policy on them. An answer is cut to fit behind the prompt.
    """

    def __init__(self, data: LabelledAnswers, order: Sequence[int]):
        self._data, self._order = data, order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, place):  # type: ignore[no-untyped-def]
        """One group, or those of a slice."""
        if isinstance(place, slice):
            return [self[n] for n in range(*place.indices(len(self)))]
        group = self._data[self._order[place]]
        (other,) = self._data[self._order[place - 1]].answers
        return PreferenceGroup(group.prompt, [other[: self._data.limit - len(group.prompt)]])


@dataclass
class LabelledRows:
    """A micro-batch of answers.

    reference: their log-probabilities under the reference model, [answers]. good: their labels.
    divergence: of the policy from the reference, over the whole step.
    """

    rows: PackedBatch
    reference: Tensor
    good: Tensor
    divergence: float

    @classmethod
    def of(
        cls,
        data: LabelledAnswers,
        chosen: Sequence[int],
        reference: Tensor,
        divergence: float,
        device: torch.device,
    ) -> Self:
        """Pack the answers with these numbers. reference: of all answers."""
        groups = [data[index] for index in chosen]
        rows = pack_answers([(group.prompt, group.answers) for group in groups], device)
        good = torch.tensor(data.labels[chosen], device=device)
        return cls(rows, reference[list(chosen)].to(device), good, divergence)

    def loss(
        self, model: Qwen2, beta: float, weights: tuple[float, float], world: World = ALONE
    ) -> losses.Loss:
        """KTO's loss. weights: of good and of bad answers."""
        policy = losses.document_log_probs(model, self.rows, world)
        loss = losses.kto(policy, self.reference, self.good, self.divergence, beta, *weights)
        loss.extras["kl"] = self.divergence * loss.count
        return loss
