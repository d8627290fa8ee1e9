import gzip
import importlib
import math

import pytest
import torch
from byte_tokenizer import ByteTokenizer
from torch import nn

from openqwen.corpus.documents import halves
from openqwen.engine import score
from openqwen.evaluate import bits_per_byte, within_budget
from openqwen.evaluate.bits_per_byte import windows
from openqwen.model import ModelConfig, Packed, Qwen2, initialize
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import gzip_bits_per_byte
from openqwen.support.generators import Generators


class Uniform(nn.Module):
    """Every token equally likely."""

    def __init__(self, vocab):
        super().__init__()
        self.config = ModelConfig(
            vocab_size=vocab,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
        )
        self.vocab = vocab

    def forward(self, tokens_T, positions_T, attention):
        return torch.ones(len(tokens_T), 8)

    def logits(self, hidden_TD):
        return torch.full((len(hidden_TD), self.vocab), 3.0)


def documents(*texts, source="code"):
    return [{"id": str(n), "text": text, "source": source} for n, text in enumerate(texts)]


@pytest.fixture(scope="module")
def tiny():
    config = ModelConfig(
        vocab_size=257,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        initializer_range=0.4,
    )
    model = Qwen2(config)
    initialize(model, Generators(0).torch("weights"))
    return model


def naive_bits(model, text, context):
    """Token by token, one forward each, in float64 arithmetic on the logits; the window rule
    written out anew.
    """
    ids = [256, *text.encode()]
    total = 0.0
    for target in range(1, len(ids)):
        stride = context // 2
        jumps = max(0, math.ceil((target - context) / stride))
        seen = torch.tensor(ids[jumps * stride : target])
        hidden = model(seen, torch.arange(len(seen)), Packed.from_lengths([len(seen)]))
        total -= model.logits(hidden[-1:])[0].double().log_softmax(0)[
            ids[target]
        ].item() / math.log(2)
    return total


def test_uniform_model_has_the_closed_form():
    given = documents("hello", "äöü", "x" * 100)
    result = bits_per_byte(Uniform(300), ByteTokenizer(), given, context=16)
    assert result.overall == pytest.approx(math.log2(300), rel=1e-6)
    assert result.tokens == sum(len(d["text"].encode()) for d in given)


def test_fewer_tokens_than_bytes():
    class PairTokenizer(ByteTokenizer):
        def encode(self, text, allow_control=False):
            return list(range(len(text.encode()) // 2))

    result = bits_per_byte(Uniform(64), PairTokenizer(), documents("ab" * 21, "cd" * 4), context=8)
    assert result.overall == pytest.approx(6 * 25 / 50)


@pytest.mark.parametrize("context", [2, 3, 7, 16, 100])
@torch.inference_mode()
def test_equals_a_naive_loop(tiny, context):
    texts = ["a", "hello world", "def f(x):\n    return x\n", "naïve " * 8]
    result = bits_per_byte(tiny, ByteTokenizer(), documents(*texts), context)
    expected = sum(naive_bits(tiny, text, context) for text in texts)
    assert result.overall == pytest.approx(expected / sum(len(t.encode()) for t in texts), rel=1e-5)


def test_by_source_adds_up(tiny):
    code, docs = documents("x = 1\ny = 2\n"), documents("Some words in a row.", source="docs")
    both = bits_per_byte(tiny, ByteTokenizer(), code + docs, 64)
    assert both.by_source["code"] == pytest.approx(
        bits_per_byte(tiny, ByteTokenizer(), code, 64).overall, rel=1e-6
    )
    assert both.by_source["docs"] == pytest.approx(
        bits_per_byte(tiny, ByteTokenizer(), docs, 64).overall, rel=1e-6
    )
    assert both.overall == pytest.approx(
        (12 * both.by_source["code"] + 20 * both.by_source["docs"]) / 32
    )


def test_scores_have_an_interval_over_documents(tiny):
    given = documents("one", "two three", "naïve " * 8, "def f(x): return x")
    scores = bits_per_byte(tiny, ByteTokenizer(), given, 8).scores("bits_per_byte")
    alone = [bits_per_byte(tiny, ByteTokenizer(), [document], 8).overall for document in given]
    assert list(scores) == ["bits_per_byte", "bits_per_byte_low", "bits_per_byte_high"]
    low, high = scores["bits_per_byte_low"], scores["bits_per_byte_high"]
    assert min(alone) <= low < scores["bits_per_byte"] < high <= max(alone)
    one = bits_per_byte(tiny, ByteTokenizer(), given[:1], 8).scores("bits_per_byte")
    assert list(one) == ["bits_per_byte"], "one document says nothing of the others"


def test_packing_and_neighbours_change_nothing(tiny, monkeypatch):
    module = importlib.import_module("openqwen.evaluate.bits_per_byte")
    given = documents("one", "two three", "four five six seven eight nine ten")
    together = bits_per_byte(tiny, ByteTokenizer(), given, 8).overall
    monkeypatch.setattr(module, "_FORWARD_TOKENS", 1)
    monkeypatch.setattr(score, "SCORES", 1)
    assert bits_per_byte(tiny, ByteTokenizer(), given, 8).overall == pytest.approx(
        together, rel=1e-6
    )
    assert bits_per_byte(tiny, ByteTokenizer(), given[::-1], 8).overall == pytest.approx(
        together, rel=1e-6
    )


def test_training_mode_is_put_back(tiny):
    tiny.train()
    bits_per_byte(tiny, ByteTokenizer(), documents("x"), 8)
    assert tiny.training


@pytest.mark.parametrize("length", [1, 7, 8, 9, 12, 13, 50])
def test_windows_score_every_token_once_with_half_a_window_before(length):
    ids = list(range(length))
    scored = []
    for number, window in enumerate(windows(ids, 999, 8)):
        assert len(window.inputs) <= 8
        sequence = [999, *ids]
        before = len(window.inputs) - len(window.targets)
        assert number == 0 or before >= 4
        start = sequence.index(window.inputs[0])
        assert sequence[start : start + len(window.inputs)] == window.inputs
        assert sequence[start + before + 1 : start + len(window.inputs) + 1] == window.targets
        scored += window.targets
    assert scored == ids


def test_a_window_of_one_is_refused():
    with pytest.raises(ValueError, match="two tokens"):
        list(windows([1, 2], 0, 1))


def test_nothing_to_score_is_an_error():
    with pytest.raises(OpenQwenError, match="no held-out text"):
        bits_per_byte(Uniform(10), ByteTokenizer(), documents(""), 8)
    with pytest.raises(OpenQwenError, match="no held-out text"):
        gzip_bits_per_byte([])


def test_gzip_rate_is_gzips():
    texts = ["def f():\n    return 1\n" * 50, "häuser " * 40]
    data = "".join(texts).encode()
    assert gzip_bits_per_byte(texts) == pytest.approx(
        8 * len(gzip.compress(data, 9, mtime=0)) / len(data)
    )


def test_halves_share_no_document_and_both_have_every_source():
    given = (
        documents(*map(str, range(5)))
        + documents("y", "z", source="docs")
        + documents("alone", source="one")
    )
    development, test = halves(given)
    assert [d["text"] for d in development] == ["0", "2", "4", "y", "alone"]
    assert [d["text"] for d in test] == ["1", "3", "z"]


def test_budget_is_shared_by_the_sources_and_each_gets_something():
    given = documents(*["x" * 100] * 20) + documents(*["y" * 1000] * 3, source="docs")
    kept = within_budget(given, 1000)
    assert sum(d["source"] == "code" for d in kept) == 5
    assert sum(d["source"] == "docs" for d in kept) == 1
    assert kept == within_budget(given, 1000)
