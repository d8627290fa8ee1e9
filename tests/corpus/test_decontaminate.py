"""Qwen's rule against its literal form; planted copies are found, other text is not."""

import gzip
import json
import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openqwen.corpus.config import CorpusConfig
from openqwen.corpus.decontaminate import EvaluationIndex, common_subsequence, read_items
from openqwen.corpus.words import hash_words
from openqwen.support.errors import OpenQwenError

WORD = re.compile(r"[\u3005\u3040-\u9fff]|[0-9A-Za-z_\u00c0-\u024f]+")
TEXTS = [
    "The cat, the dog; and THE cat_1!",
    "他说：你好，世界。abc你好 def",
    "Wörter – »groß« … and “quotes” of it",
    "ＡＢ，ＡＢ！ かな カナ 々々",
    "",
    "x",
]


def tokens(text):
    return re.findall(
        r"[\u3005\u3040-\u9fff]|[0-9A-Za-z_\u00c0-\u024f\uff21-\uff5a»«]+", text.lower()
    )


def test_words_of_all_scripts_are_those_of_a_regular_expression():
    words = hash_words(TEXTS, all_scripts=True)
    parts = np.split(words.hashes, words.first[1:-1])
    names: dict[int, str] = {}
    for text, part in zip(TEXTS, parts, strict=True):
        wanted = tokens(text)
        assert len(part) == len(wanted), text
        for number, name in zip(part.tolist(), wanted, strict=True):
            assert names.setdefault(number, name) == name
    assert len(set(names.values())) == len(names)


def dense_lcs(a, b):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            longer = max(table[i][j + 1], table[i + 1][j])
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else longer
    return table[-1][-1]


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), max_size=90), st.lists(st.integers(0, 5), max_size=40))
def test_bit_parallel_lcs_is_that_of_dynamic_programming(a, b):
    assert common_subsequence(a, b) == dense_lcs(a, b)


def prose(count, seed, words=4000):
    """Random words with the frequencies of a language: the n-th word is seen 1/n as often."""
    weights = [1 / (n + 1) for n in range(words)]
    return random.Random(seed).choices([f"w{n}" for n in range(words)], weights, k=count)


ITEM = prose(60, 1)
INDEX = EvaluationIndex({"set:1": " ".join(ITEM), "set:2": "too short to be found"})


def changed(every, seed=0):
    """The item with every n-th word replaced, left out, or followed by another word, in turn."""
    out = []
    for number, word in enumerate(ITEM):
        kind = (number // every) % 3 if number % every == every - 1 else None
        out += {0: [f"new{number}"], 1: [], 2: [word, f"new{number}"], None: [word]}[kind]
    return out


@pytest.mark.parametrize("every", [7, 10, 100])
@pytest.mark.parametrize("around", [0, 50, 5000])
def test_changed_copies_are_found_wherever_they_stand(every, around):
    text = " ".join(prose(around, 2) + changed(every) + prose(around, 3))
    (match,) = INDEX.contamination([text])
    assert match is not None
    assert match.where == "set:1"
    assert match.words == 60
    assert match.common >= dense_lcs(ITEM, changed(every))


def test_other_text_is_kept_though_it_holds_the_words_in_order():
    texts = [" ".join(prose(count, seed)) for seed, count in enumerate((30, 300, 30_000), 10)]
    texts.append(" filler filler ".join(ITEM))  # all words in order, none next to each other
    texts.append(" ".join(ITEM[:20] + prose(100, 5)))  # 20 of 60 words
    assert list(INDEX.contamination(texts)) == [None] * 5
    assert INDEX.too_short == 1


def test_a_short_text_that_an_item_holds_is_dropped():
    (match,) = INDEX.contamination([" ".join(ITEM[10:30])])
    assert match is not None
    assert match.common == 20
    assert list(INDEX.contamination([" ".join(ITEM[10:22])])) == [None]  # 12 words


def test_analysis_counts_any_13_words_in_a_row():
    run = " ".join(prose(40, 6) + ITEM[7:20] + prose(40, 7))
    assert INDEX.shared_runs(["nothing", run]) == {"set:1"}
    short = " ".join(prose(40, 6) + ITEM[7:19] + prose(40, 7))
    assert INDEX.shared_runs([short]) == set()


def test_two_texts_of_a_batch_do_not_run_into_each_other():
    assert INDEX.shared_runs([" ".join(ITEM[:10]), " ".join(ITEM[10:20])]) == set()


def test_case_punctuation_and_chinese_do_not_hide_a_copy():
    chinese = "小明有五个苹果，他给了小红两个，又买了三个。请问小明现在一共有多少个苹果？"
    index = EvaluationIndex({"zh:1": chinese})
    (match,) = index.contamination(
        ["题目（改编）：" + chinese.replace("，", " ").replace("五", "六")]
    )
    assert match is not None
    shouted = "; ".join(word.upper() for word in ITEM)
    assert [m is not None for m in INDEX.contamination([shouted])] == [True]


def test_items_are_all_texts_of_a_files_records(tmp_path):
    rows = [{"question": "a b", "turns": ["c", {"deep": "d"}], "number": 3}, {"question": "e"}]
    with gzip.open(tmp_path / "set.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    texts = read_items([tmp_path])
    assert sorted(texts.values()) == ["a b", "c", "d", "e"]
    (deep,) = (where for where, text in texts.items() if text == "d")
    assert deep.endswith("set.jsonl.gz, record 1:turns:1:deep")
    with pytest.raises(OpenQwenError, match="does not exist"):
        read_items([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(OpenQwenError, match="holds a text"):
        read_items([tmp_path / "empty"])


def test_the_corpus_stage_drops_and_counts_contaminated_documents(tmp_path):
    from openqwen.corpus.build import build_corpus

    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    out.mkdir()
    source = prose(400, 20, words=300)
    rules = {"min_stop_words": 0, "min_alphabetic_words": 0, "min_word_length": 1}
    for number in range(6):
        words = prose(300, 30 + number) + (ITEM if number == 2 else source[:60])
        lines = [" ".join(words[at : at + 40]) + "." for at in range(0, len(words), 40)]
        (raw / f"{number}.txt").write_text("\n\n".join(lines), encoding="utf-8")
    (tmp_path / "set.jsonl").write_text(json.dumps({"text": " ".join(ITEM)}), encoding="utf-8")
    config = CorpusConfig(
        folder=raw,
        decontaminate=[tmp_path / "set.jsonl"],
        filters={"text": {"gopher": rules}},
        heldout_share=0.3,
    )
    build_corpus(config, [], out)
    report = json.loads((out / "corpus.json").read_text(encoding="utf-8"))
    (step,) = (step for step in report["steps"] if "decontaminate" in json.dumps(step))
    assert "60 of 60 words" in json.dumps(step)
    assert "set.jsonl, record 1:text" in json.dumps(step)
