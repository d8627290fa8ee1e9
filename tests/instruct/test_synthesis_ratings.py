"""Ratings of documents by a scripted model, and the classifier that learns from them."""

import json
import random

import pytest
from scripted import Scripted, run

from openqwen.corpus.quality import read_ratings
from openqwen.instruct.synthesize.methods.ratings import Ratings, RatingsConfig

CONFIG = RatingsConfig(dimensions=["education", "writing"])


def folder_of(tmp_path, texts):
    folder = tmp_path / "documents"
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number:03}.txt").write_text(text, encoding="utf-8")
    return folder


def rows_of(results, name):
    return [json.loads(line) for line in results[f"{name}.jsonl"].decode().splitlines()]


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        ('{"education": 3, "writing": 5}', None),
        ('Here it is:\n```json\n{"education": 3.0, "writing": 5,}\n```', None),
        ("education: 3", "no JSON object"),
        ('{"education": 3}', "no number for writing"),
        ('{"education": true, "writing": 1}', "no number for education"),
        ('{"education": 3, "writing": 6}', "writing is not on the scale"),
        ('{"education": NaN, "writing": 1}', "no JSON object"),
        ("", "no JSON object"),
    ],
)
def test_an_answer_is_a_rating_or_is_refused_with_its_fault(tmp_path, said, fault):
    folder = folder_of(tmp_path, ["A text about bread and salt."])
    method = Ratings(CONFIG, folder)
    counts, results = run(tmp_path, Scripted(lambda text, seed: said), CONFIG, method)
    rows, refused = rows_of(results, "ratings"), rows_of(results, "quarantine")
    if fault is None:
        (row,) = rows
        assert row["scores"] == {"education": 3.0, "writing": 5.0}
        assert row["text"].strip() == "A text about bread and salt."
        assert row["origin"]["method"] == "ratings"
        assert counts["ratings"] == 1
    else:
        assert not rows
        assert refused[0]["reason"] == f"rated: {fault}"


def test_ratings_are_what_the_classifier_reads(tmp_path):
    draw = random.Random(0)
    texts = [f"text {n} " + " ".join(draw.choices(["good", "bad"], k=30)) for n in range(30)]

    def answer(text, seed):
        shown = text.split("-----")[1]
        return json.dumps({"education": shown.count("good") // 6, "writing": 2})

    method = Ratings(CONFIG, folder_of(tmp_path, texts))
    _, results = run(tmp_path, Scripted(answer), CONFIG, method)
    path = tmp_path / "ratings.jsonl"
    path.write_bytes(results["ratings.jsonl"])
    found, ratings = read_ratings(path)
    assert len(found) == 30
    assert {row["education"] for row in ratings} <= {0, 1, 2, 3, 4, 5}


def test_a_share_of_the_documents_is_chosen_by_their_ids(tmp_path):
    folder = folder_of(tmp_path, [f"text {n}" for n in range(200)])
    half = RatingsConfig(share=0.5)
    chosen = [item.id for item in Ratings(half, folder).items()]
    assert 60 < len(chosen) < 140
    assert chosen == [item.id for item in Ratings(half, folder).items()]
    quarter = {item.id for item in Ratings(RatingsConfig(share=0.25), folder).items()}
    assert quarter < set(chosen)
