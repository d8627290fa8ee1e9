"""A tokenizer of bytes and a few merges, and models of two layers that say something at random."""

import numpy as np
import torch

from openqwen.model import ModelConfig, Packed, Qwen2, initialize
from openqwen.tokenizer import Tokenizer
from openqwen.tokenizer.pretokenize import BYTES_IN_ID_ORDER

MERGES = [(b"a", b"b"), (b"ab", b"c"), (b"t", b"h"), (b"1", b"2"), (b'"', b":"), (b"{", b'"')]


def tokenizer() -> Tokenizer:
    vocabulary = [*BYTES_IN_ID_ORDER, *(a + b for a, b in MERGES)]
    ids = {token: i for i, token in enumerate(vocabulary)}
    return Tokenizer(vocabulary, [(ids[a], ids[b]) for a, b in MERGES])


def model(seed: int = 0, noise: float = 0.15, width: int = 32, **options) -> Qwen2:
    defaults = {"max_position_embeddings": 128, "tie_word_embeddings": True}
    config = ModelConfig(320, width, 48, 2, 4, 2, **(defaults | options))
    network = Qwen2(config)
    generator = torch.Generator().manual_seed(seed)
    initialize(network, generator)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * noise)
    return network.eval()


def prompts(count: int, seed: int = 0, longest: int = 40) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, int(rng.integers(1, longest))).tolist() for _ in range(count)]


@torch.no_grad()
def scores(network: Qwen2, ids: list[int]) -> torch.Tensor:
    """The scores after each token, [T, V], read at once and without a cache."""
    packed = Packed.from_lengths([len(ids)])
    return network.logits(network(torch.tensor(ids), packed.positions, packed)).float()


def plain_greedy(
    network: Qwen2, words: Tokenizer, prompt: list[int], limit: int
) -> tuple[list[int], list[float], str]:
    ids, logprobs = list(prompt), []
    while len(ids) < len(prompt) + limit:
        last = scores(network, ids)[-1]
        token = int(last[: words.vocab_size].argmax())
        if token in (words.eos_id, words.endoftext_id):
            return ids[len(prompt) :], logprobs, "stop"
        logprobs.append(float(torch.log_softmax(last, -1)[token]))
        ids.append(token)
    return ids[len(prompt) :], logprobs, "length"
