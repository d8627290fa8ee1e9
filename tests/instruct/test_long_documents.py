"""`openqwen synthesize long`: each kind can be undone, and its end needs a place far away."""

import json
import re

import numpy as np
import pytest
import yaml

from openqwen.cli import main
from openqwen.instruct.synthesize.inputs import DATA
from openqwen.instruct.synthesize.long_documents import (
    keyword,
    middle,
    natural,
    neighbour,
    order,
)

WORDS = yaml.safe_load((DATA / "long_documents.yaml").read_text(encoding="utf-8"))
ENGLISH = [
    f"Chapter {n} tells of keeper{chr(97 + n)} and the tower by the water." for n in range(20)
]
CHINESE = [f"第{c}章讲述守塔人和海上的船。" for c in "甲乙丙丁戊己庚辛"]


@pytest.fixture(params=[("en", ENGLISH), ("zh", CHINESE)], ids=["en", "zh"])
def text(request):
    language, paragraphs = request.param
    return paragraphs, WORDS[language]


def rngs():
    return [np.random.default_rng(seed) for seed in range(30)]


def test_a_gap_is_filled_at_the_end(text):
    paragraphs, words = text
    for rng in rngs():
        before, _, rest = middle(paragraphs, rng, words).partition(words["gap"])
        after, _, gap = rest.partition(words["middle"])
        assert before.strip()
        assert after.strip()
        whole = [part.strip() for part in (before, gap, after)]
        assert "\n\n".join(whole) == natural(paragraphs, rng, words)


def test_all_paragraphs_with_a_word_are_repeated(text):
    paragraphs, words = text
    lead, tail = words["keyword"].split("{word}")
    for rng in rngs():
        found = keyword(paragraphs, rng, words)
        assert found.startswith("\n\n".join(paragraphs))
        ((word, end),) = re.findall(f"{re.escape(lead)}(.+?){re.escape(tail)}\n\n(.+)", found, re.S)
        assert end.split("\n\n") == [p for p in paragraphs if word in p]
        assert 1 <= len(end.split("\n\n")) <= 3


def test_a_paragraph_after_another_one(text):
    paragraphs, words = text
    for rng in rngs():
        *_, asked, answer = neighbour(paragraphs, rng, words).split("\n\n")
        before = paragraphs[paragraphs.index(answer) - 1]
        assert asked == words["neighbour"].format(start=before[:60])


def test_the_right_order_of_parts(text):
    paragraphs, words = text
    orders = set()
    for rng in rngs():
        body, _, numbers = order(paragraphs, rng, words).rpartition(f"\n\n{words['order']} ")
        parts = re.split(r"(?:^|\n\n)\[\d+\]\n", body)[1:]
        right = [parts[int(number) - 1] for number in numbers.split(", ")]
        assert "\n\n".join(right) == "\n\n".join(paragraphs)
        orders.add(numbers)
    assert len(orders) > 20


@pytest.mark.parametrize("make", [middle, keyword, neighbour, order])
@pytest.mark.parametrize("paragraphs", [["One."], ["Twice the same."] * 2, ["a", "a"]])
def test_what_is_too_short_gives_nothing(make, paragraphs):
    assert make(paragraphs, np.random.default_rng(0), WORDS["en"]) == ""


def test_the_command(tmp_path, capsys):
    (tmp_path / "raw").mkdir()
    for n in range(12):
        (tmp_path / f"raw/{n}.txt").write_text("\n\n".join(f"{n}: {line}" for line in ENGLISH))
    (tmp_path / "raw/short.txt").write_text("Short.")
    (tmp_path / "raw/zh.txt").write_text("\n\n".join(CHINESE * 9))
    words = ["synthesize", "long", "--documents", str(tmp_path / "raw"), "--longest", "2000"]
    for name in ("one", "two"):
        assert main([*words, "--shortest", "500", "--output", str(tmp_path / name)]) == 0
    lines = [(tmp_path / name / "documents.jsonl").read_text() for name in ("one", "two")]
    assert lines[0] == lines[1]
    records = [json.loads(line) for line in lines[0].splitlines()]
    assert len(records) == 13
    assert len({record["origin"]["kind"] for record in records}) >= 4
    assert all(record["id"].startswith(record["origin"]["parents"][0]) for record in records)
    assert {record["language"] for record in records} == {"en", "zh"}
    metrics = json.loads((tmp_path / "one/manifest.json").read_text())["metrics"]
    assert (metrics["documents"], metrics["too_short"]) == (13, 1)
    assert main([*words, "--shortest", "1900", "--output", str(tmp_path / "no")]) == 1
    assert "No document has 1,900 characters" in capsys.readouterr().err
