"""`openqwen evaluate`: from a folder of data to scores, a page, and a comparison of two models."""

import json
import re
from html.parser import HTMLParser

import pytest
from published_forms import write_all
from tiny_chat import model, tokenizer

import openqwen.cli
from openqwen.engine.workers import EngineSource
from openqwen.evaluate import command
from openqwen.evaluate.compare import compare_on, guess_published, read_evaluation
from openqwen.model import save_checkpoint

TASKS = "gsm8k,mmlu-base,hellaswag"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two models, the data of all benchmarks, and the results of both models."""
    folder = tmp_path_factory.mktemp("place")
    write_all(folder / "data")
    for seed, name in enumerate(("qwen2.5-0.5b-instruct", "other")):
        save_checkpoint(model(seed), tokenizer(), folder / name, chat=True)
        assert run(folder, name, "--tasks", TASKS) == 0
    return folder


def run(folder, name, *flags):
    words = ["evaluate", str(folder / name), "--data", str(folder / "data"), "--max-tokens", "8"]
    return openqwen.cli.main([*words, "--output", str(folder / "out" / name), *flags])


def test_results_answers_and_reports_are_written(place, capsys):
    folder = place / "out" / "qwen2.5-0.5b-instruct"
    results = json.loads((folder / "results.json").read_text())
    assert set(results["scores"]) == set(TASKS.split(","))
    assert results["published"] == ["qwen2.5-instruct", "0.5B"]
    gsm8k = results["scores"]["gsm8k"]
    assert (gsm8k["n"], gsm8k["no_answer"] + gsm8k["wrong"] + gsm8k["right"]) == (5, 5)
    assert list(gsm8k["data"]) == ["gsm8k_test.jsonl"]
    rows = [json.loads(line) for line in (folder / "answers/gsm8k.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"gsm8k_test/{n}" for n in range(1, 6)]
    assert all({"prompt", "answer", "reason", "reference"} <= row.keys() for row in rows)
    markdown = (folder / "report.md").read_text()
    assert "| gsm8k | 5 |" in markdown
    assert "49.6" in markdown
    assert json.loads((folder / "report.json").read_text())["models"] == ["qwen2.5-0.5b-instruct"]


def test_a_second_run_loads_no_model_and_gives_the_same_scores(place, monkeypatch, capsys):
    monkeypatch.setattr(EngineSource, "load", None)
    path = place / "out" / "other" / "results.json"
    before, rows = json.loads(path.read_text()), (path.parent / "answers/gsm8k.jsonl").read_text()
    assert run(place, "other", "--tasks", "gsm8k") == 0
    after = json.loads(path.read_text())
    for results in (before, after):
        results["scores"]["gsm8k"].pop("seconds")
    assert after["scores"] == before["scores"]
    assert (path.parent / "answers/gsm8k.jsonl").read_text() == rows
    assert "49.6" not in capsys.readouterr().out, "a model without a known name has no published"


def test_changed_weights_are_asked_again(place, capsys):
    folder, found = place / "changed", []
    for seed in (5, 6, 5):
        save_checkpoint(model(seed), tokenizer(), folder, chat=True)
        assert run(place, "changed", "--tasks", "mmlu-base") == 0
        found.append((place / "out/changed/answers/mmlu-base.jsonl").read_text())
    assert found[0] != found[1]
    assert found[0] == found[2]


def test_the_list_shows_protocol_source_licence_and_data(place, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert openqwen.cli.main(["evaluate", "--list", "--data", str(place / "data")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for text in ("humaneval", "MIT", "at hand", "qwen2.5-instruct", "CC-BY-4.0"):
        assert text in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["evaluate"], "No model is named"),
        (["evaluate", "M"], "No benchmark is named"),
        (["evaluate", "M", "--tasks", "humanevl"], "Did you mean 'humaneval'"),
        (["evaluate", "M", "--tasks", "gsm8k", "--data", "nowhere"], "There is no such folder"),
        (["evaluate", "M", "--tasks", "gsm8k", "--data", "."], "github.com/openai/grade-school"),
        (["evaluate", "M", "--tasks", "qwen2.5-instruct", "--data", "."], "data at hand"),
        (["evaluate", "M", "--tasks", "gsm8k", "--samples", "3"], "--temperature"),
        (["evaluate", "compare", "A"], "needs two"),
        (["evaluate", "compare", "A", "B"], "no results of an evaluation"),
    ],
)
def test_bad_input_is_named(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert openqwen.cli.main(words) == 1
    assert said in capsys.readouterr().err


def test_a_suite_leaves_out_what_is_not_at_hand(place, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/gsm8k_test.jsonl").write_text((place / "data/gsm8k_test.jsonl").read_text())
    words = ["evaluate", str(place / "other"), "--data", str(tmp_path / "data")]
    words += ["--tasks", "qwen2.5-instruct", "--max-tokens", "2", "--output", str(tmp_path / "out")]
    assert openqwen.cli.main(words) == 0
    shown = capsys.readouterr().out
    assert "Left out, as their data is not at hand: ammlu, gpqa" in shown.replace("\n", " ")
    assert set(read_evaluation(tmp_path / "out").scores) == {"gsm8k"}


def test_two_models_are_compared_on_the_same_questions(place, capsys, tmp_path):
    names = [str(place / "out" / name) for name in ("qwen2.5-0.5b-instruct", "other")]
    words = ["evaluate", "compare", *names, "--output", str(tmp_path / "both")]
    assert openqwen.cli.main(words) == 0
    assert "gain of other" in capsys.readouterr().out
    one, other = map(read_evaluation, map(command.Path, names))
    gain = compare_on("hellaswag", one, other)
    assert gain["n"] == 1
    assert compare_on("gsm8k", one, one) | {"test": ""} == {
        "n": 5, "gain": 0.0, "low": 0.0, "high": 0.0, "p": 1.0, "test": "", "won": 0, "lost": 0,
        "note": "",
    }  # fmt: skip
    saved = json.loads((tmp_path / "both" / "report.json").read_text())
    assert {b["name"]: b["comparisons"][1]["n"] for b in saved["benchmarks"]} == {
        "gsm8k": 5, "hellaswag": 1, "mmlu-base": 2,
    }  # fmt: skip


def test_two_runs_into_one_folder_keep_both_scores(place, tmp_path):
    done = read_evaluation(place / "out" / "other")
    empty = done.results | {"scores": {}}
    runs = [command.Evaluation(tmp_path, empty | {"scores": {}}) for _ in range(2)]
    for run_, name in zip(runs, ("gsm8k", "hellaswag")):
        run_.add(name, done.scores[name], done.rows(name))
    assert set(read_evaluation(tmp_path).scores) == {"gsm8k", "hellaswag"}
    another = command.Evaluation(tmp_path, empty | {"identity": "another", "scores": {}})
    another.add("gsm8k", done.scores["gsm8k"], done.rows("gsm8k"))
    assert set(read_evaluation(tmp_path).scores) == {"gsm8k"}, "scores of another model"


def test_a_model_without_a_chat_template_is_told_what_it_can_be_asked(place, capsys):
    save_checkpoint(model(3), tokenizer(), place / "plain", chat=True)
    for path in place.glob("plain/chat_template*"):
        path.unlink()
    path = place / "plain" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": None}))
    assert run(place, "plain", "--tasks", "gsm8k") == 1
    assert "benchmarks that continue a text" in " ".join(capsys.readouterr().err.split())
    assert run(place, "plain", "--tasks", "gsm8k-base") == 0


def test_a_judge_that_ignores_its_format_is_told_with_its_reason(place, capsys):
    assert run(place, "other", "--tasks", "safety", "--judge", str(place / "other")) == 0
    shown = " ".join(capsys.readouterr().err.split())
    assert "answers could not be graded and are left out of the score" in shown
    assert "of them: the judge" in shown


def test_results_of_different_protocols_are_told(place):
    evaluation = read_evaluation(place / "out" / "other")
    other = read_evaluation(place / "out" / "other")
    other.scores["gsm8k"]["form"] = "another"
    assert "different ways" in compare_on("gsm8k", evaluation, other)["note"]


class Elements(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.open = [], []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in ("meta", "circle", "line", "rect", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing(place, tmp_path):
    names = [place / "out" / name for name in ("qwen2.5-0.5b-instruct", "other")]
    page = command.write_reports(tmp_path, [read_evaluation(name) for name in names]).read_text()
    elements = Elements()
    elements.feed(page)
    assert not elements.open
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in elements.found}
    for _, attributes in elements.found:
        assert attributes.get("href", "#").startswith("#")
        assert not {"src", "action"} & attributes.keys()
    assert "url(" not in page
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    for text in ("Models side by side", "49.6", "Ann has 3 pens", "HellaSwag", "No result".lower()):
        assert text in page


def test_text_of_a_model_cannot_act(place, tmp_path):
    evaluation = read_evaluation(place / "out" / "other")
    rows = evaluation.rows("gsm8k")
    rows[0] |= {"answer": "<script>alert(1)</script>\u202e", "id": '"><b>', "category": "<i>"}
    copy = command.Evaluation(tmp_path / "copy", evaluation.results | {"scores": {}})
    copy.add("gsm8k", evaluation.scores["gsm8k"], rows)
    page = command.write_reports(tmp_path, [copy]).read_text()
    assert "&lt;script&gt;alert(1)" in page
    assert not re.findall(r"<script|<b>|<i>|\u202e", page)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", ("qwen2.5-instruct", "0.5B")),
        ("a/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf", ("qwen2.5-coder-instruct", "0.5B")),
        ("Qwen/Qwen2-7B", ("qwen2-base", "7B")),
        ("runs/tiny/sft", None),
    ],
)
def test_published_scores_are_those_of_the_name(name, known):
    assert guess_published(name) == known
