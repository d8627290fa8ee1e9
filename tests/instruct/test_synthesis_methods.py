"""Repurposing, constitution, structured data, reasoning, adaptation, critic: scripted answers."""

import json

import pytest
import yaml
from pydantic import ValidationError
from scripted import Scripted, number, records, run

from openqwen.cli import main
from openqwen.engine import Output
from openqwen.instruct.synthesize.inputs import DATA
from openqwen.instruct.synthesize.methods import structured
from openqwen.instruct.synthesize.methods.adapt import Adapt, AdaptConfig, foreign
from openqwen.instruct.synthesize.methods.constitution import (
    Constitution,
    ConstitutionConfig,
    read_principles,
)
from openqwen.instruct.synthesize.methods.critic import Critic, CriticConfig
from openqwen.instruct.synthesize.methods.reasoning import Reasoning, ReasoningConfig
from openqwen.instruct.synthesize.methods.repurpose import Repurpose, RepurposeConfig
from openqwen.instruct.synthesize.prompts import SHIPPED, PromptFiles
from openqwen.recipe.graph import load_stage, verbs
from openqwen.support.errors import OpenQwenError
from openqwen.tokenizer.messages import demonstration

ENDLESS = Output("and so on and on", finish_reason="length")
BAD = ["", " \n", "{", "nonsense " * 200, ENDLESS]


class Marks:
    """Answers by the first mark that occurs in the prompt; an answer may be a function."""

    def __init__(self, *rules, other="I see."):
        self.rules, self.other = rules, other

    def __call__(self, text, seed):
        for mark, said in self.rules:
            if mark in text:
                return said(text, seed) if callable(said) else said
        return self.other(text, seed) if callable(self.other) else self.other


def make(place, method, model, config=None):
    place.mkdir(exist_ok=True)
    _, found = run(place / "run", Scripted(model), config or method.config, method)
    report = json.loads(found["synthesis.json"])
    gates = {name: (one["passed"], one["of"]) for name, one in report["gates"].items()}
    return records(found, "demonstrations"), records(found, "preferences"), gates, found


def lines(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def chat(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


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


# --- structured data


TABLE = [{"town": f"T{n}", "people": n * 1000, "note": "a | b\nc"} for n in range(7)]
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


def asked_table(question="How many towns?", schema=SCHEMA):
    return "```json\n" + json.dumps({"question": question, "schema": schema}) + "\n```"


def tables(tmp_path, **settings):
    given = {"rows": 4, "rounds": 1, "samples": 4, **settings}
    source = lines(tmp_path / "t.jsonl", TABLE)
    return structured.Structured(structured.StructuredConfig(**given), source)


def counting(votes, critique="Verdict: sound"):
    turn = iter(votes * 99)
    return Marks(
        ("Here is a table:", asked_table()),
        ("Check the solution", critique),
        (
            "It must fit this JSON schema",
            lambda text, seed: f"I count.\n```json\n{next(turn)}\n```",
        ),
    )


def test_questions_about_tables(tmp_path):
    model = counting(['{"n": 4}', '{"n": 4.0}', '{"n": 5}', '{"n": "4"}', '{ "n":4 }'])
    d, p, gates, _ = make(tmp_path, tables(tmp_path, samples=5, pairs=2), model)
    assert (
        gates["question has a schema"] == gates["majority"] == (2, 2)
    )  # pieces of 4 and of 3 rows
    assert gates["answer fits the schema"] == (8, 10)
    assert len(d) == 4
    assert all(record["origin"]["answer"] == '{"n": 4}' for record in d)
    wrong = {r["rejected"][0]["content"] for r in p}
    assert {'I count.\n```json\n{"n": 5}\n```', 'I count.\n```json\n{"n": "4"}\n```'} == wrong
    question = d[0]["messages"][0]["content"]
    assert "T0" in question
    assert "How many towns?" in question
    assert '"integer"' in question


@pytest.mark.parametrize(
    "said",
    [
        *BAD,
        asked_table(question=3),
        asked_table(schema={"type": "object"}),
        asked_table(schema={"properties": {"n": {"type": "numbr"}}}),
        asked_table(schema={"properties": {"n": {"$ref": "http://example.com/a.json"}}}),
        asked_table(schema={"properties": {"n": {"$ref": "file:///etc/passwd"}}}),
        asked_table(schema={"properties": {"n": {"pattern": "(a+)+$(?=x)"}}}),
        asked_table(schema=[1]),
        '{"question": "?", "schema": ',
    ],
)
def test_bad_questions_about_tables(tmp_path, said):
    d, p, gates, _ = make(tmp_path, tables(tmp_path), Marks(("Here is a table:", said)))
    assert gates["question has a schema"] == (0, 2)
    assert not d + p


def test_a_schema_reads_no_file(tmp_path):
    (tmp_path / "a.json").write_text('{"type": "integer"}')
    fault = structured.schema_fault({"properties": {"n": {"$ref": f"file://{tmp_path}/a.json"}}})
    assert "it refers to file:" in fault


def test_forms_of_tables(tmp_path):
    rows = [{"a": "x|y", "b": 1.5}, {"a": None, "c": "z" * 500}]
    markdown = structured.as_text(rows, "markdown", 9).splitlines()
    assert markdown[:3] == ["| a | b | c |", "| --- | --- | --- |", "| x\\|y | 1.5 |  |"]
    assert len(markdown[3]) < 300
    assert structured.as_text(rows, "csv", 2) == "a,b\nx|y,1.5\nNone,"
    assert json.loads(structured.as_text(rows, "json", 2).splitlines()[0]) == {"a": "x|y", "b": 1.5}
    path = tmp_path / "t.csv"
    path.write_text("a,b\n1,2\n3,4,5\n")
    method = structured.Structured(structured.StructuredConfig(questions=2), path)
    first, second = method.items()
    assert first.data == second.data == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]
    assert first.id != second.id


def test_a_schema_whose_check_would_take_for_ever(tmp_path):
    slow = {"properties": {"n": {"type": "string", "pattern": "^(a+)+$"}}}
    assert structured.schema_fault(slow) == ""
    assert not structured.fits_schema({"n": "a" * 50_000 + "!"}, slow)
    again = {"properties": {"n": {"$ref": "#"}}}
    assert structured.schema_fault(again) == ""
    assert structured.fits_schema({"n": {"n": {}}}, again)


# --- reasoning


def reasoning(**settings):
    return Reasoning(ReasoningConfig(**{"problems": 15, "samples": 5, **settings}), seed=1)


def logic(answers, critique="Verdict: sound", revise="So. Answer: B"):
    turn = iter(answers * 999)
    return Marks(
        ("Write one new problem", "Which? A. 1\nB. 2\nC. 3\nD. 4"),
        ("Check the solution", critique),
        ("Solve the problem anew", revise),
        other=lambda text, seed: f"Thought {seed}. Answer: {next(turn)}",
    )


def test_problems_of_every_kind_form_and_subject():
    items = [item.data for item in reasoning(problems=5 * 3 * 24).items()]
    assert len(set(items)) == 5 * 3 * 24
    assert [i.data for i in reasoning().items()] == [i.data for i in reasoning().items()]


def choices(record):
    return record["origin"]["form"] == "choice"


def test_votes_and_refinement(tmp_path):
    d, p, gates, _ = make(tmp_path / "agree", reasoning(), logic(["B", "C", "B", "B", "C"]))
    assert all(r["messages"][1]["content"].endswith("Answer: B") for r in d if choices(r))
    assert all(r["rejected"][0]["content"].endswith("Answer: C") for r in p if choices(r))
    assert any(map(choices, d))
    _, _, gates, _ = make(tmp_path / "split", reasoning(), logic(["A", "B", "C", "D", "A"]))
    assert gates["majority"][0] == 0


@pytest.mark.parametrize(
    ("critique", "revise", "kept"),
    [
        ("Verdict: sound", "", 2),
        (
            lambda t, s: "Verdict: sound" if "So. Answer" in t else "Verdict: flawed",
            "So. Answer: B",
            1,
        ),
        ("Verdict: flawed", "So. Answer: B", 0),
        (
            lambda t, s: "Verdict: sound" if "So. Answer" in t else "Verdict: flawed",
            "So. Answer: C",
            0,
        ),
        ("Who knows", "So. Answer: B", 0),
        ("", "So. Answer: B", 0),
    ],
)
def test_flawed_solutions_are_revised_or_dropped(tmp_path, critique, revise, kept):
    d, _, _, _ = make(tmp_path, reasoning(), logic(["B"], critique, revise))
    by_item = [r["origin"]["parents"][0] for r in d if choices(r)]
    assert {by_item.count(parent) for parent in by_item} == ({kept} if kept else set())
    if kept == 1:
        assert all(r["origin"]["refined"] for r in d if choices(r))


@pytest.mark.parametrize("bad", BAD)
def test_bad_problems_and_solutions(tmp_path, bad):
    d, p, _, _ = make(tmp_path / "all", reasoning(), lambda *_: bad)
    assert not d + p
    model = Marks(("Write one new problem", "Which? A. B. C. D."), other=bad)
    d, p, _, _ = make(tmp_path / "solutions", reasoning(), model)
    assert not d + p


# --- adapt


def adapt(tmp_path, **settings):
    talks = [chat(f"What is {n}?", f"It is the number {n}.") for n in range(3)]
    talks.append([*chat("One?", "Yes."), *chat("Two?", "No.")])
    source = lines(tmp_path / "d.jsonl", [{"messages": talk} for talk in talks])
    return Adapt(AdaptConfig(**{"samples": 2, **settings}), source)


def speaker(translation="这个数是什么？", answers=("这是一个数。", "不知道。"), score=None):
    def align(text, seed):
        return score or ("Score: 9" if "这是一个数" in text else "Score: 2")

    return Marks(
        ("Translate this request", translation),
        ("Does answer 2 agree", align),
        other=lambda text, seed: answers[number(seed) % len(answers)],
    )


def test_transfer_to_another_language(tmp_path):
    d, p, gates, found = make(tmp_path, adapt(tmp_path, samples=8), speaker())
    assert len(d) == 1  # the same translation of three questions: one record
    assert d[0]["messages"] == chat("这个数是什么？", "这是一个数。")
    assert p[0]["rejected"][0]["content"] == "不知道。"
    assert gates["translation is usable"] == (3, 3)
    assert "several turns" in found["quarantine.jsonl"].decode()


@pytest.mark.parametrize("said", [*BAD, "What is it?", "What is 0?"])
def test_a_translation_must_be_one(tmp_path, said):
    d, _, gates, _ = make(tmp_path, adapt(tmp_path), speaker(translation=said))
    assert not d
    assert gates["translation is usable"] == (0, 3)


def test_answers_in_another_language_or_of_another_meaning(tmp_path):
    d, p, gates, _ = make(tmp_path / "en", adapt(tmp_path), speaker(answers=("It is a number.",)))
    assert not d + p
    assert gates["answer is usable"][0] == 0
    d, p, _, _ = make(tmp_path / "low", adapt(tmp_path), speaker(score="Score: 7"))
    assert not d + p


def test_a_language_is_given_by_its_name():
    with pytest.raises(ValidationError, match="target"):
        AdaptConfig(target="zh")


def test_letters_tell_the_language():
    assert foreign("Bonjour tout le monde", "French") == ""
    assert foreign("Привет", "Russian") == ""
    assert foreign("Привет", "French")
    assert foreign("日本語のテキスト", "Japanese") == ""
    assert foreign("简体中文测试 in P", "Simplified Chinese") == ""
    assert foreign("12 + 3", "Thai") == ""


def test_system_prompts(tmp_path):
    def consistent(text, seed):
        return "Score: 2" if "It is the number" in text else "Score: 9"

    model = Marks(
        ("new system prompts", "- You are a sailor.\n- You are a helpful assistant.\nno item"),
        ("Does the answer keep to the system prompt", consistent),
        other="Aye.",
    )
    method = adapt(tmp_path, form="system", rounds=2)
    d, p, gates, _ = make(tmp_path, method, model)
    assert gates["is a new system prompt"] == (1, 4)
    assert "You are a sailor." in method.systems
    assert len(d) == 4
    assert len(p) == 3  # the original answer, which knew no system prompt, is worse
    for record in d:
        assert record["messages"][0]["role"] == "system"
        assert record["messages"][0]["content"] in method.systems
        assert record["messages"][-1]["content"] == "Aye."
    assert [m["role"] for m in d[-1]["messages"]][:4] == ["system", "user", "assistant", "user"]
    assert p[0]["rejected"][0]["content"] == "It is the number 0."


# --- critic


def critic(tmp_path, values, **settings):
    return Critic(CriticConfig(**settings), lines(tmp_path / "r.jsonl", values))


def strict(text, seed):
    """Finds a wrong number and a rude word; each by one of the scorers."""
    bad = ("Check every fact" in text and "Five" in text) or ("harmless" in text and "Fool" in text)
    return "Score: 4" if bad else "Score: 9"


def test_every_scorer_must_pass(tmp_path):
    values = [
        {"messages": chat("2+2?", said), "origin": {"n": 1}}
        for said in ("Four", "Five", "Fool", "")
    ]
    d, _, gates, _ = make(tmp_path, critic(tmp_path, values), strict)
    assert [r["messages"][1]["content"] for r in d] == ["Four"]
    assert d[0]["origin"]["source"] == {"n": 1}
    assert gates["correctness"][1] - gates["correctness"][0] == 1
    assert gates["safety"][1] - gates["safety"][0] == 1
    d, _, _, _ = make(tmp_path / "one", critic(tmp_path, values, scorers=["language"]), strict)
    assert len(d) == 3
    d, _, _, _ = make(tmp_path / "high", critic(tmp_path, values, least=10), strict)
    assert not d


def test_pairs_are_kept_where_one_side_alone_passes(tmp_path):
    def pair(chosen, rejected):
        q, c = chat("2+2?", chosen)
        return {"prompt": [q], "chosen": [c], "rejected": [chat("", rejected)[1]]}

    values = [
        pair("Four", "Five"),
        pair("Four", "Vier"),
        pair("Five", "Four"),
        pair("Fool", "Five"),
    ]
    d, p, gates, _ = make(tmp_path, critic(tmp_path, values), strict)
    assert not d
    assert [(r["chosen"][0]["content"], r["rejected"][0]["content"]) for r in p] == [
        ("Four", "Five")
    ]
    assert gates["rejected answer is worse"] == (1, 2)


@pytest.mark.parametrize("bad", BAD)
def test_a_judge_that_says_nothing_passes_nothing(tmp_path, bad):
    d, p, _, _ = make(tmp_path, critic(tmp_path, [{"messages": chat("a", "b")}]), lambda *_: bad)
    assert not d + p


def test_a_judge_of_its_own_is_asked(tmp_path):
    method = critic(tmp_path, [{"messages": chat("2+2?", "Four")}])
    judge = Scripted(lambda *_: "Score: 10")
    model = Scripted(lambda *_: "Score: 0")
    _, found = run(tmp_path / "run", model, method.config, method, judge=judge)
    assert len(records(found, "demonstrations")) == 1
    assert not model.asked


# --- all methods

METHODS = [
    "instructions",
    "repurpose",
    "constitution",
    "structured",
    "reasoning",
    "adapt",
    "critic",
]


@pytest.mark.parametrize("name", METHODS)
def test_stages_and_prompts(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["synthesize", name, "--help"])
    assert ended.value.code == 0
    assert "--temperature" in capsys.readouterr().out
    stage = load_stage(f"synthesize-{name}")
    assert stage.help == verbs()[f"synthesize-{name}"]
    prompts = PromptFiles(name)
    names = {path.split(".")[0] for path in prompts.paths}
    assert set(prompts.paths) == {f"{n}.{language}" for n in names for language in ("en", "zh")}
    for path in (SHIPPED / name).iterdir():
        assert path.read_text(encoding="utf-8").count("{#") == 1, "says what its variables are"


def test_the_order_in_which_answers_come_changes_no_byte(tmp_path):
    def same(place, **settings):
        limits = {"concurrency": settings["concurrency"]}
        yield make(place / "r", repurpose(place, book(9), limits=limits), STORY)[3]
        model = scored(comply=9, deviate=1, plain=6, revise=9)
        yield make(place / "c", constitution(place, probes=2, limits=limits), model)[3]
        hashed = Marks(
            ("Write one new problem", "Which? A. 1\nB. 2\nC. 3\nD. 4"),
            ("Check the solution", "Verdict: sound"),
            other=lambda text, seed: f"Thought {seed}. Answer: {'BBC'[number(text, seed) % 3]}",
        )
        yield make(place / "l", reasoning(limits=limits), hashed)[3]
        yield make(place / "a", adapt(place, samples=5, limits=limits), speaker())[3]

    places = [tmp_path / name for name in ("1", "9")]
    for place in places:
        place.mkdir()
    one, nine = (list(same(p, concurrency=int(p.name))) for p in places)
    assert one == nine
    assert all(b"messages" in found["demonstrations.jsonl"] for found in one)


def test_records_can_be_read_for_training(tmp_path):
    d, *_ = make(tmp_path, repurpose(tmp_path, book(20)), STORY)
    assert demonstration(d[0])[0] == d[0]["messages"]
