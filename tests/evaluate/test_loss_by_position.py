"""The loss by position of a network that knows only the first positions, by construction."""

import math

import pytest
import torch
from byte_tokenizer import ByteTokenizer
from torch import nn

from openqwen.evaluate.positions import loss_by_position
from openqwen.model import ModelConfig

VOCABULARY = 257
SURE = 3.0
KNOWN = math.log(math.exp(SURE) + VOCABULARY - 1) - SURE  # the loss where it expects the right one
UNKNOWN = math.log(VOCABULARY)


class Counter(nn.Module):
    """Expects "a" at the first `context` positions; beyond them every token is equally likely."""

    def __init__(self, context):
        super().__init__()
        self.context, self.device = context, torch.device("cpu")
        self.config = ModelConfig(VOCABULARY, 8, 8, 1, 1, 1)

    def forward(self, tokens, positions, attention, routing=None):
        logits = torch.zeros(len(tokens), VOCABULARY)
        logits[positions < self.context, ord("a")] = SURE
        return logits

    def logits(self, hidden):
        return hidden


def test_the_loss_rises_where_the_network_knows_nothing():
    found = loss_by_position(Counter(192), ByteTokenizer(), [{"text": "a" * 600}], length=600)
    assert [(start, end) for start, end, _ in found] == [
        (0, 128),
        (128, 256),
        (256, 512),
        (512, 600),
    ]
    losses = [loss for _, _, loss in found]
    assert losses == pytest.approx([KNOWN, (KNOWN + UNKNOWN) / 2, UNKNOWN, UNKNOWN], rel=1e-6)


def test_windows_are_whole_and_each_starts_at_position_zero():
    texts = [{"text": "b" * 99}, {"text": "a" * 250}]  # one too short, one with two windows
    found = loss_by_position(Counter(100), ByteTokenizer(), texts, length=100)
    assert found == [[0, 100, pytest.approx(KNOWN, rel=1e-6)]]


def test_without_a_long_text_there_is_nothing_to_show():
    assert loss_by_position(Counter(8), ByteTokenizer(), [{"text": "a" * 63}], length=64) == []
