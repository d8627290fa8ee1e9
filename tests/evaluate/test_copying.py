"""The copying score of networks that copy, or do not, by construction."""

import math

import pytest
import torch
from byte_tokenizer import ByteTokenizer
from torch import nn

from openqwen.evaluate.copying import copying_scores
from openqwen.model import ModelConfig

VOCABULARY = 257


class Copier(nn.Module):
    """Expects what followed the same `context` tokens before, as an induction head does.

    Without such a place every token is equally likely. sure: the logit of the expected one.
    """

    def __init__(self, context, sure):
        super().__init__()
        self.context, self.sure, self.device = context, sure, torch.device("cpu")
        self.config = ModelConfig(VOCABULARY, 8, 8, 1, 1, 1)

    def forward(self, tokens, positions, attention, routing=None):
        logits = torch.zeros(len(tokens), VOCABULARY)
        starts = [n for n, position in enumerate(positions.tolist()) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(tokens)]):
            seen = tokens[start:end].tolist()
            for n in range(self.context, len(seen)):
                now = seen[n - self.context + 1 : n + 1]
                for m in range(n - 1, self.context - 2, -1):
                    if seen[m - self.context + 1 : m + 1] == now:
                        logits[start + n, seen[m + 1]] = self.sure
                        break
        return logits

    def logits(self, hidden):
        return hidden


def test_a_network_that_knows_nothing_saves_nothing():
    scores = copying_scores(Copier(3, sure=0.0), ByteTokenizer())
    assert scores["copying_saved"] == pytest.approx(0, abs=1e-6)
    assert scores["copying_share"] == pytest.approx(0, abs=1e-6)


def test_a_network_that_copies_saves_nearly_all():
    scores = copying_scores(Copier(6, sure=12.0), ByteTokenizer())
    assert scores["copying_saved"] > 0.9 * math.log(VOCABULARY)
    assert scores["copying_share"] > 0.9


def test_a_model_that_is_surer_saves_more():
    saved = [copying_scores(Copier(6, s), ByteTokenizer())["copying_saved"] for s in (1.0, 4.0)]
    assert 0 < saved[0] < saved[1]
