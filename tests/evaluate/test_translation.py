"""BLEU of whole directions, beside sacrebleu's own."""

import random
import sys

import pytest
from sacrebleu.metrics import BLEU

from openqwen.evaluate.benchmark import load_benchmark
from openqwen.evaluate.items import load_items
from openqwen.evaluate.translation import bleu_scores
from openqwen.support.errors import OpenQwenError
from openqwen.tasks import Task, grade
from openqwen.tasks import translation as grader

WORDS = ["the", "cat", "sat", "on", "a", "mat", ",", "then", "it", "saw", "our", "dog", "ran"]
CHARACTERS = "猫坐在垫子上然后看见我们的狗跑得离家很远"


def rows(name, tokenizer, count=120, seed=0):
    """Translations with some words wrong, left out or exchanged."""
    draw = random.Random(seed)
    source, gap = (CHARACTERS, "") if tokenizer == "zh" else (WORDS, " ")
    made = []
    for number in range(count):
        right = draw.choices(source, k=draw.randint(3, 30))
        said = [draw.choice(source) if draw.random() < 0.3 else word for word in right]
        said = said[: draw.randint(2, len(said))]
        reference = {"translation": gap.join(right), "tokenizer": tokenizer}
        row = {"id": f"{name}/{number}", "category": name, "answer": f" {gap.join(said)}\n"}
        made.append(row | {"reference": reference, "status": "graded"})
    return made


def published(rows, tokenizer, **options):
    said = [row["answer"].strip() for row in rows]
    return BLEU(tokenize=tokenizer).corpus_score(
        said, [[row["reference"]["translation"] for row in rows]], **options
    )


def test_scores_and_intervals_are_sacrebleus():
    first, second = rows("deu-eng", "13a"), rows("eng-zho_simpl", "zh", count=90, seed=1)
    found = bleu_scores([*first, *second])
    theirs = {"deu-eng": published(first, "13a"), "eng-zho_simpl": published(second, "zh")}
    for name, one in theirs.items():
        assert found["categories"][name]["score"] == pytest.approx(one.score / 100, abs=1e-12)
    mean = sum(one.score for one in theirs.values()) / 200
    assert found["score"] == pytest.approx(mean, abs=1e-12)
    assert {name: one["n"] for name, one in found["categories"].items()} == {
        "deu-eng": 120,
        "eng-zho_simpl": 90,
    }
    drawn = published(first, "13a", n_bootstrap=1_000)  # its ± is half of its 95 % interval
    mine = found["categories"]["deu-eng"]
    assert (mine["high"] - mine["low"]) / 2 == pytest.approx(drawn._ci / 100, rel=0.15)
    # Two directions together are known better than the worse of them.
    assert 0 < found["high"] - found["low"] < mine["high"] - mine["low"] + 0.05
    assert found["low"] < found["score"] < found["high"]


def test_one_direction_has_no_table_and_an_answer_without_a_result_counts():
    some = rows("deu-eng", "13a", count=20)
    whole = bleu_scores(some)
    assert whole["categories"] == {}
    some[3]["status"] = "no_answer"
    assert bleu_scores(some)["score"] < whole["score"]
    some[3] |= {"status": "graded", "extracted": some[3]["reference"]["translation"]}
    assert bleu_scores(some)["score"] > whole["score"]


def test_a_sentence_is_graded_by_its_own_bleu():
    reference = {"translation": "The cat sat on the mat."}
    task = Task("1", [{"role": "user", "content": "Translate."}], "translation", reference)
    answers = [" The cat sat on the mat.\n", "The cat sat on a mat.", "", "Yes", "\ud800" * 30_000]
    found = grade([task] * len(answers), answers)
    assert [one.passed for one in found] == [True, False, False, False, False]
    theirs = BLEU(effective_order=True).sentence_score(answers[1], [reference["translation"]])
    assert found[1].score == pytest.approx(theirs.score / 100, abs=1e-12)
    assert (found[0].score, found[2].score) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("reference", "said"),
    [({}, "'translation'"), ({"translation": " "}, "'translation'"),
     ({"translation": "a", "tokenizer": "flores101"}, "'tokenizer' must be one of 13a")],
)  # fmt: skip
def test_a_wrong_reference_is_named(reference, said):
    task = Task("1", [{"role": "user", "content": "Translate."}], "translation", reference)
    with pytest.raises(OpenQwenError, match=said):
        grade([task], ["a"])


def test_without_the_package_it_says_what_to_install(monkeypatch):
    grader._metric.cache_clear()
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    task = Task("1", [{"role": "user", "content": "Hi"}], "translation", {"translation": "a"})
    try:
        with pytest.raises(OpenQwenError, match="openqwen\\[translation\\]"):
            grade([task], ["a"])
    finally:
        grader._metric.cache_clear()


def test_lines_keep_their_numbers_and_broken_ones_are_named(tmp_path):
    for part in ("dev", "devtest"):
        folder = tmp_path / "flores101_dataset" / part
        folder.mkdir(parents=True)
        for code in ("eng", "deu"):
            lines = [f"{code} {number}" for number in range(1, 8)]
            lines[1] = " "
            (folder / f"{code}.{part}").write_text("\r\n".join(lines) + "\n\n", encoding="utf-8")
    benchmark = load_benchmark("flores-base")
    items, _ = load_items(benchmark, tmp_path)
    pairs = {item.id: item.task.reference["translation"] for item in items}
    assert pairs["deu-eng/3"] == "eng 3"
    assert len(pairs) == 12
    (folder / "eng.devtest").write_bytes(b"eng 1\n\xff\n")
    with pytest.raises(OpenQwenError, match="cannot be read"):
        load_items(benchmark, tmp_path)
    (folder / "eng.devtest").write_text("eng 1\n", encoding="utf-8")
    with pytest.raises(OpenQwenError, match="cannot be computed"):
        load_items(benchmark, tmp_path)


def test_the_metric_needs_the_grader(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('extends = "flores-base"\n[answer]\ngrader = "exact"\n', encoding="utf-8")
    with pytest.raises(OpenQwenError, match='"bleu" needs the grader "translation"'):
        load_benchmark(str(path))
