"""Published files of problems as tasks."""

import json
from pathlib import Path

import pytest

from openqwen.support.errors import OpenQwenError
from openqwen.tasks import read_problems, read_tasks, write_tasks

DATA = Path(__file__).parents[3] / "shared" / "data" / "eval"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not here")
MATH = {
    "problem": "What is $1/4 + 1/4$?",
    "level": "Level 1",
    "type": "Prealgebra",
    "solution": r"It is $\boxed{\frac{1}{2}}$.",
}


@needs_data
def test_files_as_they_were_published(tmp_path):
    counts = {"gsm8k": "gsm8k_train", "humaneval": "HumanEval", "mbpp": "mbpp"}
    tasks = {name: read_problems(name, DATA / f"{file}.jsonl.gz") for name, file in counts.items()}
    assert {name: len(each) for name, each in tasks.items()} == {
        "gsm8k": 7473,
        "humaneval": 164,
        "mbpp": 974,
    }
    assert tasks["gsm8k"][0].reference["answer"] == "72"
    assert tasks["humaneval"][5].id == "HumanEval/5"
    splits = [one.origin["split"] for one in tasks["mbpp"]]
    assert [splits.count(name) for name in ("prompt", "test", "validation", "train")] == [
        10, 500, 90, 374,
    ]  # fmt: skip
    mbpp = {one.id: one.reference["entry"] for one in tasks["mbpp"]}
    assert mbpp["mbpp/11"] == "remove_Occ"
    assert "sum" in mbpp.values(), "a function may have the name of a built-in"
    assert tasks["mbpp"][0].origin == {
        "method": "mbpp",
        "kind": "mbpp",
        "file": "mbpp.jsonl.gz",
        "record": 1,
        "split": "prompt",
    }
    for each in tasks.values():
        write_tasks(tmp_path / "tasks.jsonl", each)
        assert read_tasks(tmp_path / "tasks.jsonl") == each


def test_math_is_a_file_or_a_folder(tmp_path):
    folder = tmp_path / "train" / "prealgebra"
    folder.mkdir(parents=True)
    (folder / "1.json").write_text(json.dumps(MATH))
    (task,) = read_problems("math", tmp_path / "train")
    assert (task.id, task.reference["answer"]) == ("math/prealgebra/1.json", r"\frac{1}{2}")
    assert task.prompt == [{"role": "user", "content": MATH["problem"]}]
    lines = tmp_path / "math500.jsonl"
    lines.write_text(json.dumps(MATH | {"answer": "0.5", "unique_id": "test/7.json"}) + "\n")
    (task,) = read_problems("math", lines)
    assert (task.id, task.reference["answer"]) == ("math/test/7.json", "0.5")


@pytest.mark.parametrize(
    ("name", "record", "said"),
    [
        ("gsm8k", {"question": "?"}, "gsm8k needs the field 'answer'"),
        ("gsm8k", {"question": "?", "answer": "72"}, "no line ####"),
        ("math", MATH | {"solution": "none"}, "no \\\\boxed"),
        ("humaneval", {"task_id": "a"}, "humaneval needs the field"),
        ("mbpp", {"code": "def f(): 1", "test_list": ["assert g() == 1"], "text": "",
                  "test_setup_code": "", "task_id": 1}, "call no function of 'code'"),
        ("mbpp", {"code": "def f(:", "test_list": ["assert f() == 1"], "text": "",
                  "test_setup_code": "", "task_id": 1}, "not a record of mbpp"),
        ("mbpp", {"code": "def f(): 1", "test_list": [1], "text": "",
                  "test_setup_code": "", "task_id": 1}, "not a record of mbpp"),
    ],
)  # fmt: skip
def test_a_bad_record_is_named(tmp_path, name, record, said):
    path = tmp_path / "file.jsonl"
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(OpenQwenError, match=said) as caught:
        read_problems(name, path)
    assert f"{path}:1" in str(caught.value)


def test_an_unknown_reader_and_an_empty_file(tmp_path):
    with pytest.raises(OpenQwenError, match=r"no reader 'gsm8'\. Did you mean 'gsm8k'"):
        read_problems("gsm8", tmp_path)
    with pytest.raises(OpenQwenError, match="no problems here"):
        read_problems("math", tmp_path)
