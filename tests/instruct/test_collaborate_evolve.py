"""Evolutions by scripted models, and how failed ones are found."""

import json
from itertools import pairwise

import pytest
from method_runs import BAD, Marks
from scripted import Scripted, number, run

from openqwen.instruct.collaborate.evolve import Evolution, EvolveConfig, bare, failure
from openqwen.instruct.collaborate.pool import Instruction

TEXT = "Write a short poem about the sea and the people who live beside it in winter."
HARDER = (
    "Write a short poem of twelve lines about the sea and the people who live beside it in winter."
)


@pytest.mark.parametrize(
    ("evolved", "why"),
    [
        (HARDER, ""),
        (TEXT, "copied"),
        (TEXT.upper().replace(".", "!"), "copied"),
        (f"{TEXT} Please.", "copied"),
        ("Sure, I can help with that.", "answered"),
        ("Write a poem of twelve lines about the sea.", "shortened"),
        (f"Sure! Here is a poem. {TEXT} The waves are grey.", "answered"),
        (f"{TEXT} There are 3 + 4 = 7 houses by the shore in all.", "answered"),
        (f"{TEXT} For example\n```\nthe grey sea\n```", "answered"),
        (f"In the rewritten prompt you should also do this. {TEXT}", "talks of the prompt"),
        (
            "写一首关于大海和冬天住在海边的人们的短诗，要求十二行，押韵，并且提到灯塔和船。",
            "changed language",
        ),
        (
            "Écris un court poème de douze vers sur la mer et sur les gens qui vivent à côté "
            "d'elle pendant l'hiver.",
            "changed language",
        ),
        (
            "How do I bake bread for eight guests on Sunday in a small gas oven and a flat that "
            "stands 2,000 metres above the sea?",
            "another subject",
        ),
        ("…", "no words"),
    ],
)
def test_failed_evolutions_have_their_reason(evolved, why):
    assert failure(TEXT, evolved) == why


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Sure, but why? Explain it.", "Sure, but why? Explain it in detail with two examples."),
        (
            "What does 2 + 2 = 4 mean to a child of six?",
            "What does 2 + 2 = 4 mean to a shy child of barely six?",
        ),
        ("Prove it.", "Prove it by induction over n."),
        ("写一首诗。", "写一首关于冬天大海的诗，要求押韵。"),
    ],
)
def test_good_evolutions_pass(old, new):
    assert failure(old, new) == ""


def test_what_models_write_around_an_instruction_is_removed():
    assert bare('**New Instruction:** "Do it twice."') == "Do it twice."
    assert bare("Here is the rewritten prompt: Do it.") == "Do it."
    assert bare("新指令：写两次。") == "写两次。"
    assert bare("Request: Do it.") == "Do it."
    assert bare('"A" and "B"') == '"A" and "B"'
    assert bare(" Do it. ") == "Do it."


POOL = [Instruction(f"i{n}", f"Tell me about the town number {n} in the north.") for n in range(6)]


def harder(text, seed):
    """One more clause than the instruction in the prompt."""
    old = text.split("Instruction:\n")[1]
    return f"{old} Also name {number(old, seed) % 90 + 2} new streets of it there."


def evolve(tmp_path, model, pool=POOL, **values):
    config = EvolveConfig(**values)
    counts, found = run(tmp_path, Scripted(model), config, Evolution(config, pool))
    records = [json.loads(x) for x in found["instructions.jsonl"].decode().splitlines()]
    return counts, records, json.loads(found["synthesis.json"])


GOOD = Marks(("is it an answer", "request"), other=harder)


def test_each_stage_goes_on_from_the_last(tmp_path):
    counts, records, report = evolve(tmp_path, GOOD)
    assert counts["instructions"] == 6 * 4
    one = [r for r in records if r["id"].partition("~")[0] == "i2"]
    assert [r["level"] for r in one] == [0, 1, 2, 3]
    texts = [r["prompt"][0]["content"] for r in one]
    assert all(new.startswith(old) and len(new) > len(old) for old, new in pairwise(texts))
    drawn = {r["operator"] for r in records if r["level"]}
    assert drawn <= set(EvolveConfig().operators)
    assert len(drawn) > 2
    assert one[3]["origin"]["parents"] == ["i2"]
    assert report["gates"]["evolved"] == {"passed": 18, "of": 18, "yield": 1.0}


def test_the_tree_grows_from_the_original_each_time(tmp_path):
    seen = []

    def model(text, seed):
        seen.append(text)
        return "request" if "is it an answer" in text else harder(text, seed)

    _, records, _ = evolve(tmp_path, model, POOL[:1], form="tree", nodes=[3, 10])
    assert ["3 new nodes" in t for t in seen if "nodes" in t] == [True, False]
    assert "10 new nodes" in seen[2]
    assert all(t.endswith("Instruction:\n" + POOL[0].text) for t in seen if "nodes" in t)
    assert [r["operator"] for r in records if r["level"]] == ["tree", "tree"]


def test_a_failed_stage_is_dropped_and_the_next_goes_on_from_the_last_good_one(tmp_path):
    def model(text, seed):
        if "is it an answer" in text:
            return "answer" if "2 new" in text else "request"
        old = text.split("Instruction:\n")[1]
        return old if number(old, seed) % 2 else harder(text, seed)

    counts, records, report = evolve(tmp_path, model, levels=4)
    passed = report["gates"]["evolved"]["passed"]
    assert 0 < passed < 24
    assert counts["instructions"] == 6 + passed
    assert report["reasons"]["copied"] > 5
    assert sum(report["reasons"].values()) == counts["quarantined"] == 24 - passed
    for record in records:
        assert record["prompt"][0]["content"].startswith("Tell me about")


def test_the_judge_can_refuse(tmp_path):
    said = Marks(("is it an answer", "This is an answer."), other=harder)
    counts, records, report = evolve(tmp_path, said, originals=False)
    assert records == []
    assert report["reasons"] == {"answered, says the judge": 18}
    assert counts["instructions"] == 0
    counts, records, _ = evolve(tmp_path / "not asked", said, judged=False)
    assert counts["instructions"] == 24


def test_nonsense_leaves_the_originals(tmp_path):
    counts, records, _ = evolve(tmp_path, lambda text, seed: BAD[number(text) % len(BAD)])
    assert [r["id"] for r in records] == [i.id for i in POOL]
    assert counts["failures"] == 0
