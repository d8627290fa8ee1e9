"""Repurposing and the constitution, with scripted answers."""

import json

import pytest
import yaml
from method_runs import BAD, Marks, lines, make

from openqwen.instruct.synthesize.inputs import DATA
from openqwen.instruct.synthesize.methods.adapt import foreign
from openqwen.instruct.synthesize.methods.constitution import (
    Constitution,
    ConstitutionConfig,
    read_principles,
)
from openqwen.instruct.synthesize.methods.repurpose import Repurpose, RepurposeConfig
from openqwen.support.errors import OpenQwenError

# --- repurpose


PARAGRAPH = (
    "The lamp in the tower was lit at dusk, as it had been for a hundred years. The keeper {n} "
    "climbed the stairs, counted them aloud, and thought of the ships that would pass that night. "
)


def book(count):
    return "\n\n".join(PARAGRAPH.format(n=n) + PARAGRAPH.format(n=-n) for n in range(count))


def repurpose(tmp_path, text, **settings):
    source = tmp_path / "book.txt"
    source.write_text(text)
    return Repurpose(RepurposeConfig(**{"longest": 1000, **settings}), source, seed=1)


def fits(text, seed):
    """The judge prefers the keeper's tale to whatever the model wrote."""
    return "Score: 9" if "counted them aloud" in text else "Score: 5"


STORY = Marks(
    ("Somebody asked a writer", lambda text, seed: f"Write of a lighthouse, tale {seed}."),
    ("How well does the text", fits),
    other="It was a dark night. " + "The sea was loud, the wind was cold, and he slept. ",
)


def test_documents_become_answers(tmp_path):
    method = repurpose(tmp_path, book(20), per_document=3)
    d, p, gates, _ = make(tmp_path, method, STORY)
    assert len(d) == len(p) == 3
    for record, pair in zip(d, p):
        question, answer = (m["content"] for m in record["messages"])
        assert question.startswith("Write of a lighthouse")
        assert answer in book(20)
        assert 400 <= len(answer) <= 1000
        assert pair["chosen"][0]["content"] == answer
        assert pair["rejected"][0]["content"].startswith("It was a dark night")
        (parent,) = record["origin"]["parents"]
        assert parent.startswith("book.txt/")
        assert record["origin"]["detail"] in (1, 2, 3)
    assert gates["model's own is worse"] == (3, 3)


def test_the_instruction_shows_nothing_of_the_text(tmp_path):
    def copies(text, seed):
        start = text.index("counted")
        return f"Write a tale of a lighthouse, in a plain and quiet manner, with a keeper who is alone. Begin with these words, and go on from there in the same tone: {text[start - 30 : start + 60]}"

    model = Marks(("Somebody asked", copies), ("How well", "Score: 9"))
    d, _, gates, found = make(tmp_path, repurpose(tmp_path, book(5)), model)
    assert not d
    assert gates["instruction is usable"][0] == 0
    assert "it copies the text" in found["quarantine.jsonl"].decode()


@pytest.mark.parametrize(("said", "kept"), [("Score: 7", 3), ("Score: 6.9", 0), ("Fine.", 0)])
def test_the_fit_of_instruction_and_answer(tmp_path, said, kept):
    model = Marks(("Somebody asked", lambda text, seed: f"Write {seed}."), ("How well", said))
    d, p, gates, _ = make(tmp_path, repurpose(tmp_path, book(20), per_document=3), model)
    assert gates["answer fits"] == (kept, 3)
    assert len(d) == kept
    assert not p  # the model's own answer is judged no worse


def test_detail_levels_ask_for_different_instructions(tmp_path):
    asked = []
    model = Marks(("Somebody asked", lambda text, seed: asked.append(text) or "Write it."))
    make(tmp_path, repurpose(tmp_path, book(60), per_document=40), model)
    kinds = ["one short sentence", "two or three sentences", "five to eight sentences"]
    assert all(any(kind in text for text in asked) for kind in kinds)
    assert all(sum(kind in text for kind in kinds) == 1 for text in asked)


@pytest.mark.parametrize("bad", BAD)
def test_bad_instructions_and_bad_judgements(tmp_path, bad):
    d, p, _, _ = make(tmp_path / "i", repurpose(tmp_path, book(5)), Marks(("Somebody", bad)))
    assert not d + p
    model = Marks(("Somebody asked", "Write it."), ("How well", bad))
    d, p, _, _ = make(tmp_path / "j", repurpose(tmp_path, book(5)), model)
    assert not d + p


def test_a_document_of_one_line_and_one_of_ten_megabytes(tmp_path):
    method = repurpose(tmp_path, "A single line.")
    d, _, _, found = make(tmp_path / "line", method, STORY)
    assert not d
    (entry,) = (json.loads(line) for line in found["quarantine.jsonl"].splitlines())
    assert entry["reason"].startswith("no passage of whole sentences")
    large = PARAGRAPH.format(n=1) * 60_000
    assert len(large) > 10_000_000
    d, _, _, _ = make(tmp_path / "large", repurpose(tmp_path, large, per_document=2), STORY)
    assert len(d) == 2
    assert all(len(record["messages"][1]["content"]) <= 1000 for record in d)


def test_long_answers_have_their_length_in_the_instruction(tmp_path):
    settings = {"form": "long", "shortest": 5000, "longest": 30_000, "most_shown": 3000}
    asked = []
    model = Marks(
        ("Somebody asked", lambda text, seed: asked.append(text) or "Write a tale."),
        ("How well", "Score: 9"),
        other="Short.",
    )
    d, _, _, _ = make(tmp_path, repurpose(tmp_path, book(150), **settings), model)
    assert d
    assert all(len(text) < 4500 and "[…]" in text for text in asked)
    for record in d:
        question, answer = (m["content"] for m in record["messages"])
        assert len(answer) >= 5000
        count = int(question.split("about ")[1].split()[0])
        assert abs(count - len(answer.split())) <= 0.06 * count


PROFILE = {
    "name": "Ada",
    "text": "Ada keeps the light on the isle of Moor. She has two goats. " * 99,
}


def profiles(tmp_path, values, **settings):
    source = lines(tmp_path / "p.jsonl", values)
    config = RepurposeConfig(form="role-play", questions=2, **settings)
    return Repurpose(config, source, seed=1)


def test_role_play(tmp_path):
    asked = []
    model = Marks(
        (
            "would ask Ada",
            lambda text, seed: (
                asked.append(text) or "- Where do you live?\n- Who are you?\n- More?"
            ),
        ),
        (
            "agree with the profile?",
            lambda text, seed: "Score: 9" if "I keep" in text else "Score: 2",
        ),
        ("Answer as Ada", "I keep the light on the isle of Moor."),
        other="I am a pilot in Ohio.",
    )
    method = profiles(tmp_path, [PROFILE, {"name": "Bo"}, {"text": "x"}, {"name": 1, "text": "x"}])
    d, p, _, found = make(tmp_path, method, model)
    assert len(PROFILE["text"]) > 4000 > len(asked[0]) - 500
    assert len(d) == len(p) == 2
    system, user, assistant = d[0]["messages"]
    assert (system["role"], user["content"]) == ("system", "Where do you live?")
    assert system["content"].startswith("You are Ada.")
    assert assistant["content"].startswith("I keep")
    assert "profile" not in json.dumps(d[0]["messages"])
    assert p[0]["prompt"] == [system, user]
    assert p[0]["rejected"][0]["content"].startswith("I am a pilot")
    assert found["quarantine.jsonl"].decode().count("a profile needs") == 3


# --- constitution


def test_the_shipped_constitution():
    text = (DATA / "constitution.yaml").read_text(encoding="utf-8")
    entries = yaml.safe_load(text)
    assert len(entries) >= 40
    wanted = {
        "truthfulness",
        "helpfulness",
        "conciseness",
        "relevance",
        "harmlessness",
        "debiasing",
    }
    wanted |= {"illegal acts", "fraud", "sexual content", "privacy"}
    assert {entry["category"] for entry in entries} == wanted
    for language in ("en", "zh"):
        principles = read_principles(None, language, [])
        assert (
            len({p.follow for p in principles})
            == len({p.avoid for p in principles})
            == len(entries)
        )
        for principle in principles:
            for said in (principle.follow, principle.avoid):
                assert said.endswith("." if language == "en" else "。")
                assert foreign(said, "English" if language == "en" else "Chinese") == ""
    assert max(map(len, text.splitlines())) <= 100
    assert {p.category for p in read_principles(None, "en", ["privacy"])} == {"privacy"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- id: a\n", "needs id, category"),
        ("just text", "no principles"),
        ("- [", "cannot be read"),
        ("- &a [*a]", "needs id|cannot be read"),
    ],
)
def test_bad_principles(tmp_path, text, message):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(OpenQwenError, match=message):
        read_principles(path, "en", [])


def test_principles_of_ones_own(tmp_path):
    one = {"id": "a", "category": "c", "follow": {"en": "Be."}, "avoid": {"en": "Be not."}}
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump([one]))
    (found,) = read_principles(path, "en", [])
    assert found.texts == {"follow": "Be.", "avoid": "Be not."}
    with pytest.raises(OpenQwenError, match=r"follow\.zh"):
        read_principles(path, "zh", [])
    with pytest.raises(OpenQwenError, match="no category 'd'"):
        read_principles(path, "en", ["d"])
    path.write_text(yaml.safe_dump([one, one]))
    with pytest.raises(OpenQwenError, match="same id"):
        read_principles(path, "en", [])
    with pytest.raises(OpenQwenError, match="no questions"):
        Constitution(ConstitutionConfig(probes=0), 1)


def constitution(tmp_path, **settings):
    questions = lines(tmp_path / "q.jsonl", [{"prompt": f"What of {n}?"} for n in range(4)])
    given = {"questions": questions, "probes": 0, **settings}
    return Constitution(ConstitutionConfig(**given), seed=1)


def scored(**scores):
    """A model whose answers of each kind get these scores."""

    def judge(text, seed):
        return next(
            f"Score: {score}" for kind, score in scores.items() if f"This is {kind}." in text
        )

    return Marks(
        ("Does the answer keep", judge),
        ("Where does the answer fall short", "It is too long."),
        ("Write the answer anew", "This is revise."),
        ("You write examples of bad answers", "This is deviate."),
        ("Principle:", "This is comply."),
        ("messages that users might send", "- One?\n- Two?\n- Three?"),
        other="This is plain.",
    )


def test_answers_that_comply_and_that_deviate(tmp_path):
    model = scored(comply=9, deviate=1, plain=6, revise=9)
    d, p, gates, _ = make(tmp_path, constitution(tmp_path), model)
    assert len(d) == len(p) == 4
    for record, pair in zip(d, p):
        assert record["messages"][1]["content"] == "This is revise."
        assert "rinciple" not in json.dumps(record["messages"])  # no trace of the principle
        assert pair["rejected"][0]["content"] == "This is deviate."
        assert record["origin"]["parents"][0].endswith(record["origin"]["principle"])
    assert gates["plain: judged to comply"] == (0, 4)
    assert gates["deviate: judged to deviate"] == (4, 4)


@pytest.mark.parametrize(
    ("scores", "chosen", "rejected"),
    [
        ({"comply": 10, "deviate": 3, "plain": 3, "revise": 8}, "comply", ["plain", "deviate"]),
        ({"comply": 7, "deviate": 4, "plain": 8, "revise": 7}, "plain", []),
        ({"comply": 7, "deviate": 0, "plain": 7, "revise": 7}, None, []),
        ({"comply": 8, "deviate": 10, "plain": 8, "revise": 8}, "revise", []),
    ],
)
def test_the_thresholds(tmp_path, scores, chosen, rejected):
    d, p, _, _ = make(tmp_path, constitution(tmp_path), scored(**scores))
    assert {r["messages"][1]["content"] for r in d} == ({f"This is {chosen}."} if chosen else set())
    assert {r["rejected"][0]["content"] for r in p} == {f"This is {kind}." for kind in rejected}


def test_probes_are_written_by_the_model(tmp_path):
    model = scored(comply=9, deviate=1, plain=6, revise=9)
    settings = {"questions": None, "probes": 2, "categories": ["fraud"]}
    d, _, gates, _ = make(tmp_path, constitution(tmp_path, **settings), model)
    assert [r["messages"][0]["content"] for r in d[:2]] == ["One?", "Two?"]
    assert gates["has probes"] == (4, 4)
    assert {r["origin"]["category"] for r in d} == {"fraud"}


@pytest.mark.parametrize("bad", BAD)
def test_bad_answers_to_principles(tmp_path, bad):
    d, p, _, _ = make(tmp_path / "all", constitution(tmp_path), lambda *_: bad)
    assert not d + p
    rules = scored(comply=9, deviate=1, plain=6, revise=9).rules
    model = Marks(("Where does the answer fall short", bad), *rules, other="This is plain.")
    d, _, _, _ = make(tmp_path / "critique", constitution(tmp_path), model)
    said = {r["messages"][1]["content"] for r in d}
    assert said <= {"This is comply.", "This is revise."}
    assert ("This is comply." in said) is (bad != "{")  # that is a short critique
