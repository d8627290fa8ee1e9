"""A model of two layers that says something at random, with a tokenizer of bytes that can chat."""

import torch

from openqwen.model import ModelConfig, Qwen2, initialize
from openqwen.tokenizer import Tokenizer
from openqwen.tokenizer.pretokenize import BYTES_IN_ID_ORDER
from openqwen.tokenizer.template import chatml_template

MERGES = [(b"a", b"b"), (b"t", b"h"), (b" ", b"B"), (b"e", b"r"), (b" ", b"A")]


def tokenizer(chat: bool = True) -> Tokenizer:
    vocabulary = [*BYTES_IN_ID_ORDER, *(a + b for a, b in MERGES)]
    ids = {token: i for i, token in enumerate(vocabulary)}
    merges = [(ids[a], ids[b]) for a, b in MERGES]
    return Tokenizer(vocabulary, merges, template=chatml_template() if chat else None)


def model(seed: int = 0) -> Qwen2:
    config = ModelConfig(
        tokenizer().vocab_size,
        32,
        48,
        2,
        4,
        2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    network = Qwen2(config)
    generator = torch.Generator().manual_seed(seed)
    initialize(network, generator)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return network.eval()
