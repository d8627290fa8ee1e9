"""Banding against exact Jaccard by brute force, and the batch signatures against sets in plain
Python.
"""

import re

import numpy as np
import pytest

from openqwen.corpus import deduplicate
from openqwen.corpus.config import MinHashConfig
from openqwen.corpus.deduplicate import (
    Clusters,
    exact_key,
    first_occurrences,
    near_duplicates,
    shingle_hashes,
    signatures,
)
from openqwen.support.generators import Generators

CONFIG = MinHashConfig()


def shingle_set(text, n=5):
    words = re.findall(rb"[0-9A-Za-z_\x80-\xff]+", text.lower().encode())
    return {tuple(words[i : i + n]) for i in range(max(len(words) - n + 1, 1))}


def jaccard(a, b):
    return len(a & b) / len(a | b)


def edited(words, changes, draw):
    words = list(words)
    for position in draw.choice(len(words), changes, replace=False):
        words[position] = f"new{draw.integers(10**9)}"
    return " ".join(words)


def pairs_by_similarity(count=400, words=300):
    """Texts in pairs, of similarities from about 0.4 to 1."""
    draw = Generators(0)["pairs"]
    texts = []
    for index in range(count):
        original = [f"w{draw.integers(5000)}" for _ in range(words)]
        texts += [" ".join(original), edited(original, index % 24, draw)]
    return texts


def test_shingles_equal_sets_of_words_whatever_the_batch():
    texts = [
        "Hello, hello world! It is héllo again; and AGAIN.",
        "",
        "one two",
        "a b c d e",
        "a  b\nc-d e f",
        "ünï_x 1.5",
    ]
    shingles, offsets = shingle_hashes(texts, 5)
    parts = [shingles[offsets[i] : offsets[i + 1]].tolist() for i in range(len(texts))]
    assert [len(set(part)) for part in parts] == [len(shingle_set(text)) for text in texts]
    assert parts[3][0] == parts[4][0]
    for text, part in zip(
        texts, parts
    ):  # a word's hash does not depend on where in the batch it stands
        assert shingle_hashes([text], 5)[0].tolist() == part


def test_signatures_estimate_jaccard():
    texts = pairs_by_similarity(60)
    rows = signatures(texts, CONFIG)
    assert rows.shape == (120, 112)
    errors = [
        np.mean(rows[i] == rows[i + 1]) - jaccard(shingle_set(texts[i]), shingle_set(texts[i + 1]))
        for i in range(0, len(texts), 2)
    ]
    # The standard error of one estimate is at most 1 / (2 sqrt(112)) = 0.047.
    assert max(map(abs, errors)) < 4 * 0.047
    assert abs(np.mean(errors)) < 0.02


def test_recall_follows_the_banding_curve_against_exact_jaccard():
    texts = pairs_by_similarity()
    cluster = near_duplicates(signatures(texts, CONFIG), CONFIG)
    exact = np.array(
        [jaccard(shingle_set(texts[i]), shingle_set(texts[i + 1])) for i in range(0, len(texts), 2)]
    )
    found = cluster[1::2] == cluster[0::2]
    expected = 1 - (1 - exact**8) ** 14
    for low, high in ((0.0, 0.6), (0.6, 0.7), (0.7, 0.8), (0.8, 0.9), (0.9, 1.01)):
        within = (exact >= low) & (exact < high)
        spread = np.sqrt((expected[within] * (1 - expected[within])).sum()) / within.sum()
        assert within.sum() > 20
        assert found[within].mean() == pytest.approx(expected[within].mean(), abs=4 * spread + 1e-9)
    assert found[exact > 0.9].all()
    # Documents that share nothing are never joined.
    assert (cluster // 2 == np.arange(len(texts)) // 2).all()


def test_clusters_are_named_by_their_first_document_and_chain():
    rows = np.arange(5 * 112, dtype=np.uint64).reshape(5, 112)
    rows[3, :8] = rows[1, :8]
    rows[4, 8:16] = rows[3, 8:16]
    assert near_duplicates(rows, CONFIG).tolist() == [0, 1, 2, 1, 1]
    assert near_duplicates(rows[:0], CONFIG).tolist() == []


def test_exact_key_sees_words_and_not_white_space():
    assert exact_key("a  b\n") == exact_key("a b")
    assert exact_key("a b") != exact_key("ab")
    assert len(exact_key("")) == 16


def test_the_compiled_signatures_are_those_of_numpy(monkeypatch):
    if deduplicate.library() is None:
        pytest.skip("there is no compiler")
    texts = [*pairs_by_similarity(20), "", "one two", "Ünï_x 1.5, ÜNÏ", "\ud800 x"]
    for config in (CONFIG, MinHashConfig(shingle_words=1, bands=3, rows=5)):
        compiled = signatures(texts, config)
        with monkeypatch.context() as patch:
            patch.setattr(deduplicate, "library", lambda: None)
            assert (signatures(texts, config) == compiled).all()


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("most", [0, 7])
def test_first_occurrences_in_ranges_equal_a_dictionary(width, most):
    draw = Generators(0)["keys"]
    keys = draw.integers(0, 40, (500, width), dtype=np.uint64) << np.uint64(58)
    seen, expected = {}, []
    for number, key in enumerate(map(tuple, keys.tolist())):
        expected.append(seen.setdefault(key, number))
    found = np.full(500, -1)
    for numbers, first in first_occurrences(keys, most):
        assert (found[numbers] == -1).all()
        found[numbers] = first
    assert found.tolist() == expected
    assert list(first_occurrences(keys[:0], most)) == []


def test_clusters_do_not_depend_on_how_many_keys_are_sorted_at_a_time():
    draw = Generators(1)["keys"]
    bands = draw.integers(0, 300, (4, 400), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    found = []
    for most in (0, 10):
        clusters = Clusters(np.empty(400, np.int64))
        for keys in bands:
            clusters.link(keys, most)
        found.append([clusters.root(n) for n in range(400)])
    assert found[0] == found[1]
    assert len(set(found[0])) < 200
