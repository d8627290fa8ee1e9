"""The published filters against datatrove's decisions, and the compiled counts against plain ones."""

import json
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openqwen.corpus import counts
from openqwen.corpus.config import PublishedRules
from openqwen.corpus.counts import EnglishCounter, plain_counts, plain_repeated, plain_top
from openqwen.corpus.english import english_words, split_stretch
from openqwen.corpus.published import PublishedFilters, no_text

# Written by benchmarks/filters_datatrove.py: texts with what datatrove 0.10.1 decides of each.
GOLDEN = Path(__file__).with_name("filters_datatrove.jsonl").read_text(encoding="utf-8")
CASES = [json.loads(line) for line in GOLDEN.splitlines()]
REASONS = {
    "dup_para_frac": "duplicate paragraphs",
    "dup_para_char_frac": "duplicate paragraph characters",
    "dup_line_frac": "duplicate lines",
    "dup_line_char_frac": "duplicate line characters",
    "gopher_short_doc": "word count",
    "gopher_long_doc": "word count",
    "gopher_below_avg_threshold": "mean word length",
    "gopher_above_avg_threshold": "mean word length",
    "gopher_too_many_hashes": "symbols per word",
    "gopher_too_many_ellipsis": "symbols per word",
    "gopher_too_many_bullets": "bullet lines",
    "gopher_too_many_end_ellipsis": "ellipsis lines",
    "gopher_below_alpha_threshold": "alphabetic words",
    "gopher_enough_stop_words": "stop words",
    "lorem_ipsum": "lorem ipsum",
    "curly_bracket": "curly bracket",
    "too_few_sentences": "sentence count",
    "line_punct_ratio": "punctuated lines",
    "short_line_ratio": "short lines",
    "char_dup_ratio": "repeated line characters",
    "list_ratio": "newlines per word",
    "": "",
    **{f"top_{n}_gram": f"top {n}-grams" for n in (2, 3, 4)},
    **{f"duplicated_{n}_n_grams": f"duplicate {n}-grams" for n in range(5, 11)},
}


@pytest.fixture(params=["compiled", "plain"])
def filters(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(counts, "library", lambda: None)
    elif counts.library() is None:
        pytest.skip("there is no compiler")
    return PublishedFilters(PublishedRules())


@pytest.mark.parametrize("preset", ["gopher", "c4", "fineweb"])
def test_decisions_and_reasons_are_datatroves(filters, preset):
    found = []
    for case in CASES:
        failed = filters.apply(case["text"], preset).failed
        found.append([failed is None, failed.rule if failed else ""])
    assert found == [[case[preset][0], REASONS[case[preset][1]]] for case in CASES]
    assert {kept for kept, _ in found} == {True, False}


@pytest.mark.parametrize(
    ("stretch", "words"),
    [
        ("don't", "do n't"),
        ("DON'T", "DON'T"),
        ("Mr.", "Mr."),
        ('("Hello,"', '( " Hello , "'),
        ("word).", "word ) ."),
        ("U.S.A.", "U.S.A."),
        ("U.S.", "U.S."),
        ("well-known", "well - known"),
        ("http://a.com/x?y", "http://a.com/x?y"),
        ("3.5%", "3.5 %"),
        ("10kg", "10 kg"),
        ("end....", "end ...."),
        ("foo.Bar", "foo . Bar"),
        ("(a.", "( a."),
        ("$5.00", "$ 5.00"),
        ("hello:)", "hello :)"),
        ("and/or", "and/or"),
        ("he'd've", "he 'd 've"),
    ],
)
def test_stretches_are_split_as_spacy_splits_them(stretch, words):
    assert split_stretch(stretch) == tuple(words.split())


PIECES = ["word", "Word", "A", "is", "the", "don't", "Mr.", "co", "U.S.", "x-y", "3.5", ":", ")", "(", '"', ".", ",", "...", "!", "’s", "é", "…", " ", " ", "  ", "\n", "\t", "\u00a0", "字"]  # fmt: skip


@cache
def one_counter():
    return EnglishCounter(["the", "is", "word"])


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=40))
def test_compiled_counts_equal_plain_ones(pieces):
    text, stop, counter = "".join(pieces), ["the", "is", "word"], one_counter()
    words = english_words(text)
    assert counter.read(text) == plain_counts(words, text, stop)
    for n in (1, 2, 3, 5):
        assert counter.top_characters(n) == plain_top(words, n)
        assert counter.repeated_characters(n) == plain_repeated(words, n)


def test_a_full_table_begins_anew(monkeypatch):
    monkeypatch.setattr(counts, "_TABLE", 1)
    monkeypatch.setattr(counts, "_UNKNOWN", 2)
    counter = EnglishCounter([])
    text = " ".join(f"{n}-a" for n in range(9))
    assert counter.read(text).words == 27


def test_refinedwebs_lines_are_cut_and_too_many_drop_the_document():
    filters = PublishedFilters(PublishedRules())
    for line in (
        "3 likes",
        "HOME AND ABOUT US",
        "2024 | 12",
        "Menu",
        "Read more...",
        "2 items in cart",
    ):
        assert no_text(line), line
    for line in ("He had 3 likes, which was odd.", "It is well known what an Ox can do."):
        assert not no_text(line), line
    page = next(case["text"] for case in CASES if case["fineweb"][0])
    done = filters.apply(page + "\n3 likes", "refinedweb")
    assert (done.text, done.cut, done.failed) == (page, ["3 likes"], None)
    dropped = filters.apply(page + "\n3 likes" + "\nSHARE THIS" * 40, "refinedweb")
    assert dropped.failed
