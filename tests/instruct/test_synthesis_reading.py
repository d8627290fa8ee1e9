"""What is read out of answers that may be anything, and how documents are cut."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openqwen.engine import Output
from openqwen.instruct.synthesize import reading
from openqwen.instruct.synthesize.inputs import DATA, documents, exchanges, phrases, questions
from openqwen.instruct.synthesize.passages import excerpt, length, passages, rounded
from openqwen.instruct.synthesize.verification import cross_validate, read_cases, read_function
from openqwen.support.errors import OpenQwenError

PROSE = "The old mill stood by the river. Nobody had ground corn there for thirty years. "


def stopped(text):
    return Output(text, finish_reason="stop")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It is fine.\nScore: 8", 8),
        ("**Score: 7.5**", 7.5),
        ("Score: 3\nNo, better:\nScore: 9/10", 9),
        ("理由……\n得分：6", 6),
        ("8", 8),
        (" 9/10. ", 9),
        ("Score: N", None),
        ("Score: 11", None),
        ("Score: 85", None),
        ("I give it an 8", None),
        ("", None),
        ("Score: " + "9" * 5000, None),
    ],
)
def test_scores(text, expected):
    assert reading.score(text) == expected


def test_items():
    text = 'Sure:\n- One. \n* Two\n3. "Three"\n4) Four\n- One.\n-\nno item\n  - 五\n6、六'
    assert reading.items(text) == ["One.", "Two", "Three", "Four", "五", "六"]
    assert reading.items("nonsense") == []


RELATIONS = {"entailment": "entailment", "contradiction": "contradiction", "矛盾": "contradiction"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Entailment.", "entailment"),
        ("entailment? No: CONTRADICTION", "contradiction"),
        ("是矛盾的", "contradiction"),
        ("noncontradictionary", None),
        ("", None),
    ],
)
def test_labels(text, expected):
    assert reading.label(text, RELATIONS) == expected


def test_labels_behind_a_mark():
    labels = {"sound": "sound", "flawed": "flawed"}
    assert reading.label("It is not sound. Verdict: **flawed**", labels, "verdict") == "flawed"
    assert reading.label("It sounds sound.", labels, "verdict") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('```json\n{"a": [1, 2]}\n```', {"a": [1, 2]}),
        ('```json\n{"a": 1}\n```\nor\n```json\n{"a": 2}\n```', {"a": 2}),
        ('The answer is {"a": 1} as said.', {"a": 1}),
        ('[{"a": "line\nline"},]', [{"a": "line\nline"}]),
        ("{'a': True, 'b': None}", {"a": True, "b": None}),
        ('```json\n{"a": 1', None),
        ('{"a": NaN}', None),
        ('{"a": "\\ud800"}', None),
        ("[" * 5000 + "]" * 5000, None),
        ("(" * 5000, None),
        ("{'a': __import__('os').getcwd()}", None),
        ("no JSON", None),
        ("", None),
    ],
)
def test_json(text, expected):
    assert reading.json_value(text) == expected


@given(st.text(alphabet="{}[]\",:'`\n -10aeé水\\", max_size=80))
def test_nothing_breaks_the_readers(text):
    value = reading.json_value(text)
    json.dumps(value, allow_nan=False).encode()
    reading.items(text), reading.score(text), reading.label(text, RELATIONS)
    reading.fault(stopped(text), (text[:40],))
    assert all(isinstance(case.expected, bool) for case in read_cases(text))
    read_function(text)


def test_faults():
    assert reading.fault(stopped(PROSE * 1)) == ""
    assert reading.fault(stopped("  \n")) == "empty"
    assert reading.fault(Output(PROSE, finish_reason="length")) == "not ended"
    assert reading.fault(Output("", finish_reason="error")) == "empty"
    assert reading.fault(stopped("I do not know. " * 40)) == "repeats itself"
    assert reading.fault(stopped("哈哈哈" * 100)) == "repeats itself"
    long = " ".join(str(n) for n in range(300))
    assert reading.fault(stopped(long)) == ""
    assert reading.fault(stopped(long), (f"Repeat this: {long}",)) == "copied"
    assert reading.fault(stopped("What is it?"), ("what  is it? ",)) == "copied"
    assert reading.fault(stopped("Yes."), ("Say Yes. or No.",)) == ""


def test_new_texts():
    known = reading.Novelty(0.7, ["Answer in exactly three sentences."])
    assert not known.add("answer in EXACTLY three sentences")
    assert not known.add("Answer in exactly four sentences.")  # 4 of 5 words
    assert known.add("Use no comma.")
    assert not known.add("Use no comma.")
    assert not known.add("...")
    assert reading.Novelty(0.9, ["Answer in exactly three sentences."]).add(
        "Answer in exactly four sentences."
    )
    chinese = reading.Novelty(0.7, ["回答中不使用逗号。"])
    assert not chinese.add("回答中不使用句号。")
    assert chinese.add("以“当然”开头。")


def test_functions_and_cases_of_an_answer():
    answer = (
        "Here:\n```python\nimport re\ndef evaluate(response):\n    return ',' not in response\n```\n"
        '```json\n[{"response": "a", "expected": true}, {"response": "a,", "expected": "False"},'
        ' {"response": 3, "expected": true}, {"response": "b"}, "c",'
        ' {"response": "d", "expected": 1}, {"response": "a", "expected": true}]\n```'
    )
    assert read_function(answer).startswith("import re\n\ndef evaluate")
    assert [(c.response, c.expected) for c in read_cases(answer)] == [("a", True), ("a,", False)]
    examples = (
        "```python\nLIMIT = 3\ndef evaluate(x):\n    return len(x) < LIMIT\nprint(evaluate(y))\n```"
    )
    assert read_function(examples) == "LIMIT = 3\n\ndef evaluate(x):\n    return len(x) < LIMIT"
    assert read_function("```python\ndef check(x):\n    return True\n```") is None
    assert read_function("```python\ndef evaluate(x:\n```") is None
    assert read_function("I cannot do that.") is None
    assert read_function("```python\n" + "x=" + "(" * 9000 + "\ndef evaluate(x): pass\n```") is None
    assert read_cases("```json\n{}\n```") == []


def test_cross_validation_at_its_thresholds():
    # Three functions, four cases. The third case convinces one function of three, the fourth none.
    expected = [True, False, True, False]
    table = [[True, False, True, True], [True, False, None, True], [True, True, False, True]]
    assert cross_validate(table, expected, 0.5, 0.5) == ([0, 1], [0, 1])
    assert cross_validate(table, expected, 0.0, 0.5) == ([0, 1], [0, 1, 2])  # 2/3, not the last
    assert cross_validate(table, expected, 0.0, 0.7) == ([0], [0, 1, 2])
    half = [[True], [False]]
    assert cross_validate(half, [True], 0.5, 0.5) == ([], [])  # exactly half is not more
    assert cross_validate([], [True], 0.5, 0.5) == ([], [])
    assert cross_validate([[], []], [], 0.5, 0.5) == ([], [])


def test_passages_of_a_book():
    book = "\n\n".join(f"Paragraph {n}. " + PROSE * (n % 3 + 1) for n in range(40))
    cut = passages(book, 200, 900)
    assert len(cut) > 5
    assert all(200 <= len(one) <= 900 for one in cut)
    assert all(one.startswith("Paragraph") for one in cut)
    assert "\n\n".join(cut).split() == book.split()  # nothing is lost here


def test_passages_of_one_line_and_of_ten_megabytes():
    assert passages("A line.", 200, 900) == []
    assert passages("", 1, 900) == []
    line = PROSE * 130_000
    assert len(line) > 10_000_000
    cut = passages(line, 200, 900)
    assert len(cut) > 10_000
    assert all(one.endswith(("years.", "river.")) for one in cut)
    assert passages("x" * 10_000_000, 200, 900) == []  # no end of a sentence
    assert passages("\n" * 1_000_000 + " " * 1_000_000, 1, 900) == []
    chinese = passages("天地玄黄，宇宙洪荒。" * 2_000, 50, 400)
    assert all(one.endswith("。") and " " not in one for one in chinese)


def test_sentences_do_not_end_at_titles_nor_before_a_closing_quotation_mark():
    text = 'Mr. Smith met Dr. Jones. "Good day!" he said. “Welcome.” They went in.'
    cut = passages(text, 1, 26)
    assert cut == ["Mr. Smith met Dr. Jones.", '"Good day!" he said.', "“Welcome.” They went in."]


def test_lengths():
    assert length("three short words") == 3
    assert length("天地玄黄，宇宙 洪荒。") == 10
    assert [rounded(n) for n in (3, 57, 149, 1234, 98_765)] == [10, 60, 150, 1200, 99_000]
    assert excerpt("abc", 300) == "abc"
    parts = excerpt("a" * 500 + "b" * 500 + "c" * 500, 300).split("\n[…]\n")
    assert [set(part) for part in parts] == [{"a"}, {"b"}, {"c"}]


def test_phrases(tmp_path):
    shipped = phrases("constraints", "en", None)
    assert len(shipped) == len(set(shipped)) == 36 == len(phrases("constraints", "zh", None))
    for name in ("system_prompts", "subjects"):
        assert len(phrases(name, "en", None)) == len(phrases(name, "zh", None)) >= 20
    file = tmp_path / "own.txt"
    file.write_text("One.\n\n Two. \nOne.\n")
    assert phrases("constraints", "en", file) == ["One.", "Two."]
    file.write_text(" \n")
    with pytest.raises(OpenQwenError, match="no lines"):
        phrases("constraints", "en", file)
    assert sorted(p.name for p in DATA.iterdir()) == [
        "constitution.yaml",
        "constraints.yaml",
        "long_documents.yaml",
        "subjects.yaml",
        "system_prompts.yaml",
    ]


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def test_questions_of_prompts_and_conversations(tmp_path):
    user = {"role": "user", "content": "Why?"}
    answer = {"role": "assistant", "content": "So."}
    path = write(
        tmp_path / "q.jsonl",
        [
            {"messages": [{"role": "system", "content": "Be."}, user, answer]},
            {"prompt": [{"role": "user", "content": "How?"}]},
            {"instruction": "Say it.", "output": "It."},
            {"prompt": "Why?"},
        ],
    )
    found = [(q.id, q.text) for q in questions(path)]
    assert found == [("q.jsonl#1", "Why?"), ("q.jsonl#2", "How?"), ("q.jsonl#3", "Say it.")]
    with pytest.raises(OpenQwenError, match="no prompt"):
        questions(write(tmp_path / "bad.jsonl", [{"text": "a"}]))
    with pytest.raises(OpenQwenError, match="no questions"):
        questions(write(tmp_path / "none.jsonl", []))


def test_exchanges(tmp_path):
    user = {"role": "user", "content": "Why?"}
    answer = {"role": "assistant", "content": " So. "}
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "f", "arguments": {}}}],
    }
    path = write(
        tmp_path / "d.jsonl",
        [
            {"messages": [user, answer, user], "origin": {"method": "x"}},
            {
                "prompt": [user],
                "chosen": [answer],
                "rejected": [{"role": "assistant", "content": "No."}],
            },
            {"messages": [user, call]},
            {"messages": [user]},
            {"nothing": 1},
        ],
    )
    first, second, *bad = exchanges(path)
    assert (first.data.prompt, first.data.answer, first.data.rejected) == ([user], "So.", None)
    assert first.data.origin == {"method": "x"}
    assert (second.data.answer, second.data.rejected) == ("So.", "No.")
    assert ["calls tools" in bad[0].fault, "no answer" in bad[1].fault, bool(bad[2].fault)] == [
        True
    ] * 3


def test_documents_of_files_and_folders(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.bin").write_bytes(b"\0")
    write(tmp_path / "c.jsonl", [{"text": "two"}, {"no": 1}, {"text": "three"}])
    assert [d["id"] for d in documents(tmp_path)] == ["a.txt", "c.jsonl#1", "c.jsonl#3"]
    assert [d["text"] for d in documents(tmp_path / "a.txt")] == ["one"]
    for place in (tmp_path / "b.bin", tmp_path / "missing.txt"):
        with pytest.raises(OpenQwenError, match="no documents"):
            list(documents(place))
