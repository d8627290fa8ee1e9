"""`openqwen synthesize execution`: solutions and tests check each other in the real sandbox."""

import itertools
import json
import random

import pytest
from scripted import Scripted, records, run

from openqwen.instruct.synthesize.methods.execution import (
    Execution,
    ExecutionConfig,
    assertions,
    cross_check,
    defines,
)

RIGHT = "```python\ndef add(a, b):\n    return a + b\n```"
ALSO = "Here:\n```python\ndef add(a, b):\n    return sum([a, b])\n```\nDone."
WRONG = "```python\ndef add(a, b):\n    return a * b\n```"
OTHER = "```python\ndef plus(a, b):\n    return a + b\n```"
HANGS = "```python\ndef add(a, b):\n    while True: pass\n```"
EXITS = "```python\nimport os\ndef add(a, b):\n    os._exit(0)\n```"
TESTS = "```python\nassert add(1, 2) == 3\nassert add(2, 2) == 4\nassert add(1, 1) == 3\n```"
TASK = {
    "id": "add",
    "prompt": [{"role": "user", "content": "Add two numbers."}],
    "grader": "code",
    "reference": {"tests": "assert add(5, 6) == 11", "entry": "add"},
}


def executed(tmp_path, solutions, tests, lines=(TASK,), **settings):
    turns = {"solve": itertools.cycle(solutions), "tests": itertools.cycle(tests)}
    generator = Scripted(
        lambda text, _: next(turns["tests" if "different tests" in text else "solve"])
    )
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = ExecutionConfig(
        **({"solutions": len(solutions), "test_answers": len(tests), "seconds": 1} | settings)
    )
    counts, found = run(tmp_path, generator, config, Execution(config, path))
    gates = json.loads(found["synthesis.json"])["gates"]
    return counts, found, {name: (g["passed"], g["of"]) for name, g in gates.items()}


def test_solutions_and_tests_check_each_other(tmp_path):
    solutions = [RIGHT, ALSO, WRONG, OTHER, HANGS, EXITS, RIGHT]
    counts, found, gates = executed(tmp_path, solutions, [TESTS, "no tests"], pairs=9)
    d, p = records(found, "demonstrations"), records(found, "preferences")
    assert {r["messages"][-1]["content"] for r in d} == {RIGHT, ALSO}
    assert {r["chosen"][0]["content"] for r in p} == {RIGHT, ALSO}
    assert {r["rejected"][0]["content"] for r in p} == {WRONG, HANGS, EXITS}
    assert gates["solution"] == (6, 7)
    assert gates["answer with tests"] == (1, 2)
    assert gates["solution alive"] == (4, 6)  # the wrong one passes 2 * 2 == 4
    assert gates["test kept"] == (2, 3)
    assert gates["solution right"] == (3, 4)
    assert gates["right by own tests"] == (3, 3)
    assert gates["wrong by own tests"] == (3, 3)
    assert d[0]["origin"]["tests"] == 2
    assert counts["demonstrations"] == 2


def test_wrong_solutions_that_slip_through_are_measured_or_refused(tmp_path):
    weak = "```python\nassert add(2, 2) == 4\nassert add(0, 0) == 0\n```"
    solutions = [WRONG, WRONG.replace("a * b", "b * a"), RIGHT]
    _, found, gates = executed(tmp_path, solutions, [weak])
    assert gates["right by own tests"] == (1, 3)
    assert len(records(found, "demonstrations")) == 2
    _, found, _ = executed(tmp_path, solutions, [weak], reference="require")
    assert [r["messages"][-1]["content"] for r in records(found, "demonstrations")] == [RIGHT]
    _, _, gates = executed(tmp_path, solutions, [weak], reference="ignore")
    assert "right by own tests" not in gates


@pytest.mark.parametrize("said", ["", "```", "```python\ndef add(:\n```", "def add" * 9999, "\x00"])
def test_nonsense_makes_no_record(tmp_path, said):
    counts, _, gates = executed(tmp_path, [said] * 3, [said])
    assert counts["demonstrations"] == counts["preferences"] == 0
    assert gates["solution"] == (0, 3)


def test_a_task_without_a_name_and_without_tests(tmp_path):
    lines = [{"instruction": "Double it."}]
    double = "```python\ndef solution(x):\n    return 2 * x\n```"
    tests = "assert solution(2) == 4\nassert solution(5) == 10\nassert solution(0) == 1"
    _, found, gates = executed(tmp_path, [double, double], [tests], lines)
    assert gates["test kept"] == (2, 3)
    assert len(records(found, "demonstrations")) == 1
    assert "right by own tests" not in gates


def test_mbpp_uses_its_training_split_and_hides_two_tests(tmp_path):
    def line(number):
        tests = [f"assert add({n}, 1) == {n + 1}" for n in (1, 20, 30)]
        return {
            "task_id": number,
            "text": "Add.",
            "code": "def add(a, b): return a + b",
            "test_list": tests,
            "test_setup_code": "",
        }

    lines = [line(n) for n in (5, 11, 555, 601, 974)]
    counts, found, gates = executed(tmp_path, [RIGHT, RIGHT], [TESTS], lines, form="mbpp")
    assert counts["items"] == 2
    text = records(found, "demonstrations")[0]["messages"][0]["content"]
    assert "assert add(1, 1) == 2" in text
    assert "20" not in text
    assert gates["right by own tests"] == (4, 4)
    counts, _, _ = executed(tmp_path, [RIGHT, RIGHT], [TESTS], lines, form="mbpp", split="all")
    assert counts["items"] == 4  # never those of the test split


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("assert f(1) == 2", ["assert f(1) == 2"]),
        ("```\n  assert f( 1 )==2, 'why'\n```", ["assert f(1) == 2"]),
        ("assert g(1) == 2\nassert True\nassert 1 == 1", []),
        ("assert f(1) == f(1)", []),
        ("assert f(1) == (2", []),
        ("assert f(1); import os", []),
        ("assertf(1)", []),
        (">>> assert f(1) == 2", ["assert f(1) == 2"]),
        ("assert not f([])", ["assert not f([])"]),
        ("assert f('" + "a" * 5000 + "')", []),
    ],
)
def test_assertions(answer, found):
    assert assertions(answer, "f") == found


def test_defines():
    assert defines("def f(): pass", "f")
    assert defines("class f: pass", "f")
    assert not defines("def f(", "f")
    assert not defines("f = 1", "f")
    assert not defines("", "f")


@pytest.mark.parametrize("seed", range(20))
def test_cross_check_by_its_definition(seed):
    draw = random.Random(seed)
    passed = [[draw.random() < 0.4 for _ in range(5)] for _ in range(6)]
    alive, kept = cross_check(passed, 0.5)
    assert alive == [s for s in range(6) if sum(passed[s]) > 0]
    for test in range(5):
        votes = [passed[s][test] for s in alive]
        assert (test in kept) == (sum(votes) > 0 and sum(votes) / len(votes) >= 0.5)
    assert cross_check([], 0.5) == ([], [])
    assert cross_check([[], []], 0.5) == ([], [])
    assert cross_check([[False]], 0.0) == ([], [])
