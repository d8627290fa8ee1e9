"""The classifier against a dense solution and known ratings, its verb, and the filter it drives."""

import json
import random

import numpy as np
import pytest

from openqwen import cli
from openqwen.corpus import CorpusConfig, build_corpus
from openqwen.corpus.decide import score_weights
from openqwen.corpus.documents import read_documents
from openqwen.corpus.quality import (
    QualityClassifier,
    QualityConfig,
    agreement,
    all_features,
    features,
    read_ratings,
)
from openqwen.support.errors import OpenQwenError

GOOD = [
    "theorem",
    "proof",
    "lemma",
    "therefore",
    "function",
    "derivative",
    "energy",
    "molecule",
    "history",
    "century",
]
BAD = [
    "click",
    "subscribe",
    "buy",
    "cheap",
    "discount",
    "login",
    "cookie",
    "offer",
    "sale",
    "winner",
]
PLAIN = [f"word{n}" for n in range(300)]


def rated(count, seed=0):
    """Texts whose rating is the share of good words among good and bad, from 0 to 5."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        share = draw.random()
        marked = [draw.choice(GOOD if draw.random() < share else BAD) for _ in range(60)]
        words = marked + draw.choices(PLAIN, k=60)
        draw.shuffle(words)
        good = sum(word in GOOD for word in marked) / 60
        rows.append((" ".join(words), {"education": round(5 * good), "spam": 5 - round(5 * good)}))
    return rows


def dense(rows, size):
    matrix = np.zeros((len(rows.first) - 1, size))
    for n in range(len(matrix)):
        cut = slice(rows.first[n], rows.first[n + 1])
        matrix[n, rows.columns[cut]] = rows.values[cut]
    return matrix


def test_the_weights_are_those_of_the_closed_form():
    texts, ratings = zip(*rated(40))
    config = QualityConfig(bits=10, regularization=0.5)
    found = QualityClassifier.fit(texts, ratings, config)
    x = dense(features(texts, 10, 10**6), 1 << 10)
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1)
    y = np.array([row["education"] for row in ratings], float)
    exact = np.linalg.solve(x.T @ x + 0.5 * np.eye(1 << 10), x.T @ (y - y.mean()))
    assert found.dimensions == ("education", "spam")
    np.testing.assert_allclose(found.weights_CF[0], exact, atol=1e-5)


def test_batches_give_the_features_of_all_texts_at_once(monkeypatch):
    texts = [text for text, _ in rated(30)] + ["", "one"]
    whole = features(texts, 12, 10**6)
    monkeypatch.setattr("openqwen.tokenizer.fast._BATCH_SIZE", 3000)
    for a, b in zip(all_features(texts, 12, 10**6), whole, strict=True):
        np.testing.assert_allclose(a, b)


def test_ratings_of_unseen_texts_agree_and_survive_saving(tmp_path):
    texts, ratings = zip(*rated(400))
    classifier = QualityClassifier.fit(texts, ratings, QualityConfig())
    classifier.save(tmp_path, {})
    again = QualityClassifier.load(tmp_path)
    held, wanted = zip(*rated(100, seed=1))
    scores = list(again.scores(held))
    assert scores == list(classifier.scores(held)) or np.allclose(
        [s["education"] for s in scores], [s["education"] for s in classifier.scores(held)]
    )
    found = agreement([s["education"] for s in scores], [w["education"] for w in wanted], 3)
    assert found["spearman"] > 0.8
    assert found["f1"] > 0.8
    assert all(0 <= value <= 5 for s in scores for value in s.values())


def test_agreement_by_hand():
    found = agreement([1, 2, 3, 4], [1, 2, 4, 3], 3)
    assert found["spearman"] == pytest.approx(0.8)
    assert found["r2"] == pytest.approx(1 - 2 / 5)
    assert (found["precision"], found["recall"], found["f1"]) == (1, 1, 1)
    assert agreement([3, 3, 0], [5, 1, 4], 3)["f1"] == pytest.approx(0.5)
    assert agreement([1, 1], [2, 2], 3) == dict.fromkeys(
        ("spearman", "r2", "precision", "recall", "f1"), 0.0
    )


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}], "no rated text"),
        ([{"text": 3, "scores": {"a": 1}}], "no rated text"),
        ([{"text": "a", "scores": {"a": "high"}}], "not a number"),
        ([{"text": "a", "scores": {"a": 1}}, {"text": "b", "scores": {"b": 1}}], "others are for"),
        ([{"text": "a", "scores": {"a": 1}}] * 3, "too few"),
    ],
)
def test_ratings_that_cannot_be_used_are_named(tmp_path, rows, message):
    with pytest.raises(OpenQwenError, match=message):
        read_ratings(write(tmp_path / "ratings.jsonl", rows))


def test_the_verb_makes_a_classifier_that_the_corpus_stage_filters_with(tmp_path):
    rows = [{"text": text, "scores": scores} for text, scores in rated(200)]
    ratings = write(tmp_path / "ratings.jsonl", rows)
    folder = tmp_path / "quality"
    command = ["quality", "--ratings", str(ratings), "--output", str(folder)]
    assert cli.main([*command, "--bits", "14"]) == 0
    about = json.loads((folder / "quality.json").read_text(encoding="utf-8"))
    assert about["agreement"]["education"]["spearman"] > 0.7
    raw, out = tmp_path / "raw", tmp_path / "out"
    for source in ("one", "two"):
        (raw / source).mkdir(parents=True)
        for number, (text, _) in enumerate(rated(20, seed=source)):
            words = text.split()
            lines = [" ".join(words[at : at + 40]) + "." for at in range(0, len(words), 40)]
            (raw / source / f"{number}.txt").write_text("\n\n".join(lines), encoding="utf-8")
    out.mkdir()
    config = CorpusConfig(
        folder=raw,
        filters={"text": {"gopher": {"min_stop_words": 0}}},
        classifier=folder,
        score={"weights": {"spam": 0}, "keep": {"one": 0.5}},
        heldout_share=0.1,
    )
    build_corpus(config, [], out)
    kept = [*read_documents(out / "train.parquet"), *read_documents(out / "heldout.parquet")]
    assert sum(d["source"] == "one" for d in kept) == 10
    assert sum(d["source"] == "two" for d in kept) == 20
    assert {"education", "spam"} == kept[0]["meta"]["quality"].keys()
    report = json.loads((out / "corpus.json").read_text(encoding="utf-8"))
    (step,) = (step for step in report["steps"] if step["name"] == "score")
    assert step["reasons"]["low quality"]["documents"] == 10


def test_a_folder_without_a_classifier_is_named(tmp_path):
    with pytest.raises(OpenQwenError, match=r"no quality\.json"):
        QualityClassifier.load(tmp_path)


@pytest.mark.parametrize("weights", [{"spma": 1.0}, {"education": 0.0, "spam": 0.0}])
def test_weights_that_fit_no_dimension_are_refused(weights):
    with pytest.raises(OpenQwenError, match="dimension") as error:
        score_weights(["education", "spam"], weights)
    assert "education, spam" in str(error.value)


def test_ratings_that_are_all_alike_are_no_ratings(tmp_path, capsys):
    path = tmp_path / "ratings.jsonl"
    one = [{"text": f"text {n}", "scores": {"education": 0, "writing": 2}} for n in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in one), encoding="utf-8")
    command = ["quality", "--ratings", str(path), "--output", str(tmp_path / "made")]
    assert cli.main(command) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "All 30 documents have the same ratings: education 0, writing 2." in said
    one[3]["scores"]["writing"] = 4
    path.write_text("".join(json.dumps(row) + "\n" for row in one), encoding="utf-8")
    assert cli.main(command) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "all 30 ratings are the same (education 0): nothing is learnt" in said
