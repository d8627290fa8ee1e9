"""Grades that are kept by content: found again, whatever kills a writer, in several processes."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from openqwen.support.errors import OpenQwenError
from openqwen.tasks import GRADERS, Grade, GradeCache, Task, grade
from openqwen.tasks import cache as cache_module
from openqwen.tasks import graders as graders_module
from openqwen.tasks.graders import Grader

PROMPT = [{"role": "user", "content": "2 + 2?"}]


@pytest.fixture
def calls(monkeypatch):
    """Registers the grader "mine"; its calls."""
    seen = []

    def judge(tasks, answers):
        seen.append(list(answers))
        return [
            Grade(text == "4", 0.5, f"read {text}", "infra" if text == "broken" else "graded")
            for text in answers
        ]

    monkeypatch.setitem(GRADERS, "mine", Grader(judge, lambda reference: ""))
    return seen


def task(**reference):
    return Task("t", PROMPT, "mine", reference)


def key(number):
    return number.to_bytes(16, "big")


def test_grades_are_found_again(tmp_path, calls):
    path = tmp_path / "new" / "grades.jsonl"
    answers = ["4", "5", "broken", "4"]
    first = grade([task()] * 4, answers, cache=GradeCache(path))
    assert calls == [["4", "5", "broken"]]
    again = grade([task()] * 4, answers, cache=GradeCache(path))
    assert calls == [["4", "5", "broken"], ["broken"]], "infra is not kept"
    assert again == first
    assert grade([task()], ["4"]) == first[:1]
    assert len(calls) == 3, "without a cache everything is graded"


def test_what_a_key_depends_on(tmp_path, calls, monkeypatch):
    cache = GradeCache(tmp_path / "grades.jsonl")
    other = Task("u", [{"role": "user", "content": "3 + 1?"}], "mine", {})
    grade([task(a=1, b=2)], ["4"], cache=cache)
    grade([task(b=2, a=1)], ["4"], cache=cache)
    assert len(calls) == 1, "the order of fields and the task's id are no content"
    grade([task(a=2, b=2), other], ["4", "4"], cache=cache)
    assert len(calls) == 2
    monkeypatch.setitem(
        GRADERS, "mine", Grader(GRADERS["mine"].judge, lambda reference: "", version=lambda: "2")
    )
    grade([task(a=1, b=2)], ["4"], cache=cache)
    assert len(calls) == 3, "another version of the grader"


def test_parts_are_kept_as_they_are_graded(tmp_path, calls, monkeypatch):
    monkeypatch.setattr(graders_module, "_PART", 2)
    judge, path = GRADERS["mine"].judge, tmp_path / "grades.jsonl"

    def failing(tasks, answers):
        if "4" in answers:
            raise KeyboardInterrupt
        return judge(tasks, answers)

    monkeypatch.setitem(GRADERS, "mine", Grader(failing, lambda reference: ""))
    with pytest.raises(KeyboardInterrupt):
        grade([task()] * 5, ["0", "1", "2", "3", "4"], cache=GradeCache(path))
    monkeypatch.setitem(GRADERS, "mine", Grader(judge, lambda reference: ""))
    grade([task()] * 5, ["0", "1", "2", "3", "4"], cache=GradeCache(path))
    assert calls == [["0", "1"], ["2", "3"], ["4"]]


def test_progress_counts_every_answer(tmp_path, calls):
    class Counter:
        done = 0

        def advance(self, amount):
            self.done += amount

    cache = GradeCache(tmp_path / "grades.jsonl")
    for tasks in (1, 3):
        counter = Counter()
        grade(
            [task()] * (tasks + 1), ["4", "4", "5", "6"][: tasks + 1], cache=cache, progress=counter
        )
        assert counter.done == tasks + 1


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_writer_killed_in_mid_line(tmp_path, cut):
    path = tmp_path / "grades.jsonl"
    GradeCache(path).keep({key(1): Grade(True, 1.0, "ü")})
    whole = path.read_bytes()
    GradeCache(path).keep({key(2): Grade(False, 0.0, "")})
    path.write_bytes(whole + path.read_bytes()[len(whole) :][:cut])
    late = GradeCache(path)
    assert late.find([key(1), key(2)]) == {key(1): Grade(True, 1.0, "ü")}
    late.keep({key(3): Grade(True, 0.25, "three", raw=7.0)})
    for each in (late, GradeCache(path)):
        assert each.find([key(2)]) == {}
        assert each.find([key(3)]) == {key(3): Grade(True, 0.25, "three", raw=7.0)}
    late.keep({key(2): Grade(False, 0.0, "")})
    assert GradeCache(path).find([key(2)])[key(2)].passed is False


def test_damaged_lines_are_skipped(tmp_path, capfd):
    path = tmp_path / "grades.jsonl"
    GradeCache(path).keep({key(1): Grade(True, 1.0, "")})
    bad = [
        "{", "[]", "{}", '{"key": "zz", "grade": [true, 1, "", "graded", null]}',
        json.dumps({"key": key(2).hex(), "grade": [1, 1, "", "graded", None]}),
        json.dumps({"key": key(2).hex(), "grade": [True, 1, "", "infra", None]}),
        json.dumps({"key": key(2).hex(), "grade": [True, "1", "", "graded", None]}),
        json.dumps({"key": key(2).hex(), "grade": [True]}), "\xff",
    ]  # fmt: skip
    with open(path, "a", encoding="latin-1") as file:
        file.write("\n".join(bad) + "\n")
    cache = GradeCache(path)
    assert len(cache) == 1
    assert f"{len(bad)} damaged lines" in capfd.readouterr().err


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text('{"id": "a"}\n')
    with pytest.raises(OpenQwenError, match="not a cache of grades"):
        GradeCache(path)
    with pytest.raises(OpenQwenError, match="cannot be read"):
        GradeCache(tmp_path)
    blocked = GradeCache(tmp_path / "new.jsonl")
    (tmp_path / "new.jsonl").mkdir()
    with pytest.raises(OpenQwenError, match="cannot be written"):
        blocked.keep({key(1): Grade(True, 1.0, "")})


def test_a_file_that_was_removed(tmp_path):
    path = tmp_path / "grades.jsonl"
    cache = GradeCache(path)
    cache.keep({key(1): Grade(True, 1.0, "")})
    path.unlink()
    assert cache.find([key(1)]) == {}
    cache.keep({key(2): Grade(True, 1.0, "")})
    assert GradeCache(path).find([key(2)]).keys() == {key(2)}


WRITER = """
    import sys
    from openqwen.tasks import Grade, GradeCache
    cache, first = GradeCache(sys.argv[1]), int(sys.argv[2])
    for number in range(first, first + 200):
        cache.keep({number.to_bytes(16, "big"): Grade(True, 1.0, "x" * (number % 3000))})
    print("done", flush=True)
    while sys.stdin.readline():
        pass
"""


def test_two_processes_and_a_kill(tmp_path):
    path = tmp_path / "grades.jsonl"
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(path)]
    writers = [
        subprocess.Popen([*command, first], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for first in ("0", "1000")
    ]
    reader = GradeCache(path)
    killed = subprocess.Popen([*command, "2000"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    while not any(reader.find(map(key, range(2000, 2200)))):
        assert killed.poll() is None
    killed.kill()
    killed.wait()
    for writer in writers:
        assert writer.stdout.readline() == b"done\n"
        writer.communicate()
    wanted = [key(number) for number in [*range(200), *range(1000, 1200)]]
    assert len(reader.find(wanted)) == 400, "a reader sees what others write"
    assert len(GradeCache(path).find(wanted)) == 400


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "grades.jsonl"
    cache = GradeCache(path)
    cache.keep({key(1): Grade(True, 1.0, "")})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module.os, "fsync", full)
    with pytest.raises(OpenQwenError, match="no space left"):
        cache.keep({key(2): Grade(True, 1.0, "")})
    monkeypatch.undo()
    cache.keep({key(3): Grade(True, 1.0, "")})
    assert {key(1), key(3)} <= GradeCache(path).find(map(key, (1, 2, 3))).keys()
    assert Path(path).read_bytes().endswith(b"\n")
