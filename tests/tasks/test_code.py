"""Programs against their tests and cases, and the reference programs of HumanEval and MBPP.

OPENQWEN_PUBLISHED may name a folder (test_mathematics.py) that also holds qwen2.5-coder/: the
folders 1.5b-base and 7b-base of QwenLM/Qwen2.5-Coder, qwencoder-eval/base/outptus.
"""

import os
from pathlib import Path

import pytest

from openqwen.sandbox import Pool, Verdict, best_tier
from openqwen.sandbox.languages import available
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import read_json, read_jsonl
from openqwen.tasks import Grade, Task, code, grade
from openqwen.tasks.code import program_of
from openqwen.tasks.readers import read_problems

pytestmark = pytest.mark.skipif(best_tier() == "none", reason="no sandbox here")
DATA = Path(__file__).parents[3] / "shared" / "data" / "eval"
GRADED = Path(os.environ.get("OPENQWEN_PUBLISHED", "absent")) / "qwen2.5-coder"
ADD = {"tests": "assert add(2, 3) == 5\nassert add(-1, 1) == 0", "entry": "add"}
ECHO = {"inputs": ["1 2\n", "30 4\n"], "outputs": ["3\n", "34"]}
GOOD = "def add(a, b):\n    return a + b\n"


def task(**reference):
    return Task("t", [{"role": "user", "content": "?"}], "code", reference)


def one(reference, answer):
    return grade([task(**reference)], [answer])[0]


@pytest.mark.parametrize(
    ("answer", "passed", "said"),
    [
        (GOOD, True, ""),
        (f"Here it is:\n```python\n{GOOD}```\nIt adds.", True, ""),
        (f"```\n{GOOD}", True, ""),
        (f"{GOOD}```\nIt adds.", True, ""),
        (
            f"```bash\npip install add\n```\n```py\n{GOOD}```\n```py\nprint(add(1, 1))\n```",
            True,
            "",
        ),
        ("def add(a, b):\n    return a - b\n", False, "a test failed: line 1 of the tests"),
        ("def plus(a, b):\n    return a + b\n", False, "no function 'add'"),
        ("def add(a, b:\n", False, "SyntaxError"),
        ("while True: pass", False, "timeout"),
        ("import os\nos._exit(0)", False, "failed"),
        ("", False, "no program"),
        ("```python\n```", False, "no program"),
        ("x" * 300_000, False, "no program"),
    ],
)
def test_tests(answer, passed, said):
    verdict = one(ADD | {"limits": {"seconds": 1, "wall_seconds": 5}}, answer)
    assert (verdict.passed, verdict.score) == (passed, float(passed))
    assert said in verdict.reason
    assert verdict.status == ("no_answer" if said == "no program" else "graded")


def test_which_block_is_the_program():
    two = f"```\n{GOOD}```\nBetter:\n```\ndef add(a, b): return b + a\n```"
    assert program_of(two, ADD).strip() == GOOD.strip()
    assert program_of(two, ADD | {"block": "last"}).startswith("def add(a, b): return b + a")
    assert "b + a" in program_of(two, ECHO)


def test_a_completion_goes_on_with_the_prefix_or_defines_it_anew():
    prefix = 'def add(a, b):\n    """Add."""\n'
    reference = ADD | {"prefix": prefix}
    assert one(reference, "    return a + b").passed
    assert one(reference, f"```python\n{GOOD}```").passed
    assert not one(reference, "    return a * b").passed


def test_the_setup_runs_behind_the_program():
    assert one(
        {"tests": "assert box.value == 3", "setup": "box = Box(3)"},
        ("class Box:\n    def __init__(self, value): self.value = value"),
    ).passed


def test_a_function_may_be_called_check():
    assert one(
        {"tests": "assert check(2) == 4", "entry": "check"}, "def check(n): return n * n"
    ).passed


def test_input_and_output():
    answer = "Read them:\n```python\nprint(sum(map(int, input().split())), '')\n```"
    assert one(ECHO, answer).passed
    assert one(ECHO, "print(3)").reason == "case 2: another output"
    assert "case 1: failed: ValueError" in one(ECHO, "print(int(input()))").reason


@pytest.mark.parametrize(
    ("language", "answer"),
    [
        ("bash", "read a b; echo $((a + b))"),
        (
            "c",
            '#include <stdio.h>\nint main() { int a, b; scanf("%d %d", &a, &b); printf("%d", a + b); }',
        ),
    ],
)
def test_other_languages(language, answer):
    from openqwen.sandbox.languages import available

    if language not in available():
        pytest.skip(f"no {language} here")
    assert one(ECHO | {"language": language}, f"```{language}\n{answer}\n```").passed


def test_one_pool_for_a_batch_and_a_failed_sandbox_is_no_wrong_answer(monkeypatch):
    pools = []

    class Broken(Pool):
        def __init__(self):
            super().__init__(1, tier=best_tier())
            pools.append(self)

        def run(self, programs):
            verdicts = super().run(programs)
            return [Verdict("infra", reason="no memory"), *verdicts[1:]]

        def close(self):
            super().close()
            pools.append("closed")

    monkeypatch.setattr(code, "open_pool", Broken)
    verdicts = grade([task(**ADD)] * 3, [GOOD, "def add(a, b): return 5", GOOD])
    assert [one.counts for one in verdicts] == [False, True, False], "equal answers share a grade"
    assert verdicts[0] == Grade(False, 0.0, "the sandbox failed: no memory", "infra")
    assert verdicts[1].status == "graded"
    assert pools[1:] == ["closed"]


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ({}, "give 'tests', or as many texts"),
        ({"tests": 1}, "'tests' must be a text"),
        ({"tests": "", "language": "c"}, "'tests' are for Python"),
        (ADD | ECHO, "without 'inputs'"),
        ({"inputs": ["1"], "outputs": []}, "as many texts"),
        (ECHO | {"language": "rust"}, "'language' must be one of python, c"),
        (ECHO | {"limits": {"second": 1}}, "'limits' must be an object with some of disk_mb"),
        (ECHO | {"limits": {"seconds": -1}}, "'limits.seconds' must be a positive number"),
        (ECHO | {"block": "middle"}, "'block' must be"),
    ],
)
def test_references(reference, said):
    with pytest.raises(OpenQwenError, match=said):
        grade([task(**reference)], [""])


CHANGED = """
def _changed(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float, complex)):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, (list, tuple)):
        return value + type(value)([7])
    if isinstance(value, set):
        return value | {"another"}
    if isinstance(value, dict):
        return value | {"another": 7}
    return 7

def _change(function):
    return lambda *args, **named: _changed(function(*args, **named))

ENTRY = _change(ENTRY)
"""


def references(name, chosen):
    tasks = read_problems(*name)
    return [one for one in tasks if one.origin.get("split", "test") == "test"][chosen]


def check_references(tasks):
    """Each program passes, also behind a wrapper; with another returned value none does."""
    wrapped = CHANGED.replace("_changed(function(*args, **named))", "function(*args, **named)")
    assert wrapped != CHANGED
    for addition, right in (("", True), (wrapped, True), (CHANGED, False)):
        programs = [
            one.reference["solution"] + addition.replace("ENTRY", one.reference["entry"])
            for one in tasks
        ]
        for one, verdict in zip(tasks, grade(tasks, programs)):
            assert verdict.passed == right, (one.id, verdict)
            assert verdict.status == "graded"
            # Three functions of MBPP call themselves, and do not get as far with other values.
            if not right and one.id not in ("mbpp/84", "mbpp/374", "mbpp/462"):
                assert "a test failed" in verdict.reason, (one.id, verdict)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not here")
def test_reference_programs_pass_and_changed_ones_fail():
    tasks = [
        *references(("humaneval", DATA / "HumanEval.jsonl.gz"), slice(0, 164, 11)),
        *references(("mbpp", DATA / "mbpp.jsonl.gz"), slice(0, 500, 34)),
    ]
    assert len(tasks) == 30
    check_references(tasks)


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not here")
@pytest.mark.parametrize(
    ("name", "file", "count"),
    [("humaneval", "HumanEval.jsonl.gz", 164), ("mbpp", "mbpp.jsonl.gz", 500)],
)
def test_all_reference_programs_pass_and_changed_ones_fail(name, file, count):
    tasks = references((name, DATA / file), slice(None))
    assert len(tasks) == count
    check_references(tasks)


@pytest.mark.skipif(
    not (DATA.is_dir() and GRADED.is_dir()), reason=f"{DATA} or {GRADED} is not here"
)
@pytest.mark.parametrize(("size", "right"), [("1.5b", 72), ("7b", 101)])
def test_published_verdicts_on_completions_of_humaneval(size, right):
    """Completions of Qwen2.5-Coder's base models, with evalplus's verdicts by HumanEval's tests."""
    folder = GRADED / f"{size}-base" / "evalplus" / "humaneval"
    results = read_json(folder / "generated_eval_results.json")["eval"]
    tasks = references(("humaneval", DATA / "HumanEval.jsonl.gz"), slice(None))
    completions = {
        one["task_id"]: one["completion"] for one in read_jsonl(folder / "generated.jsonl")
    }
    verdicts = [results[one.id][0]["base_status"] == "pass" for one in tasks]
    assert (len(tasks), sum(verdicts)) == (164, right)
    graded = grade(tasks, [completions[one.id] for one in tasks])
    assert [one.passed for one in graded] == verdicts


@pytest.mark.skipif("javascript" not in available(), reason="node is not installed")
def test_the_error_of_a_program_in_javascript_is_its_reason():
    reference = {"inputs": [""], "language": "javascript"}
    reference["limits"] = {"seconds": 15, "memory_mb": 4096, "processes": 32}
    task = Task("t", [], "code", reference)
    source = "const assert = require('node:assert');\nassert.deepEqual(1, 2);"
    (found,) = grade([task], [source])
    assert not found.passed
    assert "AssertionError" in found.reason
