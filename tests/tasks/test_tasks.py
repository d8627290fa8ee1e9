"""Files of tasks, and batches of answers to their graders."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openqwen.engine import Output, Sampling
from openqwen.support.errors import OpenQwenError
from openqwen.support.generators import Generators
from openqwen.tasks import GRADERS, Grade, Task, answer_tasks, grade, read_tasks, write_tasks
from openqwen.tasks.checkable import KINDS, generate_tasks
from openqwen.tasks.graders import Grader

GOOD = {
    "id": "a",
    "prompt": [{"role": "user", "content": "2 + 2?"}],
    "grader": "exact",
    "reference": {"answer": "4"},
    "origin": {"method": "people"},
}


def task(grader="exact", **reference):
    return Task("t", GOOD["prompt"], grader, reference)


def passed(task, *answers):
    return [one.passed for one in grade([task] * len(answers), answers)]


def test_a_file_holds_the_tasks_that_were_written(tmp_path):
    tasks = generate_tasks(Generators(0)["tasks"], 170)
    path = tmp_path / "tasks.jsonl"
    assert write_tasks(path, tasks) == 170
    assert read_tasks(path) == tasks
    record = json.loads(path.read_text().splitlines()[0])
    assert list(record) == ["id", "prompt", "grader", "reference", "origin"]


def test_reference_and_origin_may_be_absent_where_the_grader_needs_none(tmp_path, monkeypatch):
    monkeypatch.setitem(GRADERS, "length", Grader(lambda tasks, answers: [], lambda reference: ""))
    path = tmp_path / "tasks.jsonl"
    record = {"id": "ü", "prompt": [{"role": "user", "content": "Write."}], "grader": "length"}
    path.write_text("\n" + json.dumps(record) + "\n")
    assert read_tasks(path) == [Task("ü", record["prompt"], "length", {}, {})]


BAD = [
    ("{", "not JSON"),
    ("[]", "not an object"),
    ({"answer": "4"}, "no field 'answer'"),
    ({"refrence": {}}, "Did you mean 'reference'"),
    ({"id": ""}, "'id' must be a text that is not empty"),
    ({"id": 7}, "'id' must be a text"),
    ({"prompt": "2 + 2?"}, "'prompt' must be a list"),
    ({"prompt": []}, "'prompt' must be a list of one or more"),
    ({"prompt": [{"role": "user"}]}, r"prompt\[0\] is not a message"),
    ({"prompt": [*GOOD["prompt"], "and?"]}, r"prompt\[1\] is not a message"),
    ({"grader": "exactly"}, "no grader 'exactly'. Did you mean 'exact'"),
    ({"grader": None}, "'grader' must be the name of a grader"),
    ({"reference": "4"}, "'reference' must be an object"),
    ({"reference": {"answer": 4}}, "'answer' must be a text"),
    ({"grader": "json", "reference": {"answer": "{a: 1}"}}, "'answer' must be JSON"),
    ({"grader": "regex", "reference": {"answer": "4"}}, "'pattern' must be a text"),
    (
        {"grader": "regex", "reference": {"answer": "4", "pattern": "(4"}},
        "'pattern' must be a regular expression",
    ),
    ({"origin": []}, "'origin' must be an object"),
]


@pytest.mark.parametrize(("change", "said"), BAD, ids=[said for _, said in BAD])
def test_a_bad_line_is_named(tmp_path, change, said):
    path = tmp_path / "tasks.jsonl"
    line = change if isinstance(change, str) else json.dumps(GOOD | {"id": "b"} | change)
    path.write_text(json.dumps(GOOD) + "\n\n" + line + "\n")
    with pytest.raises(OpenQwenError, match=said) as caught:
        read_tasks(path)
    assert str(caught.value.where).startswith(f"{path}:3")
    assert caught.value.do
    if not isinstance(change, str) and change.keys() <= GOOD.keys():
        with pytest.raises(OpenQwenError, match=said) as caught:
            write_tasks(tmp_path / "out.jsonl", [Task(**GOOD), Task(**GOOD | {"id": "b"} | change)])
        assert str(caught.value.where).startswith(f"{tmp_path / 'out.jsonl'}:2")
        assert not (tmp_path / "out.jsonl").exists()


def test_an_id_stands_once(tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text((json.dumps(GOOD) + "\n") * 2)
    with pytest.raises(OpenQwenError, match="Another task has the id 'a'"):
        read_tasks(path)


def test_a_grader_gets_one_batch_and_grades_keep_their_order(monkeypatch):
    calls = []

    def judge(tasks, answers):
        calls.append([(one.id, answer) for one, answer in zip(tasks, answers)])
        return [
            Grade(answer == "yes", len(answer) / 10, one.id) for one, answer in zip(tasks, answers)
        ]

    monkeypatch.setitem(GRADERS, "mine", Grader(judge, lambda reference: ""))
    monkeypatch.setitem(GRADERS, "other", Grader(judge, lambda reference: ""))
    names = ["mine", "exact", "other", "mine", "exact", "mine"]
    references = [{"answer": "4", "number": number} for number in range(len(names))]
    tasks = [Task(str(n), GOOD["prompt"], name, references[n]) for n, name in enumerate(names)]
    grades = grade(tasks, ["yes", "4", "no", "no", "5", "yes"])
    assert calls == [[("0", "yes"), ("3", "no"), ("5", "yes")], [("2", "no")]]
    assert [one.passed for one in grades] == [True, True, False, False, False, True]
    assert [one.score for one in grades] == [0.3, 1.0, 0.2, 0.2, 0.0, 0.3]
    assert [grades[n].reason for n in (0, 2, 3, 5)] == ["0", "2", "3", "5"]
    assert grade([], []) == []


def test_an_answer_that_occurs_twice_is_graded_once(monkeypatch):
    calls = []

    def judge(tasks, answers):
        calls.append(list(answers))
        return [Grade(answer == "4", 0.5, "") for answer in answers]

    monkeypatch.setitem(GRADERS, "mine", Grader(judge, lambda reference: ""))
    one = task("mine", answer="4")
    other = Task("u", [{"role": "user", "content": "3 + 1?"}], "mine", {"answer": "4"})
    grades = grade([one, one, one, other], ["4", "5", "4", "4"])
    assert calls == [["4", "5", "4"]]
    assert [each.passed for each in grades] == [True, False, True, True]


def test_as_many_answers_as_tasks():
    with pytest.raises(ValueError, match="zip"):
        grade([task(answer="4")], [])


def test_a_reference_that_does_not_fit_is_named():
    with pytest.raises(OpenQwenError, match="'exact': 'answer' must be a text") as caught:
        grade([task(answer="4"), task()], ["4", "4"])
    assert "task t" in str(caught.value)
    huge = task("regex", answer="a", pattern="a{99999999999}")
    with pytest.raises(OpenQwenError, match="must be a regular expression"):
        grade([huge], ["a"])


def test_an_unknown_grader_is_named():
    with pytest.raises(OpenQwenError, match=r"no grader 'exat'\. Did you mean 'exact'") as caught:
        grade([task("exat")], ["4"])
    assert "task t" in str(caught.value)


def test_gold_answers_pass_and_wrong_ones_fail_in_a_batch_of_all_kinds():
    tasks = generate_tasks(Generators(0)["tasks"], 1700)
    assert {one.kind for one in tasks} == set(KINDS)
    gold = grade(tasks, [one.reference["answer"] for one in tasks])
    assert gold == [Grade(True, 1.0, "")] * 1700
    pairs = [(one, wrong) for one in tasks for wrong in one.reference["wrong"]]
    assert {one.kind for one, _ in pairs} == set(KINDS)
    for one in grade(*zip(*pairs)):
        assert (one.passed, one.score) == (False, 0.0)
        assert one.reason


def test_reasons():
    def reason(task, answer):
        return grade([task], [answer])[0].reason

    value, pattern = task("json", answer='{"a": 1}'), task("regex", answer="7", pattern="[0-9]")
    assert reason(task(answer="4"), "5") == "not the right answer"
    assert reason(task(answer="4"), "4" * 201) == "longer than 200 characters"
    assert reason(task(answer="4" * 100), "4" * 401) == "longer than 400 characters"
    assert reason(value, "{").startswith("not JSON: ")
    assert reason(value, '{"a": 1, "a": 1}') == "not JSON: a key stands twice"
    assert reason(value, '{"a": 2}') == "another JSON value"
    assert reason(pattern, "77") == "does not match the pattern"


def test_json_values_are_equal_down_to_their_types():
    nested = task("json", answer='{"a": [1, {"b": "1", "c": null}], "d": 1.5}')
    same = '{"d": 1.50, "a": [1, {"c": null, "b": "\\u0031"}]}'
    assert passed(nested, same) == [True]
    others = [same.replace(*change) for change in (("1,", "1.0,"), ("1,", "true,"), ("null", "0"))]
    assert passed(nested, *others, same.replace("[1, ", "[1, 1, ")) == [False] * 4
    assert passed(task("json", answer="1"), "1", "true", "1.0", '"1"') == [
        True,
        False,
        False,
        False,
    ]


HOSTILE = [
    "9" * 10_000_000,
    "[" * 5_000_000,
    '{"a":' * 1_000_000,
    " " * 5_000_000 + "4",
    "4\x00",
    "\x00",
    "\ud800",
    "٤",
    "4\u200b",
    "NaN",
    "1e999",
    "[" * 190,
    "9" * 190,
    "",
]


@pytest.mark.parametrize("answer", HOSTILE, ids=lambda text: repr(text[:8]))
def test_hostile_answers_fail(answer):
    tasks = [
        task(answer="4"),
        task("json", answer="4"),
        task("json", answer="[" * 90 + "]" * 90),
        task("regex", answer="4", pattern="([a-z]+ ){3}4|4"),
    ]
    grades = grade(tasks, [answer] * len(tasks))
    assert [one.passed for one in grades] == [False] * 4
    assert all(one.reason for one in grades)


def test_deep_json_beside_a_long_reference():
    """Long enough to be parsed, too deep to be walked through."""
    long = task("json", answer=json.dumps(["x" * 100_000]))
    assert passed(long, "[" * 50_000 + "]" * 50_000, "[" * 390_000) == [False, False]


@given(st.text(max_size=250))
def test_any_text_is_graded(text):
    tasks = [task("json", answer=json.dumps(text)), task(answer=text.strip())]
    assert [one.passed for one in grade(tasks, [json.dumps(text), text])] == [True, True]


def test_answers_travel_with_their_grades(monkeypatch):
    tasks = [
        Task("a", [{"role": "user", "content": "2 + 2?"}], "exact", {"answer": "4"}),
        Task("b", [{"role": "user", "content": "3 + 3?"}], "exact", {"answer": "6"}),
    ]
    calls = []
    exact = GRADERS["exact"].judge

    def judge(tasks, answers):
        calls.append(list(answers))
        return exact(tasks, answers)

    monkeypatch.setitem(GRADERS, "exact", Grader(judge, GRADERS["exact"].fault))

    class Fake:
        def generate(self, prompts, sampling, seeds=None, progress=None):
            self.prompts, self.seeds = prompts, seeds
            text = " 4\n\nQuestion: more" if isinstance(prompts[0], str) else " 4\n"
            return [Output(text) for _ in prompts]

    fake, sampling = Fake(), Sampling(temperature=0.7)
    answers = answer_tasks(fake, tasks, sampling, seeds=[5, 6])
    assert (fake.prompts, fake.seeds) == ([one.prompt for one in tasks], [5, 6])
    assert [(a.text, a.grade.passed, a.temperature) for a in answers] == [
        ("4", True, 0.7),
        ("4", False, 0.7),
    ]
    plain = answer_tasks(fake, tasks, sampling, plain=True)
    assert fake.prompts[0] == "Question: 2 + 2?\nAnswer:\n"
    assert [a.text for a in plain] == ["4", "4"]
    assert [a.prompt for a in plain] == fake.prompts
    assert calls == [[" 4\n", " 4\n"], ["4", "4"]], "each answer is graded once"
