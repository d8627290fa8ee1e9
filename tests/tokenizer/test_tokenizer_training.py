"""Training against Hugging Face's BpeTrainer under the same rules, and the limits of the
configuration.
"""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from openqwen.support.errors import OpenQwenError
from openqwen.tokenizer import (
    CONTROL_TOKENS,
    TokenizerConfig,
    take_bytes,
    tokenizer_statistics,
    train_tokenizer,
)
from openqwen.tokenizer.fast import library
from openqwen.tokenizer.fast_train import learn_merges
from openqwen.tokenizer.pretokenize import PATTERN
from openqwen.tokenizer.train import count_words, train_bpe
from openqwen.tokenizer.unicode import normalize


def library_model(texts, vocabulary, min_frequency):
    other = Library(models.BPE())
    other.normalizer = normalizers.NFC()
    other.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=min_frequency,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    other.train_from_iterator(texts, trainer)
    return json.loads(other.to_str())["model"]


def our_model(tokenizer, folder):
    tokenizer.save(folder)
    return json.loads((folder / "tokenizer.json").read_text())["model"]


def assert_same_model(texts, vocabulary, min_frequency, folder):
    ours = our_model(
        train_tokenizer(texts, TokenizerConfig(vocabulary=vocabulary, min_frequency=min_frequency)),
        folder,
    )
    theirs = library_model(texts, vocabulary, min_frequency)
    assert ours["merges"] == theirs["merges"]
    assert ours["vocab"] == theirs["vocab"]
    return ours


def test_merges_equal_the_library_on_real_text(real_texts, tmp_path):
    model = assert_same_model(real_texts, 2500, 2, tmp_path)
    assert len(model["vocab"]) == 2500


@pytest.mark.parametrize(
    "texts",
    [
        ["aaaaaaa aaaa aaa aa a"],  # a pair that overlaps itself
        ["abababab babababa abba"],
        ["12345 67890 1111", "١٢٣"],  # digits never merge with each other
        ["cafe\u0301 café", "한국어 한국", "日本語 日本"],  # NFC, several bytes a character
        ["zy yx xz zy yx xz " * 3],  # nothing but ties
    ],
)
def test_merges_equal_the_library_on_small_hard_texts(texts, tmp_path):
    assert_same_model(
        texts, 400, 1, tmp_path
    )  # far more than there are pairs: both stop by themselves


fuzz = settings(max_examples=150, derandomize=True, deadline=None)


def learned_both_ways(texts, vocabulary, min_frequency, threads=1):
    """(compiled, Python): (different words, merges) of each."""
    if library() is None:
        pytest.skip("there is no C++ compiler here")
    texts = list(map(normalize, texts))
    counts = count_words(texts)
    python = len(counts), train_bpe(counts, vocabulary, min_frequency)
    return learn_merges(library(), texts, vocabulary, min_frequency, threads), python


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_compiled_trainer_learns_what_the_python_one_does(real_texts, monkeypatch, threads):
    monkeypatch.setattr("openqwen.tokenizer.fast._BATCH_SIZE", 10_000)
    compiled, python = learned_both_ways(
        [*real_texts, *real_texts[:20], "", "é漢"], 1500, 2, threads
    )
    assert compiled == python


def test_the_compiled_trainer_learns_what_the_python_one_does_from_fuzzed_text():
    alphabets = st.sampled_from(["ab", "aab ", "abc'12", "é漢ab \n", "😀ſ\u0301a "])
    texts = st.lists(alphabets.flatmap(lambda letters: st.text(letters, max_size=60)), max_size=6)

    @fuzz
    @given(
        st.one_of(texts, st.lists(st.text(max_size=30), max_size=4)),
        st.integers(256, 330),
        st.integers(1, 3),
    )
    def check(texts, vocabulary, min_frequency):
        compiled, python = learned_both_ways(texts, vocabulary, min_frequency)
        assert compiled == python

    check()


def test_equal_counts_are_settled_by_the_smaller_ids():
    assert train_bpe({"ba": 3, "ab": 3, "cd": 3}, 259, 1) == [
        (64, 65),
        (65, 64),
        (66, 67),
    ]  # "!" is id 0, so "a" is 64


def test_min_frequency_ends_the_training():
    assert train_bpe({"ab": 3, "cd": 2}, 300, 3) == [(64, 65)]


def test_control_tokens_follow_the_regular_ones(trained):
    assert trained.vocab_size == 1500 + 22
    assert [trained.control_ids[token.content] for token in CONTROL_TOKENS] == list(
        range(1500, 1522)
    )
    assert [token.special for token in CONTROL_TOKENS] == [True] * 14 + [False] * 8
    assert (trained.endoftext_id, trained.im_start_id, trained.eos_id) == (1500, 1501, 1502)


def test_training_reads_no_more_than_its_limit():
    assert list(take_bytes(["ab", "cé", "never"], 5)) == ["ab", "cé"]
    assert list(take_bytes(["ab", "cé", "never"], 4)) == ["ab", "c"]  # not half of the é
    assert list(take_bytes(["ab"], 10)) == ["ab"]

    def endless():
        while True:
            yield "some text "

    assert (
        train_tokenizer(endless(), TokenizerConfig(max_bytes=1000, vocabulary=260)).vocab_size
        == 260 + 22
    )


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_no_text_is_an_error(texts):
    with pytest.raises(OpenQwenError, match="no text"):
        train_tokenizer(texts, TokenizerConfig())


def test_statistics(trained, real_texts):
    payload = tokenizer_statistics(
        trained, {"topics": real_texts, "empty": [""]}, training_bytes=123
    )
    assert json.loads(json.dumps(payload)) == payload
    assert (payload["vocabulary"], payload["merges"], payload["training_bytes"]) == (
        1522,
        1244,
        123,
    )
    assert set(payload["bytes_per_token"]) == {"topics"}
    sample = real_texts[:200]
    expected = sum(len(text.encode()) for text in sample) / sum(
        len(trained.encode(text)) for text in sample
    )
    assert payload["bytes_per_token"]["topics"] == pytest.approx(expected)
    assert expected > 2.5
    lengths = [len(token.encode()) for token in payload["longest"]]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == max(map(len, trained.vocabulary))
    example = payload["examples"][0]
    assert "".join(example["tokens"]) == example["text"]
