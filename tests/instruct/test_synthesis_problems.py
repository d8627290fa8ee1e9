"""Structured data and reasoning, with scripted answers."""

import json

import pytest
from method_runs import BAD, Marks, lines, make

from openqwen.instruct.synthesize.methods import structured
from openqwen.instruct.synthesize.methods.reasoning import Reasoning, ReasoningConfig

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
