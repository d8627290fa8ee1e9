"""Ids and texts against Hugging Face's `tokenizers`, fed the same vocabulary and rules."""

import unicodedata
from itertools import pairwise

import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Library

from openqwen.engine.text import TextStream
from openqwen.tokenizer import CONTROL_TOKENS
from openqwen.tokenizer.bpe import BytePairEncoder
from openqwen.tokenizer.pretokenize import PATTERN, split_words
from openqwen.tokenizer.unicode import normalize

fuzz = settings(max_examples=250, derandomize=True, deadline=None)
# All of the alphabets; of the ideographs, Hangul syllables and private planes, which hold thousands
# alike, every 16th.
CODE_POINTS = [
    *range(0x3400),
    *range(0x3400, 0xA000, 16),
    *range(0xA000, 0xAC00),
    *range(0xAC00, 0xD7A4, 16),
    *range(0xD7A4, 0xD800),
    *range(0xE000, 0xF900, 16),
    *range(0xF900, 0x17000),
    *range(0x17000, 0x19000, 16),
    *range(0x19000, 0x20000),
    *range(0x20000, 0x40000, 16),
    *range(0x40000, 0x110000, 256),
]


def all_matching(expression):
    pattern = regex.compile(expression)
    return [chr(c) for c in CODE_POINTS if pattern.match(chr(c))]


decomposed = [
    unicodedata.normalize("NFD", c) for c in all_matching(r"\p{Decomposition_Type=Canonical}")
]
pieces = st.one_of(
    st.characters(exclude_categories=["Cs"]),
    st.sampled_from(all_matching(r"\p{M}")),
    st.sampled_from(all_matching(r"[\p{N}\s\p{Cc}]")),
    st.sampled_from(decomposed),
    st.sampled_from(
        [
            "\n",
            "\r\n",
            " ",
            "  ",
            "\t",
            "'s",
            "'LL",
            "'ſ",
            "👩\u200d👩\u200d👧",
            "🇩🇪",
            "á",
            "한",
            "1",
            "x",
            "_",
        ]
    ),
    st.sampled_from(
        [token.content for token in CONTROL_TOKENS] + ["<|", "|>", "<tool_call", "<<|im_end|>>"]
    ),
)
strings = st.lists(pieces, max_size=12).map("".join)


@pytest.fixture(scope="module")
def library(saved):
    return Library.from_file(str(saved / "tokenizer.json"))


def test_real_text(trained, library, real_texts):
    for text in real_texts:
        assert trained.encode(text) == library.encode(text).ids
        assert trained.decode(trained.encode(text)) == unicodedata.normalize("NFC", text)


def test_fuzzed_text(trained, library):
    @fuzz
    @example("'ſ don'T 'S'll")
    @example("e\u0301\u0323 q\u0307\u0323 \u1100\u1161\u11a8")
    @example(
        "\u07fd\u0334\u0301\U00011935\U00011930"
    )  # newer marks and composites than the library knows
    @given(strings)
    def check(text):
        ids = trained.encode(text, allow_control=True)
        assert ids == library.encode(text).ids
        assert trained.decode(ids) == library.decode(ids)
        assert trained.decode(ids, skip_control=False) == library.decode(
            ids, skip_special_tokens=False
        )

    check()


def test_plain_text_never_makes_a_special_token(trained, library):
    """The other added tokens are found in it, as in the library where that splits special ones."""
    splitting = Library.from_str(library.to_str())
    splitting.encode_special_tokens = True
    special = {trained.control_ids[token.content] for token in CONTROL_TOKENS if token.special}

    @fuzz
    @given(strings)
    def check(text):
        ids = trained.encode(text)
        assert special.isdisjoint(ids)
        assert ids == splitting.encode(text).ids
        assert trained.decode(ids) == normalize(text)

    check()


def test_every_code_point_is_cut_as_in_the_library():
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    text = " ".join(f"b{chr(c)}b" for c in CODE_POINTS)
    assert split_words(text) == [word for word, _ in split.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    "frame", ["{}", "a{}\u0323", "\u0345{}", "q\u0301{}\u0334", "{0}\u0301{0}"]
)
def test_every_code_point_is_normalised_as_in_the_library(frame):
    text = "\n".join(frame.format(chr(c)) for c in CODE_POINTS)
    ours, library = normalize(text).split("\n"), normalizers.NFC().normalize_str(text).split("\n")
    assert ours == library


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\ud800", "\ufffd"),
        ("a\udc80b", "a\ufffdb"),
        ("\ud83d\ude00", "😀"),
        ("<|im_end|>\udfff", "<|im_end|>\ufffd"),
    ],
)
def test_lone_surrogates_become_replacement_characters(trained, text, expected):
    for allow_control in (False, True):
        assert trained.decode(trained.encode(text, allow_control), skip_control=False) == expected


def test_any_ids_decode_as_in_the_library_and_stream_to_the_same_text(trained, library):
    @fuzz
    @given(st.lists(st.integers(0, trained.vocab_size + 5), max_size=30), st.booleans())
    def check(ids, skip):
        text = trained.decode(ids, skip)
        assert text == library.decode(ids, skip_special_tokens=skip)
        if skip:
            stream = TextStream(trained)
            assert "".join(map(stream.push, ids)) + stream.finish() == text

    check()


def test_stream_never_shows_half_a_character(trained):
    @fuzz
    @given(
        st.text(
            st.characters(
                min_codepoint=0x80, exclude_categories=["Cs"], exclude_characters="\ufffd"
            )
        )
    )
    def check(text):
        text = normalize(text)
        stream, seen = TextStream(trained), ""
        for i in trained.encode(text):
            seen += stream.push(i)
            assert text.startswith(seen)
        assert seen == text
        assert stream.finish() == ""

    check()


def test_special_control_tokens_are_hidden_and_tool_calls_shown(trained):
    ids = trained.encode("<tool_call>x</tool_call><|im_end|><|endoftext|>", allow_control=True)
    assert len(ids) == 5
    assert trained.decode(ids) == "<tool_call>x</tool_call>"
    assert (
        trained.decode(ids, skip_control=False) == "<tool_call>x</tool_call><|im_end|><|endoftext|>"
    )


def test_merging_equals_the_definition():
    """Brute force: as long as there is one, merge the leftmost pair of the lowest rank."""
    merges = [
        (0, 1, 256),
        (256, 0, 257),
        (1, 1, 258),
        (0, 0, 259),
        (257, 256, 260),
        (258, 259, 261),
    ]
    ranks = {(a, b): (rank, merged) for rank, (a, b, merged) in enumerate(merges)}

    def slow(ids):
        while found := [
            (ranks[pair][0], i) for i, pair in enumerate(pairwise(ids)) if pair in ranks
        ]:
            _, i = min(found)
            ids = [*ids[:i], ranks[ids[i], ids[i + 1]][1], *ids[i + 2 :]]
        return ids

    encoder = BytePairEncoder([bytes([b]) for b in range(256)], merges)

    @fuzz
    @given(st.lists(st.integers(0, 2), max_size=60))
    def check(word):
        assert encoder.merge(bytes(word)) == slow(word)

    check()


def test_a_word_of_a_hundred_thousand_letters_takes_no_quadratic_time(trained, library):
    text = "abcab" * 20_000
    assert trained.encode(text) == library.encode(text).ids


def test_the_word_cache_is_bounded(trained, monkeypatch):
    monkeypatch.setattr("openqwen.tokenizer.bpe._CACHED_WORDS", 10)
    encoder = BytePairEncoder([bytes([b]) for b in range(256)], [])
    text = " ".join(f"{a}{b}" for a in "abcdefgh" for b in "abcdefgh")
    assert bytes(encoder.encode(text)) == text.encode()
    assert len(encoder._cache) <= 10
